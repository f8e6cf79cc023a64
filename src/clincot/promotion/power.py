"""Power analysis: the smallest gain that N questions can show, and the N that a gain needs.

The estimate starts from a tested decision. The standard error of a paired, clustered difference, measured on n
questions, becomes error · √(n / N) on N questions if new questions come with new patients; more questions about the
same patients help less. By the normal approximation a one-sided test at level a shows a true difference g with
probability b (the power) if

    g - threshold = (z_{1-a} + z_b) · error · √(n / N),

where z_q is the q-quantile of the standard normal distribution. If lower is better, the signs are reversed.
"""

from __future__ import annotations

import math

from scipy.special import ndtr, ndtri

from clincot.errors import InvalidInput
from clincot.records import Decision, PromotionCheck
from clincot.text import markdown_table

DEFAULT_POWER = 0.8


def minimum_detectable_gain(
    check: PromotionCheck, level: float, questions: int, *, power: float = DEFAULT_POWER
) -> float:
    """Return the true difference that `questions` questions show with probability `power`.

    It is threshold ± (z_{1-level} + z_power) · error · √(n / questions). Raises InvalidInput if the check was not
    tested.
    """
    reach = _sum_quantiles(level, power) * _require_error(check) * math.sqrt(check.n / questions)
    return check.threshold + (reach if check.better == "higher" else -reach)


def required_sample_size(
    check: PromotionCheck, level: float, gain: float, *, power: float = DEFAULT_POWER
) -> int | None:
    """Return the number of questions that show a true difference of `gain` with probability `power`.

    It is n · ((z_{1-level} + z_power) · error / |gain - threshold|)², rounded up; None if `gain` is not better than the
    threshold. Raises InvalidInput if the check was not tested.
    """
    ahead = gain - check.threshold if check.better == "higher" else check.threshold - gain
    if ahead <= 0:
        return None
    return max(1, math.ceil(check.n * (_sum_quantiles(level, power) * _require_error(check) / ahead) ** 2))


def compute_power(check: PromotionCheck, level: float, questions: int, gain: float) -> float:
    """Return the probability that `questions` questions show a true difference of `gain`.

    It is Φ(ahead / error_N - z_{1-level}) with error_N = error · √(n / questions), where `ahead` is how much better
    `gain` is than the threshold (negative if it is worse). Raises InvalidInput if the check was not tested.
    """
    ahead = gain - check.threshold if check.better == "higher" else check.threshold - gain
    error = _require_error(check) * math.sqrt(check.n / questions)
    return float(ndtr(ahead / error + ndtri(level))) if error > 0 else float(ahead > 0)


def count_floor_questions(floor: float, level: float) -> int:
    """Return the number of questions below which even an unchanged share cannot be shown to keep its floor.

    At the floor at least a share `floor` of the questions differs, so that error² is at least floor·(1 - floor) / N
    (cluster_tests.py). No difference at all is therefore a t of floor / error <= √(N · floor / (1 - floor)), which
    exceeds z_{1-level} if N > z² · (1 - floor) / floor. How many questions a real policy needs is more, and depends on
    how much its answers vary (required_sample_size).
    """
    return math.floor(float(ndtri(level)) ** 2 * (1 - floor) / floor) + 1


def render_power_table(decision: Decision, *, questions: int, gain: float, power: float = DEFAULT_POWER) -> str:
    """Render a Markdown table of what each check can show with a benchmark of `questions`, and what it needs.

    gain: the true gain in the primary metric to plan for. Raises InvalidInput if the decision tested nothing.
    """
    if decision.budget is None or not decision.checks:
        raise InvalidInput(
            f"{decision.id} tested nothing ({decision.verdict}); expected a tested decision to estimate a size from"
        )
    level, all_questions = decision.budget.level, decision.checks[0].n
    head = [
        "check",
        "questions tested",
        "standard error",
        "threshold",
        f"{questions} questions show",
        "questions needed",
    ]
    rows = []
    for check in decision.checks:
        if check.error is None or check.error == 0:
            rows.append([check.name, f"{check.n}", "–", f"{check.threshold:+g}", "–", "–"])
            continue
        # A metric that applies to some of the questions gets the same share of a larger benchmark.
        applicable = max(1, round(questions * check.n / all_questions))
        shown = minimum_detectable_gain(check, level, applicable, power=power)
        true = gain if check.role == "gain" else (0.0 if check.role == "guard" else check.pooled or 0.0)
        needed = required_sample_size(check, level, true, power=power)
        total = "–" if needed is None else f"{math.ceil(needed * all_questions / check.n)} for {true:+.3f}"
        rows.append([check.name, f"{check.n}", f"{check.error:.4f}", f"{check.threshold:+g}", f"{shown:+.3f}", total])
    assumptions = (
        f"At level {level:.5f} (look {decision.budget.look} at challenger {decision.budget.challenger_number}) and "
        f"power {power:.0%}, estimated from {all_questions} questions about {decision.checks[0].clusters} patients:"
    )
    note = "Guarded metrics are assumed unchanged (+0), and the lead over the blind baseline as observed."
    return "\n".join([assumptions, "", markdown_table(head, rows), "", note])


def _sum_quantiles(level: float, power: float) -> float:
    """Return z_{1-level} + z_power."""
    return float(ndtri(power) - ndtri(level))


def _require_error(check: PromotionCheck) -> float:
    if check.error is None or check.n == 0:
        raise InvalidInput(
            f"{check.name} was measured on too few patients ({check.clusters}) to estimate a benchmark size from"
        )
    return check.error
