"""The judge stage: every judge scores every candidate."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from clincot.batching import iter_blocks
from clincot.config import JudgeConfig
from clincot.errors import InvalidInput
from clincot.generation.requests import join_candidates, read_steps, resolve_step_question
from clincot.geometry import WHOLE_IMAGE
from clincot.jsonl import read_json_model, read_records, write_json
from clincot.judging.combination import PanelReport
from clincot.records import Judgement
from clincot.stages.base import Metrics, Parts, Paths, Stage, show_progress
from clincot.stages.parts import split_questions


def judge(config: JudgeConfig, inputs: Paths, outputs: Paths) -> Metrics:
    from clincot.judging.asking import JudgeRequest
    from clincot.judging.panel import judge_candidates
    from clincot.models.rollout_engines import build_progress_key, measure_cache_use, open_judges

    if config.show_reference:
        raise InvalidInput(
            "judge.show_reference is for `clincot calibrate` only: the reference is the answer key, and scores of "
            "judges that see it would turn preference pairs into labels; set it to false"
        )
    steps = read_steps(inputs)
    requests = (
        JudgeRequest(
            candidate.id,
            request.study,
            resolve_step_question(candidate, request.question, steps),
            request.region.box,
            candidate.text,
            block,
            finding="" if request.region.box == WHOLE_IMAGE else request.region.hypothesis,
            cutout=request.region.cutout,
        )
        for block, (request, candidate) in iter_blocks(join_candidates(inputs), lambda pair: pair[1].question)
    )
    judges = open_judges(config.judges, config.engine, dtype=config.dtype)
    report = judge_candidates(
        judges,
        show_progress(requests, "judgements", "candidates"),
        config,
        folder=inputs["data"],
        judgements_path=outputs["judgements"],
        scores_path=outputs["scores"],
        progress_key=build_progress_key(config, inputs),
    )
    write_json(outputs["panel_report"], report.model_dump(mode="json"))
    return {**_describe_report(report), **measure_cache_use(judges)}


def judge_part(config: JudgeConfig, inputs: Paths, outputs: Paths) -> Metrics:
    """Judge one of several parts. Their metrics are added up, which says nothing of their agreement."""
    metrics = judge(config, inputs, outputs)
    metrics.pop("alpha", None)
    return metrics


def share_concurrency(config: JudgeConfig, parts: int) -> JudgeConfig:
    """The config of one of several parts, which together have as many requests in flight as the config says."""
    judges = [spec.model_copy(update={"concurrency": max(1, spec.concurrency // parts)}) for spec in config.judges]
    return config.model_copy(update={"judges": tuple(judges)})


def join_judgements(config: JudgeConfig, inputs: Paths, written: Sequence[Paths], outputs: Paths) -> Metrics:
    """Combine the judgements of all parts."""
    judgements = [part["judgements"] for part in written]
    reports = [part["panel_report"] for part in written]
    return _describe_report(merge_judgements(config, judgements, reports, outputs))


def merge_judgements(
    config: JudgeConfig, judgements: Sequence[Path], reports: Sequence[Path], outputs: Paths
) -> PanelReport:
    """Write judgements, scores and report of the panel from those of parts or shards, and return the report.

    A judge that is excluded from one of them is excluded from all. Raises QuorumLost if too few judges remain.
    """
    from clincot.judging.panel import combine_panel

    before = [read_json_model(path, PanelReport) for path in reports]
    judged = chain.from_iterable(read_records(path, Judgement) for path in judgements)
    report = combine_panel(config, before, judged, outputs["judgements"], outputs["scores"])
    write_json(outputs["panel_report"], report.model_dump(mode="json"))
    return report


def _describe_report(report: PanelReport) -> Metrics:
    alpha = {} if report.alpha_calibrated.value is None else {"alpha": report.alpha_calibrated.value}
    return {"candidates": report.candidates, "scored": report.scored, **alpha}


STAGE = Stage(
    name="judge",
    run=judge,
    config=JudgeConfig,
    inputs=("data", "questions", "regions", "candidates"),
    outputs=("judgements", "scores", "panel_report"),
    device="gpu",
    about="Score every candidate with every judge.",
    optional=("steps",),
    parts=Parts(
        applies=lambda config: any(not spec.url for spec in config.judges),
        split=split_questions,
        run=judge_part,
        outputs=("judgements", "scores", "panel_report"),
        join=join_judgements,
        configure=share_concurrency,
        unit="candidates",
    ),
)
