"""Polygons of masks: drawn again they give the same pixels, with holes, with several parts, at every edge."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from faster_coco_eval.core import mask as coco_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cascade_rcnn.data.contours import Ring, joined, outlines, with_slits
from cascade_rcnn.data.masks import decode_window, pack_segmentation
from cascade_rcnn.data.rle import MaskCrop

Mask = NDArray[np.bool_]


def drawn(rings: list[Ring], size: tuple[int, int]) -> Mask:
    """Pixels of polygons by COCO's own rasteriser."""
    rles = coco_mask.frPyObjects([ring.reshape(-1).tolist() for ring in rings], *size)
    pixels: Any = coco_mask.decode(coco_mask.merge(rles))
    return np.asarray(pixels).astype(bool)


def by_crossings(rings: list[Ring], size: tuple[int, int]) -> Mask:
    """Pixels whose centre has an odd number of edges to its left: no rounding, written apart from any rasteriser."""
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    odd = np.zeros(size, dtype=bool)
    for ring in rings:
        for (x1, y1), (x2, y2) in zip(ring, np.roll(ring, -1, axis=0)):
            if y1 != y2:
                crosses = ((y1 <= y) != (y2 <= y)) & (x1 + (y - y1) * (x2 - x1) / (y2 - y1) < x)
                odd ^= crosses
    return odd


def smooth_noise(seed: int, size: tuple[int, int]) -> Mask:
    from scipy import ndimage

    noise = np.random.default_rng(seed).standard_normal(size)
    return np.asarray(ndimage.gaussian_filter(noise, 2) > 0)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**31), st.sampled_from(["smooth", "sparse", "dense"]))
def test_polygons_give_the_same_pixels(height: int, width: int, seed: int, kind: str) -> None:
    size = (height, width)
    share = {"smooth": 0.0, "sparse": 0.2, "dense": 0.8}[kind]
    mask = smooth_noise(seed, size) if kind == "smooth" else np.random.default_rng(seed).random(size) < share
    parts = outlines(MaskCrop(0, 0, mask))
    assert bool(parts) == mask.any()
    if parts:
        rings = [with_slits(part) for part in parts]
        assert np.array_equal(drawn(rings, size), mask)
        assert np.array_equal(drawn([joined(rings)], size), mask)  # as one ring, for YOLO
        assert np.array_equal(by_crossings([ring for part in parts for ring in (part.outer, *part.holes)], size), mask)


def test_a_ring_has_one_part_and_one_hole() -> None:
    y, x = np.mgrid[:40, :50]
    distance = np.hypot(x - 25, y - 20)
    (part,) = outlines(MaskCrop(100, 200, (distance < 15) & (distance > 6)))
    assert len(part.holes) == 1
    assert part.outer.min(axis=0) == pytest.approx([211, 106]) and part.outer.max(axis=0) == pytest.approx([240, 135])
    assert np.abs(part.holes[0] - (225.5, 120.5)).max() <= 7
    assert len(part.outer) < 60  # of some 90 edges of pixels


def test_parts_come_by_size_and_holes_stay_with_their_part() -> None:
    mask = np.zeros((20, 40), dtype=bool)
    mask[2:5, 2:5] = True
    mask[3, 3] = False
    mask[1:18, 10:38] = True
    mask[5:9, 20:25] = False
    mask[6:8, 22:24] = True  # an island in the hole is a part of its own
    large, small, island = outlines(MaskCrop(0, 0, mask))
    assert [len(part.holes) for part in (large, small, island)] == [1, 1, 0]
    assert island.outer.tolist() == [
        [22.5, 6],
        [23.5, 6],
        [24, 6.5],
        [24, 7.5],
        [23.5, 8],
        [22.5, 8],
        [22, 7.5],
        [22, 6.5],
    ]


def test_pixels_that_touch_at_a_corner_are_two_parts() -> None:
    parts = outlines(MaskCrop(0, 0, np.eye(2, dtype=bool)))
    assert len(parts) == 2 and not any(part.holes for part in parts)
    assert (
        outlines(MaskCrop(0, 0, np.zeros((3, 3), dtype=bool))) == [] == outlines(MaskCrop(0, 0, np.zeros((0, 0), bool)))
    )


def test_more_tolerance_means_fewer_points_and_nearly_the_same_pixels() -> None:
    y, x = np.mgrid[:200, :200]
    mask = np.hypot(x - 100, y - 100) < 80
    counts = []
    for tolerance in (0.0, 0.2, 1.0):
        (part,) = outlines(MaskCrop(0, 0, mask), tolerance=tolerance)
        counts.append(len(part.outer))
        again = drawn([part.outer], mask.shape)
        assert (again & mask).sum() / (again | mask).sum() > (0.999999 if tolerance < 1 else 0.97)
    assert counts[0] >= counts[1] > 4 * counts[2]


def test_our_own_reader_draws_the_same_pixels() -> None:
    mask = smooth_noise(7, (60, 70))
    rings = [with_slits(part).reshape(-1).tolist() for part in outlines(MaskCrop(0, 0, mask))]
    window = decode_window(pack_segmentation(rings), (60, 70))
    assert window is not None
    pixels, top, left = window
    whole = np.zeros((60, 70), dtype=bool)
    whole[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    assert np.array_equal(whole, mask)
