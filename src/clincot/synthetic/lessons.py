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
    GRID_STEP,
    OFF_TOPIC_SHARE,
    LabelledAnswer,
    LabelledQuestion,
    _sample_background_square,
    _sample_region,
    _sample_true_region,
    draw_labelled_answers,
    measure_finding_sides,
    snap_square,
)
from clincot.prompts import (
    ChainStep,
    Conversation,
    PromptFormat,
    Turn,
    answer_prompt,
    build_crop_view,
    finding_prompt,
    judge_prompt,
    region_prompt,
    with_answer,
)

CROP_TOPICS = ("margin", "presence", "which finding")  # a crop is enough to answer these
PLACE_TOPICS = ("side", "zone")  # the region's numbers are enough to answer these


def build_policy_lessons(
    lessons: Sequence[LabelledQuestion],
    folder: Path,
    views: PromptFormat,
    *,
    region_truth: float,
    seed: int,
    part: int = 2,
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
    sides = measure_finding_sides(lessons)
    for lesson in lessons:
        study, text, answer = lesson.study, lesson.question.text, lesson.reference.answer
        if part == 1:
            yield from _build_crop_lessons(lesson, folder, views, rng, sides)
            yield from _build_place_lessons(lesson, rng)
            for _ in range(2):
                box = _sample_region(lesson, rng, sides, truth=region_truth, whole=0.0, grid=GRID_STEP)
                yield (Turn("user", text), Turn("assistant", box_to_text(box), action=True))
            continue
        report = lesson.question.kind == "report"
        opening = region_prompt(study, folder, views, text)
        box = _draw_written_region(lesson, rng, sides, truth=region_truth)
        closer = answer_prompt(opening, study, folder, views, ChainStep(text, box, written=True, report=report))
        yield with_answer(closer, answer)
        box = _sample_region(lesson, rng, sides, truth=0.65, whole=0.1)
        unwritten = ChainStep(text, box, written=False, report=report)
        yield with_answer(answer_prompt(opening, study, folder, views, unwritten), answer)
        there_and_elsewhere = list(_build_finding_lessons(lesson, folder, views, rng, sides))
        which = int(rng.integers(2))
        yield from there_and_elsewhere[which : which + 1]


def _build_crop_lessons(
    lesson: LabelledQuestion, folder: Path, views: PromptFormat, rng: np.random.Generator, sides: Mapping[str, float]
) -> Iterator[Conversation]:
    """The question about a crop alone, where a crop is enough to answer it, and whether the crop shows the finding."""
    if lesson.question.topic in CROP_TOPICS:
        for _ in range(2):
            box = _sample_region(lesson, rng, sides, truth=1.0, whole=0.0)
            crop = build_crop_view(lesson.study, folder, views, box)
            yield with_answer((Turn("user", lesson.question.text, (crop,)),), lesson.reference.answer)
    yield from _build_finding_lessons(lesson, folder, views, rng, sides)


def build_judge_lessons(
    lessons: Sequence[LabelledQuestion], folder: Path, views: PromptFormat, *, seed: int, part: int = 2
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
        yield from _build_close_up_lessons(lessons, folder, views, seed=seed)
    if part in (2, 3, 4):
        off_topic = 0.25 if part == 4 else OFF_TOPIC_SHARE
        for proposal in (
            *draw_labelled_answers(lessons, seed=seed, region_truth=1.0, whole=0.0, off_topic=off_topic),
            *draw_labelled_answers(lessons[::2], seed=seed + 1, region_truth=0.2, among=lessons, off_topic=off_topic),
        ):
            yield _build_judgement(proposal, folder, views)


def _build_close_up_lessons(
    lessons: Sequence[LabelledQuestion], folder: Path, views: PromptFormat, *, seed: int
) -> Iterator[Conversation]:
    rng = np.random.default_rng([seed, 33])
    sides = measure_finding_sides(lessons)
    for lesson in lessons:
        yield from _build_crop_lessons(lesson, folder, views, rng, sides)
    near = [one for one in lessons if one.question.topic in CROP_TOPICS]
    for repeat in range(2):
        for proposal in draw_labelled_answers(
            near, seed=seed + 50 + repeat, region_truth=1.0, whole=0.0, among=lessons
        ):
            yield _build_judgement(proposal, folder, views, near=True)


def _build_judgement(
    proposal: LabelledAnswer, folder: Path, views: PromptFormat, *, near: bool = False
) -> Conversation:
    """The judge's question about a proposal and the truth about it; `near`: it is shown the crop alone."""
    lesson = proposal.labelled_question
    (asked,) = judge_prompt(
        lesson.study, folder, views, question=lesson.question.text, answer=proposal.answer, box=proposal.box
    )
    if near:
        asked = replace(asked, pictures=asked.pictures[-1:])
    return with_answer((asked,), "yes" if proposal.right else "no")


def _build_place_lessons(lesson: LabelledQuestion, rng: np.random.Generator) -> Iterator[Conversation]:
    """A side or a zone from a region's numbers: question, region, answer, without any picture."""
    if lesson.question.topic in PLACE_TOPICS and lesson.reference.boxes:
        for _ in range(4):
            region = Turn("assistant", box_to_text(_sample_true_region(lesson.reference.boxes, rng)))
            yield with_answer((Turn("user", lesson.question.text), region, Turn("user", "")), lesson.reference.answer)


def _build_finding_lessons(
    lesson: LabelledQuestion, folder: Path, views: PromptFormat, rng: np.random.Generator, sides: Mapping[str, float]
) -> Iterator[Conversation]:
    """Is the finding in this crop? Only where the key says where it is, so that a "no" is known to be one."""
    finding, boxes = lesson.reference.finding, lesson.reference.boxes
    if not finding or not boxes:
        return
    for there in (True, False):
        box = _sample_true_region(boxes, rng) if there else _sample_background_square(boxes, rng, sides[finding])
        asked = finding_prompt(lesson.study, folder, views, finding=finding, box=box)
        yield with_answer(asked, "yes" if there else "no")


def _draw_written_region(
    lesson: LabelledQuestion, rng: np.random.Generator, sides: Mapping[str, float], *, truth: float
) -> Box:
    """Where the finding is, or else the middle of the image, as large as the finding would be."""
    if lesson.reference.boxes and rng.random() < truth:
        return _sample_true_region(lesson.reference.boxes, rng, GRID_STEP)
    return snap_square(
        0.5, 0.5, sides.get(lesson.reference.finding) or float(rng.choice(sorted(sides.values()))), GRID_STEP
    )
