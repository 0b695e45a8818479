"""From a mask's pixels to polygons that give the same pixels back.

The outline runs through the middles of the edges between object and background: every pixel's centre stays at least
0.35 pixels away from it, so that a line simplified by less than that still encloses the same centres, which is what
rasterisers ask (COCO's rounds to fifths of a pixel). Corners are cut, hence lines are smoother than stairs of pixels
and have far fewer points.

Pixels that touch at a corner only are two parts (4-connected objects). V points of a ring; x, y in pixels of the image,
where the first pixel reaches from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.data.rle import MaskCrop
from cascade_rcnn.errors import UserError

EXACT = 0.2  # pixels; with it the polygon covers the mask's own pixels, none more and none less
Ring = NDArray[np.float64]  # [V, 2] x, y; the last point is joined to the first

# An edge is walked with the object on its right hand: to the right along a pixel's top, down along its right side, ...
_STEP = np.array([(1, 0), (0, 1), (-1, 0), (0, -1)])  # x, y


class Outline(NamedTuple):
    """One connected part of a mask."""

    outer: Ring  # clockwise on the screen
    holes: list[Ring]  # counter-clockwise


def outlines(crop: MaskCrop, *, tolerance: float = EXACT) -> list[Outline]:
    """The parts of a mask, largest first; an empty mask has none.

    Args:
        tolerance: pixels that the simplified outline may lie off; up to 0.2 the same pixels come back.
    """
    try:
        from scipy import ndimage
    except ImportError as error:  # an exported network runs without it
        raise UserError("the package scipy is missing, which outlines of masks need: pip install scipy") from error
    if not crop.pixels.any():
        return []
    inside = np.pad(crop.pixels, 1)
    parts, count = ndimage.label(inside)
    found: list[tuple[list[Ring], list[Ring]]] = [([], []) for _ in range(count)]
    for edges in _rings(inside):
        direction, y, x = edges[:, 0], edges[:, 1], edges[:, 2]
        middles = np.stack([x, y], axis=1) + _STEP[direction] / 2 + (crop.left - 1, crop.top - 1)
        ring = _simplified(_without_straight_points(middles), tolerance)
        row, column = y[0] - (direction[0] in (2, 3)), x[0] - (direction[0] in (1, 2))  # the pixel of this edge
        is_outer = _signed_area(middles) > 0
        found[parts[row, column] - 1][0 if is_outer else 1].append(ring)
    whole = [Outline(outer[0], holes) for outer, holes in found]
    return sorted(whole, key=lambda part: -_signed_area(part.outer))


def with_slits(part: Outline) -> Ring:
    """A part as one ring, for formats without holes: a slit without width leads to each hole and back.

    Rasterisers that count crossings (COCO's, OpenCV's) and those that count windings leave the holes open.
    """
    return joined([part.outer, *part.holes])


def joined(rings: Sequence[Ring]) -> Ring:
    """Several rings as one, each reached by a slit without width from the nearest point so far."""
    whole, *rest = rings
    left = list(rest)
    while left:
        distances = [((whole[:, None] - ring) ** 2).sum(axis=2) for ring in left]  # [V, V']
        nearest = int(np.argmin([table.min() for table in distances]))
        ring, table = left.pop(nearest), distances[nearest]
        here, there = np.unravel_index(int(table.argmin()), table.shape)
        tour = np.concatenate([ring[there:], ring[: there + 1]])  # begins and ends at the nearest point
        whole = np.concatenate([whole[: here + 1], tour, whole[here:]])
    return whole


def _rings(inside: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
    """Closed walks along all edges of the pixels (padded by background): [E, 3] direction, and start corner y, x."""
    height, width = inside.shape
    exists = np.zeros((4, height + 1, width + 1), dtype=np.bool_)  # by direction and the corner where the edge begins
    exists[0, 1:-1, :-1] = inside[1:] & ~inside[:-1]
    exists[1, :-1, 1:-1] = inside[:, :-1] & ~inside[:, 1:]
    exists[2, 1:-1, 1:] = inside[:-1] & ~inside[1:]
    exists[3, 1:, 1:-1] = inside[:, 1:] & ~inside[:, :-1]
    edges = np.argwhere(exists)
    number = np.zeros(exists.shape, dtype=np.int64)
    number[tuple(edges.T)] = np.arange(len(edges))
    x, y = edges[:, 2] + _STEP[edges[:, 0], 0], edges[:, 1] + _STEP[edges[:, 0], 1]
    # Sharpest turn to the right first: it stays with its pixel where two touch at a corner
    turns = np.stack([(edges[:, 0] + turn) % 4 for turn in (1, 0, 3)])  # [3, E]
    first = exists[turns, y, x].argmax(axis=0)
    follower = number[turns[first, np.arange(len(edges))], y, x].tolist()
    rings, done = [], bytearray(len(edges))
    for start in range(len(edges)):
        if done[start]:
            continue
        walk, edge = [], start
        while not done[edge]:
            done[edge] = 1
            walk.append(edge)
            edge = follower[edge]
        rings.append(edges[walk])
    return rings


def _without_straight_points(ring: Ring) -> Ring:
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    turns: Ring = ring[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]
    return turns


def _signed_area(ring: Ring) -> float:
    following = np.roll(ring, -1, axis=0)
    return float((ring[:, 0] * following[:, 1] - ring[:, 1] * following[:, 0]).sum() / 2)


def _simplified(ring: Ring, tolerance: float) -> Ring:
    """Douglas and Peucker's way, from two far points of the ring; every point dropped lies within ``tolerance``."""
    if tolerance <= 0 or len(ring) <= 4:
        return ring
    far = int(((ring - ring[0]) ** 2).sum(axis=1).argmax())
    closed = np.concatenate([ring, ring[:1]])
    keep = np.zeros(len(closed), dtype=np.bool_)
    keep[[0, far]] = True
    waiting = [(0, far), (far, len(ring))]
    while waiting:
        start, end = waiting.pop()
        if end - start < 2:
            continue
        chord = closed[end] - closed[start]
        between = closed[start + 1 : end] - closed[start]
        share = np.clip(between @ chord / max(float(chord @ chord), 1e-12), 0, 1)
        off = ((between - share[:, None] * chord) ** 2).sum(axis=1)
        worst = int(off.argmax())
        if off[worst] > tolerance**2:
            middle = start + 1 + worst
            keep[middle] = True
            waiting += [(start, middle), (middle, end)]
    kept = closed[:-1][keep[:-1]]
    return kept if len(kept) >= 3 else ring
