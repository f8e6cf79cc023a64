"""The answer stage: the policy answers from every region."""

from __future__ import annotations

from clincot.config import AnswerConfig
from clincot.generation.requests import first_step_requests, merge_candidates, next_step_requests
from clincot.jsonl import read_records, write_records
from clincot.records import Candidate
from clincot.stages.base import Metrics, Paths, Stage, show_progress


def answer(config: AnswerConfig, inputs: Paths, outputs: Paths) -> Metrics:
    from clincot.generation.candidates import answer_regions
    from clincot.models.load import load_policy

    policy = load_policy(inputs["policy"])
    asks = next_step_requests(inputs, config) if "candidates_before" in inputs else first_step_requests(inputs)
    made = answer_regions(show_progress(asks, "answers", "candidates"), inputs["data"], policy, config)
    if "candidates_before" in inputs:
        made = merge_candidates(read_records(inputs["candidates_before"], Candidate), made)
    return {"candidates": write_records(outputs["candidates"], made)}


STAGE = Stage(
    name="answer",
    run=answer,
    config=AnswerConfig,
    inputs=("data", "questions", "regions", "policy"),
    outputs=("candidates",),
    device="gpu",
    about="the policy answers from every region",
    optional=("candidates_before", "scores_before"),
)
