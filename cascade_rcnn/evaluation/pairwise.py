"""Pairs of objects in the same image, for all images at once; the metrics need no loop over images.

N left objects, M right objects, P pairs. A group is the row of an image.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

_Ints = NDArray[np.int64]
_Floats = NDArray[np.float64]


def pair_up(left: _Ints, right: _Ints, *, limit: int = 2_000_000) -> Iterator[tuple[_Ints, _Ints]]:
    """All pairs (i, j) with ``left[i] == right[j]``, in chunks of about ``limit`` pairs.

    ``left`` [N] and ``right`` [M] are groups. Yields two index arrays [P]; rows of one i never fall into two chunks,
    come in rising i and, within an i, in rising j. Memory is bounded by ``limit`` or the pairs of a single i.
    """
    order = np.argsort(right, kind="stable")
    groups = right[order]
    starts = np.searchsorted(groups, left, side="left")
    counts = np.searchsorted(groups, left, side="right") - starts  # [N]
    ends = np.cumsum(counts)
    first = 0
    while first < len(left):
        done = int(ends[first - 1]) if first else 0
        last = max(int(np.searchsorted(ends, done + limit, side="right")), first + 1)
        count = counts[first:last]
        i = np.repeat(np.arange(first, last), count)  # [P]
        within = np.arange(len(i)) - np.repeat(np.cumsum(count) - count, count)
        yield i, order[np.repeat(starts[first:last], count) + within]
        first = last


def best_of_each(keys: _Ints, values: _Floats) -> _Ints:
    """Row of the first largest value within each run of equal ``keys`` [P]; returns [number of runs]."""
    if len(keys) == 0:
        return np.zeros(0, np.int64)
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
    lengths = np.diff(np.r_[starts, len(keys)])
    largest = np.repeat(np.maximum.reduceat(values, starts), lengths)
    rows = np.where(values == largest, np.arange(len(keys)), len(keys))
    return np.minimum.reduceat(rows, starts)


def intersections(a: _Floats, b: _Floats, *, plus: float = 0.0) -> _Floats:
    """Intersection area of xyxy boxes [P, 4], row by row; ``plus`` 1 where a box includes its last pixel."""
    width = np.minimum(a[:, 2], b[:, 2]) - np.maximum(a[:, 0], b[:, 0]) + plus
    height = np.minimum(a[:, 3], b[:, 3]) - np.maximum(a[:, 1], b[:, 1]) + plus
    return np.clip(width, 0, None) * np.clip(height, 0, None)


def areas(boxes: _Floats, *, plus: float = 0.0) -> _Floats:
    """Areas of xyxy boxes [P, 4]."""
    return (boxes[:, 2] - boxes[:, 0] + plus) * (boxes[:, 3] - boxes[:, 1] + plus)


def ious(a: _Floats, b: _Floats, *, plus: float = 0.0) -> _Floats:
    """Intersection over union of xyxy boxes [P, 4], row by row; 0 where both boxes are empty."""
    both = intersections(a, b, plus=plus)
    union = areas(a, plus=plus) + areas(b, plus=plus) - both
    return np.divide(both, union, out=np.zeros_like(both), where=union != 0)
