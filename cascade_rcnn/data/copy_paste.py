"""Simple copy-paste (Ghiasi et al., arXiv 2012.07177): objects cut out of one image along their masks, laid on another.

H, W: (height, width) of the image that is pasted on; G objects. Both images have been through the usual transforms.
Edges are not blended: the paper found that it makes no difference.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from cascade_rcnn.data.item import Item, Window, trimmed

LEAST_VISIBLE = 0.1  # of an object's pixels; an object of which less is left is not learnt


def paste_objects(item: Item, donor: Item, rng: np.random.Generator) -> Item:
    """``item`` with some of the donor's objects on it: at random one to all of those that have a mask.

    The donor is laid over the item at a random place, within it where it is smaller, and covering it where it is
    larger. Regions to ignore are not pasted, and stay where something is pasted on them. Masks lose what is covered,
    boxes shrink with them; an object without a mask keeps its box.
    """
    assert item.masks is not None and donor.masks is not None
    height, width = size = (int(item.image.shape[1]), int(item.image.shape[2]))
    spare = [own - other for own, other in zip(size, donor.image.shape[1:])]
    top, left = (int(rng.integers(min(length, 0), max(length, 0) + 1)) for length in spare)
    usable = [row for row, mask in enumerate(donor.masks) if mask is not None and not donor.ignore[row]]
    if not usable:
        return item
    chosen = np.sort(rng.choice(usable, int(rng.integers(1, len(usable) + 1)), replace=False)).tolist()
    moved = {row: _within(donor.masks[row], top, left, size) for row in chosen}
    pasted = {row: window for row, window in moved.items() if window is not None}
    cover = np.zeros(size, dtype=bool)
    for pixels, y, x in pasted.values():
        cover[y : y + pixels.shape[0], x : x + pixels.shape[1]] |= pixels > 0

    rows, boxes, masks = _what_is_left(item, cover)
    offset, limit = np.array([left, top] * 2, np.float32), np.array([width, height] * 2, np.float32)
    laid = list(pasted)
    return replace(
        item,
        image=_composed(item.image, donor.image, cover, top, left),
        boxes=np.concatenate([boxes, np.clip(donor.boxes[laid] + offset, 0, limit)]),
        labels=np.concatenate([item.labels[rows], donor.labels[laid]]),
        ignore=np.concatenate([item.ignore[rows], donor.ignore[laid]]),
        masks=[*masks, *pasted.values()],
    )


def _composed(image: torch.Tensor, donor: torch.Tensor, cover: NDArray[np.bool_], top: int, left: int) -> torch.Tensor:
    """The image [3, H, W] with the donor's pixels where ``cover`` [H, W] is set; the donor's corner at (top, left)."""
    y, x = np.nonzero(cover)
    image = image.clone()
    image[:, y, x] = donor[:, y - top, x - left]
    return image


def _within(window: Window | None, top: int, left: int, size: tuple[int, int]) -> Window | None:
    """A mask's window moved by (top, left) and cut to the image; None where too little of it lies inside."""
    assert window is not None
    pixels, y, x = window[0], window[1] + top, window[2] + left
    inside = pixels[max(-y, 0) : max(size[0] - y, 0), max(-x, 0) : max(size[1] - x, 0)]
    if np.count_nonzero(inside) < max(LEAST_VISIBLE * np.count_nonzero(pixels), 1):
        return None
    return trimmed(inside, max(y, 0), max(x, 0))


def _what_is_left(item: Item, cover: NDArray[np.bool_]) -> tuple[list[int], NDArray[np.float32], list[Window | None]]:
    """Rows, boxes and masks of the item's objects that ``cover`` [H, W] does not hide."""
    assert item.masks is not None
    rows: list[int] = []
    masks: list[Window | None] = []
    boxes = item.boxes.copy()
    for row, window in enumerate(item.masks):
        if window is not None:
            pixels, y, x = window
            hidden = cover[y : y + pixels.shape[0], x : x + pixels.shape[1]]
            remaining = np.where(hidden, 0, pixels)
            area, left = np.count_nonzero(pixels), np.count_nonzero(remaining)
            if left < area:
                if left < max(LEAST_VISIBLE * area, 1):
                    continue
                before, window = trimmed(pixels, y, x), trimmed(remaining, y, x)
                boxes[row] = _shrunk(boxes[row], before, window)
        rows.append(row)
        masks.append(window)
    return rows, boxes[rows], masks


def _shrunk(box: NDArray[np.float32], before: Window, after: Window) -> NDArray[np.float32]:
    """The box whose sides stay as annotated, but where the mask's extent has moved inwards."""
    old, new = _extent(before), _extent(after)
    return np.where(old == new, box, new).astype(np.float32)


def _extent(window: Window) -> NDArray[np.float32]:
    pixels, top, left = window
    return np.array([left, top, left + pixels.shape[1], top + pixels.shape[0]], np.float32)
