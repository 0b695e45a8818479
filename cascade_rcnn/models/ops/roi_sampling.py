"""How RoIAlign reads a box: shared by its three implementations (``roi_align.py``)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Frame(IntEnum):
    """How a box lies on the grid of pixels."""

    UNALIGNED = 0  # pixel p is sampled at p: the first RoIAlign, half a pixel off
    ALIGNED = 1  # pixel p covers p to p + 1 and is sampled at its centre
    PLUS_ONE = 2  # Detectron: unaligned, and the grid ends at the box's last pixel, x2 - 1 and y2 - 1


@dataclass(frozen=True)
class Sampling:
    """Where and how densely a box is sampled."""

    size: int  # S, bins per side
    strides: tuple[int, ...]  # of the L levels, in pixels
    ratio: int = 0  # points per bin and side that are averaged; 0: ceil(box side / S), measured on the level
    frame: Frame = Frame.ALIGNED
