"""One-sided tests of a paired mean over clustered questions, as pure functions of arrays.

Questions about one patient share their errors, so the unit of variation is the cluster: the patient, or the image if
the patient is unknown. Notation:

    C          number of clusters
    s_c, m_c   sum and number of the scored per-question values of cluster c
    N          Σ m_c, the number of scored questions
    v          Σ s_c / N, the mean of the per-question values
    d          the null value; each test asks whether the true mean is above d

Cluster-robust t (linearised ratio; Cameron & Miller, Journal of Human Resources 50, 2015):

    t = (v - d) / error,    error² = C/(C-1) · Σ (s_c - v·m_c)² / N²

on K - 1 degrees of freedom, where K = N² / Σ m_c² is Kish's effective number of clusters, so that a few large patients
do not count as many. If d ≠ 0 and the values are differences of shares, error² is at least |d|(1 - |d|) / N: under the
null hypothesis at least a share |d| of the questions differ, so seeing no difference in 40 questions does not show
that fewer than 2 % differ.

Sign-flip test (Fisher's randomisation test over clusters): if challenger and champion are equally good and
exchangeable, the sum of every cluster is as likely to have the other sign. With x_c = s_c - d·m_c the p-value is

    p = P(Σ ±|x_c| >= Σ x_c)   over 2^C equally likely signs.

It is exact for any correlation within clusters and any number of clusters. It is not sampled: the characteristic
function of the sum is Π cos(u·x_c), which an FFT inverts on a grid.

The p-value of the gain is the larger of the two. It is exact if the two models are exchangeable, and valid for many
clusters if only their means are equal. The other checks use only the t: their null value is a floor, and at a floor
the two models are not exchangeable.

The tests are implemented here because neither scipy nor statsmodels has them for clustered data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

from clincot.records import Totals

FloatArray = NDArray[np.float64]
ClusterRow = tuple[float, int, int]  # (s, m, number of clusters with this sum and count)

SIGN_FLIP_GRID = 0.001  # resolution of the sign-flip test if the sums are not whole numbers
MIN_CLUSTERS = 6  # 6 of 6 clusters in favour has probability 1 / 2^6 = 1/64; fewer clusters cannot show anything
_DECIMALS = 9


@dataclass(frozen=True)
class MeanTest:
    """Result of the one-sided test whether a mean is above a null value."""

    value: float
    error: float  # standard error
    freedom: float  # degrees of freedom
    p: float

    def lower_bound(self, level: float) -> float:
        """Return value - t_{1-level, freedom} · error, the one-sided lower confidence bound at 1 - level.

        The test at `level` passes if, and only if, the bound is above the null value.
        """
        return self.value - float(stdtrit(self.freedom, 1 - level)) * self.error


def sum_by_cluster(values_N: FloatArray, cluster_N: NDArray[np.intp]) -> tuple[FloatArray, FloatArray]:
    """Return the sums (C,) and counts (C,) of the clusters that have a scored value.

    values: one for each question, NaN if unscored. cluster: the index of its cluster, from 0.
    """
    scored = ~np.isnan(values_N)
    scored_cluster = cluster_N[scored]
    count_C = np.bincount(scored_cluster).astype(np.float64)
    sum_C: FloatArray = np.bincount(scored_cluster, weights=values_N[scored]).astype(np.float64)
    occupied = count_C > 0
    return sum_C[occupied], count_C[occupied]


def compute_totals(values_N: FloatArray, cluster_N: NDArray[np.intp]) -> Totals:
    """Compute the sums that the t-test needs: C, N, Σ s_c, Σ s_c², Σ s_c·m_c and Σ m_c².

    Raises ValueError on an infinite value: an unscored question is NaN and has no number.
    """
    if np.isinf(values_N).any():
        raise ValueError("a value is infinite; an unscored value is NaN")
    s, m = sum_by_cluster(values_N, cluster_N)
    n = int(m.sum())
    return Totals(
        clusters=len(s),
        n=n,
        total=round(float(s.sum()), _DECIMALS),
        squares=round(float(s @ s), _DECIMALS),
        cross=round(float(s @ m), _DECIMALS),
        sizes=float(m @ m),
        n_unscored=len(values_N) - n,
    )


def tabulate_clusters(values_N: FloatArray, cluster_N: NDArray[np.intp]) -> tuple[ClusterRow, ...]:
    """Tabulate the clusters as (s, m, number of such clusters), sorted by (s, m), for the sign-flip test."""
    s, m = sum_by_cluster(values_N, cluster_N)
    pairs, counts = np.unique(np.round(s, 6) + 1j * m, return_counts=True)  # sorts by (s, m)
    rows = zip(pairs.real.tolist(), pairs.imag.tolist(), counts.tolist(), strict=True)
    return tuple((a + 0.0, int(b), count) for a, b, count in rows)


def cluster_t_test(totals: Totals, null: float, *, least_variance: float = 0.0) -> MeanTest | None:
    """Test whether the mean totals.total / totals.n is above `null`; None with fewer than MIN_CLUSTERS clusters.

    least_variance: lower limit for the variance of one question's value under the null, |d|(1 - |d|) for differences
    of shares. The sum of squares is expanded, Σ (s - v·m)² = Σ s² - 2v Σ s·m + v² Σ m², so that it can be computed
    from totals pooled over several looks.
    """
    if totals.clusters < MIN_CLUSTERS:
        return None
    value = totals.total / totals.n
    squares = max(0.0, totals.squares - 2 * value * totals.cross + value * value * totals.sizes)
    spread = max(squares, least_variance * totals.n)
    error = float(np.sqrt(totals.clusters / (totals.clusters - 1) * spread)) / totals.n
    freedom = max(1.0, totals.n**2 / totals.sizes - 1)
    if error == 0.0:  # all clusters agree exactly, so no spread exists to compare the distance with
        return MeanTest(value, 0.0, freedom, 0.0 if value > null else 1.0)
    return MeanTest(value, error, freedom, float(stdtr(freedom, (null - value) / error)))


def share_variance(null: float) -> float:
    """Return |d|(1 - |d|), the smallest variance of a difference of two 0/1 values with mean d = `null`."""
    return abs(null) * (1 - abs(null))


def sign_flip_test(rows: Sequence[ClusterRow], null: float) -> float:
    """Return P(Σ ±|x| >= Σ x) over equally likely signs, with x = s - null·m; 1 if every x is 0.

    The sums live on a grid of whole numbers (or of SIGN_FLIP_GRID, to which x is rounded). The distribution of
    Σ ±|x| on the grid follows from its characteristic function Π cos(u·x) by an inverse FFT that is longer than the
    range of the sum, so that nothing wraps around.
    """
    table = np.array(rows, dtype=np.float64).reshape(-1, 3)
    x, count = table[:, 0] - null * table[:, 1], table[:, 2]
    unit = 1.0 if np.all(np.abs(x - np.round(x)) < 1e-9) else SIGN_FLIP_GRID
    k = np.round(x / unit).astype(np.int64)
    observed = int(k @ count)
    sizes, index = np.unique(np.abs(k), return_inverse=True)
    multiplicity = np.bincount(index, weights=count)
    sizes, multiplicity = sizes[sizes > 0], multiplicity[sizes > 0]
    if len(sizes) == 0:
        return 1.0
    greatest = int(sizes @ multiplicity)
    points = 1 << int(2 * greatest + 1).bit_length()
    angles = 2 * np.pi / points * np.arange(points // 2 + 1)
    characteristic = np.ones_like(angles)
    for size, times in zip(sizes, multiplicity, strict=True):  # a loop, because the grid can be long and sizes are few
        characteristic *= np.cos(angles * size) ** int(times)
    mass = np.fft.irfft(characteristic, points)
    upper = mass[np.arange(observed, greatest + 1) % points].sum()
    # Rounding errors must not take p below 2^-C, the probability that all signs agree.
    return float(min(1.0, max(upper, 2.0 ** -float(multiplicity.sum()))))
