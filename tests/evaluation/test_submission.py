"""Predictions in each benchmark's own format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cascade_rcnn.errors import DataError
from cascade_rcnn.evaluation.submission import submission_ids, submit_predictions

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
        ("coco", "", '"image_id": 70'),
        ("citypersons", "", '"image_id": 70'),
    ],
)
def test_predictions_are_written_as_the_benchmark_reads_them(
    format: str, file: str, wanted: str, predictions: Path, tmp_path: Path
) -> None:
    ids = {NAMES[0]: 70, NAMES[1]: 90} if format in ("coco", "citypersons") else None
    written = submit_predictions(format, predictions, NAMES, (["Car"], [1]), out=tmp_path / "out", ids=ids)
    texts = {str(p): p.read_text() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert written.exists()
    assert any(wanted in text and Path(file).name in name for name, text in texts.items()), texts


def test_an_image_without_detections_has_its_empty_file(predictions: Path, tmp_path: Path) -> None:
    submit_predictions("kitti", predictions, NAMES, (["Car"], [1]), out=tmp_path / "out")
    (empty,) = (tmp_path / "out").rglob("000009.txt")
    assert empty.read_text() == ""


def test_cocos_own_names_hold_their_id() -> None:
    names = ("000000397133.jpg", "test2017/000000000001.jpg", "COCO_val2014_000000000042.jpg")
    assert list(submission_ids("coco", names).values()) == [397133, 1, 42]


@pytest.mark.parametrize("names", [("cat_1.jpg", "dog_1.jpg"), ("1.jpg",), ("000000000001.jpg", "7.jpg")])
def test_ids_are_never_made_up(names: tuple[str, ...], tmp_path: Path, predictions: Path) -> None:
    for format in ("coco", "citypersons"):
        with pytest.raises(DataError, match=r"has no image id .* add --images-from") as caught:
            submit_predictions(format, predictions, names, (["Car"], [1]), out=tmp_path / "out")
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_two_images_never_share_an_id() -> None:
    with pytest.raises(DataError, match=r"'a/000000000001.jpg' and 'b/000000000001.jpg' would both be image 1"):
        submission_ids("coco", ("a/000000000001.jpg", "b/000000000001.jpg"))


def test_ids_come_from_the_list_of_images() -> None:
    listed = {"cat_1.jpg": 8, "a/1.jpg": 9, "b/1.jpg": 10}
    ids = submission_ids("coco", ("photos/cat_1.jpg", "a/1.jpg", "x/b/1.jpg"), listed, where="list.json")
    assert ids == {"photos/cat_1.jpg": 8, "a/1.jpg": 9, "x/b/1.jpg": 10}
    for names, words in (
        (("cow.jpg",), r"'cow.jpg' \(1 of 1\) is not among the images of list.json"),
        (("1.jpg",), "'1.jpg' fits 'a/1.jpg' and 'b/1.jpg'"),
        (("cat_1.jpg", "z/cat_1.jpg"), "both fit its image 'cat_1.jpg'"),
    ):
        with pytest.raises(DataError, match=words):
            submission_ids("coco", names, listed, where="list.json")
