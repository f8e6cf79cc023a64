"""Results of the demo's rounds over several seeds, on unseen patients.

    python -m benchmarks.learning_results --seeds 0 1 2            (make results SEEDS="0 1 2")

Every seed renders its own questions (for rounds and benchmark), draws its own regions, answers and pairs, and trains
its own policies; the base policy and the judges are the shipped ones. Seeds run in parallel, one thread each. Intervals
are clustered by patient (warp) over all seeds together.

Writes results.json, results.md and results.svg to the run folder. The last table lists what must hold, and whether it
does; it does not affect the exit code.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.policy_outcomes import PolicyOutcomes, read_policy_outcomes
from benchmarks.results_chart import render_results_chart
from clincot.datasets.folder import load_questions, load_references
from clincot.demo.walkthrough import plan_radiograph_rounds
from clincot.evaluation.intervals import cluster_wilson_interval
from clincot.jsonl import atomic_write, read_json_model, write_json
from clincot.records import Decision, Interval
from clincot.reporting.results_table import ResultsRow, ResultsTable, read_interval, render_table
from clincot.rounds import COMPARISON_LABELS, Plan, list_policy_folders, run_rounds
from clincot.text import format_interval, markdown_table

ARMS = ("served", "written", "windows", "random", "wrong", "oracle", "shuffled", "whole")
AUC_QUESTIONS = 400
JUDGE_WARPS = range(700, 716)  # patients of the judges' test; no lesson, calibration or round uses them


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run", type=Path, default=Path("runs/results"), help="Folder of the seeds' runs and the report."
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Seeds, each with rounds of its own.")
    parser.add_argument(
        "--jobs", type=int, default=(os.cpu_count() or 1) + 1, help="Number of seeds that run at a time."
    )
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        run_rounds(_plan_seed(args.run, args.seeds[0]))
        return 0
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda seed: _run_seed(args.run, seed), args.seeds))
    report = collect_report(args.run, args.seeds)
    write_json(args.run / "results.json", report)
    text = render_learning_results(report)
    with atomic_write(args.run / "results.md") as file:
        file.write(text)
    with atomic_write(args.run / "results.svg") as file:
        file.write(render_results_chart(report["rows"], report["rounds"]))
    print(text)
    return 0


def _plan_seed(run: Path, seed: int) -> Plan:
    """The demo's rounds with two more controls on the benchmark."""
    plan = plan_radiograph_rounds(run / f"seed-{seed}", seed=seed)
    evaluate = plan.params.evaluate.model_copy(update={"arms": ARMS})
    return replace(plan, params=plan.params.model_copy(update={"evaluate": evaluate}))


def _run_seed(run: Path, seed: int) -> None:
    """Run a seed in its own process, which frees its memory at the end; the output goes to a log next to its folder."""
    run.mkdir(parents=True, exist_ok=True)
    log = run / f"seed-{seed}.log"
    command = [sys.executable, "-m", "benchmarks.learning_results", "--one", "--run", str(run), "--seeds", str(seed)]
    print(f"seed {seed}: started, log in {log}", flush=True)
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
        ).returncode
    if code != 0:
        raise RuntimeError(f"seed {seed} failed with exit code {code}; see the end of {log}")
    print(f"seed {seed}: done", flush=True)


def collect_report(run: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Collect the contents of the tables and the checks from the seeds' run folders, as JSON."""
    plan = _plan_seed(run, seeds[0])
    folders = list_policy_folders(plan.count, plan.comparisons, "margin-DPO")
    runs = [run / f"seed-{seed}" for seed in seeds]
    policies = {row: read_policy_outcomes(runs, folder, ARMS) for row, folder in folders.items()}
    base = policies["base"]
    judges = measure_judge_quality(run)
    blind, chance = _measure_blind_baseline(run, seeds)
    topics = _compare_topics(policies)
    return {
        "seeds": list(seeds),
        "rounds": plan.count,
        "questions": len(base.outcomes["served"]),
        "patients": len({base.patients[o.question] for o in base.outcomes["served"]}),
        "rows": [_summarize_policy(row, policy, base) for row, policy in policies.items()],
        "topics": {topic: {row: _dump_interval(i) for row, i in rows.items()} for topic, rows in topics.items()},
        "promotions": {str(seed): _read_verdicts(run / f"seed-{seed}", plan.count) for seed in seeds},
        "blind": _dump_interval(blind),
        "chance": chance,
        "judges": judges,
        "checks": _run_checks(policies, topics, judges, blind, chance),
    }


def _summarize_policy(row: str, policy: PolicyOutcomes, base: PolicyOutcomes) -> dict[str, Any]:
    """Build a policy's row of the tables; gains are relative to the base policy."""
    return {
        "row": row,
        "accuracy": {arm: _dump_interval(policy.estimate_mean(arm, "correct")) for arm in ARMS},
        "hit_rate": {arm: _dump_interval(policy.estimate_mean(arm, "hit")) for arm in ("written", "windows", "random")},
        "iou": _dump_interval(policy.estimate_mean("written", "iou")),
        "off_format": _dump_interval(policy.estimate_mean("written", "off_format")),
        "served_hit_rate": _dump_interval(policy.estimate_mean("served", "hit")),
        "served_off_format": _dump_interval(policy.estimate_mean("served", "off_format")),
        "gain": _dump_interval(policy.estimate_difference(base, "served", "correct")),
        "hit_gain": _dump_interval(policy.estimate_difference(base, "served", "hit")),
    }


def _compare_topics(policies: Mapping[str, PolicyOutcomes]) -> dict[str, dict[str, Interval]]:
    """{topic: {row: served accuracy minus the base's}}, without the base."""
    compared: dict[str, dict[str, Interval]] = {}
    for topic in sorted(set(policies["base"].topics.values())):
        base = policies["base"].select_topic(topic)
        compared[topic] = {
            row: policy.select_topic(topic).estimate_difference(base, "served", "correct")
            for row, policy in policies.items()
            if row != "base"
        }
    return compared


def _read_verdicts(run: Path, rounds: int) -> list[str]:
    """The verdicts of a seed's rounds, in order."""
    decisions = [read_json_model(run / f"round-{n:02d}" / "decision.json", Decision) for n in range(1, rounds + 1)]
    return [decision.verdict for decision in decisions]


def _run_checks(
    policies: Mapping[str, PolicyOutcomes],
    topics: Mapping[str, Mapping[str, Interval]],
    judges: list[dict[str, Any]],
    blind: Interval,
    chance: float,
) -> list[dict[str, Any]]:
    """Check what must hold; each check has its measured value and whether it holds."""
    last_row = list(policies)[-1]
    base, first, last = policies["base"], policies["margin-DPO, round 1"], policies[last_row]
    number = last_row.rpartition(" ")[2]
    dpo, sft = (policies[f"{COMPARISON_LABELS[name]}, round {number}"] for name in ("dpo", "sft"))
    worst_topic = min(topics, key=lambda topic: topics[topic][last_row].value or 0.0)
    worst = max(policy.estimate_mean("served", "off_format").value or 0.0 for policy in policies.values())
    assert blind.low is not None and blind.high is not None  # noqa: PT018
    return [
        _check_interval(
            "served accuracy, last round - base: at least .08, interval above 0",
            last.estimate_difference(base, "served", "correct"),
            lambda i: i.value >= 0.08 and i.low > 0,
        ),
        _check_interval(
            f"worst topic ({worst_topic}), served, last round - base: at least -.03",
            topics[worst_topic][last_row],
            lambda i: i.value >= -0.03,
        ),
        _check_interval(
            "hit-rate of the region behind the served answer, last round - base: interval above 0",
            last.estimate_difference(base, "served", "hit"),
            lambda i: i.low > 0,
        ),
        _check_interval(
            "oracle region, last round - base: interval above 0",
            last.estimate_difference(base, "oracle", "correct"),
            lambda i: i.low > 0,
        ),
        _check_interval(
            "served accuracy, round 2 - round 1: interval above 0",
            last.estimate_difference(first, "served", "correct"),
            lambda i: i.low > 0,
        ),
        _check_interval(
            "margin-DPO - plain DPO, served, last round: at least .03, interval above 0",
            last.estimate_difference(dpo, "served", "correct"),
            lambda i: i.value >= 0.03 and i.low > 0,
        ),
        _check_interval(
            "margin-DPO - SFT on chosen, served, last round: at least .03, interval above 0",
            last.estimate_difference(sft, "served", "correct"),
            lambda i: i.value >= 0.03 and i.low > 0,
        ),
        _check_interval(
            "oracle region - whole image, last round: at least .20",
            last.estimate_difference(last, "oracle", "correct", other_arm="whole"),
            lambda i: i.value >= 0.20,
        ),
        _check_interval(
            "grounder - random region, last round: at least .05",
            last.estimate_difference(last, "windows", "correct", other_arm="random"),
            lambda i: i.value >= 0.05,
        ),
        {
            "check": "off-format served answers, worst policy: under 2 %",
            "value": f"{worst:.3f}",
            "holds": worst < 0.02,
        },
        *(
            {
                "check": f"AUC of {judge['name']} on oracle crops: at least .85",
                "value": f"{judge['auc_oracle']:.3f}",
                "holds": judge["auc_oracle"] >= 0.85,
            }
            for judge in judges
        ),
        {
            "check": "blind baseline at chance (interval contains chance, or is below it)",
            "value": f"{format_interval(blind)}, chance {chance:.3f}",
            "holds": blind.low <= chance,
        },
    ]


def _check_interval(name: str, interval: Interval, holds: Callable[[Any], bool]) -> dict[str, Any]:
    known = interval.value is not None and interval.low is not None
    return {"check": name, "value": format_interval(interval), "holds": known and holds(interval)}


def measure_judge_quality(run: Path) -> list[dict[str, Any]]:
    """Measure each judge's AUC (right against wrong answers) and calibration on patients that nothing else uses."""
    from clincot.config import load_params
    from clincot.demo.walkthrough import RECIPE, render_dataset
    from clincot.training.calibrate_judges import measure_judges

    folder = run / "judge-questions"
    render_dataset(folder, JUDGE_WARPS, 200, seed=4000)
    return measure_judges(load_params(None, recipe=RECIPE).judge, folder, limit=AUC_QUESTIONS)


def _measure_blind_baseline(run: Path, seeds: Sequence[int]) -> tuple[Interval, float]:
    """Return the accuracy of the blind baseline, fitted on each seed's round data, and chance.

    Chance is one over the number of answers of a topic, averaged over the questions.
    """
    from clincot.evaluation.blind_baseline import BlindBaseline
    from clincot.evaluation.read_benchmark import read_benchmark

    values: list[bool | None] = []
    clusters: list[str] = []
    chances: list[float] = []
    for seed in seeds:
        seed_folder = run / f"seed-{seed}"
        benchmark = read_benchmark(seed_folder / "benchmark")
        blind = BlindBaseline.fit(load_questions(seed_folder / "data"), load_references(seed_folder / "data"))
        for outcome in blind.iter_outcomes(benchmark):
            values.append(outcome.correct)
            clusters.append(benchmark.clusters[outcome.question])
        answers: dict[str, set[str]] = {}  # by topic
        for question in benchmark.questions.values():
            answers.setdefault(question.topic, set()).add(benchmark.references[question.id].answer)
        chances += [1 / len(answers[question.topic]) for question in benchmark.questions.values()]
    return cluster_wilson_interval(values, clusters), float(np.mean(chances))


def render_learning_results(report: Mapping[str, Any]) -> str:
    """Render the report as Markdown."""
    lines = [
        f"{len(report['seeds'])} seeds, {report['questions']} questions about {report['patients']} unseen patients "
        "(warps of one CT); 95 % intervals clustered by patient. One anatomy, controlled: not clinical evidence.",
        "",
        _render_accuracies(report),
        "",
        _render_gains(report["rows"]),
        "",
        _render_topics(report["topics"]),
        "",
        markdown_table(
            ("seed", "the gate's decisions"),
            [(seed, ", ".join(verdicts)) for seed, verdicts in report["promotions"].items()],
        ),
        "",
        _render_judges(report["judges"]),
        "",
        markdown_table(
            ("what must hold", "measured", ""),
            [(c["check"], c["value"], "yes" if c["holds"] else "**no**") for c in report["checks"]],
        ),
        "",
    ]
    return "\n".join(lines)


def _render_gains(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = {
        "served, minus base": "gain",
        "hit-rate of the region behind the answer": "served_hit_rate",
        "minus base": "hit_gain",
        "off format, served": "served_off_format",
        "off format, own region": "off_format",
    }
    cells = [(row["row"], *_format_intervals(row[name] for name in columns.values())) for row in rows]
    return markdown_table(("policy", *columns), cells)


def _render_topics(topics: Mapping[str, Mapping[str, Any]]) -> str:
    policies = next(iter(topics.values()), {})
    cells = [(policy, *_format_intervals(gains[policy] for gains in topics.values())) for policy in policies]
    return markdown_table(("served, minus base", *topics), cells)


def _render_judges(judges: Sequence[Mapping[str, Any]]) -> str:
    head = ("judge", "AUC, oracle crops", "AUC, random crops", "ECE raw", "ECE calibrated")
    names = ("auc_oracle", "auc_random", "ece_raw", "ece")
    return markdown_table(head, [(judge["name"], *(f"{judge[name]:.3f}" for name in names)) for judge in judges])


def _render_accuracies(report: Mapping[str, Any]) -> str:
    accuracies = {row["row"]: row["accuracy"] for row in report["rows"]}
    rows = [ResultsRow(name, {arm: read_interval(values[arm]) for arm in ARMS}) for name, values in accuracies.items()]
    return render_table(ResultsTable("accuracy", ARMS, rows, read_interval(report["blind"])))


def _format_intervals(intervals: Iterable[Mapping[str, Any]]) -> list[str]:
    return [format_interval(read_interval(interval)) for interval in intervals]


def _dump_interval(interval: Interval) -> dict[str, Any]:
    return interval.model_dump(mode="json")


if __name__ == "__main__":
    sys.exit(main())
