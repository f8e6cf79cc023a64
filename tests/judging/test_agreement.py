import random

import krippendorff
import numpy as np
import pytest

from clincot.judging.agreement import IntervalAlpha, compute_krippendorff_alpha


def test_two_judges_who_always_contradict_each_other_by_hand():
    """Units (0, 1) and (1, 0): D_o = (2 + 2) / 4 = 1; of the 12 ordered pairs of {0, 1, 1, 0} 8 differ by 1, so
    D_e = 8/12; alpha = 1 - 1 / (2/3) = -1/2."""
    alpha = compute_krippendorff_alpha([(0.0, 1.0), (1.0, 0.0)])
    assert alpha.value == pytest.approx(-0.5)
    assert alpha.units == 2


def test_three_judges_with_missing_values_by_hand():
    """Units (0, 0, 1), (1, 1, -), (1, -, -); the last cannot disagree and its value does not count.
    n = 5 values {0, 0, 1, 1, 1}. D_o = 1/5 * [4/2 + 0] = 0.4 (the first unit has 4 ordered pairs that differ);
    D_e = 12/20 (2*3 pairs, both orders); alpha = 1 - 0.4/0.6 = 1/3."""
    alpha = compute_krippendorff_alpha([(0.0, 0.0, 1.0), (1.0, 1.0, None), (1.0, None, None)])
    assert alpha.value == pytest.approx(1 / 3)
    assert alpha.units == 2


def test_published_interval_example():
    """Krippendorff's example with three coders, as on Wikipedia ("Krippendorff's alpha"): interval alpha 0.811."""
    none = None
    a = [none, none, none, none, none, 3, 4, 1, 2, 1, 1, 3, 3, none, 3]
    b = [1, none, 2, 1, 3, 3, 4, 3, none, none, none, none, none, none, none]
    c = [none, none, 2, 1, 3, 4, 4, none, 2, 1, 1, 3, 3, none, 4]
    assert compute_krippendorff_alpha(zip(a, b, c, strict=True)).value == pytest.approx(0.811, abs=5e-4)


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_krippendorff_package_on_small_tables(seed):
    rng = random.Random(seed)
    table = [[None if rng.random() < 0.2 else round(rng.random(), 2) for _ in range(3)] for _ in range(30)]
    matrix = np.array([[np.nan if x is None else x for x in row] for row in table]).T
    expected = krippendorff.alpha(reliability_data=matrix, level_of_measurement="interval")
    assert compute_krippendorff_alpha(table).value == pytest.approx(expected, abs=1e-12)


def test_scores_that_lie_close_together_keep_their_alpha():
    """alpha does not change when every score is shifted and shrunk: the sums may not cancel."""
    table = [(0.0, 0.2), (0.5, 0.4), (0.9, 1.0), (0.3, 0.3)]
    squeezed = [(0.5 + 1e-6 * a, 0.5 + 1e-6 * b) for a, b in table]
    assert compute_krippendorff_alpha(squeezed).value == pytest.approx(
        compute_krippendorff_alpha(table).value, abs=1e-6
    )


def test_alpha_is_none_with_a_reason_where_it_is_undefined():
    constant = compute_krippendorff_alpha([(0.7, 0.7), (0.7, 0.7)])
    assert constant.value is None
    assert "every score is 0.7" in constant.reason
    alone = compute_krippendorff_alpha([(0.7, None), (None, 0.2)])
    assert (alone.value, alone.units) == (None, 0)
    assert "no candidate was scored by two judges" in alone.reason
    assert IntervalAlpha().compute_alpha().value is None


def test_ten_thousand_candidates_take_no_memory_to_speak_of():
    """The package's coincidence matrix would hold 30 000 x 30 000 values per candidate."""
    rng = random.Random(0)
    alpha = compute_krippendorff_alpha((rng.random(), rng.random(), rng.random()) for _ in range(10_000))
    assert alpha.value == pytest.approx(0.0, abs=0.03)  # independent judges agree by chance
