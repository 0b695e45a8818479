"""Pixels, boxes and masks move together."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import locations
from cascade_rcnn.config import DataConfig
from cascade_rcnn.data import transforms as T
from cascade_rcnn.data.images import read_image
from cascade_rcnn.data.transforms import Sample

PARITY = locations.FIXTURES / "parity"


def _scene(height: int = 60, width: int = 80, box: tuple[int, int, int, int] = (20, 12, 50, 40)) -> Sample:
    """A white block on black: pixels, box and mask can each be compared with the other two."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, box[1] : box[3], box[0] : box[2]] = 255
    return Sample.of(image, np.array([box], dtype=np.float32))


def _mask(sample: Sample, height: int = 60, width: int = 80, box: tuple[int, ...] = (20, 12, 50, 40)) -> np.ndarray:
    whole = np.zeros((height, width), dtype=bool)
    whole[box[1] : box[3], box[0] : box[2]] = True
    return whole[sample.rows][:, sample.cols]


def _extent(mask: np.ndarray) -> np.ndarray:
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([cols[0], rows[0], cols[-1] + 1, rows[-1] + 1])


STEPS = {
    "resize up": lambda s: T.resize(s, (150, 200)),
    "resize down": lambda s: T.resize(s, (30, 44)),
    "horizontal flip": T.flip_horizontal,
    "vertical flip": T.flip_vertical,
    "crop": lambda s: T.crop(s, 5, 10, 60, 30),
    "all": lambda s: T.flip_vertical(T.flip_horizontal(T.crop(T.resize(s, (120, 170)), 20, 30, 70, 100))),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_pixels_box_and_mask_agree(step) -> None:  # type: ignore[no-untyped-def]
    sample = step(_scene())
    mask = _mask(sample)
    assert mask.shape == sample.size
    np.testing.assert_allclose(_extent(mask), sample.boxes[0], atol=1.01)
    np.testing.assert_allclose(_extent((sample.image[0] > 127).numpy()), sample.boxes[0], atol=1.01)
    assert sample.image.dtype == torch.uint8 and sample.boxes.dtype == np.float32


@pytest.mark.parametrize("flip", [T.flip_horizontal, T.flip_vertical])
def test_flipping_twice_changes_nothing(flip) -> None:  # type: ignore[no-untyped-def]
    sample = Sample.of(torch.randint(0, 256, (3, 31, 47), dtype=torch.uint8), np.array([[3.25, 4.5, 20.75, 30]]))
    again = flip(flip(sample))
    assert torch.equal(again.image, sample.image)
    for name in ("boxes", "rows", "cols"):
        np.testing.assert_array_equal(getattr(again, name), getattr(sample, name))


@pytest.mark.parametrize(
    "size, short, long, expected",
    [
        ((474, 640), 800, 1333, (800, 1080)),
        ((474, 640), 480, 1333, (480, 648)),
        ((480, 640), 800, 1333, (800, 1067)),
        ((427, 640), 800, 1333, (800, 1199)),
        ((640, 427), 800, 1333, (1199, 800)),
        ((300, 1000), 800, 1333, (400, 1333)),  # the longer side is the limit
        ((800, 1333), 800, 1333, (800, 1333)),
        ((1, 5000), 800, 1333, (1, 1333)),  # never below a pixel
    ],
)
def test_sizes_keep_the_ratio_as_mmdetection_does(
    size: tuple[int, int], short: int, long: int, expected: tuple[int, int]
) -> None:
    assert T.fitted_size(size, short, long) == expected


def test_resized_boxes_equal_mmdetections() -> None:
    truth = json.loads((PARITY / "synthetic.gt.json").read_text())
    expected = json.loads((PARITY / "mmdet_cascade_rcnn_r50_fpn.train.json").read_text())
    boxes = np.array(truth["bbox"])
    boxes[:, 2:] += boxes[:, :2]
    sample = Sample.of(torch.zeros(3, truth["height"], truth["width"], dtype=torch.uint8), boxes)
    resized = T.test_transform(sample, DataConfig(short_side=(480,)))
    assert list(resized.size) == expected["resized"]
    np.testing.assert_allclose(resized.boxes, expected["gt_boxes_resized"], atol=1e-4)


def test_training_pixels_are_within_a_grey_level_of_opencvs() -> None:
    image = torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8)
    for size in ((120, 160), (90, 121), (33, 44)):
        difference = T.resize_pixels(image, size, "fast").int() - T.resize_pixels(image, size, "opencv").int()
        assert difference.abs().max() <= 1


def test_network_input_equals_mmdetections() -> None:
    reference = np.load(PARITY / "mmdet_cascade_rcnn_r50_fpn.npz")
    image, scale = T.resize_for_test(read_image(PARITY / "synthetic.png"), DataConfig())
    assert list(image.shape[1:]) == reference["resized_shape"].tolist()[:2]
    np.testing.assert_allclose(scale, reference["scale_factor"].reshape(-1)[:2], rtol=1e-6)
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    normalised = (image.numpy() - mean[:, None, None]) / std[:, None, None]
    sample = reference["input_sample"].reshape(3, *reference["input_sample"].shape[-2:])
    ours = normalised[:, ::97, ::89][:, : sample.shape[1], : sample.shape[2]]
    inside = sample[:, : ours.shape[1], : ours.shape[2]]  # the rest is padding
    assert np.abs((ours - inside) * std[:, None, None]).max() < 0.001


def test_bilinear_follows_the_source_of_the_recipe() -> None:
    """Without antialias a thin line vanishes on the way down, with it (detectron2, Pillow) it turns grey."""
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    image[:, :, 32] = 255
    config = DataConfig(short_side=(32,), long_side=32)
    plain, _ = T.resize_for_test(image, DataConfig(short_side=(32,), test_short_side=16, long_side=32))
    smooth, scale = T.resize_for_test(
        image, DataConfig(short_side=(32,), test_short_side=16, long_side=32), semantics="detectron2"
    )
    assert plain.shape == smooth.shape == (3, 16, 16) and scale == (0.25, 0.25)
    assert plain.sum() == 0 and 0 < smooth.max() < 255
    assert T.interpolation(config, training=False) == "opencv"
    assert T.interpolation(config, training=True) == "fast"
    assert T.interpolation(DataConfig(antialias=False), "detectron2", training=True) == "fast"
    assert T.interpolation(DataConfig(antialias=True), training=False) == "pillow"
    assert T.interpolation(config, "paper", training=False) == "float"


def test_crop_drops_what_it_cuts_away() -> None:
    boxes = np.array([[0, 0, 10, 10], [15, 15, 30, 30], [0, 0, 20.5, 60]], dtype=np.float32)
    sample = T.crop(Sample.of(torch.zeros(3, 60, 80, dtype=torch.uint8), boxes), 20, 20, 30, 30)
    assert sample.keep.tolist() == [False, True, False]  # outside; partly inside; half a pixel inside
    assert sample.boxes[1].tolist() == [0, 0, 10, 10]
    assert sample.size == (30, 30)


def test_jitter_crops_large_and_leaves_small() -> None:
    sizes = set()
    for seed in range(40):
        config = DataConfig(short_side=(64,), long_side=64, large_scale_jitter=(0.1, 2.0), flip=0)
        sample = T.train_transform(_scene(), config, np.random.default_rng(seed))
        assert max(sample.size) <= 64
        assert sample.size == (len(sample.rows), len(sample.cols))
        if sample.keep[0] and min(sample.boxes[0, 2:] - sample.boxes[0, :2]) > 3:
            np.testing.assert_allclose(_extent(_mask(sample)), sample.boxes[0], atol=2)
        sizes.add(sample.size)
    assert (64, 64) in sizes and min(size[0] for size in sizes) < 20


@pytest.mark.parametrize("antialias", [False, True])
def test_images_are_cropped_before_the_usual_resize(antialias: bool) -> None:
    """Pixels, box and mask are of the same part, whose size is of the range and then of the usual sides."""
    config = DataConfig(
        short_side=(90,),
        long_side=180,
        crop=0.5,
        crop_short_side=(48, 96),
        crop_range=(32, 64),
        antialias=antialias,
    )
    lost = cropped = 0
    for seed in range(200):
        sample = T.train_transform(_scene(), config, np.random.default_rng(seed))
        assert sample.size == (len(sample.rows), len(sample.cols))
        assert min(sample.size) == 90 or max(sample.size) == 180
        if not sample.keep[0]:
            lost += 1
            continue
        if min(sample.boxes[0, 2:] - sample.boxes[0, :2]) < 6:
            continue
        drawn = np.round(np.array([20, 12, 50, 40]) * (sample.canvas[1] / 80)).astype(int)  # as polygons would be
        mask = _mask(sample, *sample.canvas, box=tuple(drawn))
        cropped += sample.size != (90, 120)
        np.testing.assert_allclose(_extent(mask), sample.boxes[0], atol=6)
        np.testing.assert_allclose(_extent((sample.image[0] > 127).numpy()), sample.boxes[0], atol=6)
    assert lost < 40 and 50 < cropped < 120


def test_a_crop_never_exceeds_its_image_and_has_sides_of_the_range() -> None:
    config = DataConfig(crop=1.0, crop_short_side=(64,), crop_range=(40, 70))
    sizes = [T.resize_and_crop(_scene(), config, np.random.default_rng(seed), "fast").size for seed in range(300)]
    heights, widths = map(set, zip(*sizes))
    assert heights == set(range(40, 65)) and widths == set(range(40, 71))  # the image is 64 x 85


def test_short_sides_are_chosen_or_ranged() -> None:
    chosen = {
        T.train_transform(_scene(), DataConfig(short_side=(60, 90)), np.random.default_rng(seed)).size[0]
        for seed in range(20)
    }
    assert chosen == {60, 90}
    config = DataConfig(short_side=(60, 64), short_side_mode="range")
    ranged = {T.train_transform(_scene(), config, np.random.default_rng(seed)).size[0] for seed in range(60)}
    assert ranged == {60, 61, 62, 63, 64}


def test_flips_come_at_their_rate_and_from_the_given_generator() -> None:
    config = DataConfig(short_side=(60,), flip=0.25)
    flipped = [T.train_transform(_scene(), config, np.random.default_rng(seed)).cols[0] > 0 for seed in range(400)]
    assert 0.17 < np.mean(flipped) < 0.33
    again = [T.train_transform(_scene(), config, np.random.default_rng(seed)).cols[0] > 0 for seed in range(400)]
    assert flipped == again


def test_photometric_changes_colours_repeatably_and_leaves_torchs_generator() -> None:
    config = DataConfig(short_side=(60,), flip=0, photometric=True)
    sample = Sample.of(torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8), np.zeros((0, 4), dtype=np.float32))
    state = torch.get_rng_state()
    images = [T.train_transform(sample, config, np.random.default_rng(seed)).image for seed in (1, 1, 2)]
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])
    assert torch.equal(state, torch.get_rng_state())
    assert images[0].dtype == torch.uint8


def test_no_objects_is_normal() -> None:
    empty = Sample.of(torch.zeros(3, 60, 80, dtype=torch.uint8), np.zeros((0, 4)))
    config = DataConfig(short_side=(64,), long_side=64, large_scale_jitter=(0.5, 2.0), flip=1, vertical_flip=1)
    assert T.train_transform(empty, config, np.random.default_rng(0)).boxes.shape == (0, 4)
