"""Objects and detections of all images as flat arrays: what every analysis reads.

I images, G objects, D detections, K classes. Boxes are (x, y, width, height) in original pixels, as in COCO's files.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.errors import DataError
from cascade_rcnn.evaluation.coco import own_truth, results_table

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Truth:
    """The objects of a split, ordered by image."""

    image_ids: tuple[Hashable, ...]  # [I], rising
    file_names: tuple[str, ...]  # [I]
    sizes: Ints  # [I, 2] height, width; 0 where unknown
    class_names: tuple[str, ...]  # [K]
    category_ids: tuple[int, ...]  # [K], rising
    image: Ints  # [G], row of the image
    label: Ints  # [G], 0..K-1
    boxes: Floats  # [G, 4]
    areas: Floats  # [G], of the mask where there is one
    crowd: Bools  # [G], regions that count neither for nor against

    @property
    def rows(self) -> Mapping[Hashable, int]:
        """The row of each image id."""
        return {key: row for row, key in enumerate(self.image_ids)}


@dataclass(frozen=True)
class Found:
    """Detections, ordered by image and, within an image, by falling score (equal scores as they came)."""

    image: Ints  # [D], row of the image
    label: Ints  # [D], 0..K-1
    boxes: Floats  # [D, 4]
    scores: Floats  # [D]

    def __len__(self) -> int:
        return len(self.scores)

    def chosen(self, rows: Bools | Ints) -> Found:
        """The detections at these rows."""
        return Found(self.image[rows], self.label[rows], self.boxes[rows], self.scores[rows])


def read_truth(truth: Any, *, where: str = "ground truth") -> Truth:
    """A COCO ground truth as arrays. Raises ``DataError``: what is wrong with it, or no object that counts."""
    dataset, rows = own_truth(truth, where, "bbox")
    images, categories, objects = dataset["images"], dataset["categories"], dataset["annotations"]
    names = {image["id"]: str(image.get("file_name", image["id"])) for image in truth["images"]}
    labels = {one["id"]: label for label, one in enumerate(categories)}
    if not any(not one["iscrowd"] for one in objects):
        raise DataError(
            f"{where}: has no object that counts (none at all, or only crowds): nothing to analyse; name another split"
        )
    image = np.array([one["image_id"] - 1 for one in objects], np.int64)
    order = np.argsort(image, kind="stable")
    boxes = np.array([one["bbox"] for one in objects], np.float64).reshape(-1, 4)
    return Truth(
        image_ids=tuple(rows),
        file_names=tuple(names[key] for key in rows),
        sizes=np.array([(one["height"], one["width"]) for one in images], np.int64).reshape(-1, 2),
        class_names=tuple(one["name"] for one in categories),
        category_ids=tuple(labels),
        image=image[order],
        label=np.array([labels[one["category_id"]] for one in objects], np.int64)[order],
        boxes=boxes[order],
        areas=np.array([one["area"] for one in objects], np.float64)[order],
        crowd=np.array([bool(one["iscrowd"]) for one in objects], np.bool_)[order],
    )


def read_found(
    results: Any, truth: Truth, *, where: str = "results", limit: int = 100, may_be_empty: bool = False
) -> Found:
    """A COCO results list as arrays, at most ``limit`` per image and class, as COCO counts.

    Raises ``DataError``: an entry that is none or of another image or class; no entry, unless it ``may_be_empty``.
    """
    if isinstance(results, list) and not results and not may_be_empty:
        raise DataError(f"{where}: holds no detections: predict with a lower --score-threshold, or train longer")
    table = results_table(results, where, dict(truth.rows), set(truth.category_ids))
    labels = np.searchsorted(np.array(truth.category_ids), table.categories)
    return arranged(table.images, labels, table.boxes, table.scores, limit=limit)


def arranged(image: Ints, label: Ints, boxes: Floats, scores: Floats, *, limit: int = 100) -> Found:
    """Detections in the order of ``Found``, the best ``limit`` of each image and class."""
    order = np.lexsort((-scores, image))
    found = Found(image[order], label[order], boxes[order], scores[order])
    keys = found.image * (int(label.max(initial=0)) + 1) + found.label
    grouped = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(keys[grouped]) != 0]) if len(keys) else np.zeros(0, np.int64)
    rank = np.empty(len(keys), np.int64)
    rank[grouped] = np.arange(len(keys)) - np.repeat(starts, np.diff(np.r_[starts, len(keys)]))
    return found.chosen(rank < limit)


def corners(boxes: Floats) -> Floats:
    """xyxy [N, 4] of xywh [N, 4]."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def box_ious(a: Floats, b: Floats, crowd: Bools | None = None) -> Floats:
    """IoU of xywh boxes [N, 4], row by row; with a crowd, the share of ``a`` that lies inside it (as COCO does)."""
    width = np.minimum(a[..., 0] + a[..., 2], b[..., 0] + b[..., 2]) - np.maximum(a[..., 0], b[..., 0])
    height = np.minimum(a[..., 1] + a[..., 3], b[..., 1] + b[..., 3]) - np.maximum(a[..., 1], b[..., 1])
    both = np.clip(width, 0, None) * np.clip(height, 0, None)
    own, other = a[..., 2] * a[..., 3], b[..., 2] * b[..., 3]
    union = own + other - both
    if crowd is not None:
        union = np.where(crowd, own, union)
    result: Floats = np.divide(both, union, out=np.zeros_like(both), where=union > 0)
    return result


def image_slices(image: Ints, count: int) -> list[slice]:
    """Where the rows of each image lie in an array ordered by image."""
    ends = np.searchsorted(image, np.arange(count + 1))
    return [slice(int(a), int(b)) for a, b in pairwise(ends)]
