"""Supervised lessons for the small models, from a data set *with* its answer key.

Only base models and judges are taught this way, on patients that no round and no evaluation uses. The base policy is
left improvable on purpose: it answers well from the right region, but the regions that it is taught to *write* are
right only in a stated share of lessons and the middle of the image otherwise, as region annotations of mixed quality
would be: some drawn with care, the rest the default box. So it looks at the middle unless something tells it that
looking pays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from clincot.geometry import Box, box_to_text
from clincot.judging.labelled_answers import (
    OFF_TOPIC,
    SNAP,
    Lesson,
    Proposal,
    _elsewhere,
    _region,
    _true_region,
    proposals,
    sides_by_finding,
    snapped,
)
from clincot.prompts import Conversation, Turn, Views, answered, crop_picture, finding_in, judgement, look, look_closer

CROP_TOPICS = ("margin", "presence", "which finding")  # a crop is enough to answer these
PLACE_TOPICS = ("side", "zone")  # the region's numbers are enough to answer these


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


def _written_region(lesson: Lesson, rng: np.random.Generator, sides: Mapping[str, float], *, truth: float) -> Box:
    """Where the finding is, or else the middle of the image, as large as the finding would be."""
    if lesson.reference.boxes and rng.random() < truth:
        return _true_region(lesson.reference.boxes, rng, SNAP)
    return snapped(0.5, 0.5, sides.get(lesson.reference.finding) or float(rng.choice(sorted(sides.values()))), SNAP)
