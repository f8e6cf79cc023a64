"""The cluster bootstrap, against hand-worked cases, SciPy's bootstrap and its own coverage."""

import math
import random

import numpy as np
import pytest
from scipy import stats

from clincot.evaluation.intervals import (
    ClusterSums,
    ClusterTotals,
    MetricSums,
    add_mean,
    add_totals,
    cluster_bootstrap,
    cluster_wilson_interval,
    paired_difference,
    percentile_tail,
)
from clincot.records import Interval


def test_value_is_the_mean_over_questions_not_over_clusters() -> None:
    # patient a: 3 of 3 right, patient b: 0 of 1. Questions: 3/4; patients would give 1/2.
    interval = cluster_bootstrap([True, True, True, False], ["a", "a", "a", "b"], seed=0)
    assert interval.value == 0.75
    assert (interval.n, interval.n_unscored, interval.clusters) == (4, 0, 2)


def test_two_clusters_by_hand() -> None:
    # Resamples of {a: 1/1, b: 0/3} are aa = 1, ab = ba = 1/4, bb = 0; the expanded tail of two clusters is
    # Φ(-√2 · 12.7) ≈ 0, so the interval reaches from the least resample to the greatest.
    interval = cluster_bootstrap([1, 0, 0, 0], ["a", "b", "b", "b"], seed=0)
    assert (interval.value, interval.low, interval.high) == (0.25, 0.0, 1.0)


def test_unscored_values_are_left_out_and_counted() -> None:
    with_none = cluster_bootstrap([1.0, None, 0.0, None], ["a", "a", "b", "c"], seed=0)
    without = cluster_bootstrap([1.0, 0.0], ["a", "b"], seed=0)
    assert with_none == without.model_copy(update={"n_unscored": 2})
    assert with_none.clusters == 2  # c has nothing scored


def test_nothing_scored_has_no_value() -> None:
    assert cluster_bootstrap([], [], seed=0) == Interval(value=None, n=0)
    assert cluster_bootstrap([None, None], ["a", "b"], seed=0) == Interval(value=None, n=0, n_unscored=2)


def test_one_cluster_has_a_value_and_no_interval() -> None:
    interval = cluster_bootstrap([1.0, 0.0], ["a", "a"], seed=0)
    assert (interval.value, interval.low, interval.high, interval.clusters) == (0.5, None, None, 1)


def test_a_failure_is_none_and_never_nan() -> None:
    with pytest.raises(ValueError, match="cluster 'b' is nan; an unscored value is None"):
        cluster_bootstrap([1.0, math.nan], ["a", "b"], seed=0)
    with pytest.raises(ValueError, match="is inf"):
        cluster_bootstrap([math.inf], ["a"], seed=0)


def test_a_missing_patient_is_refused() -> None:
    """Study.patient is "" where it is unknown: taken as a key, all such studies would be one patient."""
    with pytest.raises(ValueError, match="empty key"):
        cluster_bootstrap([1.0], [""], seed=0)


def test_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        cluster_bootstrap([1.0, 0.0], ["a"], seed=0)
    with pytest.raises(ValueError, match="same questions, got 2 and 1"):
        paired_difference([1, 0], [1], ["a", "b"], seed=0)


def test_an_interval_depends_on_the_seed_not_on_the_order() -> None:
    draw = random.Random(0)
    rows = [(draw.random(), f"patient-{draw.randrange(30)}") for _ in range(200)]

    def interval(rows: list[tuple[float, str]], seed: int) -> Interval:
        return cluster_bootstrap([value for value, _ in rows], [key for _, key in rows], seed=seed)

    shuffled = rows.copy()
    draw.shuffle(shuffled)
    assert interval(rows, 7) == interval(rows, 7) == interval(shuffled, 7)
    assert interval(rows, 7) != interval(rows, 8)


def test_resamples_drawn_in_blocks_are_the_same_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    values, clusters = [0.1 * (number % 7) for number in range(60)], [str(number % 20) for number in range(60)]
    at_once = cluster_bootstrap(values, clusters, seed=3, resamples=501)
    monkeypatch.setattr("clincot.evaluation.intervals._MAX_DRAWS_IN_MEMORY", 20 * 64)  # blocks of 64 resamples
    assert cluster_bootstrap(values, clusters, seed=3, resamples=501) == at_once


def test_streamed_sums_give_what_the_lists_give() -> None:
    sums = ClusterSums()
    for value, cluster in ((1.0, "a"), (None, "a"), (0.0, "b"), (1.0, "c")):
        sums.add(value, cluster)
    assert sums.compute_interval(seed=5) == cluster_bootstrap([1.0, None, 0.0, 1.0], ["a", "a", "b", "c"], seed=5)


def test_tail_expansion() -> None:
    # t_{.975, 9} = 2.262157; √(10/9) · 2.262157 = 2.384523; Φ(-2.384523) = .00855 (normal table: .0085 to .0087)
    assert percentile_tail(10) == pytest.approx(0.00855, abs=1e-4)
    assert percentile_tail(40) < percentile_tail(400) < 0.025
    assert percentile_tail(100_000) == pytest.approx(0.025, abs=1e-5)


def test_agrees_with_scipy_on_cluster_sums() -> None:
    """scipy.stats.bootstrap of the ratio over (sum, count) pairs, at the confidence that our tail stands for."""
    draw = np.random.default_rng(11)
    counts = draw.integers(1, 9, size=50)
    sums = draw.binomial(counts, draw.beta(2, 2, size=50))
    values = [float(i < s) for s, n in zip(sums, counts, strict=True) for i in range(n)]
    clusters = [f"patient-{c}" for c, n in enumerate(counts) for _ in range(n)]
    reference = stats.bootstrap(
        (sums, counts),
        lambda s, n, axis: s.sum(axis=axis) / n.sum(axis=axis),
        paired=True,
        method="percentile",
        confidence_level=1 - 2 * percentile_tail(50),
        n_resamples=20_000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    ours = cluster_bootstrap(values, clusters, seed=0, resamples=20_000)
    assert ours.value == pytest.approx(sums.sum() / counts.sum(), abs=1e-6)
    width = reference.high - reference.low
    assert ours.low == pytest.approx(reference.low, abs=0.04 * width)
    assert ours.high == pytest.approx(reference.high, abs=0.04 * width)


def test_one_question_a_patient_has_the_width_of_the_t_interval() -> None:
    # 400 ones and zeros, half and half: standard error √(.25/399) = .02503, t_{.975, 399} = 1.966
    interval = cluster_bootstrap([i % 2 for i in range(400)], [str(i) for i in range(400)], seed=0, resamples=8000)
    assert interval.low is not None
    assert interval.high is not None
    assert interval.high - interval.low == pytest.approx(2 * 1.966 * 0.02503, rel=0.05)


class TestPairedDifference:
    def test_by_hand(self) -> None:
        # differences +1, 0, 0, -1, +1 -> mean 1/5; the pair with a None is unscored
        a, b = [1, 1, 0, 0, 1, None, 1], [0, 1, 0, 1, 0, 1, None]
        interval = paired_difference(a, b, ["p", "p", "q", "q", "r", "r", "s"], seed=0)
        assert interval.value == 0.2
        assert (interval.n, interval.n_unscored, interval.clusters) == (5, 2, 3)

    def test_is_first_minus_second(self) -> None:
        a, b, clusters = [1, 1, 0, 1], [0, 1, 0, 0], ["p", "q", "r", "s"]
        forth = paired_difference(a, b, clusters, seed=0)
        back = paired_difference(b, a, clusters, seed=0)
        assert (forth.value, back.value) == (0.5, -0.5)

    def test_takes_booleans(self) -> None:
        assert paired_difference([True, False], [False, False], ["p", "q"], seed=0).value == 0.5

    def test_pairing_removes_what_both_sides_share(self) -> None:
        """Hard and easy questions: each accuracy is uncertain, their difference is exactly one in ten."""
        easy = [i % 2 for i in range(100)]
        better = [max(value, int(i % 10 == 0)) for i, value in enumerate(easy)]  # the hard ones among every tenth
        clusters = [str(i // 10) for i in range(100)]  # every patient has one such question
        interval = paired_difference(better, easy, clusters, seed=0)
        assert (interval.low, interval.value, interval.high) == (0.1, 0.1, 0.1)


def _coverage(clusters: int, *, trials: int) -> float:
    """Share of intervals that hold the truth, .6, where patients differ: right ~ Bernoulli(p), p ~ Beta(3, 2)."""
    draw = np.random.default_rng(clusters)
    inside = 0
    for trial in range(trials):
        p_C = draw.beta(3, 2, size=clusters)
        right = draw.random((clusters, 5)) < p_C[:, None]
        keys = np.repeat(np.arange(clusters), 5).astype(str)
        interval = cluster_bootstrap(right.ravel().tolist(), keys.tolist(), seed=trial, resamples=500)
        assert interval.low is not None
        assert interval.high is not None
        inside += interval.low <= 0.6 <= interval.high
    return inside / trials


def test_coverage_at_forty_clusters_is_near_95_percent() -> None:
    # 600 trials: one standard error of a 95 % share is √(.95·.05/600) = .009; three of them each side
    assert _coverage(40, trials=600) == pytest.approx(0.95, abs=0.027)


def test_coverage_at_eight_clusters_is_not_far_off() -> None:
    """Without the expansion it would be about 90 %."""
    assert _coverage(8, trials=600) == pytest.approx(0.95, abs=0.035)


def test_questions_taken_as_independent_would_cover_too_little() -> None:
    """Why it is clustered: the same data, each question its own cluster, holds the truth far less often."""
    draw = np.random.default_rng(1)
    inside = 0
    for trial in range(300):
        right = draw.random((40, 5)) < draw.beta(0.6, 0.4, size=40)[:, None]  # mean .6, questions alike in a patient
        keys = [str(number) for number in range(200)]
        interval = cluster_bootstrap(right.ravel().tolist(), keys, seed=trial, resamples=500)
        assert interval.low is not None
        assert interval.high is not None
        inside += interval.low <= 0.6 <= interval.high
    assert inside / 300 < 0.85


def test_one_question_per_patient_gives_wilson_with_t() -> None:
    """12 of 40. n_eff = p(1-p)/var = 40·39/40 = 39, since var has 40/39; t(.975, 39) = 2.0227."""
    interval = cluster_wilson_interval([i < 12 for i in range(40)], [str(i) for i in range(40)])
    t, n, p = stats.t.ppf(0.975, 39), 39, 0.3
    centre, half = (p + t * t / 2 / n), t * math.sqrt(p * (1 - p) / n + (t / 2 / n) ** 2)
    assert interval.low == pytest.approx((centre - half) / (1 + t * t / n), abs=1e-6)
    assert interval.high == pytest.approx((centre + half) / (1 + t * t / n), abs=1e-6)


def test_ten_of_ten_right_is_not_certainty() -> None:
    """The bootstrap gave [1, 1]. t(.975, 9) = 2.262: (1 + 5.117/20 - …) = .6615, by hand."""
    interval = cluster_wilson_interval([True] * 10, [str(i) for i in range(10)])
    assert (interval.low, interval.high) == (pytest.approx(0.6615, abs=1e-4), 1.0)


def test_answers_of_one_patient_widen_a_share() -> None:
    values = [i % 10 < 6 for i in range(100)]
    apart = cluster_wilson_interval(values, [str(i) for i in range(100)])
    together = cluster_wilson_interval(
        sorted(values), [str(i // 10) for i in range(100)]
    )  # patients all right or all wrong
    assert apart.low is not None and together.low is not None  # noqa: PT018
    assert together.low < apart.low - 0.1


def test_a_share_above_one_is_refused() -> None:
    with pytest.raises(ValueError, match="values of a share are in"):
        cluster_wilson_interval([1.5, 0.0], ["a", "b"])


class TestTotals:
    """A statistic of summed totals: here the ratio of two, which ClusterSums knows as a mean."""

    @staticmethod
    def ratio(totals: np.ndarray) -> float | None:
        return float(totals[0] / totals[1]) if totals[1] else None

    def test_the_statistic_is_computed_from_the_sums(self) -> None:
        """a: 1 of 1, b: 0 of 3: 1/4. Resamples aa = 1, ab = 1/4, bb = 0, and two clusters reach to both ends."""
        totals = ClusterTotals(self.ratio)
        totals.add([1, 1], "a")
        totals.add([0, 2], "b")
        totals.add([0, 1], "b")
        totals.add(None, "c")
        interval = totals.compute_interval(seed=0)
        assert (interval.value, interval.low, interval.high) == (0.25, 0.0, 1.0)
        assert (interval.n, interval.n_unscored, interval.clusters) == (3, 1, 2)

    def test_a_mean_as_statistic_gives_the_interval_of_the_mean(self) -> None:
        values = [random.Random(n).random() for n in range(60)]
        clusters = [f"p{n % 20}" for n in range(60)]
        totals = ClusterTotals(self.ratio)
        for value, cluster in zip(values, clusters, strict=True):
            totals.add([value, 1], cluster)
        assert totals.compute_interval(seed=3, resamples=500) == cluster_bootstrap(
            values, clusters, seed=3, resamples=500
        )

    def test_an_undefined_statistic_has_no_value(self) -> None:
        totals = ClusterTotals(self.ratio)
        totals.add([0, 0], "a")
        totals.add([0, 0], "b")
        assert totals.compute_interval(seed=0) == Interval(value=None, n=2, clusters=2)
        assert ClusterTotals(self.ratio).compute_interval(seed=0) == Interval(value=None, n=0)

    def test_nan_and_a_missing_cluster_are_refused(self) -> None:
        with pytest.raises(ValueError, match="an unscored item is None"):
            ClusterTotals(self.ratio).add([math.nan, 1], "a")
        with pytest.raises(ValueError, match="empty key"):
            ClusterTotals(self.ratio).add([1, 1], "")

    def test_a_name_is_a_mean_or_a_statistic(self) -> None:
        sums: MetricSums = {}
        add_mean(sums, "a", 1.0, "p")
        add_totals(sums, "b", self.ratio, [1, 2], "p")
        assert {name: metric.compute_interval(seed=0).value for name, metric in sums.items()} == {"a": 1.0, "b": 0.5}
        with pytest.raises(TypeError, match="'a' is a mean"):
            add_totals(sums, "a", self.ratio, [1, 2], "p")
        with pytest.raises(TypeError, match="'b' is a statistic"):
            add_mean(sums, "b", 1.0, "p")
