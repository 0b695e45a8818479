"""Formats are recognised, and the same scene reads back equal from all of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import locations
import scenes
from cascade_rcnn.data.formats.open import describe, disjoint_splits, open_split, recognise, splits
from cascade_rcnn.data.formats.write import coco_dict
from cascade_rcnn.errors import DataError

CLASS = {"widerface": "face", "citypersons": "pedestrian"}


@pytest.mark.parametrize("name", scenes.WRITERS)
def test_same_scene_reads_back_equal_from_every_format(name: str, tmp_path: Path) -> None:
    root = scenes.WRITERS[name](tmp_path / "data")
    assert recognise(root) == name
    split = open_split(root, "train")
    assert split.format == name and split.name == "train" and split.problems == []
    assert split.class_names == (CLASS.get(name, "Pedestrian"),)
    first, second = split.records
    boxes = [scenes.OBJECT] if name == "yolo" else [scenes.OBJECT, scenes.IGNORED]
    np.testing.assert_allclose(first.boxes, boxes, atol=1e-9)
    assert first.labels.tolist() == [0] * len(boxes)
    assert first.ignore.tolist() == [False, True][: len(boxes)]
    np.testing.assert_allclose(first.areas, [400, 896][: len(boxes)])
    assert (first.height, first.width) == scenes.SIZES["a"] and (second.height, second.width) == scenes.SIZES["b"]
    assert second.boxes.shape == (0, 4) and second.labels.shape == second.ignore.shape == second.areas.shape == (0,)
    assert first.path.is_file() and second.path.is_file()
    assert all(len(values) == len(boxes) for values in first.attributes.values())


@pytest.mark.parametrize("name", scenes.WRITERS)
def test_description_counts_images_objects_and_classes(name: str, tmp_path: Path) -> None:
    text = describe(scenes.WRITERS[name](tmp_path))
    assert f"{name} format" in text and "train: 2 images, 1 object" in text and "1 class (" in text
    assert ("1 ignore region" in text) == (name != "yolo")


def test_unknown_folder_names_what_was_looked_for_and_what_is_there(tmp_path: Path) -> None:
    scenes.write_text(tmp_path / "stuff" / "notes.md", "hello")
    with pytest.raises(DataError, match=r"instances_\*\.json.*label_2.*data\.yaml.*stuff/ \(notes\.md\).*data\.md"):
        recognise(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        recognise(tmp_path / "nowhere")


def test_data_set_one_level_down_is_pointed_at(tmp_path: Path) -> None:
    scenes.write_kitti(tmp_path / "unpacked")
    with pytest.raises(DataError, match=r"unpacked is kitti: name that"):
        recognise(tmp_path)


def test_folder_per_class_is_refused_with_the_way_out(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        scenes.write_image(tmp_path / label / "a.png", "a")
    with pytest.raises(DataError, match=r"folder per class holds no boxes.*CVAT"):
        recognise(tmp_path)


def test_missing_split_is_an_error_that_offers_a_hold_out(tmp_path: Path) -> None:
    root = scenes.write_coco(tmp_path)
    with pytest.raises(
        DataError,
        match=r"no split 'val' \(there are: train\).*--data.train train:0-90 --data.val "
        r"train:90-100",
    ):
        open_split(root, "val")


def _many(root: Path, count: int) -> Path:
    content = scenes.coco_content()
    content["images"] = [{"id": n, "file_name": f"{n}.png", "height": 9, "width": 9} for n in range(count)]
    content["annotations"] = []
    return scenes.write_coco(root, content)


def test_held_out_parts_are_disjoint_complete_and_do_not_depend_on_the_order(tmp_path: Path) -> None:
    root = _many(tmp_path, 97)
    train, val = open_split(root, "train:0-90"), open_split(root, "train:90%-100%")
    ids = [record.image_id for record in train.records + val.records]
    assert len(train) == 87 and len(val) == 10 and sorted(ids) == list(range(97))
    assert train.truth is None  # the file speaks of all images
    path = root / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    content["images"].reverse()
    path.write_text(json.dumps(content))
    assert {record.image_id for record in open_split(root, "train:90-100").records} == {
        record.image_id for record in val.records
    }


@pytest.mark.parametrize("share", ["90", "50-20", "-1-5", "0-101", "a-b", "nan-50"])
def test_senseless_parts_are_refused(share: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not understood"):
        open_split(scenes.write_coco(tmp_path), f"train:{share}")


def test_splits_join_with_a_plus_and_ids_stay_unique(tmp_path: Path) -> None:
    scenes.write_coco(tmp_path)
    scenes.write_coco(tmp_path, split="val")
    both = open_split(tmp_path, "train+val")
    assert len(both) == 4 and len({record.image_id for record in both.records}) == 4
    content = scenes.coco_content()
    content["categories"][0]["name"] = "car"
    scenes.write_coco(tmp_path, content, split="val")
    with pytest.raises(DataError, match=r"different classes \(Pedestrian; car\)"):
        open_split(tmp_path, "train+val")


def test_trainval_is_not_counted_beside_train_and_val(tmp_path: Path) -> None:
    root = scenes.write_voc(tmp_path)
    for name in ("val", "trainval"):
        scenes.write_text(root / "ImageSets" / "Main" / f"{name}.txt", "b\n")
    assert set(splits(root)) == {"train", "val", "trainval"}
    assert set(disjoint_splits(root)) == {"train", "val"}


def test_readers_need_no_torch(tmp_path: Path) -> None:
    root = scenes.write_coco(tmp_path)
    code = (
        f"import sys; from cascade_rcnn.data.formats.open import describe; describe({str(root)!r}); "
        "from cascade_rcnn.check.dataset import check_dataset; "
        f"check_dataset({str(root)!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=locations.REPOSITORY, check=False).returncode == 0


def test_coco_dict_of_any_format_holds_the_same_scene(tmp_path: Path) -> None:
    for name, write in scenes.WRITERS.items():
        content = coco_dict(open_split(write(tmp_path / name), "train"))
        boxes = [entry["bbox"] for entry in content["annotations"] if not entry["iscrowd"]]
        np.testing.assert_allclose(boxes, [[10, 5, 20, 20]], atol=1e-9)
        assert len(content["images"]) == 2 and len({image["id"] for image in content["images"]}) == 2
