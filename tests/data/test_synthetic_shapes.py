"""The generated data set: deterministic, correct, in COCO's layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from faster_coco_eval import mask as rle_api
from PIL import Image

from cascade_rcnn.data.synthetic_shapes import CLASS_NAMES, draw_scene, generate_shapes
from cascade_rcnn.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate_shapes(tmp_path_factory.mktemp("shapes"), train_images=12, val_images=5, size=96, seed=4)


def _truth(folder: Path, split: str) -> dict:  # type: ignore[type-arg]
    return json.loads((folder / "annotations" / f"instances_{split}.json").read_text())  # type: ignore[no-any-return]


def test_layout_is_cocos_and_every_file_is_there(folder: Path) -> None:
    for split, count in (("train", 12), ("val", 5)):
        truth = _truth(folder, split)
        assert len(truth["images"]) == count
        for image in truth["images"]:
            with Image.open(folder / split / image["file_name"]) as picture:
                assert (picture.width, picture.height) == (image["width"], image["height"]) == (96, 96)
        assert [category["name"] for category in truth["categories"]] == list(CLASS_NAMES)
        identities = [annotation["id"] for annotation in truth["annotations"]]
        assert len(set(identities)) == len(identities) > count


def test_boxes_and_areas_are_those_of_the_masks_and_masks_do_not_overlap(folder: Path) -> None:
    truth = _truth(folder, "train")
    covered = {image["id"]: np.zeros((96, 96), dtype=int) for image in truth["images"]}
    for annotation in truth["annotations"]:
        mask = rle_api.decode(annotation["segmentation"])
        assert mask.sum() == annotation["area"] >= 40
        assert list(rle_api.toBbox(annotation["segmentation"])) == annotation["bbox"]
        covered[annotation["image_id"]] += mask
    assert max(count.max() for count in covered.values()) == 1  # what is hidden belongs to no mask but the upper one's


def test_same_arguments_same_files_other_seed_other_files(folder: Path, tmp_path: Path) -> None:
    again = generate_shapes(tmp_path / "again", train_images=12, val_images=5, size=96, seed=4)
    other = generate_shapes(tmp_path / "other", train_images=12, val_images=5, size=96, seed=5)
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*.*"))]
    assert len(names) == 19
    assert all((folder / name).read_bytes() == (again / name).read_bytes() for name in names)
    assert all((folder / name).read_bytes() != (other / name).read_bytes() for name in names)


def test_train_and_val_share_no_image(folder: Path) -> None:
    files = [path.read_bytes() for path in folder.rglob("*.jpg")]
    assert len(set(files)) == 17


def test_a_second_call_leaves_the_same_and_refuses_another(folder: Path) -> None:
    image = folder / "val" / "val_00000.jpg"
    before = image.stat().st_mtime_ns
    generate_shapes(folder, train_images=12, val_images=5, size=96, seed=4)
    assert image.stat().st_mtime_ns == before
    with pytest.raises(DataError, match=r"instances_train\.json: belongs to another data set"):
        generate_shapes(folder, train_images=12, val_images=5, size=96, seed=9)
    assert image.stat().st_mtime_ns == before


@pytest.mark.parametrize("arguments", [{"size": 20}, {"train_images": 0}, {"objects": (3, 2)}, {"objects": (0, 2)}])
def test_senseless_arguments_are_refused(tmp_path: Path, arguments: dict) -> None:  # type: ignore[type-arg]
    with pytest.raises(DataError, match="shapes: size"):
        generate_shapes(tmp_path / "x", **arguments)
    assert not (tmp_path / "x").exists()


def test_colour_says_nothing_about_the_class_and_all_classes_and_sizes_come() -> None:
    hues: dict[int, list[float]] = {k: [] for k in range(len(CLASS_NAMES))}
    areas, touching = [], 0
    for seed in range(60):
        pixels, labels, masks = draw_scene(np.random.default_rng(seed), size=128, objects=(2, 8))
        for label, mask in zip(labels, masks):
            hues[label].append(float(pixels[mask].mean(axis=0)[0] - pixels[mask].mean(axis=0)[2]))
            areas.append(mask.sum())
        shifted = [np.roll(mask, 1, axis=1) for mask in masks]
        touching += sum(bool((a & b).any()) for i, a in enumerate(masks) for b in shifted[i + 1 :])
    assert min(len(values) for values in hues.values()) > 25
    assert max(abs(np.mean(values)) for values in hues.values()) < 40  # red minus blue, of -255..255
    assert min(areas) < 150 and max(areas) > 2000  # of 16,384 pixels
    assert touching > 20
