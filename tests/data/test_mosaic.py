"""Mosaic: pixels, boxes and masks of four images agree; the same again for the same seed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from cascade_rcnn.config import Config, DataConfig, ModelConfig
from cascade_rcnn.data.dataset import DetectionDataset, SampleKey
from cascade_rcnn.data.formats.open import open_split
from cascade_rcnn.data.item import Item
from cascade_rcnn.data.mosaic import mosaic
from cascade_rcnn.data.synthetic_shapes import generate_shapes
from cascade_rcnn.errors import ConfigError

SIZE = (60, 80)


def block(size: tuple[int, int], box: tuple[int, int, int, int], value: int, *, masks: bool = True) -> Item:
    """An image with one block of a grey value, its label, on black."""
    image, (x1, y1, x2, y2) = torch.zeros(3, *size, dtype=torch.uint8), box
    image[:, y1:y2, x1:x2] = value
    window = (np.ones((y2 - y1, x2 - x1), np.uint8), y1, x1)
    return Item(
        image, size, value, f"{value}.png", np.array([box], np.float32), np.array([value]), np.array([False]),
        [window] if masks else None,
    )  # fmt: skip


@pytest.mark.parametrize("masks", [True, False])
def test_boxes_and_masks_cover_the_pixels_of_their_objects(masks: bool) -> None:
    labels = set()
    for seed in range(60):
        sizes = [(40, 50), (60, 80), (30, 30), (55, 70)]
        items = [block(size, (5, 6, 27, 25), 20 * (k + 1), masks=masks) for k, size in enumerate(sizes)]
        made = mosaic(items, SIZE, np.random.default_rng(seed))
        assert tuple(made.image.shape) == (3, *SIZE) and made.path == "20.png" and made.original_size == (40, 50)
        for row, (box, label) in enumerate(zip(made.boxes, made.labels.tolist())):
            y, x = np.nonzero((made.image[0] == label).numpy())
            assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
            labels.add(label)
            if masks:
                assert made.masks is not None
                mask = made.masks[row]
                assert mask is not None and mask[0].all()
                assert (mask[1], mask[2], *mask[0].shape) == (y.min(), x.min(), np.ptp(y) + 1, np.ptp(x) + 1)
        for label in {20, 40, 60, 80} - set(made.labels.tolist()):  # what is not learnt is hardly to be seen
            assert (made.image[0] == label).sum() < 0.1 * 22 * 19
        assert (made.masks is None) == (not masks)
    assert labels == {20, 40, 60, 80}


def test_a_missing_image_leaves_grey() -> None:
    made = mosaic([block(SIZE, (70, 50, 80, 60), 20), None, None, None], SIZE, np.random.default_rng(0))
    assert made.labels.tolist() == [20] and set(made.image.unique().tolist()) == {0, 20, 114}


def test_a_dataset_gives_the_same_mosaic_for_the_same_seed_and_names_what_it_cannot_read(tmp_path: Path) -> None:
    root = generate_shapes(tmp_path, train_images=6, val_images=1, size=64)
    split = open_split(root, "train")
    plain = DataConfig(root=str(root), short_side=(64,), long_side=96, workers=0, flip=0.0)
    data = DetectionDataset(split, dataclasses.replace(plain, mosaic=1.0), training=True, masks=True)
    one, again, other = data[SampleKey(0, (1,))], data[SampleKey(0, (1,))], data[SampleKey(0, (2,))]
    assert torch.equal(one.image, again.image) and np.array_equal(one.boxes, again.boxes)
    assert not torch.equal(one.image, other.image)
    assert one.image.shape == DetectionDataset(split, plain, training=True)[SampleKey(0, (1,))].image.shape
    assert sum(len(data[SampleKey(0, (seed,))].boxes) for seed in range(8)) > 8
    shorter = {min(data[SampleKey(0, (seed,))].image.shape[1:]) for seed in range(40)}
    assert max(shorter) == 64, "a pixel more would be padded to the next multiple of 32"
    split.records[3].path.write_bytes(b"no picture")
    bad = [name for seed in range(20) for name, _ in data[SampleKey(0, (seed,))].bad]
    assert bad and set(bad) == {str(split.records[3].path)}


def test_what_does_not_go_with_mosaic_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.mosaic and data.large_scale_jitter"):
        DataConfig(mosaic=0.5, large_scale_jitter=(0.5, 2.0))
    with pytest.raises(ConfigError, match=r"data\.mosaic 0.5: model.semantics paper"):
        Config(model=ModelConfig(semantics="paper"), data=DataConfig(mosaic=0.5))
