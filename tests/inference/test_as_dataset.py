"""Predictions as a data set: our own readers and the rules of each tool's format give the same objects back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as coco_mask
from PIL import Image

from cascade_rcnn.data.formats.open import open_split, recognise
from cascade_rcnn.data.masks import decode_window, pack_segmentation
from cascade_rcnn.data.records import ImageRecord
from cascade_rcnn.errors import UserError
from cascade_rcnn.inference.as_dataset import DatasetWriter, dataset_writer
from cascade_rcnn.inference.detections import Detections

NAMES = ("cat", 'dog "big" & small')
SIZE = (60, 80)


def found(masks: bool, *, image_id: int | None = None) -> Detections:
    """A whole object, one with a hole, one of two parts, and one whose mask has no pixel."""
    boxes = torch.tensor([[5.0, 6, 25, 30], [30.5, 10, 60, 50], [2, 32, 28, 58], [65, 5, 75, 15]])
    probs = torch.zeros(4, 28, 28)
    probs[0] = 1
    probs[1] = 1
    probs[1, 9:19, 9:19] = 0
    probs[2, :, :10] = probs[2, 4:, 18:] = 1
    return Detections(
        boxes if masks else boxes[:3],
        torch.tensor([0.9, 0.8, 0.7, 0.6])[: 4 if masks else 3],
        torch.tensor([0, 1, 1, 0])[: 4 if masks else 3],
        SIZE,
        NAMES,
        mask_probs=probs if masks else None,
        category_ids=(7, 9),
        image_id=image_id,
    )


def write(format: str, folder: Path, *, masks: bool = True, copy: bool = False) -> DatasetWriter:
    """Two pictures with objects and one without, in folders, with names that differ in their ending alone."""
    photos = folder / "photos"
    (photos / "a b").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
    writer = dataset_writer(format, folder / "out", checkpoint="best.safetensors", copy=copy)
    writer.begin(NAMES, (7, 9))
    for name, detections in (
        ("a b/one.png", found(masks)),
        ("a b/one.jpg", found(masks)),
        ("empty.png", found(masks)[[]]),
    ):
        Image.fromarray(pixels).save(photos / name)
        writer.add(photos / name, name, pixels, detections)
    return writer


def pixels_of(record: ImageRecord) -> list[Any]:
    assert record.segmentations is not None
    masks = []
    for segmentation in record.segmentations:
        whole = np.zeros(SIZE, dtype=bool)
        window = decode_window(pack_segmentation(segmentation), SIZE)
        assert window is not None
        pixels, top, left = window
        whole[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
        masks.append(whole)
    return masks


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("format", ["coco", "yolo"])  # labelme: the shapes below
def test_our_own_reader_gives_the_objects_back(format: str, masks: bool, tmp_path: Path) -> None:
    line = write(format, tmp_path, masks=masks).finish()
    assert line.startswith("3 images, 6 objects") and "train finetune --data" in line
    assert ("objects without a pixel left out: 2" in line) is masks
    out = tmp_path / "out"
    assert recognise(out) == format
    split = open_split(out, "train")
    assert split.class_names == NAMES and not split.problems and len(split.records) == 3
    full = [record for record in split.records if len(record.boxes)]
    assert [len(record.boxes) for record in full] == [3, 3]
    expected = found(masks)
    wanted = expected.masks
    for record in full:
        assert record.labels.tolist() == [0, 1, 1] and record.path.exists()
        assert (record.height or SIZE[0], record.width or SIZE[1]) == SIZE
        if not masks:
            assert record.boxes == pytest.approx(expected.boxes.numpy(), abs=1e-4)
        else:
            assert wanted is not None
            rows, columns = wanted[1].any(dim=1).nonzero(), wanted[1].any(dim=0).nonzero()
            extent = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
            assert record.boxes[1] == pytest.approx(extent, abs=1e-4)
            assert all(np.array_equal(a, b) for a, b in zip(pixels_of(record), wanted.numpy()))
    assert [len(split_part.records) for split_part in (open_split(out, "train:0-50"), open_split(out, "train:50-100"))]


def test_coco_has_scores_ids_and_areas(tmp_path: Path) -> None:
    write("coco", tmp_path).finish()
    content = json.loads((tmp_path / "out" / "annotations" / "instances_train.json").read_text())
    assert content["categories"] == [{"id": 7, "name": NAMES[0]}, {"id": 9, "name": NAMES[1]}]
    assert [one["file_name"] for one in content["images"]] == ["a b/one.png", "a b/one-2.jpg", "empty.png"]
    assert [one["id"] for one in content["images"]] == [1, 2, 3]
    assert [one["id"] for one in content["annotations"]] == [1, 2, 3, 4, 5, 6]
    masks = found(True).masks
    assert masks is not None
    for one, mask, score in zip(content["annotations"], masks, (0.9, 0.8, 0.7)):
        assert one["score"] == pytest.approx(score) and one["area"] == int(mask.sum()) and one["iscrowd"] == 0
        rle = coco_mask.merge(coco_mask.frPyObjects(one["segmentation"], *SIZE))
        assert np.array_equal(coco_mask.decode(rle).astype(bool), mask.numpy())
    assert [len(one["segmentation"]) for one in content["annotations"][:3]] == [1, 1, 2]
    assert sorted(path.name for path in (tmp_path / "out" / "annotations").iterdir()) == ["instances_train.json"]


def test_the_users_ids_are_kept(tmp_path: Path) -> None:
    Image.new("RGB", (80, 60)).save(tmp_path / "x.png")
    writer = dataset_writer("coco", tmp_path / "out", checkpoint="c")
    writer.begin(NAMES, ())
    writer.add(tmp_path / "x.png", "x.png", np.zeros((*SIZE, 3), np.uint8), found(False, image_id=41))
    writer.finish()
    content = json.loads((tmp_path / "out" / "annotations" / "instances_train.json").read_text())
    assert content["images"][0]["id"] == content["annotations"][0]["image_id"] == 41
    assert [one["id"] for one in content["categories"]] == [1, 2]


def test_yolo_joins_parts_and_flattens_names(tmp_path: Path) -> None:
    line = write("yolo", tmp_path).finish()
    assert "without their endings: 1" in line and "without scores" in line
    labels = tmp_path / "out" / "labels" / "train"
    assert sorted(path.name for path in labels.iterdir()) == ["a b_one-2.txt", "a b_one.txt", "empty.txt"]
    assert (labels / "empty.txt").read_text() == ""
    lines = (labels / "a b_one.txt").read_text().splitlines()
    assert len(lines) == 3  # the object of two parts is one line
    values = np.array(lines[2].split()[1:], dtype=float)
    assert len(values) % 2 == 0 and values.min() >= 0 and values.max() <= 1


@pytest.mark.parametrize("masks", [True, False])
def test_labelme_shapes(masks: bool, tmp_path: Path) -> None:
    line = write("labelme", tmp_path, masks=masks).finish()
    assert "open it with: labelme" in line
    assert (tmp_path / "out" / "labels.txt").read_text().splitlines() == list(NAMES)
    folder = tmp_path / "out" / "a b"
    content = json.loads((folder / "one.json").read_text())
    assert (folder / content["imagePath"]).exists() and content["imageData"] is None
    assert (content["imageHeight"], content["imageWidth"]) == SIZE
    assert json.loads((tmp_path / "out" / "empty.json").read_text())["shapes"] == []
    shapes = content["shapes"]
    if not masks:
        assert [one["shape_type"] for one in shapes] == ["rectangle"] * 3
        assert shapes[0]["points"] == [[5, 6], [25, 30]]
        return
    assert [one["shape_type"] for one in shapes] == ["polygon"] * 4
    assert [one["group_id"] for one in shapes] == [None, None, 3, 3]
    assert [one["label"] for one in shapes] == ["cat", NAMES[1], NAMES[1], NAMES[1]]
    assert shapes[0]["score"] == pytest.approx(0.9) and shapes[0]["description"] == "score 0.900"
    masks_found = found(True).masks
    assert masks_found is not None
    for rows, mask in (([0], masks_found[0]), ([1], masks_found[1]), ([2, 3], masks_found[2])):
        flat = [np.array(shapes[row]["points"]).reshape(-1).tolist() for row in rows]
        drawn = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(flat, *SIZE)))
        assert np.array_equal(drawn.astype(bool), mask.numpy())


@pytest.mark.parametrize("masks", [True, False])
def test_label_studio_tasks(masks: bool, tmp_path: Path) -> None:
    line = write("label-studio", tmp_path, masks=masks).finish()
    out = tmp_path / "out"
    assert f"LOCAL_FILES_DOCUMENT_ROOT={out.resolve()}" in line
    tasks = json.loads((out / "tasks.json").read_text())
    assert len(tasks) == 3 and tasks[2]["predictions"][0]["result"] == []
    address = tasks[0]["data"]["image"]
    assert address == "/data/local-files/?d=images/a%20b/one.png"
    assert (out / unquote(address.partition("?d=")[2])).is_file()
    prediction = tasks[0]["predictions"][0]
    assert prediction["model_version"] == "best.safetensors" and prediction["score"] == pytest.approx(0.7)
    regions = prediction["result"]
    assert len({region["id"] for region in regions}) == len(regions) == (4 if masks else 3)
    value = regions[0]["value"]
    if masks:
        assert regions[0]["type"] == "polygonlabels" and value["polygonlabels"] == ["cat"]
        assert regions[2]["meta"] == {"text": ["part 1 of 2"]} and "meta" not in regions[0]
        points = np.array(value["points"]) * (0.8, 0.6)
        assert points.min(axis=0) == pytest.approx([5, 6]) and points.max(axis=0) == pytest.approx([25, 30])
    else:
        assert regions[0]["type"] == "rectanglelabels"
        assert [value[key] for key in ("x", "y", "width", "height")] == pytest.approx([6.25, 10, 25, 40])
    root = ElementTree.parse(out / "label_config.xml").getroot()
    tag = root.find("PolygonLabels" if masks else "RectangleLabels")
    assert tag is not None and [one.get("value") for one in tag] == list(NAMES)
    assert tag.get("name") == regions[0]["from_name"] and tag.get("toName") == regions[0]["to_name"] == "image"


@pytest.mark.parametrize("copy", [True, False])
def test_pictures_are_linked_or_copied(copy: bool, tmp_path: Path) -> None:
    write("coco", tmp_path, copy=copy).finish()
    source, placed = tmp_path / "photos" / "empty.png", tmp_path / "out" / "train" / "empty.png"
    assert placed.read_bytes() == source.read_bytes()
    assert placed.samefile(source) is not copy


@pytest.mark.parametrize(("suffix", "written"), [(".jpg", ".jpg"), (".webp", ".webp.png")])
def test_a_picture_with_an_orientation_is_written_upright(suffix: str, written: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = np.full((*SIZE, 3), 30, np.uint8)
    upright[:30, :40] = 220
    source = tmp_path / f"phone{suffix}"
    Image.fromarray(upright).rotate(90, expand=True).save(source, exif=exif)
    writer = dataset_writer("coco", tmp_path / "out", checkpoint="c")
    writer.begin(NAMES, (7, 9))
    writer.add(source, source.name, upright, found(False))
    assert "pictures with an orientation tag written anew, upright: 1" in writer.finish()
    with Image.open(tmp_path / "out" / "train" / f"phone{written}") as picture:
        assert picture.size == (80, 60) and picture.getexif().get(0x0112, 1) == 1
        assert np.abs(np.asarray(picture).astype(int) - upright).mean() < 3
    (record,) = open_split(tmp_path / "out", "train").records
    assert record.path.is_file() and len(record.boxes) == 3


def test_old_labels_are_never_mixed_with_new_ones(tmp_path: Path) -> None:
    write("yolo", tmp_path).finish()
    with pytest.raises(UserError, match="is there already, and old labels would stay"):
        dataset_writer("yolo", tmp_path / "out", checkpoint="c")
    with pytest.raises(UserError, match="data set format 'voc': choose one of coco, yolo, labelme, label-studio"):
        dataset_writer("voc", tmp_path / "new", checkpoint="c")
