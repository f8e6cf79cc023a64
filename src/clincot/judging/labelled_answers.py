"""Labelled answers about regions, to calibrate judges and to teach the tiny models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from clincot.geometry import WHOLE_IMAGE, Box, box_from_xyxy, choose_view_side
from clincot.records import Question, Reference, Study

OFF_TOPIC_SHARE = 0.05  # share of the wrong answers that answer no question of this kind ("smooth" to "how many?")


GRID_STEP = 0.05  # written regions start on a grid of 5 %: fewer words to learn


@dataclass(frozen=True)
class LabelledQuestion:
    """A question with everything a teacher knows about it."""

    study: Study
    question: Question
    reference: Reference


def join_references(
    studies: Mapping[str, Study], questions: Iterable[Question], references: Mapping[str, Reference]
) -> list[LabelledQuestion]:
    """Questions with their studies and answers; a question without either raises KeyError naming it."""
    return [LabelledQuestion(studies[q.study], q, references[q.id]) for q in questions]


@dataclass(frozen=True)
class LabelledAnswer:
    """An answer that a judge is asked about, with the truth about it."""

    labelled_question: LabelledQuestion
    answer: str
    box: Box
    right: bool


def draw_labelled_answers(
    lessons: Sequence[LabelledQuestion],
    *,
    seed: int,
    region_truth: float,
    whole: float = 0.1,
    both: bool = True,
    among: Sequence[LabelledQuestion] = (),
    off_topic: float = OFF_TOPIC_SHARE,
) -> Iterator[LabelledAnswer]:
    """The right and a wrong answer of every question (with `both` False: one of them), seen from one region.

    Wrong answers are other answers to the same topic, `off_topic` of them of another, out of the lessons `among`
    (default: these). `region_truth`: share of the regions that show the finding, `whole`: of those that are the whole
    image; the others lie anywhere.
    """
    rng = np.random.default_rng([seed, 2])
    sides = measure_finding_sides(among or lessons)
    answers = _group_answers_by_topic(among or lessons)
    everything = sorted({a for group in answers.values() for a in group})
    for lesson in lessons:
        truth = lesson.reference.answer
        group = answers[lesson.question.topic] if rng.random() >= off_topic else everything
        wrong = [answer for answer in group if answer != truth]
        choices = [truth, *([str(rng.choice(wrong))] if wrong else [])]
        box = _sample_region(lesson, rng, sides, truth=region_truth, whole=whole)
        for answer in choices if both else [str(rng.choice(choices))]:
            yield LabelledAnswer(lesson, answer, box, answer == truth)


def _sample_region(
    lesson: LabelledQuestion,
    rng: np.random.Generator,
    sides: Mapping[str, float],
    *,
    truth: float,
    whole: float,
    grid: float = 0.01,
) -> Box:
    """Where a lesson looks. Elsewhere is as large as the finding would be, so that size tells nothing of the answer;
    where the finding is the answer, any finding's size."""
    draw = rng.random()
    if draw < whole:
        return WHOLE_IMAGE
    if lesson.reference.boxes and draw < whole + truth:
        return _sample_true_region(lesson.reference.boxes, rng, grid)
    named = lesson.reference.finding if lesson.reference.answer != lesson.reference.finding else ""
    side = sides.get(named) or float(rng.choice(sorted(sides.values())))
    return sample_grid_square(rng, side, grid)


def _sample_true_region(boxes: Sequence[Box], rng: np.random.Generator, grid: float = 0.01) -> Box:
    """The square around one of the boxes, off its centre by up to a fifth of a side."""
    box = boxes[int(rng.integers(len(boxes)))]
    side = choose_view_side(box)
    cx, cy = (c + rng.uniform(-0.2, 0.2) * side for c in box.center)
    return snap_square(cx, cy, side, grid)


def _sample_background_square(boxes: Sequence[Box], rng: np.random.Generator, side: float) -> Box:
    """A square that shows as little of the boxes as the best of 20 draws."""
    draws = [sample_grid_square(rng, side) for _ in range(20)]
    return min(draws, key=lambda d: sum(_compute_overlap(b, d) for b in boxes))


def measure_finding_sides(lessons: Sequence[LabelledQuestion]) -> dict[str, float]:
    """The median side of the squares that show each finding."""
    sides: dict[str, list[float]] = {}
    for lesson in lessons:
        for box in lesson.reference.boxes:
            sides.setdefault(lesson.reference.finding, []).append(choose_view_side(box))
    return {finding: sorted(found)[len(found) // 2] for finding, found in sorted(sides.items())} or {"": 0.25}


def _compute_overlap(a: Box, b: Box) -> float:
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(width, 0.0) * max(height, 0.0) / a.area


def sample_grid_square(rng: np.random.Generator, side: float, grid: float = 0.01) -> Box:
    cx, cy = rng.uniform(side / 2, 1 - side / 2, 2) if side < 1 else (0.5, 0.5)
    return snap_square(float(cx), float(cy), side, grid)


def snap_square(cx: float, cy: float, side: float, grid: float) -> Box:
    """A square of the given side around a centre, inside the image, its corner on a grid of that spacing."""
    x0, y0 = (round(min(max(c - side / 2, 0.0), 1.0 - side) / grid) * grid for c in (cx, cy))
    return box_from_xyxy((x0, y0, min(x0 + side, 1.0), min(y0 + side, 1.0)))


def _group_answers_by_topic(lessons: Sequence[LabelledQuestion]) -> dict[str, list[str]]:
    groups: dict[str, set[str]] = {}
    for lesson in lessons:
        groups.setdefault(lesson.question.topic, set()).add(lesson.reference.answer)
    return {topic: sorted(answers) for topic, answers in groups.items()}
