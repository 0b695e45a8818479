"""Pasted objects: pixels, boxes and masks of both images agree."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cascade_rcnn.config import DataConfig
from cascade_rcnn.data.copy_paste import paste_objects
from cascade_rcnn.data.dataset import DetectionDataset, SampleKey
from cascade_rcnn.data.item import Item
from cascade_rcnn.data.loader import train_loader
from cascade_rcnn.data.records import DataSplit, ImageRecord
from cascade_rcnn.errors import DataError

Box = tuple[int, int, int, int]


def _item(size: tuple[int, int], boxes: list[Box], *, value: int, ignored: tuple[int, ...] = ()) -> Item:
    """Blocks of one grey value each: ``value`` + their row, on black."""
    image, masks = torch.zeros(3, *size, dtype=torch.uint8), []
    for row, (x1, y1, x2, y2) in enumerate(boxes):
        image[:, y1:y2, x1:x2] = value + row
        masks.append(None if row in ignored else (np.ones((y2 - y1, x2 - x1), np.uint8), y1, x1))
    ignore = np.isin(np.arange(len(boxes)), ignored)
    labels = value + np.arange(len(boxes))
    return Item(image, size, 1, "one.png", np.array(boxes, np.float32).reshape(-1, 4), labels, ignore, masks)


def _check(item: Item) -> None:
    """Every mask covers exactly the pixels of its object's value, and its box is the mask's extent."""
    assert item.masks is not None and len(item.masks) == len(item.boxes) == len(item.labels) == len(item.ignore)
    for mask, box, label, ignore in zip(item.masks, item.boxes, item.labels, item.ignore):
        if ignore:
            continue
        assert mask is not None
        drawn = np.zeros(item.image.shape[1:], bool)
        pixels, top, left = mask
        drawn[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
        np.testing.assert_array_equal(drawn, (item.image[0] == int(label)).numpy())
        assert box.tolist() == [left, top, left + pixels.shape[1], top + pixels.shape[0]]


@pytest.mark.parametrize("size", [(30, 40), (60, 50), (24, 80)], ids=["smaller", "larger", "both"])
def test_pixels_masks_and_boxes_agree_after_pasting(size: tuple[int, int]) -> None:
    counts, places = set(), set()
    for seed in range(150):
        item = _item((40, 60), [(2, 2, 20, 30), (30, 5, 34, 9), (40, 20, 60, 40)], value=10)
        donor = _item(size, [(3, 4, 12, 20), (20, 2, 39, 22)], value=200)
        pasted = paste_objects(item, donor, np.random.default_rng(seed))
        _check(pasted)
        _check(item)  # is left as it was
        assert pasted.image.shape == item.image.shape and pasted.boxes.dtype == np.float32
        counts.add(int((pasted.labels >= 200).sum()))
        places |= {tuple(box) for box, label in zip(pasted.boxes.tolist(), pasted.labels) if label == 200}
    assert {1, 2} <= counts and len(places) > 5


def test_what_is_hidden_is_not_learnt_and_what_is_seen_keeps_its_annotated_sides() -> None:
    item = _item((20, 40), [(0, 0, 10, 10), (5, 0, 30, 20)], value=10)
    item.boxes[1] = [4.5, 0, 30.25, 20]  # as annotated; its mask begins at 5
    donor = _item((20, 40), [(0, 0, 20, 20)], value=200)
    pasted = paste_objects(item, donor, np.random.default_rng(0))
    assert pasted.labels.tolist() == [11, 200]
    assert pasted.boxes.tolist() == [[20, 0, 30.25, 20], [0, 0, 20, 20]]
    donor = _item((20, 40), [(0, 0, 9, 9)], value=200)  # 19 % of the first object stay
    assert paste_objects(item, donor, np.random.default_rng(0)).labels.tolist() == [10, 11, 200]
    donor = _item((20, 40), [(0, 0, 10, 10)], value=200)
    assert paste_objects(item, donor, np.random.default_rng(0)).labels.tolist() == [11, 200]


def test_regions_to_ignore_stay_and_are_not_pasted() -> None:
    item = _item((20, 40), [(0, 0, 10, 10)], value=10, ignored=(0,))
    donor = _item((20, 40), [(0, 0, 15, 15), (20, 5, 30, 15)], value=200, ignored=(0,))
    assert donor.masks is not None
    donor.masks[0] = (np.ones((15, 15), np.uint8), 0, 0)
    for seed in range(10):
        pasted = paste_objects(item, donor, np.random.default_rng(seed))
        assert pasted.labels.tolist() == [10, 201] and pasted.ignore.tolist() == [True, False]
        assert pasted.boxes[0].tolist() == [0, 0, 10, 10]
    nothing = _item((20, 40), [(0, 0, 15, 15)], value=200, ignored=(0,))
    assert paste_objects(item, nothing, np.random.default_rng(0)) is item


def _split(folder: Path, *, masks: bool = True) -> DataSplit:
    records = []
    for index in range(6):
        pixels = np.zeros((48, 64, 3), np.uint8)
        box = np.array([[4.0 + 6 * index, 8, 24 + 6 * index, 30]])
        pixels[8:30, int(box[0, 0]) : int(box[0, 2])] = 255
        path = folder / f"{index}.png"
        Image.fromarray(pixels).save(path)
        x1, y1, x2, y2 = box[0].tolist()
        polygons = [[[x1, y1, x2, y1, x2, y2, x1, y2]]] if masks else None
        one = np.ones(1)
        records.append(
            ImageRecord(path, path.name, index, 48, 64, box, one.astype(int) - 1, one < 0, one * 440, polygons)  # type: ignore[arg-type]
        )
    return DataSplit("coco", "train", folder, records, ("block",), (1,), has_masks=masks)


CONFIG = DataConfig(short_side=(48,), long_side=64, large_scale_jitter=(0.5, 2.0), copy_paste=1.0, workers=0)


def test_batches_with_pasted_objects_are_repeatable_whoever_loads_them(tmp_path: Path) -> None:
    dataset = DetectionDataset(_split(tmp_path), CONFIG, training=True, masks=True)
    alone, workers = train_loader(dataset, batch_size=2, seed=1), train_loader(dataset, batch_size=2, seed=1, workers=2)
    for loader in (alone, workers):
        loader.set_epoch(3, start_step=1)
    for (images, targets), (again, same) in zip(alone, workers, strict=True):
        assert torch.equal(images.pixels, again.pixels) and torch.equal(targets.boxes, same.boxes)
        assert targets.masks is not None and same.masks is not None
        assert torch.equal(targets.masks.pixels, same.masks.pixels)
        assert images.pixels.shape[-2:] == (64, 64) and targets.valid.sum() >= 2
    workers.close()


def test_a_box_recipe_gets_pasted_boxes_and_no_masks(tmp_path: Path) -> None:
    """The block of each image is white, so that its box shows how much of it is seen."""
    dataset = DetectionDataset(_split(tmp_path), CONFIG, training=True)
    plain = DetectionDataset(_split(tmp_path), dataclasses.replace(CONFIG, copy_paste=0), training=True)
    more = 0
    for seed in range(30):
        key = SampleKey(seed % 6, (seed,))
        item = dataset[key]
        assert item.masks is None
        seen = torch.zeros(item.image.shape[1:], dtype=torch.bool)
        for x1, y1, x2, y2 in np.round(item.boxes).astype(int).tolist():
            seen[max(y1 - 2, 0) : y2 + 2, max(x1 - 2, 0) : x2 + 2] = True
        assert not (item.image[0] > 127)[~seen].any()
        more += len(item.boxes) > len(plain[key].boxes)
    assert more > 10


def test_an_unreadable_donor_is_named_and_nothing_is_pasted(tmp_path: Path) -> None:
    split = _split(tmp_path)
    dataset = DetectionDataset(split, CONFIG, training=True)
    for record in split.records[1:]:
        record.path.write_bytes(b"torn")
    items = [dataset[SampleKey(0, (seed,))] for seed in range(20)]
    assert {len(item.bad) for item in items} == {0, 1}
    assert all(item.path == str(split.records[0].path) for item in items)


def test_without_masks_it_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.copy_paste 1.0 .* 'train' has none; set data.copy_paste 0") as caught:
        DetectionDataset(_split(tmp_path, masks=False), CONFIG, training=True)
    assert "\n" not in str(caught.value)
    DetectionDataset(_split(tmp_path, masks=False), CONFIG, training=False)
