"""Detectron's rules in NumPy, for the tests: written from their description and in Detectron's own coordinates.

A box ends with its last pixel: (x1, y1, x2, y2) has the width x2 - x1 + 1. Nothing of the package is used, so that a
mistake there cannot hide here. R boxes, G objects, K classes; h, w: size of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as coco_mask
from numpy.typing import NDArray
from torchvision.ops import roi_align

Array = NDArray[Any]
STRIDES = (4, 8, 16, 32, 64)
WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
IOUS = (0.5, 0.6, 0.7)
GROWTH = np.log(1000 / 16)


def cell_anchors(stride: int, scales: Sequence[float], ratios: Sequence[float]) -> Array:
    """Boxes around the square of the first ``stride`` pixels; sides are rounded before they are scaled."""
    middle = (stride - 1) / 2
    boxes = []
    for ratio in ratios:
        width = np.round(np.sqrt(stride * stride / ratio))
        height = np.round(width * ratio)
        for scale in scales:
            x, y = (scale * width - 1) / 2, (scale * height - 1) / 2
            boxes.append([middle - x, middle - y, middle + x, middle + y])
    return np.array(boxes)


def anchors(stride: int, scale: float, shape: tuple[int, int]) -> Array:
    """Every anchor of a level, row by row, column by column."""
    cell = cell_anchors(stride, (scale,), (0.5, 1.0, 2.0))
    places = [cell + np.array([x, y, x, y]) * stride for y in range(shape[0]) for x in range(shape[1])]
    return np.concatenate(places).astype(np.float32)


def overlaps(a: Array, b: Array) -> Array:
    """IoU [R, G]."""
    a, b = a[:, None].astype(np.float64), b[None].astype(np.float64)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]) + 1
    both = np.maximum(sides, 0).prod(-1)
    area_a, area_b = ((box[..., 2:] - box[..., :2] + 1).prod(-1) for box in (a, b))
    return both / (area_a + area_b - both)


def apply_deltas(boxes: Array, deltas: Array, weights: Sequence[float]) -> Array:
    size = boxes[:, 2:] - boxes[:, :2] + 1
    deltas = deltas / np.array(weights, dtype=np.float32)
    middle = boxes[:, :2] + size / 2 + deltas[:, :2] * size
    new = size * np.exp(np.minimum(deltas[:, 2:], GROWTH))
    return np.concatenate([middle - new / 2, middle + new / 2 - 1], axis=1).astype(np.float32)


def deltas_to(boxes: Array, truth: Array, weights: Sequence[float]) -> Array:
    size, size_truth = boxes[:, 2:] - boxes[:, :2] + 1, truth[:, 2:] - truth[:, :2] + 1
    shift = (truth[:, :2] + size_truth / 2 - boxes[:, :2] - size / 2) / size
    return np.concatenate([shift, np.log(size_truth / size)], axis=1) * np.array(weights)


def clip(boxes: Array, h: float, w: float) -> Array:
    return np.minimum(np.maximum(boxes, 0), np.array([w - 1, h - 1] * 2)).astype(np.float32)


def nms(boxes: Array, scores: Array, limit: float) -> Array:
    """Greedy; a box that overlaps a better one by ``limit`` or more is removed."""
    left, kept = list(np.argsort(-scores, kind="stable")), []
    table = overlaps(boxes, boxes)
    while left:
        best = left.pop(0)
        kept.append(best)
        left = [other for other in left if table[best, other] < limit]
    return np.array(kept, dtype=int)


def propose(
    logits: Sequence[Array],
    deltas: Sequence[Array],
    shapes: Sequence[tuple[int, int]],
    frame: tuple[float, float],
    *,
    scale: float,
    keep: int,
) -> tuple[Array, Array]:
    """Proposals of one image and their logits, level by level: the best ``keep``, clipped to ``frame``, thinned out."""
    boxes, scores = [], []
    for stride, level_logits, level_deltas, shape in zip(STRIDES, logits, deltas, shapes):
        order = np.argsort(-level_logits, kind="stable")[:keep]
        found = apply_deltas(anchors(stride, scale, shape)[order], level_deltas[order], (1, 1, 1, 1))
        found, level_scores = clip(found, *frame), level_logits[order]
        real = (found[:, 2:] >= found[:, :2]).all(axis=1)  # at least a pixel in the original too
        found, level_scores = found[real], level_scores[real]
        rows = nms(found, level_scores, 0.7)[:keep]
        boxes.append(found[rows])
        scores.append(level_scores[rows])
    return np.concatenate(boxes), np.concatenate(scores)


def pool(pyramid: Sequence[torch.Tensor], boxes: Array, size: int) -> torch.Tensor:
    """RoI features [R, C, size, size] of one image; the level goes by the area, the grid from x1 to x2."""
    side = np.sqrt((boxes[:, 2:] - boxes[:, :2] + 1).astype(np.float64).prod(1))
    levels = np.clip(np.floor(4 + np.log2(side / 224 + 1e-6)), 2, 5).astype(int)
    result = torch.zeros(len(boxes), pyramid[0].shape[0], size, size)
    for level in range(2, 6):
        rows = np.flatnonzero(levels == level)
        if len(rows):
            rois = [torch.from_numpy(boxes[rows].astype(np.float32))]
            result[rows] = roi_align(pyramid[level - 2][None], rois, size, 1 / STRIDES[level - 2], 2, False)
    return result


def stage(head: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], x: torch.Tensor) -> tuple[Array, Array]:
    with torch.no_grad():
        logits, deltas = head(x)
    return logits.numpy(), deltas.numpy()


def probabilities(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


@dataclass
class Found:
    """Detections of one image in original pixels, best first, and the RoIs of each stage in the network's."""

    boxes: Array
    scores: Array
    labels: Array
    rois: list[Array]


def detect(
    heads: Sequence[Any],
    pyramid: Sequence[torch.Tensor],
    rois: Array,
    *,
    scale: float,
    size: tuple[int, int],
    threshold: float,
    most: int,
) -> Found:
    """Three stages, all classifiers on the last RoIs, the last boxes in the original image of ``size`` (h, w)."""
    seen = [rois]
    for k in range(2):
        rois = apply_deltas(rois, stage(heads[k], pool(pyramid, rois, 7))[1], WEIGHTS[k])
        seen.append(rois)
    x = pool(pyramid, rois, 7)
    scores = sum(probabilities(stage(head, x)[0]) for head in heads) / 3  # background last
    boxes = clip(apply_deltas(rois / np.float32(scale), stage(heads[2], x)[1], WEIGHTS[2]), *size)
    rows, labels = [], []
    for label in range(scores.shape[1] - 1):
        above = np.flatnonzero(scores[:, label] > threshold)
        kept = above[nms(boxes[above], scores[above, label], 0.5)] if len(above) else above
        rows.append(kept)
        labels.append(np.full(len(kept), label))
    row, label = np.concatenate(rows), np.concatenate(labels)
    order = np.argsort(-scores[row, label], kind="stable")[:most]
    row, label = row[order], label[order]
    return Found(boxes[row], scores[row, label], label, seen)


def paste(probs: Array, box: Array, size: tuple[int, int]) -> Array:
    """A mask [28, 28] with a border of zeros, resized bilinearly to the whole pixels of its enlarged box."""
    side = len(probs) + 2
    padded = np.zeros((side, side))
    padded[1:-1, 1:-1] = probs
    middle, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2 * side / len(probs)
    x1, y1, x2, y2 = (int(v) for v in (*(middle - half), *(middle + half)))
    mask = np.zeros(size, dtype=bool)
    for y in range(max(y1, 0), min(y2 + 1, size[0])):
        for x in range(max(x1, 0), min(x2 + 1, size[1])):
            v, u = (y - y1 + 0.5) * side / (y2 - y1 + 1) - 0.5, (x - x1 + 0.5) * side / (x2 - x1 + 1) - 0.5
            mask[y, x] = _bilinear(padded, v, u) > 0.5
    return mask


def _bilinear(image: Array, v: float, u: float) -> float:
    row, column = int(np.floor(v)), int(np.floor(u))
    total = 0.0
    for r, by in ((row, 1 - (v - row)), (row + 1, v - row)):
        for c, bx in ((column, 1 - (u - column)), (column + 1, u - column)):
            total += by * bx * image[min(max(r, 0), len(image) - 1), min(max(c, 0), image.shape[1] - 1)]
    return total


def resize(image: Array, scale: float) -> Array:
    """[H, W, C] by ``scale``, bilinear in floats; sizes rounded half to even."""
    h, w = (int(np.round(side * scale)) for side in image.shape[:2])
    rows = [
        [
            [_bilinear(image[..., c], (y + 0.5) / scale - 0.5, (x + 0.5) / scale - 0.5) for c in range(image.shape[2])]
            for x in range(w)
        ]
        for y in range(h)
    ]
    return np.array(rows)


def huber(x: Array, beta: float) -> Array:
    x = np.abs(x)
    return np.where(x < beta, x * x / (2 * beta), x - beta / 2)


def rpn_losses(
    logits: Sequence[Array],
    deltas: Sequence[Array],
    places: Array,
    frames: Sequence[tuple[int, int]],
    truth: Sequence[Array],
    *,
    samples: int,
) -> tuple[float, float]:
    """Objectness and box loss of a batch in which every anchor takes part. ``truth`` in the network's pixels."""
    cls = box = 0.0
    for x, d, (h, w), objects in zip(logits, deltas, frames, truth):
        inside = (places[:, :2] >= 0).all(1) & (places[:, 2] < w) & (places[:, 3] < h)
        spots, x, d = places[inside], x[inside].astype(np.float64), d[inside]
        table = overlaps(spots, objects)
        best, own = table.max(axis=1), table.argmax(axis=1)
        positive = (best >= 0.7) | (np.abs(table - table.max(axis=0)) < 1e-9).any(axis=1)
        chosen = positive | (best < 0.3)
        cls += (np.logaddexp(0, x) - x * positive)[chosen].sum() / samples / len(frames)
        wanted = deltas_to(spots[positive], objects[own[positive]], (1, 1, 1, 1))
        box += huber(d[positive] - wanted, 1 / 9).sum() / chosen.sum() / len(frames)
    return cls, box


@dataclass
class Objects:
    """What one image holds, in original pixels."""

    boxes: Array
    labels: Array
    polygons: list[list[float]]


@dataclass
class Roles:
    """The RoIs of an image in a stage's loss (original pixels), positives first."""

    rois: Array
    own: Array  # object of each
    iou: Array
    positives: int


def roles(proposals: Array, objects: Objects, iou: float) -> Roles:
    """Ground truth joins the proposals; everything takes part, positive from ``iou`` on."""
    boxes = np.concatenate([objects.boxes, proposals])
    table = overlaps(boxes, objects.boxes)
    table[: len(objects.boxes)] = np.eye(len(objects.boxes))
    best, own = table.max(axis=1), table.argmax(axis=1)
    order = np.concatenate([np.flatnonzero(best >= iou), np.flatnonzero(best < iou)])
    return Roles(boxes[order], own[order], best[order], int((best >= iou).sum()))


def survivors(role: Roles, moved: Array) -> Array:
    """What a stage hands on in training: boxes with an extent that were no ground truth."""
    real = (moved[:, 2:] - moved[:, :2] + 1 > 0).all(axis=1)
    return moved[real & ~((np.arange(len(moved)) < role.positives) & (role.iou >= 1))]


def mask_target(polygon: list[float], roi: Array) -> Array:
    """The polygon drawn into 28 x 28 cells between the RoI's first and last pixel."""
    side = np.maximum(roi[2:] - roi[:2], 1)
    points = (np.array(polygon).reshape(-1, 2) - roi[:2]) * 28 / side
    drawn: Array = coco_mask.decode(coco_mask.frPyObjects([points.reshape(-1).tolist()], 28, 28))
    return drawn.reshape(28, 28, -1).any(axis=2)
