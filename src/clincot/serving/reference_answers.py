"""Answers as the server gives them, for golden questions: the server's own code and default settings."""

from __future__ import annotations

from pathlib import Path

from clincot.geometry import Box
from clincot.records import Study
from clincot.registry.golden import AnswerFn

MIN_REGION_LEAD = 1e-3  # lead of a region in likelihood


def answer_as_served(checkpoint: Path) -> AnswerFn:
    """As the server answers, by the server's own code and default settings."""
    from clincot.generation.visual_cot import ImageQuestion, answer_question, measure_leads
    from clincot.models.load import load_policy
    from clincot.serving.server_settings import ServeSettings

    policy, settings = load_policy(checkpoint), ServeSettings()

    def look(study: Study, folder: Path, question: str) -> tuple[str, Box | None, float]:
        answered = answer_question(ImageQuestion(study, folder, question), policy, settings)
        answer_leads, region_leads = measure_leads(answered)
        box = answered.box if region_leads >= MIN_REGION_LEAD else None
        return answered.answer, box, min(answer_leads, region_leads)

    return look
