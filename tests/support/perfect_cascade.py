"""Evidence as a cascade without faults would give it: what is annotated is free, the objects are known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.labels.evidence import Evidence, Floats, Followed, iou_matrix

IOUS = (0.5, 0.6, 0.7)  # from which each stage takes a box for an object
Object = tuple[float, float, float, float, int]  # x1, y1, x2, y2, label


def evidence(
    objects: Sequence[Object], annotated: Sequence[Object], *, classes: int = 3, ignore: Sequence[bool] | None = None
) -> Evidence:
    """Every object is found where it is; an annotated box is led to the object that it overlaps most."""
    boxes, labels = _apart(annotated)
    found, found_labels = _apart(objects)
    return Evidence(
        labels=labels,
        ignore=np.array(ignore if ignore is not None else [False] * len(labels), dtype=np.bool_),
        annotated=_follow(boxes, found, found_labels, classes),
        found_labels=found_labels,
        scores=np.full(len(found), 0.95),
        found=_follow(found, found, found_labels, classes),
    )


def _apart(objects: Sequence[Object]) -> tuple[Floats, NDArray[np.int64]]:
    rows = np.array(objects, dtype=np.float64).reshape(-1, 5)
    return rows[:, :4], rows[:, 4].astype(np.int64)


def _follow(boxes: Floats, objects: Floats, labels: NDArray[np.int64], classes: int) -> Followed:
    moved, probs, unmoved = [], [], []
    now = boxes
    for iou in IOUS:
        probs.append(_said(now, objects, labels, classes, iou))
        unmoved.append(_said(boxes, objects, labels, classes, iou))
        overlap = iou_matrix(now, objects)
        if len(objects):
            goal = objects[overlap.argmax(axis=1)]
            now = np.where(overlap.max(axis=1, keepdims=True) >= 0.2, now + 0.8 * (goal - now), now)
        moved.append(now)
    return Followed(boxes, np.stack(moved), np.stack(probs), np.stack(unmoved))


def _said(boxes: Floats, objects: Floats, labels: NDArray[np.int64], classes: int, iou: float) -> Floats:
    """Probabilities [N, K]: 0.95 for the class of the object that a box overlaps enough, a little for it elsewhere."""
    probs = np.full((len(boxes), classes), 0.002)
    if len(objects):
        overlap = iou_matrix(boxes, objects)
        best = overlap.max(axis=1)
        sure = np.where(best >= iou, 0.95, np.where(best >= 0.3, 0.2, 0.002))
        probs[np.arange(len(boxes)), labels[overlap.argmax(axis=1)]] = sure
    return probs
