"""The judge stage: every judge scores every candidate."""

from __future__ import annotations

from clincot.batching import iter_blocks
from clincot.config import JudgeConfig
from clincot.errors import InvalidInput
from clincot.generation.requests import join_candidates, read_steps, resolve_step_question
from clincot.geometry import WHOLE_IMAGE
from clincot.jsonl import write_json
from clincot.stages.base import Metrics, Paths, Stage, show_progress


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
    alpha = {} if report.alpha_calibrated.value is None else {"alpha": report.alpha_calibrated.value}
    return {"candidates": report.candidates, "scored": report.scored, **alpha, **measure_cache_use(judges)}


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
