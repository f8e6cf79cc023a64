"""`clincot ingest dicomweb` against a stand-in for Orthanc (tests/dicomweb runs it against the real one).

The archive has three studies of one patient. Study 1 has the series A (CR, 3 films) and R (SR, 1 report), study 2 the
series B (CR, 2 films), study 3 the series C (CT, 1 slice): 6 images and a report.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.uid import generate_uid

from clincot.cli.app import main
from clincot.datasets.folder import StudyIndex, load_questions
from clincot.waiting import ServiceWaiting, use_waiting
from tests.datasets.test_dicom import IDENTIFYING, write
from tests.support.dicomweb_stub import BASIC, MULTIPART, ROOT_PATH, DicomWebStub, dicomweb_stub, wrap_part
from tests.support.http_server import Reply, Request

SERIES = {"A": ("1", "CR", 3), "R": ("1", "SR", 1), "B": ("2", "CR", 2), "C": ("3", "CT", 1)}


def uid(name: str) -> str:
    return generate_uid(entropy_srcs=[name])


def write_archive(folder: Path) -> list[Path]:
    """The files of the archive; their pixels differ, so that no image repeats another."""
    paths, rng = [], np.random.default_rng(0)
    for series, (study, modality, count) in SERIES.items():
        for number in range(count):
            tags = {"StudyInstanceUID": uid(f"study {study}"), "SeriesInstanceUID": uid(series), "Modality": modality}
            tags["StudyDate"] = f"2019030{study}"
            pixels = rng.integers(0, 4000, (4, 6), dtype=np.uint16)
            paths.append(write(folder / f"{series}{number}.dcm", pixels, **tags))
    return paths


@pytest.fixture
def stub(tmp_path: Path) -> DicomWebStub:
    stub = DicomWebStub()
    stub.add_files(write_archive(tmp_path / "archive"))
    return stub


@pytest.fixture
def url(stub: DicomWebStub, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("PACS_LOGIN", "reader:a pass:word")
    with dicomweb_stub(stub) as server, use_waiting(ServiceWaiting(budget_s=20, sleep=lambda seconds: None)):
        yield server.url + ROOT_PATH


def ingest(url: str, tmp_path: Path, *words: str, login: bool = True) -> int:
    """Run the command; the data set goes to tmp_path/out."""
    fixed = ("--out", str(tmp_path / "out"), "--salt-file", str(tmp_path / "salt"), "--burned-in", "off")
    return main(["ingest", "dicomweb", url, *fixed, *(("--basic-env", "PACS_LOGIN") if login else ()), *words])


def count_studies(tmp_path: Path) -> int:
    return len(StudyIndex(tmp_path / "out"))


def partial_files(tmp_path: Path) -> list[Path]:
    """The files that an interrupted run has retrieved."""
    return sorted((tmp_path / ".out.dicomweb.partial").rglob("*.dcm"))


def is_retrieval(request: Request) -> bool:
    return re.search(r"/instances/[\d.]+$", request.path) is not None


def count_retrievals(stub: DicomWebStub) -> Counter[bool]:
    """A counter whose value for True is the number of retrievals from now on."""
    counted = Counter[bool]()

    def count(request: Request) -> None:
        counted[is_retrieval(request)] += 1

    stub.fault = count
    return counted


# What is taken


@pytest.mark.parametrize(
    ("words", "images"),
    [
        (["--query", "PatientID=MRN4711"], 6),
        (["--query", "StudyDate=20190302-"], 3),  # studies 2 and 3: two films and a slice
        (["--query", "StudyDate=20190301-20190302", "--query", "PatientID=MRN*"], 5),
        (["--query", "PatientID=MRN4711", "--modality", "CR"], 5),
        (["--study", "study 1"], 3),
        (["--study", "study 1", "--study", "study 3"], 4),
        (["--series", "B"], 2),
        (["--series", "B", "--series", "C", "--modality", "CT"], 1),
    ],
)
def test_studies_series_and_queries(url: str, tmp_path: Path, words: list[str], images: int) -> None:
    names = [uid(word) if words[at - 1] in ("--study", "--series") else word for at, word in enumerate(words)]
    assert ingest(url, tmp_path, *names) == 0
    assert count_studies(tmp_path) == images
    assert not (tmp_path / ".out.dicomweb.partial").exists()  # the originals are gone


def test_small_pages_give_the_same_list(url: str, tmp_path: Path) -> None:
    """Three studies in pages of one: 1, 1, 1 and an empty one."""
    assert ingest(url, tmp_path, "--query", "PatientID=MRN4711", "--page-size", "1") == 0
    assert count_studies(tmp_path) == 6


def test_series_without_images_are_left_out_and_counted(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ingest(url, tmp_path, "--study", uid("study 1")) == 0
    assert "series without images, not retrieved: 1" in capsys.readouterr().out


def test_questions_name_files_by_their_uids(url: str, tmp_path: Path) -> None:
    film = f"{uid('study 2')}/{uid('B')}/{uid(str(tmp_path / 'archive' / 'B1.dcm'))}.dcm"
    (tmp_path / "q.jsonl").write_text(json.dumps({"image": film, "question": "Is it normal?", "answer": "yes"}) + "\n")
    assert ingest(url, tmp_path, "--series", uid("B"), "--questions", str(tmp_path / "q.jsonl")) == 0
    assert [question.text for question in load_questions(tmp_path / "out")] == ["Is it normal?"]


def test_kept_files_are_not_retrieved_again(url: str, stub: DicomWebStub, tmp_path: Path) -> None:
    asked = count_retrievals(stub)
    words = ("--query", "PatientID=MRN4711", "--files", str(tmp_path / "kept"))
    assert ingest(url, tmp_path, *words) == 0
    assert (asked[True], len(list((tmp_path / "kept").rglob("*.dcm")))) == (6, 6)
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o700
    assert ingest(url, tmp_path, *words) == 0
    assert asked[True] == 6


# What is refused before anything is retrieved


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name what to take"),
        (["--study", "1.2", "--series", "1.3"], "in one of three ways"),
        (["--study", "1.2/../../3"], "expected UIDs"),
        (["--query", "Patient=4711"], "expected the keyword of a DICOM attribute"),  # ignored by Orthanc: all studies
        (["--query", "PatientID"], "expected the keyword of a DICOM attribute with a value"),
        (["--query", "PatientID=nobody"], "expected instances with images, but the selection has none"),
        (["--study", "1.2.3"], "the archive has no study number 1"),
        (["--query", "PatientID=MRN4711", "--max-instances", "5"], "more than 5 instances"),
        (["--query", "PatientID=MRN4711", "--max-gib", "0.000001"], "more than 1073"),  # 2^30 / 10^6 = 1073.7 bytes
        (["--query", "PatientID=MRN4711", "--ca-file", "/dev/null"], "expected certificates in PEM format"),
        (["--query", "PatientID=MRN4711", "--token-env", "TOKEN"], "not both"),
    ],
)
def test_refusals(url: str, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ingest(url, tmp_path, *words) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "studies.jsonl").exists()


@pytest.mark.parametrize(
    ("login", "message"),
    [
        ("", "the environment variable PACS_LOGIN should hold USER:PASSWORD, got nothing"),
        ("reader", "the environment variable PACS_LOGIN should hold USER:PASSWORD, got something else"),
        ("reader:hunter2", "HTTP 401: the credentials sent were not accepted"),
    ],
)
def test_a_wrong_login_is_explained_and_never_shown(
    url: str,
    tmp_path: Path,
    login: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PACS_LOGIN", login)
    assert ingest(url, tmp_path, "--query", "PatientID=MRN4711") == 1
    said = capsys.readouterr().err
    assert message in said
    assert "hunter2" not in said


def test_a_bearer_token(
    url: str, stub: DicomWebStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.authorization = "Bearer token-1"
    assert ingest(url, tmp_path, "--series", uid("B"), login=False) == 1
    assert "HTTP 401: credentials are needed (see --token-env and --basic-env)" in capsys.readouterr().err
    monkeypatch.setenv("PACS_TOKEN", "token-1")
    assert ingest(url, tmp_path, "--series", uid("B"), "--token-env", "PACS_TOKEN", login=False) == 0


# An archive that fails


def fail_instances(numbers: set[int], reply: Reply) -> Any:
    """Answer the retrievals with these numbers, from 1, with `reply`."""
    counted = Counter[str]()

    def fault(request: Request) -> Reply | None:
        if not is_retrieval(request):
            return None
        counted["retrieval"] += 1
        return reply if counted["retrieval"] in numbers else None

    return fault


@pytest.mark.parametrize(
    "reply",
    [
        (503, b""),
        (429, b"", {"Retry-After": "1"}),
        (500, b""),
        (200, b"--x\r\nContent-Type: application/dicom\r\n\r\nDICM", {"Content-Type": "multipart/related; boundary=x"}),
    ],
)
def test_a_passing_fault_costs_another_attempt(
    url: str, stub: DicomWebStub, tmp_path: Path, reply: Reply, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    stub.fault = fail_instances({1, 4}, reply)
    assert ingest(url, tmp_path, "--query", "PatientID=MRN4711", "--connections", "1") == 0
    assert count_studies(tmp_path) == 6


def test_an_archive_that_stops_leaves_no_data_set_and_is_resumed(
    url: str, stub: DicomWebStub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fourth retrieval and all later ones are forbidden; three files are kept, and three remain to be retrieved."""
    stub.fault = fail_instances(set(range(4, 100)), (403, b""))
    words = ("--query", "PatientID=MRN4711", "--connections", "1")
    assert ingest(url, tmp_path, *words) == 1
    assert "instance 4 of 6: got HTTP 403" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert len(partial_files(tmp_path)) == 3
    assert not list((tmp_path / ".out.dicomweb.partial").rglob("*.partial"))
    asked = count_retrievals(stub)
    assert ingest(url, tmp_path, *words) == 0
    assert (asked[True], count_studies(tmp_path), partial_files(tmp_path)) == (3, 6, [])


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((404, b""), "the server lists it, but does not have it (HTTP 404)"),
        ((200, wrap_part(b"no DICOM"), MULTIPART), "not a DICOM file"),
    ],
)
def test_an_instance_that_is_not_to_be_had_is_a_refused_row(
    url: str, stub: DicomWebStub, tmp_path: Path, reply: Reply, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--query", "PatientID=MRN4711", "--connections", "1")
    stub.fault = fail_instances({2}, reply)
    assert ingest(url, tmp_path, *words) == 1
    assert message in capsys.readouterr().out
    assert count_studies(tmp_path) == 5
    stub.fault = fail_instances({2}, reply)
    assert ingest(url, tmp_path, *words, "--allow-refused", "1") == 0


def test_another_instance_than_the_one_asked_for_is_refused(
    url: str, stub: DicomWebStub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.fault = fail_instances({2}, (200, wrap_part(stub.files[0]), MULTIPART))
    assert ingest(url, tmp_path, "--query", "PatientID=MRN4711", "--connections", "1") == 1
    assert "the archive sent another instance than the one asked for" in capsys.readouterr().out


def test_a_server_that_does_not_page_is_found_out(
    url: str, stub: DicomWebStub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ignores `offset` and cuts at `limit`: two of three studies, again and again."""

    def fault(request: Request) -> Reply | None:
        path = re.sub(r"offset=\d+", "offset=0", request.path)
        return None if path == request.path else stub.reply(Request("GET", path, request.headers, None))

    stub.fault = fault
    assert ingest(url, tmp_path, "--query", "PatientID=MRN4711", "--page-size", "2") == 1
    assert "does not page, so its list may be cut off; pass a --page-size above 2" in capsys.readouterr().err
    assert ingest(url, tmp_path, "--query", "PatientID=MRN4711", "--page-size", "4") == 0
    assert count_studies(tmp_path) == 6


def test_an_answer_that_is_no_archives(
    url: str, stub: DicomWebStub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for reply, message in (
        ((200, b'{"studies": []}'), "JSON of another shape"),
        ((200, b'[{"0020000D": {"Value": ["../../etc"]}}]'), "expected a UID as attribute 0020000D"),
        ((302, b"", {"Location": "/login"}), "the service has another address"),
        ((404, b""), "this is not the root of a DICOMweb service"),
    ):
        stub.fault = lambda request, reply=reply: reply  # type: ignore[misc]
        assert ingest(url, tmp_path, "--query", "PatientID=MRN4711") == 1
        assert message in capsys.readouterr().err


def test_nothing_identifies_a_patient_in_what_is_said_logged_or_kept(
    url: str, stub: DicomWebStub, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Neither names nor UIDs, which are in every address; httpx would log addresses at INFO."""
    caplog.set_level(logging.DEBUG)
    stub.fault = fail_instances({2}, (404, b'{"Details": "Quince^Ophelia"}'))
    assert ingest(url, tmp_path, "--query", "PatientID=MRN4711") == 1
    kept = "".join(path.read_text() for path in (tmp_path / "out").glob("*.json*"))
    said = "".join(capfd.readouterr()) + caplog.text + kept
    assert count_studies(tmp_path) == 5
    words = [*IDENTIFYING.values(), *(uid(name) for name in SERIES), uid("study 1"), BASIC.split()[1], "pass:word"]
    assert [word for word in words if word in said] == []
