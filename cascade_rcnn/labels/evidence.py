"""What a detector says about the annotations of an image, as plain arrays: the ranking needs no model.

S stages, K classes, G annotated objects, D detections. Boxes are xyxy in original pixels, labels the data set's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Followed:
    """Boxes that were fed to the stages as proposals."""

    boxes: Floats  # [N, 4] as they went in
    moved: Floats  # [S, N, 4] after each stage
    probs: Floats  # [S, N, K] class probabilities of each stage there; what is missing to 1 is the background's
    unmoved: Floats  # [S, N, K] of each stage at the boxes as they went in: judges of three strictnesses


@dataclass(frozen=True)
class Evidence:
    """One image: its annotations and its detections, each with what the stages make of it."""

    labels: Ints  # [G], the annotated classes
    ignore: NDArray[np.bool_]  # [G], crowds and the like: never suspected, and nothing inside is missed
    annotated: Followed
    found_labels: Ints  # [D]
    scores: Floats  # [D]
    found: Followed

    def __len__(self) -> int:
        return len(self.labels)


def iou_matrix(a: Floats, b: Floats) -> Floats:
    """Intersection over union [N, M] of boxes [N, 4] and [M, 4]."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    sides = np.clip(high - low, 0, None)  # [N, M, 2]
    inside = sides[..., 0] * sides[..., 1]
    union = box_areas(a)[:, None] + box_areas(b)[None] - inside
    overlap: Floats = inside / np.maximum(union, 1e-9)
    return overlap


def iou_of_pairs(a: Floats, b: Floats) -> Floats:
    """Intersection over union [...] of boxes [..., 4] that belong together."""
    sides = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None)
    inside = sides[..., 0] * sides[..., 1]
    overlap: Floats = inside / np.maximum(box_areas(a) + box_areas(b) - inside, 1e-9)
    return overlap


def box_areas(boxes: Floats) -> Floats:
    """Areas [...] of boxes [..., 4]."""
    areas: Floats = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    return areas


def share_inside(a: Floats, b: Floats) -> Floats:
    """Share [N, M] of each box of ``a`` that lies inside each box of ``b``."""
    sides = np.clip(np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2]), 0, None)
    share: Floats = sides[..., 0] * sides[..., 1] / np.maximum(box_areas(a)[:, None], 1e-9)
    return share
