"""A round of three-step chains (look, describe, answer) on VQA-RAD: context, continuation and γ on real questions.

VQA-RAD is the release if it lies beside the repository, else a stand-in in its layout. The models are tiny and
untrained.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from statistics import fmean

import pytest

from clincot.datasets.folder import StudyIndex
from clincot.jsonl import read_records
from clincot.prompts import load_prompt_format
from clincot.records import Candidate, PanelScore, PreferencePair, Question, Region
from clincot.rounds import Plan, run_rounds
from clincot.training.rows import PairFiles, read_training_rows
from tests.support import tiny
from tests.support.vqa_rad_release import ingest_some

pytestmark = pytest.mark.slow

STEPS = ("What part of the body does this region show?", "Describe what is seen there.", "{question}")
GAMMA = 0.5
QUESTIONS = 12


@dataclass(frozen=True)
class ChainedRound:
    plan: Plan
    folder: Path

    @property
    def candidates(self) -> dict[str, Candidate]:
        return {one.id: one for one in read_records(self.folder / "candidates.jsonl", Candidate)}

    @property
    def scores(self) -> dict[str, float | None]:
        return {one.candidate: one.score for one in read_records(self.folder / "scores.jsonl", PanelScore)}


@pytest.fixture(scope="module")
def chained(tmp_path_factory: pytest.TempPathFactory) -> ChainedRound:
    root = tmp_path_factory.mktemp("chains")
    data = ingest_some(root / "vqa-rad")
    policy, *judges = (tiny.write_model(root / name, seed) for seed, name in enumerate(("policy", "a", "b")))
    params = tiny.params(judges)
    sections = {
        "prepare": {"limit": QUESTIONS},
        "propose": {"grounders": {"random": 2}},
        "answer": {"steps": STEPS, "max_new_tokens": 3},
        "pair": {"gamma": GAMMA, "per_question": 50},
        "evaluate": {"arms": ("written",), "limit": 4, "max_new_tokens": 3, "resamples": 10},
    }
    changed = {name: getattr(params, name).model_copy(update=fields) for name, fields in sections.items()}
    plan = Plan(
        run=root / "run",
        data=data / "train",
        benchmark=data / "test",
        policy=policy,
        params=params.model_copy(update=changed),
        count=1,
    )
    run_rounds(plan)
    return ChainedRound(plan, root / "run" / "round-01")


def test_every_step_continues_all_and_the_best_from_every_region(chained: ChainedRound) -> None:
    """3 regions (2 random, the whole image). Step 0: 3 candidates. Step 1: 3 + 2 more of the best = 5. Step 2: each of
    the 5 from its own region, and the best of them from the other 2: 7."""
    questions = {one.id: one.text for one in read_records(chained.folder / "questions.jsonl", Question)}
    assert len(questions) == QUESTIONS
    scores = chained.scores
    for _, group in groupby(chained.candidates.values(), key=lambda one: one.question):
        members = list(group)
        by_step = [[one for one in members if one.step == step] for step in range(3)]
        assert [len(one) for one in by_step] == [3, 5, 7]
        for before, after in pairwise(by_step):
            best = max(before, key=lambda one: (scores[one.id] or 0.0, one.id))
            assert {one.parent for one in after} == {one.id for one in before}
            assert len({one.region for one in after if one.parent == best.id}) == 3


def test_a_pair_of_the_last_step_is_trained_with_its_whole_chain_as_context(chained: ChainedRound) -> None:
    """What is trained are the last step's tokens; questions and answers of the steps before it are in the prompt."""
    folder, plan = chained.folder, chained.plan
    pairs = {one.id: one for one in read_records(folder / "pairs.jsonl", PreferencePair)}
    files = PairFiles(
        folder / "pairs.jsonl", folder / "candidates.jsonl", folder / "regions.jsonl", folder / "questions.jsonl"
    )
    rows = list(read_training_rows(files, plan.data, load_prompt_format(plan.policy), steps=STEPS))
    candidates, questions = (
        chained.candidates,
        {one.id: one for one in read_records(folder / "questions.jsonl", Question)},
    )
    assert {pairs[row.pair].step for row in rows} == {0, 1, 2}
    assert len(StudyIndex(plan.data)) > QUESTIONS
    for row in rows:
        pair = pairs[row.pair]
        chosen = candidates[pair.chosen]
        chain = [chosen]
        while chain[0].parent:
            chain.insert(0, candidates[chain[0].parent])
        texts = [turn.text for turn in row.chosen]
        said = [one.text for one in chain]
        asked = [step.replace("{question}", questions[pair.question].asked_text) for step in STEPS[: pair.step + 1]]
        assert texts[3::4] == said  # question, region, crop, answer of every step
        assert [any(text.startswith(question) for text in texts[::4]) for question in asked] == [True] * len(asked)
        assert [turn.action for turn in row.chosen][:-1] == [False] * (len(texts) - 1)
        assert row.chosen[-1].action
        assert len([turn for turn in row.chosen if turn.pictures]) == pair.step + 2  # the film, and a crop a step


def test_gamma_credits_a_look_with_what_follows(chained: ChainedRound) -> None:
    """s = s_cur + γ · mean of s_next over the candidates that continue it; in the last step s_cur alone."""
    candidates, scores = chained.candidates, chained.scores
    following: dict[str, list[float]] = {}
    for one in candidates.values():
        following.setdefault(one.parent, []).append(scores[one.id] or 0.0)
    assert None not in scores.values()

    def credit(candidate: str) -> float:
        after = following.get(candidate, [])
        return (scores[candidate] or 0.0) + (GAMMA * fmean(after) if after else 0.0)

    pairs = list(read_records(chained.folder / "pairs.jsonl", PreferencePair))
    assert pairs
    regions = {one.id for one in read_records(chained.folder / "regions.jsonl", Region)}
    for pair in pairs:
        assert {pair.chosen_region, pair.rejected_region} <= regions
        assert pair.chosen_score == pytest.approx(credit(pair.chosen), abs=1e-5)
        assert pair.rejected_score == pytest.approx(credit(pair.rejected), abs=1e-5)
