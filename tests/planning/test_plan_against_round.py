"""A plan against a real round of the small model: requests, tokens and pictures as the models have counted them.

The round is run by the stages themselves on a few rendered films, and `WorkCount` of every model says what it has
computed. What no plan can know, how long answers are and which written regions are readable, the plan takes from the
round (--like). It must then be within 2 %. For the benchmark that holds for requests and prompts; its answers are drawn
from those of the round, on other films, so what is generated and encoded is within 5 %.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import pytest

from clincot.config import FrozenConfig, Params, find_recipe, resolve_path
from clincot.models.features import clear_feature_caches
from clincot.models.load import load_judge, load_policy, unload_models
from clincot.models.vlm import VisionLanguageModel
from clincot.models.work_count import WorkCount
from clincot.planning.cost_plan import CostPlan, PlanRequest, make_plan
from clincot.planning.gpu_table import DEFAULT_GPU, read_gpus
from clincot.planning.prompt_counters import EncodedPrompts
from clincot.stages.runner import run_stage
from clincot.synthetic.build import build_synthetic_dataset
from clincot.training.rows import PairFiles, read_training_rows

pytestmark = pytest.mark.slow
POLICY = "shipped:policy"
ROUNDS = 2


@dataclass(frozen=True)
class RealRound:
    """A finished round: its folder, and what the models computed in each stage."""

    folder: Path
    work: dict[tuple[str, str], WorkCount]  # by stage and model


@dataclass(frozen=True)
class Rounds:
    """Two rounds on different films of one set."""

    folder: Path
    params: Params
    first: RealRound
    second: RealRound

    def plan_first(self, like: Path | None) -> CostPlan:
        request = PlanRequest(
            params=self.params,
            data=self.folder / "train",
            benchmark=self.folder / "test",
            gpu=read_gpus()[DEFAULT_GPU],
            policy=POLICY,
            rounds=ROUNDS,
            like=like,
            sample=10_000,  # all of the few questions
        )
        return make_plan(request)


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rounds]:
    folder = tmp_path_factory.mktemp("plan")
    for name, warps, images, seed in (("train", range(300, 304), 24, 1), ("test", range(400, 402), 4, 2)):
        build_synthetic_dataset(
            folder / name, warp_seeds=warps, images=images, questions_per_image=3, seed=seed, split=name
        )
    params = find_recipe("small-model").params
    params = params.model_copy(update={"prepare": params.prepare.model_copy(update={"rounds": ROUNDS})})
    first, second = (run_round(folder, params, number) for number in range(ROUNDS))
    yield Rounds(folder, params, first, second)
    unload_models()


def run_round(folder: Path, params: Params, number: int) -> RealRound:
    """Propose, answer, judge, pair and evaluate; the first round's benchmark alone, which is the same for both."""
    out = folder / f"round-{number + 1:02d}"
    out.mkdir()
    files = {"data": folder / "train", "questions": out / "questions.jsonl"}
    prepare = params.prepare.model_copy(update={"round": number})
    run_stage("prepare", prepare, {"data": files["data"]}, {"questions": files["questions"]})
    policy = {"policy": resolve_path(POLICY)}
    counter = StageCounter(params)

    def run(stage: str, config: FrozenConfig, inputs: dict[str, Path], *outputs: str) -> None:
        names = {"panel_report": "panel.report.json", "pair_report": "pairs.report.json", "report": "report.json"}
        paths = {output: out / names.get(output, f"{output}.jsonl") for output in outputs}
        counter.count(stage, lambda: run_stage(stage, config, inputs, paths))

    run("propose", params.get_stage_config("propose"), {**files, **policy}, "regions")
    files["regions"] = out / "regions.jsonl"
    run("answer", params.get_stage_config("answer"), {**files, **policy}, "candidates")
    files["candidates"] = out / "candidates.jsonl"
    run("judge", params.get_stage_config("judge"), files, "judgements", "scores", "panel_report")
    scored = {name: path for name, path in files.items() if name != "data"}
    scored |= {name: out / f"{name}.jsonl" for name in ("judgements", "scores")}
    pair = params.pair.model_copy(update={"min_gap": 0.05, "min_agreement": 0.0})  # few films, but some pairs
    run_stage("pair", pair, scored, {"pairs": out / "pairs.jsonl", "pair_report": out / "pairs.report.json"})
    if number == 0:
        evaluate = params.get_stage_config("evaluate").model_copy(update={"propose": params.propose})
        run("evaluate", evaluate, {"benchmark": folder / "test", **policy}, "outcomes", "report")
    return RealRound(out, counter.work)


class StageCounter:
    """Differences of the models' counts before and after a stage, which starts without features as a pod does."""

    def __init__(self, params: Params) -> None:
        models = {"policy": load_policy(resolve_path(POLICY))}
        for spec in params.judge.judges:
            judge = load_judge(spec)
            assert isinstance(judge, VisionLanguageModel)
            models[spec.name] = judge
        self.models = models
        self.work: dict[tuple[str, str], WorkCount] = {}

    def count(self, stage: str, run: Callable[[], object]) -> None:
        clear_feature_caches()
        before = {name: replace(model.work) for name, model in self.models.items()}
        run()
        for name, model in self.models.items():
            after, was = model.work, before[name]
            if after.requests > was.requests:
                done = {name: value - getattr(was, name) for name, value in vars(after).items()}
                self.work[stage, name] = WorkCount(**done)


STAGES = [
    ("propose", "policy"),
    ("answer", "policy"),
    ("judge", "judge-a"),
    ("judge", "judge-b"),
    ("evaluate", "policy"),
]


def compare(plan: CostPlan, real: RealRound) -> dict[str, float]:
    """{stage, model and what is counted: planned over counted}."""
    ratios = {}
    for stage, model in STAGES:
        row = next(row for row in plan.rows if (row.stage, row.model) == (stage, model))
        for name, counted in vars(real.work[stage, model]).items():
            if counted:
                ratios[f"{stage} {model} {name}"] = getattr(row.calls, name) / counted
    return ratios


def test_the_plan_of_a_round_is_what_its_models_count(rounds: Rounds) -> None:
    ratios = compare(rounds.plan_first(rounds.first.folder), rounds.first)
    assert len(ratios) == 3 * 6 + 2 * 4  # judges generate nothing
    for name in ("new_tokens", "encodes", "decode_tokens"):
        assert ratios.pop(f"evaluate policy {name}") == pytest.approx(1.0, abs=0.05)
    assert ratios == pytest.approx(dict.fromkeys(ratios, 1.0), abs=0.02)


def test_another_round_plans_this_one(rounds: Rounds) -> None:
    """Some 35 questions give the habits of as many others: requests and prompts within 5 %, the rest within 10 %."""
    ratios = compare(rounds.plan_first(rounds.second.folder), rounds.first)
    for name, ratio in ratios.items():
        near = 0.05 if name.endswith(("requests", "prompt_tokens")) else 0.1
        assert ratio == pytest.approx(1.0, abs=near), name


def test_without_an_earlier_round_the_plan_is_an_upper_bound(rounds: Rounds) -> None:
    """All written regions are kept and all answers are as long as they may be; what is asked before is exact."""
    ratios = compare(rounds.plan_first(None), rounds.first)
    assert all(ratio > 0.98 for ratio in ratios.values())
    assert ratios["propose policy requests"] == ratios["propose policy prompt_tokens"] == 1.0
    assert ratios["answer policy new_tokens"] > 2


def test_training_reads_the_rows_that_the_trainer_packs(rounds: Rounds) -> None:
    """The trainer's own rows, with both sides of a pair in one sequence after their common beginning."""
    out, config = rounds.first.folder, rounds.params.train
    files = PairFiles(*(out / f"{name}.jsonl" for name in ("pairs", "candidates", "regions", "questions")))
    counter = EncodedPrompts(resolve_path(POLICY))
    rows = list(read_training_rows(files, rounds.folder / "train", counter.views))
    sequences = chain.from_iterable(counter.count_row([row.chosen, row.rejected], packed=True) for row in rows)
    tokens = sum(sequence.tokens for sequence in sequences)
    no_anchors = rounds.params.model_copy(update={"train": config.model_copy(update={"anchors": 0})})
    planned = replace(rounds, params=no_anchors).plan_first(out).counts.training[0]
    assert planned.rows == pytest.approx(len(rows))
    assert planned.epoch.prompt_tokens / planned.rows == pytest.approx(tokens / len(rows), rel=0.05)
