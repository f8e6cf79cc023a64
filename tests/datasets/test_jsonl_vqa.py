import contextlib
import hashlib
import json
import os
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clincot.config import PrepareConfig
from clincot.datasets.folder import SeveralImages, StudyIndex, load_questions, load_references
from clincot.datasets.ingest.ingest_report import IngestReport, TooManyRefused
from clincot.datasets.ingest.row_pipeline import RowSplit as Split
from clincot.datasets.jsonl_vqa import ingest_jsonl
from clincot.datasets.near_duplicates import hash_image_file, read_image_hashes
from clincot.errors import InvalidInput
from clincot.evaluation.read_benchmark import read_benchmark
from clincot.geometry import box_from_pixels
from clincot.images import ImageLimits, encode_mask, open_image
from clincot.jsonl import InvalidRecord
from clincot.records import Question, hash_json
from clincot.stages.prepare import prepare

ROW = {"image": "a.png", "question": "Is there an effusion?", "answer": "yes"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with two small radiographs, and room for rows."""
    folder = tmp_path / "source"
    folder.mkdir()
    for number, name in enumerate(("a.png", "b.png")):
        shade = np.arange(12 * 8, dtype=np.uint8).reshape(8, 12) + number
        Image.fromarray(shade).save(folder / name)
    return folder


def rows(source: Path, *given: dict[str, Any] | str) -> Path:
    path = source / "rows.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in given]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(source: Path, row: dict[str, Any] | str) -> str:
    """Why this row, the second of two, is refused; the first must be kept."""
    report = ingest_jsonl(rows(source, {**ROW, "image": "b.png"}, row), source / "out", allow_refused=1)
    assert (report.rows_kept, report.rows_refused) == (1, 1)
    assert report.refused[0].row == 2
    assert report.refused[0].file == str(source / "rows.jsonl")
    return report.refused[0].reason


# What is kept


def test_a_full_row(source: Path, tmp_path: Path) -> None:
    row = {
        "image": "a.png",
        "question": "  Where is the effusion? ",
        "answer": "left base ",
        "kind": "open",
        "boxes": [[0.5, 0.25, 1, 1.0]],
        "modality": "chest x-ray",
        "patient": "p17",
        "split": "train",
        "topic": "zone",
        "finding": "effusion",
        "id": "17-1",
    }
    out = tmp_path / "out"
    ingest_jsonl(rows(source, row), out)
    (question,) = load_questions(out)
    (reference,) = load_references(out)
    studies = StudyIndex(out)
    study = studies[question.study]
    assert (question.text, question.kind, question.topic) == ("Where is the effusion?", "open", "zone")
    assert question.source_id == "17-1"
    assert (reference.question, reference.answer, reference.finding) == (question.id, "left base", "effusion")
    assert [box.xyxy for box in reference.boxes] == [(0.5, 0.25, 1.0, 1.0)]
    assert (study.width, study.height, study.modality, study.patient) == (12, 8, "chest x-ray", "p17")
    assert (study.split, study.source_id) == ("train", "a.png")
    original = (source / "a.png").read_bytes()
    assert study.sha256 == hashlib.sha256(original).hexdigest()
    assert studies.resolve_image_path(study.id).read_bytes() == original


def test_the_answer_is_in_no_file_that_a_policy_reads(source: Path, tmp_path: Path) -> None:
    ingest_jsonl(rows(source, {**ROW, "answer": "xylophone", "finding": "zeppelin"}), tmp_path / "out")
    for name in ("studies.jsonl", "questions.jsonl"):
        text = (tmp_path / "out" / name).read_text()
        assert "xylophone" not in text
        assert "zeppelin" not in text


@pytest.mark.parametrize(
    ("answer", "kind"),
    [("yes", "closed"), ("No.", "closed"), ("left lung", "open"), ("not seen", "open"), (2, "open")],
)
def test_kind_where_the_row_has_none(source: Path, tmp_path: Path, answer: str | int, kind: str) -> None:
    ingest_jsonl(rows(source, {**ROW, "answer": answer}), tmp_path / "out")
    assert [question.kind for question in load_questions(tmp_path / "out")] == [kind]


def test_integer_answers_become_text(source: Path, tmp_path: Path) -> None:
    ingest_jsonl(rows(source, {**ROW, "answer": 2, "id": 17, "patient": 4}), tmp_path / "out")
    assert [reference.answer for reference in load_references(tmp_path / "out")] == ["2"]
    assert [question.source_id for question in load_questions(tmp_path / "out")] == ["17"]


def test_trailing_spaces_are_cut_off(source: Path, tmp_path: Path) -> None:
    ingest_jsonl(rows(source, {**ROW, "answer": "yes \n", "kind": "CLOSED "}), tmp_path / "out")
    assert [question.kind for question in load_questions(tmp_path / "out")] == ["closed"]
    assert [reference.answer for reference in load_references(tmp_path / "out")] == ["yes"]


def test_non_english_text_is_kept_letter_by_letter(source: Path, tmp_path: Path) -> None:
    row = {**ROW, "question": "胸腔积液在哪一侧？", "answer": "izquierda – يسار"}
    ingest_jsonl(rows(source, row), tmp_path / "out")
    assert [question.text for question in load_questions(tmp_path / "out")] == ["胸腔积液在哪一侧？"]
    assert [reference.answer for reference in load_references(tmp_path / "out")] == ["izquierda – يسار"]


def test_sixteen_bit_and_cmyk_images_are_taken_over_as_they_are(source: Path, tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 4095]], dtype=np.uint16)).save(source / "deep.png")
    Image.new("CMYK", (8, 8)).save(source / "print.jpg")
    path = rows(source, {**ROW, "image": "deep.png"}, {**ROW, "image": "print.jpg"})
    ingest_jsonl(path, tmp_path / "out")
    studies = StudyIndex(tmp_path / "out")
    for study in studies.values():
        copied = studies.resolve_image_path(study.id)
        assert copied.read_bytes() == (source / study.source_id).read_bytes()
        assert copied.suffix == Path(study.source_id).suffix
        assert open_image(copied).size == (study.width, study.height)


@pytest.mark.parametrize("form", ["compressed", "list", "polygons"])
def test_masks_as_coco_writes_them(source: Path, tmp_path: Path, form: str) -> None:
    """Without boxes, the mask's own is taken: columns 3 to 8 and rows 2 to 5 of 12 x 8 pixels."""
    width, height = Image.open(source / "a.png").size
    mask_HW = np.zeros((height, width), dtype=bool)
    mask_HW[2:6, 3:9] = True
    mask = encode_mask(mask_HW)
    forms: dict[str, dict[str, Any]] = {
        "compressed": {"counts": mask.counts},
        "list": {"counts": mask.runs},
        "polygons": {"polygons": [[3, 2, 8, 2, 8, 5, 3, 5]]},
    }
    given = {"size": [height, width], **forms[form]}
    ingest_jsonl(rows(source, ROW | {"masks": [given]}), tmp_path / "out")
    (reference,) = load_references(tmp_path / "out")
    assert reference.masks == (mask,)
    assert reference.boxes == (box_from_pixels(3, 2, 9, 6, width=width, height=height),)


def test_questions_of_one_image_share_a_study(source: Path, tmp_path: Path) -> None:
    (source / "copy of a.png").write_bytes((source / "a.png").read_bytes())
    path = rows(
        source,
        ROW,
        {**ROW, "question": "Where?", "answer": "left"},
        {**ROW, "image": "copy of a.png", "question": "How many?", "answer": 1},
        {**ROW, "image": "b.png"},
    )
    report = ingest_jsonl(path, tmp_path / "out")
    assert (report.rows_kept, report.images) == (4, 2)
    assert [counts.studies for counts in report.folders] == [2]
    assert len(list((tmp_path / "out" / "images").iterdir())) == 2
    studies = StudyIndex(tmp_path / "out")
    hashes = {study.sha256: hash_image_file(studies.resolve_image_path(study.id)) for study in studies.values()}
    assert read_image_hashes(tmp_path / "out") == hashes  # kept, so that `decide` opens no image again


def test_images_may_be_linked(source: Path, tmp_path: Path) -> None:
    ingest_jsonl(rows(source, ROW), tmp_path / "out", link_images=True)
    (taken,) = (tmp_path / "out" / "images").iterdir()
    assert os.path.samefile(taken, source / "a.png")
    ingest_jsonl(rows(source, ROW), tmp_path / "copied")
    (taken,) = (tmp_path / "copied" / "images").iterdir()
    assert not os.path.samefile(taken, source / "a.png")


def test_last_line_may_lack_its_newline(source: Path, tmp_path: Path) -> None:
    path = rows(source, ROW)
    path.write_text(path.read_text().rstrip("\n"))
    assert ingest_jsonl(path, tmp_path / "out").rows_kept == 1


def test_same_rows_same_bytes_and_a_second_run_changes_nothing(source: Path, tmp_path: Path) -> None:
    path = rows(source, ROW, {**ROW, "image": "b.png"}, {**ROW, "question": "Where?", "answer": "left"})
    ingest_jsonl(path, tmp_path / "one")
    ingest_jsonl(path, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    before = contents(tmp_path / "one")
    ingest_jsonl(path, tmp_path / "one")
    assert contents(tmp_path / "one") == before


def test_images_of_an_earlier_ingest_do_not_stay_behind(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ingest_jsonl(rows(source, ROW, {**ROW, "image": "b.png"}), out)
    (out / "images" / "README").write_text("not ours")
    (out / "images" / ("0" * 32 + ".png.partial")).write_text("left by a killed run")
    ingest_jsonl(rows(source, ROW), out)
    kept = hashlib.sha256((source / "a.png").read_bytes()).hexdigest()[:32]
    assert {path.name for path in (out / "images").iterdir()} == {f"{kept}.png", "README"}


# The report


def test_report_counts_every_row_once(source: Path, tmp_path: Path) -> None:
    path = rows(
        source,
        {**ROW, "modality": "chest x-ray"},
        {**ROW, "modality": "chest x-ray"},  # repeats row 1
        {**ROW, "modality": "chest x-ray", "question": " Is there an  EFFUSION? ", "answer": "Yes"},  # and so does this
        {**ROW, "image": "b.png", "modality": "abdominal CT"},
        {**ROW, "image": "gone.png"},
    )
    report = ingest_jsonl(path, tmp_path / "out", allow_refused=1)
    assert (report.rows_read, report.rows_kept, report.rows_duplicate, report.rows_refused) == (5, 2, 2, 1)
    assert report.duplicates == (f"{path}:2 repeats row 1", f"{path}:3 repeats row 1")
    assert report.images_by_modality == {"abdominal CT": 1, "chest x-ray": 1}
    assert report.folders[0].questions_by_kind == {"closed": 2}
    written = IngestReport.model_validate_json((tmp_path / "out" / "ingest_report.json").read_text())
    assert written == report
    assert "5 rows read, 2 kept, 2 duplicates dropped, 1 refused" in report.format_summary()
    assert "gone.png" in report.format_summary()


def test_a_report_that_does_not_add_up_is_refused(source: Path, tmp_path: Path) -> None:
    fields = ingest_jsonl(rows(source, ROW), tmp_path / "out").model_dump()
    with pytest.raises(ValueError, match="3 rows read, but 1 kept"):
        IngestReport.model_validate({**fields, "rows_read": 3})


# What is refused, and how it is said


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"question": ""}, "question: String should have at least 1 character (got '')"),
        ({"question": "  "}, "question: String should have at least 1 character"),
        ({"question": None}, "question: Input should be a valid string (got None). Write the question as text"),
        ({"answer": " "}, "answer: String should have at least 1 character"),
        ({"answer": True}, "answer: Input should be a valid string (got True). Write the answer as text"),
        ({"answer": 2.5}, "answer: Input should be a valid string (got 2.5)"),
        ({"answer": ["yes"]}, "answer: Input should be a valid string (got ['yes'])"),
        ({"masks": [{"size": [8, 12], "counts": "00"}]}, "masks.0: the runs of a mask of 8 x 12 pixels add up to 0"),
        ({"masks": [{"size": [8, 8], "counts": [4, 60]}]}, "masks: expected the image's proportions (12 x 8), got 8 x"),
        ({"masks": [{"size": [8, 12]}]}, "expected a mask with either counts or polygons"),
        ({"masks": [{"size": [8, 12], "counts": [4, 92]}], "boxes": [[0, 0, 1, 1]] * 2}, "1 masks and 2 boxes"),
        (
            {"kind": "multiple"},
            """kind: Input should be 'closed', 'open', 'report' or 'choice' (got 'multiple'). Write """,
        ),
        (
            {"colour": "red"},
            "colour: Extra inputs are not permitted (got 'red'). The fields are image, question, answer",
        ),
        ({"modality": 3}, "modality: Input should be a valid string (got 3). Write modality as text"),
        ({"boxes": [[0.1, 0.2, 1.3, 0.4]]}, "boxes.0.x1: Input should be less than or equal to 1 (got 1.3)"),
        ({"boxes": [[-0.1, 0.2, 0.3, 0.4]]}, "boxes.0.x0: Input should be greater than or equal to 0 (got -0.1)"),
        ({"boxes": [[120, 30, 370, 255]]}, "pixels divided by the image's width or height"),
        ({"boxes": [[0.5, 0.2, 0.4, 0.3]]}, "a box needs x0 < x1 and y0 < y1, got (0.5, 0.2, 0.4, 0.3)"),
        ({"boxes": [[0.1, 0.2, 0.3]]}, "expected a box of four numbers [x0, y0, x1, y1] (got [0.1, 0.2, 0.3])"),
        ({"boxes": [0.1, 0.2, 0.3, 0.4]}, "expected a box of four numbers [x0, y0, x1, y1] (got 0.1)"),
        ({"boxes": [["0", "0", "1", "1"]]}, "expected a box of four numbers"),
        ({"image": "gone.png"}, "gone.png: expected a PNG or JPEG file, but there is no such file. Repair or replace"),
        ({"image": "."}, "expected a PNG or JPEG file, got something that is not a regular file"),
    ],
)
def test_bad_field(source: Path, change: dict[str, Any], reason: str) -> None:
    assert reason in refusal(source, {**ROW, **change})


@pytest.mark.parametrize("field", ["image", "question", "answer"])
def test_missing_field(source: Path, field: str) -> None:
    row = {name: value for name, value in ROW.items() if name != field}
    assert f"{field}: Field required" in refusal(source, row)


def test_half_a_character_is_refused(source: Path) -> None:
    half = '{"image": "a.png", "question": "\\ud83d?", "answer": "yes"}'
    assert "this line: half of a surrogate pair, '\\ud83d', is not text" in refusal(source, half)


def test_not_json_in_the_middle_is_one_refused_row(source: Path, tmp_path: Path) -> None:
    report = ingest_jsonl(rows(source, ROW, "<html>", {**ROW, "image": "b.png"}), tmp_path / "out", allow_refused=1)
    assert report.rows_kept == 2
    assert str(report.refused[0]) == (
        f"{source / 'rows.jsonl'}:2: this line: not JSON (Expecting value at column 1): '<html>'."
        " Write one JSON object per line"
    )


def test_corrupt_image(source: Path) -> None:
    (source / "bad.png").write_bytes((source / "a.png").read_bytes()[:60])
    assert "bad.png: expected a whole PNG or JPEG file, but it is damaged or cut off" in refusal(
        source, {**ROW, "image": "bad.png"}
    )


def test_zero_size_image(source: Path) -> None:
    (source / "empty.png").touch()
    assert "empty.png: expected a PNG or JPEG file, got an empty file (0 bytes)" in refusal(
        source, {**ROW, "image": "empty.png"}
    )


def test_huge_image_is_refused_from_its_header(source: Path) -> None:
    body = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    (source / "huge.png").write_bytes(header)
    reason = refusal(source, {**ROW, "image": "huge.png"})
    assert "huge.png: expected at most 50000000 pixels, got 60000 x 60000" in reason


def test_limits_of_the_caller(source: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InvalidRecord, match=r"none of the 1 read could be kept\n.*expected at most 95 pixels, got 12 x 8"
    ):
        ingest_jsonl(rows(source, ROW), tmp_path / "out", limits=ImageLimits(max_pixels=95))


def test_every_row_of_a_bad_image_is_refused(source: Path, tmp_path: Path) -> None:
    path = rows(source, {**ROW, "image": "gone.png"}, ROW, {**ROW, "image": "gone.png", "question": "Where?"})
    report = ingest_jsonl(path, tmp_path / "out", allow_refused=2)
    assert [row.row for row in report.refused] == [1, 3]


def test_duplicate_id(source: Path, tmp_path: Path) -> None:
    path = rows(source, {**ROW, "id": "q1"}, {**ROW, "image": "b.png", "id": "q1"})
    with pytest.raises(TooManyRefused, match=r"rows\.jsonl:2: id: duplicate id 'q1', first at row 1\. Give every row"):
        ingest_jsonl(path, tmp_path / "out")


def test_two_answers_to_one_question(source: Path, tmp_path: Path) -> None:
    with pytest.raises(
        TooManyRefused, match=r"rows\.jsonl:2: answer: row 1 asks the same question about the same image"
    ):
        ingest_jsonl(rows(source, ROW, {**ROW, "answer": "no"}), tmp_path / "out")


def test_one_image_with_two_patients(source: Path, tmp_path: Path) -> None:
    path = rows(source, {**ROW, "patient": "p1"}, {**ROW, "question": "Where?", "patient": "p2"})
    with pytest.raises(TooManyRefused, match=r"\('', 'p2'\), but row 1, with the same image, has \('', 'p1'\)"):
        ingest_jsonl(path, tmp_path / "out")


def test_one_image_in_two_splits(source: Path, tmp_path: Path) -> None:
    path = rows(source, {**ROW, "split": "train"}, {**ROW, "question": "Where?", "split": "test"})
    with pytest.raises(TooManyRefused, match=r"An image in two splits leaks test data"):
        ingest_jsonl(path, tmp_path / "out")


def test_every_reason_says_how_to_mend_it(source: Path, tmp_path: Path) -> None:
    """A sentence that begins with an imperative stands in every reason."""
    bad: list[dict[str, Any] | str] = [
        "<html>",
        "[]",
        {**ROW, "image": "gone.png"},
        {**ROW, "question": ""},
        {**ROW, "boxes": [[1, 2, 3, 4]]},
        {**ROW, "answer": "no"},
        {**ROW, "question": "1", "patient": "other"},
        {**ROW, "question": "2", "split": "test"},
        {**ROW, "image": "b.png", "id": "q1"},
        {**ROW, "topic": 3},
        {**ROW, "colour": 3},
    ]
    report = ingest_jsonl(rows(source, {**ROW, "id": "q1"}, *bad), tmp_path / "out", allow_refused=len(bad))
    assert [row.row for row in report.refused] == list(range(2, len(bad) + 2))
    mends = ("Write ", "Repair ", "Keep ", "Give ", "The fields are ", "put all its rows into one split")
    assert [row.reason for row in report.refused if not any(mend in row.reason for mend in mends)] == []


# Splits


def patients(folder: Path) -> set[str]:
    return {study.patient for study in StudyIndex(folder).values()}


def test_patient_disjoint_split(source: Path, tmp_path: Path) -> None:
    """40 images of 20 patients, with a fifth of the patients in test on average: 4 with a deviation of 1.8."""
    for number in range(40):
        Image.fromarray(np.full((8, 8), number, dtype=np.uint8)).save(source / f"{number}.png")
    path = rows(source, *({**ROW, "image": f"{n}.png", "patient": f"p{n % 20}", "split": "test"} for n in range(40)))
    report = ingest_jsonl(path, tmp_path / "out", split="patient-disjoint")
    train, test = (patients(tmp_path / "out" / name) for name in ("train", "test"))
    assert not train & test
    assert train | test == {f"p{n}" for n in range(20)}
    assert 1 <= len(test) <= 11
    assert {study.split for study in StudyIndex(tmp_path / "out" / "test").values()} == {"test"}
    assert [(leak.train, leak.test, leak.shared_patients) for leak in report.leaks] == [("train", "test", 0)]
    again = ingest_jsonl(path, tmp_path / "again", split="patient-disjoint")
    assert again.folders == report.folders
    other = ingest_jsonl(path, tmp_path / "other", split="patient-disjoint", seed=1)
    assert patients(tmp_path / "other" / "test") != test or other.folders != report.folders


def test_images_without_a_patient_are_patients_of_their_own(source: Path, tmp_path: Path) -> None:
    path = rows(source, *({**ROW, "image": name, "question": f"{n}?"} for n in range(3) for name in ("a.png", "b.png")))
    kept = set()
    for seed in range(12):
        with contextlib.suppress(InvalidRecord):  # both images on one side: refused, see below
            report = ingest_jsonl(path, tmp_path / "out", split="patient-disjoint", test_share=0.5, seed=seed)
            kept.add(tuple(counts.questions for counts in report.folders))
    assert kept == {(3, 3)}  # never an image on both sides
    with pytest.raises(InvalidRecord, match=r"no row for .* in the patient-disjoint split; try another seed"):
        ingest_jsonl(rows(source, ROW), tmp_path / "one", split="patient-disjoint")


def test_a_folder_for_each_split_that_the_rows_name(source: Path, tmp_path: Path) -> None:
    path = rows(
        source,
        {**ROW, "split": "test"},
        {**ROW, "image": "b.png", "split": "train"},
        {**ROW, "question": "Where?", "answer": "left", "split": "train"},  # a.png, which is in test as well
        {**ROW, "question": "Why?"},
        {**ROW, "question": "How?", "split": "../test"},
    )
    report = ingest_jsonl(path, tmp_path / "out", split="by-row", allow_refused=2)
    assert [(counts.folder, counts.questions) for counts in report.folders] == [("train", 2), ("test", 1)]
    assert len(list(load_questions(tmp_path / "out" / "train"))) == 2
    assert [(leak.train, leak.test, leak.shared_images) for leak in report.leaks] == [("train", "test", 1)]
    assert [(row.row, row.reason) for row in report.refused] == [
        (4, "split: expected a name such as train or test, got ''. Give the row one"),
        (5, "split: expected a name such as train or test, got '../test'. Give the row one"),
    ]


def test_leaks_between_the_splits_that_the_rows_name(source: Path, tmp_path: Path) -> None:
    """c.png is a.png with other bytes and another split; patient p1 is on both sides of train and test."""
    with Image.open(source / "a.png") as image:
        image.save(source / "c.png", compress_level=0)
    path = rows(
        source,
        {**ROW, "split": "test", "patient": "p1"},
        {**ROW, "split": "train", "image": "b.png", "patient": "p1"},
        {**ROW, "split": "dev", "image": "c.png"},
    )
    report = ingest_jsonl(path, tmp_path / "out")
    assert [(leak.train, leak.test, leak.near_images, leak.shared_patients) for leak in report.leaks] == [
        ("train", "dev", 1, 0),
        ("train", "test", 1, 1),
        ("dev", "test", 1, 0),
    ]


# What stops everything, and what stays


def test_truncated_file_stops_whatever_may_be_refused(source: Path, tmp_path: Path) -> None:
    path = rows(source, ROW, {**ROW, "image": "b.png"})
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(
        InvalidRecord, match=r"rows\.jsonl:2: not JSON .* the file ends in the middle of a line; it was cut"
    ):
        ingest_jsonl(path, tmp_path / "out", allow_refused=100)
    assert not (tmp_path / "out" / "questions.jsonl").exists()


def test_too_many_refused_rows_still_keep_the_rest(source: Path, tmp_path: Path) -> None:
    """The other rows are written before the error is raised."""
    out = tmp_path / "out"
    bad = {**ROW, "answer": ""}
    path = rows(source, {**ROW, "image": "b.png"}, bad, bad, bad)
    with pytest.raises(TooManyRefused, match="3 rows were refused, 2 allowed; the 1 others were kept") as caught:
        ingest_jsonl(path, out, allow_refused=2)
    assert [row.row for row in caught.value.report.refused] == [2, 3, 4]  # all of them, to be mended in one go
    assert len(list(load_questions(out))) == 1
    assert IngestReport.model_validate_json((out / "ingest_report.json").read_text()) == caught.value.report
    assert ingest_jsonl(path, out, allow_refused=3) == caught.value.report


def test_a_folder_with_one_per_cent_of_damaged_files(source: Path, tmp_path: Path) -> None:
    """200 images of which 2 are cut off: 198 are kept, by one process or by two."""
    names = [f"{number}.png" for number in range(200)]
    for number, name in enumerate(names):
        Image.fromarray(np.full((8, 8), number, dtype=np.uint8)).save(source / name)
    for name in ("17.png", "170.png"):
        (source / name).write_bytes((source / name).read_bytes()[:50])
    path = rows(source, *({**ROW, "image": name} for name in names))
    for workers in (1, 2):
        with pytest.raises(TooManyRefused, match="2 rows were refused, 0 allowed; the 198 others were kept"):
            ingest_jsonl(path, tmp_path / str(workers), workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    report = ingest_jsonl(path, tmp_path / "1", allow_refused=2, workers=1)
    assert (report.rows_kept, [row.row for row in report.refused]) == (198, [18, 171])
    assert all("is damaged or cut off" in row.reason and "Repair or replace" in row.reason for row in report.refused)


def test_refusals_in_the_report_and_on_the_terminal(source: Path, tmp_path: Path) -> None:
    """The report lists every refusal, the terminal the first of them."""
    report = ingest_jsonl(rows(source, ROW, *["<html>"] * 30), tmp_path / "out", allow_refused=30)
    assert len(report.refused) == 30
    assert report.format_summary().count("Write one JSON object per line") == 20
    assert "refused: 10 more, listed in ingest_report.json" in report.format_summary()


def test_nothing_kept_is_no_data_set(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRecord, match=r"rows\.jsonl: expected rows, but none of the 0 read could be kept"):
        ingest_jsonl(rows(source), tmp_path / "out")
    with pytest.raises(
        InvalidRecord, match=r"none of the 1 read could be kept\n  .*rows\.jsonl:1: answer: String should have"
    ):
        ingest_jsonl(rows(source, {**ROW, "answer": ""}), tmp_path / "out", allow_refused=1)


def test_a_folder_that_contains_the_source_is_refused(source: Path) -> None:
    """The records of the data set would replace a source that is called questions.jsonl."""
    path = rows(source, ROW).rename(source / "questions.jsonl")
    before = contents(source)
    for out in (source, source.parent, path):
        with pytest.raises(InvalidInput, match=r"contains the source .*questions\.jsonl"):
            ingest_jsonl(path, out)
    assert contents(source) == before


@pytest.mark.parametrize("name", ["notes.txt", "questions.jsonl", "train/questions.jsonl", "images/a.png"])
def test_a_folder_with_files_of_others_is_refused(name: str, source: Path, tmp_path: Path) -> None:
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(InvalidInput, match=rf"was not written by `clincot ingest` \(it contains .*{name}\)"):
        ingest_jsonl(rows(source, ROW), tmp_path / "out")
    assert contents(tmp_path / "out") == {name: b"mine"}


@pytest.mark.parametrize("split", ["given", "by-row"])
def test_what_an_interrupted_ingest_left_is_replaced(split: Split, source: Path, tmp_path: Path) -> None:
    path = rows(source, {**ROW, "split": "train"})
    ingest_jsonl(path, tmp_path / "out", split=split)
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "ingest_report.json").unlink()
    (tmp_path / "out" / "questions.jsonl.17.partial").write_text("{")
    ingest_jsonl(path, tmp_path / "out", split=split)
    assert {name: content for name, content in contents(tmp_path / "out").items() if name in before} == before


def test_missing_source(tmp_path: Path) -> None:
    with pytest.raises(InvalidRecord, match=r"rows\.jsonl: expected a JSONL file, but the file does not exist"):
        ingest_jsonl(tmp_path / "rows.jsonl", tmp_path / "out")


# Multiple choice and several images


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> Path:
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (12, 16), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


@pytest.mark.parametrize("answer", ["B", "b", "(B)", "B. cyst", "cyst", "Cyst."])
def test_the_answer_of_a_choice_is_a_letter_or_a_text(answer: str, tmp_path: Path) -> None:
    row = {"image": "0.png", "question": "What is it?", "answer": answer, "options": ["mass", "cyst"]}
    ingest_jsonl(write_rows(tmp_path, [row]), tmp_path / "out")
    (question,) = load_questions(tmp_path / "out")
    (reference,) = load_references(tmp_path / "out")
    assert (question.kind, question.asked_text) == ("choice", "What is it?\nA. mass\nB. cyst")
    assert reference.answer == "cyst"


@pytest.mark.parametrize(
    ("options", "answer", "kind", "message"),
    [
        (["mass", "cyst"], "C", None, "the answer 'C' is none of the options 'mass', 'cyst', nor the letter of one"),
        (["mass", "cyst"], "B. mass", None, "the answer 'B. mass' is none of the options"),
        (["mass", "Mass."], "A", None, "2 options read 'mass'"),
        ([], "A", "choice", "expected 2 to 26 options, got 0"),
        (["mass", "cyst"], "A", "open", "a question with options is a choice, got the kind 'open'"),
    ],
)
def test_a_choice_that_cannot_be_scored(
    options: list[str], answer: str, kind: str | None, message: str, tmp_path: Path
) -> None:
    good = {"image": "0.png", "question": "What is it?", "answer": "A", "options": ["mass", "cyst"]}
    bad = good | {"question": "And?", "options": options, "answer": answer} | ({"kind": kind} if kind else {})
    with pytest.raises(TooManyRefused, match=re.escape(message)):
        ingest_jsonl(write_rows(tmp_path, [good, bad]), tmp_path / "out")


def test_questions_without_options_keep_their_ids() -> None:
    """The new fields are absent where they are empty; the id was computed before they existed."""
    question = Question(study="study-1", text="Is it?", kind="closed")
    assert "options" not in question.model_dump()
    assert "others" not in question.model_dump()
    content = {"kind": "closed", "study": "study-1", "text": "Is it?", "topic": "", "version": 1}
    assert question.id == "question-" + hash_json(content)[:20]


def test_further_images_are_kept_in_order_and_refused_by_name_where_one_is_shown(tmp_path: Path) -> None:
    others = [{"image": "1.png", "role": "lateral"}, {"image": "2.png", "role": "prior"}]
    row = {"image": "0.png", "question": "Any change?", "answer": "no", "others": others, "id": "follow-up"}
    report = ingest_jsonl(write_rows(tmp_path, [row]), tmp_path / "out")
    (question,) = load_questions(tmp_path / "out")
    studies = StudyIndex(tmp_path / "out")
    assert [(other.role, studies[other.study].source_id) for other in question.others] == [
        ("lateral", "1.png"),
        ("prior", "2.png"),
    ]
    assert (report.images, report.rows_kept) == (3, 1)
    message = r"question-\w+ \(follow-up\) is about 3 images \(further ones: lateral, prior\)"
    with pytest.raises(SeveralImages, match=message):
        read_benchmark(tmp_path / "out")
    with pytest.raises(SeveralImages, match=message):
        prepare(PrepareConfig(), {"data": tmp_path / "out"}, {"questions": tmp_path / "questions.jsonl"})
    assert not (tmp_path / "questions.jsonl").exists()
