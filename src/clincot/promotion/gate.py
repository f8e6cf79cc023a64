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

from clincot.config import DecideConfig
from clincot.evaluation.benchmark import Benchmark
from clincot.evaluation.intervals import MIN_RELIABLE_CLUSTERS
from clincot.evaluation.paired import Side, index_outcomes
from clincot.promotion import evidence as sides_module
from clincot.promotion.checks import bootstrap_difference, build_check
from clincot.promotion.cluster_tests import MIN_CLUSTERS
from clincot.promotion.error_budget import next_level
from clincot.promotion.evidence import GAIN_METRIC, Sides, find_key_mismatches
from clincot.promotion.ledger import BudgetEntry, Ledger, QuestionsUsed
from clincot.promotion.verdict import CheckResult, EvidenceSums, PromotionCriteria, run_checks, should_promote
from clincot.records import BenchmarkReuse, Budget, Decision, GateFinding, Interval, Outcome, hash_json

GATE_METRIC = "accuracy (strict)"
NO_INTERVAL = Interval(value=None, n=0)
_NO_LEDGER_CAUTION = (
    "No ledger was given, so this is taken for the pipeline's first test; a recurring pipeline has to keep one."
)


@dataclass(frozen=True)
class Comparison:
    """What is to be decided. Outcomes of other policies or arms are passed over, so whole files may be given."""

    champion: str  # the policies' digests
    challenger: str
    champion_outcomes: Iterable[Outcome]
    challenger_outcomes: Iterable[Outcome]
    blind_outcomes: Iterable[Outcome]  # BlindBaseline.outcomes
    base: str = ""  # "": no base policy is shown beside the two
    base_outcomes: Iterable[Outcome] = ()
    ledger: Ledger = field(default_factory=Ledger)
    findings: Sequence[GateFinding] = ()  # of the data and the judges
    problems: Sequence[str] = ()  # why something that was to be looked at could not be
    inputs: Mapping[str, str] = field(default_factory=dict)  # {input: sha256}, for the record


@dataclass(frozen=True)
class GateResult:
    """The decision; what goes into the ledgers (None where nothing was tested); what was compared."""

    decision: Decision
    spending: BudgetEntry | None
    asked: QuestionsUsed | None
    sides: Sides | None


def run_gate(case: Comparison, benchmark: Benchmark, config: DecideConfig) -> GateResult:
    """Never raises on bad evidence: what is wrong becomes a reason of a `blocked` decision."""
    old, new = (
        index_outcomes(name, _select_outcomes(outcomes, policy, config.arm), benchmark.clusters)
        for name, outcomes, policy in (
            ("champion", case.champion_outcomes, case.champion),
            ("challenger", case.challenger_outcomes, case.challenger),
        )
    )
    blind = index_outcomes("blind baseline", case.blind_outcomes, benchmark.clusters)
    given = {"champion": old, "challenger": new, "blind": blind}
    if case.base:
        given["base"] = index_outcomes(
            "base", _select_outcomes(case.base_outcomes, case.base, config.arm), benchmark.clusters
        )
    problems = [*case.problems, *_find_problems(given, benchmark, config)]
    if problems:
        return GateResult(_build_blocked_decision(case, benchmark, config, problems), None, None, None)
    compared = _hash_comparison(case, benchmark, given, config)
    ledger = case.ledger.rewind_ledger(compared)
    questions, reuse, problems = _select_questions(case, ledger, benchmark, config)
    if not questions and not problems:
        reason = (
            "The challenger was already compared with this champion on these questions; asking them again tells "
            "nothing new. Ask it new questions, or train another challenger."
        )
        return GateResult(_build_decision(case, benchmark, config, "keep", [reason], reuse=reuse), None, None, None)
    if problems:
        return GateResult(_build_blocked_decision(case, benchmark, config, problems, reuse=reuse), None, None, None)
    sides = Sides(benchmark, tuple(questions), given)
    found = sides_module.check_answers(sides, max_unscored=config.max_unscored, max_off_format=config.max_off_format)
    found = [*case.findings, *found]
    look = sides.sum_evidence()
    blocking = [finding.reason for finding in found if finding.severity == "block"] + _find_thin_evidence(look)
    if blocking:
        decision = _build_blocked_decision(case, benchmark, config, blocking, found, reuse=reuse)
        return GateResult(decision, None, None, sides)
    return _test_challenger(case, config, sides, look, ledger, reuse, found, compared)


def _test_challenger(
    case: Comparison,
    config: DecideConfig,
    sides: Sides,
    look: EvidenceSums,
    ledger: Ledger,
    reuse: BenchmarkReuse,
    found: Sequence[GateFinding],
    compared: str,
) -> GateResult:
    pair = (case.champion, case.challenger)
    budget = next_level(ledger.spent, pair, lifetime=config.lifetime_error)
    pooled = look
    for earlier in ledger.find_looks(pair):
        pooled = earlier.sums + pooled
    weighed = run_checks(pooled, build_criteria(config), level=budget.level)
    off_format = next(finding for finding in found if finding.name == "off format")
    passed = should_promote(weighed) and off_format.severity == "ok"
    verdict: Literal["promote", "keep"] = "promote" if passed else "keep"
    checks = [build_check(check, sides, config, budget.level) for check in weighed]
    reasons = [check.reason for check in checks]
    reasons.insert(1, off_format.reason)
    reasons += [f"Warning: {f.reason}" for f in found if f.severity == "warn" and f is not off_format]
    reasons += [_explain_budget(budget), *_list_cautions(weighed, case.ledger, reuse)]
    decision = _build_decision(case, sides.benchmark, config, verdict, reasons, found, reuse).model_copy(
        update={
            "id": "",
            "checks": tuple(checks),
            "budget": budget,
            "difference": checks[0].difference,
            "base": bootstrap_difference(sides, GAIN_METRIC, config, other="base") if "base" in sides.sides else None,
            "evidence": compared,
        }
    )
    decision = Decision.model_validate(decision.model_dump())  # with the id of its whole content
    spending = BudgetEntry(
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
    asked = QuestionsUsed(
        evidence=compared, number=budget.number, slice=reuse.slice, slices=reuse.slices, questions=sides.questions
    )
    return GateResult(decision, spending, asked, sides)


def build_criteria(config: DecideConfig) -> PromotionCriteria:
    return PromotionCriteria(
        min_gain=config.min_gain, floors=config.floors.enabled, unbounded=frozenset({"answer_length"})
    )


def assign_slice(cluster: str, slices: int) -> int:
    """The slice (from 1) that a patient's questions belong to: a hash, so that new patients move no other."""
    return 1 + int.from_bytes(hashlib.sha256(f"slice:{cluster}".encode()).digest()[:8]) % slices


def _select_outcomes(outcomes: Iterable[Outcome], policy: str, arm: str) -> Iterable[Outcome]:
    return (outcome for outcome in outcomes if outcome.policy == policy and outcome.arm == arm)


def _hash_comparison(case: Comparison, benchmark: Benchmark, given: Mapping[str, Side], config: DecideConfig) -> str:
    """Of all that the verdict rests on, but for the ledger."""
    answers = {
        name: hash_json(sorted([outcome.id, outcome.correct, outcome.hit] for outcome in side.outcomes.values()))
        for name, side in given.items()
    }
    return hash_json([case.champion, case.challenger, benchmark.digest, config.model_dump(mode="json"), answers])


def _find_problems(given: Mapping[str, Side], benchmark: Benchmark, config: DecideConfig) -> list[str]:
    """Why nothing can be compared; empty when it can."""
    if not benchmark.questions:
        return ["The benchmark is empty: there is no question to compare the two on."]
    numbers = {"min_gain": config.min_gain, "max_off_format": config.max_off_format, **config.floors.enabled}
    problems = [
        f"{name} is {value}, which no result can be compared with."
        for name, value in numbers.items()
        if not math.isfinite(value)
    ]
    unclustered = [question for question, patient in benchmark.clusters.items() if not patient]
    if unclustered:
        problems.append(f"{len(unclustered)} questions belong to no patient, first {unclustered[0]}.")
    problems += [problem for side in given.values() for problem in side.problems]
    keyed = find_key_mismatches(given, list(benchmark.questions))
    if keyed:
        problems.append(f"The answer key differs between the sides for {len(keyed)} questions, first {keyed[0]}.")
    return problems


def _select_questions(
    case: Comparison, ledger: Ledger, benchmark: Benchmark, config: DecideConfig
) -> tuple[list[str], BenchmarkReuse, list[str]]:
    """This decision's questions: its slice, without the worn ones and without patients of earlier looks at the pair."""
    changed = [entry.budget.lifetime for entry in ledger.spent if entry.budget.lifetime != config.lifetime_error]
    if changed:
        now = f"decide.lifetime_error is {config.lifetime_error:g}"
        problem = f"{now}, but the ledger was begun with {changed[0]:g}; a pipeline has one budget for its lifetime."
        return [], _count_reuse(ledger, 1, [], [], config), [problem]
    number = 1 + len(ledger.spent) % config.slices
    uses, seen = ledger.count_uses(), ledger.find_used_questions((case.champion, case.challenger))
    patients = {benchmark.clusters[question] for question in seen if question in benchmark.clusters}
    mine = [q for q, patient in benchmark.clusters.items() if assign_slice(patient, config.slices) == number]
    new = [q for q in mine if q not in seen and benchmark.clusters[q] not in patients]
    kept = [question for question in new if uses[question] < config.max_uses]
    problems = []
    if new and not kept:
        problems.append(
            f"All {len(new)} questions of slice {number} have been decided on {config.max_uses} times: the benchmark "
            "is worn out, since challengers are bred on its verdicts. Add new questions, or raise decide.max_uses."
        )
    if not mine:
        problems.append(f"Slice {number} of {config.slices} has no patient; choose fewer decide.slices.")
    return kept, _count_reuse(ledger, number, kept, new, config), problems


def _count_reuse(
    ledger: Ledger, number: int, kept: Sequence[str], new: Sequence[str], config: DecideConfig
) -> BenchmarkReuse:
    uses = ledger.count_uses()
    return BenchmarkReuse(
        slice=number,
        slices=config.slices,
        questions=len(kept),
        fresh=sum(uses[question] == 0 for question in kept),
        worn=len(new) - len(kept),
        most_uses=max((uses[question] + 1 for question in kept), default=0),
        allowed=config.max_uses,
    )


def _find_thin_evidence(look: EvidenceSums) -> list[str]:
    reasons = []
    for totals, other in ((look.gain, "champion"), (look.blind, "blind baseline")):
        if totals.n == 0:
            reasons.append(
                f"No question is scored for both the challenger and the {other}: all {totals.n_unscored} unscored."
            )
        elif totals.clusters < MIN_CLUSTERS:
            reasons.append(
                f"Challenger and {other} are compared on {totals.clusters} patients; "
                f"with fewer than {MIN_CLUSTERS} even a unanimous result can be chance."
            )
    return reasons


def _explain_budget(budget: Budget) -> str:
    passed_on = f", of which {budget.passed_on:.4f} was passed on by a promotion" if budget.passed_on else ""
    return (
        f"Every check is tested at level {budget.level:.5f}: look {budget.look} at challenger "
        f"{budget.challenger_number}, which has {budget.challenger_level:.4f}{passed_on}, of a lifetime budget of "
        f"{budget.lifetime:g}, {budget.spent_before:.4f} of it spent before."
    )


def _list_cautions(weighed: Sequence[CheckResult], ledger: Ledger, reuse: BenchmarkReuse) -> list[str]:
    clusters = weighed[0].totals.clusters
    cautions = []
    if clusters < MIN_RELIABLE_CLUSTERS:
        cautions.append(f"The intervals are approximate: {clusters} patients, fewer than {MIN_RELIABLE_CLUSTERS}.")
    if ledger.folder is None:
        cautions.append(_NO_LEDGER_CAUTION)
    if reuse.fresh < reuse.questions:
        cautions.append(
            f"{reuse.questions - reuse.fresh} of the {reuse.questions} questions have been decided on before, "
            f"{reuse.most_uses} times at most with this one ({reuse.allowed} allowed): "
            "challengers may have been bred on them."
        )
    return cautions


def _build_blocked_decision(
    case: Comparison,
    benchmark: Benchmark,
    config: DecideConfig,
    reasons: Sequence[str],
    found: Sequence[GateFinding] | None = None,
    *,
    reuse: BenchmarkReuse | None = None,
) -> Decision:
    found = case.findings if found is None else found
    reasons = [*reasons, *(f.reason for f in found if f.severity == "block" and f.reason not in reasons)]
    return _build_decision(case, benchmark, config, "blocked", reasons, found, reuse)


def _build_decision(
    case: Comparison,
    benchmark: Benchmark,
    config: DecideConfig,
    verdict: Literal["promote", "keep", "blocked"],
    reasons: Sequence[str],
    found: Sequence[GateFinding] = (),
    reuse: BenchmarkReuse | None = None,
) -> Decision:
    return Decision(
        champion=case.champion,
        challenger=case.challenger,
        benchmark=benchmark.digest,
        metric=f"{GATE_METRIC}, arm {config.arm}",
        difference=NO_INTERVAL,
        verdict=verdict,
        reasons=tuple(reasons),
        findings=tuple(found),
        reuse=reuse,
        inputs=dict(case.inputs),
        settings=config.model_dump(mode="json"),
    )
