"""Does the evidence promote? One pure function of sums; the decide stage and the simulation of pipelines call it.

A challenger is promoted only if it is *shown* to be more than `min_gain` better than the champion in the primary
metric, shown to be above a floor in every guarded metric, and shown to beat the blind baseline. Every check is tested
at the same level, that of this look in the lifetime budget (promotion/error_budget.py).

Several checks need no correction for their number. The null hypothesis of a promotion is "not better, *or* below one
of the floors, *or* no better than blind", a union; it is rejected only if each part is, which under any part happens
with at most that part's own level (an intersection-union test; Berger 1982). Corrections such as Holm's are for
gates that open when *one* of several tests does. What many checks cost is power: each has to be passed, so floors are
wide and a metric that few questions measure (`clincot power` says how few) makes promotions rare, never wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from clincot.promotion.cluster_tests import ClusterRow, MeanTest, cluster_t_test, share_variance, sign_flip_test
from clincot.records import Totals

CheckRole = Literal["gain", "guard", "blind"]


@dataclass(frozen=True)
class EvidenceSums:
    """Sums of per-question differences, challenger minus the other, signed so that higher is better."""

    gain: Totals
    gain_rows: tuple[ClusterRow, ...]  # the gain's clusters one by one, for the sign-flip test
    guards: Mapping[str, Totals]  # a metric that applies to no question may be left out
    blind: Totals

    def __add__(self, other: EvidenceSums) -> EvidenceSums:
        """Both looks together; their patients are disjoint."""
        names = [*self.guards, *(name for name in other.guards if name not in self.guards)]
        return EvidenceSums(
            gain=self.gain + other.gain,
            gain_rows=(*self.gain_rows, *other.gain_rows),
            guards={n: self.guards.get(n, Totals()) + other.guards.get(n, Totals()) for n in names},
            blind=self.blind + other.blind,
        )


@dataclass(frozen=True)
class PromotionCriteria:
    """What a promotion asks for. Floors are how much worse is still allowed, in the metric's own unit, positive."""

    min_gain: float
    floors: Mapping[str, float]
    unbounded: frozenset[str] = frozenset()  # guards that are no shares: answer length


@dataclass(frozen=True)
class CheckResult:
    """One check: is the mean above `null`?"""

    name: str
    role: CheckRole
    null: float
    totals: Totals
    test: MeanTest | None  # None: too few patients to show anything
    p: float | None
    passed: bool


def run_checks(evidence: EvidenceSums, demands: PromotionCriteria, *, level: float) -> tuple[CheckResult, ...]:
    """Every check, the gain first; `promotes` says what follows."""
    gain = check_gain(evidence.gain, evidence.gain_rows, demands, level=level)
    return (gain, *check_guards(evidence.guards, evidence.blind, demands, level=level))


def check_guards(
    guards: Mapping[str, Totals], blind: Totals, demands: PromotionCriteria, *, level: float
) -> tuple[CheckResult, ...]:
    """The guards and the blind baseline. A guard without any question is not a check."""
    checks = []
    for name, floor in demands.floors.items():
        totals = guards.get(name, Totals())
        if totals.n or totals.n_unscored:
            least = 0.0 if name in demands.unbounded else share_variance(floor)
            checks.append(_check_mean(name, "guard", totals, -floor, level, least_variance=least))
    checks.append(_check_mean("beats_blind", "blind", blind, 0.0, level))
    return tuple(checks)


def should_promote(checks: Sequence[CheckResult]) -> bool:
    return bool(checks) and all(check.passed for check in checks)


def check_gain(totals: Totals, rows: Sequence[ClusterRow], demands: PromotionCriteria, *, level: float) -> CheckResult:
    """Better than the champion by more than min_gain: by the t and by the sign-flip test."""
    null = demands.min_gain
    check = _check_mean("accuracy", "gain", totals, null, level, least_variance=share_variance(null))
    if check.test is None or check.p is None:
        return check
    p = max(check.p, sign_flip_test(rows, null))
    return CheckResult(
        check.name, check.role, null, totals, check.test, p, passed=check.test.value > null and p <= level
    )


def _check_mean(
    name: str, role: CheckRole, totals: Totals, null: float, level: float, *, least_variance: float = 0.0
) -> CheckResult:
    test = cluster_t_test(totals, null, least_variance=least_variance)
    p = None if test is None else test.p
    passed = test is not None and test.value > null and test.p <= level
    return CheckResult(name, role, null, totals, test, p, passed)
