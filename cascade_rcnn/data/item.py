"""One image as the network sees it, before it stands in a batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Window = tuple[NDArray[np.uint8], int, int]  # pixels, top, left


@dataclass
class Item:
    """One image, transformed, with its objects."""

    image: Tensor  # uint8 [3, H, W]; float32 at test time as in the authors' release
    original_size: tuple[int, int]
    image_id: int | str
    path: str
    boxes: NDArray[np.float32]  # [G, 4]
    labels: NDArray[np.int64]  # [G]
    ignore: NDArray[np.bool_]  # [G]
    masks: list[Window | None] | None  # [G]
    bad: list[tuple[str, str]] = field(default_factory=list)  # unreadable images met on the way: path, reason
    scale: float | None = None  # from the original to this image, where both axes share one factor (Detectron)


def trimmed(pixels: NDArray[np.uint8], top: int, left: int) -> Window:
    """A window of the mask's own extent; ``pixels`` are not all 0, their corner lies at (top, left)."""
    rows, cols = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
    return pixels[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1], top + int(rows[0]), left + int(cols[0])
