"""How far a score can be believed: reliability curves, D-ECE, and corrections fitted on one half of the images.

D-ECE (Kueppers and others, CVPR Workshops 2020, here over the score alone): detections are put into bins by score; the
mean over detections of |precision of the bin - mean score of the bin|. D detections, B bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cascade_rcnn.analysis.scenes import Bools, Floats, Ints

BINS = 10


@dataclass(frozen=True)
class Reliability:
    """What detections of about one score are worth; NaN in empty bins."""

    scores: Floats  # [B], mean score
    precision: Floats  # [B]
    counts: Ints  # [B]

    @property
    def error(self) -> float | None:
        """D-ECE, 0..1; None without detections."""
        total = self.counts.sum()
        if total == 0:
            return None
        filled = self.counts > 0
        gaps = np.abs(self.scores[filled] - self.precision[filled])
        return float((gaps * self.counts[filled]).sum() / total)


def reliability(scores: Floats, correct: Bools, *, bins: int = BINS) -> Reliability:
    """Bins of equal width over scores [D] in 0..1."""
    index = np.minimum((np.clip(scores, 0, 1) * bins).astype(np.int64), bins - 1)
    counts = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(index, weights=scores, minlength=bins) / counts
        precision = np.bincount(index, weights=correct.astype(np.float64), minlength=bins) / counts
    return Reliability(mean, precision, counts)


@dataclass(frozen=True)
class Isotonic:
    """A rising step function from score to precision, linear between its knots."""

    knots: Floats
    values: Floats

    def __call__(self, scores: Floats) -> Floats:
        return np.interp(scores, self.knots, self.values)


@dataclass(frozen=True)
class Temperature:
    """The score's log-odds divided by a number: above 1, the detector was too sure of itself."""

    temperature: float

    def __call__(self, scores: Floats) -> Floats:
        return _sigmoid(_logit(scores) / self.temperature)


def fit_isotonic(scores: Floats, correct: Bools) -> Isotonic:
    """The rising function of the score nearest to what was correct, in least squares."""
    from scipy.optimize import isotonic_regression

    order = np.argsort(scores, kind="stable")
    knots, where = np.unique(scores[order], return_inverse=True)
    counts = np.bincount(where).astype(np.float64)
    means = np.bincount(where, weights=correct[order].astype(np.float64)) / counts
    return Isotonic(knots, np.asarray(isotonic_regression(means, weights=counts).x))


def fit_temperature(scores: Floats, correct: Bools) -> Temperature:
    """The temperature of highest likelihood, between 0.05 and 20."""
    from scipy.optimize import minimize_scalar

    odds, right = _logit(scores), correct.astype(np.float64)

    def loss(log_temperature: float) -> float:
        x = odds / np.exp(log_temperature)
        return float(np.mean(np.logaddexp(0, x) - right * x))

    return Temperature(float(np.exp(minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded").x)))


@dataclass(frozen=True)
class Correction:
    """D-ECE of the images that no correction was fitted on, before and after."""

    before: float | None
    isotonic: float | None
    temperature: float | None
    fitted_temperature: float
    detections: int  # that it was measured on


def corrections(images: Ints, scores: Floats, correct: Bools) -> Correction | None:
    """Both corrections fitted on the even images, measured on the odd ones; None where a half has nothing."""
    fit = images % 2 == 0
    if min(fit.sum(), (~fit).sum()) < 20 or correct[fit].all() or not correct[fit].any():
        return None
    isotonic, temperature = (one(scores[fit], correct[fit]) for one in (fit_isotonic, fit_temperature))
    rest, right = scores[~fit], correct[~fit]
    errors = [reliability(one, right).error for one in (rest, isotonic(rest), temperature(rest))]
    assert isinstance(temperature, Temperature)
    return Correction(errors[0], errors[1], errors[2], temperature.temperature, len(rest))


def _logit(scores: Floats) -> Floats:
    clipped = np.clip(scores, 1e-6, 1 - 1e-6)
    return np.log(clipped) - np.log1p(-clipped)


def _sigmoid(x: Floats) -> Floats:
    return np.exp(-np.logaddexp(0, -x))
