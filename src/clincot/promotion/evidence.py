"""Evidence of a decision: the answers of champion, challenger, base and blind baseline to the same questions.

Each question becomes a row, stored in evidence.jsonl; each metric of the gate becomes a vector of differences over the
rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from clincot.datasets.closed_answers import is_abstention
from clincot.evaluation.benchmark import Benchmark
from clincot.evaluation.benchmark_report import asks_about_absent_finding
from clincot.evaluation.paired import Side
from clincot.evaluation.vqa import answer_length, says_yes, token_set_f1
from clincot.fields import FrozenModel, NonEmptyStr, UnitFloat
from clincot.geometry import Box
from clincot.promotion.cluster_tests import FloatArray, compute_totals, tabulate_clusters
from clincot.promotion.verdict import EvidenceSums
from clincot.records import GateFinding, Outcome, Question, Record, Reference
from clincot.text import normalize_text

GAIN_METRIC = "accuracy"
LOWER_IS_BETTER = frozenset({"hallucination", "abstention", "answer_length"})
GUARD_METRICS = ("closed_accuracy", "open_f1", "hit_rate", "hallucination", "abstention", "answer_length")
_MIN_CLOSED_QUESTIONS = 20  # from this many closed questions on, always giving the same answer is a fault


class SideAnswer(FrozenModel):
    """One side's answer to one question."""

    answer: str
    correct: bool | None
    box: Box
    hit: bool | None
    f1: UnitFloat | None  # token-set F1 (strict); None unless the question is open


class EvidenceRow(Record):
    """A held-out question with every side's answer."""

    prefix: ClassVar[str] = "evidence"

    question: NonEmptyStr
    reference: NonEmptyStr
    cluster: NonEmptyStr  # the patient, or the study if the patient is unknown
    answer: NonEmptyStr  # the answer key's
    kind: NonEmptyStr
    sides: Annotated[dict[str, SideAnswer], Field(min_length=1)]  # "champion", "challenger", "base", "blind"


@dataclass(frozen=True)
class Sides:
    """The compared sides and the questions that they are compared on."""

    benchmark: Benchmark
    questions: tuple[str, ...]  # ids
    sides: Mapping[str, Side]  # by name: "champion", "challenger" and "blind" always, "base" if it is shown

    def iter_rows(self) -> Iterator[EvidenceRow]:
        """Yield the row of every question."""
        for question_id in self.questions:
            question, reference = self._question_with_reference(question_id)
            yield EvidenceRow(
                question=question_id,
                reference=reference.id,
                cluster=self.benchmark.clusters[question_id],
                answer=reference.answer,
                kind=question.kind,
                sides={
                    name: _build_side_answer(side.outcomes[question_id], question, reference)
                    for name, side in self.sides.items()
                    if question_id in side.outcomes
                },
            )

    def metric_values(self, side: str, metric: str) -> FloatArray:
        """Return the side's metric for every question (N,); NaN if it is unscored or does not apply."""
        outcomes = self.sides[side].outcomes
        return np.array(
            [_metric_value(metric, outcomes[q], *self._question_with_reference(q)) for q in self.questions],
            dtype=np.float64,
        )

    def applicable_mask(self, metric: str) -> NDArray[np.bool_]:
        """Return for every question whether the metric applies to it (N,)."""
        return np.array(
            [_metric_applies(metric, *self._question_with_reference(q)) for q in self.questions], dtype=np.bool_
        )

    def cluster_indices(self) -> NDArray[np.intp]:
        """Return the index of every question's patient (N,), from 0."""
        return np.unique([self.benchmark.clusters[q] for q in self.questions], return_inverse=True)[1]

    def paired_differences(self, metric: str, other: str = "champion") -> tuple[FloatArray, NDArray[np.intp]]:
        """Return challenger minus `other` and the cluster index, for the questions that the metric applies to."""
        applies = self.applicable_mask(metric)
        differences = self.metric_values("challenger", metric) - self.metric_values(other, metric)
        return differences[applies], self.cluster_indices()[applies]

    def sum_evidence(self) -> EvidenceSums:
        """Compute the sums that `verdict.run_checks` needs, signed so that higher is better."""
        gain, clusters = self.paired_differences(GAIN_METRIC)
        guards = {}
        for metric in GUARD_METRICS:
            values, guard_clusters = self.paired_differences(metric)
            guards[metric] = compute_totals(-values if metric in LOWER_IS_BETTER else values, guard_clusters)
        over_blind, _ = self.paired_differences(GAIN_METRIC, "blind")
        return EvidenceSums(
            compute_totals(gain, clusters),
            tabulate_clusters(gain, clusters),
            guards,
            compute_totals(over_blind, clusters),
        )

    def _question_with_reference(self, question: str) -> tuple[Question, Reference]:
        return self.benchmark.questions[question], self.benchmark.references[question]


def count_applicable_questions(metric: str, benchmark: Benchmark, questions: Collection[str]) -> int:
    """Count the questions to which a guarded metric applies."""
    return sum(
        _metric_applies(metric, benchmark.questions[question], benchmark.references[question]) for question in questions
    )


def _metric_applies(metric: str, question: Question, reference: Reference) -> bool:
    match metric:
        case "closed_accuracy":
            return question.kind == "closed"
        case "open_f1":
            return question.kind == "open"
        case "hit_rate":
            return bool(reference.boxes)
        case "hallucination":
            return asks_about_absent_finding(question, reference)
    return True


def _metric_value(metric: str, outcome: Outcome, question: Question, reference: Reference) -> float:
    """Return an outcome's metric, NaN if it is unscored; abstention always has a value, as unscored counts as one."""
    if metric == "abstention":
        return float(_is_abstention(outcome))
    if metric == "hit_rate":
        return float("nan") if outcome.hit is None else float(outcome.hit)
    if outcome.correct is None:
        return float("nan")
    match metric:
        case "open_f1":
            return token_set_f1(outcome.answer, reference.answer)
        case "hallucination":
            return float(says_yes(outcome.answer))
        case "answer_length":
            return float(answer_length(outcome.answer))
    return float(outcome.correct)


def _is_abstention(outcome: Outcome) -> bool:
    """Whether an answer is unreadable, empty or says that the policy does not know."""
    return outcome.correct is None or is_abstention(outcome.answer)


def _build_side_answer(outcome: Outcome, question: Question, reference: Reference) -> SideAnswer:
    scored = question.kind == "open" and outcome.correct is not None
    return SideAnswer(
        answer=outcome.answer,
        correct=outcome.correct,
        box=outcome.box,
        hit=outcome.hit,
        f1=token_set_f1(outcome.answer, reference.answer) if scored else None,
    )


def check_answers(sides: Sides, *, max_unscored: float, max_off_format: float) -> list[GateFinding]:
    """Check the answers themselves: unscored, off format, the same answer to everything, repeated questions.

    max_unscored, max_off_format: allowed shares, in [0, 1].
    """
    findings = []
    for name in ("champion", "challenger"):
        outcomes = [sides.sides[name].outcomes[question] for question in sides.questions]
        unscored = sum(outcome.correct is None for outcome in outcomes) / len(outcomes)
        severity: Literal["block", "ok"] = "block" if unscored > max_unscored else "ok"
        findings.append(
            GateFinding(
                name=f"{name} unscored",
                severity=severity,
                value=round(unscored, 6),
                threshold=max_unscored,
                reason=f"{unscored:.1%} of the {name}'s answers could not be scored; {max_unscored:.1%} are allowed.",
            )
        )
        findings.append(_check_one_answer(name, sides))
    return [*findings, _check_off_format(sides, max_off_format), _check_repeated_questions(sides)]


def _check_off_format(sides: Sides, allowed: float) -> GateFinding:
    """Warn about too many off-format answers; gate.py then keeps the champion but does not block."""
    outcomes = [sides.sides["challenger"].outcomes[question] for question in sides.questions]
    off = sum(outcome.off_format or outcome.correct is None for outcome in outcomes)
    share = off / len(outcomes)
    return GateFinding(
        name="off format",
        severity="warn" if share > allowed else "ok",
        value=round(share, 6),
        threshold=allowed,
        reason=f"{off} of the challenger's {len(outcomes)} answers are off format or unreadable "
        f"({share:.1%}): {'above' if share > allowed else 'within'} the {allowed:.1%} allowed.",
    )


def _check_one_answer(name: str, sides: Sides) -> GateFinding:
    """Check for a constant answer: "yes" to everything scores the share of the key that is "yes"."""
    closed = [question for question in sides.questions if sides.benchmark.questions[question].kind == "closed"]
    answers = {normalize_text(sides.sides[name].outcomes[question].answer) for question in closed}
    expected = {normalize_text(sides.benchmark.references[question].answer) for question in closed}
    constant = len(closed) >= _MIN_CLOSED_QUESTIONS and len(answers) == 1 and len(expected) > 1
    severity = "ok" if not constant else ("block" if name == "challenger" else "warn")
    reason = f"The {name} gives {len(answers)} different answers to {len(closed)} closed questions."
    if constant:
        reason = f"The {name} answers {next(iter(answers))!r} to all {len(closed)} closed questions: it does not look."
    return GateFinding.model_validate(
        {"name": f"{name} one answer", "severity": severity, "value": len(answers), "threshold": None, "reason": reason}
    )


def _check_repeated_questions(sides: Sides) -> GateFinding:
    """Check for a question about the same image under two ids, which would count twice."""
    first_ids: dict[tuple[str, str], str] = {}
    repeated: list[str] = []
    for question_id in sides.questions:
        question = sides.benchmark.questions[question_id]
        if first_ids.setdefault((question.study, normalize_text(question.text)), question_id) != question_id:
            repeated.append(question_id)
    named = f", first {repeated[0]}" if repeated else ""
    return GateFinding(
        name="asked twice",
        severity="block" if repeated else "ok",
        value=len(repeated),
        threshold=0,
        reason=f"{len(repeated)} benchmark questions repeat another one about the same image{named}.",
    )


def find_key_mismatches(sides: Mapping[str, Side], questions: Sequence[str]) -> list[str]:
    """Return the questions on which the sides were scored with different answer keys."""
    mismatches = []
    for question in questions:
        references = {side.outcomes[question].reference for side in sides.values() if question in side.outcomes}
        if len(references) > 1:
            mismatches.append(question)
    return mismatches
