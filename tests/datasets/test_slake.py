"""SLAKE on small folders written in exactly the official layout: the parts, the languages, and the boxes."""

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clincot.datasets.folder import StudyIndex, load_questions, load_references
from clincot.datasets.ingest.ingest_report import TooManyRefused
from clincot.datasets.slake import ingest_slake
from clincot.datasets.slake_boxes import find_answer_boxes, find_labels, normalize_box, read_detections
from clincot.evaluation.grounding import best_iou, hits_reference
from clincot.geometry import Box, box_from_xyxy
from clincot.images import decode_mask, measure_mask
from clincot.jsonl import InvalidRecord

WIDTH, HEIGHT = 100, 80
LUNGS = [{"Left Lung": [60, 10, 30, 50]}, {"Right Lung": [10, 10, 30, 50]}, {"Heart": [40, 30, 20, 30]}]
VALUES = {"Left Lung": 3, "Right Lung": 4, "Heart": 12, "Liver": 7}


def row(qid: int, image: int = 0, **fields: Any) -> dict[str, Any]:
    """As in the release, field by field."""
    return {
        "img_id": image,
        "img_name": f"xmlab{image}/source.jpg",
        "question": f"Question {qid}?",
        "answer": "Yes",
        "q_lang": "en",
        "location": "Chest",
        "modality": "X-Ray",
        "answer_type": "CLOSED",
        "base_type": "vqa",
        "content_type": "Organ",
        "triple": ["vhead", "_", "_"],
        "qid": qid,
    } | fields


def release(folder: Path, *, train: Any = (), validate: Any = (), test: Any = (), xyxy: bool = False) -> Path:
    """train.json, validate.json, test.json, mask.txt, imgs/xmlabN/{source.jpg, mask.png, detection.json}."""
    parts = {
        "train": list(train) or [row(1, 0)],
        "validate": list(validate) or [row(2, 1)],
        "test": list(test) or [row(3, 2)],
    }
    (folder / "imgs").mkdir(parents=True)
    for part, rows in parts.items():
        (folder / f"{part}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    (folder / "mask.txt").write_text("".join(f"{value}:{label}\n" for label, value in VALUES.items()))
    for image in sorted({one["img_id"] for rows in parts.values() for one in rows}):
        write_image(folder / "imgs" / f"xmlab{image}", seed=image, xyxy=xyxy)
    return folder


def write_image(folder: Path, *, seed: int, xyxy: bool = False) -> None:
    folder.mkdir()
    noise = np.random.default_rng(seed).integers(0, 256, (8, 10), dtype=np.uint8)
    Image.fromarray(noise).resize((WIDTH, HEIGHT)).convert("RGB").save(folder / "source.jpg")
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    written = []
    for one in LUNGS:
        ((label, (x, y, w, h)),) = one.items()
        mask[y : y + h, x : x + w] = VALUES[label]
        written.append({label: [x, y, x + w, y + h] if xyxy else [x, y, w, h]})
    Image.fromarray(mask).save(folder / "mask.png")
    (folder / "detection.json").write_text(json.dumps(written))


def boxes(folder: Path) -> dict[str, list[tuple[float, ...]]]:
    """{question: its reference boxes}."""
    texts = {question.id: question.text for question in load_questions(folder)}
    return {texts[one.question]: [box.xyxy for box in one.boxes] for one in load_references(folder)}


LEFT, RIGHT, HEART = (0.6, 0.125, 0.9, 0.75), (0.1, 0.125, 0.4, 0.75), (0.4, 0.375, 0.6, 0.75)  # pixels / (100, 80)


# The layout


def test_official_parts_stay_what_they_are(tmp_path: Path) -> None:
    report = ingest_slake(release(tmp_path / "slake"), tmp_path / "out")
    for part, image in (("train", 0), ("validate", 1), ("test", 2)):
        (study,) = StudyIndex(tmp_path / "out" / part).values()
        assert (study.source_id, study.split, study.modality) == (f"xmlab{image}/source.jpg", part, "x-ray")
        assert (study.width, study.height, study.patient) == (WIDTH, HEIGHT, f"slake-xmlab{image}")
    assert [counts.folder for counts in report.folders] == ["train", "validate", "test"]
    assert report.licence == "CC BY 4.0"
    assert "ISBI 2021" in report.citation
    assert [(leak.train, leak.test, leak.shared_images) for leak in report.leaks] == [
        ("train", "validate", 0),
        ("train", "test", 0),
        ("validate", "test", 0),
    ]
    assert "train.json has 1 questions in 'en'; the published release has 4919" in report.notes


def test_the_layout_of_the_hub_and_an_archive_of_it(tmp_path: Path) -> None:
    """BoKelvin/SLAKE has validation.json and imgs.zip; the records are those of the release, byte by byte."""
    source = release(tmp_path / "slake")
    ingest_slake(source, tmp_path / "a")
    (source / "validate.json").rename(source / "validation.json")
    shutil.make_archive(str(source / "imgs"), "zip", source, "imgs")
    shutil.rmtree(source / "imgs")
    ingest_slake(source, tmp_path / "b")
    shutil.make_archive(str(tmp_path / "hub"), "zip", tmp_path, "slake")
    with zipfile.ZipFile(tmp_path / "hub.zip", "a") as archive, zipfile.ZipFile(source / "imgs.zip") as images:
        for name in images.namelist():
            archive.writestr(f"slake/{name}", images.read(name))
    ingest_slake(tmp_path / "hub.zip", tmp_path / "c")
    for part in ("train", "validate", "test"):
        for name in ("studies.jsonl", "questions.jsonl", "references.jsonl"):
            written = {(tmp_path / out / part / name).read_bytes() for out in "abc"}
            assert len(written) == 1, (part, name)
    assert not list(tmp_path.glob(".unpacked-*"))


def test_one_language_at_a_time(tmp_path: Path) -> None:
    """The published set is bilingual: without the flag half of the questions would be in another language."""
    chinese = [row(10 + n, n, q_lang="zh", question="左肺在哪里？", answer="右", answer_type="OPEN") for n in range(3)]
    source = release(
        tmp_path / "slake",
        train=[row(1, 0), chinese[0]],
        validate=[row(2, 1), chinese[1]],
        test=[row(3, 2), chinese[2]],
    )
    english = ingest_slake(source, tmp_path / "en")
    assert [question.text for question in load_questions(tmp_path / "en" / "train")] == ["Question 1?"]
    assert "questions in the other language (zh), left out: 3" in english.notes
    ingest_slake(source, tmp_path / "zh", language="zh")
    assert boxes(tmp_path / "zh" / "test") == {"左肺在哪里？": [LEFT]}


def test_types_and_spaces(tmp_path: Path) -> None:
    rows = [row(1, 0, answer_type="CLOSED ", answer="Yes "), row(4, 0, answer=2, answer_type="OPEN")]
    ingest_slake(release(tmp_path / "slake", train=rows), tmp_path / "out")
    questions = list(load_questions(tmp_path / "out" / "train"))
    assert [(question.kind, question.topic) for question in questions] == [("closed", "Organ"), ("open", "Organ")]
    assert [reference.answer for reference in load_references(tmp_path / "out" / "train")] == ["Yes", "2"]


def test_a_closed_answer_need_not_be_yes_or_no(tmp_path: Path) -> None:
    rows = [row(1, 0, question="Is the lung or the heart bigger?", answer="Lung")]
    ingest_slake(release(tmp_path / "slake", train=rows), tmp_path / "out")
    assert [question.kind for question in load_questions(tmp_path / "out" / "train")] == ["closed"]


def test_near_duplicates_are_reported_or_kept_together(tmp_path: Path) -> None:
    """xmlab20 is xmlab0 saved again: the official split has a near-duplicate in train and test."""
    source = release(
        tmp_path / "slake", train=[row(n, n) for n in range(8)], test=[row(100 + n, 20 + n) for n in range(8)]
    )
    with Image.open(source / "imgs" / "xmlab0" / "source.jpg") as image:
        image.save(source / "imgs" / "xmlab20" / "source.jpg", quality=60)
    report = ingest_slake(source, tmp_path / "official")
    (leak,) = (leak for leak in report.leaks if (leak.train, leak.test) == ("train", "test"))
    assert (leak.shared_images, leak.near_images) == (0, 1)
    assert leak.near_examples == (("xmlab20/source.jpg", "xmlab0/source.jpg"),)
    sides = set()
    for seed in range(6):
        out = tmp_path / str(seed)
        report = ingest_slake(source, out, split="image-disjoint", test_share=0.5, seed=seed)
        assert [(leak.shared_images, leak.near_images) for leak in report.leaks] == [(0, 0)]
        tests = {study.source_id for study in StudyIndex(out / "test").values()}
        assert ("xmlab0/source.jpg" in tests) == ("xmlab20/source.jpg" in tests)
        sides.add("xmlab0/source.jpg" in tests)
    assert sides == {True, False}


def test_the_same_picture_in_two_folders_is_one_patient(tmp_path: Path) -> None:
    source = release(tmp_path / "slake", test=[row(3, 2)])
    (source / "imgs" / "xmlab2" / "source.jpg").write_bytes((source / "imgs" / "xmlab0" / "source.jpg").read_bytes())
    report = ingest_slake(source, tmp_path / "out")
    (leak,) = (leak for leak in report.leaks if (leak.train, leak.test) == ("train", "test"))
    assert (leak.shared_images, leak.shared_patients) == (1, 1)


# Boxes


def test_boxes_of_what_is_asked_for(tmp_path: Path) -> None:
    rows = [
        row(1, 0, question="Where is the left lung?", answer="Right", answer_type="OPEN"),
        row(2, 0, question="Are the lungs healthy?", answer="No"),
        row(3, 0, question="What organs are in the picture?", answer="Heart, Right Lung", answer_type="OPEN"),
        row(4, 0, question="Is there a liver?", answer="No"),
        row(5, 0, question="Is this an X-ray?", answer="Yes"),
    ]
    report = ingest_slake(release(tmp_path / "slake", train=rows), tmp_path / "out")
    assert boxes(tmp_path / "out" / "train") == {
        "Where is the left lung?": [LEFT],
        "Are the lungs healthy?": [LEFT, RIGHT],
        "What organs are in the picture?": [HEART, RIGHT],
        "Is there a liver?": [],  # absent: there is nowhere to look
        "Is this an X-ray?": [],
    }
    findings = [reference.finding for reference in load_references(tmp_path / "out" / "train")]
    assert findings == ["lung", "lung", "heart", "", ""]
    assert "boxes that mask.png confirms (IoU at least 0.75): 9" in report.notes  # three images of three
    assert "questions with boxes: 3" in report.notes


def test_masks_of_what_is_asked_for(tmp_path: Path) -> None:
    """Each box's mask is the part of mask.png that it agrees with; one without such a part has none.

    The heart's pixels are columns 40 to 59 and rows 30 to 59; its mask replaces none of the lungs'. The fourth box, 10
    pixels away from the heart, agrees with nothing.
    """
    rows = [
        row(1, 0, question="Where is the heart?", answer="Center", answer_type="OPEN"),
        row(2, 0, question="Are the lungs healthy?", answer="No"),
        row(3, 0, question="Is there a liver?", answer="Yes"),
    ]
    source = release(tmp_path / "slake", train=rows)
    detections = source / "imgs" / "xmlab0" / "detection.json"
    detections.write_text(json.dumps([*LUNGS, {"Liver": [0, 70, 5, 5]}]))
    report = ingest_slake(source, tmp_path / "out")
    heart, lungs, liver = load_references(tmp_path / "out" / "train")
    expected = np.zeros((HEIGHT, WIDTH), dtype=bool)
    expected[30:60, 40:60] = True
    assert [box.xyxy for box in heart.boxes] == [HEART]
    assert heart.masks[0] is not None
    assert (decode_mask(heart.masks[0]) == expected).all()
    assert [measure_mask(mask).xyxy for mask in lungs.masks if mask] == [LEFT, RIGHT]
    assert liver.boxes
    assert liver.masks == ()
    assert "questions with a mask: 2" in report.notes


def test_boxes_give_hit_and_iou(tmp_path: Path) -> None:
    """The heart is 0.2 x 0.375. A window [0.4, 0.375, 0.8, 0.75] covers it whole at twice its width: IoU 1/2."""
    rows = [row(1, 0, question="Where is the heart?", answer="Center", answer_type="OPEN")]
    ingest_slake(release(tmp_path / "slake", train=rows), tmp_path / "out")
    (reference,) = load_references(tmp_path / "out" / "train")
    assert hits_reference(box_from_xyxy((0.4, 0.375, 0.8, 0.75)), reference.boxes) is True
    assert best_iou(box_from_xyxy((0.4, 0.375, 0.8, 0.75)), reference.boxes) == pytest.approx(0.5)
    assert hits_reference(box_from_xyxy((0.0, 0.0, 0.3, 0.3)), reference.boxes) is False


def test_the_mask_contradicts_a_wrong_box_format(tmp_path: Path) -> None:
    """The right lung [10, 10, 40, 60] is 30 x 50 pixels; read as xywh it is 40 x 60, an IoU of 1500 / 2400 = 0.625.
    The left one, [60, 10, 90, 60], would end 50 pixels outside and is cut to the same 40 x 60."""
    source = release(tmp_path / "slake", xyxy=True)
    with pytest.raises(
        InvalidRecord, match=r"9 boxes .* Read as xywh, 0 agree .*; read as xyxy, 9 agree.*--box-format xyxy"
    ):
        ingest_slake(source, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.jsonl"))
    source_boxes = [row(1, 0, question="Where is the heart?")]
    (source / "train.json").write_text(json.dumps(source_boxes))
    ingest_slake(source, tmp_path / "out", box_format="xyxy")
    assert boxes(tmp_path / "out" / "train") == {"Where is the heart?": [HEART]}


def test_masks_of_other_images_are_noticed(tmp_path: Path) -> None:
    source = release(tmp_path / "slake")
    for folder in (source / "imgs").iterdir():
        Image.fromarray(np.flipud(np.asarray(Image.open(folder / "mask.png")))[:, ::-1].copy()).save(
            folder / "mask.png"
        )
    with pytest.raises(InvalidRecord, match="the masks do not belong to these images"):
        ingest_slake(source, tmp_path / "out")


def test_without_names_any_region_of_the_mask_counts(tmp_path: Path) -> None:
    source = release(tmp_path / "slake")
    detections = read_detections(source / "imgs" / "xmlab0", {})
    assert (detections.checked, detections.as_xywh) == (3, 3)
    assert detections.as_xyxy == 0
    # A label that the mask does not have, and no mask at all: not checked, and counted as such
    assert read_detections(source / "imgs" / "xmlab0", {"heart": 99}).checked == 2
    (source / "imgs" / "xmlab0" / "mask.png").unlink()
    (source / "mask.txt").unlink()
    report = ingest_slake(source, tmp_path / "out")
    assert "boxes that could not be compared with mask.png: 3" in report.notes


def test_images_without_boxes_keep_their_questions(tmp_path: Path) -> None:
    source = release(tmp_path / "slake")
    (source / "imgs" / "xmlab0" / "detection.json").unlink()
    (source / "imgs" / "xmlab1" / "detection.json").write_text("[]")
    report = ingest_slake(source, tmp_path / "out")
    assert report.rows_kept == 3
    assert "images without boxes: 2" in report.notes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ('{"Liver": [1, 2, 3, 4]}', "got dict"),
        ('[{"Liver": [1, 2, 3]}]', "Liver"),
        ('[{"Liver": [1, 2, 3, "4"]}]', "Liver"),
        ('[{"Liver": [1, 2, 3, NaN]}]', "nan"),
        ('[{"Liver": [1, 2, 3, 4], "Heart": [1, 2, 3, 4]}]', "Heart"),
    ],
)
def test_a_broken_detection_file(tmp_path: Path, text: str, message: str) -> None:
    source = release(tmp_path / "slake", train=[row(1, 0), row(4, 5)])
    (source / "imgs" / "xmlab5" / "detection.json").write_text(text)
    report = ingest_slake(source, tmp_path / "out", allow_refused=1)
    (refused,) = report.refused
    assert (refused.file, refused.row) == ("train.json", 2)
    assert "xmlab5/detection.json: expected a list of {label: [four numbers]}" in refused.reason
    assert message in refused.reason
    assert "Fix the file, or remove it to keep the image's questions without boxes" in refused.reason


def test_a_box_is_cut_to_its_image() -> None:
    assert normalize_box((90, 70, 20, 20), "xywh", width=100, height=80) == box_from_xyxy((0.9, 0.875, 1, 1))
    assert normalize_box((100, 0, 20, 20), "xywh", width=100, height=80) is None
    assert normalize_box((30, 30, 20, 20), "xyxy", width=100, height=80) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Where is the left kidney?", [("kidney", "left")]),
        ("Are both kidneys there?", [("kidney", "")]),
        ("Is lung cancer in the right lung?", [("lung cancer", ""), ("lung", "right")]),
        ("What does the tumor look like?", [("brain enhancing tumor", ""), ("brain non-enhancing tumor", "")]),
        ("Brain Non-enhancing Tumor", [("brain non-enhancing tumor", "")]),
        ("Which plane is scanned?", []),
        ("The lunge", []),
        ("右侧肺癌在哪里？", [("lung cancer", "right")]),
        ("图中有左肾吗？", [("kidney", "left")]),
    ],
)
def test_what_a_text_names(text: str, expected: list[tuple[str, str]]) -> None:
    bases = ["lung", "lung cancer", "kidney", "brain enhancing tumor", "brain non-enhancing tumor"]
    assert find_labels(text, bases) == expected


def test_the_answers_side_chooses_the_box() -> None:
    left, right = Box(x0=0.5, y0=0, x1=1, y1=1), Box(x0=0, y0=0, x1=0.5, y1=1)
    detections = [("Left Lung", left), ("Right Lung", right)]
    assert find_answer_boxes("Which lung is abnormal?", "Left", detections, ["lung"]) == ("lung", (left,))
    assert find_answer_boxes("Which lung is abnormal?", "Both", detections, ["lung"]) == ("lung", (left, right))
    assert find_answer_boxes("Is the right lung healthy?", "No", detections, ["lung"]) == ("lung", (right,))


# What is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"q_lang": "de"}, "q_lang: Input should be 'en' or 'zh'"),
        ({"answer_type": "MAYBE"}, "answer_type: Input should be 'OPEN' or 'CLOSED'"),
        ({"answer": ""}, "answer: String should have at least 1 character"),
        ({"img_name": "../xmlab0.jpg"}, "img_name: String should match pattern"),
        ({"img_name": "xmlab9/source.jpg"}, "there is no such file. Repair or replace the file, or remove the row"),
        ({"modality": "CT"}, "Give all rows of an image the same"),
        (
            {"question": "Question 1?", "answer": "No"},
            "answer: train.json:1 asks the same question about the same image",
        ),
    ],
)
def test_a_bad_row_is_refused_by_file_and_number(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    source = release(tmp_path / "slake", train=[row(1, 0), row(4, 0, **fields)])
    with pytest.raises(TooManyRefused) as caught:
        ingest_slake(source, tmp_path / "out")
    (refused,) = caught.value.report.refused
    assert (refused.file, refused.row) == ("train.json", 2)
    assert message in refused.reason
    assert caught.value.report.rows_kept == 3


def test_what_is_no_slake(tmp_path: Path) -> None:
    with pytest.raises(InvalidRecord, match="expected it to contain the folder 'imgs'"):
        ingest_slake(tmp_path, tmp_path / "out")
    source = release(tmp_path / "slake")
    (source / "validate.json").rename(source / "val.json")
    with pytest.raises(InvalidRecord, match=r"validate\.json: file not found; SLAKE has train\.json, validate\.json"):
        ingest_slake(source, tmp_path / "out")
    (source / "validate.json").write_text('[{"img_id": 1,')
    with pytest.raises(InvalidRecord, match=r"validate\.json:1: not JSON .*download it again"):
        ingest_slake(source, tmp_path / "out")


def test_same_release_same_bytes_with_one_process_and_with_two(tmp_path: Path) -> None:
    """70 images: enough for the pool to start."""
    source = release(
        tmp_path / "slake", train=[row(n, n) for n in range(68)], validate=[row(90, 90)], test=[row(91, 91)]
    )
    for workers in (1, 2):
        ingest_slake(source, tmp_path / str(workers), workers=workers)
    one, two = (
        {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.*")}
        for out in (tmp_path / "1", tmp_path / "2")
    )
    assert one == two
