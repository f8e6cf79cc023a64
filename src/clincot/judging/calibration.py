"""Calibration of one judge: from its raw P(yes) to the probability that a candidate it rates so is right.

Fitted on a small labelled set (scores with right/wrong; the answer key of questions that no round trains on),
stored as JSON, applied to every judgement. Every curve is increasing: calibration puts the judges of a panel
on one scale and never changes a judge's order of two candidates. Nothing is clipped to a constant (MMedPO's
clipping of z-scores to [0.75, 1.25] sends 63-74 % of its released scores to exactly 0.75).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.isotonic import isotonic_regression
from sklearn.metrics import roc_auc_score

from clincot.errors import InvalidInput
from clincot.fields import FiniteFloat, FrozenModel, NonEmptyStr, UnitFloat
from clincot.records import Record

CalibrationMethod = Literal["identity", "platt", "isotonic"]
Floats = npt.NDArray[np.float64]

_LOGIT_EDGE = 1e-7  # a float32 softmax cannot tell probabilities closer to 1 than this apart
_ECE_BINS = 10
_FOLDS = 5


class CalibrationRefused(InvalidInput):
    """The labelled set does not support a calibration of this judge: says why, and what would."""


class Reliability(FrozenModel):
    """How well scores behave as probabilities on a labelled set."""

    n: Annotated[int, Field(ge=2)]
    ece: UnitFloat  # expected calibration error, 10 equal-width bins
    brier: UnitFloat  # mean squared error of the probability
    auc: UnitFloat  # P(a right candidate scores above a wrong one), ties half


class Calibration(Record):
    """An increasing map from a judge's P(yes) to a calibrated probability.

    identity  p
    platt     sigmoid(slope * logit(p) + intercept): Platt scaling of the logit, that is temperature and bias
    isotonic  straight lines through `knots`
    """

    prefix: ClassVar[str] = "calibration"

    judge: NonEmptyStr  # the judge's digest
    method: CalibrationMethod
    slope: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0  # per logit
    intercept: FiniteFloat = 0.0  # logits
    knots: tuple[tuple[UnitFloat, UnitFloat], ...] = ()  # (score, calibrated), both strictly increasing, from 0 to 1
    before: Reliability | None = None  # None: not measured (identity without a labelled set)
    after: Reliability | None = None  # out of fold, so not flattered by its own fit
    n_unscored: Annotated[int, Field(ge=0)] = 0  # labelled samples on which the judge gave no score

    @model_validator(mode="after")
    def _check_increasing(self) -> Self:
        if self.method != "isotonic":
            if self.knots:
                raise ValueError(f"knots belong to isotonic calibration, not to {self.method}")
            return self
        if len(self.knots) < 2 or self.knots[0][0] != 0.0 or self.knots[-1][0] != 1.0:
            raise ValueError(f"isotonic knots must run from score 0 to score 1, got {self.knots}")
        if any(b[0] <= a[0] or b[1] <= a[1] for a, b in pairwise(self.knots)):
            raise ValueError(f"isotonic knots must be strictly increasing in both coordinates, got {self.knots}")
        return self

    def calibrate_score(self, score: float) -> float:
        """The calibrated probability of a raw score in [0, 1]."""
        if not 0.0 <= score <= 1.0:
            raise ValueError(f"a judge's score is a probability in [0, 1], got {score}")
        if self.method == "identity":
            return score
        if self.method == "platt":
            return float(expit(self.slope * _compute_logit(np.array([score]))[0] + self.intercept))
        xs, ys = zip(*self.knots, strict=True)
        return float(np.interp(score, xs, ys))


def make_identity_calibration(judge: str) -> Calibration:
    """The calibration of a judge for which there is no labelled set."""
    return Calibration(judge=judge, method="identity")


def fit_calibration(
    judge: str,
    scores: Sequence[float | None],
    right: Sequence[bool],
    *,
    method: CalibrationMethod,
    min_samples: int = 40,
) -> Calibration:
    """Fit one judge's calibration on labelled candidates; None scores are counted and left aside.

    `after` is measured out of fold (5 folds, by position within each class), the stored curve is fitted on
    everything. Raises CalibrationRefused for fewer than min_samples scored samples, fewer than 5 of either
    class, or a judge that does not rank right above wrong, on all samples or on all but a fifth.
    """
    if len(scores) != len(right):
        raise ValueError(f"one label a score: got {len(scores)} scores and {len(right)} labels")
    kept = [(score, label) for score, label in zip(scores, right, strict=True) if score is not None]
    p = np.array([score for score, _ in kept], dtype=np.float64)
    y = np.array([label for _, label in kept], dtype=np.float64)
    _check_samples(judge, p, y, min_samples=min_samples, unscored=len(scores) - len(kept))
    before = measure_reliability(p, y)
    if before.auc <= 0.5:
        raise CalibrationRefused(
            f"judge {judge}: AUC {before.auc:.3f} on {len(p)} labelled samples, so it does not rank right answers "
            "above wrong ones; no increasing calibration mends that, leave this judge out of the panel"
        )
    shape = _fit_curve(judge, p, y, method)
    curve = Calibration(judge=judge, method=method, **shape)
    after = before if method == "identity" else measure_reliability(_calibrate_out_of_fold(judge, p, y, method), y)
    content = curve.model_dump(exclude={"id"}) | {"before": before, "after": after}
    return Calibration(**content | {"n_unscored": len(scores) - len(kept)})


def measure_reliability(p: Floats, y: Floats) -> Reliability:
    """ECE, Brier score and AUC of probabilities p [N] against labels y [N], 0 or 1; both classes must occur.

    ECE = sum_b n_b/N |mean p in b - share right in b| over equal-width bins (Guo et al. 2017, eq. 5).
    """
    bins = np.minimum((p * _ECE_BINS).astype(np.int64), _ECE_BINS - 1)
    surplus = np.bincount(bins, weights=p - y, minlength=_ECE_BINS)  # n_b * (mean p - share right)
    return Reliability(
        n=len(p),
        ece=min(1.0, float(np.abs(surplus).sum() / len(p))),
        brier=float(np.mean((p - y) ** 2)),
        auc=float(roc_auc_score(y, p)),
    )


def _check_samples(judge: str, p: Floats, y: Floats, *, min_samples: int, unscored: int) -> None:
    if p.size and not (np.isfinite(p).all() and p.min() >= 0 and p.max() <= 1):
        raise ValueError(f"judge {judge}: scores must be probabilities in [0, 1], got {p.min()} … {p.max()}")
    n_right = int(y.sum())
    n_wrong = len(y) - n_right
    if len(y) < min_samples:
        raise CalibrationRefused(
            f"judge {judge}: {len(y)} scored labelled samples ({unscored} more without a score), "
            f"at least {min_samples} are needed; label more, or use calibration identity"
        )
    if min(n_right, n_wrong) < _FOLDS:
        raise CalibrationRefused(
            f"judge {judge}: {n_right} right and {n_wrong} wrong labelled samples; at least {_FOLDS} of each "
            "are needed, since what one class alone looks like says nothing about the other"
        )


def _fit_curve(judge: str, p: Floats, y: Floats, method: CalibrationMethod) -> dict[str, Any]:
    """The fields of a Calibration that describe its curve."""
    shapes: dict[CalibrationMethod, Callable[[Floats, Floats], dict[str, Any]]] = {
        "identity": lambda _p, _y: {},
        "platt": _fit_platt,
        "isotonic": _fit_isotonic,
    }
    shape = shapes[method](p, y)
    if shape.get("slope", 1.0) <= 0:
        raise CalibrationRefused(
            f"judge {judge}: on {len(p)} labelled samples (all, or all but the fifth it is tested on) a higher score "
            "makes a right answer no likelier; it is too close to guessing to calibrate, leave it out of the panel"
        )
    return shape


def _compute_platt_targets(y: Floats) -> Floats:
    """Platt's targets (1999): (N+ + 1)/(N+ + 2) for right and 1/(N- + 2) for wrong samples.

    With them classes that do not overlap still have a finite best fit, and no curve claims certainty from a
    finite sample.
    """
    n_right = float(y.sum())
    n_wrong = len(y) - n_right
    return np.where(y == 1, (n_right + 1) / (n_right + 2), 1 / (n_wrong + 2))


def _fit_platt(p: Floats, y: Floats) -> dict[str, Any]:
    """Maximum likelihood of sigmoid(slope * logit(p) + intercept) against Platt's targets."""
    if p.min() == p.max():
        return {"slope": 0.0, "intercept": 0.0}  # refused by the caller
    logit, target = _compute_logit(p), _compute_platt_targets(y)
    centre, scale = float(logit.mean()), float(logit.std())
    z = (logit - centre) / scale

    def loss(parameters: Floats) -> tuple[float, Floats]:
        s = parameters[0] * z + parameters[1]
        error = expit(s) - target
        value = float(np.sum(np.logaddexp(0, s) - target * s))
        return value, np.array([np.sum(error * z), np.sum(error)])

    found = minimize(loss, np.array([1.0, 0.0]), jac=True, method="BFGS", options={"gtol": 1e-8 * len(p)})
    slope, intercept = float(found.x[0]) / scale, float(found.x[1])
    return {"slope": slope, "intercept": intercept - slope * centre}


def _fit_isotonic(p: Floats, y: Floats) -> dict[str, Any]:
    """Isotonic regression on Platt's targets, made strictly increasing.

    Plain isotonic regression is a staircase, so candidates on one step become ties. As in centred isotonic
    regression (Oron and Flournoy 2017) each step is put at its samples' mean score, with straight lines between
    the steps. Outside the outermost steps that curve is flat; mixing in the raw score with the weight of one
    sample, 1/(N + 1), keeps it strictly increasing there too and says no more than the samples do.
    """
    score, where, count = np.unique(p, return_inverse=True, return_counts=True)
    mean_target = np.bincount(where, weights=_compute_platt_targets(y)) / count
    fitted = np.asarray(isotonic_regression(mean_target, sample_weight=count))
    level, step = np.unique(fitted, return_inverse=True)
    centre = np.bincount(step, weights=count * score) / np.bincount(step, weights=count)
    xs = np.unique([0.0, *centre, 1.0])
    raw_share = 1 / (len(p) + 1)
    ys = (1 - raw_share) * np.interp(xs, centre, level) + raw_share * xs
    return {"knots": tuple((float(x), float(v)) for x, v in zip(xs, ys, strict=True))}


def _calibrate_out_of_fold(judge: str, p: Floats, y: Floats, method: CalibrationMethod) -> Floats:
    """Each sample's calibrated score by a curve that was fitted without it."""
    fold = np.empty(len(y), dtype=np.int64)
    for label in (0, 1):
        members = np.flatnonzero(y == label)
        fold[members] = np.arange(len(members)) % _FOLDS
    calibrated = np.empty(len(p))
    for k in range(_FOLDS):
        held = fold == k
        curve = Calibration(judge=judge, method=method, **_fit_curve(judge, p[~held], y[~held], method))
        calibrated[held] = [curve.calibrate_score(float(score)) for score in p[held]]
    return calibrated


def _compute_logit(p: Floats) -> Floats:
    inside = np.clip(p, _LOGIT_EDGE, 1 - _LOGIT_EDGE)
    return np.asarray(np.log(inside) - np.log1p(-inside))
