"""Records of the gate's checks: numbers in the metric's own direction, an interval and a reason."""

from __future__ import annotations

import math

import numpy as np

from clincot.config import DecideConfig
from clincot.evaluation.intervals import cluster_bootstrap
from clincot.promotion.evidence import GAIN_METRIC, LOWER_IS_BETTER, Sides
from clincot.promotion.verdict import CheckResult
from clincot.records import Interval, PromotionCheck

_DECIMALS = 6
METRIC_NAMES = {
    "accuracy": "accuracy",
    "closed_accuracy": "closed accuracy",
    "open_f1": "open F1",
    "hit_rate": "region hit-rate",
    "hallucination": "hallucination rate",
    "abstention": "abstention rate",
    "answer_length": "answer length in words",
    "beats_blind": "accuracy",
}


def build_check(result: CheckResult, sides: Sides, config: DecideConfig, level: float) -> PromotionCheck:
    """Build the record of a check.

    The tests work on differences for which higher is better. The record has them in the metric's own direction again,
    so the sign flips where lower is better.
    """
    metric = GAIN_METRIC if result.role == "blind" else result.name
    other = "blind" if result.role == "blind" else "champion"
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    test = result.test
    return PromotionCheck.model_validate(
        {
            "name": result.name,
            "role": result.role,
            "better": "lower" if sign < 0 else "higher",
            "challenger": _mean_value(sides, "challenger", metric),
            "other": _mean_value(sides, other, metric),
            "difference": bootstrap_difference(sides, metric, config, other=other),
            "threshold": _round_value(sign * result.null),
            "pooled": None if test is None else _round_value(sign * test.value),
            "error": None if test is None else _round_value(test.error),
            "bound": None if test is None else _round_value(sign * test.lower_bound(level)),
            "p": None if result.p is None else float(f"{result.p:.6g}"),
            "n": result.totals.n,
            "clusters": result.totals.clusters,
            "passed": result.passed,
            "reason": _explain_check(result, sign, other, level),
        }
    )


def bootstrap_difference(sides: Sides, metric: str, config: DecideConfig, *, other: str) -> Interval:
    """Return challenger minus `other` on this look's questions, with its 95 % interval clustered by patient."""
    values, clusters = sides.paired_differences(metric, other)
    return cluster_bootstrap(
        [None if math.isnan(value) else float(value) for value in values],
        [str(cluster) for cluster in clusters],
        seed=config.seed,
        resamples=config.resamples,
    )


def _mean_value(sides: Sides, side: str, metric: str) -> float | None:
    values = sides.metric_values(side, metric)[sides.applicable_mask(metric)]
    return None if np.isnan(values).all() else _round_value(float(np.nanmean(values)))


def _explain_check(result: CheckResult, sign: float, other: str, level: float) -> str:
    name = METRIC_NAMES.get(result.name, result.name)
    against = "the blind baseline's" if other == "blind" else "the champion's"
    totals, test = result.totals, result.test
    where = f"on {totals.n} questions of {totals.clusters} patients ({totals.n_unscored} unscored)"
    if test is None or result.p is None:
        return f"Whether the challenger's {name} is good enough cannot be shown: {where}."
    side, bound = ("lower", "above") if sign > 0 else ("upper", "below")
    verb = "is" if result.passed else "is not"
    shown = f"its {side} bound at this look's level {sign * test.lower_bound(level):+.3f}, p = {result.p:.2g}"
    what = {"gain": "a gain", "blind": "beating the answers without an image", "guard": "keeping the floor"}
    return (
        f"The challenger's {name} minus {against} is {sign * test.value:+.3f} {where}: {shown}. "
        f"{what[result.role].capitalize()} ({bound} {sign * result.null:+g}) {verb} shown."
    )


def _round_value(value: float) -> float:
    return round(value, _DECIMALS) + 0.0
