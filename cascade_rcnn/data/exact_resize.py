"""Bilinear resizing of images exactly as OpenCV and Pillow do it.

mmdetection's published results were measured on images that OpenCV had resized. Its arithmetic is fixed-point: weights
of 11 bits, products shifted down between the two passes. Floating-point bilinear interpolation differs from it by one
grey level in a fifth of the pixels, which moves the scores of a detector in the second digit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor  # exported networks run without it

_ONE = 1 << 11
_BLOCK = 16  # rows at a time, so that the 32-bit sums stay in the cache: 8 ms for 800x1080 where whole images take 19
Integers = NDArray[np.int32]
Pixels = NDArray[np.uint8]


def _taps(source: int, target: int, *, clamp: bool) -> tuple[Integers, Integers, Integers, Integers]:
    """First and second pixel [target] of each output pixel and their integer weights."""
    position = ((np.arange(target) + 0.5) * (source / target) - 0.5).astype(np.float32)
    first = np.floor(position)
    share = position - first
    if clamp:  # OpenCV moves samples beyond the border onto it in rows, but only repeats the border in columns
        share = np.where((first < 0) | (first >= source - 1), np.float32(0), share)
    low = first.astype(np.int32)
    weights = np.rint((1 - share) * _ONE).astype(np.int32), np.rint(share * _ONE).astype(np.int32)
    return low.clip(0, source - 1), (low + 1).clip(0, source - 1), *weights


def resize_like_opencv(image: Tensor, size: tuple[int, int]) -> Tensor:
    """``image`` uint8 [C, H, W] on the CPU as :func:`opencv_resized`; the result lies channels-last in memory."""
    import torch

    if tuple(image.shape[-2:]) == size:
        return image
    return torch.from_numpy(opencv_resized(image.permute(1, 2, 0).contiguous().numpy(), size)).permute(2, 0, 1)


def opencv_resized(image: Pixels, size: tuple[int, int]) -> Pixels:
    """``image`` [H, W, C] resized to ``size`` (height, width): bit for bit what ``cv2.resize`` gives."""
    if image.shape[:2] == size:
        return image
    height, width, channels = image.shape
    left, right, *weights = _taps(width, size[1], clamp=True)
    top, bottom, weight_top, weight_bottom = _taps(height, size[0], clamp=False)
    # one row of an image is W * C numbers: index and weigh it so, all channels at once
    take_left, take_right = ((taps[:, None] * channels + np.arange(channels)).reshape(-1) for taps in (left, right))
    weight_left, weight_right = (np.repeat(weight, channels) for weight in weights)
    rows = np.ascontiguousarray(image).reshape(height, width * channels)
    across = np.empty((height, size[1] * channels), dtype=np.int16)  # at most 255 * 2048 >> 4
    for start in range(0, height, _BLOCK):
        part = rows[start : start + _BLOCK].astype(np.int32)
        sums = part.take(take_left, axis=1)
        sums *= weight_left
        other = part.take(take_right, axis=1)
        other *= weight_right
        sums += other
        sums >>= 4
        across[start : start + _BLOCK] = sums
    resized = np.empty((size[0], size[1] * channels), dtype=np.uint8)
    for start in range(0, size[0], _BLOCK):
        block = slice(start, start + _BLOCK)
        upper, lower = across[top[block]].astype(np.int32), across[bottom[block]].astype(np.int32)
        upper *= weight_top[block, None]
        lower *= weight_bottom[block, None]
        upper >>= 16
        lower >>= 16
        upper += lower
        upper += 2
        upper >>= 2
        resized[block] = upper  # 0..255 already: the weights of a pixel add up to one
    return resized.reshape(*size, channels)


def resize_to_float(image: Tensor, size: tuple[int, int], scale: float) -> Tensor:
    """``image`` [C, H, W] as float32 [C, *size], as OpenCV resizes float images by a factor: Detectron's input.

    Samples lie ``1 / scale`` apart, whatever ``size`` was rounded to, and nothing is rounded to grey levels.
    """
    import torch

    pixels = image.permute(1, 2, 0).float()  # [H, W, C]
    for axis, target in enumerate(size):
        source = pixels.shape[axis]
        position = ((np.arange(target) + 0.5) / scale - 0.5).astype(np.float32)
        first = np.floor(position)
        share = torch.from_numpy(position - first).view(-1, *[1] * (2 - axis))
        low, high = (torch.from_numpy((first + step).clip(0, source - 1).astype(np.int64)) for step in (0, 1))
        pixels = pixels.index_select(axis, low) * (1 - share) + pixels.index_select(axis, high) * share
    return pixels.permute(2, 0, 1)


def resize_with_pillow(image: Tensor, size: tuple[int, int]) -> Tensor:
    """``image`` uint8 [3, H, W] as :func:`pillow_resized`."""
    import torch

    return torch.from_numpy(pillow_resized(image.permute(1, 2, 0).contiguous().numpy(), size)).permute(2, 0, 1)


def pillow_resized(image: Pixels, size: tuple[int, int]) -> Pixels:
    """``image`` [H, W, 3] resized to ``size`` (height, width) with Pillow's antialiased filter (detectron2)."""
    return np.array(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))
