"""Run lengths and polygons, against faster-coco-eval's own encoder and against plain pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from faster_coco_eval.core import mask as official
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cascade_rcnn.data.masks import polygon_points, segmentation_area, segmentation_box
from cascade_rcnn.data.rle import decode_rle, encode_rle, rle_counts


@settings(max_examples=100, deadline=None, derandomize=True)
@given(arrays.arrays(np.bool_, st.tuples(st.integers(1, 40), st.integers(1, 40))))
def test_run_lengths_equal_the_official_encoder(mask: Any) -> None:
    rle = official.encode(np.asfortranarray(mask.astype(np.uint8)))
    counts = rle["counts"].decode() if isinstance(rle["counts"], bytes) else rle["counts"]
    packed = {"size": list(mask.shape), "counts": counts}
    np.testing.assert_array_equal(decode_rle(packed), mask)
    assert encode_rle(mask)["counts"] == rle_counts(packed, height=mask.shape[0], width=mask.shape[1])
    assert segmentation_area(packed) == mask.sum()
    box = segmentation_box(packed)
    if mask.any():
        rows, columns = np.nonzero(mask)
        assert box is not None
        assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    else:
        assert box is None


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=30) | st.text("0123456789OPQ_`abcdefghijklmno", max_size=30))
def test_any_text_as_run_lengths_is_decoded_or_refused(counts: str) -> None:
    try:
        runs = rle_counts({"size": [5, 7], "counts": counts}, height=5, width=7)
    except ValueError:
        return
    assert sum(runs) == 35 and min(runs, default=0) >= 0


def test_polygons_are_measured_and_counted() -> None:
    polygons = [[0.0, 0.0, 4.0, 0.0, 4.0, 3.0], [10, 10, 12, 10, 12, 12, 10, 12]]
    assert segmentation_area(polygons) == 6 + 4
    assert segmentation_box(polygons).tolist() == [0, 0, 12, 12]  # type: ignore[union-attr]
    assert [polygon_points(polygon) for polygon in polygons] == [3, 4]
    for wrong in ([1, 2, 3], [1, float("nan")], [1, "2"], "1 2", [1, None], [1, 10**400], [True, False]):
        with pytest.raises(ValueError):
            polygon_points(wrong)
