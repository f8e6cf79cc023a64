"""The judge stage: every judge scores every candidate."""

from __future__ import annotations

from clincot.batching import iter_blocks
from clincot.config import JudgeConfig
from clincot.generation.requests import join_candidates, read_steps, resolve_step_question
from clincot.jsonl import write_json
from clincot.stages.base import Metrics, Paths, Stage, show_progress


def judge(config: JudgeConfig, inputs: Paths, outputs: Paths) -> Metrics:
    from clincot.judging.panel import JudgeRequest, judge_candidates
    from clincot.models.load import load_judge

    steps = read_steps(inputs)
    requests = (
        JudgeRequest(
            candidate.id,
            request.study,
            resolve_step_question(candidate, request.question, steps),
            request.region.box,
            candidate.text,
            block,
        )
        for block, (request, candidate) in iter_blocks(join_candidates(inputs), lambda pair: pair[1].question)
    )
    report = judge_candidates(
        [load_judge(spec, dtype=config.dtype) for spec in config.judges],
        show_progress(requests, "judgements", "candidates"),
        config,
        folder=inputs["data"],
        judgements_path=outputs["judgements"],
        scores_path=outputs["scores"],
    )
    write_json(outputs["panel_report"], report.model_dump(mode="json"))
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
)
