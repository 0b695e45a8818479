"""Mosaic (Bochkovskiy et al., arXiv 2004.10934): parts of four images around a point, in one.

H, W: (height, width) of the picture that is made; G objects. The images have been through the usual transforms, at a
smaller scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from cascade_rcnn.data.item import Item, Window, trimmed

SCALES = 0.5, 1.0  # of the images, times the usual input; each mosaic has one
_CENTRE = 0.3, 0.7  # where the four meet, as a share of the sides
_LEAST_VISIBLE = 0.1  # of an object's box, or of its mask; an object of which less is left is not learnt
_GREY = 114  # where an image does not fill its quarter


def mosaic(items: Sequence[Item | None], size: tuple[int, int], rng: np.random.Generator) -> Item:
    """One item of ``size`` (height, width) from four: top left, top right, bottom left, bottom right; None leaves grey.

    The first names the result (path and id) and must be there. Each image has its inner corner where the four meet;
    what reaches beyond its quarter or the picture is cut off. Regions to ignore are cut like objects.
    """
    first = items[0]
    assert first is not None
    height, width = size
    middle_y, middle_x = (round(side * rng.uniform(*_CENTRE)) for side in size)
    image = torch.full((3, height, width), _GREY, dtype=torch.uint8)
    parts = []
    for number, item in enumerate(items):
        if item is None:
            continue
        down, right = divmod(number, 2)
        rows = (middle_y, height) if down else (0, middle_y)
        cols = (middle_x, width) if right else (0, middle_x)
        high, wide = int(item.image.shape[1]), int(item.image.shape[2])
        top, left = middle_y if down else middle_y - high, middle_x if right else middle_x - wide
        y = slice(max(rows[0], top), min(rows[1], top + high))
        x = slice(max(cols[0], left), min(cols[1], left + wide))
        image[:, y, x] = item.image[:, y.start - top : y.stop - top, x.start - left : x.stop - left]
        parts.append(_cut(item, (top, left), y, x))
    masks = None if first.masks is None else [mask for part in parts for mask in part.masks or []]
    return replace(
        first,
        image=image,
        boxes=np.concatenate([part.boxes for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        ignore=np.concatenate([part.ignore for part in parts]),
        masks=masks,
        bad=[bad for part in parts for bad in part.bad],
    )


def _cut(item: Item, corner: tuple[int, int], y: slice, x: slice) -> Item:
    """The item's objects with its corner at (top, left), cut to the rows ``y`` and columns ``x``."""
    top, left = corner
    offset = np.array([left, top] * 2, np.float32)
    low, high = np.array([x.start, y.start] * 2, np.float32), np.array([x.stop, y.stop] * 2, np.float32)
    boxes = np.clip(item.boxes + offset, low, high)
    sides, before = boxes[:, 2:] - boxes[:, :2], item.boxes[:, 2:] - item.boxes[:, :2]
    seen = (sides >= 1).all(axis=1) & (sides.prod(axis=1) >= _LEAST_VISIBLE * before.prod(axis=1))
    rows: list[int] = []
    masks: list[Window | None] = []
    for row in np.flatnonzero(seen).tolist():
        mask = None if item.masks is None else item.masks[row]
        if mask is not None:
            mask = _within(mask, corner, y, x)
            if mask is None:
                continue
        rows.append(row)
        masks.append(mask)
    return replace(
        item,
        boxes=boxes[rows],
        labels=item.labels[rows],
        ignore=item.ignore[rows],
        masks=None if item.masks is None else masks,
    )


def _within(window: Window, corner: tuple[int, int], y: slice, x: slice) -> Window | None:
    """A mask's window moved by ``corner`` and cut; None where too little of it is left."""
    pixels, top, left = window[0], window[1] + corner[0], window[2] + corner[1]
    inside: NDArray[np.uint8] = pixels[
        max(y.start - top, 0) : max(y.stop - top, 0), max(x.start - left, 0) : max(x.stop - left, 0)
    ]
    if np.count_nonzero(inside) < max(_LEAST_VISIBLE * np.count_nonzero(pixels), 1):
        return None
    return trimmed(inside, max(top, y.start), max(left, x.start))
