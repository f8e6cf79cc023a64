"""The dataset folder: records and images on disk, in one layout for every source.

    FOLDER/studies.jsonl      Study, one per image
    FOLDER/questions.jsonl    Question
    FOLDER/references.jsonl   Reference: the answer key, for evaluation and calibration only
    FOLDER/reports.jsonl      only if the source has reports: one {"study", "text"} per line. A report on several
                              images also has "studies", one per image in the source's order, and "study" is the
                              first of them, so that every report occurs once (clincot.datasets.reports)
    FOLDER/image_hashes.jsonl the perceptual hash of every image, for the search for near-duplicates; not in folders of
                              older versions
    FOLDER/images/            the files that Study.image names, relative to FOLDER

If the source has images only, the files of questions and references are empty. Questions are streamed, and studies
are looked up by id through an index of file offsets, so a data set may be larger than memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from clincot.datasets.near_duplicates import find_near_pairs
from clincot.errors import InvalidInput, UserError
from clincot.fields import FrozenModel
from clincot.jsonl import InvalidRecord, parse_record, read_records
from clincot.records import Question, Reference, Study
from clincot.text import format_count

STUDIES, QUESTIONS, REFERENCES, IMAGES = "studies.jsonl", "questions.jsonl", "references.jsonl", "images"


def load_questions(folder: Path) -> Iterator[Question]:
    """Stream the folder's questions in file order; raises InvalidRecord naming the first bad line."""
    return read_records(_require_file(folder, QUESTIONS), Question)


class SeveralImages(InvalidInput):
    """A question is about several images, where only one can be shown."""


def iter_single_image(questions: Iterable[Question]) -> Iterator[Question]:
    """Pass questions on; raises SeveralImages at the first that is about more than one image.

    Policies, judges and servers are shown one image. A question about several must not be asked with one of them only.
    """
    for question in questions:
        if question.others:
            roles = ", ".join(other.role for other in question.others)
            raise SeveralImages(
                f"question {question.id} ({question.source_id}) is about {len(question.others) + 1}"
                f" images (further ones: {roles}), and rounds and benchmarks show one. Ingest the data with"
                " --further-images join, which shows all side by side, or --further-images drop"
            )
        yield question


def load_references(folder: Path) -> Iterator[Reference]:
    """Stream the answer key, which only evaluation and calibration may read."""
    return read_records(_require_file(folder, REFERENCES), Reference)


class UnknownStudy(UserError, KeyError):
    """A question names a study that its data set does not have."""

    def __str__(self) -> str:  # KeyError would put the message in quotes
        return str(self.args[0])


class StudyIndex(Mapping[str, Study]):
    """The folder's studies by id. Only file offsets are kept in memory; a study is read on every access."""

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
        """Path of the study's image; raises InvalidRecord if the record points outside the folder."""
        study = self[study_id]
        if Path(study.image).is_absolute() or ".." in Path(study.image).parts:
            raise InvalidRecord(f"{self._path}: {study.id}: expected a path inside the folder, got {study.image!r}")
        return self.folder / study.image


def assign_round(study_id: str, *, rounds: int, seed: int) -> int:
    """Return the 0-based round that asks a study's questions.

    The round is a seeded hash of the study's id alone, so a study that is added later moves no other study to another
    round. Rounds are therefore equal in size only on average. Raises ValueError if `rounds` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    return int.from_bytes(hashlib.sha256(f"round:{seed}:{study_id}".encode()).digest()[:8]) % rounds


def split_rounds(questions: Iterable[Question], *, rounds: int, seed: int) -> Iterator[tuple[int, Question]]:
    """Split questions into disjoint subsets X_0 ... X_{rounds-1}, one per round [ClinCoT].

    Yields (round, question) in input order. All questions of a study are in one subset, so no round trains on an image
    that an earlier round has seen.
    """
    return ((assign_round(question.study, rounds=rounds, seed=seed), question) for question in questions)


class LeakReport(FrozenModel):
    """Overlap of two splits: identical images, near-duplicate images and shared patients."""

    train: str = "train"  # the names of the two splits
    test: str = "test"
    train_images: int
    test_images: int
    shared_images: int
    near_images: int  # further test images with a near duplicate in train (clincot.datasets.near_duplicates)
    shared_patients: int
    examples: tuple[str, ...] = ()  # source names of at most 5 shared images
    near_examples: tuple[tuple[str, str], ...] = ()  # at most 5 pairs (test image, train image)

    def format_summary(self) -> str:
        return (
            f"{self.shared_images} of {self.test_images} {self.test} images also occur in {self.train}"
            f" ({format_count(self.train_images, 'image')}), {self.near_images} more are near duplicates;"
            f" {format_count(self.shared_patients, 'patient')} occur in both"
        )


def find_split_leakage(
    train: Iterable[Study],
    test: Iterable[Study],
    near: Callable[[Study], int],
    *,
    names: tuple[str, str] = ("train", "test"),
) -> LeakReport:
    """Compare two splits by image sha256, perceptual hash and, where studies name one, patient.

    `near` returns a study's perceptual hash (clincot.datasets.near_duplicates).
    """
    train_by_sha, patients = dict[str, Study](), set[str]()
    for study in train:
        train_by_sha.setdefault(study.sha256, study)
        patients.add(study.patient)
    test_by_sha, shared_patients = dict[str, Study](), set[str]()
    for study in test:
        test_by_sha.setdefault(study.sha256, study)
        if study.patient and study.patient in patients:
            shared_patients.add(study.patient)
    shared = [study for sha256, study in test_by_sha.items() if sha256 in train_by_sha]
    # Identical images are counted above, so only the other test images are searched for near duplicates.
    test_only = [study for sha256, study in test_by_sha.items() if sha256 not in train_by_sha]
    train_studies = list(train_by_sha.values())
    near_pairs = dict[str, tuple[str, str]]()
    for pair in find_near_pairs([near(study) for study in test_only], [near(study) for study in train_studies]):
        tested, trained = test_only[pair.first], train_studies[pair.second]
        near_pairs.setdefault(tested.sha256, (_name_study(tested), _name_study(trained)))
    return LeakReport(
        train=names[0],
        test=names[1],
        train_images=len(train_by_sha),
        test_images=len(test_by_sha),
        shared_images=len(shared),
        near_images=len(near_pairs),
        shared_patients=len(shared_patients),
        examples=tuple(_name_study(study) for study in shared[:5]),
        near_examples=tuple(near_pairs.values())[:5],
    )


def _name_study(study: Study) -> str:
    return study.source_id or study.image


def _require_file(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise InvalidRecord(
            f"{path}: file not found; a dataset folder has {STUDIES}, {QUESTIONS}, {REFERENCES} and"
            f" {IMAGES}/, and `clincot ingest` creates one"
        )
    return path


def _iter_line_starts(path: Path) -> Iterator[tuple[int, int]]:
    """Yield (byte offset, line number) of every line that read_records reads, which skips blank lines."""
    offset = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                yield offset, number
            offset += len(raw)
