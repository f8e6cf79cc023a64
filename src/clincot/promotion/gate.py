"""The gate: whether the challenger takes the champion's place, as one record with every number behind it.

`promote` only if every check of promotion/verdict.py passes at the level of the lifetime budget (promotion/error_budget.py), at
most `max_off_format` of the challenger's answers are off format, and nothing blocks. Otherwise `keep`. `blocked` when
the comparison itself cannot be trusted: no questions, answers missing or doubled, NaN, too many unscored, a leak, a
broken judge, a worn-out benchmark, a ledger that cannot be read. A blocked decision tests nothing and spends nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from clincot.config import DecideSection
from clincot.evaluation.benchmark import Benchmark
from clincot.evaluation.intervals import APPROXIMATE_BELOW
from clincot.evaluation.paired import Side, side_of
from clincot.promotion import evidence as sides_module
from clincot.promotion.checks import check_of, interval_of
from clincot.promotion.cluster_tests import FEWEST_CLUSTERS
from clincot.promotion.error_budget import next_test
from clincot.promotion.evidence import GAIN, LOWER_IS_BETTER, Sides, matched
from clincot.promotion.ledger import Asked, Ledger, Spending
from clincot.promotion.verdict import Demands, Evidence, Weighed, promotes, weigh
from clincot.records import Budget, Decision, Finding, Interval, Outcome, Reuse, digest_of

METRIC = "accuracy (strict)"
NOTHING = Interval(value=None, n=0)
_NO_LEDGER = (
    "No ledger was given, so this is taken for the pipeline's first test; a recurring pipeline has to keep one."
)


@dataclass(frozen=True)
class Case:
    """What is to be decided. Outcomes of other policies or arms are passed over, so whole files may be given."""

    champion: str  # the policies' digests
    challenger: str
    champion_outcomes: Iterable[Outcome]
    challenger_outcomes: Iterable[Outcome]
    blind_outcomes: Iterable[Outcome]  # BlindBaseline.outcomes
    base: str = ""  # "": no base policy is shown beside the two
    base_outcomes: Iterable[Outcome] = ()
    ledger: Ledger = field(default_factory=Ledger)
    findings: Sequence[Finding] = ()  # of the data and the judges
    problems: Sequence[str] = ()  # why something that was to be looked at could not be
    inputs: Mapping[str, str] = field(default_factory=dict)  # {input: sha256}, for the record


@dataclass(frozen=True)
class Gated:
    """The decision; what goes into the ledgers (None where nothing was tested); what was compared."""

    decision: Decision
    spending: Spending | None
    asked: Asked | None
    sides: Sides | None


def decide(case: Case, benchmark: Benchmark, section: DecideSection) -> Gated:
    """Never raises on bad evidence: what is wrong becomes a reason of a `blocked` decision."""
    old, new = (
        side_of(name, _of(outcomes, policy, section.arm), benchmark.clusters)
        for name, outcomes, policy in (
            ("champion", case.champion_outcomes, case.champion),
            ("challenger", case.challenger_outcomes, case.challenger),
        )
    )
    blind = side_of("blind baseline", case.blind_outcomes, benchmark.clusters)
    given = {"champion": old, "challenger": new, "blind": blind}
    if case.base:
        given["base"] = side_of("base", _of(case.base_outcomes, case.base, section.arm), benchmark.clusters)
    problems = [*case.problems, *_problems(given, benchmark, section)]
    if problems:
        return Gated(_blocked(case, benchmark, section, problems), None, None, None)
    compared = _digest(case, benchmark, given, section)
    ledger = case.ledger.before(compared)
    questions, reuse, problems = _questions(case, ledger, benchmark, section)
    if not questions and not problems:
        reason = (
            "The challenger was already compared with this champion on these questions; asking them again tells "
            "nothing new. Ask it new questions, or train another challenger."
        )
        return Gated(_decision(case, benchmark, section, "keep", [reason], reuse=reuse), None, None, None)
    if problems:
        return Gated(_blocked(case, benchmark, section, problems, reuse=reuse), None, None, None)
    sides = Sides(benchmark, tuple(questions), given)
    found = sides_module.findings(sides, max_unscored=section.max_unscored, max_off_format=section.max_off_format)
    found = [*case.findings, *found]
    look = sides.evidence()
    blocking = [finding.reason for finding in found if finding.severity == "block"] + _too_little(look)
    if blocking:
        decision = _blocked(case, benchmark, section, blocking, found, reuse=reuse)
        return Gated(decision, None, None, sides)
    return _tested(case, section, sides, look, ledger, reuse, found, compared)


def _tested(
    case: Case,
    section: DecideSection,
    sides: Sides,
    look: Evidence,
    ledger: Ledger,
    reuse: Reuse,
    found: Sequence[Finding],
    compared: str,
) -> Gated:
    pair = (case.champion, case.challenger)
    budget = next_test(ledger.spent, pair, lifetime=section.lifetime_error)
    pooled = look
    for earlier in ledger.looks(pair):
        pooled = earlier.sums + pooled
    weighed = weigh(pooled, demands(section), level=budget.level)
    off_format = next(finding for finding in found if finding.name == "off format")
    passed = promotes(weighed) and off_format.severity == "ok"
    verdict: Literal["promote", "keep"] = "promote" if passed else "keep"
    checks = [check_of(check, sides, section, budget.level) for check in weighed]
    reasons = [check.reason for check in checks]
    reasons.insert(1, off_format.reason)
    reasons += [f"Warning: {f.reason}" for f in found if f.severity == "warn" and f is not off_format]
    reasons += [_budget_reason(budget), *_cautions(weighed, case.ledger, reuse)]
    decision = _decision(case, sides.benchmark, section, verdict, reasons, found, reuse).model_copy(
        update={
            "id": "",
            "checks": tuple(checks),
            "budget": budget,
            "difference": checks[0].difference,
            "base": interval_of(sides, GAIN, section, other="base") if "base" in sides.sides else None,
            "evidence": compared,
        }
    )
    decision = Decision.model_validate(decision.model_dump())  # with the id of its whole content
    spending = Spending(
        evidence=compared,
        champion=case.champion,
        challenger=case.challenger,
        benchmark=sides.benchmark.digest,
        verdict=verdict,
        budget=budget,
        gain=look.gain,
        gain_rows=look.gain_rows,
        guards=dict(look.guards),
        blind=look.blind,
    )
    asked = Asked(
        evidence=compared, number=budget.number, slice=reuse.slice, slices=reuse.slices, questions=sides.questions
    )
    return Gated(decision, spending, asked, sides)


def demands(section: DecideSection) -> Demands:
    return Demands(min_gain=section.min_gain, floors=section.floors.given, unbounded=frozenset({"answer_length"}))


def slice_of(cluster: str, slices: int) -> int:
    """The slice (from 1) that a patient's questions belong to: a hash, so that new patients move no other."""
    return 1 + int.from_bytes(hashlib.sha256(f"slice:{cluster}".encode()).digest()[:8]) % slices


def _of(outcomes: Iterable[Outcome], policy: str, arm: str) -> Iterable[Outcome]:
    return (outcome for outcome in outcomes if outcome.policy == policy and outcome.arm == arm)


def _digest(case: Case, benchmark: Benchmark, given: Mapping[str, Side], section: DecideSection) -> str:
    """Of all that the verdict rests on, but for the ledger."""
    answers = {
        name: digest_of(sorted([outcome.id, outcome.correct, outcome.hit] for outcome in side.outcomes.values()))
        for name, side in given.items()
    }
    return digest_of([case.champion, case.challenger, benchmark.digest, section.model_dump(mode="json"), answers])


def _problems(given: Mapping[str, Side], benchmark: Benchmark, section: DecideSection) -> list[str]:
    """Why nothing can be compared; empty when it can."""
    if not benchmark.questions:
        return ["The benchmark is empty: there is no question to compare the two on."]
    numbers = {"min_gain": section.min_gain, "max_off_format": section.max_off_format, **section.floors.given}
    problems = [
        f"{name} is {value}, which no result can be compared with."
        for name, value in numbers.items()
        if not math.isfinite(value)
    ]
    unclustered = [question for question, patient in benchmark.clusters.items() if not patient]
    if unclustered:
        problems.append(f"{len(unclustered)} questions belong to no patient, first {unclustered[0]}.")
    problems += [problem for side in given.values() for problem in side.problems]
    keyed = matched(given, list(benchmark.questions))
    if keyed:
        problems.append(f"The answer key differs between the sides for {len(keyed)} questions, first {keyed[0]}.")
    return problems


def _questions(
    case: Case, ledger: Ledger, benchmark: Benchmark, section: DecideSection
) -> tuple[list[str], Reuse, list[str]]:
    """This decision's questions: its slice, without the worn ones and without patients of earlier looks at the pair."""
    changed = [entry.budget.lifetime for entry in ledger.spent if entry.budget.lifetime != section.lifetime_error]
    if changed:
        now = f"decide.lifetime_error is {section.lifetime_error:g}"
        problem = f"{now}, but the ledger was begun with {changed[0]:g}; a pipeline has one budget for its lifetime."
        return [], _reuse(ledger, 1, [], [], section), [problem]
    number = 1 + len(ledger.spent) % section.slices
    uses, seen = ledger.uses(), ledger.asked_of((case.champion, case.challenger))
    patients = {benchmark.clusters[question] for question in seen if question in benchmark.clusters}
    mine = [q for q, patient in benchmark.clusters.items() if slice_of(patient, section.slices) == number]
    new = [q for q in mine if q not in seen and benchmark.clusters[q] not in patients]
    kept = [question for question in new if uses[question] < section.max_uses]
    problems = []
    if new and not kept:
        problems.append(
            f"All {len(new)} questions of slice {number} have been decided on {section.max_uses} times: the benchmark "
            "is worn out, since challengers are bred on its verdicts. Add new questions, or raise decide.max_uses."
        )
    if not mine:
        problems.append(f"Slice {number} of {section.slices} has no patient; choose fewer decide.slices.")
    return kept, _reuse(ledger, number, kept, new, section), problems


def _reuse(ledger: Ledger, number: int, kept: Sequence[str], new: Sequence[str], section: DecideSection) -> Reuse:
    uses = ledger.uses()
    return Reuse(
        slice=number,
        slices=section.slices,
        questions=len(kept),
        fresh=sum(uses[question] == 0 for question in kept),
        worn=len(new) - len(kept),
        most_uses=max((uses[question] + 1 for question in kept), default=0),
        allowed=section.max_uses,
    )


def _too_little(look: Evidence) -> list[str]:
    reasons = []
    for totals, other in ((look.gain, "champion"), (look.blind, "blind baseline")):
        if totals.n == 0:
            reasons.append(
                f"No question is scored for both the challenger and the {other}: all {totals.n_unscored} unscored."
            )
        elif totals.clusters < FEWEST_CLUSTERS:
            reasons.append(
                f"Challenger and {other} are compared on {totals.clusters} patients; "
                f"with fewer than {FEWEST_CLUSTERS} even a unanimous result can be chance."
            )
    return reasons


def _budget_reason(budget: Budget) -> str:
    passed_on = f", of which {budget.passed_on:.4f} was passed on by a promotion" if budget.passed_on else ""
    return (
        f"Every check is tested at level {budget.level:.5f}: look {budget.look} at challenger "
        f"{budget.challenger_number}, which has {budget.challenger_level:.4f}{passed_on}, of a lifetime budget of "
        f"{budget.lifetime:g}, {budget.spent_before:.4f} of it spent before."
    )


def _cautions(weighed: Sequence[Weighed], ledger: Ledger, reuse: Reuse) -> list[str]:
    clusters = weighed[0].totals.clusters
    cautions = []
    if clusters < APPROXIMATE_BELOW:
        cautions.append(f"The intervals are approximate: {clusters} patients, fewer than {APPROXIMATE_BELOW}.")
    if ledger.folder is None:
        cautions.append(_NO_LEDGER)
    if reuse.fresh < reuse.questions:
        cautions.append(
            f"{reuse.questions - reuse.fresh} of the {reuse.questions} questions have been decided on before, "
            f"{reuse.most_uses} times at most with this one ({reuse.allowed} allowed): "
            "challengers may have been bred on them."
        )
    return cautions


def _blocked(
    case: Case,
    benchmark: Benchmark,
    section: DecideSection,
    reasons: Sequence[str],
    found: Sequence[Finding] | None = None,
    *,
    reuse: Reuse | None = None,
) -> Decision:
    found = case.findings if found is None else found
    reasons = [*reasons, *(f.reason for f in found if f.severity == "block" and f.reason not in reasons)]
    return _decision(case, benchmark, section, "blocked", reasons, found, reuse)


def _decision(
    case: Case,
    benchmark: Benchmark,
    section: DecideSection,
    verdict: Literal["promote", "keep", "blocked"],
    reasons: Sequence[str],
    found: Sequence[Finding] = (),
    reuse: Reuse | None = None,
) -> Decision:
    return Decision(
        champion=case.champion,
        challenger=case.challenger,
        benchmark=benchmark.digest,
        metric=f"{METRIC}, arm {section.arm}",
        difference=NOTHING,
        verdict=verdict,
        reasons=tuple(reasons),
        findings=tuple(found),
        reuse=reuse,
        inputs=dict(case.inputs),
        settings=section.model_dump(mode="json"),
    )


__all__ = ["FEWEST_CLUSTERS", "LOWER_IS_BETTER", "Case", "Gated", "decide", "demands", "slice_of"]
