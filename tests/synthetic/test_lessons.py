"""Lessons for the small models: what they ask, where they look, and that a crop's size tells nothing of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from clincot.geometry import WHOLE_IMAGE, Box, box_from_text, box_from_xyxy, compute_coverage
from clincot.judging.labelled_answers import (
    LabelledQuestion,
    draw_labelled_answers,
    join_references,
    measure_finding_sides,
    sample_grid_square,
    snap_square,
)
from clincot.prompts import Conversation, PromptFormat, collect_views
from clincot.records import Question, Reference, Study
from clincot.synthetic.lessons import build_judge_lessons, build_policy_lessons

FOLDER = Path("data")
VIEWS = PromptFormat(wording="brief", whole_grid=2, whole_px=64, crop_px=64)


def lesson(number: int, topic: str, text: str, answer: str, finding: str, boxes: Sequence[Box]) -> LabelledQuestion:
    study = Study(image=f"images/{number}.png", sha256=f"{number:064x}", width=256, height=256)
    question = Question(study=study.id, text=text, kind="open", topic=topic)
    reference = Reference(question=question.id, answer=answer, finding=finding, boxes=tuple(boxes))
    return LabelledQuestion(study, question, reference)


def small_box(number: int) -> Box:
    """A box of a tenth of the image: looked at with a quarter."""
    x, y = 0.05 + 0.08 * (number % 10), 0.05 + 0.08 * (number // 10 % 10)
    return box_from_xyxy((x, y, x + 0.1, y + 0.1))


def large_box(number: int) -> Box:
    """Four tenths: looked at with a half."""
    x = 0.05 * (number % 10)
    return box_from_xyxy((x, 0.3, x + 0.4, 0.7))


def teaching() -> list[LabelledQuestion]:
    """120 questions about nodules (60 present, 60 absent), 60 about effusions, 60 about which of both it is."""
    made = []
    for n in range(60):
        made += [
            lesson(n, "presence", "Is there a nodule?", "yes", "nodule", [small_box(n)]),
            lesson(100 + n, "presence", "Is there a nodule?", "no", "nodule", []),
            lesson(200 + n, "side", "Which side?", ("left", "right")[n % 2], "effusion", [large_box(n)]),
            lesson(
                300 + n,
                "which finding",
                "Which finding?",
                *(("nodule", "effusion")[n % 2],) * 2,
                [(small_box, large_box)[n % 2](n)],
            ),
        ]
    return made


LESSONS = teaching()
BY_IMAGE = {str(FOLDER / one.study.image): one for one in LESSONS}


def about(conversation: Conversation) -> LabelledQuestion:
    return BY_IMAGE[collect_views(conversation)[0].path]


def policy(region_truth: float = 0.3, seed: int = 0) -> list[Conversation]:
    """Both parts of a policy's lessons."""
    return [
        conversation
        for part in (1, 2)
        for conversation in build_policy_lessons(
            LESSONS, FOLDER, VIEWS, region_truth=region_truth, seed=seed, part=part
        )
    ]


def shows(boxes: Sequence[Box], place: Box) -> bool:
    return any(compute_coverage(box, by=place) > 0.5 for box in boxes)


def side(box: Box) -> float:
    return round(box.x1 - box.x0, 2)


def crop(conversation: Conversation) -> Box:
    box = collect_views(conversation)[-1].box
    assert box is not None
    return box


def test_join_names_what_is_missing() -> None:
    one = LESSONS[0]
    assert join_references({one.study.id: one.study}, [one.question], {one.question.id: one.reference}) == [one]
    with pytest.raises(KeyError, match=one.question.id):
        join_references({one.study.id: one.study}, [one.question], {})
    with pytest.raises(KeyError, match=one.study.id):
        join_references({}, [one.question], {one.question.id: one.reference})


def test_sides_are_the_medians_of_what_looks_at_a_finding() -> None:
    assert measure_finding_sides(LESSONS) == {"effusion": 0.5, "nodule": 0.25}
    assert measure_finding_sides([]) == {"": 0.25}


def test_squares_stay_inside_with_their_corner_on_the_grid() -> None:
    assert snap_square(0.0, 1.0, 0.25, 0.05).xyxy == (0.0, 0.75, 0.25, 1.0)
    assert snap_square(0.5, 0.5, 0.25, 0.05).xyxy == (0.4, 0.4, 0.65, 0.65)  # .375 / .05 is 7.5: to the even 8
    rng = np.random.default_rng(0)
    for grid in (0.01, 0.05):
        for _ in range(200):
            box = sample_grid_square(rng, 0.25, grid)
            assert side(box) == 0.25
            assert box.x0 / grid == pytest.approx(round(box.x0 / grid), abs=1e-6)
    assert sample_grid_square(rng, 1.0) == WHOLE_IMAGE


@pytest.mark.parametrize("region_truth", [0.0, 0.3, 1.0])
def test_the_written_regions_are_right_in_the_share_asked_for(region_truth: float) -> None:
    """A share `region_truth` of the written regions lies on the box; the others may by chance: a square of side .25
    centred uniformly in [.125, .875]² shows half of a box in about (.25 / .75)² = .11 of draws. One of side .5 nearly
    always shows a box of .4 in the middle, so nodules are counted alone. Four deviations of 90 draws: .2."""
    written = [c for c in policy(region_truth) if len(c) == 4 and c[1].action]
    assert len(written) == len(LESSONS)
    hits = []
    for conversation in written:
        one = about(conversation)
        box = box_from_text(conversation[1].text)
        assert box is not None
        assert side(box) < 1  # the whole image is not taught as a region to write
        assert (round(100 * box.x0) % 5, round(100 * box.y0) % 5) == (0, 0)
        if one.reference.boxes and one.reference.finding == "nodule":
            hits.append(shows(one.reference.boxes, box))
    assert len(hits) == 90
    assert np.mean(hits) == pytest.approx(region_truth + (1 - region_truth) * 0.11, abs=0.2)
    if region_truth == 1.0:
        assert all(hits)


def test_a_written_region_that_is_not_right_is_the_middle() -> None:
    """The base policy's default, which rounds have something to improve on: (.375, .375) on a grid of .05 is .4."""
    for conversation in policy(region_truth=0.0):
        if len(conversation) == 4 and conversation[1].action:
            assert conversation[1].text in {"[40, 40, 65, 65]", "[25, 25, 75, 75]"}


def test_policy_lessons_train_regions_it_writes_and_answers() -> None:
    """If the policy writes the region, a lesson trains region and answer; otherwise it trains only the answer."""
    kinds: dict[tuple[int, tuple[bool, ...]], int] = {}
    for conversation in policy():
        kind = len(collect_views(conversation)), tuple(t.action for t in conversation)
        kinds[kind] = 1 + kinds.get(kind, 0)
        assert conversation[-1].role == "assistant"
        asked, said = conversation[0].text, conversation[-1].text
        if kind == (0, (False, True)):  # what a region is
            box = box_from_text(said)
            assert box is not None
            assert side(box) in {0.25, 0.5}
            continue
        if not collect_views(conversation):  # a place is read from the region's numbers
            assert (asked, said) in {("Which side?", "left"), ("Which side?", "right")}
            continue
        one = about(conversation)
        if asked == one.question.text:
            assert said == one.reference.answer
        else:
            assert asked == f"Is there {one.reference.finding}?"
            assert said == ("yes" if shows(one.reference.boxes, crop(conversation)) else "no")
    # Part 1: of 240 questions the shape of a region, twice; 60 sides read from numbers, 4 times; 180 of topics that a
    # crop answers, twice each; and of the 180 with a box twice, whether a crop shows the finding.
    # Part 2: each question once with a region of its own and once with a given one, and the 180 with a box once more
    # whether a crop shows the finding.
    assert kinds == {
        (0, (False, True)): 480,
        (0, (False, False, False, True)): 240,
        (1, (False, True)): 360 + 360 + 180,
        (5, (False, True, False, True)): 240,
        (5, (False, False, False, True)): 240,
    }


def test_where_a_crop_looks_its_size_tells_nothing_of_presence() -> None:
    """Of questions whether there is a nodule: crops of yes and of no are of one size, whether they show it or not."""
    sizes: dict[str, set[float]] = {}
    for conversation in policy():
        if not collect_views(conversation):
            continue
        one = about(conversation)
        if (
            one.question.topic == "presence"
            and conversation[0].text == one.question.text
            and crop(conversation) != WHOLE_IMAGE
        ):
            sizes.setdefault(one.reference.answer, set()).add(side(crop(conversation)))
        if conversation[0].text.startswith("Is there") and one.question.topic == "side":
            sizes.setdefault(f"effusion {conversation[-1].text}", set()).add(side(crop(conversation)))
    assert sizes == {"yes": {0.25}, "no": {0.25}, "effusion yes": {0.5}, "effusion no": {0.5}}


def test_regions_elsewhere_have_the_size_of_either_finding() -> None:
    """If the finding is the answer, the size of a region elsewhere must not reveal it."""
    sizes = {"nodule": set(), "effusion": set()}  # type: dict[str, set[float]]
    for proposal in draw_labelled_answers(LESSONS, seed=0, region_truth=0.0, whole=0.0):
        if proposal.labelled_question.question.topic == "which finding":
            sizes[proposal.labelled_question.reference.finding].add(side(proposal.box))
    assert sizes == {"nodule": {0.25, 0.5}, "effusion": {0.25, 0.5}}


def test_a_proposal_is_right_where_its_answer_is_the_keys() -> None:
    made = list(draw_labelled_answers(LESSONS, seed=0, region_truth=0.5))
    assert len(made) == 2 * len(LESSONS)
    for right, wrong in zip(made[::2], made[1::2], strict=True):
        assert right.labelled_question is wrong.labelled_question
        assert right.box == wrong.box  # the two differ in the answer alone
        assert (right.right, wrong.right) == (True, False)
        assert right.answer == right.labelled_question.reference.answer != wrong.answer
    groups = {"presence": {"yes", "no"}, "side": {"left", "right"}, "which finding": {"nodule", "effusion"}}
    of_topic = [p.answer in groups[p.labelled_question.question.topic] for p in made[1::2]]
    assert 0.9 < np.mean(of_topic) <= 1.0  # now and then another topic's


def test_one_proposal_a_question_is_as_often_right_as_wrong() -> None:
    """Calibration's set: 240 draws of one half, four deviations are .13."""
    made = list(draw_labelled_answers(LESSONS, seed=0, region_truth=0.5, both=False))
    assert len(made) == len(LESSONS)
    assert np.mean([p.right for p in made]) == pytest.approx(0.5, abs=0.13)


@pytest.mark.parametrize(("truth", "whole"), [(1.0, 0.0), (0.0, 0.0), (0.0, 1.0)])
def test_proposals_look_where_they_are_told_to(truth: float, whole: float) -> None:
    made = [
        p
        for p in draw_labelled_answers(LESSONS, seed=0, region_truth=truth, whole=whole)
        if p.labelled_question.reference.boxes
    ]
    if whole:
        assert {p.box for p in made} == {WHOLE_IMAGE}
    elif truth:
        assert all(shows(p.labelled_question.reference.boxes, p.box) for p in made)
    else:
        nodules = [
            shows(p.labelled_question.reference.boxes, p.box)
            for p in made
            if p.labelled_question.reference.finding == "nodule"
        ]
        assert np.mean(nodules) < 0.3


def test_a_single_answer_has_no_wrong_one() -> None:
    """Nothing else is known to be wrong: the question gives a right proposal alone."""
    made = list(draw_labelled_answers(LESSONS[:1], seed=0, region_truth=0.5))
    assert [(p.answer, p.right) for p in made] == [("yes", True)]


def test_a_judge_says_yes_only_to_the_right_answer() -> None:
    """Part 2: all 240 questions, every other once more, each with its right and a wrong answer: 360 of either."""
    yes_no = {"yes": 0, "no": 0}
    for conversation in build_judge_lessons(LESSONS, FOLDER, VIEWS, seed=0, part=2):
        asked, said = conversation[0].text, conversation[-1]
        assert [t.action for t in conversation] == [False, True]
        assert len(collect_views(conversation)) == 5  # the whole image as 2 x 2 and the crop, as the panel shows it
        one = about(conversation)
        assert box_from_text(asked) is not None  # a judge is told where the crop lies
        right = asked.endswith(f" {one.question.text} {one.reference.answer}?")
        assert said.text == ("yes" if right else "no")
        yes_no[said.text] += 1
    assert yes_no == {"yes": 240 + 120, "no": 240 + 120}


def test_a_judge_hears_answers_to_other_questions_in_the_end() -> None:
    """Part 4: a quarter of the wrong answers is drawn from all topics, in part 2 a twentieth; of those some are of the
    topic by chance, so fewer are off it. 480 wrong answers: four deviations of .25 are .08."""

    def off_topic(part: int) -> float:
        wrong = [
            c[0].text for c in build_judge_lessons(LESSONS, FOLDER, VIEWS, seed=0, part=part) if c[-1].text == "no"
        ]
        topics: dict[str, set[str]] = {}
        for one in LESSONS:
            topics.setdefault(one.question.text, set()).add(one.reference.answer)
        return float(
            np.mean([not any(f" {q} {a}?" in text for q, group in topics.items() for a in group) for text in wrong])
        )

    assert off_topic(2) < 0.08 < off_topic(4) < 0.33


def test_a_judge_first_learns_from_near() -> None:
    """Part 1 shows a single crop. The 180 questions that a crop answers, twice each; of the 180 with a box (120 of
    these topics, 60 sides) twice whether a crop shows the finding; and the 180 twice with a right and a wrong one."""
    kinds = {"answer": 0, "yes": 0, "no": 0, "finding": 0}
    for conversation in build_judge_lessons(LESSONS, FOLDER, VIEWS, seed=0, part=1):
        assert len(collect_views(conversation)) == 1
        one, asked, said = about(conversation), conversation[0].text, conversation[-1].text
        if (region := box_from_text(asked)) is not None:
            assert said == ("yes" if asked.endswith(f" {one.question.text} {one.reference.answer}?") else "no")
            assert not one.reference.boxes or shows(one.reference.boxes, region)
            kinds[said] += 1
        elif asked == one.question.text:
            assert said == one.reference.answer
            kinds["answer"] += 1
        else:
            assert asked == f"Is there {one.reference.finding}?"
            kinds["finding"] += 1
    assert kinds == {"answer": 360, "yes": 360, "no": 360, "finding": 360}


def test_lessons_are_drawn_from_their_seed() -> None:
    for make in (
        lambda seed: policy(seed=seed),
        lambda seed: list(build_judge_lessons(LESSONS, FOLDER, VIEWS, seed=seed)),
    ):
        assert make(1) == make(1) != make(2)


def test_a_judges_third_part_is_both_together() -> None:
    parts = [list(build_judge_lessons(LESSONS, FOLDER, VIEWS, seed=0, part=part)) for part in (1, 2, 3)]
    assert parts[2] == parts[0] + parts[1]
