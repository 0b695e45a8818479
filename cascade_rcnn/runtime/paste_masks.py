"""From a mask head's m x m probabilities to pixels of the image, one object at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.data.rle import MaskCrop

MASK_THRESHOLD = 0.5


def bilinear_weights(start: float, end: float, first: int, last: int, side: int) -> NDArray[np.float32]:
    """Weights [last - first, side] of a bilinear sample at each pixel's centre, on ``side`` cells from start to end.

    As ``grid_sample`` with ``align_corners=False`` and zeros outside: a tent of one cell around each cell's centre.
    """
    centres = (np.arange(first, last, dtype=np.float64) + 0.5 - start) / (end - start) * side - 0.5
    distance: NDArray[np.float64] = np.abs(centres[:, None] - np.arange(side, dtype=np.float64))
    return np.maximum(0.0, 1.0 - distance).astype(np.float32)


def paste_mask(
    probs: NDArray[np.float32], box: NDArray[np.float64], size: tuple[int, int], threshold: float = MASK_THRESHOLD
) -> MaskCrop:
    """Paste the probabilities [m, m] of one object into its box xyxy and threshold them, inside the image only.

    The bilinear map is separable, so that it is two small matrix products: rows [h, m] @ probs [m, m] @ columns [m, w].
    As in mmdetection and detectron2, one pixel around the box is looked at too.
    """
    height, width = size
    x1, y1, x2, y2 = (float(v) for v in box)
    left, right = max(int(np.floor(x1)) - 1, 0), min(int(np.ceil(x2)) + 1, width)
    top, bottom = max(int(np.floor(y1)) - 1, 0), min(int(np.ceil(y2)) + 1, height)
    if x2 <= x1 or y2 <= y1 or right <= left or bottom <= top:
        return MaskCrop(0, 0, np.zeros((0, 0), dtype=np.bool_))
    rows = bilinear_weights(y1, y2, top, bottom, probs.shape[0])
    columns = bilinear_weights(x1, x2, left, right, probs.shape[1])
    return MaskCrop(top, left, (rows @ probs @ columns.T) >= threshold)


def paste_in_whole_pixels(
    probs: NDArray[np.float32], box: NDArray[np.float64], size: tuple[int, int], threshold: float = MASK_THRESHOLD
) -> MaskCrop:
    """As :func:`paste_mask`, in Detectron's way: its box, which ends with a pixel, is enlarged by a cell of the mask on
    each side and cut to whole pixels (towards zero), and the mask with a border of zeros is resized to those.
    """
    side = len(probs)
    far = box[2:] - 1
    middle, half = (box[:2] + far) * 0.5, (far - box[:2]) * 0.5 * ((side + 2) / side)
    (x1, y1), (x2, y2) = (middle - half).astype(int).tolist(), (middle + half).astype(int).tolist()
    left, right = max(x1, 0), min(x2 + 1, size[1])
    top, bottom = max(y1, 0), min(y2 + 1, size[0])
    if right <= left or bottom <= top:
        return MaskCrop(0, 0, np.zeros((0, 0), dtype=np.bool_))
    rows = bilinear_weights(y1, y2 + 1, top, bottom, side + 2)[:, 1:-1]
    columns = bilinear_weights(x1, x2 + 1, left, right, side + 2)[:, 1:-1]
    return MaskCrop(top, left, (rows @ probs @ columns.T) > threshold)
