"""The evaluate stage: the policy answers the benchmark from each kind of region."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from clincot.batching import bound_parts
from clincot.config import EvaluateConfig
from clincot.evaluation.read_benchmark import read_benchmark, select_report_metrics
from clincot.jsonl import read_json, read_records, write_json, write_records
from clincot.records import Outcome
from clincot.stages.base import Metrics, Parts, Paths, Stage, build_progress_path, show_progress

if TYPE_CHECKING:
    from clincot.evaluation.benchmark import Benchmark


def evaluate(config: EvaluateConfig, inputs: Paths, outputs: Paths) -> Metrics:
    benchmark = read_benchmark(inputs["benchmark"], limit=config.limit)
    _answer_questions(config, inputs, outputs, benchmark, slice(0, len(benchmark.questions)))
    return _finish_outcomes(config, inputs, outputs, benchmark)


def answer_part(config: EvaluateConfig, inputs: Paths, outputs: Paths) -> Metrics:
    """Answer the questions of one of several parts; the input `span` has its bounds as a JSON list."""
    benchmark = read_benchmark(inputs["benchmark"], limit=config.limit)
    _answer_questions(config, inputs, outputs, benchmark, slice(*read_json(inputs["span"])))
    return {}


def _answer_questions(config: EvaluateConfig, inputs: Paths, outputs: Paths, benchmark: Benchmark, span: slice) -> None:
    from clincot.datasets.folder import StudyIndex
    from clincot.evaluation.evaluator import evaluate_policy as answer_benchmark
    from clincot.models.reply_memory import remember_replies
    from clincot.models.rollout_engines import open_policy

    studies = StudyIndex(inputs["benchmark"])
    total = len(config.arms) * (span.stop - span.start)
    log = build_progress_path(outputs["outcomes"])
    with open_policy(
        inputs["policy"], config.engine, dtype=config.dtype, log=log, inputs=inputs, config=config
    ) as policy:
        outcomes = answer_benchmark(
            remember_replies(policy), benchmark, studies, inputs["benchmark"], config, span=span
        )
        write_records(outputs["outcomes"], show_progress(outcomes, "benchmark", "answers", total))


def _finish_outcomes(config: EvaluateConfig, inputs: Paths, outputs: Paths, benchmark: Benchmark) -> Metrics:
    """Let the open judges, if there are any, grade the outcomes, and write the report."""
    from clincot.evaluation.benchmark_report import build_benchmark_reports, list_headline_figures
    from clincot.evaluation.open_answers import grade_open_answers
    from clincot.evaluation.served_sample import collect_served_sample
    from clincot.models.rollout_engines import free_models, open_judges

    if config.open_judges:
        free_models()  # the judges may need the memory, which a server would keep
        answered = list(read_records(outputs["outcomes"], Outcome))
        judges = open_judges(config.open_judges, config.engine, dtype=config.dtype)
        grades = grade_open_answers(answered, benchmark, inputs["benchmark"], config, judges)
        write_records(outputs["outcomes"], (grades.grade_outcome(outcome, benchmark) for outcome in answered))
    (report,) = build_benchmark_reports(
        read_records(outputs["outcomes"], Outcome),
        benchmark,
        seed=config.seed,
        resamples=config.resamples,
        reports=select_report_metrics(benchmark, inputs.get("train_reports")),
    )
    sample = collect_served_sample(read_records(outputs["outcomes"], Outcome))
    if sample is not None:
        report = report.replace_fields(served=sample)
    write_json(outputs["report"], report.model_dump(mode="json"))
    return list_headline_figures(report)


def split_benchmark(config: EvaluateConfig, inputs: Paths, count: int, work: Path) -> list[dict[str, Path]]:
    """Divide the benchmark's questions into spans of whole batches."""
    from clincot.evaluation.evaluator import BATCH_SIZE

    questions = len(read_benchmark(inputs["benchmark"], limit=config.limit).questions)
    parts = []
    for number, (start, end) in enumerate(bound_parts(-(-questions // BATCH_SIZE), count)):
        span = work / str(number) / "span.json"
        write_json(span, [start * BATCH_SIZE, min(questions, end * BATCH_SIZE)])
        parts.append({**inputs, "span": span})
    return parts


def join_outcomes(config: EvaluateConfig, inputs: Paths, written: Sequence[Paths], outputs: Paths) -> Metrics:
    """Write the outcomes arm by arm, each in the benchmark's order, and finish them."""
    write_records(outputs["outcomes"], _iter_by_arm(written))
    return _finish_outcomes(config, inputs, outputs, read_benchmark(inputs["benchmark"], limit=config.limit))


def _iter_by_arm(written: Sequence[Paths]) -> Iterator[Outcome]:
    """The outcomes of all parts, each of which has them arm by arm."""
    by_arm = [groupby(read_records(part["outcomes"], Outcome), key=lambda outcome: outcome.arm) for part in written]
    for of_arm in zip(*by_arm, strict=True):
        for _, outcomes in of_arm:
            yield from outcomes


STAGE = Stage(
    name="evaluate",
    run=evaluate,
    config=EvaluateConfig,
    inputs=("benchmark", "policy"),
    outputs=("outcomes", "report"),
    device="gpu",
    about="Measure a policy on the benchmark, from each kind of region and from the controls.",
    optional=("train_reports",),
    parts=Parts(
        split=split_benchmark,
        run=answer_part,
        outputs=("outcomes",),
        join=join_outcomes,
        unit="answers",
    ),
)
