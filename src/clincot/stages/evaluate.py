"""The evaluate stage: the policy answers the benchmark from each kind of region."""

from __future__ import annotations

from clincot.config import EvaluateConfig
from clincot.evaluation.read_benchmark import read_benchmark, select_report_metrics
from clincot.jsonl import read_records, write_json, write_records
from clincot.records import Outcome
from clincot.stages.base import Metrics, Paths, Stage, build_progress_path, show_progress


def evaluate(config: EvaluateConfig, inputs: Paths, outputs: Paths) -> Metrics:
    from clincot.datasets.folder import StudyIndex
    from clincot.evaluation.benchmark_report import build_benchmark_reports, list_headline_figures
    from clincot.evaluation.evaluator import evaluate_policy as answer_benchmark
    from clincot.evaluation.open_answers import grade_open_answers
    from clincot.evaluation.served_sample import collect_served_sample
    from clincot.models.reply_memory import remember_replies
    from clincot.models.rollout_engines import free_models, open_judges, open_policy

    benchmark = read_benchmark(inputs["benchmark"], limit=config.limit)
    studies = StudyIndex(inputs["benchmark"])
    total = len(config.arms) * len(benchmark.questions)
    log = build_progress_path(outputs["outcomes"])
    with open_policy(
        inputs["policy"], config.engine, dtype=config.dtype, log=log, inputs=inputs, config=config
    ) as policy:
        outcomes = answer_benchmark(remember_replies(policy), benchmark, studies, inputs["benchmark"], config)
        write_records(outputs["outcomes"], show_progress(outcomes, "benchmark", "answers", total))
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


STAGE = Stage(
    name="evaluate",
    run=evaluate,
    config=EvaluateConfig,
    inputs=("benchmark", "policy"),
    outputs=("outcomes", "report"),
    device="gpu",
    about="Measure a policy on the benchmark, from each kind of region and from the controls.",
    optional=("train_reports",),
)
