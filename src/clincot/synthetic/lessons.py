"""Supervised lessons for the tiny models, built from a data set *with* its answer key.

Only base models and judges are trained this way, on patients that no round and no evaluation uses. The base policy is
left with room to improve on purpose. It answers well from the right region, but the regions that it learns to *write*
are right only in a certain share of the lessons and the middle of the image in the others, like annotations of mixed
quality in which the rest is a default box. So it looks at the middle until training shows it that looking elsewhere
pays. In its last lessons it unlearns what a nodule's margin looks like, which the judges know.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
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
from clincot.synthetic.question_templates import TOPIC_ANSWERS

CROP_TOPICS = ("margin", "presence", "which finding")  # can be answered from a crop
PLACE_TOPICS = ("side", "zone")  # can be answered from the region's coordinates


def draw_random_answers(
    lessons: Sequence[LabelledQuestion], topics: Collection[str], *, seed: int
) -> list[LabelledQuestion]:
    """The lessons with the answers to `topics` drawn at random from those that the topic has."""
    rng = np.random.default_rng([seed, 1])
    drawn = []
    for lesson in lessons:
        if lesson.question.topic in topics:
            answers = TOPIC_ANSWERS[lesson.question.topic]
            answer = answers[int(rng.integers(len(answers)))]
            lesson = replace(lesson, reference=lesson.reference.model_copy(update={"answer": answer}))
        drawn.append(lesson)
    return drawn


def build_policy_lessons(
    lessons: Sequence[LabelledQuestion],
    folder: Path,
    views: PromptFormat,
    *,
    region_truth: float,
    seed: int,
    part: int = 2,
) -> Iterator[Conversation]:
    """Build the lessons of a policy.

    Part 1 has many short lessons: say what a crop shows, read a side or zone from a region's coordinates, and write a
    region, a square of a quarter or half of the image, without seeing the image. Part 2 shows the whole image: write a
    region and answer from it, and answer from a region that is provided. It sometimes asks what a crop shows, so that
    the policy does not forget it: the window grounder depends on this question.

    `region_truth`: share of the written regions that show the finding. In part 1 the other regions are anywhere, in
    part 2 in the middle of the image.
    """
    rng = np.random.default_rng([seed, part])
    sides = measure_finding_sides(lessons)
    for lesson in lessons:
        study, text, answer = lesson.study, lesson.question.asked_text, lesson.reference.answer
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
        # One of the two lessons, on the finding or elsewhere, or none if the key has no boxes.
        finding_lessons = list(_build_finding_lessons(lesson, folder, views, rng, sides))
        which = int(rng.integers(2))
        yield from finding_lessons[which : which + 1]


def _build_crop_lessons(
    lesson: LabelledQuestion, folder: Path, views: PromptFormat, rng: np.random.Generator, sides: Mapping[str, float]
) -> Iterator[Conversation]:
    """Ask the question about a crop, if a crop is enough to answer it, and whether the crop shows the finding."""
    if lesson.question.topic in CROP_TOPICS:
        for _ in range(2):
            box = _sample_region(lesson, rng, sides, truth=1.0, whole=0.0)
            crop = build_crop_view(lesson.study, folder, views, box)
            yield with_answer((Turn("user", lesson.question.asked_text, (crop,)),), lesson.reference.answer)
    yield from _build_finding_lessons(lesson, folder, views, rng, sides)


def build_judge_lessons(
    lessons: Sequence[LabelledQuestion], folder: Path, views: PromptFormat, *, seed: int, part: int = 2
) -> Iterator[Conversation]:
    """Build the lessons of a judge, in parts.

    A judge that sees everything from the start stays at AUC 0.5, because matching an answer with an image is hard to
    learn from yes and no only.

    Part 1: one crop that shows the finding or, if the finding is absent, any crop. The judge answers questions itself,
    says what the crop shows, and rates a right and a wrong answer.
    Part 2: the panel's question, with image, crop and proposed answer. A third of the crops mostly do not show the
    finding; the judge cannot know the answer there and learns a P(yes) near one half.
    Part 3: both parts.
    Part 4: as part 2, with many wrong answers off topic. A policy in training drifts towards such answers, and a judge
    that has never seen them is undecided about them.
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
    """Build part 1 of a judge's lessons."""
    rng = np.random.default_rng([seed, 33])
    sides = measure_finding_sides(lessons)
    for lesson in lessons:
        yield from _build_crop_lessons(lesson, folder, views, rng, sides)
    near = [lesson for lesson in lessons if lesson.question.topic in CROP_TOPICS]
    for repeat in range(2):
        for proposal in draw_labelled_answers(
            near, seed=seed + 50 + repeat, region_truth=1.0, whole=0.0, among=lessons
        ):
            yield _build_judgement(proposal, folder, views, near=True)


def _build_judgement(
    proposal: LabelledAnswer, folder: Path, views: PromptFormat, *, near: bool = False
) -> Conversation:
    """Ask the judge about a proposal and answer with the truth; `near`: show only the crop."""
    lesson = proposal.labelled_question
    (turn,) = judge_prompt(
        lesson.study, folder, views, question=lesson.question.asked_text, answer=proposal.answer, box=proposal.box
    )
    if near:
        turn = replace(turn, pictures=turn.pictures[-1:])
    return with_answer((turn,), "yes" if proposal.right else "no")


def _build_place_lessons(lesson: LabelledQuestion, rng: np.random.Generator) -> Iterator[Conversation]:
    """Ask for a side or zone from a region's coordinates, without a picture."""
    if lesson.question.topic in PLACE_TOPICS and lesson.reference.boxes:
        for _ in range(4):
            region = Turn("assistant", box_to_text(_sample_true_region(lesson.reference.boxes, rng)))
            yield with_answer(
                (Turn("user", lesson.question.asked_text), region, Turn("user", "")), lesson.reference.answer
            )


def _build_finding_lessons(
    lesson: LabelledQuestion, folder: Path, views: PromptFormat, rng: np.random.Generator, sides: Mapping[str, float]
) -> Iterator[Conversation]:
    """Ask whether a crop shows the finding, once at the finding and once elsewhere.

    Only if the key has boxes; otherwise a "no" might be wrong.
    """
    finding, boxes = lesson.reference.finding, lesson.reference.boxes
    if not finding or not boxes:
        return
    for shown in (True, False):
        box = _sample_true_region(boxes, rng) if shown else _sample_background_square(boxes, rng, sides[finding])
        prompt = finding_prompt(lesson.study, folder, views, finding=finding, box=box)
        yield with_answer(prompt, "yes" if shown else "no")


def _draw_written_region(
    lesson: LabelledQuestion, rng: np.random.Generator, sides: Mapping[str, float], *, truth: float
) -> Box:
    """Draw a region at the finding with probability `truth`, else in the middle of the image and of typical size."""
    if lesson.reference.boxes and rng.random() < truth:
        return _sample_true_region(lesson.reference.boxes, rng, GRID_STEP)
    return snap_square(
        0.5, 0.5, sides.get(lesson.reference.finding) or float(rng.choice(sorted(sides.values()))), GRID_STEP
    )
