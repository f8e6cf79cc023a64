"""The loop of rounds: every stage from prepare to decide, then the next round with the new policy.

A run folder holds everything that a run made. An interrupted run resumes, because run_stage skips every stage whose
outputs are complete and whose inputs have not changed:

    run.json  params.yaml            the run's inputs and configuration
    base/                            outcomes and report of the base policy, which is the round-0 champion
    round-01/                        questions, regions, candidates, judgements, scores, pairs, policy/,
                                     version.json, origin.json (whose round the pairs are, for their version),
                                     outcomes, report.json, decision.json, decision.md,
                                     evidence.jsonl (the answers that were compared)
    round-01/sft/  round-01/dpo/     comparisons trained on the same pairs: SFT on chosen, and plain DPO
    champion.json                    the current champion and all promotions
    ledger/                          what the decisions spent of the lifetime budget, and the questions they used
    results.json                     the results table
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import yaml

from clincot.clients.trackers import check_trackers
from clincot.config import Params, TrainConfig, resolve_path
from clincot.datasets.folder import STUDIES
from clincot.datasets.reports import REPORTS_FILE
from clincot.errors import InvalidInput
from clincot.evaluation.answer_protocols import choose_headline
from clincot.evaluation.benchmark import Benchmark
from clincot.evaluation.benchmark_report import METRIC_HEADINGS, grade_arm
from clincot.evaluation.read_benchmark import read_benchmark, select_report_metrics
from clincot.jsonl import InvalidRecord, atomic_write, read_records, write_json
from clincot.preferences.versions.tags import DataOrigin
from clincot.processes import BackgroundWorker, background_worker, submit_call
from clincot.records import BenchmarkReport, Decision, Interval, Outcome
from clincot.reporting.results_table import ResultsRow, ResultsTable, read_interval, render_table
from clincot.reporting.tracking import TrackedFiles, describe_tracked_run, track_step
from clincot.runs.layout import (
    BENCHMARK_REPORT_FILE,
    DECISION_FILE,
    ORIGIN_FILE,
    PAIRS_REPORT_FILE,
    PANEL_REPORT_FILE,
    TRAIN_LOG_FILE,
    VERSION_FILE,
)
from clincot.stages.base import Metrics
from clincot.stages.runner import run_stage
from clincot.text import format_count, format_interval


@dataclass(frozen=True)
class Plan:
    """The inputs and the configuration of a run."""

    run: Path
    data: Path  # the data set whose questions the rounds use; its answer key is never opened
    benchmark: Path  # held-out questions with their answer key
    policy: Path  # the base policy
    params: Params
    count: int  # number of rounds
    start_from: Literal["challenger", "champion"] = "challenger"  # [ClinCoT]: f^{i+1} is the challenger
    comparisons: tuple[Literal["sft", "dpo"], ...] = ()
    background_comparisons: bool = False  # train and evaluate the comparisons in a second process
    blind_from: Path | None = None  # data set whose answers the blind baseline knows; None: the benchmark itself
    calibration: Path | None = None  # labelled data set of the judges' calibration, checked for leakage


def run_rounds(plan: Plan) -> dict[str, Any]:
    """Run the plan, or resume it, and return the content of results.json.

    Raises InvalidInput for a plan that cannot work or a run folder that was started with other inputs.
    """
    _check_plan(plan)
    plan.run.mkdir(parents=True, exist_ok=True)
    start_run(plan)
    base = plan.run / "base"
    champion: dict[str, Any] = {
        "round": 0,
        "policy": str(plan.policy),
        "outcomes": str(base / "outcomes.jsonl"),
    }
    promotions: list[dict[str, Any]] = []
    challenger = plan.policy
    comparisons = dict.fromkeys(plan.comparisons, plan.policy)
    with background_worker(plan.run / "comparisons.log") if plan.background_comparisons else nullcontext() as worker:
        evaluated = submit_call(worker, _evaluate_base, plan, base)
        for number in range(1, plan.count + 1):
            folder = plan.run / f"round-{number:02d}"
            start = challenger if plan.start_from == "challenger" else Path(champion["policy"])
            preferences = _make_preferences(plan, number, folder, start)
            challenger = folder / "policy"
            if worker is not None:  # they take as long as the round: the second process has them from its pairs on
                comparisons = _train_comparisons(plan, folder, preferences, comparisons, worker)
            _train_and_evaluate(plan, plan.params.train, preferences, start, folder, challenger)
            if worker is None:
                comparisons = _train_comparisons(plan, folder, preferences, comparisons, None)
            evaluated.result()  # wait for what the first decision compares with
            decision = _decide_promotion(plan, number, folder, Path(champion["outcomes"]))
            _track_round(plan, number, folder)
            if decision.verdict == "promote":
                champion = {"round": number, "policy": str(challenger), "outcomes": str(folder / "outcomes.jsonl")}
                promotions.append({"round": number, "decision": decision.id})
            write_json(plan.run / "champion.json", {**champion, "promotions": promotions})
    results = collect_results(plan)
    write_json(plan.run / "results.json", results)
    return results


def _make_preferences(plan: Plan, number: int, folder: Path, start: Path) -> dict[str, Path]:
    """Make a round's preference data with the policy `start`; return it as {input of the train stage: path}."""
    folder.mkdir(exist_ok=True)
    params, files = plan.params, {"data": plan.data, "questions": folder / "questions.jsonl"}
    prepare = params.prepare.model_copy(update={"round": number - 1, "rounds": max(params.prepare.rounds, plan.count)})
    run_stage("prepare", prepare, {"data": plan.data}, {"questions": files["questions"]})
    questions = dict(files)
    files["regions"] = folder / "regions.jsonl"
    run_stage(
        "propose", params.get_stage_config("propose"), {**questions, "policy": start}, {"regions": files["regions"]}
    )
    steps: dict[str, Path] = {}  # judging and training need the questions of a chain's steps
    if len(params.answer.steps) > 1:
        steps["steps"] = folder / "steps.json"
        write_json(steps["steps"], list(params.answer.steps))
    files["candidates"], scores = _answer_and_judge(plan, folder, start, files, steps)
    files["pairs"] = folder / "pairs.jsonl"
    run_stage(
        "pair",
        params.pair,
        {
            "questions": files["questions"],
            "regions": files["regions"],
            "candidates": files["candidates"],
            "judgements": folder / "judgements.jsonl",
            "scores": scores,
        },
        {"pairs": files["pairs"], "pair_report": folder / PAIRS_REPORT_FILE},
    )
    files |= steps
    files["version"] = _version_preferences(plan, number, folder, files, scores)
    return files


def _version_preferences(plan: Plan, number: int, folder: Path, files: dict[str, Path], scores: Path) -> Path:
    """Commit the round's preference data as a version; return the path of its record."""
    config, version = plan.params.version, folder / VERSION_FILE
    if config.round:  # the configured number is that of the run's first round
        config = config.model_copy(update={"round": config.round + number - 1})
    origin = DataOrigin(line=plan.params.publish.name, round=number, run=plan.run.name)
    write_json(folder / ORIGIN_FILE, origin.model_dump(mode="json"))
    versioned = {name: path for name, path in files.items() if name not in {"data", "policy"}}
    run_stage(
        "version",
        config,
        {
            **versioned,
            "scores": scores,
            "judgements": folder / "judgements.jsonl",
            "panel_report": folder / PANEL_REPORT_FILE,
            "pair_report": folder / PAIRS_REPORT_FILE,
            "origin": folder / ORIGIN_FILE,
        },
        {"version": version},
    )
    return version


def _train_comparisons(
    plan: Plan,
    folder: Path,
    preferences: dict[str, Path],
    policies: dict[Any, Path],
    worker: BackgroundWorker | None,
) -> dict[Any, Path]:
    """Train and evaluate the comparisons on the round's pairs; return {name: path of its new policy}.

    policies: where each comparison starts. With a worker, the new policies appear later; the next round's training is
    queued behind them.
    """
    trained: dict[Any, Path] = {}
    for name, policy in policies.items():
        trained[name] = folder / name / "policy"
        config = configure_comparison(plan.params.train, name)
        arguments = (plan, config, preferences, policy, folder / name, trained[name])
        submit_call(worker, _train_and_evaluate, *arguments)
    return trained


def configure_comparison(train: TrainConfig, name: str) -> TrainConfig:
    """How a comparison ("sft" or "dpo") is trained on the same pairs."""
    if name == "sft":
        return train.model_copy(update={"loss": "sft"})
    return train.model_copy(update={"loss": "margin_dpo", "margin_lambda": 0.0, "recipe": "ours"})


def _answer_and_judge(
    plan: Plan, folder: Path, policy: Path, files: dict[str, Path], steps: dict[str, Path]
) -> tuple[Path, Path]:
    """Answer and judge each step of the chain in turn; return the candidates and scores of all steps."""
    before: dict[str, Path] = {}
    for step in range(len(plan.params.answer.steps)):
        last = step == len(plan.params.answer.steps) - 1
        stem = "" if last else f"step-{step}."
        candidates, scores = folder / f"{stem}candidates.jsonl", folder / f"{stem}scores.jsonl"
        answer = plan.params.get_stage_config("answer")
        run_stage("answer", answer, {**files, "policy": policy, **before}, {"candidates": candidates})
        run_stage(
            "judge",
            plan.params.get_stage_config("judge"),
            {**files, **steps, "candidates": candidates},
            {
                "judgements": folder / f"{stem}judgements.jsonl",
                "scores": scores,
                "panel_report": folder / f"{stem}panel.report.json",
            },
        )
        before = {"candidates_before": candidates, "scores_before": scores}
    return candidates, scores


def _train_and_evaluate(
    plan: Plan, config: TrainConfig, preferences: dict[str, Path], start: Path, folder: Path, checkpoint: Path
) -> None:
    folder.mkdir(exist_ok=True)
    run_stage("train", config, {**preferences, "policy": start}, {"checkpoint": checkpoint})
    _evaluate_policy(plan, checkpoint, folder)


def _evaluate_base(plan: Plan, folder: Path) -> None:
    _evaluate_policy(plan, plan.policy, folder)
    _track_round(plan, 0, folder)


def _evaluate_policy(plan: Plan, policy: Path, folder: Path) -> Metrics:
    folder.mkdir(exist_ok=True)
    config = plan.params.get_stage_config("evaluate").model_copy(update={"propose": plan.params.propose})
    outputs = {"outcomes": folder / "outcomes.jsonl", "report": folder / "report.json"}
    inputs = {"benchmark": plan.benchmark, "policy": policy}
    if (training := _find_training_reports(plan)) is not None:
        inputs["train_reports"] = training
    return run_stage("evaluate", config, inputs, outputs)


def _track_round(plan: Plan, number: int, folder: Path) -> None:
    """Log the metrics of a round, or of the base policy as round 0, to the trackers of the plan."""
    config = plan.params.tracking
    if not config.to:
        return
    files = TrackedFiles(folder / BENCHMARK_REPORT_FILE)
    if number:
        files = TrackedFiles(
            folder / BENCHMARK_REPORT_FILE,
            train_log=folder / "policy" / TRAIN_LOG_FILE,
            decision=folder / DECISION_FILE,
            panel_report=folder / PANEL_REPORT_FILE,
            pair_report=folder / PAIRS_REPORT_FILE,
        )
    run = describe_tracked_run(plan.params, name=plan.run.name, folder=plan.run / "tracking")
    track_step(config, run, files, step=number, marker=folder / "tracked.json")


def _find_training_reports(plan: Plan) -> Path | None:
    """Return the data set's reports if the benchmark asks for reports; R2Gen's protocol needs their vocabulary."""
    from clincot.datasets.folder import load_questions

    if all(question.kind != "report" for question in load_questions(plan.benchmark)):
        return None
    return plan.data / REPORTS_FILE if (plan.data / REPORTS_FILE).is_file() else None


def _decide_promotion(plan: Plan, number: int, folder: Path, champion: Path) -> Decision:
    """Run the promotion gate with the run's ledger, which holds the error budget that earlier rounds have spent."""
    ledger, before = plan.run / "ledger", plan.run / f"round-{number - 1:02d}" / PANEL_REPORT_FILE
    ledger.mkdir(exist_ok=True)
    inputs = {
        "benchmark": plan.benchmark,
        "champion": champion,
        "challenger": folder / "outcomes.jsonl",
        "base": plan.run / "base" / "outcomes.jsonl",
        "data": plan.data,
        "panel_report": folder / PANEL_REPORT_FILE,
        "pair_report": folder / "pairs.report.json",
        "ledger": ledger,
    }
    optional = {"blind": plan.blind_from, "calibration": plan.calibration}
    inputs |= {name: path for name, path in optional.items() if path is not None}
    if number > 1:
        inputs["panel_report_before"] = before
    outputs = {
        "decision": folder / "decision.json",
        "evidence": folder / "evidence.jsonl",
        "summary": folder / "decision.md",
    }
    run_stage("decide", plan.params.decide, inputs, outputs)
    (decision,) = read_records(outputs["decision"], Decision)
    return decision


def collect_results(plan: Plan) -> dict[str, Any]:
    """Collect the results: metrics of every policy and arm, paired differences to the base, and the blind baseline."""
    folders = {"base": plan.run / "base"}
    for number in range(1, plan.count + 1):
        folder = plan.run / f"round-{number:02d}"
        folders[f"round {number}"] = folder
        folders |= {f"{COMPARISON_LABELS[name]}, round {number}": folder / name for name in plan.comparisons}
    rows = [{"row": row, **_read_metrics(folder / "report.json")} for row, folder in folders.items()]
    decisions = [
        next(read_records(plan.run / f"round-{n:02d}" / "decision.json", Decision)).model_dump(mode="json")
        for n in range(1, plan.count + 1)
    ]
    return {
        "rows": rows,
        "blind": _score_blind_baseline(plan),
        "gains": [{"row": row, **_compute_gains(plan, folder)} for row, folder in folders.items() if row != "base"],
        "decisions": decisions,
        "recipe": plan.params.describe_recipe(),
        "protocol": plan.params.decide.protocol,
    }


_GAIN_METRICS: tuple[Literal["correct", "hit"], ...] = ("correct", "hit")
COMPARISON_LABELS = {"sft": "SFT on chosen", "dpo": "plain DPO"}


def list_policy_folders(rounds: int, comparisons: Iterable[str], method: str) -> dict[str, str]:
    """Every policy of a run: {row of a table: its folder in the run}. method: what the rows call the run's own."""
    folders = {"base": "base"}
    for number in range(1, rounds + 1):
        for name in comparisons:
            folders[f"{COMPARISON_LABELS[name]}, round {number}"] = f"round-{number:02d}/{name}"
        folders[f"{method}, round {number}"] = f"round-{number:02d}"
    return folders


def _read_metrics(path: Path) -> dict[str, Any]:
    report = BenchmarkReport.model_validate_json(path.read_text(encoding="utf-8"))
    return {"policy": report.policy, "arms": report.model_dump(mode="json")["metrics"]}


def _score_blind_baseline(plan: Plan) -> dict[str, Any]:
    from clincot.datasets.folder import load_questions, load_references
    from clincot.evaluation.benchmark_report import build_benchmark_reports
    from clincot.evaluation.blind_baseline import BlindBaseline

    benchmark = read_benchmark(plan.benchmark, limit=plan.params.evaluate.limit)
    key = plan.blind_from or plan.benchmark
    blind = BlindBaseline.fit(load_questions(key), load_references(key))
    config = plan.params.evaluate
    (report,) = build_benchmark_reports(
        blind.iter_outcomes(benchmark),
        benchmark,
        reports=select_report_metrics(benchmark, _find_training_reports(plan)),
        seed=config.seed,
        resamples=config.resamples,
    )
    return {
        "fitted_on": "the benchmark itself" if plan.blind_from is None else "other data",
        "arms": report.model_dump(mode="json")["metrics"],
    }


def _compute_gains(plan: Plan, folder: Path) -> dict[str, Any]:
    """Compute paired differences to the base policy, with 95 % intervals clustered by patient."""
    from clincot.evaluation.paired import compare_outcomes

    benchmark = read_benchmark(plan.benchmark, limit=plan.params.evaluate.limit)
    gains: dict[str, Any] = {}
    for arm in plan.params.evaluate.arms:
        base = _read_outcomes(plan.run / "base", arm)
        outcomes = _read_outcomes(folder, arm)
        for metric in _GAIN_METRICS:
            difference = compare_outcomes(
                outcomes, base, benchmark.clusters, metric=metric, seed=plan.params.evaluate.seed
            )
            gains.setdefault(arm, {})[metric] = difference.model_dump(mode="json")
        if plan.params.decide.protocol != "strict":
            headline = choose_headline(plan.params.decide.protocol, METRIC_HEADINGS)
            difference = _compare_grades(plan, benchmark, headline, outcomes, base)
            gains[arm][headline] = difference.model_dump(mode="json")
    return gains


def _compare_grades(
    plan: Plan, benchmark: Benchmark, metric: str, outcomes: Sequence[Outcome], base: Sequence[Outcome]
) -> Interval:
    """The paired difference in a metric of answers, over the questions to which it applies."""
    from clincot.evaluation.intervals import paired_difference

    arm = outcomes[0].arm if outcomes else ""
    scored, before = (grade_arm(side, arm, metric, benchmark) for side in (outcomes, base))
    common = [question for question in benchmark.clusters if question in scored and question in before]
    return paired_difference(
        [scored[question] for question in common],
        [before[question] for question in common],
        [benchmark.clusters[question] for question in common],
        seed=plan.params.evaluate.seed,
        resamples=plan.params.evaluate.resamples,
    )


def _read_outcomes(folder: Path, arm: str) -> list[Outcome]:
    return [outcome for outcome in read_records(folder / "outcomes.jsonl", Outcome) if outcome.arm == arm]


def _check_plan(plan: Plan) -> None:
    """Check what would otherwise fail hours later, or only after run.json is written. Raises InvalidInput."""
    from clincot.models.load import check_checkpoint_exists

    check_trackers(plan.params.tracking.to, setting="tracking.to")
    check_trackers(plan.params.train.report_to, setting="train.report_to")
    arms = plan.params.evaluate.arms
    if plan.params.decide.arm not in arms:
        raise InvalidInput(f"decide.arm is {plan.params.decide.arm!r}, which evaluate.arms {arms} does not measure")
    datasets = {
        "data": plan.data,
        "benchmark": plan.benchmark,
        "blind_from": plan.blind_from,
        "calibrated_on": plan.calibration,
    }
    paths = {**datasets, "policy": plan.policy}
    if plan.params.judge.calibration_path:
        paths["judge.calibration_file"] = plan.params.judge.calibration_path
    for name, path in paths.items():
        if path is not None and not resolve_path(path).exists():
            raise InvalidRecord(f"{name}: {path} does not exist")
    for name, path in datasets.items():
        if path is not None and not (resolve_path(path) / STUDIES).is_file():
            raise InvalidRecord(f"{name}: {path} is not a data set; expected a folder with {STUDIES} in it")
    check_checkpoint_exists(str(resolve_path(plan.policy)), what="policy")
    for spec in plan.params.judge.judges:
        if spec.path:
            check_checkpoint_exists(spec.checkpoint, what=f"judge {spec.name!r}")
    quorum, panel = plan.params.judge.quorum, format_count(len(plan.params.judge.judges), "judge")
    if len(plan.params.judge.judges) < quorum:
        raise InvalidInput(
            f"judge.quorum is {quorum}, but judge.judges has {panel}; name more judges or lower the quorum"
        )


def start_run(plan: Plan) -> None:
    """Write run.json and params.yaml. Raises InvalidRecord if the run folder was started with other inputs."""
    start = {
        "data": str(plan.data),
        "benchmark": str(plan.benchmark),
        "policy": str(plan.policy),
        "start_from": plan.start_from,
        "comparisons": list(plan.comparisons),
        "blind_from": None if plan.blind_from is None else str(plan.blind_from),
        "judges": [spec.model_dump(mode="json") for spec in plan.params.judge.judges],
    }
    path = plan.run / "run.json"
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(key for key in start if before.get(key) != start[key])
        if changed:
            raise InvalidRecord(
                f"{path}: this run was started with {' and '.join(map(_describe_change, changed))}; "
                "choose another --run folder or delete this one"
            )
    write_json(path, {**start, "recipe": plan.params.describe_recipe()})
    with atomic_write(plan.run / "params.yaml") as file:
        yaml.safe_dump(plan.params.model_dump(mode="json"), file, sort_keys=False)


def _describe_change(key: str) -> str:
    return f"different {key}" if key in {"data", "judges", "comparisons"} else f"a different {key}"


def render_results_table(
    results: dict[str, Any], *, arms: Sequence[str] = ("served", "written", "windows", "random", "oracle", "whole")
) -> str:
    """Render the results as a Markdown table, a row per policy and one for the blind baseline.

    The columns are the accuracy of every arm by the recipe's protocol, `served` only if it was measured (ROUGE-L if all
    questions ask for reports), and of the policy's own regions hit rate, IoU and share of malformed replies; with
    another protocol than strict, also their accuracy by exact match.
    """
    measured = set(chain.from_iterable(row["arms"] for row in results["rows"]))
    arms = [arm for arm in arms if arm != "served" or arm in measured]
    blind = results["blind"]["arms"]["blind"]
    metric, label = "raw/rouge_l", "ROUGE-L"
    if "accuracy" in blind:
        metric = choose_headline(results.get("protocol", "strict"), blind)
        label = "accuracy" if metric == "accuracy" else METRIC_HEADINGS[metric]
    own_metrics = ["hit_rate", "iou", "off_format"]
    columns = ["own region: hit-rate", "IoU", "off format"]
    if metric not in ("accuracy", "raw/rouge_l"):
        own_metrics.append("accuracy")
        columns.append(METRIC_HEADINGS["accuracy"])
    rows = []
    for row in results["rows"]:
        values = {arm: read_interval(metrics.get(metric)) for arm, metrics in row["arms"].items()}
        own = row["arms"].get("written", {})
        further = [format_interval(read_interval(own.get(name))) for name in own_metrics]
        rows.append(ResultsRow(row["row"], values, further))
    return render_table(ResultsTable(label, arms, rows, read_interval(blind.get(metric)), columns))


def render_decisions(results: dict[str, Any]) -> str:
    """Say in a line for each round what the gate decided, and for a champion that stays, why."""
    lines = []
    for number, dumped in enumerate(results["decisions"], start=1):
        decision = Decision.model_validate(dumped)
        failed = [check.reason for check in decision.checks if not check.passed]
        why = "" if decision.verdict == "promote" else f": {' '.join(failed or decision.reasons[:1])}"
        lines.append(f"round {number}: {decision.verdict}{why}")
    return "\n".join(lines)
