"""OpenCV's bilinear arithmetic, pixel by pixel."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import locations
from cascade_rcnn.data.exact_resize import resize_like_opencv
from cascade_rcnn.data.images import read_image

PARITY = locations.FIXTURES / "parity"


def _pixel(image: np.ndarray, size: tuple[int, int], y: int, x: int) -> int:
    """One output pixel of a one-channel image, by the definition of OpenCV's fixed-point interpolation."""
    height, width = image.shape
    row = np.float32((y + 0.5) * (height / size[0]) - 0.5)
    col = np.float32((x + 0.5) * (width / size[1]) - 0.5)
    r, c = math.floor(row), math.floor(col)
    row_share, col_share = np.float32(row - np.float32(r)), np.float32(col - np.float32(c))
    if c < 0 or c >= width - 1:
        col_share = np.float32(0)
    weights = [int(np.rint((1 - s) * 2048)) for s in (row_share, col_share)]
    others = [int(np.rint(s * 2048)) for s in (row_share, col_share)]
    sums = []
    for line in (min(max(r, 0), height - 1), min(max(r + 1, 0), height - 1)):
        first, second = (int(image[line, min(max(k, 0), width - 1)]) for k in (c, c + 1))
        sums.append((first * weights[1] + second * others[1]) >> 4)
    return (((sums[0] * weights[0]) >> 16) + ((sums[1] * others[0]) >> 16) + 2) >> 2


@pytest.mark.parametrize("size", [(40, 33), (9, 7), (20, 61), (1, 1), (23, 30)])
def test_every_pixel_follows_the_definition(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, 20, 30), dtype=np.uint8)
    image[0, :, :15] = 255
    resized = resize_like_opencv(torch.from_numpy(image), size)
    assert resized.shape == (3, *size) and resized.dtype == torch.uint8
    expected = [[[_pixel(channel, size, y, x) for x in range(size[1])] for y in range(size[0])] for channel in image]
    assert resized.tolist() == expected


def test_same_size_changes_nothing_and_white_stays_white() -> None:
    image = torch.randint(0, 256, (3, 12, 17), dtype=torch.uint8)
    assert torch.equal(resize_like_opencv(image, (12, 17)), image)
    white = torch.full((3, 12, 17), 255, dtype=torch.uint8)
    assert set(resize_like_opencv(white, (31, 40)).unique().tolist()) <= {254, 255}  # shifts round down


def test_mmdetections_own_input_bit_for_bit() -> None:
    sample = np.load(PARITY / "mmdet_cascade_rcnn_r50_fpn.npz")["input_sample"]
    sample = sample.reshape(3, *sample.shape[-2:])
    resized = resize_like_opencv(read_image(PARITY / "synthetic.png"), (800, 1080))
    ours = resized.numpy()[:, ::97, ::89][:, : sample.shape[1], : sample.shape[2]]
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    theirs = (sample * std[:, None, None] + mean[:, None, None])[:, : ours.shape[1], : ours.shape[2]]
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
