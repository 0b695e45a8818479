"""Precision, recall and F1 over the score threshold, and which threshold to take.

K classes, D detections, P points of a curve.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cascade_rcnn.analysis.matches import Matches
from cascade_rcnn.analysis.scenes import Bools, Floats, Found, Truth


@dataclass(frozen=True)
class Curve:
    """One point for each score that occurs, falling: what a class gives when detections below it are dropped."""

    thresholds: Floats  # [P], falling
    precision: Floats  # [P]
    recall: Floats  # [P]
    objects: int

    @property
    def f1(self) -> Floats:
        """[P]"""
        total = self.precision + self.recall
        return np.divide(2 * self.precision * self.recall, total, out=np.zeros_like(total), where=total > 0)

    def thinned(self, most: int = 200) -> Curve:
        """At most about ``most`` points, the first and last among them."""
        if len(self.thresholds) <= most:
            return self
        rows = np.unique(np.linspace(0, len(self.thresholds) - 1, most).round().astype(np.int64))
        return Curve(self.thresholds[rows], self.precision[rows], self.recall[rows], self.objects)


@dataclass(frozen=True)
class Operating:
    """A threshold and what it gives."""

    threshold: float
    precision: float
    recall: float
    f1: float


def class_curves(truth: Truth, found: Found, matches: Matches, *, threshold_row: int = 0) -> list[Curve]:
    """The curve of each class at one IoU threshold (row of ``matches``; 0 is IoU 0.5)."""
    correct, ignored = matches.correct[threshold_row], matches.ignored[threshold_row]
    objects = np.bincount(truth.label[matches.counted], minlength=len(truth.class_names))
    curves = []
    for label, count in enumerate(objects.tolist()):
        rows = (found.label == label) & ~ignored
        curves.append(curve(found.scores[rows], correct[rows], count))
    return curves


def curve(scores: Floats, correct: Bools, objects: int) -> Curve:
    """Precision and recall of detections [D] at each of their scores; empty without objects."""
    if objects == 0 or len(scores) == 0:
        return Curve(np.zeros(0), np.zeros(0), np.zeros(0), objects)
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], np.cumsum(correct[order])
    last = np.flatnonzero(np.r_[scores[1:] != scores[:-1], True])  # detections of one score come and go together
    return Curve(scores[last], hits[last] / (last + 1), hits[last] / objects, objects)


def best_f1(one: Curve) -> Operating | None:
    """The point of highest F1, of equal ones the highest threshold; None for an empty curve."""
    return _point(one, int(np.argmax(one.f1))) if len(one.thresholds) else None


def at_precision(one: Curve, wanted: float) -> Operating | None:
    """The point of highest recall whose precision is ``wanted`` or more; None where there is none."""
    rows = np.flatnonzero(one.precision >= wanted)
    return _point(one, int(rows[np.argmax(one.recall[rows])])) if len(rows) else None


def at_recall(one: Curve, wanted: float) -> Operating | None:
    """The highest threshold whose recall is ``wanted`` or more; None where there is none."""
    rows = np.flatnonzero(one.recall >= wanted)
    return _point(one, int(rows[0])) if len(rows) else None


def _point(one: Curve, row: int) -> Operating:
    values = (one.thresholds[row], one.precision[row], one.recall[row], one.f1[row])
    return Operating(*(float(value) for value in values))
