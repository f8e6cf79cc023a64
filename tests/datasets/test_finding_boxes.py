"""VinDr-CXR's and MS-CXR's tables: columns as in huggingface.co/datasets/sunday-hao/{vindr-cxr-testset,mimic}."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clincot.datasets.finding_boxes import ingest_boxes
from clincot.datasets.folder import StudyIndex, load_questions, load_references
from clincot.datasets.ingest.ingest_report import TooManyRefused
from clincot.images import open_image
from clincot.jsonl import InvalidRecord
from tests.datasets.test_dicom import write
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


# The releases as they are. VinDr-CXR 1.0.0: annotations/annotations_{train,test}.csv, image_labels_{train,test}.csv,
# train/ID.dicom and test/ID.dicom (vinbigdata-medical/vindr-cxr; physionet.org/content/vindr-cxr/1.0.0). MS-CXR 0.1 and
# 1.1.0: MS_CXR_Local_Alignment_v….csv with the columns that its own convert_coco_json_to_csv.py writes, and paths of
# MIMIC-CXR-JPG 2.0.0 (physionet.org/content/ms-cxr).

IMAGE, OTHER = "0108949daa13dc94634a7d650a05c0bb", "3e3ca3dd2d1bb0fcb2ae9e7fb8b2ce65"


def write_vindr(folder: Path) -> Path:
    """Three readers see a heart of 4 x 3 pixels in a film of 16 x 12, inverted and without a patient's number."""
    for part, name in (("train", IMAGE), ("test", OTHER)):
        pixels = np.arange(192, dtype=np.uint16).reshape(12, 16)
        pixels = pixels[:, ::-1].copy() if part == "test" else pixels
        tags = {"PatientID": None, "PatientName": None, "PhotometricInterpretation": "MONOCHROME1"}
        write(folder / part / f"{name}.dicom", pixels, **tags)
    (folder / "annotations").mkdir()
    rows = [f"{IMAGE},R{reader},Cardiomegaly,4,3,8,6" for reader in (9, 10, 8)]
    (folder / "annotations" / "annotations_train.csv").write_text(HEAD + "\n".join(rows) + "\n")
    test = f"image_id,class_name,x_min,y_min,x_max,y_max\n{OTHER},No finding,,,,\n"
    (folder / "annotations" / "annotations_test.csv").write_text(test)
    labels = f"image_id,rad_id,Cardiomegaly,Pneumonia,No finding\n{IMAGE},R9,1,0,0\n"
    (folder / "annotations" / "image_labels_train.csv").write_text(labels)
    return folder


def test_vindr_as_released(tmp_path: Path) -> None:
    """The box of pixels 4 to 8 of 16 and 3 to 6 of 12; the test image is asked about the class that it lacks."""
    report = ingest_boxes(write_vindr(tmp_path / "vindr"), tmp_path / "out", split="by-row", workers=1)
    assert report.rows_kept == 2
    assert read_back(tmp_path / "out" / "train") == {"Is there cardiomegaly?": ("yes", [(0.25, 0.25, 0.5, 0.5)])}
    assert read_back(tmp_path / "out" / "test") == {"Is there cardiomegaly?": ("no", [])}
    (study,) = StudyIndex(tmp_path / "out" / "train").values()
    assert (study.source_id, study.width, study.height) == (IMAGE, 16, 12)
    pixels = np.asarray(open_image(tmp_path / "out" / "train" / study.image))[..., 0]
    assert pixels[0, 0] > pixels[-1, -1]  # MONOCHROME1: low values are bright


def test_one_table_of_vindr_finds_the_images_of_the_release(tmp_path: Path) -> None:
    table = write_vindr(tmp_path / "vindr") / "annotations" / "annotations_train.csv"
    assert ingest_boxes(table, tmp_path / "out", workers=1).rows_kept == 1


def test_boxes_of_dicom_are_in_its_own_pixels(tmp_path: Path) -> None:
    """The film's pixels are twice as high as wide, so the picture is 16 x 24; the box keeps its share of it."""
    write_vindr(tmp_path / "vindr")
    write(
        tmp_path / "vindr" / "train" / f"{IMAGE}.dicom",
        np.arange(192, dtype=np.uint16).reshape(12, 16),
        PixelSpacing=[2, 1],
    )
    ingest_boxes(tmp_path / "vindr", tmp_path / "out", split="by-row", workers=1)
    (study,) = StudyIndex(tmp_path / "out" / "train").values()
    assert (study.width, study.height) == (16, 24)
    assert read_back(tmp_path / "out" / "train") == {"Is there cardiomegaly?": ("yes", [(0.25, 0.25, 0.5, 0.5)])}


def test_a_dicom_file_that_is_cut_off_costs_its_image_only(tmp_path: Path) -> None:
    path = write_vindr(tmp_path / "vindr") / "test" / f"{OTHER}.dicom"
    path.write_bytes(path.read_bytes()[:-100])
    report = ingest_boxes(tmp_path / "vindr", tmp_path / "out", allow_refused=1, workers=1)
    assert (report.rows_kept, report.rows_refused) == (1, 1)
    assert report.refused[0].file == "annotations_test.csv"


@pytest.mark.parametrize("version", ["v1.0.0", "v1.1.0"])
@pytest.mark.parametrize("suffix", [".jpg", ".dcm"])
def test_ms_cxr_as_released(tmp_path: Path, version: str, suffix: str) -> None:
    """The release has no images: they are MIMIC-CXR-JPG's, or the DICOM files of MIMIC-CXR in the same folders.

    The film has 16 x 12 pixels, as the table says; the phrase has two boxes, in two rows.
    """
    name = "files/p10/p10233088/s50359774/1c9c2d7c-3b1b1c1c-8f6e5c3d-9a0d2d1b-4e5f6a7b"
    image = tmp_path / "mimic" / (name + suffix)
    if suffix == ".dcm":
        write(image, np.arange(192, dtype=np.uint16).reshape(12, 16))
    else:
        write_images(tmp_path / "mimic", [name + ".png"])
        Image.open(tmp_path / "mimic" / (name + ".png")).convert("L").save(image)
        (tmp_path / "mimic" / (name + ".png")).unlink()
    head = "dicom_id,category_name,label_text,path,x,y,w,h,image_width,image_height"
    split = ",split" if version == "v1.1.0" else ""
    row = f"{Path(name).name},Pleural Effusion,small right effusion,{name}.jpg"
    rows = [f"{row},{box},16,12{',val' if split else ''}" for box in ("4,3,4,3", "8,6,8,6")]
    release = tmp_path / "ms-cxr"
    release.mkdir()
    (release / f"MS_CXR_Local_Alignment_{version}.csv").write_text("\n".join([head + split, *rows]) + "\n")
    (release / f"MS_CXR_Local_Alignment_{version}.json").write_text("{}")
    ingest_boxes(release, tmp_path / "out", images=tmp_path / "mimic", workers=1)
    boxes = [(0.25, 0.25, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0)]
    assert read_back(tmp_path / "out") == {"Is there pleural effusion?": ("yes", boxes)}
    (study,) = StudyIndex(tmp_path / "out").values()
    assert (study.patient, study.split) == ("p10233088", "val" if split else "")


def test_a_folder_of_neither_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRecord, match=r"expected a table, or a folder with annotations/annotations_train\.csv"):
        ingest_boxes(tmp_path, tmp_path / "out")
    write_vindr(tmp_path / "vindr")
    with pytest.raises(InvalidRecord, match="expected a folder of images, but it does not exist"):
        ingest_boxes(tmp_path / "vindr", tmp_path / "out", images=tmp_path / "nowhere")
