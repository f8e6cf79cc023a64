"""The questions on which a plan is counted: a sample of a data set's folder, or typical ones of a given number.

A sample holds whole images, each with all of its questions, because work is shared between the questions of an image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from clincot.datasets.folder import StudyIndex, assign_round, load_questions, load_references
from clincot.errors import InvalidInput
from clincot.evaluation.benchmark import Benchmark
from clincot.evaluation.read_benchmark import read_benchmark
from clincot.generation.hypotheses import FINDINGS
from clincot.geometry import box_from_xyxy
from clincot.planning.assumptions import Assumptions
from clincot.records import Question, Reference, Study

SAMPLE = 96  # questions
_FILM = "film.png"


@dataclass(frozen=True)
class DataSize:
    """How large a data set is, if there is no folder of it."""

    questions: int
    images: int

    def __post_init__(self) -> None:
        if not 1 <= self.images <= self.questions:
            raise InvalidInput(f"expected 1 to {self.questions} images for as many questions, got {self.images}")


@dataclass(frozen=True)
class RoundSplit:
    """How the rounds of a run divide a data set (config.PrepareConfig)."""

    rounds: int = 1  # rounds that are run
    subsets: int = 1  # into which the images are divided
    limit: int = 0  # most questions of a round; 0: all
    seed: int = 0


@dataclass(frozen=True)
class SampledData:
    """Questions to count with, and how many there are of them."""

    folder: Path
    questions: Sequence[Question]
    studies: Mapping[str, Study]  # by id
    rounds: tuple[int, ...]  # questions of each round; the sample is of the first one
    images: int  # of the whole set
    image_bytes: float = 0.0

    @property
    def scale(self) -> float:
        """By what counts of the sample are multiplied for the first round."""
        return self.rounds[0] / len(self.questions)

    @property
    def by_image(self) -> dict[str, Study]:
        """{sha256 of the image: study}."""
        return {study.sha256: study for study in self.studies.values()}


@contextmanager
def open_sample(
    source: Path | DataSize, assumptions: Assumptions, split: RoundSplit, *, sample: int = SAMPLE
) -> Iterator[SampledData]:
    """The questions of rounds. source: a data set's folder or the size of one."""
    if isinstance(source, DataSize):
        with TemporaryDirectory(prefix="clincot-plan-") as folder:
            yield _make_typical_data(Path(folder), source, assumptions, split, sample)
    else:
        yield read_sample(source, split, sample=sample)


def read_sample(folder: Path, split: RoundSplit, *, sample: int = SAMPLE) -> SampledData:
    """Sample the images of a folder's first round evenly until they have `sample` questions.

    Questions about several images are left out. Raises InvalidInput if no question is left.
    """
    sizes = [0] * max(split.subsets, split.rounds)
    by_study: dict[str, list[Question]] = {}
    images: set[str] = set()
    for question in load_questions(folder):
        number = assign_round(question.study, rounds=len(sizes), seed=split.seed)
        images.add(question.study)
        if question.others or (split.limit and sizes[number] == split.limit):
            continue
        sizes[number] += 1
        if number == 0:
            by_study.setdefault(question.study, []).append(question)
    if not by_study:
        raise InvalidInput(
            f"{folder}: no question about one image falls into the first of {len(sizes)} rounds, so there is nothing "
            "to plan"
        )
    chosen = {*_choose_evenly(list(by_study), [len(group) for group in by_study.values()], sample)}
    index = StudyIndex(folder)
    size = sum(path.stat().st_size for path in (folder / "images").rglob("*") if path.is_file())
    return SampledData(
        folder=folder,
        questions=list(chain.from_iterable(by_study[study] for study in by_study if study in chosen)),
        studies={study: index[study] for study in by_study if study in chosen},
        rounds=tuple(sizes[: split.rounds]),
        images=len(images),
        image_bytes=float(size),
    )


def _choose_evenly(studies: Sequence[str], counts: Sequence[int], sample: int) -> list[str]:
    """Every k-th study, so that the chosen ones have about `sample` questions; all of them if they have fewer."""
    step = max(1.0, sum(counts) / sample)
    positions = dict.fromkeys(int(n * step) for n in range(len(studies)))
    return [studies[position] for position in positions if position < len(studies)]


def _make_typical_data(
    folder: Path, size: DataSize, assumptions: Assumptions, split: RoundSplit, sample: int
) -> SampledData:
    """Questions that each name a finding, some of them two, about square films of one size."""
    side = round(assumptions.film_px)
    Image.new("RGB", (side, side), (96, 96, 96)).save(folder / _FILM)
    per_image = size.questions / size.images
    images = max(2, min(size.images, round(sample / per_image)))  # two, because an arm shows another patient's image
    studies: list[Study] = []
    questions: list[Question] = []
    for number in range(images):
        sha256 = hashlib.sha256(f"film {number}".encode()).hexdigest()
        study = Study(image=_FILM, sha256=sha256, width=side, height=side, modality="chest radiograph")
        studies.append(study)
        count = round((number + 1) * per_image) - round(number * per_image)
        questions += _make_typical_questions(study, count, assumptions)
    in_round = size.questions // max(split.subsets, split.rounds)
    return SampledData(
        folder=folder,
        questions=questions,
        studies={study.id: study for study in studies},
        rounds=(max(1, min(in_round, split.limit or in_round)),) * split.rounds,
        images=size.images,
    )


def _make_typical_questions(study: Study, count: int, assumptions: Assumptions) -> Iterator[Question]:
    names = list(FINDINGS)
    used = 0
    for number in range(count):
        wanted = round((number + 1) * assumptions.findings_per_question) - round(
            number * assumptions.findings_per_question
        )
        findings = [names[(used + n) % len(names)] for n in range(max(1, wanted))]
        used += wanted
        text = f"{number}: is there {' or '.join(findings)}"
        padded = text + " here" * max(0, round((assumptions.question_characters - len(text) - 1) / 5)) + "?"
        yield Question(study=study.id, text=padded, kind="open")


@contextmanager
def open_benchmark_sample(
    source: Path | DataSize, assumptions: Assumptions, *, limit: int = 0, sample: int = SAMPLE
) -> Iterator[tuple[SampledData, Benchmark]]:
    """The questions of a benchmark with their key. limit: evaluate.limit."""
    if isinstance(source, DataSize):
        with TemporaryDirectory(prefix="clincot-plan-") as folder:
            most = limit or source.questions
            size = DataSize(min(source.questions, most), min(source.images, most))
            data = _make_typical_data(Path(folder), size, assumptions, RoundSplit(), sample)
            yield data, Benchmark.from_records(data.questions, _make_typical_key(data.questions), data.studies.values())
        return
    whole = read_benchmark(source, limit=limit)
    by_study: dict[str, list[str]] = {}
    for question in whole.questions.values():
        by_study.setdefault(question.study, []).append(question.id)
    chosen = _choose_evenly(list(by_study), [len(ids) for ids in by_study.values()], sample)
    ids = set(chain.from_iterable(by_study[study] for study in chosen))
    questions = [question for question in whole.questions.values() if question.id in ids]
    index = StudyIndex(source)
    studies = {question.study: index[question.study] for question in questions}
    data = SampledData(source, questions, studies, (len(whole.questions),), len(by_study))
    references = (reference for reference in load_references(source) if reference.question in ids)
    yield data, Benchmark.from_records(questions, references, studies.values())


def _make_typical_key(questions: Iterable[Question]) -> Iterator[Reference]:
    box = box_from_xyxy((0.3, 0.3, 0.5, 0.5))
    for question in questions:
        yield Reference(question=question.id, answer="yes", boxes=(box,), finding="nodule")
