"""AP, its parts and its intervals, against the COCO evaluation itself."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from cascade_rcnn.analysis.matches import average_precisions, bootstrap, interval, match, mean_ap
from cascade_rcnn.analysis.scenes import read_found, read_truth
from cascade_rcnn.analysis.slices import slice_aps
from cascade_rcnn.errors import DataError
from cascade_rcnn.evaluation.coco import IOUS, evaluate_coco
from random_results import random_results


@pytest.mark.parametrize("seed", range(4))
def test_ap_equals_the_coco_evaluation(seed: int) -> None:
    content, results = random_results(seed)
    expected = evaluate_coco(content, results, iou_type="bbox")
    truth = read_truth(content)
    found = read_found(results, truth)
    values = average_precisions(truth, found, match(truth, found))
    assert mean_ap(values) == pytest.approx(expected["bbox/AP"], abs=1e-12)
    for column, iou in enumerate(IOUS):
        assert mean_ap(values[:, column]) == pytest.approx(expected[f"bbox/AP@{iou:.2f}"], abs=1e-12)
    for label, name in enumerate(truth.class_names):
        assert values[label].mean() == pytest.approx(expected[f"bbox/AP/{name}"], abs=1e-12)


def test_ap_by_size_equals_the_coco_evaluation() -> None:
    content, results = random_results(7, images=80)
    expected = evaluate_coco(content, results, iou_type="bbox")
    truth = read_truth(content)
    sizes = slice_aps(truth, read_found(results, truth))["size"]
    assert [one["AP"] for one in sizes.values()] == [
        pytest.approx(expected[f"bbox/{key}"], abs=1e-12) for key in ("APs", "APm", "APl")
    ]


def test_equal_scores_and_a_limit_of_detections() -> None:
    content, results = random_results(3)
    for one in results:
        one["score"] = round(one["score"], 1)
    expected = evaluate_coco(content, results, iou_type="bbox", max_detections=10)
    truth = read_truth(content)
    found = read_found(results, truth, limit=10)
    values = average_precisions(truth, found, match(truth, found))
    assert mean_ap(values) == pytest.approx(expected["bbox/AP"], abs=1e-12)


def test_a_resample_is_the_evaluation_of_the_drawn_images() -> None:
    content, results = random_results(5, images=12, crowds=False)
    truth = read_truth(content)
    found = read_found(results, truth)
    samples = bootstrap(truth, found, match(truth, found), resamples=3, seed=11)
    rng = np.random.default_rng(11)
    for row in samples:
        drawn, again, detections = rng.integers(0, 12, 12), copy.deepcopy(content), []
        again["images"], again["annotations"] = [], []
        for number, image in enumerate(drawn.tolist(), start=1):
            again["images"].append(content["images"][image] | {"id": number})
            again["annotations"] += [
                one | {"image_id": number} for one in content["annotations"] if one["image_id"] == image + 1
            ]
            detections += [one | {"image_id": number} for one in results if one["image_id"] == image + 1]
        expected = evaluate_coco(again, detections, iou_type="bbox")
        assert row == pytest.approx([expected[f"bbox/AP/{name}"] for name in truth.class_names], abs=1e-12)


def test_more_images_give_a_narrower_interval() -> None:
    widths = []
    for images in (20, 160):
        content, results = random_results(1, images=images)
        truth = read_truth(content)
        found = read_found(results, truth)
        low, high = interval(bootstrap(truth, found, match(truth, found), resamples=60)[:, 0], 0.5) or (0.0, 0.0)
        assert low < 0.5 < high
        widths.append(high - low)
    assert 0 < widths[1] < widths[0] / 1.5


def test_parts_leave_out_no_object() -> None:
    content, results = random_results(2, crowds=False)
    truth = read_truth(content)
    parts = slice_aps(truth, read_found(results, truth))
    assert set(parts) == {"size", "aspect", "crowding", "border"}
    for kind in ("aspect", "crowding", "border"):
        assert sum(int(one["objects"] or 0) for one in parts[kind].values()) == len(truth.label), kind


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda truth, results: results.clear(), "results: holds no detections"),
        (lambda truth, results: truth["annotations"].clear(), "ground truth: has no object that counts"),
        (lambda truth, results: truth.pop("annotations"), "ground truth: has no list of annotations"),
        (lambda truth, results: results[3].update(category_id=9), "detection 3: category_id 9 is not in the ground"),
        (lambda truth, results: results[0].update(image_id=999), "detection 0: image_id 999 is not in the ground"),
    ],
)
def test_bad_input_is_one_line(change: object, words: str) -> None:
    content, results = random_results(0)
    assert callable(change)
    change(content, results)
    with pytest.raises(DataError, match=words) as caught:
        read_found(results, read_truth(content))
    assert "\n" not in str(caught.value)
