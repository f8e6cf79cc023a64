"""The answer stage: the policy answers every question from each of its regions."""

from __future__ import annotations

from clincot.config import AnswerConfig
from clincot.generation.requests import first_step_requests, merge_candidates, next_step_requests
from clincot.jsonl import read_records, write_records
from clincot.records import Candidate
from clincot.stages.base import Metrics, Paths, Stage, show_progress


def answer(config: AnswerConfig, inputs: Paths, outputs: Paths) -> Metrics:
    from clincot.generation.candidates import answer_regions
    from clincot.models.load import load_policy

    policy = load_policy(inputs["policy"], dtype=config.dtype)
    is_later_step = "candidates_before" in inputs
    if is_later_step:
        requests = next_step_requests(inputs, config)
    else:
        requests = first_step_requests(inputs, per_region=config.per_region)
    candidates = answer_regions(show_progress(requests, "answers", "candidates"), inputs["data"], policy, config)
    if is_later_step:
        candidates = merge_candidates(read_records(inputs["candidates_before"], Candidate), candidates)
    return {"candidates": write_records(outputs["candidates"], candidates)}


STAGE = Stage(
    name="answer",
    run=answer,
    config=AnswerConfig,
    inputs=("data", "questions", "regions", "policy"),
    outputs=("candidates",),
    device="gpu",
    about="Answer every question from each of its regions.",
    optional=("candidates_before", "scores_before"),
)
