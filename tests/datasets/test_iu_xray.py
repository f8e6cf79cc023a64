"""IU X-Ray on small folders written in exactly R2Gen's layout."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clincot.datasets.folder import StudyIndex, load_questions
from clincot.datasets.ingest.ingest_report import TooManyRefused
from clincot.datasets.iu_xray import ingest_iu_xray
from clincot.datasets.reports import read_reports
from clincot.jsonl import InvalidRecord

TEXT = "The heart is normal in size. The lungs are clear."


def entry(number: int, split: str = "train", *, views: int = 2, **fields: Any) -> dict[str, Any]:
    name = f"CXR{number}_IM-{number:04d}"
    return {
        "id": name,
        "report": TEXT,
        "image_path": [f"{name}/{view}.png" for view in range(views)],
        "split": split,
    } | fields


def release(folder: Path, *entries: dict[str, Any]) -> Path:
    """annotation.json and images/ID/{0,1}.png; one entry of val and one of test are always there."""
    given = [*entries, entry(901, "val"), entry(902, "test")]
    listed = {part: [one for one in given if one["split"] == part] for part in ("train", "val", "test")}
    folder.mkdir()
    (folder / "annotation.json").write_text(json.dumps(listed))
    for one in given:
        for view, name in enumerate(one["image_path"]):
            path = folder / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            number = int("".join(filter(str.isdigit, one["id"])))
            noise = np.random.default_rng([number, view]).integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(noise).resize((64, 64)).save(path)
    return folder


def reports(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "reports.jsonl").read_text(encoding="utf-8").splitlines()]


def test_views_are_studies_of_one_patient_and_of_one_report(tmp_path: Path) -> None:
    report = ingest_iu_xray(release(tmp_path / "iu", entry(1)), tmp_path / "out")
    studies = StudyIndex(tmp_path / "out" / "train")
    assert [study.source_id for study in studies.values()] == ["CXR1_IM-0001/0.png", "CXR1_IM-0001/1.png"]
    assert {study.patient for study in studies.values()} == {"iu-CXR1"}
    assert {study.modality for study in studies.values()} == {"chest x-ray"}
    (line,) = reports(tmp_path / "out" / "train")
    assert line == {"study": next(iter(studies)), "text": TEXT, "studies": list(studies)}
    assert all(studies.resolve_image_path(one).is_file() for one in studies)
    assert list(load_questions(tmp_path / "out" / "train")) == []
    assert [(counts.folder, counts.studies, counts.reports) for counts in report.folders] == [
        ("train", 2, 1),
        ("val", 2, 1),
        ("test", 2, 1),
    ]
    assert (report.rows_read, report.rows_kept) == (3, 3)
    assert "NC-ND" in report.licence
    assert "JAMIA" in report.citation
    assert "test has 1 entries; the published release has 590" in report.notes
    assert "train/: 1 report on 2 images" in report.format_summary()


def test_one_view_is_enough_and_equal_pictures_are_one_view(tmp_path: Path) -> None:
    source = release(tmp_path / "iu", entry(1, views=1), entry(2), entry(3, views=3))
    copied = source / "images" / "CXR2_IM-0002"
    (copied / "1.png").write_bytes((copied / "0.png").read_bytes())
    report = ingest_iu_xray(source, tmp_path / "out")
    one, same, three = reports(tmp_path / "out" / "train")
    assert "studies" not in one
    assert "studies" not in same
    assert len(three["studies"]) == 3
    assert {"reports on 1 views: 1", "reports on 2 views: 3", "reports on 3 views: 1"} <= set(report.notes)


PLACEHOLDERS = "XXXX-year-old XXXX. Compared to XXXX, no change. XXXXX's device. Heart size is normal XXXX ."


def test_placeholders_are_kept_and_counted(tmp_path: Path) -> None:
    report = ingest_iu_xray(release(tmp_path / "iu", entry(1, report=PLACEHOLDERS), entry(2)), tmp_path / "out")
    assert reports(tmp_path / "out" / "train")[0]["text"] == PLACEHOLDERS
    assert "reports with the placeholder XXXX: 1" in report.notes
    assert "placeholders XXXX kept: 5" in report.notes


def test_placeholders_may_be_dropped(tmp_path: Path) -> None:
    texts = [PLACEHOLDERS, "XXXX. XXXX. The lungs are clear.", "xxxx"]
    source = release(tmp_path / "iu", *(entry(n, report=text) for n, text in enumerate(texts)))
    report = ingest_iu_xray(source, tmp_path / "out", placeholders="drop", allow_refused=1)
    assert [line["text"] for line in reports(tmp_path / "out" / "train")] == [
        "-year-old. Compared to, no change. device. Heart size is normal.",
        "The lungs are clear.",
    ]
    assert [(row.row, row.reason) for row in report.refused] == [
        (3, "report: it consists only of placeholders XXXX. Keep them, or remove the entry")
    ]


def test_a_report_with_a_broken_view_is_refused_whole(tmp_path: Path) -> None:
    source = release(tmp_path / "iu", entry(1), entry(2))
    (source / "images" / "CXR2_IM-0002" / "1.png").unlink()
    with pytest.raises(TooManyRefused, match=r"annotation\.json:2: image: .*CXR2_IM-0002/1\.png.*no such file. Repair"):
        ingest_iu_xray(source, tmp_path / "out")
    assert len(StudyIndex(tmp_path / "out" / "train")) == 2
    assert len(reports(tmp_path / "out" / "train")) == 1


@pytest.mark.parametrize(("text", "counts"), [(TEXT, (4, 3, 1, 0)), ("Clear.", (4, 3, 0, 1))])
def test_a_second_report_that_starts_with_the_same_image(text: str, counts: tuple[int, ...], tmp_path: Path) -> None:
    """A report goes by its first image: two of one image would be a file that nothing reads."""
    again = entry(1, report=text) | {"id": "CXR1_IM-9999"}
    report = ingest_iu_xray(release(tmp_path / "iu", entry(1), again), tmp_path / "out", allow_refused=1)
    assert (report.rows_read, report.rows_kept, report.rows_duplicate, report.rows_refused) == counts
    assert [row.text for row in read_reports(tmp_path / "out" / "train" / "reports.jsonl")] == [TEXT]
    if report.refused:
        assert str(report.refused[0]).startswith("annotation.json:2: report: row 1 starts with the same image but has")


def test_patient_disjoint_split(tmp_path: Path) -> None:
    """CXR7 has two reports, of which the official split has one in train and one in test."""
    again = entry(7, "test") | {"id": "CXR7_IM-9999", "image_path": ["CXR7_IM-9999/0.png"]}
    source = release(tmp_path / "iu", *(entry(n) for n in range(12)), again)
    official = ingest_iu_xray(source, tmp_path / "official")
    assert {(leak.train, leak.test): leak.shared_patients for leak in official.leaks} == {
        ("train", "val"): 0,
        ("train", "test"): 1,
        ("val", "test"): 0,
    }
    sides = set()
    for seed in range(6):
        out = tmp_path / str(seed)
        report = ingest_iu_xray(source, out, split="patient-disjoint", test_share=0.5, seed=seed)
        assert [(leak.shared_images, leak.shared_patients) for leak in report.leaks] == [(0, 0)]
        tests = {study.source_id for study in StudyIndex(out / "test").values()}
        assert ("CXR7_IM-0007/0.png" in tests) == ("CXR7_IM-9999/0.png" in tests)
        sides.add("CXR7_IM-9999/0.png" in tests)
    assert sides == {True, False}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"report": " "}, "report: String should have at least 1 character"),
        ({"image_path": []}, "image_path: Tuple should have at least 1 item"),
        ({"image_path": ["../x.png"]}, "image_path: expected paths inside images/, got ['../x.png']. Fix the entry"),
        ({"id": "patient 3"}, "id: String should match pattern"),
        ({"colour": 1}, "colour: Extra inputs are not permitted (got 1). The fields are id, report, image_path, split"),
        ({"id": "CXR1_IM-0001"}, "id: duplicate id 'CXR1_IM-0001', first at row 1. Keep one of the two"),
    ],
)
def test_bad_entry(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    source = release(tmp_path / "iu", entry(1))
    raw = json.loads((source / "annotation.json").read_text())
    raw["train"].append(entry(2, **fields))
    (source / "annotation.json").write_text(json.dumps(raw))
    report = ingest_iu_xray(source, tmp_path / "out", allow_refused=1)
    (refused,) = report.refused
    assert (refused.file, refused.row) == ("annotation.json", 2)
    assert message in refused.reason


def test_an_entry_in_the_wrong_list(tmp_path: Path) -> None:
    source = release(tmp_path / "iu", entry(1))
    raw = json.loads((source / "annotation.json").read_text())
    raw["train"].append(entry(2, "test"))
    (source / "annotation.json").write_text(json.dumps(raw))
    with pytest.raises(
        TooManyRefused, match=r"split: 'test', but the entry is in the list 'train'\. Make the two equal"
    ):
        ingest_iu_xray(source, tmp_path / "out")


def test_what_is_no_iu_xray(tmp_path: Path) -> None:
    with pytest.raises(InvalidRecord, match=r"annotation\.json: file not found; expected R2Gen's folder"):
        ingest_iu_xray(tmp_path, tmp_path / "out")
    (tmp_path / "annotation.json").write_text("[]")
    with pytest.raises(InvalidRecord, match="expected an object with three lists, train, val, test, got '\\[\\]'"):
        ingest_iu_xray(tmp_path, tmp_path / "out")


def test_an_ingest_without_reports_takes_the_old_ones_away(tmp_path: Path) -> None:
    from clincot.datasets.jsonl_vqa import ingest_jsonl

    source = release(tmp_path / "iu", entry(1))
    ingest_iu_xray(source, tmp_path / "out")
    line = {"image": "images/CXR1_IM-0001/0.png", "question": "Normal?", "answer": "yes"}
    (source / "rows.jsonl").write_text(json.dumps(line) + "\n")
    ingest_jsonl(source / "rows.jsonl", tmp_path / "out" / "train")
    assert not (tmp_path / "out" / "train" / "reports.jsonl").exists()
