"""The verdict on the evidence, as a pure function of sums.

The decide stage and the simulation of pipelines both call it. A challenger is promoted only if it is *shown* to be
more than `min_gain` better than the champion in the primary metric, to be above a floor in every guarded metric, and
to beat the blind baseline. Every check is tested at the same level, that of the current look in the lifetime budget
(clincot.promotion.error_budget).

The number of checks needs no correction. The null hypothesis of a promotion is the union "not better, *or* below one
of the floors, *or* no better than blind". The gate rejects it only if every part is rejected. If part i is true, the
probability of that is at most the probability of rejecting part i, which is at most the level: an intersection-union
test (Berger, Technometrics 24, 1982). Corrections such as Holm's are for gates that open if *one* of several tests
rejects. Many checks cost power instead, because each has to pass. Floors are therefore wide, and a metric that few
questions measure makes promotions rare but not wrong; `clincot power` estimates how many questions it needs.
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
    """Sums of per-question differences, challenger minus the other side, signed so that higher is better."""

    gain: Totals
    gain_rows: tuple[ClusterRow, ...]  # every cluster of the gain, for the sign-flip test
    guards: Mapping[str, Totals]  # by metric; may lack a metric that applies to no question
    blind: Totals

    def __add__(self, other: EvidenceSums) -> EvidenceSums:
        """Pool two looks, whose patients have to be disjoint."""
        names = [*self.guards, *(name for name in other.guards if name not in self.guards)]
        return EvidenceSums(
            gain=self.gain + other.gain,
            gain_rows=(*self.gain_rows, *other.gain_rows),
            guards={n: self.guards.get(n, Totals()) + other.guards.get(n, Totals()) for n in names},
            blind=self.blind + other.blind,
        )


@dataclass(frozen=True)
class PromotionCriteria:
    """What a promotion requires.

    A floor is the loss in a guarded metric that is still allowed, positive and in the metric's own unit.
    """

    min_gain: float
    floors: Mapping[str, float]
    unbounded: frozenset[str] = frozenset()  # guarded metrics that are not shares, such as answer length


@dataclass(frozen=True)
class CheckResult:
    """Result of one check, which tests whether the mean is above `null`."""

    name: str
    role: CheckRole
    null: float
    totals: Totals
    test: MeanTest | None  # None: too few patients for a test
    p: float | None
    passed: bool


def run_checks(evidence: EvidenceSums, criteria: PromotionCriteria, *, level: float) -> tuple[CheckResult, ...]:
    """Run every check at `level`, the gain first; pass the results to `should_promote`."""
    gain = check_gain(evidence.gain, evidence.gain_rows, criteria, level=level)
    return (gain, *check_guards(evidence.guards, evidence.blind, criteria, level=level))


def check_guards(
    guards: Mapping[str, Totals], blind: Totals, criteria: PromotionCriteria, *, level: float
) -> tuple[CheckResult, ...]:
    """Check the floors and the blind baseline; skip a guarded metric that applies to no question."""
    checks = []
    for name, floor in criteria.floors.items():
        totals = guards.get(name, Totals())
        if totals.n or totals.n_unscored:
            least = 0.0 if name in criteria.unbounded else share_variance(floor)
            checks.append(_check_mean(name, "guard", totals, -floor, level, least_variance=least))
    checks.append(_check_mean("beats_blind", "blind", blind, 0.0, level))
    return tuple(checks)


def should_promote(checks: Sequence[CheckResult]) -> bool:
    """Whether all checks passed."""
    return bool(checks) and all(check.passed for check in checks)


def check_gain(totals: Totals, rows: Sequence[ClusterRow], criteria: PromotionCriteria, *, level: float) -> CheckResult:
    """Check that the gain is above min_gain, with the larger p-value of the t-test and the sign-flip test."""
    null = criteria.min_gain
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
