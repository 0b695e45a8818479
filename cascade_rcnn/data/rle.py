"""Run-length encodings of masks: COCO's text and lists of counts, to pixels and back."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.errors import DataError

MOST_RLE_PIXELS = 2**32 - 1  # of a picture: COCO's tools keep the length of a run in 32 bits
PACKED_RLE = b"R"  # the first byte of a packed mask of this kind


class MaskCrop(NamedTuple):
    """A binary mask cut to the surroundings of its object: ``pixels[0, 0]`` is the image's pixel (top, left)."""

    top: int
    left: int
    pixels: NDArray[np.bool_]  # [h, w]


def pack_rle(rle: dict[str, Any], source: str) -> bytes:
    """Run lengths are kept as numbers: the loader then never hands unchecked codes to a decoder in C."""
    try:
        runs = rle_counts(rle, height=0, width=0)
    except ValueError as error:
        raise DataError(f"{source}: {error}; run cascade-rcnn check --fix") from None
    return PACKED_RLE + struct.pack("<2i", *rle["size"]) + np.array(runs, dtype="<i4").tobytes()


def decode_packed_rle(packed: bytes, size: tuple[int, int]) -> tuple[NDArray[np.uint8], int, int] | None:
    """Draw only the columns that the object touches."""
    height, width = struct.unpack_from("<2i", packed, 1)
    if (height, width) != size:
        raise DataError(f"an RLE mask of {width}x{height} on an image of {size[1]}x{size[0]}; run cascade-rcnn check")
    ends = np.cumsum(np.frombuffer(packed, dtype="<i4", offset=9), dtype=np.int64)  # run i: ends[i - 1] .. ends[i]
    on = np.flatnonzero(ends[1::2] > ends[:-1:2])  # runs of the object with a length
    if not on.size:
        return None
    left, right = int(ends[2 * on[0]] // height), int((ends[2 * on[-1] + 1] - 1) // height) + 1
    bounds = np.concatenate([[left * height], np.clip(ends, left * height, right * height)])
    lengths = bounds[1:] - bounds[:-1]
    block = np.repeat(np.arange(len(ends), dtype=np.uint8) & 1, lengths).reshape(right - left, height)
    rows = np.flatnonzero(block.any(axis=0))
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    return np.ascontiguousarray(block[:, top:bottom]).T, top, left


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


def unite_rles(rles: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The uncompressed RLE of pixels that any of the masks holds. Raises ``ValueError`` for different sizes."""
    for rle in rles:
        if rle_counts(rle, height=0, width=0) and rle["size"] != rles[0]["size"]:
            raise ValueError(f"RLEs of sizes {rles[0]['size']} and {rle['size']} in one object")
    return encode_rle(np.any([decode_rle(rle) for rle in rles], axis=0))


def encode_crop(crop: MaskCrop, size: tuple[int, int]) -> dict[str, Any]:
    """COCO's compressed RLE of a crop within an image of ``size``; costs the crop's pixels, not the image's.

    In an image of more than ``MOST_RLE_PIXELS`` it stays uncompressed: the compressing code counts in 32 bits.
    """
    height, width = size
    rows, columns = crop.pixels.shape
    padded = np.zeros((columns, rows + 2), dtype=np.bool_)  # RLE runs down the columns; the padding ends each run
    padded[:, 1:-1] = crop.pixels.T
    flat = padded.reshape(-1)
    column, row = np.divmod(np.flatnonzero(flat[1:] != flat[:-1]) + 1, rows + 2)
    edges = (column + crop.left) * height + row - 1 + crop.top  # start, end, start, end, ... in the image's columns
    starts, ends = edges[::2], edges[1::2]
    if len(starts) > 1:  # a run that touches the bottom goes on at the top of the next column
        apart = starts[1:] != ends[:-1]
        starts, ends = starts[np.append(True, apart)], ends[np.append(apart, True)]
    borders = np.stack([starts, ends], axis=1).reshape(-1)
    counts = np.diff(np.concatenate([[0], borders, [height * width]])).tolist()
    if counts[-1] == 0 and len(counts) > 1:
        counts.pop()
    if height * width > MOST_RLE_PIXELS:
        return {"size": [height, width], "counts": counts}
    try:
        from faster_coco_eval.core import mask as coco_mask
    except ImportError:  # an exported network runs without it
        return {"size": [height, width], "counts": _compress(counts)}
    encoded = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    text = encoded["counts"]
    return {"size": [height, width], "counts": text.decode("ascii") if isinstance(text, bytes) else text}


def _compress(runs: Sequence[int]) -> str:
    """The inverse of ``_decompress``."""
    text = bytearray()
    for position, run in enumerate(runs):
        value = run - (runs[position - 2] if position > 2 else 0)
        more = True
        while more:
            code, value = value & 31, value >> 5
            more = value != (-1 if code & 16 else 0)
            text.append(48 + code + (32 if more else 0))
    return text.decode("ascii")
