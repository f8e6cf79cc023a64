"""Whole rounds on the tiny models: the results table, resuming after damage, and chains of two steps."""

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
from clincot.errors import InvalidInput
from clincot.jsonl import InvalidRecord, read_records
from clincot.models.checkpoint import UnsupportedCheckpoint
from clincot.models.vlm import VisionLanguageModel
from clincot.prompts import judge_prompt
from clincot.records import Candidate, Checkpoint, Judgement, PanelScore, PreferencePair, Question, Region, Study
from clincot.rounds import Plan, render_decisions, render_results_table, run_rounds
from tests.support import tiny

pytestmark = pytest.mark.slow


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
    """A finished run of one round. Tests must not change it."""
    return Finished(base, run_rounds(base))


def files(run: Path) -> dict[str, bytes]:
    """Contents of a run's files, with the path of the run folder replaced by RUN."""
    return {
        str(p.relative_to(run)): p.read_bytes().replace(str(run).encode(), b"RUN")
        for p in sorted(run.rglob("*"))
        if p.is_file()
    }


def test_results_have_a_row_per_policy_and_a_blind_one(one: Finished) -> None:
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


def test_the_champion_stays_if_the_gate_keeps_it(one: Finished) -> None:
    champion = json.loads((one.plan.run / "champion.json").read_text())
    assert one.results["decisions"][0]["verdict"] != "promote"
    assert champion["round"] == 0
    assert champion["policy"] == str(one.plan.policy)
    assert champion["promotions"] == []


def test_a_round_that_keeps_the_champion_says_why(one: Finished) -> None:
    """The line names the verdict, and every check that was not passed."""
    (decision,) = one.results["decisions"]
    failed = [check["reason"] for check in decision["checks"] if not check["passed"]]
    assert decision["verdict"] != "promote"
    why = " ".join(failed or decision["reasons"][:1])
    assert why
    assert render_decisions(one.results) == f"round 1: {decision['verdict']}: {why}"
    promoted = {name: value for name, value in decision.items() if name != "id"} | {"verdict": "promote"}
    assert render_decisions({"decisions": [promoted]}) == "round 1: promote"


def test_the_table_has_every_row_and_dashes_for_missing_values(one: Finished) -> None:
    lines = render_results_table(one.results).splitlines()
    assert len(lines) == 2 + 4 + 1
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| base | ")
    assert " – " in lines[2]  # the random arm was not evaluated


def test_the_table_shows_the_recipes_protocol_first(one: Finished) -> None:
    """With `parsed` the columns of the arms are by that protocol; exact match is the last column."""
    results = json.loads(json.dumps(one.results)) | {"protocol": "parsed"}
    head, _, base, *_ = render_results_table(results).splitlines()
    titles = [cell.strip() for cell in head.strip("|").split("|")]
    assert titles[1] == "accuracy (parsed): own region"
    assert titles[-1] == "accuracy (strict)"
    cells = [cell.strip() for cell in base.strip("|").split("|")]
    own = results["rows"][0]["arms"]["written"]
    parsed = own["parsed_accuracy"]["value"]  # none of so few answers may be one that the protocol can read
    assert cells[1].startswith("–" if parsed is None else f"{parsed:.3f}")
    assert cells[-1].startswith(f"{own['accuracy']['value']:.3f}")


@pytest.mark.parametrize(
    "lost", ["round-01/candidates.jsonl", "round-01/policy", "round-01/sft/outcomes.jsonl", "results.json"]
)
def test_a_run_that_lost_a_file_ends_in_the_same_bytes(lost: str, one: Finished, tmp_path: Path) -> None:
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
def test_a_run_folder_rejects_other_inputs(changed: str, one: Finished, tmp_path: Path) -> None:
    other: dict[str, Any] = {"comparisons": ("sft",), "start_from": "champion"}
    if changed == "policy":
        shutil.copytree(one.plan.policy, tmp_path / "other")
    else:
        tiny.write_set(tmp_path / "other")
    before = files(one.plan.run)
    change = f"different {changed}" if changed in ("data", "comparisons") else f"a different {changed}"
    with pytest.raises(InvalidRecord, match=f"this run was started with {change}; choose another --run folder"):
        run_rounds(replace(one.plan, **{changed: other.get(changed, tmp_path / "other")}))
    assert files(one.plan.run) == before


def test_a_decision_arm_that_is_not_evaluated_is_rejected(base: Plan, tmp_path: Path) -> None:
    """Before the first round: without the check, the decision is blocked after the training for lack of outcomes."""
    decide = base.params.decide.model_copy(update={"arm": "whole"})
    plan = replace(base, run=tmp_path / "run", params=base.params.model_copy(update={"decide": decide}))
    with pytest.raises(ValueError, match=r"decide\.arm is 'whole'.*evaluate\.arms"):
        run_rounds(plan)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("wrong", ["mistyped", "no checkpoint", "no weights"])
def test_a_wrong_judge_path_starts_no_run(wrong: str, base: Plan, tmp_path: Path) -> None:
    """Nothing is written: with the wrong path in run.json, the corrected one would be rejected as another judge."""
    judge = tmp_path / "nowhere"
    if wrong == "no checkpoint":
        judge.mkdir()
    if wrong == "no weights":
        shutil.copytree(base.params.judge.judges[0].path, judge, ignore=shutil.ignore_patterns("*.safetensors"))
    specs = (base.params.judge.judges[0].model_copy(update={"path": str(judge)}), *base.params.judge.judges[1:])
    params = base.params.model_copy(update={"judge": base.params.judge.model_copy(update={"judges": specs})})
    expected = "does not exist, and as the name of a checkpoint" if wrong == "mistyped" else "holds no checkpoint"
    with pytest.raises(UnsupportedCheckpoint, match=f"judge 'a': {judge} {expected}"):
        run_rounds(replace(base, run=tmp_path / "run", params=params))
    assert not (tmp_path / "run").exists()


def test_a_wrong_calibration_path_starts_no_run(base: Plan, tmp_path: Path) -> None:
    judge = base.params.judge.model_copy(update={"calibration_file": str(tmp_path / "nowhere.jsonl")})
    params = base.params.model_copy(update={"judge": judge})
    with pytest.raises(InvalidRecord, match=r"judge\.calibration_file: .*nowhere\.jsonl does not exist"):
        run_rounds(replace(base, run=tmp_path / "run", params=params))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("missing", ["data", "benchmark", "policy", "blind_from"])
def test_a_wrong_path_starts_no_run(missing: str, base: Plan, tmp_path: Path) -> None:
    """Nothing is written: with the wrong path in run.json, the corrected one would be rejected as another run."""
    with pytest.raises(InvalidRecord, match=rf"{missing}: .*nowhere does not exist"):
        run_rounds(replace(base, run=tmp_path / "run", **{missing: tmp_path / "nowhere"}))  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("wrong", ["data", "benchmark", "blind_from", "calibration"])
def test_a_plan_with_a_folder_that_is_no_data_set_starts_no_run(wrong: str, base: Plan, tmp_path: Path) -> None:
    name = "calibrated_on" if wrong == "calibration" else wrong
    for folder, message in (("nowhere", "does not exist"), ("empty", "is not a data set; expected a folder with")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(InvalidRecord, match=rf"{name}: .*{folder} {message}"):
            run_rounds(replace(base, run=tmp_path / "run", **{wrong: tmp_path / folder}))  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_a_plan_with_fewer_judges_than_the_quorum_starts_no_run(base: Plan, tmp_path: Path) -> None:
    judge = base.params.judge.model_copy(update={"judges": base.params.judge.judges[:1], "quorum": 2})
    plan = replace(base, run=tmp_path / "run", params=base.params.model_copy(update={"judge": judge}))
    with pytest.raises(InvalidInput, match=r"judge\.quorum is 2, but judge\.judges has 1 judge; name more judges"):
        run_rounds(plan)
    assert not (tmp_path / "run").exists()


def test_round_two_starts_from_the_challenger_or_the_champion(one: Finished, tmp_path: Path) -> None:
    """Nothing was promoted, so the champion is still the base policy."""
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


def test_a_second_step_continues_every_candidate(chained: Path) -> None:
    """And the best one from every region. n regions: n candidates, then one for each and n - 1 for the best: 2n - 1."""
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
        for candidate in opening:
            if candidate is not best:
                assert [f.region for f in continued[candidate.id]] == [candidate.region]
    for name, score in before.items():
        assert scores[name] == score  # the same as when they were judged first


def test_a_candidate_is_judged_on_the_question_of_its_step(base: Plan, chained: Path) -> None:
    """Not on the data set's question, which the first step of this chain does not ask.

    One judge is asked again directly; its scores of the first step's answers to "What is seen?" are those in the file.
    """
    spec = base.params.judge.judges[0]
    judge = VisionLanguageModel(spec.path)
    questions = {q.id: q for q in read_records(chained / "questions.jsonl", Question)}
    boxes = {r.id: r.box for r in read_records(chained / "regions.jsonl", Region)}
    studies = StudyIndex(base.data)
    for name, count in (("step-0.", 0), ("", 1)):
        recorded = {
            j.candidate: j.score
            for j in read_records(chained / f"{name}judgements.jsonl", Judgement)
            if j.judge == judge.digest
        }
        some = list(islice(read_records(chained / f"{name}candidates.jsonl", Candidate), 12))
        assert max(c.step for c in some) == count
        step_prompts, data_set_prompts = [], []
        for candidate in some:
            question = questions[candidate.question]
            for prompts, text in (
                (step_prompts, "What is seen?" if candidate.step == 0 else question.text),
                (data_set_prompts, question.text),
            ):
                prompts.append(
                    judge_prompt(
                        studies[question.study],
                        base.data,
                        judge.views,
                        question=text,
                        answer=candidate.text,
                        box=boxes[candidate.region],
                    )
                )
        of_the_step, of_the_data_set = judge.p_yes(step_prompts), judge.p_yes(data_set_prompts)
        assert [recorded[c.id] for c in some] == pytest.approx(of_the_step, abs=2e-6)
        assert of_the_step != of_the_data_set


def test_scores_of_the_first_step_include_the_next(chained: Path) -> None:
    """s = s_cur + gamma * mean(s_next) with gamma = 0.5; in the last step only s_cur."""
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
