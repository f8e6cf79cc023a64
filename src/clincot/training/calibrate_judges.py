"""Fit the judges' calibration on a small labelled set that no round and no benchmark shares."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clincot.config import JudgeConfig
from clincot.datasets.folder import StudyIndex, load_questions, load_references
from clincot.errors import InvalidInput
from clincot.jsonl import write_records
from clincot.judging.calibration import fit_calibration, make_identity_calibration, measure_reliability
from clincot.judging.labelled_answers import LabelledAnswer, draw_labelled_answers, join_references
from clincot.judging.panel import read_calibrations
from clincot.models.load import load_judge
from clincot.models.protocols import Judge
from clincot.prompts import judge_prompt

Floats = npt.NDArray[np.float64]


def fit_judge_calibrations(config: JudgeConfig, data: Path, out: Path, *, limit: int) -> str:
    """Write one calibration a judge to `out`; returns a table of each judge's reliability before and after.

    Each question is asked once, with its right answer or a wrong one, from a region as likely to miss as to hit, since
    that is what a panel gets to see. Raises CalibrationRefused where a judge cannot tell right from wrong.
    """
    if config.calibration == "identity":
        raise InvalidInput("judge.calibration is identity: there is nothing to fit; set it to platt or isotonic")
    references = {r.question: r for r in load_references(data)}
    studies = StudyIndex(data)
    lessons = join_references(studies, islice(load_questions(data), limit), references)
    asked: list[LabelledAnswer] = list(draw_labelled_answers(lessons, seed=0, region_truth=0.5, both=False))
    right = np.array([proposal.right for proposal in asked])
    calibrations, lines = (
        [],
        ["| judge | n | AUC | ECE before | after | Brier before | after |", "|---|---|---|---|---|---|---|"],
    )
    for spec in config.judges:
        judge = load_judge(spec)
        scores = judge.p_yes(
            [
                judge_prompt(
                    p.labelled_question.study,
                    data,
                    judge.views,
                    question=p.labelled_question.question.text,
                    answer=p.answer,
                    box=p.box,
                )
                for p in asked
            ]
        )
        fitted = fit_calibration(judge.digest, scores, right.tolist(), method=config.calibration)
        calibrations.append(fitted)
        before, after = fitted.before, fitted.after
        assert before is not None  # both are measured on the labelled set
        assert after is not None
        lines.append(
            f"| {judge.name} | {before.n} | {before.auc:.3f} | {before.ece:.3f} | {after.ece:.3f} "
            f"| {before.brier:.3f} | {after.brier:.3f} |"
        )
    write_records(out, calibrations)
    return "\n".join(lines)


def measure_judges(config: JudgeConfig, data: Path, *, limit: int) -> list[dict[str, Any]]:
    """Each judge on labelled answers that nothing else uses: AUC from the finding's own crop and from random crops, and
    expected calibration error (10 bins) over both, raw and calibrated."""
    references = {r.question: r for r in load_references(data)}
    everything = join_references(StudyIndex(data), islice(load_questions(data), limit), references)
    lessons = [lesson for lesson in everything if lesson.reference.boxes]
    judges = [load_judge(spec) for spec in config.judges]
    curves = {judge.digest: make_identity_calibration(judge.digest) for judge in judges}
    if config.calibration_path:
        names = {judge.digest: judge.name for judge in judges}
        curves = read_calibrations(config.calibration_path, names, method=config.calibration)
    rows = []
    for judge in judges:
        scored = {
            where: _score_answers(
                judge,
                list(draw_labelled_answers(lessons, seed=1, region_truth=truth, whole=0.0, among=everything)),
                data,
            )
            for where, truth in (("oracle", 1.0), ("random", 0.0))
        }
        p, right = (np.concatenate([scored[where][i] for where in scored]) for i in (0, 1))
        calibrated = np.array([curves[judge.digest].calibrate_score(float(score)) for score in p])
        rows.append(
            {
                "name": judge.name,
                "auc_oracle": measure_reliability(*scored["oracle"]).auc,
                "auc_random": measure_reliability(*scored["random"]).auc,
                "ece_raw": measure_reliability(p, right).ece,
                "ece": measure_reliability(calibrated, right).ece,
                "n": len(p),
            }
        )
    return rows


def _score_answers(judge: Judge, asked: list[LabelledAnswer], data: Path) -> tuple[Floats, Floats]:
    """(scores, 1 for right and 0 for wrong) of the proposals; a judge that cannot score one is an error here."""
    scores = judge.p_yes(
        [
            judge_prompt(
                p.labelled_question.study,
                data,
                judge.views,
                question=p.labelled_question.question.text,
                answer=p.answer,
                box=p.box,
            )
            for p in asked
        ]
    )
    missing = sum(score is None for score in scores)
    if missing:
        raise InvalidInput(f"judge {judge.name}: {missing} of {len(scores)} labelled answers got no score")
    return np.array(scores, dtype=np.float64), np.array([p.right for p in asked], dtype=np.float64)
