"""Predictions in each benchmark's own format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cascade_rcnn.evaluation.submission import submit_predictions

NAMES = ("event/000007.png", "event/000009.png")


@pytest.fixture
def predictions(tmp_path: Path) -> Path:
    path = tmp_path / "predictions.json"
    path.write_text(
        json.dumps(
            [
                {
                    "file_name": NAMES[0],
                    "label": 0,
                    "category": "Car",
                    "category_id": 1,
                    "bbox": [10.0, 20.0, 30.0, 40.0],
                    "score": 0.75,
                }
            ]
        )
    )
    return path


@pytest.mark.parametrize(
    ("format", "file", "wanted"),
    [
        ("kitti", "results/data/000007.txt", "10"),
        ("voc", "results/comp4_det_test_Car.txt", "000007 0.75"),
        ("widerface", "event/000007.txt", "0.75"),
        ("coco", "", '"image_id": 7'),
        ("citypersons", "", '"image_id": 1'),
    ],
)
def test_predictions_are_written_as_the_benchmark_reads_them(
    format: str, file: str, wanted: str, predictions: Path, tmp_path: Path
) -> None:
    written = submit_predictions(format, predictions, NAMES, (["Car"], [1]), out=tmp_path / "out")
    texts = {str(p): p.read_text() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert written.exists()
    assert any(wanted in text and Path(file).name in name for name, text in texts.items()), texts


def test_an_image_without_detections_has_its_empty_file(predictions: Path, tmp_path: Path) -> None:
    submit_predictions("kitti", predictions, NAMES, (["Car"], [1]), out=tmp_path / "out")
    (empty,) = (tmp_path / "out").rglob("000009.txt")
    assert empty.read_text() == ""
