"""Answers as the server gives them, for golden questions: the server's own code and default settings."""

from __future__ import annotations

from pathlib import Path

from clincot.geometry import Box
from clincot.records import Study
from clincot.registry.golden import Look

CLEAR = 1e-3  # lead of a region in likelihood


def served_look(checkpoint: Path) -> Look:
    """As the server answers, by the server's own code and default settings."""
    from clincot.generation.visual_cot import Asked, answer_question, leads
    from clincot.models.load import load_policy
    from clincot.serving.server_settings import ServeSettings

    policy, settings = load_policy(checkpoint), ServeSettings()

    def look(study: Study, folder: Path, question: str) -> tuple[str, Box | None, float]:
        answered = answer_question(Asked(study, folder, question), policy, settings)
        answer_leads, region_leads = leads(answered)
        box = answered.box if region_leads >= CLEAR else None
        return answered.answer, box, min(answer_leads, region_leads)

    return look
