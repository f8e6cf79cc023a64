"""`clincot export dicom`: SR and SEG of a round's regions, read back with highdicom and pydicom."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file

from clincot.cli.app import main
from clincot.datasets.dicom import ingest_dicom
from clincot.datasets.folder import StudyIndex
from clincot.geometry import WHOLE_IMAGE, Box, box_from_xyxy
from clincot.jsonl import write_records
from clincot.records import Question, Region
from clincot.reporting import dicom_export
from clincot.reporting.dicom_export import trace_box
from tests.datasets.test_dicom import IDENTIFYING, write

hd = pytest.importorskip("highdicom", reason="the extra dicom-export is not installed")

BOX = box_from_xyxy((0.25, 0.5, 0.75, 1.0))


def write_film(path: Path, pixels: np.ndarray | None = None, **tags: Any) -> Path:
    """A film with a series, as every real one has. It lacks PatientSex and other elements that may be empty, and its
    PatientBirthDate does not exist (29 February 1942)."""
    return write(path, pixels, SeriesInstanceUID="1.2.3", **tags)


def write_round(tmp_path: Path, source: Path, boxes: dict[str, list[tuple[str, Box]]], **settings: Any) -> Path:
    """Ingest a folder, and write a round with one question about every picture.

    boxes: (hypothesis, box) of each region, by the end of the picture's source id ("" for all pictures).
    """
    ingest_dicom(source, tmp_path / "data", salt_file=tmp_path / "salt", burned_in="off", **settings)
    questions, regions = [], []
    for study in StudyIndex(tmp_path / "data").values():
        question = Question(study=study.id, text="What is seen? 看到什么?", kind="open")
        questions.append(question)
        regions.append(
            Region(question=question.id, hypothesis="whole image", box=WHOLE_IMAGE, confidence=0, grounder="whole")
        )
        for end, marks in boxes.items():
            for hypothesis, box in marks if study.source_id.endswith(end) else ():
                regions.append(
                    Region(question=question.id, hypothesis=hypothesis, box=box, confidence=0.625, grounder="windows")
                )
    write_records(tmp_path / "round" / "questions.jsonl", questions)
    write_records(tmp_path / "round" / "regions.jsonl", regions)
    return tmp_path / "round"


def export(tmp_path: Path, source: Path, *words: str) -> int:
    fixed = ("--data", tmp_path / "data", "--originals", source, "--salt-file", tmp_path / "salt")
    out = ("--out", tmp_path / "objects")
    return main(["export", "dicom", *map(str, (tmp_path / "round", *fixed, *out)), *words])


def read_objects(tmp_path: Path, kind: str) -> list[pydicom.Dataset]:
    return [pydicom.dcmread(path) for path in sorted((tmp_path / "objects").glob(f"*.{kind}.dcm"))]


def read_groups(report: pydicom.Dataset) -> list[Any]:
    """The measurement groups of a report, as highdicom parses them."""
    parsed = hd.sr.ComprehensiveSR.from_dataset(report)
    groups: list[Any] = parsed.content.get_planar_roi_measurement_groups()
    return groups


def read_masks(segmentation: pydicom.Dataset, source: pydicom.Dataset, frames: Sequence[int] = ()) -> np.ndarray:
    """(frames, rows, columns, segments) of what a segmentation marks in an image."""
    parsed = hd.seg.Segmentation.from_dataset(segmentation)
    if frames:
        return np.asarray(parsed.get_pixels_by_source_frame(source.SOPInstanceUID, frames))
    return np.asarray(parsed.get_pixels_by_source_instance([source.SOPInstanceUID], ignore_spatial_locations=True))


def test_a_box_by_hand() -> None:
    """Of 16 columns and 8 rows: x from 4 to 12, y from 4 to 8, once around from the upper left corner."""
    corners = [[4, 4], [12, 4], [12, 8], [4, 8], [4, 4]]
    assert trace_box(BOX, width=16, height=8).tolist() == corners


@pytest.mark.parametrize(
    "tags",
    [
        {},
        {"WindowCenter": 60, "WindowWidth": 20},  # another window shows other grey values at the same places
        {"PixelSpacing": [1, 2]},  # the picture of the data set is stretched to 32 x 8
        {"PixelSpacing": [2, 1], "PhotometricInterpretation": "MONOCHROME1"},  # to 16 x 16
    ],
)
def test_regions_are_where_the_boxes_are(tmp_path: Path, tags: dict[str, Any]) -> None:
    """A film of 16 x 8 pixels; the box covers columns 4 to 11 and rows 4 to 7."""
    source = write_film(tmp_path / "scans" / "a.dcm", np.arange(128, dtype=np.uint16).reshape(8, 16), **tags)
    write_round(
        tmp_path, tmp_path / "scans", {"": [("pleural effusion", BOX), ("shadow", box_from_xyxy((0, 0, 0.5, 0.25)))]}
    )
    assert export(tmp_path, tmp_path / "scans") == 0

    header = pydicom.dcmread(source)
    (report,), (segmentation,) = read_objects(tmp_path, "sr"), read_objects(tmp_path, "seg")
    first, second = read_groups(report)
    assert first.roi.value.tolist() == trace_box(BOX, width=16, height=8).tolist()
    assert second.roi.value.tolist() == [[0, 0], [8, 0], [8, 2], [0, 2], [0, 0]]
    assert (first.finding_type.value, first.finding_type.scheme_designator) == ("60046008", "SCT")
    assert (second.finding_type.meaning, second.finding_type.scheme_designator) == ("shadow", "99CLINCOT")
    (certainty,) = first.get_measurements()
    assert (certainty.value, certainty.unit.value) == (62.5, "%")
    texts = [element.value for element in report.iterall() if element.keyword == "TextValue"]
    assert texts.count("question: What is seen? 看到什么?") == 2
    (evidence,) = report.CurrentRequestedProcedureEvidenceSequence
    (series,) = evidence.ReferencedSeriesSequence
    assert series.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == header.SOPInstanceUID

    masks = read_masks(segmentation, header)
    expected = np.zeros((8, 16, 2), dtype=bool)
    expected[4:8, 4:12, 0] = True
    expected[0:2, 0:8, 1] = True
    assert np.array_equal(masks[0], expected)
    assert [segment.SegmentLabel for segment in segmentation.SegmentSequence] == ["pleural effusion", "shadow"]
    for one in (report, segmentation):  # filed with the examination
        assert (one.StudyInstanceUID, one.PatientID, one.PatientName) == (
            header.StudyInstanceUID,
            "MRN4711",
            "Quince^Ophelia",
        )


def read_frames(report: pydicom.Dataset) -> dict[int, Any]:
    """{frame: its corners} of a report with one region a frame."""
    named = {}
    for group in read_groups(report):
        (frame,) = group.roi.ContentSequence[0].referenced_frame_numbers
        named[frame] = group.roi.value.tolist()
    return named


def test_frames_are_named_by_number(tmp_path: Path) -> None:
    """Both frames of an enhanced CT have a region, each another one."""
    (tmp_path / "scans").mkdir()
    source = Path(get_testdata_file("eCT_Supplemental.dcm"))
    (tmp_path / "scans" / "e.dcm").write_bytes(source.read_bytes())
    other = box_from_xyxy((0, 0, 0.125, 0.25))
    write_round(tmp_path, tmp_path / "scans", {"-1": [("mass", BOX)], "-2": [("nodule", other)]}, frames="all")
    assert export(tmp_path, tmp_path / "scans") == 0
    header = pydicom.dcmread(source)
    (report,), (segmentation,) = read_objects(tmp_path, "sr"), read_objects(tmp_path, "seg")
    size = {"width": 512, "height": 512}
    assert read_frames(report) == {1: trace_box(BOX, **size).tolist(), 2: trace_box(other, **size).tolist()}
    masks = read_masks(segmentation, header, [1, 2])
    numbers = {segment.SegmentLabel: segment.SegmentNumber - 1 for segment in segmentation.SegmentSequence}
    expected = np.zeros((2, 512, 512, 2), dtype=bool)
    expected[0, 256:512, 128:384, numbers["mass"]] = True
    expected[1, 0:128, 0:64, numbers["nodule"]] = True
    assert np.array_equal(masks, expected)


def test_frames_without_a_place_in_space_get_a_report_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten frames of an MR whose header says nothing about their positions; frames 3 and 10 have a region."""
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "e.dcm").write_bytes(Path(get_testdata_file("emri_small.dcm")).read_bytes())
    write_round(tmp_path, tmp_path / "scans", {"-3": [("mass", BOX)], "-10": [("mass", BOX)]}, frames="all")
    assert export(tmp_path, tmp_path / "scans") == 0
    (report,) = read_objects(tmp_path, "sr")
    assert set(read_frames(report)) == {3, 10}
    counts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (counts["segmentations"], counts["segmentations_left_out"]) == (0, 1)


def test_the_same_round_gives_the_same_objects(tmp_path: Path) -> None:
    write_film(tmp_path / "scans" / "a.dcm")
    write_round(tmp_path, tmp_path / "scans", {"": [("mass", BOX)]})
    uids = []
    for _ in range(2):
        assert export(tmp_path, tmp_path / "scans") == 0
        uids.append([one.SOPInstanceUID for kind in ("sr", "seg") for one in read_objects(tmp_path, kind)])
        for path in (tmp_path / "objects").iterdir():
            path.unlink()
    assert uids[0] == uids[1]
    assert len(set(uids[0])) == 2


def test_names_survive_in_any_alphabet(tmp_path: Path) -> None:
    """The film's header is in Latin-1, and the objects are in UTF-8."""
    tags = {"SpecificCharacterSet": "ISO_IR 100", "PatientName": "Müller^Jørgen"}
    write_film(tmp_path / "scans" / "a.dcm", **tags)
    write_round(tmp_path, tmp_path / "scans", {"": [("épanchement", BOX)]})
    assert export(tmp_path, tmp_path / "scans") == 0
    (report,), (segmentation,) = read_objects(tmp_path, "sr"), read_objects(tmp_path, "seg")
    assert report.PatientName == segmentation.PatientName == "Müller^Jørgen"
    assert segmentation.SegmentSequence[0].SegmentLabel == "épanchement"
    assert read_groups(report)[0].finding_type.meaning == "épanchement"


def test_what_has_no_original_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for name in "abc":
        write_film(tmp_path / "scans" / f"{name}.dcm", rng.integers(0, 4000, (4, 6), dtype=np.uint16))
    write_round(tmp_path, tmp_path / "scans", {"": [("mass", BOX)]})
    (tmp_path / "scans" / "b.dcm").unlink()
    (tmp_path / "scans" / "notes.txt").write_text("not DICOM")
    assert export(tmp_path, tmp_path / "scans", "--kind", "sr") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {
        "reports": 2,
        "segmentations": 0,
        "regions": 2,
        "images_without_original": 1,
        "segmentations_left_out": 0,
    }


def test_a_segmentation_that_would_not_fit_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """4 x 6 pixels and one segment are 24 bytes."""
    write_film(tmp_path / "scans" / "a.dcm")
    write_round(tmp_path, tmp_path / "scans", {"": [("mass", BOX)]})
    monkeypatch.setattr(dicom_export, "MAX_MASK_BYTES", 23)
    assert export(tmp_path, tmp_path / "scans") == 0
    counts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (counts["reports"], counts["segmentations"], counts["segmentations_left_out"]) == (1, 0, 1)


@pytest.mark.parametrize("wrong", ["salt", "folder", "missing salt"])
def test_files_of_another_ingest_are_refused(tmp_path: Path, wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_film(tmp_path / "scans" / "a.dcm")
    write_round(tmp_path, tmp_path / "scans", {"": [("mass", BOX)]})
    if wrong == "salt":
        (tmp_path / "salt").write_text("another secret of enough bytes")
    elif wrong == "missing salt":
        (tmp_path / "salt").unlink()
    else:
        write_film(tmp_path / "other" / "b.dcm")
    assert export(tmp_path, tmp_path / ("other" if wrong == "folder" else "scans")) == 1
    said = capsys.readouterr().err
    expected = "but it is missing" if wrong == "missing salt" else "expected the DICOM files of 1 picture of the round"
    assert expected in said
    assert not (tmp_path / "objects").exists()
    assert not (wrong == "missing salt" and (tmp_path / "salt").exists())


def test_a_file_without_a_series_is_named_by_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "scans" / "a.dcm")
    write_round(tmp_path, tmp_path / "scans", {"": [("mass", BOX)]})
    assert export(tmp_path, tmp_path / "scans") == 1
    assert "file 1: expected a file that states" in (said := capsys.readouterr().err)
    assert "SeriesInstanceUID missing" in said


def test_nothing_that_identifies_is_said_or_in_names(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    write_film(tmp_path / "scans" / "a.dcm")
    write_round(tmp_path, tmp_path / "scans", {"": [("mass", BOX)]})
    assert export(tmp_path, tmp_path / "scans") == 0
    names = " ".join(path.name for path in (tmp_path / "objects").iterdir())
    said = "".join(capfd.readouterr()) + caplog.text + names
    assert [value for value in IDENTIFYING.values() if value in said] == []


def test_other_programs_find_no_error(tmp_path: Path) -> None:
    """GDCM's reader, and dciodvfy of dicom3tools if it is installed, which checks an object against its definition."""
    write_film(tmp_path / "scans" / "a.dcm")
    write_round(tmp_path, tmp_path / "scans", {"": [("mass", BOX)]})
    assert export(tmp_path, tmp_path / "scans") == 0
    checker = shutil.which("dciodvfy")
    for path in sorted((tmp_path / "objects").iterdir()):
        import gdcm

        reader = gdcm.Reader()
        reader.SetFileName(str(path))
        assert reader.Read()
        if checker is not None:
            done = subprocess.run([checker, path], capture_output=True, text=True)
            assert [line for line in done.stderr.splitlines() if line.startswith("Error")] == []
