"""Supervised lessons for the small models, from a data set *with* its answer key.

Only base models and judges are taught this way, on patients that no round and no evaluation uses. The base policy is
left improvable on purpose: it answers well from the right region, but the regions that it is taught to *write* are
right only in a stated share of lessons and anywhere else otherwise, as region annotations of mixed quality would be.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clincot.conversation import Conversation, Views, answered, finding_in, judgement, look, look_closer
from clincot.geometry import WHOLE, Box, box_of, crop_square
from clincot.records import Question, Reference, Study

SNAP = 0.05  # written regions start on a grid of 5 %: fewer words to learn


@dataclass(frozen=True)
class Lesson:
    """A question with everything a teacher knows about it."""

    study: Study
    question: Question
    reference: Reference


def join(
    studies: Mapping[str, Study], questions: Iterable[Question], references: Mapping[str, Reference]
) -> list[Lesson]:
    """Questions with their studies and answers; a question without either raises KeyError naming it."""
    return [Lesson(studies[q.study], q, references[q.id]) for q in questions]


def policy_lessons(
    lessons: Sequence[Lesson], folder: Path, views: Views, *, region_truth: float, seed: int
) -> Iterator[Conversation]:
    """Three conversations a question: writing a region and answering, answering from a given region, finding in a crop.

    `region_truth`: share of the written regions that are where the finding is; the others lie anywhere.
    """
    rng = np.random.default_rng([seed, 1])
    sides = [_side(b) for lesson in lessons for b in lesson.reference.boxes] or [0.25]
    for lesson in lessons:
        study, text, answer = lesson.study, lesson.question.text, lesson.reference.answer
        opening = look(study, folder, views, text)
        box = _region(lesson, rng, sides, truth=region_truth, whole=0.0, grid=SNAP)
        closer = look_closer(opening, study, folder, views, question=text, box=box, written=True)
        yield answered(closer, answer)
        box = _region(lesson, rng, sides, truth=0.6, whole=0.2)
        closer = look_closer(opening, study, folder, views, question=text, box=box)
        yield answered(closer, answer)
        yield from _finding_lesson(lesson, folder, views, rng, sides)


@dataclass(frozen=True)
class Proposal:
    """An answer that a judge is asked about, with the truth about it."""

    lesson: Lesson
    answer: str
    box: Box
    right: bool


def proposals(
    lessons: Sequence[Lesson], *, seed: int, region_truth: float = 0.65, whole: float = 0.1, both: bool = True
) -> Iterator[Proposal]:
    """The right and a wrong answer of every question (with `both` False: one of them), each from a region of its own.

    Wrong answers are other answers to the same topic, now and then of another. `region_truth`: share of the regions
    that show the finding, `whole`: of those that are the whole image; the others lie anywhere.
    """
    rng = np.random.default_rng([seed, 2])
    sides = [_side(b) for lesson in lessons for b in lesson.reference.boxes] or [0.25]
    answers = _answers_by_topic(lessons)
    everything = sorted({a for group in answers.values() for a in group})
    for lesson in lessons:
        truth = lesson.reference.answer
        group = answers[lesson.question.topic] if rng.random() < 0.95 else everything
        wrong = [answer for answer in group if answer != truth]
        choices = [truth, *([str(rng.choice(wrong))] if wrong else [])]
        for answer in choices if both else [str(rng.choice(choices))]:
            box = _region(lesson, rng, sides, truth=region_truth, whole=whole)
            yield Proposal(lesson, answer, box, answer == truth)


def judge_lessons(lessons: Sequence[Lesson], folder: Path, views: Views, *, seed: int) -> Iterator[Conversation]:
    """Is the proposed answer right? From a crop that does not show the finding a judge cannot know, and its P(yes)
    learns to go towards one half."""
    for proposal in proposals(lessons, seed=seed):
        study, text = proposal.lesson.study, proposal.lesson.question.text
        asked = judgement(study, folder, views, question=text, answer=proposal.answer, box=proposal.box)
        yield answered(asked, "yes" if proposal.right else "no")


def _finding_lesson(
    lesson: Lesson, folder: Path, views: Views, rng: np.random.Generator, sides: Sequence[float]
) -> Iterator[Conversation]:
    """Is the finding in this crop? Only where the key says where it is, so that a "no" is known to be one."""
    finding, boxes = lesson.reference.finding, lesson.reference.boxes
    if not finding or not boxes:
        return
    there = rng.random() < 0.5
    box = _true_region(boxes, rng) if there else _elsewhere(boxes, rng, sides)
    asked = finding_in(lesson.study, folder, views, finding=finding, box=box)
    yield answered(asked, "yes" if there else "no")


def _region(
    lesson: Lesson, rng: np.random.Generator, sides: Sequence[float], *, truth: float, whole: float, grid: float = 0.01
) -> Box:
    draw = rng.random()
    if draw < whole:
        return WHOLE
    if lesson.reference.boxes and draw < whole + truth:
        return _true_region(lesson.reference.boxes, rng, grid)
    return random_square(rng, float(rng.choice(sides)), grid)


def _true_region(boxes: Sequence[Box], rng: np.random.Generator, grid: float = 0.01) -> Box:
    """The square around one of the boxes, off its centre by up to a fifth of a side."""
    box = boxes[int(rng.integers(len(boxes)))]
    side = _side(box)
    cx, cy = (c + rng.uniform(-0.2, 0.2) * side for c in box.centre)
    return snapped(cx, cy, side, grid)


def _elsewhere(boxes: Sequence[Box], rng: np.random.Generator, sides: Sequence[float]) -> Box:
    """A square that shows none of the boxes' centres, nor much of them (the best of 20 draws)."""
    draws = [random_square(rng, float(rng.choice(sides))) for _ in range(20)]
    return min(draws, key=lambda d: sum(_overlap(b, d) for b in boxes))


def _overlap(a: Box, b: Box) -> float:
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(width, 0.0) * max(height, 0.0) / a.area


def _side(box: Box) -> float:
    """Side of the square that shows a box, at least a quarter of the image, in steps of SNAP."""
    shown = crop_square(box, min_side=0.25)
    return min(1.0, round(max(shown.x1 - shown.x0, shown.y1 - shown.y0) / SNAP + 0.49) * SNAP)


def random_square(rng: np.random.Generator, side: float, grid: float = 0.01) -> Box:
    cx, cy = rng.uniform(side / 2, 1 - side / 2, 2) if side < 1 else (0.5, 0.5)
    return snapped(float(cx), float(cy), side, grid)


def snapped(cx: float, cy: float, side: float, grid: float) -> Box:
    """A square of the given side around a centre, inside the image, its corner on a grid of that spacing."""
    x0, y0 = (round(min(max(c - side / 2, 0.0), 1.0 - side) / grid) * grid for c in (cx, cy))
    return box_of((x0, y0, min(x0 + side, 1.0), min(y0 + side, 1.0)))


def _answers_by_topic(lessons: Sequence[Lesson]) -> dict[str, list[str]]:
    groups: dict[str, set[str]] = {}
    for lesson in lessons:
        groups.setdefault(lesson.question.topic, set()).add(lesson.reference.answer)
    return {topic: sorted(answers) for topic, answers in groups.items()}
