"""Which detection finds which object at each IoU threshold, as COCO matches them, and AP with bootstrap intervals.

T IoU thresholds, D detections, G objects, K classes, R resamples of the images.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from cascade_rcnn.analysis.scenes import Bools, Floats, Found, Ints, Truth, box_ious
from cascade_rcnn.evaluation.pairwise import pair_up

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True)
class Matches:
    """What became of each detection; COCO's rules (``COCOeval.evaluateImg``)."""

    objects: Ints  # [T, D], row of the object that is found; -1: none
    ignored: Bools  # [T, D], counts neither for nor against
    counted: Bools  # [G], objects that are to be found

    @property
    def correct(self) -> Bools:
        """[T, D], true positives."""
        return (self.objects >= 0) & ~self.ignored


def match(
    truth: Truth,
    found: Found,
    *,
    left_out: Bools | None = None,
    outside: Bools | None = None,
    thresholds: Floats = IOU_THRESHOLDS,
) -> Matches:
    """Match within each image and class, detections by falling score, each with the free object of highest IoU.

    ``left_out`` [G] are objects that need not be found beside the crowds (those of another size); ``outside`` [D]
    detections that are ignored when they find nothing.
    """
    ignore = truth.crowd if left_out is None else truth.crowd | left_out
    detections, objects, overlaps = _pairs(truth, found, float(thresholds[0]))
    order = np.lexsort((-objects, -overlaps, ignore[objects], detections))
    detections, objects, overlaps = detections[order], objects[order], overlaps[order]
    limits = np.minimum(thresholds, 1 - 1e-10)
    reached = np.searchsorted(limits, overlaps, side="right")  # [P], how many thresholds this IoU reaches
    taken = [0] * len(truth.label)  # bit t: found at threshold t
    needs: dict[int, int] = {}
    crowd, rows, columns, bits = truth.crowd.tolist(), [], [], []
    for detection, thing, count in zip(detections.tolist(), objects.tolist(), reached.tolist()):
        free = ((1 << count) - 1) & needs.get(detection, -1)
        if not crowd[thing]:
            free &= ~taken[thing]
        if free:
            taken[thing] |= free
            needs[detection] = needs.get(detection, -1) & ~free
            rows.append(detection)
            columns.append(thing)
            bits.append(free)
    result = np.full((len(thresholds), len(found)), -1, np.int64)
    row, column, bit = np.array(rows, np.int64), np.array(columns, np.int64), np.array(bits, np.int64)
    for t in range(len(thresholds)):
        here = (bit >> t & 1).astype(np.bool_)
        result[t, row[here]] = column[here]
    ignored = (result >= 0) & ignore[result] if len(ignore) else np.zeros(result.shape, np.bool_)
    if outside is not None:
        ignored = ignored | ((result < 0) & outside)
    return Matches(result, ignored, ~ignore)


def _pairs(truth: Truth, found: Found, least: float) -> tuple[Ints, Ints, Floats]:
    """Detections and objects of the same image and class whose IoU is ``least`` or more."""
    classes = len(truth.class_names)
    parts: list[tuple[Ints, Ints, Floats]] = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    for i, j in pair_up(found.image * classes + found.label, truth.image * classes + truth.label):
        overlaps = box_ious(found.boxes[i], truth.boxes[j], truth.crowd[j])
        near = overlaps >= least
        parts.append((i[near], j[near], overlaps[near]))
    left, right, values = zip(*parts)
    return np.concatenate(left), np.concatenate(right), np.concatenate(values)


def average_precisions(truth: Truth, found: Found, matches: Matches, weights: Floats | None = None) -> Floats:
    """AP [K, T] of each class, NaN without objects; ``weights`` [I] say how often each image counts (all: once)."""
    classes, thresholds = len(truth.class_names), len(matches.objects)
    result = np.full((classes, thresholds), np.nan)
    positives = _positives(truth, matches, weights)
    for label, one in enumerate(_by_class(found, matches, classes)):
        if positives[label] > 0:
            result[label] = one.average_precision(positives[label], weights)
    return result


def mean_ap(values: Floats) -> float | None:
    """Mean of AP [K, ...] over the classes with objects."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else None


def bootstrap(truth: Truth, found: Found, matches: Matches, *, resamples: int = 200, seed: int = 0) -> Floats:
    """AP (mean of the thresholds) [R, K] on images drawn with replacement; NaN where a class was not drawn.

    Equal to evaluating each drawn set of images. The same seed draws the same images for another detector, so that
    differences between two may be taken resample by resample.
    """
    images, classes = len(truth.image_ids), len(truth.class_names)
    rng = np.random.default_rng(seed)
    result = np.full((resamples, classes), np.nan)
    sorted_classes = _by_class(found, matches, classes)
    for r in range(resamples):
        weights = np.bincount(rng.integers(0, images, images), minlength=images).astype(np.float64)
        positives = _positives(truth, matches, weights)
        for label, one in enumerate(sorted_classes):
            if positives[label] > 0:
                result[r, label] = one.average_precision(positives[label], weights).mean()
    return result


def interval(samples: Floats, value: float, *, level: float = 0.95) -> tuple[float, float] | None:
    """Interval around ``value`` from its bootstrap samples [R], moved so that their mean is the value.

    Images drawn twice lift AP a little (equal boxes, higher precision between them), so that the plain percentiles
    would lie too high, and with many images would not even hold the value itself.
    """
    known = samples[np.isfinite(samples)]
    if not len(known):
        return None
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2]) - known.mean() + value
    return float(low), float(high)


def _positives(truth: Truth, matches: Matches, weights: Floats | None) -> Floats:
    """[K], how many objects are to be found."""
    each = matches.counted.astype(np.float64) if weights is None else matches.counted * weights[truth.image]
    return np.bincount(truth.label, weights=each, minlength=len(truth.class_names)).astype(np.float64)


@dataclass(frozen=True)
class _Sorted:
    """The detections of a class by falling score."""

    image: Ints  # [n]
    correct: Floats  # [T, n], 0 or 1
    wrong: Floats  # [T, n], 0 or 1

    def average_precision(self, positives: float, weights: Floats | None) -> Floats:
        """AP [T], COCO's 101 points."""
        if not len(self.image):
            return np.zeros(len(self.correct))
        each = 1.0 if weights is None else weights[self.image]
        correct = np.cumsum(self.correct * each, axis=1)
        total = correct + np.cumsum(self.wrong * each, axis=1)
        precision = correct / (total + np.spacing(1))
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        recall = correct / positives
        padded = np.concatenate([precision, np.zeros((len(precision), 1))], axis=1)
        return np.array([padded[t, np.searchsorted(recall[t], RECALLS)].mean() for t in range(len(recall))])


def _by_class(found: Found, matches: Matches, classes: int) -> list[_Sorted]:
    correct, wrong = matches.correct, (matches.objects < 0) & ~matches.ignored
    order = np.lexsort((-found.scores, found.label))
    ends = np.searchsorted(found.label[order], np.arange(classes + 1))
    rows = [order[a:b] for a, b in pairwise(ends)]
    return [_Sorted(found.image[r], correct[:, r].astype(np.float64), wrong[:, r].astype(np.float64)) for r in rows]
