"""Krippendorff's alpha of a panel: whether the judges agree beyond chance.

Interval metric, in one pass and constant memory. Panel scores are continuous, so nearly every value occurs once. The
`krippendorff` package counts coincidences of *values* (candidates x values x values), which takes 24 GB for 500
candidates and three judges. For the interval metric those sums have a closed form, which is used here; a test compares
the two on small tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

from pydantic import Field

from clincot.fields import FrozenModel


class KrippendorffAlpha(FrozenModel):
    """Alpha: 1 is perfect agreement, 0 chance, below 0 systematic disagreement; None (with a reason) is undefined."""

    value: Annotated[float, Field(le=1.0, allow_inf_nan=False)] | None
    units: Annotated[int, Field(ge=0)]  # candidates scored by at least two judges; only these can show disagreement
    reason: str = ""


class IntervalAlpha:
    """Krippendorff's alpha for interval data, accumulated one unit (candidate) at a time.

    alpha = 1 - D_o / D_e over the n values of units with m_u >= 2 values (Krippendorff 2011, "Computing
    Krippendorff's Alpha-Reliability"):

        D_o = 1/n       sum_u 1/(m_u - 1) sum_{i != j in u} (x_i - x_j)^2  =  2/n sum_u m_u/(m_u - 1) SS_u
        D_e = 1/(n(n-1))                  sum_{i != j}      (x_i - x_j)^2  =  2/(n-1) SS

    where m_u is the number of scores of unit u, and SS_u and SS are the sums of squared distances from the mean, within
    the unit and over all values. The right-hand sides follow from sum_{i != j} (x_i - x_j)^2 = 2 m SS for any m values.
    """

    def __init__(self) -> None:
        self._units = 0
        self._values = 0
        self._mean = 0.0
        self._squares = 0.0  # SS, by Welford's update: no cancellation if the scores are close together
        self._within = 0.0  # sum over units of m_u / (m_u - 1) * SS_u
        self._low, self._high = float("inf"), float("-inf")

    def add(self, scores: Sequence[float | None]) -> None:
        """Add the judges' scores of one candidate; None is a missing score."""
        values = [score for score in scores if score is not None]
        if len(values) < 2:
            return
        count = len(values)
        mean = sum(values) / count
        self._units += 1
        self._within += count / (count - 1) * sum((value - mean) ** 2 for value in values)
        for value in values:
            self._values += 1
            step = value - self._mean
            self._mean += step / self._values
            self._squares += step * (value - self._mean)
        self._low, self._high = min(self._low, *values), max(self._high, *values)

    def compute_alpha(self) -> KrippendorffAlpha:
        """Alpha of all candidates added so far."""
        if self._units == 0:
            return KrippendorffAlpha(value=None, units=0, reason="no candidate was scored by two judges")
        if self._low == self._high:
            reason = f"every score is {self._low}: without variation agreement beyond chance is undefined"
            return KrippendorffAlpha(value=None, units=self._units, reason=reason)
        observed = 2 * self._within / self._values
        expected = 2 * self._squares / (self._values - 1)
        return KrippendorffAlpha(value=1 - observed / expected, units=self._units)


def compute_krippendorff_alpha(units: Iterable[Sequence[float | None]]) -> KrippendorffAlpha:
    """Alpha of a table with one row of judges' scores for each candidate."""
    alpha = IntervalAlpha()
    for scores in units:
        alpha.add(scores)
    return alpha.compute_alpha()
