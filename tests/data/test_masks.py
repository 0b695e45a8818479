"""Windows of masks equal whole-image masks, for any transform."""

from __future__ import annotations

import numpy as np
import pytest
from faster_coco_eval import mask as rle_api
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_rcnn.data.masks import (
    decode_window,
    nearest_indices,
    pack_segmentation,
    pack_segmentations,
    transform_window,
)
from cascade_rcnn.errors import DataError

SIZE = (37, 52)  # height, width


def _pasted(found, size=SIZE):  # type: ignore[no-untyped-def]
    whole = np.zeros(size, dtype=np.uint8)
    if found is not None:
        window, top, left = found
        whole[top : top + window.shape[0], left : left + window.shape[1]] = window
    return whole


def _whole(segmentation):  # type: ignore[no-untyped-def]
    """The mask as COCO's own functions draw it on the whole image."""
    rles = rle_api.frPyObjects(segmentation, *SIZE)
    return rle_api.decode(rle_api.merge(rles) if isinstance(rles, list) else rles)


# Coordinates with one decimal hit the ties of the rasteriser's grid of fifths; some lie outside the image.
coordinate = st.integers(-100, 700).map(lambda tenths: tenths / 10)
polygon = st.lists(coordinate, min_size=6, max_size=16).map(lambda values: values[: len(values) // 2 * 2])


@settings(deadline=None, max_examples=200)
@given(st.lists(polygon, min_size=1, max_size=3))
def test_polygons_in_a_window_equal_polygons_on_the_image(polygons: list[list[float]]) -> None:
    np.testing.assert_array_equal(_pasted(decode_window(pack_segmentation(polygons), SIZE)), _whole(polygons))


def _blob(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mask = np.zeros(SIZE, dtype=np.uint8)
    mask[8:30, 11:40] = rng.random((22, 29)) < 0.6
    return mask


@pytest.mark.parametrize("form", ["compressed", "bytes", "list"])
def test_run_lengths_of_every_form_read_alike(form: str) -> None:
    mask = _blob(0)
    rle = rle_api.encode(np.asfortranarray(mask))
    counts = rle["counts"].decode() if isinstance(rle["counts"], bytes) else rle["counts"]
    if form == "bytes":
        counts = counts.encode()
    if form == "list":
        flat = mask.reshape(-1, order="F")
        changes = np.flatnonzero(np.diff(flat)) + 1
        counts = np.diff([0, *changes, flat.size]).tolist()
        counts = counts if flat[0] == 0 else [0, *counts]
    packed = pack_segmentation({"size": list(SIZE), "counts": counts})
    window, top, left = decode_window(packed, SIZE)  # type: ignore[misc]
    np.testing.assert_array_equal(_pasted((window, top, left)), mask)
    assert window.shape == (22, 29) and (top, left) == (8, 11)  # its own extent only


@pytest.mark.parametrize("nothing", [None, [], {}, [[1.0, 2.0, 3.0, 4.0]], [[]]])
def test_no_polygon_of_three_points_is_no_mask(nothing: object) -> None:
    assert pack_segmentation(nothing) == b""  # type: ignore[arg-type]
    assert decode_window(b"", SIZE) is None


def test_objects_packed_together_equal_objects_packed_alone() -> None:
    objects = [
        [[1.0, 2, 30, 2, 30, 20]],
        None,
        rle_api.encode(np.asfortranarray(_blob(2))),
        [[5.0, 5]],
        [[0.1, 0.3, 9, 9, 3.3, 20, 7], [30.0, 1, 40, 1, 40, 9]],
    ]
    assert pack_segmentations(objects) == [pack_segmentation(one) for one in objects]  # type: ignore[arg-type]


def test_empty_and_outside_masks_are_none() -> None:
    empty = rle_api.encode(np.zeros(SIZE, dtype=np.uint8, order="F"))
    assert decode_window(pack_segmentation(empty), SIZE) is None
    assert decode_window(pack_segmentation([[60.0, 1, 70, 1, 70, 9]]), SIZE) is None


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"size": [37], "counts": "abc"}, "RLE without a size"),
        ({"counts": [1, 2]}, "RLE without a size"),
        ({"size": [37, 52], "counts": [5, 5]}, "do not fill its size"),
        ({"size": [37, 52], "counts": "zzz~"}, "foreign characters"),
        ([[1.0, 2, float("nan"), 4, 5, 6]], "not a number"),
    ],
)
def test_unusable_segmentation_names_its_source(wrong: object, message: str) -> None:
    with pytest.raises(DataError, match=rf"truth\.json: .*{message}"):
        pack_segmentation(wrong, source="truth.json")  # type: ignore[arg-type]


def test_rle_of_another_size_is_an_error() -> None:
    with pytest.raises(DataError, match="RLE mask of 52x37 on an image of 10x10"):
        decode_window(pack_segmentation(rle_api.encode(np.asfortranarray(_blob(1)))), (10, 10))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 120), max_size=30))
def test_any_run_lengths_draw_as_cocos_own_decoder_draws_them(counts: list[int]) -> None:
    total = SIZE[0] * SIZE[1]
    kept = [run for run, end in zip(counts, np.cumsum(counts)) if end <= total]
    runs = [*kept, total - sum(kept)]
    expected = rle_api.decode(rle_api.frPyObjects({"size": list(SIZE), "counts": runs}, *SIZE))
    found = decode_window(pack_segmentation({"size": list(SIZE), "counts": runs}), SIZE)
    np.testing.assert_array_equal(_pasted(found), expected)
    if found is not None:  # no wider than the object
        assert found[0][0].any() and found[0][-1].any() and found[0][:, 0].any() and found[0][:, -1].any()


def test_nearest_indices_follow_opencv() -> None:
    assert nearest_indices(3, 7).tolist() == [0, 0, 0, 1, 1, 2, 2]  # floor(i * 3 / 7)
    assert nearest_indices(7, 3).tolist() == [0, 2, 4]
    assert nearest_indices(5, 5).tolist() == [0, 1, 2, 3, 4]


@settings(deadline=None, max_examples=100)
@given(
    st.integers(0, 1000),
    st.integers(5, 90),
    st.integers(5, 90),
    st.integers(0, 30),
    st.integers(0, 30),
    st.booleans(),
    st.booleans(),
)
def test_a_moved_window_equals_the_moved_image(
    seed: int, height: int, width: int, top: int, left: int, mirror: bool, turn: bool
) -> None:
    """Resize, crop and flip of the whole mask against the same index maps applied to the object's window."""
    mask = _blob(seed)
    rows = nearest_indices(SIZE[0], height)[top : top + 40][:: -1 if turn else 1]
    cols = nearest_indices(SIZE[1], width)[left : left + 40][:: -1 if mirror else 1]
    expected = mask[rows][:, cols]
    window = decode_window(pack_segmentation(rle_api.encode(np.asfortranarray(mask))), SIZE)
    assert window is not None
    np.testing.assert_array_equal(_pasted(transform_window(*window, rows, cols), expected.shape), expected)
