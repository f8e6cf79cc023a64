import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from clincot.datasets.folder import StudyIndex, load_questions, load_references
from clincot.datasets.ingest.ingest_report import IngestReport, TooManyRefused
from clincot.datasets.vqa_rad import ingest_vqa_rad
from clincot.jsonl import InvalidRecord

pytestmark = pytest.mark.slow

REAL = Path(__file__).parents[3] / "shared" / "data" / "vqa-rad"
real = pytest.mark.skipif(not REAL.is_dir(), reason=f"VQA-RAD is not at {REAL}")


def row(qid: int | str, image: str, **fields: Any) -> dict[str, Any]:
    return {
        "qid": qid,
        "phrase_type": "freeform",
        "qid_linked_id": f"link-{qid}",
        "image_case_url": f"https://medpix.nlm.nih.gov/case?id={image}",
        "image_name": image,
        "image_organ": "CHEST",
        "evaluation": "not evaluated",
        "question": f"Question {qid}?",
        "question_rephrase": "NULL",
        "question_relation": "NULL",
        "question_frame": "NULL",
        "question_type": "PRES",
        "answer": "Yes",
        "answer_type": "CLOSED",
    } | fields


def release(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """A folder like the official one, each image in a grey of its own."""
    (folder / "images").mkdir(parents=True)
    (folder / "VQA_RAD_Dataset_Public.json").write_text(json.dumps(rows))
    for shade, name in enumerate(sorted({one["image_name"] for one in rows if isinstance(one["image_name"], str)})):
        Image.new("L", (16, 16), shade).save(folder / "images" / Path(name).name)
    return folder


TRAIN, TEST = row(1, "a.jpg"), row(2, "b.jpg", phrase_type="test_freeform")


def answers(folder: Path) -> list[str]:
    return [reference.answer for reference in load_references(folder)]


# The traps


def test_official_split_follows_phrase_type(tmp_path: Path) -> None:
    rows = [TRAIN, TEST, row(3, "a.jpg", phrase_type="para"), row(4, "a.jpg", phrase_type="test_para")]
    report = ingest_vqa_rad(release(tmp_path / "rad", rows), tmp_path / "out")
    assert [question.source_id for question in load_questions(tmp_path / "out" / "train")] == ["1", "3"]
    assert [question.source_id for question in load_questions(tmp_path / "out" / "test")] == ["2", "4"]
    assert report.leaks
    assert report.leaks[0].examples == ("a.jpg",)
    assert "1 of 2 test images also occur in train" in report.format_summary()


def test_trailing_spaces_integer_answers_and_a_missing_field(tmp_path: Path) -> None:
    rows = [
        row(1, "a.jpg", answer=12, answer_type="OPEN"),
        row(2, "a.jpg", answer_type="CLOSED ", question=" Is it there? ", answer="Yes\t"),
        TEST | {"qid": "3"},
    ]
    del rows[1]["question_rephrase"]
    report = ingest_vqa_rad(release(tmp_path / "rad", rows), tmp_path / "out")
    assert answers(tmp_path / "out" / "train") == ["12", "Yes"]
    questions = list(load_questions(tmp_path / "out" / "train"))
    assert [question.kind for question in questions] == ["open", "closed"]
    assert questions[1].text == "Is it there?"
    assert report.notes == (
        "answer types with surrounding spaces, stripped: 1",
        "answers that were numbers, converted to text: 1",
        "rows without question_rephrase, read as NULL: 1",
    )


def test_duplicate_rows_are_dropped_whatever_their_type(tmp_path: Path) -> None:
    again = row(3, "a.jpg", question=TRAIN["question"], phrase_type="para", question_type="ABN")
    report = ingest_vqa_rad(release(tmp_path / "rad", [TRAIN, TEST, again]), tmp_path / "out")
    assert (report.rows_read, report.rows_kept, report.rows_duplicate) == (3, 2, 1)
    assert report.duplicates == ("VQA_RAD_Dataset_Public.json:3 repeats row 1",)


def test_a_row_that_is_in_both_official_sets_stays_in_test(tmp_path: Path) -> None:
    copy = row(3, "b.jpg", question=TEST["question"])
    ingest_vqa_rad(release(tmp_path / "rad", [copy, TRAIN, TEST]), tmp_path / "out")
    assert [question.source_id for question in load_questions(tmp_path / "out" / "train")] == ["1"]
    assert [question.source_id for question in load_questions(tmp_path / "out" / "test")] == ["2"]


def test_missing_image(tmp_path: Path) -> None:
    source = release(tmp_path / "rad", [TRAIN, TEST, row(3, "c.jpg")])
    (source / "images" / "c.jpg").unlink()
    with pytest.raises(
        TooManyRefused, match=r"json:3: image: .*c\.jpg: expected a PNG or JPEG file, but there is no such"
    ):
        ingest_vqa_rad(source, tmp_path / "out")
    report = ingest_vqa_rad(source, tmp_path / "out", allow_refused=1)
    assert (report.rows_kept, report.rows_refused) == (2, 1)


def test_corrupt_image(tmp_path: Path) -> None:
    source = release(tmp_path / "rad", [TRAIN, TEST])
    (source / "images" / "a.jpg").write_bytes((source / "images" / "a.jpg").read_bytes()[:100])
    with pytest.raises(
        InvalidRecord,
        match=r"rows for train \(official split\), but none of the 2 read belongs there\n.*json:1: image: .*a\.jpg",
    ):
        ingest_vqa_rad(source, tmp_path / "out")


def test_duplicate_qid(tmp_path: Path) -> None:
    source = release(tmp_path / "rad", [TRAIN, TEST, row("1", "c.jpg")])
    with pytest.raises(TooManyRefused, match=r"json:3: qid: duplicate id '1', first at row 1"):
        ingest_vqa_rad(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"colour": "red"}, r"json:3: colour: Extra inputs are not permitted \(got 'red'\)\. The fields are qid, "),
        ({"question": " "}, "json:3: question: String should have at least 1 character"),
        ({"answer": ""}, "json:3: answer: String should have at least 1 character"),
        ({"answer": None}, "json:3: answer: Input should be a valid string"),
        ({"answer_type": "MAYBE"}, "json:3: answer_type: Input should be 'CLOSED' or 'OPEN'"),
        ({"phrase_type": "tset_para"}, "json:3: phrase_type: Input should be 'freeform', 'para'"),
        ({"image_name": "../a.jpg"}, "json:3: image_name: String should match pattern"),
    ],
)
def test_bad_field(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    source = release(tmp_path / "rad", [TRAIN, TEST, row(3, "c.jpg", **fields)])
    with pytest.raises(TooManyRefused, match=message):
        ingest_vqa_rad(source, tmp_path / "out")


def test_rows_are_placed_by_the_fields_of_the_record(tmp_path: Path) -> None:
    rows = [row(n, f"{organ}.jpg", image_organ=organ) for n, organ in enumerate(("CHEST", "ABD", "HEAD"))]
    report = ingest_vqa_rad(release(tmp_path / "rad", [*rows, TEST | {"qid": 9}]), tmp_path / "out")
    assert report.images_by_modality == {"abdominal CT": 1, "chest x-ray": 2, "head CT or MR": 1}
    assert all(question.topic == "PRES" for question in load_questions(tmp_path / "out" / "train"))


def test_images_in_both_folders_are_stored_once(tmp_path: Path) -> None:
    ingest_vqa_rad(release(tmp_path / "rad", [TRAIN, row(2, "a.jpg", phrase_type="test_para")]), tmp_path / "out")
    (train,), (test,) = ((tmp_path / "out" / name / "images").iterdir() for name in ("train", "test"))
    assert os.path.samefile(train, test)


# The image-disjoint split


def disjoint_test_images(tmp_path: Path, rows: list[dict[str, Any]], seed: int) -> set[str]:
    source, out = tmp_path / "rad", tmp_path / f"out-{seed}"
    if not source.exists():
        release(source, rows)
    report = ingest_vqa_rad(source, out, split="image-disjoint", test_share=0.5, seed=seed)
    assert report.leaks
    assert (report.leaks[0].shared_images, report.leaks[0].shared_patients) == (0, 0)
    return {study.source_id for study in StudyIndex(out / "test").values()}


@pytest.mark.parametrize("bond", ["qid_linked_id", "image_case_url"])
def test_disjoint_split_keeps_together_what_may_be_one_patient(tmp_path: Path, bond: str) -> None:
    # 0.jpg and 1.jpg share a value, as do 1.jpg and 2.jpg: a chain of three images. The other nine are alone.
    rows = [row(n, f"{n}.jpg") for n in range(12)]
    rows += [row(20, "0.jpg", **{bond: "x"}), row(21, "1.jpg", **{bond: "x"})]
    rows += [row(22, "1.jpg", **{bond: "y"}), row(23, "2.jpg", **{bond: "y"})]
    chain = {"0.jpg", "1.jpg", "2.jpg"}
    sides = set()
    for seed in range(8):
        tests = disjoint_test_images(tmp_path, rows, seed)
        assert chain <= tests or not chain & tests
        sides.add(bool(chain & tests))
    assert sides == {True, False}  # with eight seeds the chain was on either side


def test_disjoint_split_knows_a_copied_image(tmp_path: Path) -> None:
    rows = [row(n, f"{n}.jpg") for n in range(12)]
    source = release(tmp_path / "rad", rows)
    (source / "images" / "1.jpg").write_bytes((source / "images" / "0.jpg").read_bytes())
    for seed in range(8):
        disjoint_test_images(tmp_path, rows, seed)  # asserts that no content is shared


def test_disjoint_split_is_deterministic(tmp_path: Path) -> None:
    rows = [row(n, f"{n}.jpg") for n in range(12)]
    source = release(tmp_path / "rad", rows)
    for out in ("one", "two"):
        ingest_vqa_rad(source, tmp_path / out, split="image-disjoint", seed=3, test_share=0.4)
    one, two = (
        {str(path.relative_to(tmp_path / out)): path.read_bytes() for path in (tmp_path / out).rglob("*.*")}
        for out in ("one", "two")
    )
    assert one == two


# What is no VQA-RAD


def test_a_folder_without_the_questions(tmp_path: Path) -> None:
    with pytest.raises(InvalidRecord, match=r"expected it to contain the file 'VQA_RAD_Dataset_Public\.json' or"):
        ingest_vqa_rad(tmp_path, tmp_path / "out")
    (tmp_path / "VQA_RAD_Dataset_Public.json").write_text("[]")
    with pytest.raises(InvalidRecord, match="expected it to contain the folder 'images' or 'VQA_RAD Image Folder'"):
        ingest_vqa_rad(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n{"qid": 1,', r"Public\.json:2: not JSON"),  # truncated
        ("{}", r"Public\.json: expected a list of questions, got dict"),
        ("[]", r"Public\.json: expected a list of questions, got list"),
        ("[1]", r"Public\.json:1: Input should be a valid dictionary"),
    ],
)
def test_a_broken_questions_file(tmp_path: Path, text: str, message: str) -> None:
    source = release(tmp_path / "rad", [TRAIN])
    (source / "VQA_RAD_Dataset_Public.json").write_text(text)
    with pytest.raises((InvalidRecord, TooManyRefused), match=message):
        ingest_vqa_rad(source, tmp_path / "out")


def test_an_empty_side_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidRecord, match=r"expected rows for test \(official split\), but none of the 1 read belongs there"
    ):
        ingest_vqa_rad(release(tmp_path / "rad", [TRAIN]), tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.jsonl"))


def test_unknown_split(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='split is "official" or "image-disjoint", got \'random\''):
        ingest_vqa_rad(tmp_path, tmp_path / "out", split="random")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"in \(0, 1\), got 1\.0"):
        ingest_vqa_rad(tmp_path, tmp_path / "out", test_share=1.0)


# The real one. Expected numbers: Lau et al. 2018, and the counts published with the data set


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, IngestReport]:
    out = tmp_path_factory.mktemp("official")
    return out, ingest_vqa_rad(REAL, out)


@pytest.fixture(scope="module")
def disjoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, IngestReport]:
    out = tmp_path_factory.mktemp("disjoint")
    return out, ingest_vqa_rad(REAL, out, split="image-disjoint")


@real
def test_real_official_counts(official: tuple[Path, IngestReport]) -> None:
    _, report = official
    assert (report.rows_read, report.rows_duplicate, report.rows_refused) == (2248, 4, 0)
    train, test = report.folders
    assert (train.questions, test.questions) == (1793, 451)
    assert test.questions_by_kind == {"closed": 272, "open": 179}
    assert report.images == 314
    assert report.licence.startswith("CC0")
    assert "180251" in report.citation


@real
def test_real_official_split_leaks(official: tuple[Path, IngestReport]) -> None:
    _, report = official
    assert report.leaks
    assert (report.leaks[0].shared_images, report.leaks[0].test_images) == (202, 203)
    assert "202 of 203 test images also occur in train" in report.format_summary()


@real
def test_real_traps(official: tuple[Path, IngestReport]) -> None:
    out, report = official
    assert report.notes[:2] == (
        "answer types with surrounding spaces, stripped: 2",
        "answers that were numbers, converted to text: 5",
    )
    by_qid = {
        question.source_id: reference.answer
        for folder in (out / "train", out / "test")
        for question, reference in zip(load_questions(folder), load_references(folder), strict=True)
    }
    assert [by_qid[qid] for qid in ("1511", "1568", "1683", "2234", "2235")] == ["4", "2", "2", "12", "12"]


@real
def test_real_disjoint_split_does_not_leak(disjoint: tuple[Path, IngestReport]) -> None:
    out, report = disjoint
    assert report.leaks
    assert (report.leaks[0].shared_images, report.leaks[0].shared_patients) == (0, 0)
    assert report.leaks[0].train_images + report.leaks[0].test_images == 314
    # A fifth of 312 groups, binomial: 62 with a standard deviation of 7
    assert 62 - 4 * 7 < report.leaks[0].test_images < 62 + 4 * 7
    raw = {
        str(one["qid"]): one["qid_linked_id"]
        for one in json.loads((REAL / "VQA_RAD_Dataset_Public.json").read_text(encoding="utf-8"))
    }
    train, test = ({raw[question.source_id] for question in load_questions(out / name)} for name in ("train", "test"))
    assert not train & test


@real
def test_real_images_lie_where_the_studies_say(disjoint: tuple[Path, IngestReport]) -> None:
    out, _ = disjoint
    for name in ("train", "test"):
        studies = StudyIndex(out / name)
        assert all(studies.resolve_image_path(one).is_file() for one in studies)
        assert len(list((out / name / "images").iterdir())) == len(studies)
        assert {question.study for question in load_questions(out / name)} == set(studies)
