"""Supervised lessons for the small models, from a data set *with* its answer key.

Only base models and judges are taught this way, on patients that no round and no evaluation uses. The base policy is
left improvable on purpose: it answers well from the right region, but the regions that it is taught to *write* are
right only in a stated share of lessons and the middle of the image otherwise, as region annotations of mixed quality
would be: some drawn with care, the rest the default box. So it looks at the middle unless something tells it that
looking pays.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from clincot.conversation import (
    Conversation,
    Turn,
    Views,
    answered,
    crop_picture,
    finding_in,
    judgement,
    look,
    look_closer,
)
from clincot.geometry import WHOLE, Box, box_of, box_to_text, look_side
from clincot.records import Question, Reference, Study

CROP_TOPICS = ("margin", "presence", "which finding")  # a crop is enough to answer these
PLACE_TOPICS = ("side", "zone")  # the region's numbers are enough to answer these
OFF_TOPIC = 0.05  # share of the wrong answers that answer no question of this kind ("smooth" to "how many?")
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
    lessons: Sequence[Lesson], folder: Path, views: Views, *, region_truth: float, seed: int, part: int = 2
) -> Iterator[Conversation]:
    """Lessons of a policy in two parts.

    Part 1, short and many: naming what a crop shows, reading a place from a region's numbers, and what a region is: a
    square of a quarter or a half, without any picture to find it in. Part 2: the whole image, writing a region and
    answering from it, answering from a given region, and now and then naming what a crop shows, lest it be forgotten:
    the sliding windows ask just that.

    `region_truth`: share of the written regions that are where the finding is; the others of part 1 lie anywhere,
    those of part 2 in the middle.
    """
    rng = np.random.default_rng([seed, part])
    sides = sides_by_finding(lessons)
    for lesson in lessons:
        study, text, answer = lesson.study, lesson.question.text, lesson.reference.answer
        if part == 1:
            yield from _crop_lessons(lesson, folder, views, rng, sides)
            yield from _place_lessons(lesson, rng)
            for _ in range(2):
                box = _region(lesson, rng, sides, truth=region_truth, whole=0.0, grid=SNAP)
                yield (Turn("user", text), Turn("assistant", box_to_text(box), action=True))
            continue
        report = lesson.question.kind == "report"
        opening = look(study, folder, views, text)
        box = _written_region(lesson, rng, sides, truth=region_truth)
        closer = look_closer(opening, study, folder, views, question=text, box=box, written=True, report=report)
        yield answered(closer, answer)
        box = _region(lesson, rng, sides, truth=0.65, whole=0.1)
        yield answered(look_closer(opening, study, folder, views, question=text, box=box, report=report), answer)
        there_and_elsewhere = list(_finding_lesson(lesson, folder, views, rng, sides))
        which = int(rng.integers(2))
        yield from there_and_elsewhere[which : which + 1]


def _crop_lessons(
    lesson: Lesson, folder: Path, views: Views, rng: np.random.Generator, sides: Mapping[str, float]
) -> Iterator[Conversation]:
    """The question about a crop alone, where a crop is enough to answer it, and whether the crop shows the finding."""
    if lesson.question.topic in CROP_TOPICS:
        for _ in range(2):
            box = _region(lesson, rng, sides, truth=1.0, whole=0.0)
            crop = crop_picture(lesson.study, folder, views, box)
            yield answered((Turn("user", lesson.question.text, (crop,)),), lesson.reference.answer)
    yield from _finding_lesson(lesson, folder, views, rng, sides)


@dataclass(frozen=True)
class Proposal:
    """An answer that a judge is asked about, with the truth about it."""

    lesson: Lesson
    answer: str
    box: Box
    right: bool


def proposals(
    lessons: Sequence[Lesson], *, seed: int, region_truth: float, whole: float = 0.1, both: bool = True,
    among: Sequence[Lesson] = (), off_topic: float = OFF_TOPIC,
) -> Iterator[Proposal]:  # fmt: skip
    """The right and a wrong answer of every question (with `both` False: one of them), seen from one region.

    Wrong answers are other answers to the same topic, `off_topic` of them of another, out of the lessons `among`
    (default: these). `region_truth`: share of the regions that show the finding, `whole`: of those that are the whole
    image; the others lie anywhere.
    """
    rng = np.random.default_rng([seed, 2])
    sides = sides_by_finding(among or lessons)
    answers = _answers_by_topic(among or lessons)
    everything = sorted({a for group in answers.values() for a in group})
    for lesson in lessons:
        truth = lesson.reference.answer
        group = answers[lesson.question.topic] if rng.random() >= off_topic else everything
        wrong = [answer for answer in group if answer != truth]
        choices = [truth, *([str(rng.choice(wrong))] if wrong else [])]
        box = _region(lesson, rng, sides, truth=region_truth, whole=whole)
        for answer in choices if both else [str(rng.choice(choices))]:
            yield Proposal(lesson, answer, box, answer == truth)


def judge_lessons(
    lessons: Sequence[Lesson], folder: Path, views: Views, *, seed: int, part: int = 2
) -> Iterator[Conversation]:
    """Lessons of a judge in parts: matching an answer with what is seen is hard to learn from yes and no alone, and
    a judge that is shown everything from the start stays at AUC 0.5.

    Part 1, from near: a single crop, the finding's own or, where it is absent, any. It answers questions itself,
    names what a crop shows, and says whether a right and a wrong answer are right. Part 2, as a panel asks: image, crop
    and proposed answer, a third of them from places that mostly do not show the finding, where it cannot know and
    learns P(yes) towards one half. Part 3: both together. Part 4: as part 2, with many wrong answers off topic: a
    policy in training drifts that way, and a judge that never heard such an answer shrugs at it.
    """
    if part in (1, 3):
        yield from _near_lessons(lessons, folder, views, seed=seed)
    if part in (2, 3, 4):
        off_topic = 0.25 if part == 4 else OFF_TOPIC
        for proposal in (
            *proposals(lessons, seed=seed, region_truth=1.0, whole=0.0, off_topic=off_topic),
            *proposals(lessons[::2], seed=seed + 1, region_truth=0.2, among=lessons, off_topic=off_topic),
        ):
            yield _judged(proposal, folder, views)


def _near_lessons(lessons: Sequence[Lesson], folder: Path, views: Views, *, seed: int) -> Iterator[Conversation]:
    rng = np.random.default_rng([seed, 33])
    sides = sides_by_finding(lessons)
    for lesson in lessons:
        yield from _crop_lessons(lesson, folder, views, rng, sides)
    near = [one for one in lessons if one.question.topic in CROP_TOPICS]
    for repeat in range(2):
        for proposal in proposals(near, seed=seed + 50 + repeat, region_truth=1.0, whole=0.0, among=lessons):
            yield _judged(proposal, folder, views, near=True)


def _judged(proposal: Proposal, folder: Path, views: Views, *, near: bool = False) -> Conversation:
    """The judge's question about a proposal and the truth about it; `near`: it is shown the crop alone."""
    lesson = proposal.lesson
    (asked,) = judgement(
        lesson.study, folder, views, question=lesson.question.text, answer=proposal.answer, box=proposal.box
    )
    if near:
        asked = replace(asked, pictures=asked.pictures[-1:])
    return answered((asked,), "yes" if proposal.right else "no")


def _place_lessons(lesson: Lesson, rng: np.random.Generator) -> Iterator[Conversation]:
    """A side or a zone from a region's numbers: question, region, answer, without any picture."""
    if lesson.question.topic in PLACE_TOPICS and lesson.reference.boxes:
        for _ in range(4):
            region = Turn("assistant", box_to_text(_true_region(lesson.reference.boxes, rng)))
            yield answered((Turn("user", lesson.question.text), region, Turn("user", "")), lesson.reference.answer)


def _finding_lesson(
    lesson: Lesson, folder: Path, views: Views, rng: np.random.Generator, sides: Mapping[str, float]
) -> Iterator[Conversation]:
    """Is the finding in this crop? Only where the key says where it is, so that a "no" is known to be one."""
    finding, boxes = lesson.reference.finding, lesson.reference.boxes
    if not finding or not boxes:
        return
    for there in (True, False):
        box = _true_region(boxes, rng) if there else _elsewhere(boxes, rng, sides[finding])
        asked = finding_in(lesson.study, folder, views, finding=finding, box=box)
        yield answered(asked, "yes" if there else "no")


def _region(
    lesson: Lesson, rng: np.random.Generator, sides: Mapping[str, float], *, truth: float, whole: float,
    grid: float = 0.01,
) -> Box:  # fmt: skip
    """Where a lesson looks. Elsewhere is as large as the finding would be, so that size tells nothing of the answer;
    where the finding is the answer, any finding's size."""
    draw = rng.random()
    if draw < whole:
        return WHOLE
    if lesson.reference.boxes and draw < whole + truth:
        return _true_region(lesson.reference.boxes, rng, grid)
    named = lesson.reference.finding if lesson.reference.answer != lesson.reference.finding else ""
    side = sides.get(named) or float(rng.choice(sorted(sides.values())))
    return random_square(rng, side, grid)


def _written_region(lesson: Lesson, rng: np.random.Generator, sides: Mapping[str, float], *, truth: float) -> Box:
    """Where the finding is, or else the middle of the image, as large as the finding would be."""
    if lesson.reference.boxes and rng.random() < truth:
        return _true_region(lesson.reference.boxes, rng, SNAP)
    return snapped(0.5, 0.5, sides.get(lesson.reference.finding) or float(rng.choice(sorted(sides.values()))), SNAP)


def _true_region(boxes: Sequence[Box], rng: np.random.Generator, grid: float = 0.01) -> Box:
    """The square around one of the boxes, off its centre by up to a fifth of a side."""
    box = boxes[int(rng.integers(len(boxes)))]
    side = look_side(box)
    cx, cy = (c + rng.uniform(-0.2, 0.2) * side for c in box.centre)
    return snapped(cx, cy, side, grid)


def _elsewhere(boxes: Sequence[Box], rng: np.random.Generator, side: float) -> Box:
    """A square that shows as little of the boxes as the best of 20 draws."""
    draws = [random_square(rng, side) for _ in range(20)]
    return min(draws, key=lambda d: sum(_overlap(b, d) for b in boxes))


def sides_by_finding(lessons: Sequence[Lesson]) -> dict[str, float]:
    """The median side of the squares that show each finding."""
    sides: dict[str, list[float]] = {}
    for lesson in lessons:
        for box in lesson.reference.boxes:
            sides.setdefault(lesson.reference.finding, []).append(look_side(box))
    return {finding: sorted(found)[len(found) // 2] for finding, found in sorted(sides.items())} or {"": 0.25}


def _overlap(a: Box, b: Box) -> float:
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(width, 0.0) * max(height, 0.0) / a.area


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
