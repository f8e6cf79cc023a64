"""Fit the judges' calibrations on a small labelled set that no round and no benchmark uses."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clincot.config import JudgeConfig
from clincot.datasets.folder import StudyIndex, iter_single_image, load_questions, load_references
from clincot.errors import InvalidInput
from clincot.jsonl import write_records
from clincot.judging.asking import JudgeRequest, build_retry_policy, get_judge_style, rate_requests
from clincot.judging.calibration import fit_calibration, make_identity_calibration, measure_reliability
from clincot.judging.labelled_answers import LabelledAnswer, draw_labelled_answers, join_references
from clincot.judging.panel import read_calibrations
from clincot.models.load import load_judge
from clincot.models.protocols import Judge
from clincot.text import markdown_table

# Shape suffixes: N labelled answers.

Floats = npt.NDArray[np.float64]


def fit_judge_calibrations(config: JudgeConfig, data: Path, out: Path, *, limit: int) -> str:
    """Write one calibration for each judge to `out`; return a table of the judges' reliability before and after.

    Each question is used once, with its right answer or a wrong one, seen from a region that is as likely to miss the
    finding as to show it, because a panel sees both. Raises CalibrationRefused if a judge cannot tell right from wrong,
    and InvalidInput if the configured calibration needs no fit.
    """
    if config.calibration == "identity":
        raise InvalidInput("judge.calibration is identity, which needs no fit; set it to platt or isotonic")
    references = {reference.question: reference for reference in load_references(data)}
    questions = join_references(StudyIndex(data), iter_single_image(islice(load_questions(data), limit)), references)
    answers = list(draw_labelled_answers(questions, seed=0, region_truth=0.5, both=False))
    right = [answer.right for answer in answers]
    calibrations = []
    rows = []
    for spec in config.judges:
        judge = load_judge(spec, dtype=config.dtype)
        # A judge that sees the reference is another judge: its calibration must not be applied in a round.
        digest = judge.digest + "+reference" * get_judge_style(config, judge.name).reference
        fitted = fit_calibration(digest, _rate_answers(judge, answers, data, config), right, method=config.calibration)
        calibrations.append(fitted)
        before, after = fitted.before, fitted.after
        assert before is not None  # both are measured on the labelled set
        assert after is not None
        numbers = (before.auc, before.ece, after.ece, before.brier, after.brier)
        rows.append((judge.name, str(before.n), *(f"{number:.3f}" for number in numbers)))
    write_records(out, calibrations)
    return markdown_table(("judge", "n", "AUC", "ECE before", "after", "Brier before", "after"), rows)


def measure_judges(config: JudgeConfig, data: Path, *, limit: int) -> list[dict[str, Any]]:
    """Measure each judge on labelled answers that nothing else uses.

    Returns one row for each judge: AUC from the finding's own crop ("oracle") and from random crops, and the expected
    calibration error (10 bins) over both, raw and calibrated.
    """
    references = {reference.question: reference for reference in load_references(data)}
    all_questions = join_references(
        StudyIndex(data), iter_single_image(islice(load_questions(data), limit)), references
    )
    questions = [question for question in all_questions if question.reference.boxes]
    judges = [load_judge(spec, dtype=config.dtype) for spec in config.judges]
    curves = {judge.digest: make_identity_calibration(judge.digest) for judge in judges}
    if config.calibration_path:
        names = {judge.digest: judge.name for judge in judges}
        curves = read_calibrations(config.calibration_path, names, method=config.calibration)
    oracle, random = (
        list(draw_labelled_answers(questions, seed=1, region_truth=truth, whole=0.0, among=all_questions))
        for truth in (1.0, 0.0)
    )
    rows = []
    for judge in judges:
        oracle_p_N, oracle_y_N = _score_answers(judge, oracle, data, config)
        random_p_N, random_y_N = _score_answers(judge, random, data, config)
        p_N, y_N = np.concatenate([oracle_p_N, random_p_N]), np.concatenate([oracle_y_N, random_y_N])
        calibrated_N = np.array([curves[judge.digest].calibrate_score(float(score)) for score in p_N])
        rows.append(
            {
                "name": judge.name,
                "auc_oracle": measure_reliability(oracle_p_N, oracle_y_N).auc,
                "auc_random": measure_reliability(random_p_N, random_y_N).auc,
                "ece_raw": measure_reliability(p_N, y_N).ece,
                "ece": measure_reliability(calibrated_N, y_N).ece,
                "n": len(p_N),
            }
        )
    return rows


def _rate_answers(
    judge: Judge, answers: Sequence[LabelledAnswer], data: Path, config: JudgeConfig
) -> list[float | None]:
    """The judge's P(yes) for each answer; None where it gave no score."""
    requests = []
    for answer in answers:
        labelled = answer.labelled_question
        requests.append(
            JudgeRequest(
                candidate=labelled.question.id,
                study=labelled.study,
                question=labelled.question.asked_text,
                box=answer.box,
                answer=answer.answer,
                reference=labelled.reference.answer,
            )
        )
    style = get_judge_style(config, judge.name)
    return [reply.score for reply in rate_requests(judge, style, requests, data, build_retry_policy(config))]


def _score_answers(
    judge: Judge, answers: Sequence[LabelledAnswer], data: Path, config: JudgeConfig
) -> tuple[Floats, Floats]:
    """(scores, labels: 1 for right and 0 for wrong) of the answers; raises InvalidInput if a score is missing."""
    scores = _rate_answers(judge, answers, data, config)
    missing = sum(score is None for score in scores)
    if missing:
        raise InvalidInput(f"judge {judge.name}: {missing} of {len(scores)} labelled answers got no score")
    return np.array(scores, dtype=np.float64), np.array([answer.right for answer in answers], dtype=np.float64)
