"""What champion, challenger, base and the blind baseline answered to the same questions, side by side.

Each question becomes a row (evidence.jsonl keeps them), each metric of the gate a vector of differences over rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

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
ABSTENTION_PHRASES = frozenset(
    {"unknown", "unsure", "not sure", "i do not know", "i dont know", "cannot tell", "cannot say"}
)
_MIN_CLOSED_QUESTIONS = 20  # closed questions with both answers in the key, on which one answer alone is no answer


class SideAnswer(FrozenModel):
    """One side's answer to one question."""

    answer: str
    correct: bool | None
    box: Box
    hit: bool | None
    f1: UnitFloat | None  # open questions: token-set F1 (strict)


class EvidenceRow(Record):
    """A held-out question with every side's answer to it."""

    prefix: ClassVar[str] = "evidence"

    question: NonEmptyStr
    reference: NonEmptyStr
    cluster: NonEmptyStr  # the patient, or the study where the patient is not known
    answer: NonEmptyStr  # of the key
    kind: NonEmptyStr
    sides: Annotated[dict[str, SideAnswer], Field(min_length=1)]  # "champion", "challenger", "base", "blind"


@dataclass(frozen=True)
class Sides:
    """The sides that were compared, on `questions`."""

    benchmark: Benchmark
    questions: tuple[str, ...]
    sides: Mapping[str, Side]  # by name; "champion", "challenger" and "blind" are always there

    def iter_rows(self) -> Iterator[EvidenceRow]:
        for one in self.questions:
            question, reference = self.benchmark.questions[one], self.benchmark.references[one]
            yield EvidenceRow(
                question=one,
                reference=reference.id,
                cluster=self.benchmark.clusters[one],
                answer=reference.answer,
                kind=question.kind,
                sides={
                    name: _build_side_answer(side.outcomes[one], question, reference)
                    for name, side in self.sides.items()
                    if one in side.outcomes
                },
            )

    def metric_values(self, side: str, metric: str) -> FloatArray:
        """The metric of every question as a number; NaN where it is unscored or does not apply (see `applies`)."""
        outcomes = self.sides[side].outcomes
        return np.array(
            [_metric_value(metric, outcomes[q], *self._question_with_reference(q)) for q in self.questions],
            dtype=np.float64,
        )

    def applicable_mask(self, metric: str) -> NDArray[np.bool_]:
        return np.array(
            [_metric_applies(metric, *self._question_with_reference(q)) for q in self.questions], dtype=np.bool_
        )

    def cluster_indices(self) -> NDArray[np.intp]:
        return np.unique([self.benchmark.clusters[q] for q in self.questions], return_inverse=True)[1]

    def paired_differences(self, metric: str, other: str = "champion") -> tuple[FloatArray, NDArray[np.intp]]:
        """Challenger minus the other on the questions that the metric applies to, with their clusters."""
        kept = self.applicable_mask(metric)
        return (self.metric_values("challenger", metric) - self.metric_values(other, metric))[
            kept
        ], self.cluster_indices()[kept]

    def sum_evidence(self) -> EvidenceSums:
        """The sums that `verdict.weigh` needs, signed so that higher is better."""
        gain, clusters = self.paired_differences(GAIN_METRIC)
        guards = {}
        for metric in GUARD_METRICS:
            values, of = self.paired_differences(metric)
            guards[metric] = compute_totals(-values if metric in LOWER_IS_BETTER else values, of)
        over_blind, _ = self.paired_differences(GAIN_METRIC, "blind")
        return EvidenceSums(
            compute_totals(gain, clusters),
            tabulate_clusters(gain, clusters),
            guards,
            compute_totals(over_blind, clusters),
        )

    def _question_with_reference(self, question: str) -> tuple[Question, Reference]:
        return self.benchmark.questions[question], self.benchmark.references[question]


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
    """NaN where nothing could be read; an abstention is exactly that, so it always has a value."""
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
    """No answer that could be read, an empty one, or one that says that it does not know."""
    said = normalize_text(outcome.answer)
    return outcome.correct is None or not said or said in ABSTENTION_PHRASES


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
    """What is wrong with the answers themselves: too many unscored, off format, or one answer to everything."""
    found = []
    for name in ("champion", "challenger"):
        outcomes = [sides.sides[name].outcomes[question] for question in sides.questions]
        unscored = sum(outcome.correct is None for outcome in outcomes) / len(outcomes)
        severity: Literal["block", "ok"] = "block" if unscored > max_unscored else "ok"
        found.append(
            GateFinding(
                name=f"{name} unscored",
                severity=severity,
                value=round(unscored, 6),
                threshold=max_unscored,
                reason=f"{unscored:.1%} of the {name}'s answers could not be scored; {max_unscored:.1%} are allowed.",
            )
        )
        found.append(_check_one_answer(name, sides))
    return [*found, _check_off_format(sides, max_off_format), _check_repeated_questions(sides)]


def _check_off_format(sides: Sides, allowed: float) -> GateFinding:
    """A warning here: what it does to the verdict is in gate.py (a challenger above it is kept, not blocked)."""
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
    """A challenger that says "yes" to everything scores whatever share of the key is "yes"."""
    closed = [question for question in sides.questions if sides.benchmark.questions[question].kind == "closed"]
    said = {normalize_text(sides.sides[name].outcomes[question].answer) for question in closed}
    wanted = {normalize_text(sides.benchmark.references[question].answer) for question in closed}
    constant = len(closed) >= _MIN_CLOSED_QUESTIONS and len(said) == 1 and len(wanted) > 1
    severity = "ok" if not constant else ("block" if name == "challenger" else "warn")
    reason = f"The {name} gives {len(said)} different answers to {len(closed)} closed questions."
    if constant:
        reason = f"The {name} answers {next(iter(said))!r} to all {len(closed)} closed questions: it does not look."
    return GateFinding.model_validate(
        {"name": f"{name} one answer", "severity": severity, "value": len(said), "threshold": None, "reason": reason}
    )


def _check_repeated_questions(sides: Sides) -> GateFinding:
    """The same question about the same image under two ids would count twice."""
    seen: dict[tuple[str, str], str] = {}
    twice: list[str] = []
    for one in sides.questions:
        question = sides.benchmark.questions[one]
        if seen.setdefault((question.study, normalize_text(question.text)), one) != one:
            twice.append(one)
    named = f", first {twice[0]}" if twice else ""
    return GateFinding(
        name="asked twice",
        severity="block" if twice else "ok",
        value=len(twice),
        threshold=0,
        reason=f"{len(twice)} benchmark questions repeat another one about the same image{named}.",
    )


def find_key_mismatches(sides: Mapping[str, Side], questions: Sequence[str]) -> list[str]:
    """Questions that two sides were scored on with different answer keys."""
    return [
        question
        for question in questions
        if len({side.outcomes[question].reference for side in sides.values() if question in side.outcomes}) > 1
    ]
