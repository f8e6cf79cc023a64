"""What size do I need: the smallest gain that N questions can show, and N for a wanted gain.

From what has been seen: the standard error of a paired, clustered difference on n questions shrinks as 1/√n as long
as new questions come with new patients (more questions about the same patients help less). A test at `level` shows a
true gain g above the threshold with probability `power` when

    (g - threshold) = (z_level + z_power) · error · √(n / N).
"""

from __future__ import annotations

import math

from scipy.special import ndtr, ndtri

from clincot.errors import InvalidInput
from clincot.records import Decision, PromotionCheck

DEFAULT_POWER = 0.8


def minimum_detectable_gain(
    check: PromotionCheck, level: float, questions: int, *, power: float = DEFAULT_POWER
) -> float:
    """The true difference to the other side that so many questions would show with that probability."""
    reach = _sum_quantiles(level, power) * _require_error(check) * math.sqrt(check.n / questions)
    return check.threshold + (reach if check.better == "higher" else -reach)


def required_sample_size(
    check: PromotionCheck, level: float, gain: float, *, power: float = DEFAULT_POWER
) -> int | None:
    """Questions that a true difference needs to be shown; None where it is not better than the threshold."""
    ahead = gain - check.threshold if check.better == "higher" else check.threshold - gain
    if ahead <= 0:
        return None
    return max(1, math.ceil(check.n * (_sum_quantiles(level, power) * _require_error(check) / ahead) ** 2))


def compute_power(check: PromotionCheck, level: float, questions: int, gain: float) -> float:
    """The probability that so many questions show a true difference of `gain`."""
    ahead = gain - check.threshold if check.better == "higher" else check.threshold - gain
    error = _require_error(check) * math.sqrt(check.n / questions)
    return float(ndtr(ahead / error + ndtri(level))) if error > 0 else float(ahead > 0)


def render_power_table(decision: Decision, *, questions: int, gain: float, power: float = DEFAULT_POWER) -> str:
    """Markdown: for every check what `questions` (of the whole benchmark) can show, and how many are needed."""
    if decision.budget is None or not decision.checks:
        raise InvalidInput(f"{decision.id} tested nothing ({decision.verdict}); a size is told from a tested decision")
    level, all_questions = decision.budget.level, decision.checks[0].n
    lines = [
        f"At level {level:.5f} (look {decision.budget.look} at challenger {decision.budget.challenger_number}) and "
        f"power {power:.0%}, from {all_questions} questions of {decision.checks[0].clusters} patients seen:",
        "",
        f"| check | questions seen | standard error | threshold | {questions} questions show | questions needed |",
        "|---|---|---|---|---|---|",
    ]
    for check in decision.checks:
        if check.error is None or check.error == 0:
            lines.append(f"| {check.name} | {check.n} | – | {check.threshold:+g} | – | – |")
            continue
        mine = max(1, round(questions * check.n / all_questions))  # a metric that applies to some questions only
        true = gain if check.role == "gain" else (0.0 if check.role == "guard" else check.pooled or 0.0)
        needed = required_sample_size(check, level, true, power=power)
        total = "–" if needed is None else f"{math.ceil(needed * all_questions / check.n)} for {true:+.3f}"
        lines.append(
            f"| {check.name} | {check.n} | {check.error:.4f} | {check.threshold:+g} "
            f"| {minimum_detectable_gain(check, level, mine, power=power):+.3f} | {total} |"
        )
    return "\n".join([*lines, "", "A guard counts as unchanged (+0); the blind baseline as far away as it was seen."])


def _sum_quantiles(level: float, power: float) -> float:
    return float(ndtri(power) - ndtri(level))


def _require_error(check: PromotionCheck) -> float:
    if check.error is None or check.n == 0:
        raise InvalidInput(f"{check.name} was measured on too few patients ({check.clusters}) to tell a size from")
    return check.error
