"""The gate's tests against hand-worked cases, SciPy, and enumeration of all signs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from clincot.promotion.cluster_tests import (
    MIN_CLUSTERS,
    cluster_t_test,
    compute_totals,
    share_variance,
    sign_flip_test,
    tabulate_clusters,
)
from clincot.records import Totals

NAN = float("nan")


def of(*clusters: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Values and cluster numbers from one list a cluster."""
    return np.array([v for c in clusters for v in c]), np.array([i for i, c in enumerate(clusters) for _ in c])


def test_totals_by_hand() -> None:
    # clusters (s, m): (2, 2), (-1, 1); the third has nothing scored
    totals = compute_totals(*of([1, 1], [-1, NAN], [NAN]))
    assert totals == Totals(clusters=2, n=3, total=1, squares=5, cross=3, sizes=5, n_unscored=2)


def test_totals_of_disjoint_patients_add_up() -> None:
    one, other = of([1, 0], [-1]), of([0.5], [1, 1])
    both = of([1, 0], [-1], [0.5], [1, 1])
    assert compute_totals(*one) + compute_totals(*other) == compute_totals(*both)


def test_one_question_a_cluster_is_the_ordinary_t_test() -> None:
    values = np.array([1, 0, 1, -1, 1, 0, 0, 1, 1, 0], dtype=float)
    ours = cluster_t_test(compute_totals(values, np.arange(10)), 0.1)
    assert ours is not None
    theirs = stats.ttest_1samp(values, 0.1, alternative="greater")
    assert ours.p == pytest.approx(theirs.pvalue, abs=1e-9)
    # the bound at a level equal to p is the null value
    assert ours.lower_bound(ours.p) == pytest.approx(0.1, abs=1e-9)


def test_repeating_every_patients_answer_adds_no_evidence() -> None:
    values = [1, 0, 1, -1, 1, 0, 0, 1]
    once = cluster_t_test(compute_totals(*of(*([v] for v in values))), 0.0)
    twice = cluster_t_test(compute_totals(*of(*([v, v] for v in values))), 0.0)
    assert once is not None
    assert twice is not None
    assert (twice.value, twice.error, twice.p) == pytest.approx((once.value, once.error, once.p))


def test_large_patients_reduce_the_degrees_of_freedom() -> None:
    # one patient of 90 questions and nine of 10: Kish's number is 180² / (90² + 9·10²) = 3.6
    test = cluster_t_test(compute_totals(*of([1.0] * 90, *([0.0, 1.0] * 5 for _ in range(9)))), 0.0)
    assert test is not None
    assert test.freedom == pytest.approx(3.6 - 1)


def test_too_few_patients_show_nothing() -> None:
    few = of(*([1.0] for _ in range(MIN_CLUSTERS - 1)))
    assert cluster_t_test(compute_totals(*few), 0.0) is None


def test_no_abstention_in_forty_does_not_show_they_are_rare() -> None:
    """Without the least variance its spread is 0 and the test passes at any level; at a true rate of 5 % forty
    questions without one happen in .95^40 = 13 % of all cases."""
    none = compute_totals(np.zeros(40), np.arange(40))
    careless = cluster_t_test(none, -0.05)
    assert careless is not None
    assert careless.p == 0.0
    careful = cluster_t_test(none, -0.05, least_variance=share_variance(0.05))
    assert careful is not None
    # (.05) / √(.05·.95·(40/39)/40) = 1.433 on 39 degrees of freedom
    assert careful.p == pytest.approx(stats.t.sf(0.05 / math.sqrt(0.05 * 0.95 / 39), 39), abs=1e-9)
    assert careful.p > 0.05


def test_an_infinite_value_is_refused() -> None:
    with pytest.raises(ValueError, match="infinite"):
        compute_totals(np.array([1.0, math.inf]), np.array([0, 1]))


@pytest.mark.parametrize("null", [0.0, 0.05])
def test_sign_flips_are_those_of_full_enumeration(null: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        values, clusters = rng.integers(-1, 2, 30).astype(float), rng.integers(0, 12, 30)
        rows = tabulate_clusters(values, clusters)
        x = np.array([s - null * m for s, m, count in rows for _ in range(count)])
        sums = [np.dot(signs, np.abs(x)) for signs in itertools.product((-1, 1), repeat=len(x))]
        expected = np.mean(np.array(sums) >= x.sum() - 1e-9)
        assert sign_flip_test(rows, null) == pytest.approx(expected, abs=1e-6)


def test_all_of_seven_patients_in_favour_is_one_in_128() -> None:
    rows = tabulate_clusters(np.ones(7), np.arange(7))
    assert rows == ((1.0, 1, 7),)
    assert sign_flip_test(rows, 0.0) == pytest.approx(1 / 128)
    assert sign_flip_test(tabulate_clusters(np.zeros(7), np.arange(7)), 0.0) == 1.0  # identical answers
    assert sign_flip_test(tabulate_clusters(-np.ones(7), np.arange(7)), 0.0) == pytest.approx(1.0)
