"""`clincot ingest dicomweb` against a real Orthanc, over TLS with a private authority (`make test-dicomweb`)."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from email.message import Message
from pathlib import Path

import pydicom
import pytest
from pydicom.data import get_testdata_file

from clincot.cli.app import main
from clincot.datasets.dicom import ingest_dicom
from clincot.datasets.folder import StudyIndex
from clincot.waiting import ServiceWaiting, use_waiting
from tests.datasets.test_dicomweb_ingest import uid, write_archive
from tests.support.dicomweb_stub import BASIC, ROOT_PATH, DicomWebStub
from tests.support.http_server import Request
from tests.support.orthanc import PASSWORD, USER, Archive, orthanc_here

# From pydicom's test set: RLE, JPEG Lossless, JPEG-LS and JPEG 2000, and ten frames
ENCODED = ("MR_small_RLE.dcm", "JPEG-LL.dcm", "MR_small_jpeg_ls_lossless.dcm", "MR_small_jp2klossless.dcm")
FRAMES = "emri_small_RLE.dcm"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_archive(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def archive(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Archive]:
    with orthanc_here(tmp_path_factory.mktemp("orthanc")) as archive:
        archive.add_files(files)
        yield archive


@pytest.fixture(autouse=True)
def login(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACS_LOGIN", f"{USER}:{PASSWORD}")


def ingest(archive: Archive, tmp_path: Path, *words: str) -> int:
    fixed = ("--out", tmp_path / "out", "--salt-file", tmp_path / "salt", "--ca-file", archive.certificate)
    login = ("--basic-env", "PACS_LOGIN", "--burned-in", "off")
    return main(["ingest", "dicomweb", archive.dicomweb, *map(str, fixed), *login, *words])


def read_source_ids(folder: Path) -> set[str]:
    return {study.source_id for study in StudyIndex(folder).values()}


@pytest.mark.parametrize("page_size", ["1", "200"])
def test_the_same_data_set_as_from_the_files_themselves(archive: Archive, tmp_path: Path, page_size: str) -> None:
    """All six images, but not the report, whose series is left out."""
    assert ingest(archive, tmp_path, "--query", "PatientID=MRN4711", "--page-size", page_size) == 0
    paths = tmp_path / "files"
    write_archive(paths)
    (paths / "R0.dcm").unlink()
    ingest_dicom(paths, tmp_path / "local", salt_file=tmp_path / "salt", burned_in="off")
    images = {study.sha256 for study in StudyIndex(tmp_path / "local").values()}
    assert {study.sha256 for study in StudyIndex(tmp_path / "out").values()} == images
    assert len(images) == 6


@pytest.mark.parametrize(
    ("words", "images"),
    [
        (["--query", "StudyDate=20190302-"], 3),
        (["--query", "PatientID=MRN*", "--modality", "CT"], 1),
        (["--query", "ModalitiesInStudy=CR"], 5),
        (["--study", uid("study 1")], 3),
        (["--series", uid("B")], 2),
    ],
)
def test_selections(archive: Archive, tmp_path: Path, words: list[str], images: int) -> None:
    assert ingest(archive, tmp_path, *words) == 0
    assert len(read_source_ids(tmp_path / "out")) == images


def test_instances_arrive_as_they_are_stored(archive: Archive, tmp_path: Path) -> None:
    """Byte for byte, in every encoding: Orthanc neither decompresses nor recompresses them."""
    sent: dict[str, bytes] = {}
    for name in (*ENCODED, FRAMES):
        header = pydicom.dcmread(get_testdata_file(name))
        header.PatientID, header.Modality = "CODECS", header.get("Modality") or "OT"
        header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = uid(name)
        header.StudyInstanceUID, header.SeriesInstanceUID = uid("codecs"), uid(f"series {name}")
        buffer = io.BytesIO()
        header.save_as(buffer, enforce_file_format=True)
        sent[uid(name)] = buffer.getvalue()
        archive.add_instance(buffer.getvalue())
    kept = tmp_path / "kept"
    words = ("--query", "PatientID=CODECS", "--files", str(kept), "--frames", "all")
    assert ingest(archive, tmp_path, *words) == 0
    assert {path.stem: path.read_bytes() for path in kept.rglob("*.dcm")} == sent
    # MR_small three times, which is one picture, JPEG-LL, and the frames
    assert len(read_source_ids(tmp_path / "out")) == 1 + 1 + 10


def test_certificates_and_logins_are_checked(
    archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("ingest", "dicomweb", archive.dicomweb, "--out", str(tmp_path / "out"), "--series", uid("B"))
    assert main([*words, "--basic-env", "PACS_LOGIN"]) == 1
    assert "a certificate that is not trusted (see --ca-file)" in capsys.readouterr().err
    monkeypatch.setenv("PACS_LOGIN", f"{USER}:wrong")
    assert main([*words, "--basic-env", "PACS_LOGIN", "--ca-file", str(archive.certificate)]) == 1
    assert "HTTP 401: the credentials sent were not accepted" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_archive_that_goes_away_is_resumed(
    files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A first run is stopped by a limit. Of its six files two are lost; while the archive is away, nothing is written,
    and when it is back (with the same storage, at another address), only those two are retrieved."""
    kept = tmp_path / "kept"
    words = ("--query", "PatientID=MRN4711", "--files", str(kept))
    (tmp_path / "orthanc").mkdir()
    with orthanc_here(tmp_path / "orthanc") as archive:
        archive.add_files(files)
        assert ingest(archive, tmp_path, *words, "--max-gib", "0.000001") == 1
    first = {path: path.stat().st_mtime_ns for path in sorted(kept.rglob("*.dcm"))}
    assert len(first) == 6
    lost = list(first)[1:3]
    for path in lost:
        path.unlink()
    with use_waiting(ServiceWaiting(budget_s=0)):
        assert ingest(archive, tmp_path, *words) == 1
    assert "the search for studies, page 1: got no reply" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with orthanc_here(tmp_path / "orthanc") as archive:
        assert ingest(archive, tmp_path, *words) == 0
    again = {path: path.stat().st_mtime_ns for path in sorted(kept.rglob("*.dcm"))}
    assert list(again) == list(first)
    assert [path for path in again if again[path] != first[path]] == lost
    assert len(read_source_ids(tmp_path / "out")) == 6


# The stand-in answers as Orthanc does

SEARCHES = [
    "/studies?limit=2&offset=0",
    "/studies?limit=2&offset=2",
    "/studies?limit=2&offset=4",
    "/studies?PatientID=MRN*&limit=9&offset=0",
    "/studies?PatientID=MRN%2A&limit=9&offset=0",
    "/studies?PatientID=nobody&limit=9&offset=0",
    "/studies?StudyDate=20190302-&limit=9&offset=0",
    "/studies?StudyDate=20190301-20190302&limit=9&offset=0",
    "/studies?ModalitiesInStudy=CT&limit=9&offset=0",
    f"/series?SeriesInstanceUID={uid('B')}&limit=9&offset=0",
    f"/studies/{uid('study 1')}/series?limit=9&offset=0",
    f"/studies/{uid('study 1')}/series?limit=9&offset=9",
    "/studies/1.2.3/series?limit=9&offset=0",
    f"/studies/{uid('study 1')}/series/{uid('A')}/instances?limit=2&offset=2",
]
UIDS = ("0020000D", "0020000E", "00080018", "00080060")


@pytest.fixture(scope="module")
def fresh(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Archive, DicomWebStub]]:
    """An archive and a stand-in with the same files, and nothing else."""
    stub = DicomWebStub()
    stub.add_files(files)
    with orthanc_here(tmp_path_factory.mktemp("fresh")) as archive:
        archive.add_files(files)
        yield archive, stub


def ask_stub(stub: DicomWebStub, path: str, accept: str, authorization: str = BASIC) -> tuple[int, bytes, Message]:
    headers = {"accept": accept, "authorization": authorization}
    status, body, *more = stub.reply(Request("GET", ROOT_PATH + path, headers, None))
    message = Message()
    for name, value in (more[0] if more else {}).items():
        message[name] = value
    return status, body if isinstance(body, bytes) else json.dumps(body).encode(), message


@pytest.mark.parametrize("path", SEARCHES)
def test_searches_are_answered_alike(fresh: tuple[Archive, DicomWebStub], path: str) -> None:
    """The same number of results on every page, and over all the same UIDs; the order is the archive's own."""
    archive, stub = fresh
    accept = "application/dicom+json"
    real = archive.http.get(ROOT_PATH + path, headers={"Accept": accept})
    status, body, headers = ask_stub(stub, path, accept)
    assert (real.status_code, real.headers["content-type"]) == (status, headers["content-type"])
    assert len(real.json()) == len(json.loads(body))
    if "limit=9" in path:
        named = [{tag: item[tag]["Value"] for tag in UIDS if tag in item} for item in json.loads(body)]
        found = [
            {tag: item[tag]["Value"] for tag in one if tag in item} for one, item in _pair_items(named, real.json())
        ]
        assert found == named


def _pair_items(named: list[dict[str, list[str]]], items: list[dict[str, dict[str, list[str]]]]):  # type: ignore[no-untyped-def]
    key = "0020000E" if named and "0020000E" in named[0] else "0020000D"
    by_uid = {item[key]["Value"][0]: item for item in items}
    return [(one, by_uid[one[key][0]]) for one in named]


@pytest.mark.parametrize(
    "accept", ['multipart/related; type="application/dicom"; transfer-syntax=*', "application/dicom"]
)
@pytest.mark.parametrize("known", [True, False])
def test_retrievals_are_answered_alike(
    fresh: tuple[Archive, DicomWebStub], files: list[Path], accept: str, known: bool
) -> None:
    archive, stub = fresh
    header = pydicom.dcmread(files[0])
    instance = header.SOPInstanceUID if known else "1.2.3"
    path = f"/studies/{header.StudyInstanceUID}/series/{header.SeriesInstanceUID}/instances/{instance}"
    real = archive.http.get(ROOT_PATH + path, headers={"Accept": accept})
    status, body, headers = ask_stub(stub, path, accept)
    assert real.status_code == status
    if status == 200:
        theirs = Message()
        theirs["Content-Type"] = real.headers["content-type"]
        assert theirs.get_content_type() == headers.get_content_type() == "multipart/related"
        ours, boundary = str(headers.get_param("boundary")), str(theirs.get_param("boundary"))
        assert real.content.replace(boundary.encode(), ours.encode()) == body


def test_wrong_logins_are_answered_alike(fresh: tuple[Archive, DicomWebStub]) -> None:
    archive, stub = fresh
    path = "/studies?limit=1&offset=0"
    real = archive.http.get(ROOT_PATH + path, headers={"Accept": "application/dicom+json"}, auth=("reader", "wrong"))
    status, _, headers = ask_stub(stub, path, "application/dicom+json", authorization="Basic x")
    assert (real.status_code, real.headers["www-authenticate"]) == (status, headers["www-authenticate"])
