import hashlib
from collections import Counter
from pathlib import Path

import pytest

from clincot.datasets.folder import (
    StudyIndex,
    assign_round,
    find_split_leakage,
    load_questions,
    load_references,
    split_rounds,
)
from clincot.jsonl import InvalidRecord, write_records
from clincot.records import Question, Reference, Study


def study(number: int, *, patient: str = "", image: str = "") -> Study:
    sha256 = hashlib.sha256(str(number).encode()).hexdigest()
    return Study(
        image=image or f"images/{number}.png",
        sha256=sha256,
        width=8,
        height=8,
        patient=patient,
        source_id=f"{number}.png",
    )


def folder_of(path: Path, studies: list[Study]) -> Path:
    questions = [Question(study=one.id, text=f"{n}?", kind="open") for one in studies for n in range(3)]
    write_records(path / "studies.jsonl", studies)
    write_records(path / "questions.jsonl", questions)
    write_records(path / "references.jsonl", (Reference(question=one.id, answer="yes") for one in questions))
    return path


def test_what_was_written_is_read(tmp_path: Path) -> None:
    studies = [study(number) for number in range(4)]
    folder = folder_of(tmp_path, studies)
    questions = list(load_questions(folder))
    assert [question.text for question in questions] == ["0?", "1?", "2?"] * 4
    assert [reference.question for reference in load_references(folder)] == [question.id for question in questions]


def test_studies_by_id(tmp_path: Path) -> None:
    studies = [study(number) for number in range(20)]
    index = StudyIndex(folder_of(tmp_path, studies))
    assert len(index) == 20
    assert list(index) == [one.id for one in studies]
    for one in reversed(studies):
        assert index[one.id] == one
    assert index.resolve_image_path(studies[3].id) == tmp_path / "images" / "3.png"


def test_studies_by_id_with_blank_lines_and_long_letters(tmp_path: Path) -> None:
    """Offsets are bytes, not characters, and blank lines count too."""
    studies = [study(1, patient="患者一"), study(2, patient="é"), study(3)]
    folder = folder_of(tmp_path, studies)
    lines = (folder / "studies.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "studies.jsonl").write_text("\n" + "\n\n".join(lines) + "\n", encoding="utf-8")
    index = StudyIndex(folder)
    assert [index[one.id].patient for one in studies] == ["患者一", "é", ""]


def test_an_unknown_study_is_named(tmp_path: Path) -> None:
    index = StudyIndex(folder_of(tmp_path, [study(1)]))
    assert "study-0" not in index
    with pytest.raises(KeyError, match=r"no study 'study-0' in .*studies\.jsonl"):
        index["study-0"]


@pytest.mark.parametrize("image", ["../secret.png", "/etc/secret.png", "images/../../secret.png"])
def test_an_image_outside_the_folder_is_refused(tmp_path: Path, image: str) -> None:
    outside = study(1, image=image)
    with pytest.raises(InvalidRecord, match="expected a path inside the folder"):
        StudyIndex(folder_of(tmp_path, [outside])).resolve_image_path(outside.id)


def test_a_folder_that_is_no_data_set(tmp_path: Path) -> None:
    for read in (load_questions, load_references, StudyIndex):
        with pytest.raises(InvalidRecord, match=r"jsonl: file not found; a dataset folder has studies\.jsonl"):
            read(tmp_path)


def test_a_truncated_data_set_names_its_line(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [study(1), study(2)])
    for name, read in (("studies.jsonl", StudyIndex), ("questions.jsonl", lambda path: list(load_questions(path)))):
        path = folder / name
        path.write_bytes(path.read_bytes()[:-5])
        last = path.read_bytes().count(b"\n") + 1
        with pytest.raises(InvalidRecord, match=rf"{name}:{last}: the file ends in the middle of a line"):
            read(folder)


# Rounds


def test_rounds_are_disjoint_complete_and_keep_a_study_together(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [study(number) for number in range(200)])
    rounds = list(split_rounds(load_questions(folder), rounds=4, seed=0))
    assert [question for _, question in rounds] == list(load_questions(folder))  # every one, once, in order
    rounds_of_study: dict[str, set[int]] = {}
    for number, question in rounds:
        rounds_of_study.setdefault(question.study, set()).add(number)
    assert all(len(numbers) == 1 for numbers in rounds_of_study.values())
    sizes = Counter(numbers.pop() for numbers in rounds_of_study.values())
    assert sorted(sizes) == [0, 1, 2, 3]
    # Binomial(200, 1/4): mean 50, standard deviation sqrt(200 * 1/4 * 3/4) = 6.1; four of them are 24.5
    assert all(abs(size - 50) < 24.5 for size in sizes.values())


def test_a_round_is_the_hash_of_seed_and_study() -> None:
    digest = hashlib.sha256(b"round:7:study-1").hexdigest()[:16]
    assert assign_round("study-1", rounds=5, seed=7) == int(digest, 16) % 5
    assert assign_round("study-1", rounds=1, seed=7) == 0


def test_more_studies_move_none_to_another_round() -> None:
    few = [Question(study=f"study-{n}", text="?", kind="open") for n in range(10)]
    many = [Question(study=f"study-{n}", text="?", kind="open") for n in range(30)]
    assert list(split_rounds(many, rounds=3, seed=1))[:10] == list(split_rounds(few, rounds=3, seed=1))


def test_the_seed_decides() -> None:
    ids = [f"study-{n}" for n in range(50)]
    assert [assign_round(one, rounds=4, seed=0) for one in ids] != [assign_round(one, rounds=4, seed=1) for one in ids]


def test_no_rounds_is_refused() -> None:
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        assign_round("study-1", rounds=0, seed=0)


# Leaks


def apart(one: Study) -> int:
    """A hash that is far from every other study's."""
    return int(one.sha256[:16], 16)


def test_leaks_are_counted_by_content_and_by_patient() -> None:
    train = [study(1, patient="a"), study(2, patient="b"), study(3)]
    # 2 is in both under another name, 4 is new but of patient a; no patient is not a shared patient
    renamed = study(2, patient="b", image="images/other.png")
    report = find_split_leakage(train, [renamed, study(4, patient="a"), study(5), study(6, patient="c")], apart)
    assert (report.train_images, report.test_images) == (3, 4)
    assert (report.shared_images, report.near_images, report.shared_patients) == (1, 0, 2)
    assert report.examples == ("2.png",)
    assert report.format_summary() == (
        "1 of 4 test images also occur in train (3 images), 0 more are near duplicates; 2 patients occur in both"
    )


def test_leaks_are_counted_by_looks() -> None:
    """4 looks like 1 but for six bits, 5 differs in seven, and 2 itself is a shared image already."""
    hashes = {1: 0, 2: 1 << 40, 4: 0b111111, 5: 0b1111111, 3: (1 << 64) - 1}
    near = {study(number).sha256: value for number, value in hashes.items()}
    report = find_split_leakage(
        [study(1), study(2), study(3)], [study(2), study(4), study(5)], lambda one: near[one.sha256], names=("a", "b")
    )
    assert (report.shared_images, report.near_images, report.near_examples) == (1, 1, (("4.png", "1.png"),))
    assert "1 of 3 b images also occur in a (3 images), 1 more are near duplicates" in report.format_summary()


def test_no_leak() -> None:
    report = find_split_leakage([study(1)], [study(2)], apart)
    assert (report.shared_images, report.near_images, report.shared_patients, report.examples) == (0, 0, 0, ())
