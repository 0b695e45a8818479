"""To which size an image is brought, and by which interpolation: numbers alone, without torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from cascade_rcnn.config import DataConfig, SemanticsName

Interpolation = Literal["fast", "opencv", "float", "antialias", "pillow"]  # all bilinear


def interpolation(config: DataConfig, semantics: SemanticsName = "mmdetection", *, training: bool) -> Interpolation:
    """How pixels are resized: like Pillow (detectron2), or without antialiasing, like OpenCV (the others; the authors'
    release in float).

    Their arithmetic is followed bit for bit at test time, where published scores are compared. Training takes
    torchvision's, which is off by one grey level in a fifth of the pixels and ten times as fast.
    """
    if semantics == "detectron2" if config.antialias is None else config.antialias:
        return "antialias" if training else "pillow"
    if training or semantics == "torchvision":
        return "fast"
    return "float" if semantics == "paper" else "opencv"


def fitted_size(size: tuple[int, int], short_side: int, long_side: int) -> tuple[int, int]:
    """(height, width) after scaling so that the shorter side is ``short_side`` unless the longer exceeds ``long_side``.

    mmdetection's rule, int(side * scale + 0.5); detectron2's gives the same sizes. At least one pixel.
    """
    height, width = size
    scale = min(long_side / max(size), short_side / min(size))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def fitting(data: DataConfig, size: tuple[int, ...], canvas: tuple[int, int] | None) -> DataConfig:
    """Limits under which an image of ``size`` (height, width) fits into ``canvas``: the usual ones where it does."""
    if canvas is None:
        return data
    height, width = size[0], size[1]
    fitted = fitted_size((height, width), data.test_short_side or max(data.short_side), data.long_side)
    if fitted[0] <= canvas[0] and fitted[1] <= canvas[1]:
        return data
    # in whole numbers: a float product may end below the canvas's own side, which the limits of ``data`` then refuse
    if height * canvas[1] >= width * canvas[0]:
        sides = canvas[0], max(1, width * canvas[0] // height)
    else:
        sides = max(1, height * canvas[1] // width), canvas[1]
    return replace(data, test_short_side=min(sides), long_side=max(sides))


def detectron_scale(size: tuple[int, int], short_side: int, long_side: int) -> float:
    """The one factor of both axes: ``short_side`` for the shorter, unless the longer is rounded above ``long_side``."""
    scale = short_side / min(size)
    return scale if round(scale * max(size)) <= long_side else long_side / max(size)


def detectron_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """(height, width) times ``scale``, rounded half to even as OpenCV does; at least one pixel."""
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)
