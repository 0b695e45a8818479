"""Pictures of more than 8 bits per channel: which levels they use, and how these become the 256 that networks see.

A 16-bit file rarely uses 16 bits: cameras of microscopes give 10, 12 or 14, radiometric ones a narrow band. One rule
(``data.range``) holds for a whole data set and is kept in the checkpoint, so that a level means the same grey in
training, evaluation and prediction. H, W: height and width; C: 1 or 3 channels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cascade_rcnn.config import pixel_range
from cascade_rcnn.errors import DataError

_LADDER = (255, 1023, 4095, 16383, 65535)  # 8, 10, 12, 14, 16 bits
_NARROW = 0.25  # levels of a data set that span less than this share of their depth are stretched
_BLACK = 0.125  # a single picture that stays below this share of its type's range is refused rather than read as black
_SAMPLE = 20_000  # pixels of a picture that its data set's levels are judged by
_WAY_OUT = "say which levels become black and white: --range (in training --data.range, in Python load(range=...))"


def is_deep(picture: Image.Image) -> bool:
    """Whether an opened picture has more than 8 bits per channel."""
    return picture.mode[0] in "IF" or any(_is_wide(tile) for tile in getattr(picture, "tile", ()))


def _rawmode(tile: Any) -> str:
    arguments = tile[3]
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _is_wide(tile: Any) -> bool:
    """Three or four channels of 16 bits, of which Pillow keeps the high bytes."""
    return _rawmode(tile).startswith(("RGB;16", "RGBA;16", "RGBX;16"))


def deep_pixels(picture: Image.Image, reopen: Callable[[], Image.Image]) -> NDArray[Any]:
    """The levels themselves, [H, W] or [H, W, 3]; ``reopen()`` opens the same file once more.

    Of 16-bit colour Pillow gives the high bytes; read with the byte order turned round it gives the low ones.
    """
    if picture.mode[0] in "IF":
        return np.asarray(picture)
    high = np.asarray(picture.convert("RGB")).astype(np.uint16)
    with reopen() as again:
        again.tile = [(*tile[:3], _other_bytes(tile)) for tile in again.tile]
        low = np.asarray(again)[..., :3]
    levels: NDArray[np.uint16] = (high << 8) | low
    return levels


def _other_bytes(tile: Any) -> Any:
    name, arguments = _rawmode(tile), tile[3]
    order = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}[name[-1]]
    return (name[:-1] + order, *arguments[1:]) if isinstance(arguments, tuple) else name[:-1] + order


def to_bytes(levels: NDArray[Any], rule: str, *, where: str) -> NDArray[np.uint8]:
    """Levels [H, W] or [H, W, C] as the grey values 0..255 that ``data.range`` makes of them.

    ``auto`` is a rule for data sets and was settled with theirs; a single picture is read by its type, and refused
    where that would leave it all but black.

    Raises:
        DataError: ``auto`` or ``dtype`` where the type says nothing of the range; names the levels and the option.
    """
    wanted = pixel_range(rule)
    if isinstance(wanted, tuple):
        return _scaled(levels, *wanted)
    finite = levels[np.isfinite(levels)] if levels.dtype.kind == "f" else levels
    if not finite.size:
        return np.zeros(levels.shape, np.uint8)
    if wanted == "percentile":
        low, high = np.percentile(finite, (0.1, 99.9)).tolist()
        return _scaled(levels, low, high if high > low else low + 1)
    low, high = float(finite.min()), float(finite.max())
    depth = 1.0 if levels.dtype.kind == "f" else 65535.0
    used = f"levels {low:g} to {high:g} in use"
    if low < 0 or high > depth:
        raise DataError(f"{where}: {levels.dtype} pixels, {used}, and no range that they belong to; {_WAY_OUT}")
    if wanted == "auto" and high > low and high < _BLACK * depth:
        raise DataError(f"{where}: {used} of 0 to {depth:g}, which would be all but black; {_WAY_OUT}")
    return _scaled(levels, 0, depth)


def _scaled(levels: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """Whole levels in 256 equal steps (0..65535 gives the high byte), others rounded; NaN is black."""
    if levels.dtype.kind in "iu" and low == int(low) and high == int(high):
        wide = np.clip(levels.astype(np.int64), int(low), int(high)) - int(low)
        return (wide * 256 // (int(high) - int(low) + 1)).astype(np.uint8)
    share = np.nan_to_num((levels.astype(np.float64) - low) / (high - low), nan=0.0, posinf=1.0, neginf=0.0)
    return np.round(np.clip(share, 0, 1) * 255).astype(np.uint8)


@dataclass(frozen=True)
class Levels:
    """The levels in use of some pictures, and where nearly all pixels lie."""

    low: float
    high: float
    whole: bool  # whole numbers
    sample: NDArray[np.float64]  # pixels, as many of each picture

    @staticmethod
    def of(parts: Sequence[Levels]) -> Levels | None:
        """Levels of several pictures together; None for none."""
        if not parts:
            return None
        return Levels(
            min(part.low for part in parts),
            max(part.high for part in parts),
            all(part.whole for part in parts),
            np.concatenate([part.sample for part in parts]),
        )

    @property
    def usual_low(self) -> float:
        """0.1 per cent of the pixels are darker."""
        return float(np.percentile(self.sample, 0.1))

    @property
    def usual_high(self) -> float:
        """0.1 per cent of the pixels are brighter."""
        return float(np.percentile(self.sample, 99.9))

    def share_outside(self, low: float, high: float) -> float:
        """Share of the pixels that a range clips."""
        return float(((self.sample < low) | (self.sample > high)).mean())

    def __str__(self) -> str:
        depth = self.depth
        share = f", {(self.high - self.low) / depth:.1%} of 0 to {depth:g}" if self.low >= 0 and depth else ""
        return (
            f"levels {self.low:g} to {self.high:g}{share}; 99.8% of the pixels lie in "
            f"{self.usual_low:g} to {self.usual_high:g}"
        )

    @property
    def depth(self) -> float:
        """The largest level of the files' type; 0 where the type says nothing."""
        if self.whole:
            return 65535.0 if self.high <= 65535 else 0.0
        return 1.0 if self.high <= 1 else 0.0

    def range(self) -> tuple[float, float]:
        """The levels that become black and white for these pictures: the fewest bits that hold them (8, 10, 12, 14, 16;
        for fractions 0 to 1), or the levels themselves where they span less than a quarter of that.

        Levels below 0 or above 16 bits belong to no type's range: those of 99.8 per cent of the pixels are taken.
        """
        if self.low < 0 or self.high > _LADDER[-1]:
            low, high = self.usual_low, self.usual_high
        else:
            steps = _LADDER if self.whole or self.high > 1 else (1, *_LADDER)
            low, high = 0.0, float(next(step for step in steps if self.high <= step))
            if 0 < self.high - self.low < _NARROW * high:
                low, high = self.low, self.high
        return (low, high) if low < high else (low, low + 1)


def levels_of(pictures: Iterable[NDArray[Any]]) -> Levels | None:
    """Levels in use of pictures [H, W] or [H, W, C]; None where there is no finite pixel."""
    parts = []
    for levels in pictures:
        flat = levels.reshape(-1)
        finite = flat[np.isfinite(flat)] if flat.dtype.kind == "f" else flat
        if finite.size:
            sample = finite[:: max(1, finite.size // _SAMPLE)].astype(np.float64)
            parts.append(Levels(float(finite.min()), float(finite.max()), flat.dtype.kind in "iu", sample))
    return Levels.of(parts)


def written(low: float, high: float) -> str:
    """Two levels as ``data.range`` takes them."""
    return f"{low:.9g} {high:.9g}"
