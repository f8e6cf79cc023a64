"""Answers to golden questions by the server's code."""

from __future__ import annotations

from pathlib import Path

from clincot.config import ServeConfig
from clincot.evaluation.served_sample import CLEAR_LEAD
from clincot.geometry import Box
from clincot.records import Study
from clincot.registry.golden import AnswerFn


def answer_as_served(checkpoint: Path, serve: ServeConfig) -> AnswerFn:
    """Load the checkpoint and return a function that answers as a server of it would."""
    from clincot.generation.visual_cot import ImageQuestion, answer_question, measure_leads
    from clincot.models.load import load_policy

    policy = load_policy(checkpoint)

    def answer(study: Study, folder: Path, question: str) -> tuple[str, Box | None, float]:
        result = answer_question(ImageQuestion(study, folder, question), policy, serve)
        lead, region_lead = measure_leads(result)
        return result.answer, result.box if region_lead >= CLEAR_LEAD else None, lead

    return answer
