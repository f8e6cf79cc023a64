"""Whole rounds on the smallest models: the table, going on after harm, and chains of two steps."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from clincot.datasets.folder import StudyIndex
from clincot.jsonl import InvalidRecord, read_records
from clincot.models.checkpoint import UnsupportedCheckpoint
from clincot.models.vlm import VisionLanguageModel
from clincot.prompts import judge_prompt
from clincot.records import Candidate, Checkpoint, Judgement, PanelScore, PreferencePair, Question, Region, Study
from clincot.rounds import Plan, format_interval, render_results_table, run_rounds
from tests.support import tiny


@dataclass(frozen=True)
class Finished:
    plan: Plan
    results: dict[str, Any]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("rounds")
    policy, *judges = (tiny.write_model(folder / name, seed) for seed, name in enumerate(("policy", "a", "b")))
    return Plan(
        run=folder / "run",
        data=tiny.write_set(folder / "data", key=False),
        policy=policy,
        params=tiny.params(judges),
        benchmark=tiny.write_set(folder / "benchmark", seed=1, studies=3),
        count=1,
        comparisons=("sft", "dpo"),
    )


@pytest.fixture(scope="module")
def one(base: Plan) -> Finished:
    """A finished run of one round. Not to be changed."""
    return Finished(base, run_rounds(base))


def files(run: Path) -> dict[str, bytes]:
    """What a run made; where it names its own folder, that is written RUN."""
    return {
        str(p.relative_to(run)): p.read_bytes().replace(str(run).encode(), b"RUN")
        for p in sorted(run.rglob("*"))
        if p.is_file()
    }


def test_results_have_a_row_a_policy_and_the_blind_one(one: Finished) -> None:
    results = one.results
    assert results == json.loads((one.plan.run / "results.json").read_text())
    assert [row["row"] for row in results["rows"]] == [
        "base",
        "round 1",
        "SFT on chosen, round 1",
        "plain DPO, round 1",
    ]
    assert len({row["policy"] for row in results["rows"]}) == 4
    for row in results["rows"]:
        assert set(row["arms"]) == {"written", "windows", "oracle"}
        assert row["arms"]["oracle"]["accuracy"]["n"] + row["arms"]["oracle"]["accuracy"]["n_unscored"] == 6
    assert [gain["row"] for gain in results["gains"]] == [row["row"] for row in results["rows"][1:]]
    # the blind baseline knows the benchmark's own answers: the presence question is always "yes"
    assert results["blind"]["fitted_on"] == "the benchmark itself"
    assert results["blind"]["arms"]["blind"]["accuracy"]["value"] >= 0.5
    assert not (one.plan.data / "references.jsonl").exists()


def test_each_policy_was_trained_from_the_base_on_the_same_pairs(one: Finished) -> None:
    folders = [one.plan.run / "round-01" / name / "policy" for name in ("", "sft", "dpo")]
    records = [next(read_records(folder / "record.json", Checkpoint)) for folder in folders]
    assert len({record.parent for record in records}) == 1
    assert len({record.pairs for record in records}) == 1
    train = one.plan.params.train
    assert [record.config for record in records] == [
        train.digest,
        train.model_copy(update={"loss": "sft"}).digest,
        train.model_copy(update={"margin_lambda": 0.0}).digest,
    ]


def test_the_champion_stays_where_the_gate_keeps_it(one: Finished) -> None:
    champion = json.loads((one.plan.run / "champion.json").read_text())
    assert one.results["decisions"][0]["verdict"] != "promote"
    assert champion["round"] == 0
    assert champion["policy"] == str(one.plan.policy)
    assert champion["promotions"] == []


def test_the_table_shows_every_row_and_what_is_missing_as_a_dash(one: Finished) -> None:
    lines = render_results_table(one.results).splitlines()
    assert len(lines) == 2 + 4 + 1
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| base | ")
    assert " – " in lines[2]  # the random arm was not asked for
    assert format_interval({"value": 0.25, "low": None, "high": None}) == "0.250"
    assert format_interval({"value": 0.25, "low": 0.1, "high": 0.5}) == "0.250 [0.100, 0.500]"


@pytest.mark.parametrize(
    "lost", ["round-01/candidates.jsonl", "round-01/policy", "round-01/sft/outcomes.jsonl", "results.json"]
)
def test_a_run_that_lost_something_comes_to_the_same_end(lost: str, one: Finished, tmp_path: Path) -> None:
    run = Path(shutil.copytree(one.plan.run, tmp_path / "run"))
    untouched = run / "base" / "outcomes.jsonl"
    before, time = files(run), untouched.stat().st_mtime_ns
    path = run / lost
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    assert run_rounds(replace(one.plan, run=run)) == one.results
    assert untouched.stat().st_mtime_ns == time
    old, new = str(one.plan.run).encode(), b"RUN"
    before = {name: content.replace(old, new) for name, content in before.items()}
    after = {name: content.replace(old, new) for name, content in files(run).items()}
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] != before[name]] == []


@pytest.mark.parametrize("changed", ["data", "benchmark", "policy", "comparisons", "start_from"])
def test_a_run_folder_belongs_to_what_it_was_started_with(changed: str, one: Finished, tmp_path: Path) -> None:
    other: dict[str, Any] = {"comparisons": ("sft",), "start_from": "champion"}
    if changed == "policy":
        shutil.copytree(one.plan.policy, tmp_path / "other")
    else:
        (tmp_path / "other").mkdir()
    before = files(one.plan.run)
    with pytest.raises(
        InvalidRecord, match=f"this run was started with another {changed}; choose another --run folder"
    ):
        run_rounds(replace(one.plan, **{changed: other.get(changed, tmp_path / "other")}))
    assert files(one.plan.run) == before


def test_an_arm_to_decide_on_that_is_not_measured_is_refused_before_the_first_round(base: Plan, tmp_path: Path) -> None:
    """It was found out after the training: a decision blocked for want of outcomes."""
    decide = base.params.decide.model_copy(update={"arm": "whole"})
    plan = replace(base, run=tmp_path / "run", params=base.params.model_copy(update={"decide": decide}))
    with pytest.raises(ValueError, match=r"decide\.arm is 'whole'.*evaluate\.arms"):
        run_rounds(plan)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("wrong", ["mistyped", "no checkpoint", "no weights"])
def test_a_mistyped_judge_starts_no_run_and_the_right_one_then_does(wrong: str, base: Plan, tmp_path: Path) -> None:
    """run.json held it already: the corrected path was refused as that of "another judges"."""
    judge = tmp_path / "nowhere"
    if wrong == "no checkpoint":
        judge.mkdir()
    if wrong == "no weights":
        shutil.copytree(base.params.judge.judges[0].path, judge, ignore=shutil.ignore_patterns("*.safetensors"))
    specs = (base.params.judge.judges[0].model_copy(update={"path": str(judge)}), *base.params.judge.judges[1:])
    params = base.params.model_copy(update={"judge": base.params.judge.model_copy(update={"judges": specs})})
    said = "does not exist, and as the name of a checkpoint" if wrong == "mistyped" else "holds no checkpoint"
    with pytest.raises(UnsupportedCheckpoint, match=f"judge 'a': {judge} {said}"):
        run_rounds(replace(base, run=tmp_path / "run", params=params))
    assert not (tmp_path / "run").exists()


def test_a_mistyped_calibration_starts_no_run(base: Plan, tmp_path: Path) -> None:
    judge = base.params.judge.model_copy(update={"calibration_file": str(tmp_path / "nowhere.jsonl")})
    params = base.params.model_copy(update={"judge": judge})
    with pytest.raises(InvalidRecord, match=r"judge\.calibration_file: .*nowhere\.jsonl does not exist"):
        run_rounds(replace(base, run=tmp_path / "run", params=params))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("missing", ["data", "benchmark", "policy", "blind_from"])
def test_a_mistyped_path_starts_no_run(missing: str, base: Plan, tmp_path: Path) -> None:
    """run.json held it already, so that the run with the right path was refused as another one."""
    with pytest.raises(InvalidRecord, match=rf"{missing}: .*nowhere does not exist"):
        run_rounds(replace(base, run=tmp_path / "run", **{missing: tmp_path / "nowhere"}))  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_the_second_round_goes_on_from_the_first_ones_challenger_or_from_the_champion(
    one: Finished, tmp_path: Path
) -> None:
    """Nothing was promoted, so the champion is the base: from there the second round starts anew."""
    parents: dict[str, list[str]] = {}
    questions: dict[str, list[set[str]]] = {}
    for start in ("challenger", "champion"):
        plan = replace(one.plan, run=tmp_path / start, count=2, comparisons=(), start_from=start)  # type: ignore[arg-type]
        results = run_rounds(plan)
        assert [row["row"] for row in results["rows"]] == ["base", "round 1", "round 2"]
        folders = [plan.run / f"round-0{n}" for n in (1, 2)]
        records = [next(read_records(folder / "policy" / "record.json", Checkpoint)) for folder in folders]
        parents[start] = [record.parent for record in records]
        questions[start] = [{q.study for q in read_records(f / "questions.jsonl", Question)} for f in folders]
        if start == "challenger":
            assert records[1].parent == records[0].sha256
    assert parents["champion"][0] == parents["champion"][1] == parents["challenger"][0]
    first, second = questions["challenger"]
    assert not first & second
    assert len(first | second) == len(list(read_records(one.plan.data / "studies.jsonl", Study)))


@pytest.fixture(scope="module")
def chained(base: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A round of chains with two steps."""
    answer = base.params.answer.model_copy(update={"steps": ("What is seen?", "{question}")})
    pair = base.params.pair.model_copy(update={"gamma": 0.5, "per_question": 50})
    params = base.params.model_copy(update={"answer": answer, "pair": pair})
    run = tmp_path_factory.mktemp("chained") / "run"
    run_rounds(replace(base, run=run, params=params, comparisons=()))
    return run / "round-01"


def test_a_chain_of_two_steps_continues_every_candidate_and_the_best_from_everywhere(chained: Path) -> None:
    """n regions: n candidates, then one more each and n - 1 more of the best: 2 n - 1."""
    candidates = list(read_records(chained / "candidates.jsonl", Candidate))
    scores = {s.candidate: s.score for s in read_records(chained / "scores.jsonl", PanelScore)}
    assert {c.id for c in candidates} == set(scores)
    before = {s.candidate: s.score for s in read_records(chained / "step-0.scores.jsonl", PanelScore)}
    for _, group in groupby(candidates, key=lambda c: c.question):
        members = list(group)
        opening, following = ([c for c in members if c.step == step] for step in (0, 1))
        assert len(following) == 2 * len(opening) - 1
        continued = {c.id: [f for f in following if f.parent == c.id] for c in opening}
        best = max(opening, key=lambda c: before[c.id] or 0.0)
        assert len(continued[best.id]) == len(opening)
        assert {f.region for f in continued[best.id]} == {c.region for c in opening}
        assert all(len(f) == 1 and f[0].region == c.region for c in opening if c is not best for f in [continued[c.id]])
    for name, score in before.items():
        assert scores[name] == score  # judged the same again


def test_a_candidate_is_judged_on_the_question_of_its_step(base: Plan, chained: Path) -> None:
    """Candidates of the first step were judged on the data set's question, which they had never been asked.

    Asked again here by hand, of one judge: what it says of a first step's answer to "What is seen?" is in the file."""
    spec = base.params.judge.judges[0]
    judge = VisionLanguageModel(spec.path)
    questions = {q.id: q for q in read_records(chained / "questions.jsonl", Question)}
    boxes = {r.id: r.box for r in read_records(chained / "regions.jsonl", Region)}
    studies = StudyIndex(base.data)
    for name, count in (("step-0.", 0), ("", 1)):
        given = {
            j.candidate: j.score
            for j in read_records(chained / f"{name}judgements.jsonl", Judgement)
            if j.judge == judge.digest
        }
        some = list(islice(read_records(chained / f"{name}candidates.jsonl", Candidate), 12))
        assert max(c.step for c in some) == count
        said = {
            asked: judge.p_yes(
                [
                    judge_prompt(
                        studies[questions[c.question].study],
                        base.data,
                        judge.views,
                        question=asked(c),
                        answer=c.text,
                        box=boxes[c.region],
                    )
                    for c in some
                ]
            )
            for asked in (
                lambda c: "What is seen?" if c.step == 0 else questions[c.question].text,
                lambda c: questions[c.question].text,
            )
        }
        of_the_step, of_the_data_set = said.values()
        assert [given[c.id] for c in some] == pytest.approx(of_the_step, abs=2e-6)
        assert of_the_step != of_the_data_set


def test_pairs_of_the_first_step_weigh_what_follows(chained: Path) -> None:
    """s = s_cur + gamma * mean(s_next), gamma .5; of the last step s_cur alone."""
    candidates = {c.id: c for c in read_records(chained / "candidates.jsonl", Candidate)}
    scores = {s.candidate: s.score for s in read_records(chained / "scores.jsonl", PanelScore)}
    pairs = list(read_records(chained / "pairs.jsonl", PreferencePair))
    assert {pair.step for pair in pairs} == {0, 1}
    for pair in pairs:
        for side, given in ((pair.chosen, pair.chosen_score), (pair.rejected, pair.rejected_score)):
            following = [s for c, s in scores.items() if candidates[c].parent == side and s is not None]
            expected = (scores[side] or 0.0) + (0.5 * mean(following) if pair.step == 0 else 0.0)
            assert bool(following) is (pair.step == 0)
            assert given == pytest.approx(expected, abs=1e-9)
        assert candidates[pair.chosen].parent == candidates[pair.rejected].parent
