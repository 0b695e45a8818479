"""A picture cut into overlapping tiles, at its own resolution and at coarser ones, in one pass from top to bottom.

The network sees an object well only if it lies whole in what it is shown. Tiles overlap by a share of their side, hence
every object up to that size lies whole in one of them. For larger ones the same is done with the picture shrunk to a
quarter, to a quarter of that, ... until it fits into one tile: an object too large for one level is whole on the next,
where it is still a quarter of the overlap or more. That costs 1/16 + 1/256 + ... of the tiles.

Rows come in order and are let go as soon as no tile needs them: each level keeps one row of tiles, ``tile`` x width x 3
bytes. H, W: height and width of the picture, as stored or upright; f: how many pixels of it a level's pixel is wide.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.data.images import Size, turn
from cascade_rcnn.data.orientation import turn_boxes
from cascade_rcnn.errors import DataError, UserError
from cascade_rcnn.messages import shown

SMALLEST_TILE = 64
LARGEST_OVERLAP = 0.75
LARGEST_BAND = 2 << 30  # bytes of a row of tiles
_RATIO = 4  # from one level to the next; the last step is smaller where that is enough
_SLAB = 64  # rows that are shrunk at a time: bounds what the sums take
_ROWS_TURNED, _COLUMNS_TURNED = (3, 4, 6, 7), (2, 3, 7, 8)  # tags whose last stored row (column) comes first upright
_OVERVIEW = 2048  # longer side of the picture that results are drawn on


@dataclass(frozen=True)
class Tiling:
    """How pictures are cut, and how many objects of a picture are kept."""

    tile: int  # side in pixels of the picture
    overlap: float = 0.2  # of neighbours, as a share of the side
    whole: bool = True  # look at the coarser levels too
    max_merged: int | None = None  # the best so many of a picture; None: all (the network's own limit is one per tile)

    def __post_init__(self) -> None:
        if not _is_number(self.tile, numbers.Integral) or self.tile < SMALLEST_TILE:
            raise UserError(f"tile {shown(self.tile)}: give a side of at least {SMALLEST_TILE} pixels, e.g. 1024")
        if not _is_number(self.overlap, numbers.Real) or not 0 <= self.overlap <= LARGEST_OVERLAP:
            raise UserError(
                f"overlap {shown(self.overlap)}: give the share of a tile's side that neighbours have in common, from "
                f"0 to {LARGEST_OVERLAP:g}, e.g. 0.2"
            )
        if self.max_merged is not None and (not _is_number(self.max_merged, numbers.Integral) or self.max_merged < 1):
            raise UserError(f"max_merged {shown(self.max_merged)}: give a whole number of at least 1")

    @property
    def common(self) -> int:
        """Pixels that neighbours have in common."""
        return round(self.tile * self.overlap)


def _is_number(value: object, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


class Rows(Protocol):
    """A picture that gives its rows from top to bottom."""

    size: Size  # H, W as stored
    tag: int  # orientation: 1 for rows that are upright already

    def chunks(self) -> Iterator[NDArray[np.uint8]]:
        """Some rows at a time, [h, W, 3]."""


class ArrayRows:
    """Pixels in memory, upright."""

    tag = 1

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        self.size = (int(pixels.shape[0]), int(pixels.shape[1]))
        self.pixels = pixels

    def chunks(self) -> Iterator[NDArray[np.uint8]]:
        yield self.pixels


class View(NamedTuple):
    """Where a tile lies in the upright picture."""

    level: int
    factor: int  # pixels of the picture per pixel of the tile
    x: int  # of the tile's left border; below 0 where a mirrored level has a column more than the picture
    y: int
    right: int  # of what it shows, within the picture
    bottom: int
    inner: tuple[bool, bool, bool, bool]  # left, top, right, bottom border cuts through the picture


class Tile(NamedTuple):
    """What the network is shown."""

    pixels: NDArray[np.uint8]  # [h, w, 3], upright
    view: View


def starts(length: int, tile: int, common: int) -> list[int]:
    """Where tiles begin along an axis: neighbours share ``common`` pixels, the last one ends with the picture."""
    if length <= tile:
        return [0]
    step = max(tile - common, 1)
    return [*range(0, length - tile, step), length - tile]


class Pyramid:
    """All tiles of a picture, and the picture itself shrunk to a size that can be drawn on.

    Raises:
        DataError: a row of tiles would take more than 2 GiB.
    """

    def __init__(self, rows: Rows, tiling: Tiling) -> None:
        self.rows, self.tiling = rows, tiling
        height, width = rows.size
        if 3 * min(tiling.tile, height) * width > LARGEST_BAND:
            fits = LARGEST_BAND // (3 * width)
            raise DataError(
                f"tile {tiling.tile} on a picture {width:,} pixels wide: a row of tiles takes more than "
                f"{LARGEST_BAND >> 30} GiB; give a tile of at most {fits}"
            )
        self._levels = [_Level(0, rows.size, 1, tiling, rows)]
        while tiling.whole and max(self._levels[-1].size) > tiling.tile:
            last = self._levels[-1]
            last.shrink = _Shrink(last.size, min(_RATIO, math.ceil(max(last.size) / tiling.tile)))
            factor = last.factor * last.shrink.ratio
            self._levels.append(_Level(last.number + 1, last.shrink.size, factor, tiling, rows))
        self.overview_factor = max(1, math.ceil(max(rows.size) / _OVERVIEW))
        self._overview: list[NDArray[np.uint8]] = []

    @property
    def count(self) -> int:
        """Number of tiles."""
        return sum(len(level.tops) * len(level.lefts) for level in self._levels)

    @property
    def factors(self) -> list[int]:
        """Of each level, the finest first."""
        return [level.factor for level in self._levels]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) upright."""
        height, width = self.rows.size
        return (width, height) if self.rows.tag >= 5 else (height, width)

    def __iter__(self) -> Iterator[Tile]:
        """Reads the picture once."""
        small = _Shrink(self.rows.size, self.overview_factor)
        for chunk in self.rows.chunks():
            yield from self._take(chunk, small)
            del chunk  # before the next is read

    def _take(self, chunk: NDArray[np.uint8], small: _Shrink) -> Iterator[Tile]:
        for start in range(0, len(chunk), _SLAB):
            slab = chunk[start : start + _SLAB]
            self._overview.append(small.push(slab))
            yield from self._push(0, slab)

    def _push(self, number: int, rows: NDArray[np.uint8]) -> Iterator[Tile]:
        level = self._levels[number]
        yield from level.push(rows)
        if level.shrink is not None:
            yield from self._push(number + 1, level.shrink.push(rows))

    def overview(self) -> NDArray[np.uint8]:
        """The upright picture, ``overview_factor`` times smaller, once all tiles have come."""
        return np.ascontiguousarray(turn(np.concatenate(self._overview), self.rows.tag))


class _Level:
    """The picture at one resolution; keeps the rows that the next tiles need."""

    def __init__(self, number: int, size: Size, factor: int, tiling: Tiling, rows: Rows) -> None:
        self.number, self.size, self.factor = number, size, factor
        self.full, self.tag = rows.size, rows.tag
        self.height, self.width = (min(side, tiling.tile) for side in size)  # of a tile
        self.tops, self.lefts = (starts(side, tiling.tile, tiling.common) for side in size)
        if rows.tag in _ROWS_TURNED:  # the same tiles of the upright picture, however it is stored
            self.tops = [size[0] - self.height - top for top in reversed(self.tops)]
        if rows.tag in _COLUMNS_TURNED:
            self.lefts = [size[1] - self.width - left for left in reversed(self.lefts)]
        self.shrink: _Shrink | None = None  # to the next level
        self._buffer = np.empty((0, 0, 3), np.uint8)
        self._filled = self._row = 0

    def push(self, rows: NDArray[np.uint8]) -> Iterator[Tile]:
        """Take the next rows, and give the tiles that are complete now."""
        if not self._buffer.size:
            self._buffer = np.empty((self.height, self.size[1], 3), np.uint8)
        while len(rows):
            taken = rows[: self.height - self._filled]
            self._buffer[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            rows = rows[len(taken) :]
            if self._filled == self.height:
                yield from self._tiles(self.tops[self._row])
                self._advance()

    def _tiles(self, top: int) -> Iterator[Tile]:
        for left in self.lefts:
            pixels: NDArray[np.uint8] = turn(self._buffer[:, left : left + self.width], self.tag)
            yield Tile(pixels.copy(), self._view(top, left))

    def _view(self, top: int, left: int) -> View:
        corners = np.array([[left, top, left + self.width, top + self.height]]) * self.factor
        x1, y1, x2, y2 = (round(value) for value in turn_boxes(corners, self.full, self.tag)[0].tolist())
        height, width = self.full[::-1] if self.tag >= 5 else self.full
        inner = (x1 > 0, y1 > 0, x2 < width, y2 < height)
        return View(self.number, self.factor, x1, y1, min(x2, width), min(y2, height), inner)

    def _advance(self) -> None:
        self._row += 1
        self._filled = 0
        if self._row < len(self.tops):
            step = self.tops[self._row] - self.tops[self._row - 1]
            self._filled = self.height - step
            self._buffer[: self._filled] = self._buffer[step:]


class _Shrink:
    """Each pixel the mean of a square of ``ratio`` pixels, fewer at the right and lower border."""

    def __init__(self, size: tuple[int, int], ratio: int) -> None:
        self.ratio, self._height = ratio, size[0]
        self.size = (-(-size[0] // ratio), -(-size[1] // ratio))
        self._carry = np.empty((0, size[1], 3), np.uint8)  # rows that do not fill a square yet
        self._seen = 0

    def push(self, rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Take the next rows, and give those that they complete."""
        if self.ratio == 1:
            return np.array(rows)
        self._seen += len(rows)
        held = np.concatenate([self._carry, rows])
        ready = len(held) if self._seen == self._height else len(held) // self.ratio * self.ratio
        self._carry = held[ready:]
        sums = _sums(_sums(held[:ready].swapaxes(0, 1), self.ratio).swapaxes(0, 1), self.ratio)  # columns, then rows
        high, wide = (_sums(np.ones((side, 1, 1), np.uint8), self.ratio) for side in (ready, rows.shape[1]))
        area = high * wide.swapaxes(0, 1)
        means: NDArray[np.uint8] = ((sums + area // 2) // area).astype(np.uint8)
        return means


def _sums(values: NDArray[Any], ratio: int) -> NDArray[np.uint32]:
    """Sums of ``ratio`` entries [n, ...] each, the last of those that are left."""
    sums: NDArray[np.uint32] = values[::ratio].astype(np.uint32)
    for offset in range(1, ratio):
        part = values[offset::ratio]
        sums[: len(part)] += part
    return sums
