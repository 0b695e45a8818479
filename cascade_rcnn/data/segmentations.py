"""Polygons and run lengths as COCO writes them: checked, measured and decoded with NumPy alone.

An RLE lists the lengths of runs of 0 and 1 in column order, beginning with 0. Compressed, each length (from the third
on as its difference to the length two before) is written in groups of five bits, lowest first, one character each:
48 + group + 32 if another follows; the last group's top bit is the sign.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.data.records import Segmentation


def rle_counts(segmentation: dict[str, Any], *, height: int, width: int) -> list[int]:
    """Run lengths of an RLE, compressed or not. Raises ``ValueError`` unless they fill exactly height x width."""
    size = segmentation.get("size")
    if not isinstance(size, list) or len(size) != 2 or [int, int] != [type(side) for side in size]:
        raise ValueError("RLE without a size [height, width]")
    if height and width and size != [height, width]:
        raise ValueError(f"RLE of size {size} in an image of size [{height}, {width}]")
    if min(size) < 0 or max(size) > 1_000_000:
        raise ValueError(f"RLE of size {size}")
    counts = segmentation.get("counts")
    if isinstance(counts, str | bytes):
        runs = _decompress(counts.encode("latin-1", "replace") if isinstance(counts, str) else counts)
    elif isinstance(counts, list) and all(type(run) is int and 0 <= run <= 10**12 for run in counts):
        runs = counts
    else:
        raise ValueError("RLE whose counts are neither text nor whole numbers")
    if min(runs, default=0) < 0 or sum(runs) != size[0] * size[1]:
        raise ValueError(f"RLE whose runs do not fill its size {size}")
    return runs


def _decompress(text: bytes) -> list[int]:
    """Plain Python on purpose: a mask has some dozens of runs, for which NumPy's calls cost ten times as much."""
    if text and (min(text) < 48 or max(text) > 111):
        raise ValueError("compressed RLE with foreign characters")
    runs: list[int] = []
    value = shift = 0
    for character in text:
        code = character - 48
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            if shift > 40:
                raise ValueError("compressed RLE with a run of impossible length")
            continue
        if code & 16:
            value -= 1 << shift
        if len(runs) > 2:
            value += runs[-2]
        runs.append(value)
        value = shift = 0
    if shift:
        raise ValueError("compressed RLE that breaks off")
    return runs


def polygon_points(polygon: object) -> int:
    """Number of points of a polygon [x1, y1, x2, y2, ...]. Raises ``ValueError`` where it is not finite numbers."""
    if not isinstance(polygon, list):
        raise ValueError("polygon that is not a list of numbers")
    try:
        # sum is quick and carries NaN, infinity and foreign types along
        finite = math.isfinite(math.fsum(polygon)) and not any(type(value) is bool for value in polygon)
    except (TypeError, ValueError, OverflowError):
        finite = False
    if not finite:
        raise ValueError("polygon with a coordinate that is not a finite number")
    if len(polygon) % 2:
        raise ValueError(f"polygon of {len(polygon)} numbers, where x and y come in pairs")
    return len(polygon) // 2


def segmentation_box(segmentation: Segmentation | None) -> NDArray[np.float64] | None:
    """Smallest xyxy box around a mask; None where it is empty or there is none."""
    if not segmentation:
        return None
    if isinstance(segmentation, list):
        points = np.concatenate([np.asarray(polygon, dtype=np.float64) for polygon in segmentation]).reshape(-1, 2)
        return np.concatenate([points.min(axis=0), points.max(axis=0)]) if len(points) else None
    height = int(segmentation["size"][0])
    left = top = 1 << 60
    right = bottom = end = 0
    for place, run in enumerate(rle_counts(segmentation, height=0, width=0)):
        start, end = end, end + run
        if place % 2 and run:
            (first, row), (last, last_row) = divmod(start, height), divmod(end - 1, height)
            left, right = min(left, first), max(right, last + 1)
            # a run over several columns touches the top and the bottom row
            top, bottom = min(top, row if first == last else 0), max(bottom, last_row + 1 if first == last else height)
    return np.array([left, top, right, bottom], dtype=np.float64) if right else None


def segmentation_area(segmentation: Segmentation | None) -> float:
    """Pixels of a mask: of an RLE exactly, of polygons by the shoelace formula (overlaps count twice)."""
    if not segmentation:
        return 0.0
    if isinstance(segmentation, dict):
        return float(sum(rle_counts(segmentation, height=0, width=0)[1::2]))
    total = 0.0
    for polygon in segmentation:
        x, y = np.asarray(polygon, dtype=np.float64).reshape(-1, 2).T
        total += 0.5 * abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))))
    return total


def decode_rle(segmentation: dict[str, Any]) -> NDArray[np.bool_]:
    """The mask of an RLE, bool [height, width]."""
    height, width = segmentation["size"]
    counts = rle_counts(segmentation, height=0, width=0)
    values = np.arange(len(counts)) % 2 == 1
    mask: NDArray[np.bool_] = np.repeat(values, counts).reshape(width, height).T
    return mask


def encode_rle(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Uncompressed RLE of a mask, bool [height, width]."""
    height, width = mask.shape
    flat = np.asarray(mask, dtype=bool).T.reshape(-1)
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate(([0], changes, [flat.size]))).tolist() if flat.size else []
    return {"size": [int(height), int(width)], "counts": [0, *counts] if flat.size and flat[0] else counts}
