"""A data set on disk: a folder of records and images, the same whatever the questions came from.

    FOLDER/studies.jsonl      Study, one an image
    FOLDER/questions.jsonl    Question
    FOLDER/references.jsonl   Reference: the answer key, for evaluation and calibration only
    FOLDER/reports.jsonl      where the source has reports: {"study", "text"} a line, and for a report on more than
                              one image "studies", those of all its images in the source's order; "study" is the
                              first of them, so that every report is there once (clincot.datasets.reports)
    FOLDER/images/            what Study.image names, relative to FOLDER

A folder of images without questions has empty files of questions and references.
Questions are streamed. Studies are looked up by id through an index of file offsets, so that a data set larger
than memory can be read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from clincot.datasets.near_duplicates import find_near_pairs
from clincot.errors import UserError
from clincot.fields import FrozenModel
from clincot.jsonl import InvalidRecord, parse_record, read_records
from clincot.records import Question, Reference, Study

STUDIES, QUESTIONS, REFERENCES, IMAGES = "studies.jsonl", "questions.jsonl", "references.jsonl", "images"


def load_questions(folder: Path) -> Iterator[Question]:
    """The folder's questions, in their order; raises BadRecord at the line that is none."""
    return read_records(_require_file(folder, QUESTIONS), Question)


def load_references(folder: Path) -> Iterator[Reference]:
    """The answer key. Evaluation and calibration only."""
    return read_records(_require_file(folder, REFERENCES), Reference)


class UnknownStudy(UserError, KeyError):
    """A question names a study that its data set does not have."""

    def __str__(self) -> str:  # KeyError would quote the message
        return str(self.args[0])


class StudyIndex(Mapping[str, Study]):
    """The folder's studies by id. Keeps a file offset a study and reads the study itself when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = _require_file(folder, STUDIES)
        starts = _iter_line_starts(self._path)  # (byte offset, line number)
        self._lines = {study.id: start for study, start in zip(read_records(self._path, Study), starts, strict=True)}

    def __getitem__(self, study_id: str) -> Study:
        try:
            offset, number = self._lines[study_id]
        except KeyError:
            raise UnknownStudy(f"no study {study_id!r} in {self._path}") from None
        with self._path.open("rb") as file:
            file.seek(offset)
            return parse_record(file.readline().decode(), Study, where=f"{self._path}:{number}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._lines)

    def __len__(self) -> int:
        return len(self._lines)

    def resolve_image_path(self, study_id: str) -> Path:
        """Where the study's image lies; raises BadRecord where a record points outside the folder."""
        study = self[study_id]
        if Path(study.image).is_absolute() or ".." in Path(study.image).parts:
            raise InvalidRecord(f"{self._path}: {study.id}: expected a path inside the folder, got {study.image!r}")
        return self.folder / study.image


def assign_round(study_id: str, *, rounds: int, seed: int) -> int:
    """The round (0-based) that a study's questions belong to: a seeded hash, the same in every data set.

    It depends on nothing but the study and the seed, so studies that are added later move no other: what a
    round has asked stays that round's. Subsets are therefore equal in size only on average.
    """
    if rounds < 1:
        raise ValueError(f"questions are split into at least 1 round, got {rounds}")
    return int.from_bytes(hashlib.sha256(f"round:{seed}:{study_id}".encode()).digest()[:8]) % rounds


def split_rounds(questions: Iterable[Question], *, rounds: int, seed: int) -> Iterator[tuple[int, Question]]:
    """Disjoint subsets X_0 ... X_{rounds-1} [ClinCoT: one a round], as (round, question) in the order given.

    All questions of a study are in one subset, so no round trains on an image that an earlier one has seen.
    """
    return ((assign_round(question.study, rounds=rounds, seed=seed), question) for question in questions)


class LeakReport(FrozenModel):
    """How much of one split has been seen in another: by the images' bytes, by their looks and by patient."""

    train: str = "train"  # the names of the two splits
    test: str = "test"
    train_images: int
    test_images: int
    shared_images: int
    near_images: int  # further test images that look nearly like one of train (clincot.datasets.near_duplicates)
    shared_patients: int
    examples: tuple[str, ...] = ()  # at most 5 of the shared images, by their name at the source
    near_examples: tuple[tuple[str, str], ...] = ()  # at most 5, (in test, in train)

    def format_summary(self) -> str:
        return (
            f"{self.shared_images} of {self.test_images} {self.test} images also occur in {self.train}"
            f" ({self.train_images} images), {self.near_images} more look nearly the same;"
            f" {self.shared_patients} patients occur in both"
        )


def find_split_leakage(
    train: Iterable[Study],
    test: Iterable[Study],
    near: Callable[[Study], int],
    *,
    names: tuple[str, str] = ("train", "test"),
) -> LeakReport:
    """Compare two splits by image sha256, by perceptual hash (`near`) and by patient where the studies name one."""
    trained, patients = dict[str, Study](), set[str]()
    for study in train:
        trained.setdefault(study.sha256, study)
        patients.add(study.patient)
    tested, shared_patients = dict[str, Study](), set[str]()
    for study in test:
        tested.setdefault(study.sha256, study)
        if study.patient and study.patient in patients:
            shared_patients.add(study.patient)
    shared = [study for sha256, study in tested.items() if sha256 in trained]
    fresh, known = [study for sha256, study in tested.items() if sha256 not in trained], list(trained.values())
    alike = dict[str, tuple[str, str]]()
    for pair in find_near_pairs([near(study) for study in fresh], [near(study) for study in known]):
        alike.setdefault(fresh[pair.first].sha256, (_name_study(fresh[pair.first]), _name_study(known[pair.second])))
    return LeakReport(
        train=names[0],
        test=names[1],
        train_images=len(trained),
        test_images=len(tested),
        shared_images=len(shared),
        near_images=len(alike),
        shared_patients=len(shared_patients),
        examples=tuple(_name_study(study) for study in shared[:5]),
        near_examples=tuple(alike.values())[:5],
    )


def _name_study(study: Study) -> str:
    return study.source_id or study.image


def _require_file(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise InvalidRecord(
            f"{path}: there is no such file; a dataset folder has {STUDIES}, {QUESTIONS}, {REFERENCES} and"
            f" {IMAGES}/ and is made by `clincot ingest`"
        )
    return path


def _iter_line_starts(path: Path) -> Iterator[tuple[int, int]]:
    """(byte offset, line number) of the lines that read_records reads."""
    offset = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                yield offset, number
            offset += len(raw)
