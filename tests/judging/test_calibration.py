import math
from itertools import pairwise

import numpy as np
import pytest
from pydantic import ValidationError

from clincot.jsonl import read_records, write_records
from clincot.judging.calibration import (
    Calibration,
    CalibrationRefused,
    fit_calibration,
    make_identity_calibration,
    measure_reliability,
)


def labelled(counts: dict[float, tuple[int, int]]) -> tuple[list[float], list[bool]]:
    """{score: (wrong, right)} written out."""
    rows = [(s, label) for s, (wrong, right) in counts.items() for label in [False] * wrong + [True] * right]
    return [s for s, _ in rows], [label for _, label in rows]


OVERCONFIDENT = labelled({0.05: (13, 7), 0.2: (12, 8), 0.5: (10, 10), 0.8: (8, 12), 0.95: (7, 13)})


def test_reliability_by_hand():
    """Scores .25 .25 .75 .75, right 0 1 1 1. Bins of two: ECE = 2/4 |.25 - .5| + 2/4 |.75 - 1| = .25.
    Brier = (.0625 + .5625 + .0625 + .0625) / 4 = .1875. AUC: the wrong one at .25 against .25 (a tie, half),
    .75, .75: (0.5 + 1 + 1) / 3."""
    measured = measure_reliability(np.array([0.25, 0.25, 0.75, 0.75]), np.array([0.0, 1.0, 1.0, 1.0]))
    assert measured.ece == pytest.approx(0.25)
    assert measured.brier == pytest.approx(0.1875)
    assert measured.auc == pytest.approx(2.5 / 3)


def test_a_score_of_exactly_one_falls_into_the_last_bin():
    measured = measure_reliability(np.array([0.0, 1.0]), np.array([0.0, 1.0]))
    assert (measured.ece, measured.brier, measured.auc) == (0.0, 0.0, 1.0)


def test_platt_recovers_the_curve_that_made_the_labels():
    """At every score p, a share sigmoid(0.5 logit(p) - 1) of 2000 samples is right: slope 0.5, intercept -1."""
    grid = np.linspace(0.05, 0.95, 19)
    counts = {}
    for p in grid:
        share = 1 / (1 + math.exp(-(0.5 * math.log(p / (1 - p)) - 1)))
        right = round(2000 * share)
        counts[float(p)] = (2000 - right, right)
    fitted = fit_calibration("judge", *labelled(counts), method="platt")
    assert fitted.slope == pytest.approx(0.5, abs=1e-2)
    assert fitted.intercept == pytest.approx(-1.0, abs=1e-2)
    assert fitted.calibrate_score(0.5) == pytest.approx(1 / (1 + math.e), abs=5e-3)


def test_isotonic_knots_by_hand():
    """N+ = 11, N- = 7: Platt's targets are 12/13 and 1/9, so a step with a share r of right ones lies at
    1/9 + r (12/13 - 1/9). Score .4 has r = 3/4, .6 has 1/2 < 3/4: they are pooled to r = 5/8 at their mean score
    .5. Flat outside .2 and .9; the raw score is mixed in with weight 1/(18 + 1)."""
    scores, right = labelled({0.2: (4, 1), 0.4: (1, 3), 0.6: (2, 2), 0.9: (0, 5)})
    fitted = fit_calibration("judge", scores, right, method="isotonic", min_samples=18)
    first, pooled, last = (1 / 9 + r * (12 / 13 - 1 / 9) for r in (1 / 5, 5 / 8, 1))
    levels = {0.0: first, 0.2: first, 0.5: pooled, 0.9: last, 1.0: last}
    expected = [(x, 18 / 19 * level + 1 / 19 * x) for x, level in levels.items()]
    assert np.array(fitted.knots) == pytest.approx(np.array(expected))
    assert fitted.calibrate_score(0.35) == pytest.approx(18 / 19 * (first + pooled) / 2 + 1 / 19 * 0.35)  # half way


def test_isotonic_on_a_judge_that_hardly_knows_says_so():
    """One step at share 10/20 would be a constant; what is left of the raw score is 1/41 of its range. An earlier
    version ran lines from the step to (0, 0) and (1, 1) and so made a guessing judge look certain."""
    scores, right = labelled({0.1: (10, 10), 0.9: (9, 11)})
    fitted = fit_calibration("judge", scores, right, method="isotonic")
    assert 0.45 < fitted.calibrate_score(0.0) < fitted.calibrate_score(1.0) < 0.6


@pytest.mark.parametrize("method", ["platt", "isotonic"])
@pytest.mark.parametrize(
    "counts",
    [
        {0.05: (13, 7), 0.2: (12, 8), 0.5: (10, 10), 0.8: (8, 12), 0.95: (7, 13)},
        {0.3: (24, 17), 0.7: (17, 24)},  # hardly any knowledge
        {0.0: (20, 2), 1.0: (2, 20)},  # a judge that is always certain
        {0.1: (20, 0), 0.9: (0, 20)},  # classes that do not overlap
        {0.93: (15, 3), 0.94: (14, 9), 0.95: (2, 30)},  # everything in a narrow range
    ],
)
def test_every_curve_is_strictly_increasing_within_0_and_1(method, counts):
    """Two candidates that a judge tells apart stay apart: no plateau, no clipping to a constant (as MMedPO's).

    A steep sigmoid runs into the last digit of a float64 far from where it was fitted, and only there may tie.
    """
    fitted = fit_calibration("judge", *labelled(counts), method=method)
    curve = [fitted.calibrate_score(step / 1000) for step in range(1001)]
    assert all(a < b or (a == b and 1 - a < 1e-15) for a, b in pairwise(curve))
    seen = sorted({fitted.calibrate_score(score) for score in counts})
    assert len(seen) == len(counts)
    assert curve[0] >= 0
    assert curve[-1] <= 1


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_overconfidence_is_mended_out_of_fold_and_the_order_kept(method):
    """Scores .05 … .95 where the shares of right answers are .35 … .65: raw ECE is
    (.30 + .20 + 0 + .20 + .30) / 5 = .2."""
    fitted = fit_calibration("judge", *OVERCONFIDENT, method=method)
    assert fitted.before is not None
    assert fitted.after is not None
    assert fitted.before.ece == pytest.approx(0.2)
    assert fitted.after.ece < 0.1
    assert fitted.after.brier < fitted.before.brier


@pytest.mark.parametrize("seed", range(5))
def test_after_is_measured_out_of_fold(seed):
    """Labels that hardly depend on 60 distinct scores: isotonic regression fits its own noise, and must not be
    praised for it. In sample its Brier score is better than on samples that it has not seen."""
    rng = np.random.default_rng(seed)
    scores = rng.random(60)
    right = rng.random(60) < 0.3 + 0.4 * scores
    fitted = fit_calibration("judge", scores.tolist(), right.tolist(), method="isotonic")
    in_sample = measure_reliability(np.array([fitted.calibrate_score(s) for s in scores]), right.astype(float))
    assert fitted.after is not None
    assert fitted.after.brier > in_sample.brier


def test_unscored_samples_are_counted_and_left_aside():
    scores, right = OVERCONFIDENT
    with_gaps = fit_calibration("judge", [*scores, None, None], [*right, True, False], method="platt")
    without = fit_calibration("judge", scores, right, method="platt")
    assert with_gaps.n_unscored == 2
    assert (with_gaps.slope, with_gaps.intercept) == (without.slope, without.intercept)
    assert with_gaps.before is not None
    assert with_gaps.before.n == 100


@pytest.mark.parametrize("method", ["platt", "isotonic", "identity"])
def test_refuses_too_few_samples(method):
    with pytest.raises(CalibrationRefused, match=r"judge j-7: 39 scored labelled samples \(1 more without a score\)"):
        fit_calibration("j-7", [0.2, 0.8] * 19 + [0.9, None], [False, True] * 20, method=method)


def test_refuses_one_class():
    with pytest.raises(CalibrationRefused, match="50 right and 0 wrong"):
        fit_calibration("judge", [i / 50 for i in range(50)], [True] * 50, method="platt")
    with pytest.raises(CalibrationRefused, match="46 right and 4 wrong"):
        fit_calibration("judge", [i / 50 for i in range(50)], [False] * 4 + [True] * 46, method="platt")


def test_refuses_nothing_scored():
    with pytest.raises(CalibrationRefused, match="0 scored labelled samples"):
        fit_calibration("judge", [None] * 50, [True, False] * 25, method="platt")


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_inverted_and_constant_judges_are_refused(method):
    """A judge that prefers wrong answers, or gives one score to everything, is refused."""
    scores, right = OVERCONFIDENT
    with pytest.raises(CalibrationRefused, match=r"AUC 0\.[0-4]"):
        fit_calibration("judge", [1 - s for s in scores], right, method=method)
    with pytest.raises(CalibrationRefused, match=r"AUC 0\.500"):
        fit_calibration("judge", [0.7] * len(right), right, method=method)


def test_refuses_a_judge_whose_knowledge_hangs_on_one_sample():
    """AUC above 1/2 thanks to a single sample; without it the scores are constant."""
    with pytest.raises(CalibrationRefused, match="too close to guessing"):
        fit_calibration("judge", [0.7] * 59 + [0.9], [False] * 30 + [True] * 30, method="platt")


def test_refuses_scores_that_are_no_probabilities():
    with pytest.raises(ValueError, match=r"probabilities in \[0, 1\]"):
        fit_calibration("judge", [1.5, *[0.5] * 99], [True, False] * 50, method="platt")
    with pytest.raises(ValueError, match=r"probabilities in \[0, 1\]"):
        fit_calibration("judge", [math.nan, *[0.5] * 99], [True, False] * 50, method="platt")
    with pytest.raises(ValueError, match="3 scores and 2 labels"):
        fit_calibration("judge", [0.1, 0.2, 0.3], [True, False], method="platt")


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan])
def test_apply_refuses_what_is_no_probability(bad):
    with pytest.raises(ValueError, match=r"probability in \[0, 1\]"):
        make_identity_calibration("judge").calibrate_score(bad)


def test_identity_keeps_scores_and_reports_reliability():
    """Identity leaves scores unchanged, and reports their reliability if there are labels."""
    assert make_identity_calibration("judge").calibrate_score(0.37) == 0.37
    assert make_identity_calibration("judge").before is None
    measured = fit_calibration("judge", *OVERCONFIDENT, method="identity")
    assert measured.calibrate_score(0.37) == 0.37
    assert measured.before == measured.after


@pytest.mark.parametrize("method", ["identity", "platt", "isotonic"])
def test_survives_a_file_bit_for_bit(tmp_path, method):
    fitted = fit_calibration("judge", *OVERCONFIDENT, method=method)
    write_records(tmp_path / "calibrations.jsonl", [fitted])
    (back,) = read_records(tmp_path / "calibrations.jsonl", Calibration)
    assert back == fitted
    assert [back.calibrate_score(i / 7) for i in range(8)] == [fitted.calibrate_score(i / 7) for i in range(8)]


def test_a_decreasing_curve_cannot_be_written_down():
    with pytest.raises(ValidationError, match="slope"):
        Calibration(judge="judge", method="platt", slope=-1.0)
    with pytest.raises(ValidationError, match="strictly increasing"):
        Calibration(judge="judge", method="isotonic", knots=((0, 0), (0.5, 0.5), (0.6, 0.5), (1, 1)))
    with pytest.raises(ValidationError, match="from score 0 to score 1"):
        Calibration(judge="judge", method="isotonic", knots=((0.1, 0.2), (1, 1)))
    with pytest.raises(ValidationError, match="knots belong to isotonic"):
        Calibration(judge="judge", method="platt", knots=((0, 0), (1, 1)))
