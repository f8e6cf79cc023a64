"""VinDr-CXR's and MS-CXR's tables: columns as in huggingface.co/datasets/sunday-hao/{vindr-cxr-testset,mimic}."""

from __future__ import annotations

from pathlib import Path

import pytest

from clincot.datasets.finding_boxes import ingest_boxes
from clincot.datasets.folder import StudyIndex, load_questions, load_references
from clincot.datasets.ingest.ingest_report import TooManyRefused
from clincot.jsonl import InvalidRecord
from tests.datasets.test_hub_vqa import write_images

HEAD = "image_id,rad_id,class_name,x_min,y_min,x_max,y_max\n"


def read_back(folder: Path) -> dict[str, tuple[str, list[tuple[float, ...]]]]:
    texts = {question.id: question.text for question in load_questions(folder)}
    return {texts[one.question]: (one.answer, [box.xyxy for box in one.boxes]) for one in load_references(folder)}


def test_vindr_with_three_readers(tmp_path: Path) -> None:
    """Images of 16 x 12 pixels. Two of three readers see cardiomegaly, one sees a nodule: yes, and left out."""
    write_images(tmp_path / "train", ["a.png", "b.png"])
    rows = ["a,R1,Cardiomegaly,4,3,12,9", "a,R2,Cardiomegaly,4,3,8,6", "a,R3,Nodule/Mass,0,0,4,3"]
    rows += [f"b,R{reader},No finding,,,," for reader in (1, 2, 3)]
    (tmp_path / "train.csv").write_text(HEAD + "\n".join(rows) + "\n")
    report = ingest_boxes(tmp_path / "train.csv", tmp_path / "out" / "x", absent=1, workers=1)
    found = read_back(tmp_path / "out" / "x")
    assert found["Is there cardiomegaly?"][0] in ("yes", "no")
    questions = list(load_questions(tmp_path / "out" / "x"))
    studies = StudyIndex(tmp_path / "out" / "x")
    answers = {one.question: one for one in load_references(tmp_path / "out" / "x")}
    of_a = [answers[q.id] for q in questions if studies[q.study].source_id == "a"]
    assert [(one.answer, [box.xyxy for box in one.boxes]) for one in of_a] == [
        ("yes", [(0.25, 0.25, 0.75, 0.75), (0.25, 0.25, 0.5, 0.5)])
    ]
    of_b = [answers[q.id] for q in questions if studies[q.study].source_id == "b"]
    assert [(one.answer, one.boxes) for one in of_b] == [("no", ())]
    assert "findings that at most half of an image's readers marked, left out: 1" in report.notes


def test_ms_cxr(tmp_path: Path) -> None:
    """The table states the size of the original, 160 x 120. The file is a tenth of it; the box stays where it is."""
    path = "files/p10/p10233088/s54276838/675d792f.png"
    write_images(tmp_path, [path])
    head = "dicom_id,category_name,label_text,path,x,y,w,h,image_width,image_height,split\n"
    rows = f"675d792f,Pneumonia,Bibasilar opacities,{path},40,30,80,60,160,120,train\n"
    rows += f"675d792f,Pneumonia,Bibasilar opacities,{path},0,0,16,12,160,120,train\n"
    (tmp_path / "ms-cxr.csv").write_text(head + rows)
    ingest_boxes(tmp_path / "ms-cxr.csv", tmp_path / "out" / "x", workers=1)
    assert read_back(tmp_path / "out" / "x") == {
        "Is there pneumonia?": ("yes", [(0.25, 0.25, 0.75, 0.75), (0.0, 0.0, 0.1, 0.1)])
    }
    (study,) = StudyIndex(tmp_path / "out" / "x").values()
    assert (study.patient, study.split) == ("p10233088", "train")


def test_bad_tables_and_images(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png"])
    table = tmp_path / "t.csv"
    table.write_text("image,label\na,b\n")
    with pytest.raises(
        InvalidRecord, match=r"row 1: expected the columns of VinDr-CXR .* or MS-CXR .*, got image, label"
    ):
        ingest_boxes(table, tmp_path / "out" / "x")
    table.write_text(HEAD + "a,R1,Nodule,9,9,4,4\n")
    with pytest.raises(InvalidRecord, match="row 1: expected a box with an area"):
        ingest_boxes(table, tmp_path / "out" / "x")
    table.write_text(HEAD + "a,R1,Nodule,0,0,4,4\nz,R1,Nodule,0,0,4,4\n")
    with pytest.raises(TooManyRefused, match=r"t\.csv:2: image: 'z\.png': the source has no such file"):
        ingest_boxes(table, tmp_path / "out" / "x", workers=1)
    table.write_text(HEAD + "a,R1,Nodule,90,90,99,99\n")
    with pytest.raises(InvalidRecord, match="outside the image of 16 x 12 pixels"):
        ingest_boxes(table, tmp_path / "out" / "y", workers=1)


def test_a_box_of_no_size_costs_its_image_only(tmp_path: Path) -> None:
    """A box 0.0001 pixels wide is 0.00001 of the image, and nothing with 4 decimals."""
    write_images(tmp_path, ["a.png", "b.png"])
    (tmp_path / "t.csv").write_text(HEAD + "a,R1,Nodule,4,3,4.0001,9\nb,R1,Nodule,4,3,12,9\n")
    report = ingest_boxes(tmp_path / "t.csv", tmp_path / "out" / "x", allow_refused=1, workers=1)
    assert report.rows_refused == 1
    assert read_back(tmp_path / "out" / "x") == {"Is there nodule?": ("yes", [(0.25, 0.25, 0.75, 0.75)])}
