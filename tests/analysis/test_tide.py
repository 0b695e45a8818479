"""TIDE's numbers against its authors' own code."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from cascade_rcnn.analysis.scenes import read_found, read_truth
from cascade_rcnn.analysis.tide import CORRECT, KINDS, tide
from random_results import random_results

_SHORT = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")

# What tidecv 1.0.1 gave for random_results(0): AP, the six kinds, false positives, false negatives.
_GOLDEN = (38.7643061, 6.6656424, 15.7230914, 0.7349769, 3.5123131, 3.0377665, 9.1606677, 24.9320636, 21.8662996)


def _theirs(truth: dict[str, Any], results: list[dict[str, Any]]) -> tuple[list[float], dict[str, int]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their imports
        tidecv = pytest.importorskip("tidecv")
    ours = tidecv.Data("truth")
    for one in truth["categories"]:
        ours.add_class(one["id"], one["name"])
    for one in truth["images"]:
        ours.add_image(one["id"], one["file_name"])
    for one in truth["annotations"]:
        add = ours.add_ignore_region if one["iscrowd"] else ours.add_ground_truth
        add(one["image_id"], one["category_id"], one["bbox"])
    found = tidecv.Data("found")
    for one in results:
        found.add_detection(one["image_id"], one["category_id"], one["score"], one["bbox"])
    run = tidecv.TIDE().evaluate(ours, found)
    lost = {error.short_name: value for error, value in run.fix_main_errors().items()}
    special = {error.short_name: value for error, value in run.fix_special_errors().items()}
    counts = {error.short_name: number for error, number in run.count_errors().items()}
    values = [run.ap, *(lost[name] for name in _SHORT), special["FalsePos"], special["FalseNeg"]]
    return values, {kind: counts[name] for kind, name in zip(KINDS, _SHORT)}


def _ours(content: dict[str, Any], results: list[dict[str, Any]]) -> tuple[list[float], dict[str, int]]:
    truth = read_truth(content)
    one = tide(truth, read_found(results, truth))
    return [one.ap, *one.lost.values(), one.false_positives, one.false_negatives], one.counts


@pytest.fixture(autouse=True)
def _no_plots() -> Iterator[None]:
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.mark.parametrize("seed", range(4))
def test_equal_to_tidecv(seed: int) -> None:
    content, results = random_results(seed)
    values, counts = _ours(content, results)
    expected, numbers = _theirs(content, results)
    assert values == pytest.approx(expected, abs=1e-9)
    assert counts == numbers


def test_equal_to_what_tidecv_gave() -> None:
    values, _ = _ours(*random_results(0))
    assert values == pytest.approx(_GOLDEN, abs=1e-6)


def test_each_kind_by_hand() -> None:
    def box(x: float, y: float = 0.0) -> list[float]:
        return [x, y, 10.0, 10.0]

    places = [box(0), box(100), box(200), box(300), box(400)]
    content = {
        "images": [{"id": 1, "file_name": "a", "height": 500, "width": 500}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"id": k + 1, "image_id": 1, "category_id": 1, "bbox": one, "area": 100, "iscrowd": 0}
            for k, one in enumerate(places)
        ]
        + [{"id": 9, "image_id": 1, "category_id": 2, "bbox": box(0, 400), "area": 100, "iscrowd": 0}],
    }
    said = [
        (1, box(0), 0.9),  # correct
        (1, box(1), 0.8),  # doubled
        (2, box(100), 0.7),  # a dog where a cat is
        (1, box(205), 0.6),  # a third of overlap
        (2, box(305), 0.5),  # both wrong
        (1, box(0, 200), 0.4),  # nothing there
        (2, box(0, 400), 0.3),  # correct
    ]
    results = [{"image_id": 1, "category_id": c, "bbox": b, "score": s} for c, b, s in said]
    truth = read_truth(content)
    one = tide(truth, read_found(results, truth))
    names = ["correct" if kind == CORRECT else KINDS[kind] for kind in one.kinds.tolist()]
    assert names == ["correct", "duplicate", "classification", "localisation", "both", "background", "correct"]
    assert np.array_equal(one.missed, [3, 4])
