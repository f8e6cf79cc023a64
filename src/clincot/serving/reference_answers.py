"""Answers to golden questions by the server's code with default settings."""

from __future__ import annotations

from pathlib import Path

from clincot.geometry import Box
from clincot.records import Study
from clincot.registry.golden import AnswerFn

MIN_REGION_LEAD = 1e-3  # smallest likelihood margin at which the winning region is recorded


def answer_as_served(checkpoint: Path) -> AnswerFn:
    """Load the checkpoint and return a function that answers as a server of it would."""
    from clincot.generation.visual_cot import ImageQuestion, answer_question, measure_leads
    from clincot.models.load import load_policy
    from clincot.config.server_settings import ServeSettings

    settings = ServeSettings()
    policy = load_policy(checkpoint, dtype=settings.dtype)

    def answer(study: Study, folder: Path, question: str) -> tuple[str, Box | None, float]:
        result = answer_question(ImageQuestion(study, folder, question), policy, settings)
        answer_lead, region_lead = measure_leads(result)
        box = result.box if region_lead >= MIN_REGION_LEAD else None
        return result.answer, box, min(answer_lead, region_lead)

    return answer
