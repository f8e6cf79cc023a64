"""Candidates: one answer a region, seeds from content, and the chains of more than one step."""

from __future__ import annotations

from pathlib import Path

import pytest

from clincot.config import AnswerConfig
from clincot.generation.candidates import (
    GenerationRequest,
    answer_regions,
    plan_first_step,
    plan_next_step,
    render_step_question,
)
from clincot.geometry import WHOLE_IMAGE, box_from_xyxy
from clincot.prompts import hash_prompt
from clincot.records import Candidate, Question, Region, Study
from tests.support.bright import BrightPolicy, ask, film

WORDS = [f"answer {n}" for n in range(50)]


def region(question: Question, x: float, grounder: str = "windows") -> Region:
    box = WHOLE_IMAGE if grounder == "whole" else box_from_xyxy((x, 0.0, x + 0.25, 0.25))
    return Region(question=question.id, hypothesis="nodule", box=box, confidence=0.5, grounder=grounder)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return film(tmp_path, "a.png", 0, 0)[0]


def test_every_region_gets_one_candidate_in_order(study: Study, tmp_path: Path) -> None:
    questions = [ask(study), ask(study, "Where?")]
    regions = [region(q, x, g) for q in questions for x, g in ((0.1, "windows"), (0.5, "written"), (0.0, "whole"))]
    policy = BrightPolicy(WORDS)
    config = AnswerConfig(batch_size=4, temperature=0.9)
    made = list(answer_regions(plan_first_step(questions, {study.id: study}, regions), tmp_path, policy, config))
    assert [c.region for c in made] == [r.id for r in regions]
    assert [c.question for c in made] == [r.question for r in regions]
    assert [c.region_written for c in made] == [False, True, False] * 2
    assert {(c.step, c.parent, c.policy, c.temperature) for c in made} == {(0, "", "bright-policy", 0.9)}
    assert {c.prompt for c in made} == {hash_prompt(policy.views)}
    assert policy.batches == [4, 2]
    for candidate, asked in zip(made, policy.asked, strict=True):
        regions_turn = asked[1]
        assert regions_turn.action is candidate.region_written  # a tool's region is input
        assert candidate.text == WORDS[candidate.seed % 50]
    assert len({c.seed for c in made}) == len(made)


def test_several_answers_of_a_region_follow_each_other_and_begin_with_the_single_one(
    study: Study, tmp_path: Path
) -> None:
    """Three of each region, each with a seed of its own; the first has the seed and the text of per_region 1."""
    question = ask(study)
    regions = [region(question, x) for x in (0.1, 0.5)]

    def answers(per_region: int) -> list[Candidate]:
        asks = plan_first_step([question], {study.id: study}, regions, per_region=per_region)
        return list(answer_regions(asks, tmp_path, BrightPolicy(WORDS), AnswerConfig(temperature=0.9)))

    three = answers(3)
    assert [c.region for c in three] == [regions[0].id] * 3 + [regions[1].id] * 3
    assert len({c.seed for c in three}) == len({c.id for c in three}) == 6
    assert three[::3] == answers(1)


def test_several_answers_need_a_temperature() -> None:
    with pytest.raises(ValueError, match="per_region 2 with temperature 0 gives the same answer 2 times"):
        AnswerConfig(per_region=2, temperature=0)


def test_an_answer_does_not_depend_on_what_else_is_asked(study: Study, tmp_path: Path) -> None:
    question = ask(study)
    regions = [region(question, x) for x in (0.1, 0.3, 0.5)]

    def answers(chosen: list[Region], seed: int = 0, batch_size: int = 8) -> dict[str, Candidate]:
        config = AnswerConfig(seed=seed, batch_size=batch_size)
        asks = plan_first_step([question], {study.id: study}, chosen)
        return {c.region: c for c in answer_regions(asks, tmp_path, BrightPolicy(WORDS), config)}

    everything = answers(regions)
    assert answers(regions[2:])[regions[2].id] == everything[regions[2].id]
    assert answers(regions, batch_size=1) == everything
    assert {c.seed for c in answers(regions, seed=1).values()}.isdisjoint({c.seed for c in everything.values()})


def test_regions_of_a_question_that_is_not_there_are_refused(study: Study) -> None:
    one, other = ask(study), ask(study, "Where?")
    with pytest.raises(ValueError, match=f"{other.id}.*not among the questions or out of order"):
        list(plan_first_step([one], {study.id: study}, [region(one, 0.1), region(other, 0.1)]))
    with pytest.raises(ValueError, match="out of order"):
        list(plan_first_step([one, other], {study.id: study}, [region(other, 0.1), region(one, 0.1)]))


def test_all_continues_every_candidate_from_every_region(study: Study) -> None:
    """Three regions: 3 + 2 = 5 requests with `own`, 3 · 3 = 9 with `all`; an unscored candidate ends its chain."""
    question = ask(study)
    answered = []
    for number, x in enumerate((0.1, 0.4, 0.7)):
        request = GenerationRequest(study, question, region(question, x))
        candidate = Candidate(
            question=question.id,
            region=request.region.id,
            text=f"{number}",
            token_logprobs=(-0.1,),
            policy="p",
            prompt="p",
            seed=0,
            temperature=0.0,
        )
        answered.append((request, candidate, 0.1 * number))
    assert len(list(plan_next_step(answered))) == 5
    every = list(plan_next_step(answered, continue_from="all"))
    expected = {(candidate.id, request.region.id) for _, candidate, _ in answered for request, _, _ in answered}
    assert {(request.parent, request.region.id) for request in every} == expected
    assert len(every) == 9
    unscored = [(*answered[0][:2], None), *answered[1:]]
    assert len(list(plan_next_step(unscored, continue_from="all"))) == 6


def test_a_steps_wording_keeps_other_braces(study: Study) -> None:
    assert render_step_question("{question} Why? {x}", ask(study, "Is there {a}?")) == "Is there {a}? Why? {x}"


STEPS = AnswerConfig(steps=("What is seen?", "{question}"), temperature=0.7)


def first(study: Study, folder: Path, question: Question, scores: list[float | None]) -> list:  # type: ignore[type-arg]
    regions = [region(question, 0.1 + 0.2 * n, "written" if n == 1 else "windows") for n in range(len(scores))]
    asks = list(plan_first_step([question], {study.id: study}, regions))
    made = list(answer_regions(asks, folder, BrightPolicy(WORDS), STEPS))
    return list(zip(asks, made, scores, strict=True))


def test_best_continues_everywhere_others_from_their_region(study: Study, tmp_path: Path) -> None:
    """Scores .2, .9, .4: the second goes on from its own region and the two others, first and third from their own."""
    asked = first(study, tmp_path, ask(study), [0.2, 0.9, 0.4])
    regions = [a.region.id for a, _, _ in asked]
    following = [(a.before[-1][1].id, a.region.id) for a in plan_next_step(asked)]
    ids = [c.id for _, c, _ in asked]
    assert following == [
        (ids[0], regions[0]),
        (ids[1], regions[1]),
        (ids[1], regions[0]),
        (ids[1], regions[2]),
        (ids[2], regions[2]),
    ]


def test_unscored_candidates_are_not_continued(study: Study, tmp_path: Path) -> None:
    """Unscored candidates are not continued; without any score the chain ends."""
    asked = first(study, tmp_path, ask(study), [None, 0.1, None])
    assert {a.before[-1][1].id for a in plan_next_step(asked)} == {asked[1][1].id}
    assert list(plan_next_step([(a, c, None) for a, c, _ in asked])) == []
    assert list(plan_next_step([])) == []


def test_the_second_step_is_asked_after_the_first_as_context(study: Study, tmp_path: Path) -> None:
    asked = first(study, tmp_path, ask(study), [0.2, 0.9])
    policy = BrightPolicy(WORDS)
    made = list(answer_regions(plan_next_step(asked), tmp_path, policy, STEPS))
    assert {c.step for c in made} == {1}
    assert [c.parent for c in made] == [asked[0][1].id, asked[1][1].id, asked[1][1].id]
    turns = policy.asked[1]  # the best one's own region, which the policy wrote
    assert [(t.role, t.text) for t in turns] == [
        ("user", "What is seen?"),
        ("assistant", "[30, 0, 55, 25]"),
        ("user", ""),
        ("assistant", asked[1][1].text),
        ("user", "Is there a nodule?"),
        ("assistant", "[30, 0, 55, 25]"),
        ("user", ""),
    ]
    assert [t.action for t in turns] == [False] * 5 + [True, False]


def test_a_third_step_has_both_before_it(study: Study, tmp_path: Path) -> None:
    config = AnswerConfig(steps=("A?", "B?", "C?"))
    question = ask(study)
    asks = list(plan_first_step([question], {study.id: study}, [region(question, 0.1), region(question, 0.5)]))
    scored: list[tuple[GenerationRequest, Candidate, float | None]] = []
    for _ in range(3):
        made = list(answer_regions(asks, tmp_path, BrightPolicy(WORDS), config))
        scored += [(a, c, 0.1 * n) for n, (a, c) in enumerate(zip(asks, made, strict=True))]
        asks = list(plan_next_step(scored))
    last = [c for _, c, _ in scored if c.step == 2]
    by_id = {c.id: c for _, c, _ in scored}
    assert last
    for candidate in last:
        assert by_id[candidate.parent].step == 1
        assert by_id[by_id[candidate.parent].parent].step == 0
    assert len(by_id) == len(scored)
