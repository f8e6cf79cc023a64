"""The answer stage: the policy answers every question from each of its regions."""

from __future__ import annotations

from clincot.config import AnswerConfig
from clincot.generation.requests import first_step_requests, merge_candidates, next_step_requests
from clincot.jsonl import read_records, write_records
from clincot.records import Candidate
from clincot.stages.base import Metrics, Parts, Paths, Stage, build_progress_path, show_progress
from clincot.stages.parts import join_records, split_questions


def answer(config: AnswerConfig, inputs: Paths, outputs: Paths) -> Metrics:
    from clincot.generation.candidates import answer_regions
    from clincot.models.rollout_engines import measure_cache_use, open_policy

    is_later_step = "candidates_before" in inputs
    if is_later_step:
        requests = next_step_requests(inputs, config)
    else:
        requests = first_step_requests(inputs, per_region=config.per_region)
    log = build_progress_path(outputs["candidates"])
    with open_policy(
        inputs["policy"], config.engine, dtype=config.dtype, log=log, inputs=inputs, config=config
    ) as policy:
        candidates = answer_regions(show_progress(requests, "answers", "candidates"), inputs["data"], policy, config)
        if is_later_step:
            candidates = merge_candidates(read_records(inputs["candidates_before"], Candidate), candidates)
        count = write_records(outputs["candidates"], candidates)
        return {"candidates": count, **measure_cache_use([policy])}


STAGE = Stage(
    name="answer",
    run=answer,
    config=AnswerConfig,
    inputs=("data", "questions", "regions", "policy"),
    outputs=("candidates",),
    device="gpu",
    about="Answer every question from each of its regions.",
    optional=("candidates_before", "scores_before"),
    parts=Parts(
        split=split_questions,
        run=answer,
        outputs=("candidates",),
        join=join_records(Candidate, "candidates"),
        unit="candidates",
    ),
)
