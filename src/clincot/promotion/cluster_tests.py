"""One-sided tests of a paired mean with clustered questions, as pure functions on arrays.

Questions about one patient share their errors, so that clusters (patients, or images where the patient is not known)
are what varies. For the mean  value = S / N  of per-question values against a null value d, clusters c with sums s_c
and counts m_c:

- the cluster-robust t (linearised ratio; Cameron & Miller 2015):  (value - d) / error,
  error² = C/(C-1) · Σ (s_c - value·m_c)² / N²,  on K - 1 degrees of freedom, K = N² / Σ m_c² (Kish's effective number
  of clusters, so that a few large patients do not pass for many). Where |d| > 0 and the values are differences of
  shares, error² is at least |d|(1 - |d|) / N: under the null at least a share |d| of the questions differ, so that
  *nothing seen to differ* in 40 questions does not show that less than 2 % do.
- the sign-flip test (Fisher's randomisation test by cluster): if challenger and champion are as good as each other and
  exchangeable, every cluster's sum could as well have had the other sign. Its p-value P(Σ ±|x_c| >= Σ x_c),
  x_c = s_c - d·m_c, is exact whatever the correlation inside a cluster and however few clusters there are. It is
  computed whole, not sampled: the characteristic function of the sum is Π cos(u·x_c), inverted by FFT on a grid.

The gain's p-value is the larger of the two: exact where the two models are exchangeable, and valid for many clusters
where only their means are equal. The other checks use the t alone (their null, a floor, is no exchange).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

from clincot.records import Totals

FloatArray = NDArray[np.float64]
ClusterRow = tuple[float, int, int]  # (s, m, how many clusters have that sum and count)

SIGN_FLIP_GRID = 0.001  # of the sign-flip sums where values are not whole numbers
MIN_CLUSTERS = 6  # 6 of 6 clusters in favour happens once in 2^6 = 64 by chance; with fewer nothing can be shown
_DECIMALS = 9


@dataclass(frozen=True)
class MeanTest:
    """A mean against a null value, one-sided: is it above?"""

    value: float
    error: float  # standard error
    freedom: float  # degrees of freedom
    p: float

    def lower_bound(self, level: float) -> float:
        """The lower confidence bound at 1 - level; the test at `level` passes where it is above the null value."""
        return self.value - float(stdtrit(self.freedom, 1 - level)) * self.error


def sum_by_cluster(values_N: FloatArray, cluster_N: NDArray[np.intp]) -> tuple[FloatArray, FloatArray]:
    """(sums, counts) of the clusters that have a scored value. values: NaN is unscored; cluster: 0, 1, …"""
    scored = ~np.isnan(values_N)
    of = cluster_N[scored]
    count_C = np.bincount(of).astype(np.float64)
    sum_C: FloatArray = np.bincount(of, weights=values_N[scored]).astype(np.float64)
    kept = count_C > 0
    return sum_C[kept], count_C[kept]


def compute_totals(values_N: FloatArray, cluster_N: NDArray[np.intp]) -> Totals:
    """The sums that a t-test needs. Raises ValueError on an infinite value: a failure is NaN here, never a number."""
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
    """All clusters as (s, m, how many): what a sign-flip test needs, in the order of (s, m)."""
    s, m = sum_by_cluster(values_N, cluster_N)
    pairs, counts = np.unique(np.round(s, 6) + 1j * m, return_counts=True)  # sorts by (s, m)
    rows = zip(pairs.real.tolist(), pairs.imag.tolist(), counts.tolist(), strict=True)
    return tuple((a + 0.0, int(b), count) for a, b, count in rows)


def cluster_t_test(totals: Totals, null: float, *, least_variance: float = 0.0) -> MeanTest | None:
    """The cluster-robust t of totals.total / totals.n above `null`; None with fewer clusters than FEWEST_CLUSTERS.

    least_variance: of one question's value under the null, |d|(1 - |d|) for differences of shares.
    """
    if totals.clusters < MIN_CLUSTERS:
        return None
    value = totals.total / totals.n
    squares = max(0.0, totals.squares - 2 * value * totals.cross + value * value * totals.sizes)
    spread = max(squares, least_variance * totals.n)
    error = float(np.sqrt(totals.clusters / (totals.clusters - 1) * spread)) / totals.n
    freedom = max(1.0, totals.n**2 / totals.sizes - 1)
    if error == 0.0:  # all clusters agree to the last digit: there is no spread to measure a distance by
        return MeanTest(value, 0.0, freedom, 0.0 if value > null else 1.0)
    return MeanTest(value, error, freedom, float(stdtr(freedom, (null - value) / error)))


def share_variance(null: float) -> float:
    """The least variance of a difference of shares whose mean is `null`: |d|(1 - |d|)."""
    return abs(null) * (1 - abs(null))


def sign_flip_test(rows: Sequence[ClusterRow], null: float) -> float:
    """P(Σ ±|x| >= Σ x) over all equally likely signs, x = s - null·m; 1 without any x that is not 0."""
    table = np.array(rows, dtype=np.float64).reshape(-1, 3)
    x, count = table[:, 0] - null * table[:, 1], table[:, 2]
    unit = 1.0 if np.all(np.abs(x - np.round(x)) < 1e-9) else SIGN_FLIP_GRID
    k = np.round(x / unit).astype(np.int64)
    observed = int(k @ count)
    sizes, which = np.unique(np.abs(k), return_inverse=True)
    many = np.bincount(which, weights=count)
    sizes, many = sizes[sizes > 0], many[sizes > 0]
    if len(sizes) == 0:
        return 1.0
    greatest = int(sizes @ many)
    points = 1 << int(2 * greatest + 1).bit_length()
    angles = 2 * np.pi / points * np.arange(points // 2 + 1)
    characteristic = np.ones_like(angles)
    for size, times in zip(sizes, many, strict=True):  # in a loop: the grid may be long, and sizes are few
        characteristic *= np.cos(angles * size) ** int(times)
    mass = np.fft.irfft(characteristic, points)
    upper = mass[np.arange(observed, greatest + 1) % points].sum()
    return float(min(1.0, max(upper, 2.0 ** -float(many.sum()))))  # never below all signs alike
