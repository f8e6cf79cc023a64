"""How well `clincot plan` predicts a round of the small model on this machine: counts and seconds.

    python -m benchmarks.plan_accuracy [--folder DIR] [--images N]

1. Render a small set and a larger one, of other patients.
2. Run a round on two halves of the small set and fit this machine's row to its seconds: what an operation, a pass
   through a layer, a request, a picture and a drawn number cost (non-negative least squares over all stages); and from
   one training with as many epochs and with three times as many, what training costs beside its start.
3. Plan a round on the larger set, with the habits of the small one, and run it. Print predicted and measured counts and
   seconds of every stage, and their ratios.

Models are loaded before a stage is timed and their features are forgotten, as in a pod of its own. Seconds are those of
the processor on one thread (OMP_NUM_THREADS=1), so that other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from clincot.config import FrozenConfig, Params, TrainConfig, find_recipe, resolve_path
from clincot.models.features import clear_feature_caches
from clincot.models.load import load_judge, load_policy
from clincot.models.vlm import VisionLanguageModel
from clincot.models.work_count import WorkCount
from clincot.planning.assumptions import Assumptions
from clincot.planning.cost_plan import CostPlan, PlanRequest, PlanRow, make_plan
from clincot.planning.gpu_table import Gpu
from clincot.planning.model_sizes import ModelSize
from clincot.planning.stage_times import TimeModel, count_forward_operations, count_vision_operations
from clincot.stages.runner import run_stage
from clincot.synthetic.build import build_synthetic_dataset
from clincot.text import markdown_table

POLICY = "shipped:policy"
SEPARATE = ("propose", "answer", "evaluate")  # stages that ask one model
# The last one is the evaluation's intervals, which are no model's work and in no plan: the same time in each round.
_TERMS = ("operations", "layers", "requests", "pictures", "draws", "intervals")
_COUNTS = ("requests", "prompt_tokens", "new_tokens", "encodes")
# no price and no memory limit: the row of this machine
_UNKNOWN = Gpu(name="this machine", bf16_tflops=1, bandwidth_gbs=1e6, memory_gb=16, source="fitted here")


@dataclass(frozen=True)
class MeasuredRound:
    """A finished round."""

    folder: Path
    seconds: dict[str, float]  # by stage; of judges together
    work: dict[str, WorkCount]  # by stage, of all models together
    training: tuple[float, float]  # (seconds, pairs and anchors)
    longer_s: float = 0.0  # seconds of the same training with three times the epochs; 0: not run


def run_round(data: Path, benchmark: Path, out: Path, params: Params, *, longer: bool = False) -> MeasuredRound:
    """Run the stages of one round on all of the data, and time them. longer: train again, with more epochs."""
    out.mkdir(parents=True)
    policy = {"policy": resolve_path(POLICY)}
    files = {"data": data, "questions": out / "questions.jsonl"}
    run_stage("prepare", params.prepare, {"data": data}, {"questions": files["questions"]})
    timer = StageTimer(params)

    def run(stage: str, config: FrozenConfig, inputs: Mapping[str, Path], *outputs: str) -> None:
        names = {"panel_report": "panel.report.json", "pair_report": "pairs.report.json", "report": "report.json"}
        paths = {output: out / names.get(output, f"{output}.jsonl") for output in outputs}
        timer.time_stage(stage, lambda: run_stage(stage, config, dict(inputs), paths))

    run("propose", params.get_stage_config("propose"), {**files, **policy}, "regions")
    files["regions"] = out / "regions.jsonl"
    run("answer", params.get_stage_config("answer"), {**files, **policy}, "candidates")
    files["candidates"] = out / "candidates.jsonl"
    run("judge", params.get_stage_config("judge"), files, "judgements", "scores", "panel_report")
    scored = {name: path for name, path in files.items() if name != "data"}
    scored |= {name: out / f"{name}.jsonl" for name in ("judgements", "scores")}
    pair = params.pair.model_copy(update={"min_agreement": 0.0, "min_gap": 0.05})  # a few films, but enough pairs
    run_stage("pair", pair, scored, {"pairs": out / "pairs.jsonl", "pair_report": out / "pairs.report.json"})
    evaluate = params.get_stage_config("evaluate").model_copy(update={"propose": params.propose})
    run("evaluate", evaluate, {"benchmark": benchmark, **policy}, "outcomes", "report")
    inputs = {**files, **policy, "pairs": out / "pairs.jsonl"}
    started = time.process_time()
    metrics = run_stage("train", params.train, inputs, {"checkpoint": out / "policy"})
    training = (time.process_time() - started, metrics["pairs"] + metrics.get("anchors", 0.0))
    if not longer:
        return MeasuredRound(out, timer.seconds, timer.work, training)
    started = time.process_time()
    run_stage("train", lengthen_training(params.train), inputs, {"checkpoint": out / "policy-longer"})
    return MeasuredRound(out, timer.seconds, timer.work, training, time.process_time() - started)


def lengthen_training(train: TrainConfig) -> TrainConfig:
    """The same training with three times the epochs."""
    return train.model_copy(update={"epochs": 3 * train.epochs})


class StageTimer:
    """Seconds of stages, and what all models computed in each."""

    def __init__(self, params: Params) -> None:
        self.models = [load_policy(resolve_path(POLICY))]
        for spec in params.judge.judges:
            judge = load_judge(spec)
            assert isinstance(judge, VisionLanguageModel)
            self.models.append(judge)
        self.seconds: dict[str, float] = {}
        self.work: dict[str, WorkCount] = {}

    def time_stage(self, stage: str, run: Callable[[], object]) -> None:
        """Run a stage once the models are loaded and without features."""
        clear_feature_caches()
        before = [replace(model.work) for model in self.models]
        started = time.process_time()
        run()
        self.seconds[stage] = time.process_time() - started
        work = WorkCount()
        for model, was in zip(self.models, before, strict=True):
            for name, value in vars(model.work).items():
                setattr(work, name, getattr(work, name) + value - getattr(was, name))
        self.work[stage] = work


def plan_round(data: Path, benchmark: Path, like: Path, params: Params, gpu: Gpu, assumed: Assumptions) -> CostPlan:
    """The plan of one round on all of the data."""
    request = PlanRequest(
        params=params,
        data=data,
        benchmark=benchmark,
        gpu=gpu,
        policy=POLICY,
        rounds=1,
        assumptions=assumed,
        like=like,
        sample=10_000,
    )
    return make_plan(request)


def list_terms(plan: CostPlan, stage: str) -> list[float]:
    """What the seconds of a stage are made of, by _TERMS, for all of its models together."""
    sizes = {model.name: model.size for model in (plan.policy, *plan.judges)}
    terms = np.zeros(len(_TERMS))
    for row in _find_rows(plan, stage):
        size = sizes[row.model]
        assert size is not None
        terms[:-1] += _list_row_terms(row, size)
    terms[-1] = stage == "evaluate"
    return list(terms)


def _list_row_terms(row: PlanRow, size: ModelSize) -> list[float]:
    calls = row.calls
    forward = count_forward_operations(size, calls.padded_tokens, calls.attention_pairs, predicted=calls.requests)
    decoding = 2 * calls.decode_tokens * (size.body + size.head)
    operations = forward + decoding + count_vision_operations(calls, size)
    draws = calls.sampled_tokens * (size.head // size.hidden)
    return [operations, calls.forwards * size.layers, calls.requests, calls.encodes, draws]


@dataclass(frozen=True)
class FittedMachine:
    """This machine as a row of the table."""

    gpu: Gpu
    assumptions: Assumptions
    intervals_s: float  # of an evaluation
    training_start_s: float
    training_share: float  # of the planned seconds of training on `gpu`


def fit_machine(plans: Sequence[CostPlan], measured: Sequence[MeasuredRound]) -> FittedMachine:
    """Fit the row to the seconds of short rounds."""
    rows, seconds = [], []
    for plan, real in zip(plans, measured, strict=True):
        for stage, took in real.seconds.items():
            rows.append(np.array(list_terms(plan, stage)) / took)  # so that every stage's ratio counts alike
            seconds.append(1.0)
    costs, _ = nnls(np.array(rows), np.array(seconds))
    operation_s, layer_s, request_s, picture_s, draw_s, intervals_s = costs
    gpu = _UNKNOWN.model_copy(update={"bf16_tflops": 1 / max(operation_s, 1e-15) / 1e12})
    assumed = Assumptions(
        prefill_utilization=1,
        vision_utilization=1,
        decode_bandwidth=1,
        train_utilization=1,
        layer_s=float(layer_s),
        request_s=float(request_s),
        picture_s=float(picture_s),
        draw_s=float(draw_s),
    )
    # training has a rate of its own, and starts with loading the policy
    train = plans[0].request.params.train
    planned, planned_longer = (
        time_training(plans[0], gpu, assumed, config) for config in (train, lengthen_training(train))
    )
    took = measured[0].training[0]
    share = (measured[0].longer_s - took) / (planned_longer - planned)
    return FittedMachine(gpu, assumed, float(intervals_s), took - share * planned, share)


def time_training(plan: CostPlan, gpu: Gpu, assumed: Assumptions, train: TrainConfig) -> float:
    """Seconds of the round's training by the plan's own model of time."""
    size, count = plan.policy.size, plan.counts.training[0]
    assert size is not None
    return TimeModel(gpu, assumed).time_training(count, size, train).seconds


def _find_rows(plan: CostPlan, stage: str) -> list[PlanRow]:
    return [row for row in plan.rows if row.stage == stage and row.calls.requests]


def compare_rounds(plan: CostPlan, real: MeasuredRound, machine: FittedMachine) -> list[dict[str, float | str]]:
    """For each stage the predicted and the measured counts and seconds."""
    results: list[dict[str, float | str]] = []
    for stage, took in real.seconds.items():
        rows = _find_rows(plan, stage)
        predicted = sum(row.time.seconds for row in rows if row.time is not None)
        predicted += machine.intervals_s if stage == "evaluate" else 0.0
        entry: dict[str, float | str] = {"stage": stage, "seconds": took, "predicted_seconds": predicted}
        for name in _COUNTS:
            entry[name] = getattr(real.work[stage], name)
            entry[f"predicted_{name}"] = sum(getattr(row.calls, name) for row in rows)
        results.append(entry)
    trained = plan.counts.training[0].rows
    planned = time_training(plan, machine.gpu, machine.assumptions, plan.request.params.train)
    results.append(
        {
            "stage": "train",
            "seconds": real.training[0],
            "predicted_seconds": machine.training_start_s + machine.training_share * planned,
            "requests": real.training[1],
            "predicted_requests": trained,
        }
    )
    return results


def render_results(results: Sequence[Mapping[str, float | str]]) -> str:
    """A table of measured values and, in brackets, how far off the prediction is."""
    head = ("stage", "seconds", *(name.replace("_", " ") for name in _COUNTS))
    rows = []
    for entry in results:
        cells = [str(entry["stage"])]
        cells += [_format_ratio(entry, name) for name in ("seconds", *_COUNTS)]
        rows.append(tuple(cells))
    return markdown_table(head, rows, layout="aligned")


def _format_ratio(entry: Mapping[str, float | str], name: str) -> str:
    measured, predicted = entry.get(name), entry.get(f"predicted_{name}")
    if not measured or predicted is None:
        return ""
    number = f"{float(measured):,.1f}" if name == "seconds" else f"{float(measured):,.0f}"
    return f"{number} ({float(predicted) / float(measured) - 1:+.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--images", type=int, default=48, help="images of the larger set, of 3 questions each")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = args.folder or Path(name)
        results = measure_accuracy(folder, args.images)
    print(render_results(results))
    inference = [entry for entry in results if entry["stage"] != "train"]
    took, predicted = (sum(float(entry[key]) for entry in inference) for key in ("seconds", "predicted_seconds"))
    print(f"\nall stages but train: {took:.1f} s, predicted {predicted:.1f} s ({predicted / took - 1:+.1%})")


def measure_accuracy(folder: Path, images: int) -> list[dict[str, float | str]]:
    """Render, calibrate, plan and run; the results are also in accuracy.json."""
    sets = (
        ("small", range(300, 304), images // 2, 1),
        ("small-test", range(400, 402), 6, 2),
        ("large", range(310, 318), images, 3),
        ("large-test", range(410, 414), 12, 4),
    )
    for name, warps, count, seed in sets:
        build_synthetic_dataset(
            folder / name, warp_seeds=warps, images=count, questions_per_image=3, seed=seed, split=name
        )
    params = find_recipe("small-model").params
    params = params.model_copy(update={"prepare": params.prepare.model_copy(update={"rounds": 1})})
    warm = folder / "warm"  # the first use of every function is slower
    run_round(folder / "small-test", folder / "small-test", warm, params)
    short = [
        run_round(folder / "small", folder / "small-test", folder / "short", params, longer=True),
        run_round(folder / "small-test", folder / "small", folder / "shorter", params),
    ]
    data = [(folder / "small", folder / "small-test"), (folder / "small-test", folder / "small")]
    plans = [
        plan_round(*sets, real.folder, params, _UNKNOWN, Assumptions()) for sets, real in zip(data, short, strict=True)
    ]
    machine = fit_machine(plans, short)
    gpu, assumed = machine.gpu, machine.assumptions
    print(
        f"this machine: {gpu.bf16_tflops * 1e3:.1f} GFLOP/s; {assumed.layer_s * 1e3:.2f} ms a layer and pass, "
        f"{assumed.request_s * 1e3:.2f} ms a request, {assumed.picture_s * 1e3:.2f} ms a picture, "
        f"{assumed.draw_s * 1e9:.0f} ns a drawn number, {machine.intervals_s:.1f} s an evaluation's intervals; "
        f"training {machine.training_start_s:.1f} s and {machine.training_share:.2f} times its operations\n"
    )
    plan = plan_round(folder / "large", folder / "large-test", short[0].folder, params, gpu, assumed)
    real = run_round(folder / "large", folder / "large-test", folder / "long", params)
    results = compare_rounds(plan, real, machine)
    (folder / "accuracy.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
