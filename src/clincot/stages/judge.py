"""The judge stage: every judge scores every candidate."""

from __future__ import annotations

from clincot import __version__
from clincot.batching import iter_blocks
from clincot.config import JudgeConfig
from clincot.errors import InvalidInput
from clincot.generation.requests import join_candidates, read_steps, resolve_step_question
from clincot.geometry import WHOLE_IMAGE
from clincot.jsonl import hash_files, write_json
from clincot.records import hash_json
from clincot.stages.base import Metrics, Paths, Stage, show_progress


def judge(config: JudgeConfig, inputs: Paths, outputs: Paths) -> Metrics:
    from clincot.judging.asking import JudgeRequest
    from clincot.judging.panel import judge_candidates
    from clincot.models.load import load_judge

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
        progress_key=_build_progress_key(config, inputs),
    )
    write_json(outputs["panel_report"], report.model_dump(mode="json"))
    alpha = {} if report.alpha_calibrated.value is None else {"alpha": report.alpha_calibrated.value}
    return {"candidates": report.candidates, "scored": report.scored, **alpha}


def _build_progress_key(config: JudgeConfig, inputs: Paths) -> str:
    """Changes with everything that the stage's key covers: code version, config and inputs.

    The questions name their images by sha256, so the images need not be read again.
    """
    files = {name: hash_files(path) for name, path in sorted(inputs.items()) if path.is_file()}
    return hash_json([__version__, config.model_dump(mode="json"), files])


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
