"""Which class is taken for which: the confusion matrix with background.

K classes; row and column K are the background: missed objects, and detections of nothing.
"""

from __future__ import annotations

import numpy as np

from cascade_rcnn.analysis.matches import match
from cascade_rcnn.analysis.scenes import Bools, Floats, Found, Ints, Truth, box_ious, image_slices


def confusion_matrix(
    truth: Truth, found: Found, thresholds: Floats | float = 0.0, *, iou: float = 0.5
) -> tuple[Ints, Found, Ints]:
    """Counts [K + 1, K + 1], rows the truth, columns what was said, at score ``thresholds`` ([K] or one).

    Detections first find objects of their own class as COCO matches them, so that the diagonal holds the true
    positives. Those left over are then paired across the classes, best score first, with the free object of highest
    IoU. Crowds count neither way. Also returns the detections at those thresholds and the object of each (-1: none,
    -2: ignored).
    """
    limits = np.broadcast_to(np.asarray(thresholds, np.float64), (len(truth.class_names),))
    found = found.chosen(found.scores >= limits[found.label])
    matches = match(truth, found, thresholds=np.array([iou]))
    objects = np.where(matches.ignored[0], -2, matches.objects[0])
    taken = np.zeros(len(truth.label), np.bool_)
    taken[objects[objects >= 0]] = True
    _pair_across_classes(truth, found, objects, taken, iou)
    classes = len(truth.class_names)
    matrix = np.zeros((classes + 1, classes + 1), np.int64)
    hit = objects >= 0
    np.add.at(matrix, (truth.label[objects[hit]], found.label[hit]), 1)
    matrix[classes, :classes] = np.bincount(found.label[objects == -1], minlength=classes)
    matrix[:classes, classes] = np.bincount(truth.label[~taken & ~truth.crowd], minlength=classes)
    return matrix, found, objects


def _pair_across_classes(truth: Truth, found: Found, objects: Ints, taken: Bools, iou: float) -> None:
    """Fill ``objects`` [D] of the detections that found nothing, and ``taken`` [G]."""
    count = len(truth.image_ids)
    for detections, things in zip(image_slices(found.image, count), image_slices(truth.image, count)):
        rows = np.arange(detections.start, detections.stop)[objects[detections] == -1]
        free = np.arange(things.start, things.stop)[~taken[things] & ~truth.crowd[things]]
        if not len(rows) or not len(free):
            continue
        overlaps = box_ious(found.boxes[rows, None], truth.boxes[None, free])  # [n, m]
        for row, values in zip(rows, overlaps):  # by falling score
            values = np.where(taken[free], 0.0, values)
            best = int(values.argmax())
            if values[best] >= iou:
                objects[row], taken[free[best]] = free[best], True
