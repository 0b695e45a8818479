"""COCO AP and AR against pycocotools' numbers, and what is built on top of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import locations
from cascade_rcnn.data.records import DataSplit, ImageRecord
from cascade_rcnn.errors import DataError
from cascade_rcnn.evaluation.coco import IOUS, coco_table, coco_truth, evaluate_coco, evaluate_coco_files

CASES = locations.FIXTURES / "metrics" / "coco"
LOCAL = ("edge_all_crowd", "edge_area_limits_and_ties", "edge_class_absent", "edge_no_detections", "edge_perfect")
TOLERANCE = 1e-9


def _check_all(truth: Path, results: Path, expected: dict[str, Any], iou_type: Any) -> None:
    stats = expected["stats"] or expected["stats_with_an_empty_result_object_built_by_hand"]
    metrics = evaluate_coco(truth, results, iou_type=iou_type)
    for name, value in stats.items():
        wanted = None if value == -1 else pytest.approx(value, abs=TOLERANCE)
        assert metrics[f"{iou_type}/{name}"] == wanted, name
    table = coco_table(truth, results, iou_type=iou_type)
    for numbers in expected.get("per_class", {}).values():
        name = numbers["name"]
        ours = {
            "AP": metrics[f"{iou_type}/AP/{name}"],
            "AP50": table.average_precision(iou=0.5, name=name),
            "AP75": table.average_precision(iou=0.75, name=name),
            "AR100": table.average_recall(limit=100, name=name),
        }
        for key, value in ours.items():
            assert value == (None if numbers[key] is None else pytest.approx(numbers[key], abs=TOLERANCE)), (name, key)


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("case", LOCAL)
def test_equals_pycocotools_on_edge_cases(case: str, iou_type: str) -> None:
    folder = CASES / case
    expected = json.loads((folder / "expected.json").read_text())[iou_type]
    _check_all(folder / "gt.json", folder / f"{iou_type}_results.json", expected, iou_type)


def test_keys_are_the_promised_ones() -> None:
    folder = CASES / "edge_area_limits_and_ties"
    metrics = evaluate_coco_files(folder / "gt.json", folder / "bbox_results.json")
    plain = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
    by_iou = [f"AP@{iou:.2f}" for iou in IOUS]
    assert set(metrics) == {f"bbox/{name}" for name in [*plain, *by_iou, "AP/a", "AP/b", "AP/never"]}
    assert metrics["bbox/AP@0.50"] == metrics["bbox/AP50"]
    assert metrics["bbox/AP@0.75"] == metrics["bbox/AP75"]
    assert metrics["bbox/AP"] == pytest.approx(np.mean([metrics[f"bbox/{name}"] for name in by_iou]), abs=1e-12)


def test_undefined_values_come_with_a_reason() -> None:
    folder = CASES / "edge_all_crowd"
    notes: list[str] = []
    metrics = evaluate_coco(folder / "gt.json", folder / "bbox_results.json", iou_type="bbox", notes=notes)
    assert set(metrics.values()) == {None}
    assert any("crowds" in note and "airplane" in note for note in notes)
    assert any("no object that counts" in note for note in notes)


def test_a_size_without_objects_is_named() -> None:
    truth, results = _scene(3)
    notes: list[str] = []
    metrics = evaluate_coco(truth, results, iou_type="bbox", notes=notes)
    assert metrics["bbox/APl"] is metrics["bbox/ARm"] is None and metrics["bbox/APs"] == pytest.approx(1)
    assert notes == ["bbox: no object of this size in the ground truth: APl, APm, ARl, ARm undefined"]


def _scene(objects: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    boxes = [[10.0 * (g % 40), 10.0 * (g // 40), 8.0, 8.0] for g in range(objects)]
    truth = {
        "images": [{"id": "street/1", "height": 400, "width": 400}],
        "categories": [{"id": 7, "name": "bean"}],
        "annotations": [
            {"id": g, "image_id": "street/1", "category_id": 7, "bbox": box, "area": 64.0, "iscrowd": 0}
            for g, box in enumerate(boxes)
        ],
    }
    results = [
        {"image_id": "street/1", "category_id": 7, "bbox": box, "score": 1 - g / 1000} for g, box in enumerate(boxes)
    ]
    return truth, results


def test_dense_scenes_need_more_detections_than_a_hundred() -> None:
    truth, results = _scene(150)
    usual = evaluate_coco(truth, results, iou_type="bbox")
    dense = evaluate_coco(truth, results, iou_type="bbox", max_detections=200)
    assert usual["bbox/AR100"] == dense["bbox/AR100"] == pytest.approx(100 / 150)
    assert usual["bbox/AP"] is not None and usual["bbox/AP"] < 0.7
    assert dense["bbox/AP"] == pytest.approx(1)
    assert dense["bbox/AR200"] == pytest.approx(1)
    few = evaluate_coco(truth, results, iou_type="bbox", max_detections=50)
    assert few["bbox/AR50"] == pytest.approx(50 / 150)
    assert few["bbox/AP"] is not None and few["bbox/AP"] < 0.4


def test_annotation_with_id_zero_and_word_ids_count() -> None:
    truth, results = _scene(3)
    assert evaluate_coco(truth, results, iou_type="bbox")["bbox/AP"] == pytest.approx(1)


def test_inputs_stay_as_they_were() -> None:
    truth, results = _scene(5)
    before = copy.deepcopy((truth, results))
    evaluate_coco(truth, results, iou_type="bbox", class_names=["runner bean"])
    assert (truth, results) == before


def test_empty_results_score_zero_and_class_names_can_be_given() -> None:
    truth, _ = _scene(5)
    metrics = evaluate_coco(truth, [], iou_type="bbox", class_names=["runner bean"])
    assert metrics["bbox/AP"] == metrics["bbox/AR100"] == metrics["bbox/AP/runner bean"] == 0.0


def test_results_with_box_and_mask_give_both_and_take_the_masks_area() -> None:
    folder = CASES / "edge_class_absent"
    boxes = json.loads((folder / "bbox_results.json").read_text())
    masks = json.loads((folder / "segm_results.json").read_text())
    both = [box | {"segmentation": mask["segmentation"]} for box, mask in zip(boxes, masks, strict=True)]
    truth = json.loads((folder / "gt.json").read_text())
    expected = json.loads((folder / "expected.json").read_text())
    assert all(box["image_id"] == mask["image_id"] for box, mask in zip(boxes, masks))
    for iou_type in ("bbox", "segm"):
        metrics = evaluate_coco(truth, both, iou_type=iou_type)
        assert metrics[f"{iou_type}/APs"] == pytest.approx(expected[iou_type]["stats"]["APs"], abs=TOLERANCE)
        assert metrics[f"{iou_type}/AP"] == pytest.approx(expected[iou_type]["stats"]["AP"], abs=TOLERANCE)


def test_uncompressed_masks_count_like_compressed_ones() -> None:
    mask = {"size": [4, 5], "counts": [5, 2, 2, 2, 9]}  # two columns of two pixels
    truth = {
        "images": [{"id": 1, "height": 4, "width": 5}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            {
                "id": 1,
                "image_id": 1,
                "category_id": 1,
                "bbox": [1, 1, 2, 2],
                "area": 4,
                "iscrowd": 0,
                "segmentation": [[1, 1, 3, 1, 3, 3, 1, 3]],
            }
        ],
    }
    results = [{"image_id": 1, "category_id": 1, "score": 0.5, "segmentation": mask}]
    assert evaluate_coco(truth, results, iou_type="segm")["segm/AP"] == pytest.approx(1)


@pytest.mark.parametrize("counts", ["garbage~~~", "", "PPPPPP", "ooooooooooo", [1, 2, 3], [-5, 25], None, 7])
def test_masks_that_would_hang_the_library_are_refused(counts: Any) -> None:
    truth = {
        "images": [{"id": 1, "height": 4, "width": 5}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            {
                "id": 1,
                "image_id": 1,
                "category_id": 1,
                "bbox": [1, 1, 2, 2],
                "area": 4,
                "segmentation": [[1, 1, 3, 1, 3, 3]],
            }
        ],
    }
    results = [{"image_id": 1, "category_id": 1, "score": 0.5, "segmentation": {"size": [4, 5], "counts": counts}}]
    with pytest.raises(DataError, match="detection 0"):
        evaluate_coco(truth, results, iou_type="segm")


def _split() -> DataSplit:
    def record(name: str, boxes: list[list[float]], ignore: list[bool], **attributes: Any) -> ImageRecord:
        table = np.array(boxes, np.float64).reshape(-1, 4)
        areas = (table[:, 2] - table[:, 0]) * (table[:, 3] - table[:, 1])
        return ImageRecord(
            Path(name),
            name,
            name,
            100,
            100,
            table,
            np.zeros(len(table), np.int64),
            np.array(ignore, np.bool_),
            areas,
            attributes=attributes,
        )

    records = [
        record("a.jpg", [[10, 10, 30, 40], [50, 50, 90, 90]], [False, True]),
        record("b.jpg", [[0, 0, 20, 20], [40, 40, 60, 60]], [False, True], iscrowd=np.array([0, 0])),
        record("c.jpg", [], []),
    ]
    return DataSplit("voc", "test", Path(), records, ("cat",), (3,))


def test_truth_from_records_keeps_ids_boxes_and_ignored_objects() -> None:
    truth = coco_truth(_split())
    assert [image["id"] for image in truth["images"]] == ["a.jpg", "b.jpg", "c.jpg"]
    assert truth["annotations"][0]["bbox"] == [10, 10, 20, 30]
    assert [one["iscrowd"] for one in truth["annotations"]] == [0, 1, 0, 0]  # the attribute wins over the flag
    assert truth["categories"] == [{"id": 3, "name": "cat"}]
    results = [
        {"image_id": one["image_id"], "category_id": 3, "bbox": one["bbox"], "score": 0.9}
        for one in truth["annotations"]
        if not one["iscrowd"]
    ]
    assert evaluate_coco(truth, results, iou_type="bbox")["bbox/AP"] == pytest.approx(1)
    inside_crowd = [{"image_id": "a.jpg", "category_id": 3, "bbox": [55.0, 55.0, 10.0, 10.0], "score": 0.99}]
    assert evaluate_coco(truth, results + inside_crowd, iou_type="bbox")["bbox/AP"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": "street/2"}, "image_id 'street/2' is not in the ground truth"),
        ({"category_id": 8}, "category_id 8 is not in the ground truth, which has 7"),
        ({"category_id": [1]}, "category_id"),
        ({"bbox": [1, 2, 3]}, "not four finite numbers"),
        ({"bbox": [1, 2, 3, float("nan")]}, "not four finite numbers"),
        ({"bbox": [1, 2, -3, 4]}, "negative width"),
        ({"score": float("inf")}, "score inf"),
        ({"score": "high"}, "score 'high'"),
    ],
)
def test_bad_detections_are_named(change: dict[str, Any], message: str) -> None:
    truth, results = _scene(2)
    results[1] |= change
    with pytest.raises(DataError, match="detection 1") as caught:
        evaluate_coco(truth, results, iou_type="bbox")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("images", None),
        ("annotations", {}),
        ("categories", [{}]),
        ("annotations", [3]),
        ("annotations", [{"image_id": 5, "category_id": 7}]),
        ("images", [{"id": []}]),
    ],
)
def test_bad_ground_truth_is_named(key: str, value: Any) -> None:
    truth, results = _scene(2)
    with pytest.raises(DataError, match="ground truth"):
        evaluate_coco(truth | {key: value}, results, iou_type="bbox")
