"""Paired comparison of two sets of outcomes for the same questions.

Pairing by question removes what both sides share, the difficulty of the question, which is most of the variance.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from clincot.evaluation.benchmark import BadBenchmark
from clincot.evaluation.intervals import paired_difference
from clincot.records import Interval, Outcome

PairedMetric = Literal["correct", "hit", "iou", "off_format"]
_MAX_NAMED = 3  # questions that a message names; the rest are counted


@dataclass(frozen=True)
class Side:
    """One side's outcomes by question id, and a sentence for each problem with them."""

    outcomes: Mapping[str, Outcome]
    problems: tuple[str, ...]


def index_outcomes(name: str, outcomes: Iterable[Outcome], clusters: Mapping[str, str]) -> Side:
    """Index outcomes by question and report as problems what breaks one outcome for each question.

    name: how the problems call this side. clusters: {question id: patient} of all questions. A repeated, missing or
    unknown question is a problem, and so is a score other than True, False or None.
    """
    by_question: dict[str, Outcome] = {}
    repeated: list[str] = []
    foreign: list[str] = []
    unreadable: list[str] = []
    for outcome in outcomes:
        if outcome.question in by_question:
            repeated.append(outcome.question)
        elif outcome.question not in clusters:
            foreign.append(outcome.question)
        elif outcome.correct is not None and not isinstance(outcome.correct, bool):  # NaN, from model_construct
            unreadable.append(outcome.question)
        by_question.setdefault(outcome.question, outcome)
    missing = [question for question in clusters if question not in by_question]
    problems = (
        _describe_problem(f"The {name} answered twice", repeated),
        _describe_problem(f"The {name} answered outside the benchmark", foreign),
        _describe_problem(f"The {name} gave no answer to", missing),
        _describe_problem(f"The {name} has a score that is neither true, false nor unscored for", unreadable),
    )
    return Side(outcomes=by_question, problems=tuple(problem for problem in problems if problem))


def compare_outcomes(
    a: Iterable[Outcome],
    b: Iterable[Outcome],
    clusters: Mapping[str, str],
    *,
    metric: PairedMetric = "correct",
    seed: int,
    resamples: int = 2000,
) -> Interval:
    """Return the mean of a - b in one metric with its 95 % interval, clustered by patient.

    a, b: the outcomes of one policy in one arm each. clusters: {question id: patient}. A None on either side is
    unscored. Raises BadBenchmark, naming questions, unless each side answered every question of `clusters` once.
    """
    first, second = index_outcomes("first side", a, clusters), index_outcomes("second side", b, clusters)
    if first.problems or second.problems:
        raise BadBenchmark(" ".join([*first.problems, *second.problems]))
    return compare_sides(first, second, clusters, metric=metric, seed=seed, resamples=resamples)


def compare_sides(
    first: Side, second: Side, clusters: Mapping[str, str], *, metric: PairedMetric, seed: int, resamples: int
) -> Interval:
    """Compare two sides that have no problems; see `compare_outcomes`."""
    return paired_difference(
        [getattr(first.outcomes[question], metric) for question in clusters],
        [getattr(second.outcomes[question], metric) for question in clusters],
        clusters.values(),
        seed=seed,
        resamples=resamples,
    )


def _describe_problem(what: str, questions: list[str]) -> str:
    if not questions:
        return ""
    named = ", ".join(questions[:_MAX_NAMED])
    more = f" and {len(questions) - _MAX_NAMED} more" if len(questions) > _MAX_NAMED else ""
    return f"{what} {len(questions)} question{'s' if len(questions) > 1 else ''}: {named}{more}."
