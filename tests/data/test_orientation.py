"""One rule for the view of a picture that labels count: pixels, boxes and masks meet, whatever the tag and format."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

import turned_pictures
from cascade_rcnn.config import DataConfig
from cascade_rcnn.data import orientation
from cascade_rcnn.data.dataset import DetectionDataset, SampleKey
from cascade_rcnn.data.formats.convert import convert_data
from cascade_rcnn.data.formats.open import open_split
from cascade_rcnn.data.images import image_size, read_header, read_image, turn, turn_back
from cascade_rcnn.data.masks import decode_window, pack_segmentation
from cascade_rcnn.data.rle import encode_rle
from cascade_rcnn.errors import DataError
from turned_pictures import TAG, as_stored, on_their_objects, save, scene, stored_box

TAGS = range(1, 9)
SUFFIXES = [".png", ".tif", ".jpg", ".webp", *([".avif"] if features.check("avif") else [])]


def _close(image: Any, expected: np.ndarray) -> bool:
    bright = image.permute(1, 2, 0).numpy().mean(axis=2) > 120
    wanted = expected.mean(axis=2) > 120
    return bright.shape == wanted.shape and bool((bright != wanted).mean() < 0.01)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("tag", TAGS)
def test_both_views_of_a_file_whatever_holds_the_tag(tmp_path: Path, tag: int, suffix: str) -> None:
    upright, _ = scene(1, (40, 30))
    path = tmp_path / f"a{suffix}"
    save(path, upright, tag)
    stored = as_stored(upright, tag)
    assert read_header(path).stored == stored.shape[:2] and read_header(path).orientation == tag
    assert image_size(path) == read_header(path).upright == (40, 30)
    assert _close(read_image(path), upright) and _close(read_image(path, frame="stored"), stored)
    np.testing.assert_array_equal(turn_back(turn(stored, tag), tag), stored)


def test_a_png_file_may_have_its_tag_behind_the_pixels(tmp_path: Path) -> None:
    upright, _ = scene(1, (40, 30))
    path = tmp_path / "a.png"
    Image.fromarray(as_stored(upright, 6)).save(path)
    exif = b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHH", TAG, 3, 1, 6, 0) + b"\0\0\0\0"
    chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
    data = path.read_bytes()
    path.write_bytes(data[:-12] + chunk + data[-12:])
    assert read_header(path).orientation == 6
    np.testing.assert_array_equal(read_image(path).permute(1, 2, 0).numpy(), upright)


@pytest.mark.parametrize(
    ("annotated", "tag", "wanted", "sizeless", "view"),
    [
        ((40, 60), 6, "auto", False, "stored"),
        ((60, 40), 6, "auto", False, "upright"),
        ((60, 40), 6, "stored", False, "upright"),  # the annotation's own size wins over the option
        ((40, 61), 6, "auto", False, "differs"),
        ((40, 60), 1, "auto", False, "upright"),
        ((60, 40), 1, "auto", False, "differs"),
        ((40, 60), 3, "auto", False, "undecided"),
        ((40, 60), 2, "upright", False, "upright"),
        ((40, 60), 4, "stored", False, "stored"),
        (None, 6, "auto", False, "undecided"),
        (None, 6, "auto", True, "upright"),
        (None, 3, "stored", True, "stored"),
    ],
)
def test_the_annotations_own_size_decides(annotated: Any, tag: int, wanted: Any, sizeless: bool, view: str) -> None:
    assert orientation.view_of(annotated, (40, 60), tag, wanted, sizeless=sizeless) == view


@pytest.mark.parametrize("tag", TAGS)
def test_boxes_polygons_and_run_lengths_turn_as_the_pixels_do(tag: int) -> None:
    size = (37, 23)
    _, box = scene(5, size)
    stored = stored_box(box, size, tag)
    shape = size[::-1] if tag >= 5 else size
    np.testing.assert_array_equal(orientation.turn_boxes(np.array([stored]), shape, tag), [box])
    x1, y1, x2, y2 = stored
    solid = np.zeros(shape, dtype=bool)
    solid[y1:y2, x1:x2] = True
    for mask in ([[float(v) for v in (x1, y1, x2, y1, x2, y2, x1, y2)]], encode_rle(solid)):
        window = decode_window(pack_segmentation(orientation.turn_mask(mask, shape, tag)), size)
        assert window is not None
        pixels, top, left = window
        assert pixels.all() and (left, top, left + pixels.shape[1], top + pixels.shape[0]) == box


@pytest.mark.parametrize("labelled", ["upright", "stored"])
@pytest.mark.parametrize("tag", [5, 6, 7, 8])
def test_labels_meet_their_objects_in_the_view_that_their_size_says(tmp_path: Path, tag: int, labelled: str) -> None:
    split = open_split(turned_pictures.write_coco(tmp_path, tag, labelled=labelled, rle=tag == 6), "train")
    assert on_their_objects(split) == (4, 4)


@pytest.mark.parametrize(
    ("tag", "size", "sized"), [(3, (80, 60), True), (2, (80, 60), True), (6, (60, 60), True), (8, (80, 60), False)]
)
def test_what_nothing_decides_is_asked_and_the_answer_holds(
    tmp_path: Path, tag: int, size: tuple[int, int], sized: bool
) -> None:
    for labelled in ("upright", "stored"):
        root = turned_pictures.write_coco(tmp_path / labelled, tag, size=size, labelled=labelled, sized=sized)
        with pytest.raises(orientation.OrientationError, match=r"0\.png.*--orientation upright.*data\.orientation"):
            DetectionDataset(open_split(root, "train"), DataConfig(), training=True)[SampleKey(0, (0,))]
        with pytest.raises(orientation.OrientationError, match=r"0\.png"):
            orientation.refuse_undecided(open_split(root, "train"), "auto")
        said: Any = labelled
        split = open_split(root, "train", orientation=said)
        orientation.refuse_undecided(split, said)
        assert on_their_objects(split, DataConfig(orientation=said)) == (4, 4)


def _sizeless(root: Path, kind: str, tag: int, *, labelled: str = "upright") -> Path:
    """One tagged picture labelled in a format without sizes."""
    size = (80, 60)
    pixels, box = scene(3, size)
    if labelled == "stored":
        box, size = stored_box(box, size, tag), (size[::-1] if tag >= 5 else size)
    x1, y1, x2, y2 = box
    picture = {
        "yolo": "images/train/a.jpg",
        "kitti": "training/image_2/a.png",
        "widerface": "WIDER_train/images/x/a.jpg",
    }
    save(root / picture[kind], pixels, tag)
    h, w = size
    text = {
        "yolo": ("labels/train/a.txt", f"0 {(x1 + x2) / 2 / w} {(y1 + y2) / 2 / h} {(x2 - x1) / w} {(y2 - y1) / h}\n"),
        "kitti": ("training/label_2/a.txt", f"Car 0 0 0 {x1} {y1} {x2} {y2} 0 0 0 0 0 0 0\n"),
        "widerface": (
            "wider_face_split/wider_face_train_bbx_gt.txt",
            f"x/a.jpg\n1\n{x1} {y1} {x2 - x1} {y2 - y1} 0 0 0 0 0 0\n",
        ),
    }[kind]
    (root / text[0]).parent.mkdir(parents=True, exist_ok=True)
    (root / text[0]).write_text(text[1])
    if kind == "yolo":
        (root / "data.yaml").write_text("train: images/train\nnames: [thing]\n")
    return root


@pytest.mark.parametrize("tag", [3, 5, 6, 8])
@pytest.mark.parametrize("kind", ["yolo", "kitti", "widerface"])
def test_formats_without_sizes_mean_the_upright_picture(tmp_path: Path, kind: str, tag: int) -> None:
    name = "trainval" if kind == "kitti" else "train"
    assert on_their_objects(open_split(_sizeless(tmp_path / "a", kind, tag), name))[0] == 1
    root = _sizeless(tmp_path / "b", kind, tag, labelled="stored")
    split = open_split(root, name, orientation="stored")
    assert on_their_objects(split, DataConfig(orientation="stored"))[0] == 1


@pytest.mark.parametrize("training", [True, False])
def test_a_set_and_its_upright_twin_are_the_same_to_the_network(tmp_path: Path, training: bool) -> None:
    config = DataConfig(short_side=(64,), long_side=128)
    twins = [
        DetectionDataset(
            open_split(turned_pictures.write_coco(tmp_path / str(tag), tag), "train"),
            config,
            training=training,
            masks=True,
        )
        for tag in (1, 6)
    ]
    for number in range(4):
        upright, turned = (twin[SampleKey(number, (7,))] for twin in twins)
        assert (upright.image == turned.image).all() and upright.original_size == turned.original_size
        np.testing.assert_array_equal(upright.boxes, turned.boxes)
        assert upright.masks is not None and turned.masks is not None
        for one, other in zip(upright.masks, turned.masks):
            assert one is not None and other is not None and one[1:] == other[1:]
            np.testing.assert_array_equal(one[0], other[0])


@pytest.mark.parametrize("to", ["coco", "voc", "yolo"])
@pytest.mark.parametrize(("tag", "labelled"), [(6, "stored"), (8, "upright"), (3, "stored"), (4, "upright")])
def test_converted_labels_stay_on_their_objects_and_ask_nothing(
    tmp_path: Path, to: str, tag: int, labelled: Any
) -> None:
    root = turned_pictures.write_coco(tmp_path / "a", tag, labelled=labelled)
    if tag in (3, 4):
        with pytest.raises(DataError, match="--orientation upright"):
            convert_data(root, tmp_path / "b", to=to)
    convert_data(root, tmp_path / "b", to=to, orientation=labelled if tag in (3, 4) else "auto")
    assert on_their_objects(open_split(tmp_path / "b", "train"))[0] == 4


def test_labels_without_an_orientation_tag_need_no_decision(tmp_path: Path) -> None:
    split = open_split(turned_pictures.write_coco(tmp_path, 1, size=(60, 60), sized=False), "train")
    assert on_their_objects(split) == (4, 4)
    split.records[0] = replace(split.records[0], sized=True, height=61)
    with pytest.raises(DataError, match="is 60x60, the annotation says 60x61"):
        on_their_objects(split)
