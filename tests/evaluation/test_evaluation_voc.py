"""VOC average precision against the accepted port's numbers and against plain loops."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import locations
from cascade_rcnn.errors import DataError
from cascade_rcnn.evaluation.voc import ClassObjects, class_average_precision, evaluate_voc

CASES = locations.FIXTURES / "metrics" / "voc"
NAMES = (
    "edge_all_difficult",
    "edge_class_absent",
    "edge_iou_equals_threshold",
    "edge_no_detections",
    "edge_perfect",
    "edge_recall_on_grid",
    "edge_score_ties",
    "edge_top_is_difficult",
    "main",
)


def _unpack(case: str, folder: Path) -> dict[str, Any]:
    with tarfile.open(CASES / case / "data.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    expected: dict[str, Any] = json.loads((CASES / case / "expected.json").read_text())
    return expected


@pytest.mark.parametrize("case", NAMES)
def test_equals_the_accepted_port(case: str, tmp_path: Path) -> None:
    expected = _unpack(case, tmp_path)["results"]
    for iou in (0.5, 0.7):
        metrics = evaluate_voc(tmp_path, tmp_path / "results", iou=iou)
        for rule, suffix in (("07", "07"), ("area", "")):
            numbers = expected[f"iou{iou}_{rule}"]
            ours = {name: metrics[f"voc/AP{suffix}/{name}"] for name in numbers["ap"]}
            ours["mean"] = metrics[f"voc/mAP{suffix}"]
            for name, value in {**numbers["ap"], "mean": numbers["mAP"]}.items():
                assert ours[name] == (None if value == "NaN" else pytest.approx(value, abs=1e-9)), (iou, rule, name)
        assert len(metrics) == 2 + 2 * 20


def test_reasons_name_the_classes_and_the_mean_of_the_rest(tmp_path: Path) -> None:
    expected = _unpack("edge_class_absent", tmp_path)["results"]["iou0.5_area"]
    notes: list[str] = []
    assert evaluate_voc(tmp_path, tmp_path / "results", notes=notes)["voc/mAP"] is None
    text = "\n".join(notes)
    assert "cow, person" in text and f"{expected['mAP_ignoring_nan']:.4f}" in text


def test_a_missing_file_leaves_its_class_undefined(tmp_path: Path) -> None:
    _unpack("edge_perfect", tmp_path)
    (tmp_path / "results" / "comp4_det_test_dog.txt").unlink()
    notes: list[str] = []
    metrics = evaluate_voc(tmp_path, tmp_path / "results", notes=notes)
    assert metrics["voc/AP/dog"] is metrics["voc/AP07/dog"] is metrics["voc/mAP"] is metrics["voc/mAP07"] is None
    assert metrics["voc/AP/person"] == 1.0
    assert "dog" in notes[0] and "empty file" in notes[0]


def _naive(objects: ClassObjects, detections: ClassObjects, iou: float) -> float:
    """Area AP by the definition, one detection after the other."""
    assert objects.difficult is not None and detections.scores is not None
    order = sorted(range(len(detections.images)), key=lambda d: -detections.scores[d])  # type: ignore[index]
    taken, curve, true, false = set(), [], 0, 0
    total = int((~objects.difficult).sum())
    for d in order:
        best, best_g = -1.0, -1
        for g in range(len(objects.images)):
            if objects.images[g] != detections.images[d]:
                continue
            a, b = detections.boxes[d], objects.boxes[g]
            w = max(min(a[2], b[2]) - max(a[0], b[0]) + 1, 0)
            h = max(min(a[3], b[3]) - max(a[1], b[1]) + 1, 0)
            union = (a[2] - a[0] + 1) * (a[3] - a[1] + 1) + (b[2] - b[0] + 1) * (b[3] - b[1] + 1) - w * h
            if w * h / union > best:
                best, best_g = w * h / union, g
        if best > iou and objects.difficult[best_g]:
            pass
        elif best > iou and best_g not in taken:
            taken.add(best_g)
            true += 1
        else:
            false += 1
        curve.append((true / total, true / max(true + false, 1)))
    area, before = 0.0, 0.0
    for k, (recall, _) in enumerate(curve):
        area += (recall - before) * max(p for _, p in curve[k:])
        before = recall
    return area


@pytest.mark.parametrize("seed", range(5))
def test_equals_plain_loops_on_crowded_boxes_with_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)

    def boxes(n: int) -> Any:
        corner = rng.integers(1, 30, (n, 2))
        return np.c_[corner, corner + rng.integers(0, 12, (n, 2))].astype(np.float64)

    objects = ClassObjects(rng.integers(0, 8, 60), boxes(60), difficult=rng.random(60) < 0.3)
    detections = ClassObjects(rng.integers(0, 8, 300), boxes(300), scores=rng.integers(0, 20, 300) / 20)
    assert class_average_precision(objects, detections, 0.3)[1] == pytest.approx(_naive(objects, detections, 0.3))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("results/comp4_det_test_dog.txt", "000037 0.5 1 2 3\n", "line 1 has 5 columns"),
        ("results/comp4_det_test_dog.txt", "000037 0.5 1 2 3 nan\n", "line 1: 'nan' is not a finite number"),
        ("results/comp4_det_test_dog.txt", "\n999999 0.5 1 2 3 4\n", "'999999' is not in the image set"),
        ("results/comp4_det_test_unicorn.txt", "", "class 'unicorn' is in no annotation"),
        ("results/comp4_det_test_dog.txt", b"\xff\xfe1", "not UTF-8"),
        ("ImageSets/Main/test.txt", "000037\n000037\n", "listed twice"),
        ("ImageSets/Main/test.txt", "123456\n", "has no"),
        ("Annotations/000037.xml", "<annotation>", "not usable XML"),
        ("Annotations/000037.xml", "<!DOCTYPE a [<!ENTITY b 'c'>]><annotation/>", "document type"),
        ("Annotations/000037.xml", "<a><object><name>dog</name></object></a>", "no readable bndbox"),
    ],
)
def test_bad_input_is_named(file: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    _unpack("edge_perfect", tmp_path)
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        evaluate_voc(tmp_path, tmp_path / "results")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert Path(file).name in str(caught.value)


def test_wrong_folders_and_splits_say_what_belongs_there(tmp_path: Path) -> None:
    _unpack("edge_perfect", tmp_path)
    with pytest.raises(DataError, match="choose --split among test"):
        evaluate_voc(tmp_path, tmp_path / "results", split="val")
    with pytest.raises(DataError, match=r"no comp4_det_test_CLASS\.txt"):
        evaluate_voc(tmp_path, tmp_path / "Annotations")
    with pytest.raises(DataError, match="does not exist"):
        evaluate_voc(tmp_path / "nowhere", tmp_path / "results")
