"""Say from the log of a training run whether its preferences and margins acted, and which setting to change if not.

Without torch, so that the page of a run can use it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MIN_MARGIN_SHARE = 0.05  # sine of the angle (3 degrees) by which the margin turns the gradient; below it: plain DPO
MIN_PREFERENCE_SHARE = 0.1  # of the gradient; below it the update is practically supervised training on the chosen side


@dataclass(frozen=True)
class TermSummary:
    """What each term of the loss contributed; None: not measured.

    The shares are means over the probes of the run (gradient_probe.py). β·Δ and its spread are means over the last
    tenth of the steps, the margin over all of them, all in logits.
    """

    preference_share: float | None
    margin_share: float | None
    margin: float | None
    largest_margin: float | None
    beta_delta: float | None
    beta_delta_std: float | None  # standard deviation of β·Δ over the pairs of a step

    def describe(self) -> str:
        """One sentence with what was measured; "" if nothing was, as for a log of supervised training."""
        if self.beta_delta is None or self.margin is None:
            return ""
        reached = f"β·Δ reached {self.beta_delta:.3f} logits, of a mean margin of {self.margin:.3f}"
        if self.preference_share is None or self.margin_share is None:
            return f"{reached}; the gradients of the terms were not measured."
        return (
            f"The preferences are {self.preference_share:.0%} of the gradient, and the margin turns them by a share of "
            f"{self.margin_share:.4f}; {reached}."
        )

    def list_warnings(self) -> list[str]:
        """One sentence for each term that had no effect, naming the setting that would change it."""
        return [*self._warn_of_weak_preference(), *self._warn_of_weak_margin()]

    def _warn_of_weak_preference(self) -> list[str]:
        if self.preference_share is None or self.preference_share >= MIN_PREFERENCE_SHARE:
            return []
        return [
            f"The preferences are {self.preference_share:.0%} of the gradient, so that this is practically supervised "
            "training on the chosen answers; lower train.nll_weight or raise train.beta."
        ]

    def _warn_of_weak_margin(self) -> list[str]:
        if self.largest_margin is None or self.beta_delta is None or not self.largest_margin > 0:
            return []
        if self.beta_delta_std is not None and self.largest_margin <= self.beta_delta_std:
            return [
                f"The largest margin ({self.largest_margin:.3f} logits) does not exceed the spread of β·Δ between "
                f"pairs ({self.beta_delta_std:.3f}), so that it cannot tell pairs apart; raise train.margin_lambda."
            ]
        if self.margin_share is not None and self.margin_share < MIN_MARGIN_SHARE:
            return [
                f"The margin only scales the step and does not turn it (share {self.margin_share:.4f}), which is "
                f"practically plain DPO: β·Δ reached {self.beta_delta:.3f} of a mean margin of {self.margin or 0:.3f} "
                "logits; raise train.margin_lambda, train.beta or train.epochs."
            ]
        return []


def summarize_terms(log: Sequence[Mapping[str, float]]) -> TermSummary:
    """Summarise the entries of train_log.json, one a step; an empty or foreign log gives a summary without values."""
    tail = select_last_steps(log)
    return TermSummary(
        preference_share=average_metric(log, "preference_share"),
        margin_share=average_metric(log, "margin_share"),
        margin=average_metric(log, "margin_logits"),
        largest_margin=max(_read(log, "margin_logits_max"), default=None),
        beta_delta=average_metric(tail, "reward_margin"),
        beta_delta_std=average_metric(tail, "reward_margin_std"),
    )


def select_last_steps(log: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The last tenth of the steps, at least one; metrics at the end of a training are averaged over them."""
    return log[-max(1, len(log) // 10) :]


def average_metric(entries: Sequence[Mapping[str, float]], name: str) -> float | None:
    """The mean of a metric over the steps that have it; None if none has."""
    values = _read(entries, name)
    return math.fsum(values) / len(values) if values else None


def _read(entries: Sequence[Mapping[str, float]], name: str) -> list[float]:
    return [float(entry[name]) for entry in entries if name in entry]
