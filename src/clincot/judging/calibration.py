"""Calibration of one judge: from its raw P(yes) to the probability that the candidate is right.

The curve is fitted on a small labelled set (scores with right/wrong labels, from the answer key of questions that no
round trains on), stored as JSON and applied to every judgement. Every curve is increasing: calibration puts the judges
of a panel on one scale and never changes the order in which a judge ranks two candidates. Scores are not clipped to a
constant (MMedPO clips z-scores to [0.75, 1.25], which sets 63-74 % of its released scores to exactly 0.75).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator
from scipy.special import expit

from clincot.errors import InvalidInput
from clincot.fields import FiniteFloat, FrozenModel, NonEmptyStr, UnitFloat
from clincot.records import Record

# Shape suffixes: N labelled samples, U distinct scores, K steps of a step function.

CalibrationMethod = Literal["identity", "platt", "isotonic"]
Floats = npt.NDArray[np.float64]

_LOGIT_EDGE = 1e-7  # a float32 softmax cannot distinguish probabilities closer to 1 than this
_ECE_BINS = 10
_FOLDS = 5


class CalibrationRefused(InvalidInput):
    """The labelled set cannot support a calibration of this judge; the message says why and what would help."""


class Reliability(FrozenModel):
    """How well scores behave as probabilities on a labelled set."""

    n: Annotated[int, Field(ge=2)]
    ece: UnitFloat  # expected calibration error, 10 equal-width bins
    brier: UnitFloat  # mean squared error of the probability
    auc: UnitFloat  # P(a right candidate scores above a wrong one), ties count half


class Calibration(Record):
    """An increasing map from a judge's P(yes) to a calibrated probability.

    identity  p
    platt     sigmoid(slope * logit(p) + intercept): Platt scaling of the logit, that is, temperature and bias
    isotonic  linear interpolation between `knots`
    """

    prefix: ClassVar[str] = "calibration"

    judge: NonEmptyStr  # the judge's digest
    method: CalibrationMethod
    slope: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0  # dimensionless: logits per logit
    intercept: FiniteFloat = 0.0  # logits
    knots: tuple[tuple[UnitFloat, UnitFloat], ...] = ()  # (score, calibrated), both strictly increasing; scores 0 to 1
    before: Reliability | None = None  # None: not measured (identity without a labelled set)
    after: Reliability | None = None  # measured out of fold, so the fit does not flatter it
    n_unscored: Annotated[int, Field(ge=0)] = 0  # labelled samples for which the judge gave no score

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
        """The calibrated probability for a raw score; raises ValueError for a score outside [0, 1]."""
        if not 0.0 <= score <= 1.0:
            raise ValueError(f"expected a judge's score as a probability in [0, 1], got {score}")
        if self.method == "identity":
            return score
        if self.method == "platt":
            return float(expit(self.slope * _compute_logit(np.array([score]))[0] + self.intercept))
        xs, ys = zip(*self.knots, strict=True)
        return float(np.interp(score, xs, ys))


def make_identity_calibration(judge: str) -> Calibration:
    """The calibration of a judge without a labelled set: its scores are used as they are."""
    return Calibration(judge=judge, method="identity")


def fit_calibration(
    judge: str,
    scores: Sequence[float | None],
    right: Sequence[bool],
    *,
    method: CalibrationMethod,
    min_samples: int = 40,
) -> Calibration:
    """Fit one judge's calibration on labelled candidates; None scores are counted and excluded.

    `after` is measured out of fold (5 folds, by position within each class); the stored curve is fitted on all samples.
    Raises CalibrationRefused for fewer than min_samples scored samples, for fewer than 5 of either class, and for a
    judge that does not rank right above wrong, on all samples or on the training part of a fold.
    """
    if len(scores) != len(right):
        raise ValueError(f"expected one label for each score, got {len(scores)} scores and {len(right)} labels")
    labelled = [(score, label) for score, label in zip(scores, right, strict=True) if score is not None]
    p_N = np.array([score for score, _ in labelled], dtype=np.float64)
    y_N = np.array([label for _, label in labelled], dtype=np.float64)
    unscored = len(scores) - len(labelled)
    _check_samples(judge, p_N, y_N, min_samples=min_samples, unscored=unscored)
    before = measure_reliability(p_N, y_N)
    if before.auc <= 0.5:
        raise CalibrationRefused(
            f"judge {judge}: AUC {before.auc:.3f} on {len(p_N)} labelled samples, so it does not rank right answers "
            "above wrong ones; no increasing calibration can correct that, remove this judge from the panel"
        )
    curve = Calibration(judge=judge, method=method, **_fit_curve(judge, p_N, y_N, method))
    after = before
    if method != "identity":
        after = measure_reliability(_calibrate_out_of_fold(judge, p_N, y_N, method), y_N)
    return curve.replace_fields(before=before, after=after, n_unscored=unscored)


def measure_reliability(p_N: Floats, y_N: Floats) -> Reliability:
    """ECE, Brier score and AUC of probabilities against labels (0 or 1); both classes must occur.

    ECE = sum_b n_b/N |mean p in b - share right in b| over equal-width bins b (Guo et al. 2017, eq. 5).
    """
    from sklearn.metrics import roc_auc_score  # a second to import, which only a fit needs

    bin_N = np.minimum((p_N * _ECE_BINS).astype(np.int64), _ECE_BINS - 1)
    surplus = np.bincount(bin_N, weights=p_N - y_N, minlength=_ECE_BINS)  # per bin: n_b * (mean p - share right)
    return Reliability(
        n=len(p_N),
        ece=min(1.0, float(np.abs(surplus).sum() / len(p_N))),
        brier=float(np.mean((p_N - y_N) ** 2)),
        auc=float(roc_auc_score(y_N, p_N)),
    )


def _check_samples(judge: str, p_N: Floats, y_N: Floats, *, min_samples: int, unscored: int) -> None:
    if p_N.size and not (np.isfinite(p_N).all() and p_N.min() >= 0 and p_N.max() <= 1):
        raise ValueError(f"judge {judge}: scores must be probabilities in [0, 1], got {p_N.min()} … {p_N.max()}")
    n_right = int(y_N.sum())
    n_wrong = len(y_N) - n_right
    if len(y_N) < min_samples:
        raise CalibrationRefused(
            f"judge {judge}: {len(y_N)} scored labelled samples ({unscored} more without a score), "
            f"at least {min_samples} are needed; label more, or use calibration identity"
        )
    if min(n_right, n_wrong) < _FOLDS:
        raise CalibrationRefused(
            f"judge {judge}: {n_right} right and {n_wrong} wrong labelled samples; at least {_FOLDS} of each are "
            "needed, because a curve cannot be fitted to one class"
        )


def _fit_curve(judge: str, p_N: Floats, y_N: Floats, method: CalibrationMethod) -> dict[str, Any]:
    """The fields of a Calibration that describe its curve."""
    fits: dict[CalibrationMethod, Callable[[Floats, Floats], dict[str, Any]]] = {
        "identity": lambda _p, _y: {},
        "platt": _fit_platt,
        "isotonic": _fit_isotonic,
    }
    curve = fits[method](p_N, y_N)
    if curve.get("slope", 1.0) <= 0:
        raise CalibrationRefused(
            f"judge {judge}: on {len(p_N)} labelled samples (all of them, or the training part of a fold) a higher "
            "score does not make a right answer likelier; the judge is too close to guessing to be calibrated, remove "
            "it from the panel"
        )
    return curve


def _compute_platt_targets(y_N: Floats) -> Floats:
    """Platt's targets (1999): (N+ + 1)/(N+ + 2) for right and 1/(N- + 2) for wrong samples.

    N+ and N- are the numbers of right and wrong samples. With these targets, classes that do not overlap still have a
    finite best fit, and no curve claims certainty from a finite sample.
    """
    n_right = float(y_N.sum())
    n_wrong = len(y_N) - n_right
    return np.where(y_N == 1, (n_right + 1) / (n_right + 2), 1 / (n_wrong + 2))


def _fit_platt(p_N: Floats, y_N: Floats) -> dict[str, Any]:
    """Maximum likelihood of sigmoid(slope * logit(p) + intercept) against Platt's targets."""
    from scipy.optimize import minimize

    if p_N.min() == p_N.max():
        return {"slope": 0.0, "intercept": 0.0}  # refused by the caller
    logit_N, target_N = _compute_logit(p_N), _compute_platt_targets(y_N)
    # standardise the logits so that both parameters are of order 1; the fit is mapped back below
    centre, scale = float(logit_N.mean()), float(logit_N.std())
    z_N = (logit_N - centre) / scale

    def loss(parameters: Floats) -> tuple[float, Floats]:
        """Cross-entropy summed over the samples, and its gradient."""
        s_N = parameters[0] * z_N + parameters[1]
        error_N = expit(s_N) - target_N
        value = float(np.sum(np.logaddexp(0, s_N) - target_N * s_N))
        return value, np.array([np.sum(error_N * z_N), np.sum(error_N)])

    optimum = minimize(loss, np.array([1.0, 0.0]), jac=True, method="BFGS", options={"gtol": 1e-8 * len(p_N)})
    slope, intercept = float(optimum.x[0]) / scale, float(optimum.x[1])
    return {"slope": slope, "intercept": intercept - slope * centre}


def _fit_isotonic(p_N: Floats, y_N: Floats) -> dict[str, Any]:
    """Isotonic regression on Platt's targets, made strictly increasing.

    Plain isotonic regression is a step function, so candidates on one step become ties. As in centred isotonic
    regression (Oron and Flournoy 2017), each step is replaced by a knot at the mean score of its samples, with straight
    lines between the knots. That curve is flat outside the outermost knots; mixing in the raw score with the weight of
    one sample, 1/(N + 1), keeps it strictly increasing there as well without claiming more than the samples support.
    """
    from sklearn.isotonic import isotonic_regression

    score_U, unique_N, count_U = np.unique(p_N, return_inverse=True, return_counts=True)
    target_U = np.bincount(unique_N, weights=_compute_platt_targets(y_N)) / count_U
    fitted_U = np.asarray(isotonic_regression(target_U, sample_weight=count_U))
    level_K, step_U = np.unique(fitted_U, return_inverse=True)
    centre_K = np.bincount(step_U, weights=count_U * score_U) / np.bincount(step_U, weights=count_U)
    xs = np.unique([0.0, *centre_K, 1.0])
    raw_share = 1 / (len(p_N) + 1)
    ys = (1 - raw_share) * np.interp(xs, centre_K, level_K) + raw_share * xs
    return {"knots": tuple((float(x), float(y)) for x, y in zip(xs, ys, strict=True))}


def _calibrate_out_of_fold(judge: str, p_N: Floats, y_N: Floats, method: CalibrationMethod) -> Floats:
    """Calibrate each sample with a curve that was fitted without it."""
    fold_N = np.empty(len(y_N), dtype=np.int64)
    for label in (0, 1):  # by class, so that every fold has samples of both
        members = np.flatnonzero(y_N == label)
        fold_N[members] = np.arange(len(members)) % _FOLDS
    calibrated_N = np.empty(len(p_N))
    for fold in range(_FOLDS):
        held_out_N = fold_N == fold
        fields = _fit_curve(judge, p_N[~held_out_N], y_N[~held_out_N], method)
        curve = Calibration(judge=judge, method=method, **fields)
        calibrated_N[held_out_N] = [curve.calibrate_score(float(score)) for score in p_N[held_out_N]]
    return calibrated_N


def _compute_logit(p_N: Floats) -> Floats:
    inside_N = np.clip(p_N, _LOGIT_EDGE, 1 - _LOGIT_EDGE)
    return np.asarray(np.log(inside_N) - np.log1p(-inside_N))
