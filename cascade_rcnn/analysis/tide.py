"""Why AP is lost: TIDE's kinds of error (arXiv 2008.08115), each in points of AP at one IoU.

As the authors' own code counts (``tidecv`` 1.0), its habits included: a detection of a class without objects makes a
class of AP 0; an ignored detection (in a crowd) may be an error that is repaired, though it costs no AP; repairs that
lower AP count as 0. G objects, D detections, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cascade_rcnn.analysis.scenes import Bools, Floats, Found, Ints, Truth, box_ious, image_slices

KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
CORRECT, IGNORED = -1, -2
_CLASS, _LOCATION, _BOTH, _DUPLICATE, _BACKGROUND, _MISSED = range(6)
_POINTS = np.arange(101) / 100


@dataclass(frozen=True)
class Tide:
    """AP and what each kind of error costs of it, in points (0..100)."""

    ap: float
    lost: dict[str, float]  # AP gained when all errors of the kind are repaired
    false_positives: float  # ... when every false positive is put below every true one
    false_negatives: float  # ... when no missed object counts
    counts: dict[str, int]
    kinds: Ints  # [D], index into KINDS, or CORRECT; ignored ones keep their kind
    ignored: Bools  # [D]
    objects: Ints  # [D], object that the detection finds, or that the error is about; -1: none
    missed: Ints  # [n], rows of objects that no repaired error would find


@dataclass
class _Working:
    """Filled image by image."""

    kinds: Ints  # [D]
    used: Bools  # [D], found an object
    ignored: Bools  # [D]
    objects: Ints  # [D]
    taken: Bools  # [G]
    usable: Bools  # [G], a repaired detection would find it
    best: Ints  # [G], the best-scored detection that would


def tide(truth: Truth, found: Found, *, iou: float = 0.5, background: float = 0.1, limit: int = 100) -> Tide:
    """TIDE of the best ``limit`` detections of each image."""
    count = len(truth.image_ids)
    slices = image_slices(found.image, count)
    kept = np.concatenate([np.arange(one.start, min(one.stop, one.start + limit)) for one in slices])
    part = found.chosen(kept)
    n, g = len(part), len(truth.label)
    work = _Working(
        kinds=np.full(n, CORRECT), used=np.zeros(n, np.bool_), ignored=np.zeros(n, np.bool_), objects=np.full(n, -1),
        taken=np.zeros(g, np.bool_), usable=np.zeros(g, np.bool_), best=np.full(g, -1),
    )  # fmt: skip
    for detections, things in zip(image_slices(part.image, count), image_slices(truth.image, count)):
        _look_at(truth, part, np.arange(things.start, things.stop), detections, work, (iou, background))
    counted = ~truth.crowd
    missed = np.flatnonzero(counted & ~work.taken & ~work.usable)
    kinds, ignored, objects = np.full(len(found), CORRECT), np.zeros(len(found), np.bool_), np.full(len(found), -1)
    kinds[kept], ignored[kept], objects[kept] = work.kinds, work.ignored, work.objects
    ap, lost, special = _prices(truth, part, work, missed)
    counts = {name: int((work.kinds == kind).sum()) for kind, name in enumerate(KINDS)} | {"missed": len(missed)}
    return Tide(ap, lost, *special, counts, kinds, ignored, objects, missed)


def _look_at(
    truth: Truth, found: Found, things: Ints, rows: slice, work: _Working, limits: tuple[float, float]
) -> None:
    """Match the detections of one image and name the error of each that found nothing."""
    iou, background = limits
    real, crowds = things[~truth.crowd[things]], things[truth.crowd[things]]
    number = rows.stop - rows.start
    if number == 0:
        return
    boxes, labels = found.boxes[rows], found.label[rows]
    overlaps = box_ious(boxes[:, None], truth.boxes[None, real])  # [n, m]
    same = labels[:, None] == truth.label[None, real]
    own = overlaps * same
    left = own.copy()
    for row in range(number if len(real) else 0):
        best = int(left[row].argmax())
        if left[row, best] >= iou:
            work.used[rows.start + row], work.objects[rows.start + row] = True, real[best]
            work.taken[real[best]] = True
            left[:, best] = 0
    for crowd in crowds:
        inside = box_ious(boxes, truth.boxes[[crowd]], np.array([True])) > iou
        work.ignored[rows] |= inside & ~work.used[rows] & (labels == truth.label[crowd])
    used = work.taken[real]
    other, duplicate = overlaps * ~same, own * used
    for row in range(number):
        place = rows.start + row
        if work.used[place]:
            continue
        if not len(real):
            work.kinds[place] = _BACKGROUND
        elif background <= own[row].max() <= iou:
            _repairable(found, work, place, int(real[own[row].argmax()]), _LOCATION)
        elif other[row].max() >= iou:
            _repairable(found, work, place, int(real[other[row].argmax()]), _CLASS)
        elif duplicate[row].max() >= iou:
            work.kinds[place], work.objects[place] = _DUPLICATE, real[duplicate[row].argmax()]
        elif overlaps[row].max() <= background:
            work.kinds[place] = _BACKGROUND
        else:
            work.kinds[place], work.objects[place] = _BOTH, real[overlaps[row].argmax()]


def _repairable(found: Found, work: _Working, place: int, thing: int, kind: int) -> None:
    """An error that, repaired, would find its object, if that is free and nothing better-scored would find it."""
    work.kinds[place], work.objects[place] = kind, thing
    if work.taken[thing]:
        return
    work.usable[thing] = True
    best = work.best[thing]
    if best < 0 or found.scores[best] < found.scores[place]:
        work.best[thing] = place


def _prices(
    truth: Truth, found: Found, work: _Working, missed: Ints
) -> tuple[float, dict[str, float], tuple[float, float]]:
    """AP, what each kind costs, and what false positives and negatives cost."""
    classes = len(truth.class_names)
    positives = np.bincount(truth.label[~truth.crowd], minlength=classes)
    points = ~work.ignored
    scores, labels = found.scores, found.label
    ap = _mean_ap(scores[points], labels[points], work.used[points], positives, work.used[points] * 0)
    repaired = (work.objects >= 0) & ((work.kinds == _CLASS) | (work.kinds == _LOCATION))
    repaired[repaired] = work.best[work.objects[repaired]] == np.flatnonzero(repaired)
    lost = {}
    for kind, name in enumerate(KINDS):
        wrong = work.kinds == kind
        keep = np.where(wrong, repaired, points)
        correct = work.used | (wrong & repaired)
        moved = np.where(wrong & (kind == _CLASS), truth.label[work.objects], labels)
        left = positives - (np.bincount(truth.label[missed], minlength=classes) if kind == _MISSED else 0)
        lost[name] = max(_mean_ap(scores[keep], moved[keep], correct[keep], left, work.used[keep]) - ap, 0.0)
    ranked = np.where(work.used, 1.0, 0.0)
    no_false = _mean_ap(ranked[points], labels[points], work.used[points], positives, work.used[points])
    unseen = np.bincount(truth.label[~truth.crowd & ~work.taken], minlength=classes)
    no_missed = _mean_ap(scores[points], labels[points], work.used[points], positives - unseen, work.used[points])
    return ap, lost, (no_false - ap, no_missed - ap)


def _mean_ap(scores: Floats, labels: Ints, correct: Bools, positives: Ints, later: Ints | Bools) -> float:
    """AP in points, mean over classes with detections or objects; ``later`` rows come last among equal scores."""
    values = []
    for label, objects in enumerate(positives.tolist()):
        rows = labels == label
        if objects == 0:
            values += [0.0] if rows.any() else []
            continue
        order = np.lexsort((later[rows], -scores[rows]))
        hits = np.cumsum(correct[rows][order])
        precision = np.maximum.accumulate((hits / np.arange(1, len(hits) + 1))[::-1])[::-1]
        at = np.searchsorted(hits / objects, _POINTS)
        values.append(100 * float(np.append(precision, 0.0)[np.minimum(at, len(hits))].sum()) / 101)
    return sum(values) / len(values) if values else 0.0
