"""Labelled answers about regions, for calibrating judges and training the tiny models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from clincot.geometry import WHOLE_IMAGE, Box, box_from_xyxy, choose_view_side
from clincot.records import Question, Reference, Study

OFF_TOPIC_SHARE = 0.05  # share of the wrong answers taken from another topic ("smooth" to "how many?")
GRID_STEP = 0.05  # written regions start on a 5 % grid, so that the tiny models have fewer words to learn


@dataclass(frozen=True)
class LabelledQuestion:
    """A question with its study and reference answer."""

    study: Study
    question: Question
    reference: Reference


def join_references(
    studies: Mapping[str, Study], questions: Iterable[Question], references: Mapping[str, Reference]
) -> list[LabelledQuestion]:
    """Join questions with their studies and reference answers; raises KeyError naming a question without either."""
    return [LabelledQuestion(studies[q.study], q, references[q.id]) for q in questions]


@dataclass(frozen=True)
class LabelledAnswer:
    """An answer for a judge to rate, with its label."""

    labelled_question: LabelledQuestion
    answer: str
    box: Box
    right: bool


def draw_labelled_answers(
    questions: Sequence[LabelledQuestion],
    *,
    seed: int,
    region_truth: float,
    whole: float = 0.1,
    both: bool = True,
    among: Sequence[LabelledQuestion] = (),
    off_topic: float = OFF_TOPIC_SHARE,
) -> Iterator[LabelledAnswer]:
    """Yield the right and a wrong answer to every question, both seen from one region; only one of them if not `both`.

    Wrong answers are other questions' answers to the same topic, except that a share `off_topic` of them comes from any
    topic. They are taken from the questions `among` (default: `questions`); those of a multiple-choice question are its
    other options. `region_truth` is the share of regions that show the finding, `whole` the share that are the whole
    image; the others are random squares.
    """
    rng = np.random.default_rng([seed, 2])
    sides = measure_finding_sides(among or questions)
    answers_by_topic = _group_answers_by_topic(among or questions)
    all_answers = sorted(set(chain.from_iterable(answers_by_topic.values())))
    for question in questions:
        truth = question.reference.answer
        pool = answers_by_topic[question.question.topic] if rng.random() >= off_topic else all_answers
        if question.question.options:
            pool = list(question.question.options)
        wrong = [answer for answer in pool if answer != truth]
        choices = [truth, *([str(rng.choice(wrong))] if wrong else [])]
        box = _sample_region(question, rng, sides, truth=region_truth, whole=whole)
        for answer in choices if both else [str(rng.choice(choices))]:
            yield LabelledAnswer(question, answer, box, answer == truth)


def _sample_region(
    question: LabelledQuestion,
    rng: np.random.Generator,
    sides: Mapping[str, float],
    *,
    truth: float,
    whole: float,
    grid: float = 0.01,
) -> Box:
    """The region from which an answer is judged: the whole image, the finding or a random square.

    A random square is as large as the finding would be, so that its size does not give away the answer; if the finding
    itself is the answer, it has the size of any finding.
    """
    draw = rng.random()
    if draw < whole:
        return WHOLE_IMAGE
    if question.reference.boxes and draw < whole + truth:
        return _sample_true_region(question.reference.boxes, rng, grid)
    finding = question.reference.finding if question.reference.answer != question.reference.finding else ""
    side = sides.get(finding) or float(rng.choice(sorted(sides.values())))
    return sample_grid_square(rng, side, grid)


def _sample_true_region(boxes: Sequence[Box], rng: np.random.Generator, grid: float = 0.01) -> Box:
    """A square that shows one of the boxes, off its centre by up to a fifth of the side."""
    box = boxes[int(rng.integers(len(boxes)))]
    side = choose_view_side(box)
    cx, cy = (c + rng.uniform(-0.2, 0.2) * side for c in box.center)
    return snap_square(cx, cy, side, grid)


def _sample_background_square(boxes: Sequence[Box], rng: np.random.Generator, side: float) -> Box:
    """A random square that shows as little of the boxes as possible: the best of 20 draws."""
    draws = [sample_grid_square(rng, side) for _ in range(20)]
    return min(draws, key=lambda square: sum(_compute_overlap(box, square) for box in boxes))


def measure_finding_sides(questions: Sequence[LabelledQuestion]) -> dict[str, float]:
    """The median side of the squares that show each finding; a quarter of the image if there is no box at all."""
    sides: dict[str, list[float]] = {}
    for question in questions:
        for box in question.reference.boxes:
            sides.setdefault(question.reference.finding, []).append(choose_view_side(box))
    return {finding: sorted(values)[len(values) // 2] for finding, values in sorted(sides.items())} or {"": 0.25}


def _compute_overlap(a: Box, b: Box) -> float:
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(width, 0.0) * max(height, 0.0) / a.area


def sample_grid_square(rng: np.random.Generator, side: float, grid: float = 0.01) -> Box:
    """A square of the given side with a uniformly drawn centre, its corner on a grid of that spacing."""
    cx, cy = rng.uniform(side / 2, 1 - side / 2, 2) if side < 1 else (0.5, 0.5)
    return snap_square(float(cx), float(cy), side, grid)


def snap_square(cx: float, cy: float, side: float, grid: float) -> Box:
    """A square of the given side around a centre, inside the image, its corner on a grid of that spacing."""
    x0, y0 = (round(min(max(c - side / 2, 0.0), 1.0 - side) / grid) * grid for c in (cx, cy))
    return box_from_xyxy((x0, y0, min(x0 + side, 1.0), min(y0 + side, 1.0)))


def _group_answers_by_topic(questions: Sequence[LabelledQuestion]) -> dict[str, list[str]]:
    groups: dict[str, set[str]] = {}
    for question in questions:
        groups.setdefault(question.question.topic, set()).add(question.reference.answer)
    return {topic: sorted(answers) for topic, answers in groups.items()}
