"""Fit the judges' calibration on a small labelled set that no round and no benchmark shares."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np

from clincot.config import JudgeSection
from clincot.conversation import judgement
from clincot.datasets.folder import StudyIndex, load_questions, load_references
from clincot.jsonl import write_records
from clincot.judge.calibration import fit_calibration
from clincot.models.load import load_judge
from clincot.train.lessons import Proposal, join, proposals


def calibrate(section: JudgeSection, data: Path, out: Path, *, limit: int) -> str:
    """Write one calibration a judge to `out`; returns a table of each judge's reliability before and after.

    Each question is asked once, with its right answer or a wrong one, from a region as likely to miss as to hit, since
    that is what a panel gets to see. Raises CalibrationRefused where a judge cannot tell right from wrong.
    """
    if section.calibration == "identity":
        raise ValueError("judge.calibration is identity: there is nothing to fit; set it to platt or isotonic")
    references = {r.question: r for r in load_references(data)}
    studies = StudyIndex(data)
    lessons = join(studies, islice(load_questions(data), limit), references)
    asked: list[Proposal] = list(proposals(lessons, seed=0, region_truth=0.5, both=False))
    right = np.array([proposal.right for proposal in asked])
    calibrations, lines = (
        [],
        ["| judge | n | AUC | ECE before | after | Brier before | after |", "|---|---|---|---|---|---|---|"],
    )
    for spec in section.judges:
        judge = load_judge(spec)
        scores = judge.p_yes(
            [judgement(p.lesson.study, data, judge.views, question=p.lesson.question.text, answer=p.answer, box=p.box)
             for p in asked]
        )  # fmt: skip
        fitted = fit_calibration(judge.digest, scores, right.tolist(), method=section.calibration)
        calibrations.append(fitted)
        before, after = fitted.before, fitted.after
        assert before is not None and after is not None  # both are measured on the labelled set
        lines.append(
            f"| {judge.name} | {before.n} | {before.auc:.3f} | {before.ece:.3f} | {after.ece:.3f} "
            f"| {before.brier:.3f} | {after.brier:.3f} |"
        )
    write_records(out, calibrations)
    return "\n".join(lines)
