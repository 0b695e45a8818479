"""Pairs of objects in the same image, against loops."""

from __future__ import annotations

import numpy as np
import pytest

from cascade_rcnn.evaluation.pairwise import best_of_each, ious, pair_up


@pytest.mark.parametrize("limit", [1, 7, 40, 10**6])
def test_pairs_are_complete_ordered_and_bounded(limit: int) -> None:
    rng = np.random.default_rng(0)
    left, right = rng.integers(0, 9, 50), rng.integers(0, 9, 30)
    chunks = list(pair_up(left, right, limit=limit))
    found = [(int(i), int(j)) for one, other in chunks for i, j in zip(one, other)]
    assert found == [(i, j) for i in range(50) for j in range(30) if left[i] == right[j]]
    most = int(np.bincount(right).max())
    assert all(len(one) <= max(limit, most) for one, _ in chunks)
    assert len({i for one, _ in chunks for i in set(one.tolist())}) == sum(len(set(one.tolist())) for one, _ in chunks)


def test_nothing_pairs_with_nothing() -> None:
    none = np.zeros(0, np.int64)
    assert list(pair_up(none, np.arange(3))) == []
    assert [len(i) for i, _ in pair_up(np.arange(3), none)] == [0]
    assert best_of_each(none, np.zeros(0)).tolist() == []


def test_the_first_of_equal_values_is_best() -> None:
    keys = np.array([0, 0, 0, 4, 4, 7])
    values = np.array([0.2, 0.9, 0.9, 0.0, 0.0, -1.0])
    assert best_of_each(keys, values).tolist() == [1, 3, 5]


def test_empty_boxes_overlap_nothing() -> None:
    boxes = np.array([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 2.0, 2.0]])
    assert ious(boxes, boxes).tolist() == [0.0, 1.0]
    assert ious(boxes, boxes, plus=1.0).tolist() == [1.0, 1.0]
