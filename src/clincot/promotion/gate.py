"""The gate: decides whether the challenger replaces the champion, with every number in one record.

- `promote`: every check of clincot.promotion.verdict passes at the level of the lifetime budget
  (clincot.promotion.error_budget), at most `max_off_format` of the challenger's answers are off format, and nothing
  blocks.
- `blocked`: the comparison itself cannot be trusted. The benchmark is empty or overused, answers are missing, repeated
  or NaN, too many are unscored, data leaked, a judge is broken, or the ledger is unreadable. A blocked decision tests
  nothing and spends nothing.
- `keep`: everything else.
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
from clincot.promotion.checks import bootstrap_difference, build_check
from clincot.promotion.cluster_tests import MIN_CLUSTERS
from clincot.promotion.error_budget import next_level
from clincot.promotion.evidence import GAIN_METRIC, Sides, check_answers, find_key_mismatches
from clincot.promotion.ledger import BudgetEntry, Ledger, QuestionsUsed
from clincot.promotion.verdict import CheckResult, EvidenceSums, PromotionCriteria, run_checks, should_promote
from clincot.records import BenchmarkReuse, Budget, Decision, GateFinding, Interval, Outcome, hash_json

NO_INTERVAL = Interval(value=None, n=0)
_NO_LEDGER_CAUTION = (
    "No ledger was given, so this is taken for the pipeline's first test; a recurring pipeline has to keep one."
)


@dataclass(frozen=True)
class Comparison:
    """The input of a decision. Outcomes may be whole files; those of other policies or arms are ignored."""

    champion: str  # digest of the policy
    challenger: str
    champion_outcomes: Iterable[Outcome]
    challenger_outcomes: Iterable[Outcome]
    blind_outcomes: Iterable[Outcome]  # from BlindBaseline.iter_outcomes
    base: str = ""  # digest of the base policy, which is shown but not tested; "" shows none
    base_outcomes: Iterable[Outcome] = ()
    ledger: Ledger = field(default_factory=Ledger)
    findings: Sequence[GateFinding] = ()  # about the data and the judges
    problems: Sequence[str] = ()  # why an input cannot be used; any problem blocks
    inputs: Mapping[str, str] = field(default_factory=dict)  # {input: sha256}, for the record


@dataclass(frozen=True)
class GateResult:
    """A decision with its ledger entries and the compared sides; all but the decision may be None."""

    decision: Decision
    spending: BudgetEntry | None  # None: nothing was tested
    asked: QuestionsUsed | None
    sides: Sides | None  # None: nothing could be compared


def run_gate(case: Comparison, benchmark: Benchmark, config: DecideConfig) -> GateResult:
    """Decide on a challenger; bad evidence never raises, but becomes a reason of a `blocked` decision."""
    given = _index_sides(case, benchmark, config)
    problems = [*case.problems, *_find_problems(given, benchmark, config)]
    if problems:
        return GateResult(_build_blocked_decision(case, benchmark, config, problems), None, None, None)
    evidence_digest = _hash_comparison(case, benchmark, given, config)
    ledger = case.ledger.rewind_ledger(evidence_digest)
    questions, reuse, problems = select_questions((case.champion, case.challenger), ledger, benchmark, config)
    if not questions and not problems:
        reason = (
            "The challenger was already compared with this champion on these questions; asking them again tells "
            "nothing new. Ask it new questions, or train another challenger."
        )
        return GateResult(_build_decision(case, benchmark, config, "keep", [reason], reuse=reuse), None, None, None)
    if problems:
        return GateResult(_build_blocked_decision(case, benchmark, config, problems, reuse=reuse), None, None, None)
    sides = Sides(benchmark, tuple(questions), given, config.protocol)
    answer_findings = check_answers(sides, max_unscored=config.max_unscored, max_off_format=config.max_off_format)
    findings = [*case.findings, *answer_findings]
    look = sides.sum_evidence()
    blocking = [finding.reason for finding in findings if finding.severity == "block"] + _find_thin_evidence(look)
    if blocking:
        decision = _build_blocked_decision(case, benchmark, config, blocking, findings, reuse=reuse)
        return GateResult(decision, None, None, sides)
    return _test_challenger(case, config, _Look(sides, look, tuple(findings), ledger, reuse, evidence_digest))


def _index_sides(case: Comparison, benchmark: Benchmark, config: DecideConfig) -> dict[str, Side]:
    """Index the outcomes of champion, challenger, blind baseline and, if there is one, base."""
    policies = {
        "champion": (case.champion, case.champion_outcomes),
        "challenger": (case.challenger, case.challenger_outcomes),
    }
    sides = {}
    for name, (policy, outcomes) in policies.items():
        sides[name] = index_outcomes(name, _select_outcomes(outcomes, policy, config.arm), benchmark.clusters)
    sides["blind"] = index_outcomes("blind baseline", case.blind_outcomes, benchmark.clusters)
    if case.base:
        outcomes = _select_outcomes(case.base_outcomes, case.base, config.arm)
        sides["base"] = index_outcomes("base", outcomes, benchmark.clusters)
    return sides


@dataclass(frozen=True)
class _Look:
    """One look at a challenger: the sides on new questions, and all that the test needs to know about them."""

    sides: Sides
    sums: EvidenceSums  # of this look only
    findings: tuple[GateFinding, ...]
    ledger: Ledger  # as it was before this look
    reuse: BenchmarkReuse
    evidence_digest: str


def _test_challenger(case: Comparison, config: DecideConfig, look: _Look) -> GateResult:
    """Test a challenger on the evidence of this look pooled with that of earlier looks."""
    sides, findings = look.sides, look.findings
    pair = (case.champion, case.challenger)
    budget = next_level(look.ledger.spent, pair, lifetime=config.lifetime_error)
    pooled = look.sums
    for earlier in look.ledger.find_looks(pair):
        pooled = earlier.sums + pooled
    results = run_checks(pooled, build_criteria(config), level=budget.level)
    off_format = next(finding for finding in findings if finding.name == "off format")
    passed = should_promote(results) and off_format.severity == "ok"
    verdict: Literal["promote", "keep"] = "promote" if passed else "keep"
    checks = [build_check(result, sides, config, budget.level) for result in results]
    reasons = [check.reason for check in checks]
    reasons.insert(1, off_format.reason)
    reasons += [f"Warning: {f.reason}" for f in findings if f.severity == "warn" and f is not off_format]
    reasons += [_explain_budget(budget), *_list_cautions(results, case.ledger, look.reuse)]
    decision = _build_decision(case, sides.benchmark, config, verdict, reasons, findings, look.reuse).replace_fields(
        checks=tuple(checks),
        budget=budget,
        difference=checks[0].difference,
        base=bootstrap_difference(sides, GAIN_METRIC, config, other="base") if "base" in sides.sides else None,
        evidence=look.evidence_digest,
        served=next(iter(_list_serve_settings(sides.sides)), ""),
    )
    spending = BudgetEntry(
        evidence=look.evidence_digest,
        champion=case.champion,
        challenger=case.challenger,
        benchmark=sides.benchmark.digest,
        verdict=verdict,
        budget=budget,
        gain=look.sums.gain,
        gain_rows=look.sums.gain_rows,
        guards=dict(look.sums.guards),
        blind=look.sums.blind,
    )
    asked = QuestionsUsed(
        evidence=look.evidence_digest,
        number=budget.number,
        slice=look.reuse.slice,
        slices=look.reuse.slices,
        questions=sides.questions,
    )
    return GateResult(decision, spending, asked, sides)


def build_criteria(config: DecideConfig) -> PromotionCriteria:
    """Return the promotion criteria of a configuration."""
    return PromotionCriteria(
        min_gain=config.min_gain, floors=config.floors.enabled, unbounded=frozenset({"answer_length"})
    )


def assign_slice(cluster: str, slices: int) -> int:
    """Return the slice (from 1) of a patient's questions, by hash, so that new patients do not move others."""
    return 1 + int.from_bytes(hashlib.sha256(f"slice:{cluster}".encode()).digest()[:8]) % slices


def _select_outcomes(outcomes: Iterable[Outcome], policy: str, arm: str) -> Iterable[Outcome]:
    return (outcome for outcome in outcomes if outcome.policy == policy and outcome.arm == arm)


def _hash_comparison(case: Comparison, benchmark: Benchmark, given: Mapping[str, Side], config: DecideConfig) -> str:
    """Hash everything that the verdict depends on except the ledger."""
    answers = {name: _hash_outcomes(side) for name, side in given.items()}
    return hash_json([case.champion, case.challenger, benchmark.digest, config.model_dump(mode="json"), answers])


def _hash_outcomes(side: Side) -> str:
    return hash_json(sorted([outcome.id, outcome.correct, outcome.hit] for outcome in side.outcomes.values()))


def _find_problems(given: Mapping[str, Side], benchmark: Benchmark, config: DecideConfig) -> list[str]:
    """Return why the sides cannot be compared; empty if they can."""
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
    for side in given.values():
        problems += side.problems
    served = _list_serve_settings(given)
    if len(served) > 1:
        problems.append(
            f"The arm {config.arm} was answered with {len(served)} settings of the server ({', '.join(served)}); "
            "evaluate champion and challenger with one section serve."
        )
    mismatches = find_key_mismatches(given, list(benchmark.questions))
    if mismatches:
        problems.append(
            f"The answer key differs between the sides for {len(mismatches)} questions, first {mismatches[0]}."
        )
    return problems


def _list_serve_settings(given: Mapping[str, Side]) -> list[str]:
    """The settings of the server that champion and challenger answered with; [""] if no server's code answered."""
    outcomes = [*given["champion"].outcomes.values(), *given["challenger"].outcomes.values()]
    return sorted({outcome.settings for outcome in outcomes})


def select_questions(
    pair: tuple[str, str], ledger: Ledger, benchmark: Benchmark, config: DecideConfig
) -> tuple[list[str], BenchmarkReuse, list[str]]:
    """Select this decision's slice of questions, without overused ones and patients of earlier looks at the pair.

    pair: digests of champion and challenger. Returns the questions, the statistics of their use, and the problems that
    block the decision.
    """
    changed = [entry.budget.lifetime for entry in ledger.spent if entry.budget.lifetime != config.lifetime_error]
    if changed:
        now = f"decide.lifetime_error is {config.lifetime_error:g}"
        problem = f"{now}, but the ledger was begun with {changed[0]:g}; a pipeline has one budget for its lifetime."
        return [], _count_reuse(ledger, 1, [], [], config), [problem]
    number = 1 + len(ledger.spent) % config.slices
    uses, seen = ledger.count_uses(), ledger.find_used_questions(pair)
    patients = {benchmark.clusters[question] for question in seen if question in benchmark.clusters}
    in_slice = [q for q, patient in benchmark.clusters.items() if assign_slice(patient, config.slices) == number]
    new = [q for q in in_slice if q not in seen and benchmark.clusters[q] not in patients]
    selected = [question for question in new if uses[question] < config.max_uses]
    problems = []
    if new and not selected:
        problems.append(
            f"All {len(new)} questions of slice {number} have been decided on {config.max_uses} times: the benchmark "
            "is worn out, since challengers are bred on its verdicts. Add new questions, or raise decide.max_uses."
        )
    if not in_slice:
        problems.append(f"Slice {number} of {config.slices} has no patient; choose fewer decide.slices.")
    return selected, _count_reuse(ledger, number, selected, new, config), problems


def _count_reuse(
    ledger: Ledger, number: int, selected: Sequence[str], new: Sequence[str], config: DecideConfig
) -> BenchmarkReuse:
    uses = ledger.count_uses()
    return BenchmarkReuse(
        slice=number,
        slices=config.slices,
        questions=len(selected),
        fresh=sum(uses[question] == 0 for question in selected),
        worn=len(new) - len(selected),
        most_uses=max((uses[question] + 1 for question in selected), default=0),
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


def _list_cautions(results: Sequence[CheckResult], ledger: Ledger, reuse: BenchmarkReuse) -> list[str]:
    clusters = results[0].totals.clusters
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
    findings: Sequence[GateFinding] | None = None,
    *,
    reuse: BenchmarkReuse | None = None,
) -> Decision:
    findings = case.findings if findings is None else findings
    reasons = [*reasons, *(f.reason for f in findings if f.severity == "block" and f.reason not in reasons)]
    return _build_decision(case, benchmark, config, "blocked", reasons, findings, reuse)


def _build_decision(
    case: Comparison,
    benchmark: Benchmark,
    config: DecideConfig,
    verdict: Literal["promote", "keep", "blocked"],
    reasons: Sequence[str],
    findings: Sequence[GateFinding] = (),
    reuse: BenchmarkReuse | None = None,
) -> Decision:
    return Decision(
        champion=case.champion,
        challenger=case.challenger,
        benchmark=benchmark.digest,
        metric=f"accuracy ({config.protocol}), arm {config.arm}",
        difference=NO_INTERVAL,
        verdict=verdict,
        reasons=tuple(reasons),
        findings=tuple(findings),
        reuse=reuse,
        inputs=dict(case.inputs),
        settings=config.model_dump(mode="json"),
    )
