"""The judge stage: every judge scores every candidate."""

from __future__ import annotations

from clincot import config
from clincot.batching import in_units
from clincot.generation.requests import asked_and_answered, question_of, steps_of
from clincot.jsonl import write_json
from clincot.stages.base import Metrics, Paths, Stage, show_progress


def judge(section: config.JudgeSection, inputs: Paths, outputs: Paths) -> Metrics:
    from clincot.judging.panel import Ask, judge_candidates
    from clincot.models.load import load_judge

    steps = steps_of(inputs)
    asks = (
        Ask(candidate.id, ask.study, question_of(candidate, ask.question, steps), ask.region.box, candidate.text, unit)
        for unit, (ask, candidate) in in_units(asked_and_answered(inputs), lambda pair: pair[1].question)
    )
    report = judge_candidates(
        [load_judge(spec) for spec in section.judges],
        show_progress(asks, "judgements", "candidates"),
        section,
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
    config=config.JudgeSection,
    inputs=("data", "questions", "regions", "candidates"),
    outputs=("judgements", "scores", "panel_report"),
    device="gpu",
    about="every judge scores every candidate",
    optional=("steps",),
)
