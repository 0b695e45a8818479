"""Results that name their files and classes are scored by these, whatever ids they carry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cascade_rcnn.errors import DataError
from cascade_rcnn.score import score

BOX = {"cat_1.jpg": [10.0, 10, 40, 40], "dog_1.jpg": [60.0, 5, 30, 80], "dog_2.jpg": [0.0, 0, 20, 20]}
CLASS = {"cat_1.jpg": 2, "dog_1.jpg": 5, "dog_2.jpg": 5}
NAMES = {2: "cat", 5: "dog"}


def truth(path: Path, **changes: str) -> Path:
    """Ids in an order that the digits of the names do not have; ``changes``: new file names."""
    images = [
        {"id": number, "file_name": changes.get(name.partition(".")[0], name), "width": 100, "height": 100}
        for number, name in enumerate(("dog_2.jpg", "dog_1.jpg", "cat_1.jpg"), start=1)
    ]
    annotations = [
        {"id": n, "image_id": n, "category_id": CLASS[name], "bbox": BOX[name], "area": 1600, "iscrowd": 0}
        for n, name in enumerate(("dog_2.jpg", "dog_1.jpg", "cat_1.jpg"), start=1)
    ]
    categories = [{"id": number, "name": name} for number, name in NAMES.items()]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def results(path: Path, **changes: Any) -> Path:
    found = [
        {"file_name": name, "category": NAMES[CLASS[name]], "category_id": CLASS[name], "bbox": box, "score": 0.9}
        | changes
        for name, box in BOX.items()
    ]
    path.write_text(json.dumps(found))
    return path


def ap(tmp_path: Path, *, notes: list[str] | None = None, names: dict[str, str] | None = None, **changes: Any) -> Any:
    arguments = {
        "truth": truth(tmp_path / "t.json", **(names or {})),
        "results": results(tmp_path / "r.json", **changes),
    }
    return score(format="coco", notes=notes, **arguments)["bbox/AP"]


def test_file_names_count_not_ids(tmp_path: Path) -> None:
    notes: list[str] = []
    assert ap(tmp_path, notes=notes, image_id=1) == pytest.approx(1)
    assert "results matched by file_name: 3 of the 3 images of the truth have some" in notes[0]
    assert "2 of 3 results had another image_id" in notes[0]
    assert ap(tmp_path) == pytest.approx(1)  # no ids at all


def test_names_with_other_folders_fit(tmp_path: Path) -> None:
    names = {"dog_2": "images/val/dog_2.jpg", "dog_1": "images/val/dog_1.jpg", "cat_1": "images/val/cat_1.jpg"}
    assert ap(tmp_path, names=names) == pytest.approx(1)


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    notes: list[str] = []
    assert ap(tmp_path, notes=notes, category_id=1) == pytest.approx(1)
    assert "classes matched by name; 3 of 3 results had another category_id" in notes[1]
    with pytest.raises(DataError, match="category_id 1 is not in the ground truth"):
        ap(tmp_path, category="cow", category_id=1)


def test_ambiguity_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'dog_1\.jpg' fits 'a/dog_1\.jpg' and 'b/dog_1\.jpg'"):
        ap(tmp_path, names={"dog_2": "a/dog_1.jpg", "dog_1": "b/dog_1.jpg"})
    with pytest.raises(DataError, match=r"image 'cow\.jpg' is not in .*t\.json, whose first image is 'dog_2\.jpg'"):
        ap(tmp_path, file_name="cow.jpg")
    path = results(tmp_path / "r.json")
    found = json.loads(path.read_text())
    del found[1]["file_name"]
    path.write_text(json.dumps(found))
    with pytest.raises(DataError, match="1 of 3 results have no 'file_name'"):
        score(format="coco", truth=tmp_path / "t.json", results=path)
    found[1] |= {"file_name": "dog_1.jpg", "category": "cow"}
    path.write_text(json.dumps(found))
    with pytest.raises(DataError, match="class 'cow' is not in"):
        score(format="coco", truth=truth(tmp_path / "t.json"), results=path)


def test_where_the_truth_has_no_names_ids_count(tmp_path: Path) -> None:
    notes: list[str] = []
    names = {"dog_2": "same.jpg", "dog_1": "same.jpg"}
    assert ap(tmp_path, notes=notes, names=names, image_id=3) < 0.6
    assert "not every image has a file_name of its own, so image_id was used" in notes[0]


def test_polygons_of_results_are_scored_as_masks(tmp_path: Path) -> None:
    content = json.loads(truth(tmp_path / "t.json").read_text())
    for one in content["annotations"]:
        x, y, w, h = one["bbox"]
        one["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    (tmp_path / "t.json").write_text(json.dumps(content))
    found = json.loads(results(tmp_path / "r.json").read_text())
    for one in found:
        x, y, w, h = one["bbox"]
        one["segmentation"] = [
            [x, y, x + w / 2, y, x + w / 2, y + h, x, y + h],
            [x + w / 2, y, x + w, y, x + w, y + h, x + w / 2, y + h],
        ]
    (tmp_path / "r.json").write_text(json.dumps(found))
    metrics = score(format="coco", truth=tmp_path / "t.json", results=tmp_path / "r.json")
    assert metrics["segm/AP"] == pytest.approx(1)


def test_boxes_written_as_corners_are_refused(tmp_path: Path) -> None:
    truth(tmp_path / "truth.json")
    boxes = [[10 + n, 20, 40, 50 + n] for n in range(25)]  # x, y, width, height

    def write(corners: bool) -> Path:
        found = [
            {"image_id": 1, "category_id": 2, "score": 0.5, "bbox": [x, y, x + w, y + h] if corners else [x, y, w, h]}
            for x, y, w, h in boxes
        ]
        path = tmp_path / "found.json"
        path.write_text(json.dumps(found))
        return path

    score(format="coco", truth=tmp_path / "truth.json", results=write(corners=False))
    with pytest.raises(DataError, match=r"13 of 25 boxes leave their image .*: write x, y, width, height"):
        score(format="coco", truth=tmp_path / "truth.json", results=write(corners=True))
