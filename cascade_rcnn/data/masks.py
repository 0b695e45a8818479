"""Instance masks between annotation and network input, one object at a time.

A mask is kept as a few bytes (run lengths, or polygons on the rasteriser's own grid of a fifth of a pixel)
until the image's transform is known. A transform of masks is two index arrays: which source row each output row shows,
and which source column each output column. Resizing, cropping and flipping compose in them, so that only the object's
own crop is ever decoded: 300 masks on 12 megapixels cost one object at a time, not 300 images.

Masks are drawn at the original resolution and resized by nearest neighbour, source = floor(output * old / new), which
is what mmdetection does (its losses are the reference).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.data.records import Segmentation
from cascade_rcnn.data.rle import decode_packed_rle, pack_rle, rle_counts, unite_rles
from cascade_rcnn.data.rle import encode_rle as encode_rle  # importable from here as before
from cascade_rcnn.errors import DataError
from cascade_rcnn.messages import shown

_GRID = 5  # COCO's rasteriser rounds polygon corners to fifths of a pixel: int(5 x + 0.5)
_POLYGONS = b"P"


def pack_segmentations(segmentations: Sequence[Segmentation | None], *, source: str = "") -> list[bytes]:
    """Bytes that ``decode_window`` reads, per object; empty when there is no mask or no polygon of three points.

    All polygons of an image are rounded in one go: COCO's 860,000 objects take seconds.

    Raises:
        DataError: an RLE without a usable size or counts, a coordinate that is not a number.
    """
    polygons = [
        [polygon[: len(polygon) // 2 * 2] for polygon in segmentation if len(polygon) >= 6]
        if isinstance(segmentation, list)
        else []
        for segmentation in segmentations
    ]
    values = np.array(list(chain.from_iterable(chain.from_iterable(polygons))), dtype=np.float64)
    if not np.isfinite(values).all():
        raise DataError(f"{source}: a polygon holds a coordinate that is not a number; run cascade-rcnn check --fix")
    fifths = np.clip(np.trunc(values * _GRID + 0.5), -(2**30), 2**30).astype("<i4").tobytes()
    packed, start = [], 0
    for segmentation, parts in zip(segmentations, polygons):
        if isinstance(segmentation, dict) and segmentation:
            packed.append(pack_rle(segmentation, source))
        elif parts:
            lengths = [len(part) for part in parts]
            end = start + 4 * sum(lengths)
            packed.append(_POLYGONS + struct.pack(f"<{len(lengths) + 1}i", len(lengths), *lengths) + fifths[start:end])
            start = end
        else:
            packed.append(b"")
    return packed


def pack_segmentation(segmentation: Segmentation | None, *, source: str = "") -> bytes:
    """``pack_segmentations`` of one object."""
    return pack_segmentations([segmentation], source=source)[0]


def decode_window(
    packed: bytes, size: tuple[int, int], canvas: tuple[int, int] | None = None
) -> tuple[NDArray[np.uint8], int, int] | None:
    """The object's own pixels and where they lie: (uint8 [h, w] of 0 and 1, top, left), or None if there are none.

    ``size`` is the (height, width) of the image as decoded. With a ``canvas`` (height, width) the object is drawn as
    large as if the image had been resized to it: polygons keep their outline (detectron2's way), bitmaps are repeated.
    """
    if not packed:
        return None
    canvas = canvas or size
    if packed[:1] == _POLYGONS:
        return _decode_polygons(packed, size, canvas)
    window = decode_packed_rle(packed, size)
    if window is None or canvas == size:
        return window
    return transform_window(*window, nearest_indices(size[0], canvas[0]), nearest_indices(size[1], canvas[1]))


def _decode_polygons(
    packed: bytes, size: tuple[int, int], canvas: tuple[int, int]
) -> tuple[NDArray[np.uint8], int, int] | None:
    """Draw in a window around the object: shifting by whole pixels on the grid of fifths changes no pixel."""
    from faster_coco_eval import mask as rle_api  # here, because checking annotations does without

    (count,) = struct.unpack_from("<i", packed, 1)
    lengths = struct.unpack_from(f"<{count}i", packed, 5)
    fifths = np.frombuffer(packed, dtype="<i4", offset=5 + 4 * count).reshape(-1, 2)  # x, y
    if canvas != size:
        scale = np.array([canvas[1] / size[1], canvas[0] / size[0]])
        fifths, size = np.trunc(fifths * scale + 0.5).astype(np.int32), canvas
    low = np.maximum(fifths.min(axis=0) // _GRID, 0)
    high = np.minimum(-(-fifths.max(axis=0) // _GRID) + 1, (size[1], size[0]))
    left, top = int(low[0]), int(low[1])
    w, h = int(high[0]) - left, int(high[1]) - top
    if w <= 0 or h <= 0:
        return None
    shifted = fifths - _GRID * low
    shifted = np.where(shifted < 0, shifted - 1, shifted) / _GRID  # the rasteriser truncates int(5 x + 0.5) towards 0
    polygons = np.split(shifted.reshape(-1), np.cumsum(lengths)[:-1])
    rles = rle_api.frPyObjects([polygon.tolist() for polygon in polygons], h, w)
    rle = rle_api.merge(rles) if len(rles) > 1 else rles[0]
    x, y, w, h = (int(value) for value in rle_api.toBbox(rle))
    if w <= 0 or h <= 0:
        return None
    return np.asfortranarray(rle_api.decode(rle)[y : y + h, x : x + w]), top + y, left + x


def nearest_indices(old: int, new: int) -> NDArray[np.int64]:
    """Source index of each output index when ``old`` pixels become ``new``: floor(i * old / new), OpenCV's nearest."""
    step = 1.0 / (new / old)
    indices: NDArray[np.int64] = np.floor(np.arange(new) * step).astype(np.int64)
    return np.minimum(indices, old - 1, out=indices)


def transform_window(
    window: NDArray[np.uint8], top: int, left: int, rows: NDArray[np.int64], cols: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], int, int] | None:
    """Move an object's window through a transform: the part that the output shows, and where; None if nothing.

    ``rows`` [H_out] and ``cols`` [W_out] hold the source row and column of each output row and column, each rising or
    (after a flip) falling.
    """
    inside_rows = np.flatnonzero((rows >= top) & (rows < top + window.shape[0]))
    inside_cols = np.flatnonzero((cols >= left) & (cols < left + window.shape[1]))
    if not inside_rows.size or not inside_cols.size:
        return None
    # columns first: windows come column by column in memory, and this order takes a tenth of window[rows, cols]
    moved = window.T.take(cols[inside_cols] - left, axis=0).T.take(rows[inside_rows] - top, axis=0)
    return moved, int(inside_rows[0]), int(inside_cols[0])


# Polygons and run lengths as COCO writes them: checked, measured and decoded with NumPy alone.
#
# An RLE lists the lengths of runs of 0 and 1 in column order, beginning with 0. Compressed, each length (from the third
# on as its difference to the length two before) is written in groups of five bits, lowest first, one character each:
# 48 + group + 32 if another follows; the last group's top bit is the sign.


def usual_segmentation(value: Any) -> Segmentation | None:
    """A mask in COCO's spelling, whichever of the spellings in use it was written in; None where there is none.

    Read are: polygons, one polygon that stands alone, a list of points ([[x, y], ...]), lists of points within
    a list, an RLE, a list of RLEs (united), counts written 12.0 or as Python prints bytes (b'...'). What the lists
    hold is not looked at: ``polygon_points`` and ``rle_counts`` do that. Raises ``ValueError`` for anything else.
    """
    if not value:
        return None
    if isinstance(value, dict):
        return _usual_rle(value)
    if not isinstance(value, list):
        raise ValueError(f"segmentation {shown(value)} is neither polygons nor RLE")
    if all(isinstance(part, dict) for part in value):
        rles = [_usual_rle(part) for part in value]
        return rles[0] if len(rles) == 1 else unite_rles(rles)
    if not isinstance(value[0], list):
        return [value]
    if _are_points(value):
        return [[number for point in value for number in point]]
    while len(value) == 1 and isinstance(value[0], list) and value[0] and isinstance(value[0][0], list):
        value = value[0]  # a level too many around all polygons, or around all points
        if _are_points(value):
            return [[number for point in value for number in point]]
    return [[number for point in part for number in point] if _are_points(part) else part for part in value]


def _are_points(value: Any) -> bool:
    """[[x, y], [x, y], [x, y], ...]: no polygon has only two numbers."""
    return (
        isinstance(value, list)
        and len(value) >= 3
        and all(isinstance(point, list) and len(point) == 2 and not isinstance(point[0], list) for point in value)
    )


def _usual_rle(rle: dict[str, Any]) -> dict[str, Any]:
    counts = rle.get("counts")
    if isinstance(counts, str) and counts[:2] in ("b'", 'b"') and counts[-1:] == counts[1]:
        rle = rle | {"counts": counts[2:-1].replace("\\\\", "\\")}
    elif isinstance(counts, list):
        rle = rle | {"counts": [int(run) if type(run) is float and run.is_integer() else run for run in counts]}
    size = rle.get("size")
    if isinstance(size, list):
        rle = rle | {"size": [int(side) if type(side) is float and side.is_integer() else side for side in size]}
    return rle


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
