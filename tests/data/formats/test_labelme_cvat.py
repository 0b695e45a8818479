"""labelme's JSON and CVAT's XML for images: every shape, what is counted, what is refused by name."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import brought
import scenes
from cascade_rcnn.data.formats.convert import convert_data
from cascade_rcnn.data.formats.open import open_split, recognise, splits
from cascade_rcnn.data.masks import segmentation_area
from cascade_rcnn.errors import DataError

CORNERS = [[10, 20], [50, 20], [50, 60], [10, 60]]


def _labelme(root: Path, *shapes: dict[str, Any], **more: Any) -> Path:
    brought.save_picture(root / "a.jpg", 1)
    brought.labelme_json(root / "a.json", 1, "a.jpg", [{"label": "cat", **shape} for shape in shapes])
    return root


def _png(pixels: np.ndarray[Any, Any]) -> str:
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8) * 255).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


@pytest.mark.parametrize(
    ("shape", "box", "area"),
    [
        ({"shape_type": "rectangle", "points": [[50, 60], [10, 20]]}, [10, 20, 50, 60], 1600),
        ({"shape_type": "rectangle", "points": CORNERS}, [10, 20, 50, 60], 1600),
        ({"shape_type": "polygon", "points": CORNERS}, [10, 20, 50, 60], 1600),
        ({"points": CORNERS[:3]}, [10, 20, 50, 60], 800),
        ({"shape_type": "circle", "points": [[40, 50], [40, 60]]}, [30, 40, 50, 60], 100 * math.pi),
        ({"shape_type": "mask", "points": [[10, 20], [12, 21]], "mask": _png(np.ones((2, 3)))}, [10, 20, 13, 22], 6),
    ],
)
def test_labelme_shapes_become_boxes_and_masks(shape: Any, box: list[float], area: float, tmp_path: Path) -> None:
    root = _labelme(tmp_path, shape)
    assert recognise(root) == "labelme" and splits(root) == ["all"]
    split = open_split(root, "all")
    (record,) = split.records
    np.testing.assert_allclose(record.boxes, [box])
    np.testing.assert_allclose(record.areas, [area], rtol=2e-3)
    assert split.has_masks == (shape.get("shape_type") != "rectangle") and split.problems == []
    assert (record.image_id, record.file_name, record.height, record.width) == ("a", "a.jpg", 120, 160)


def test_labelme_groups_are_one_object_and_shapes_without_area_are_counted(tmp_path: Path) -> None:
    left, right = {"points": CORNERS, "group_id": 1}, {"points": [[60, 20], [70, 20], [70, 60]], "group_id": 1}
    other = {"points": CORNERS, "group_id": 2}
    lines = [{"shape_type": "line", "points": [[1, 2], [3, 4]]}] * 2 + [{"shape_type": "point", "points": [[1, 2]]}]
    split = open_split(_labelme(tmp_path, left, right, other, *lines), "all")
    (record,) = split.records
    assert record.boxes.tolist() == [[10, 20, 70, 60], [10, 20, 50, 60]]
    assert [len(mask or ()) for mask in record.segmentations or ()] == [2, 1]
    assert [problem.message for problem in split.problems] == ["2 x line, left out", "1 x point, left out"]


def test_labelme_s_own_words_mean_ignore_and_background(tmp_path: Path) -> None:
    shapes = [
        {"points": CORNERS, "label": "__ignore__"},
        {"points": CORNERS, "label": "_background_"},
        {"points": CORNERS, "label": "wing nut", "flags": {"difficult": True}},
        {"points": CORNERS, "label": "bolt"},
    ]
    root = _labelme(tmp_path, *shapes)
    (root / "labels.txt").write_text("__ignore__\n_background_\nwing nut\nscrew\nbolt\n")
    split = open_split(root, "all")
    assert split.class_names == ("wing nut", "screw", "bolt")  # all of labels.txt, in its order
    assert split.records[0].ignore.tolist() == [True, True, False]
    assert split.records[0].labels.tolist() == [0, 0, 2]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"points": [[1, 2], [3, "x"], [5, 6]]}, "coordinate that is not a finite number"),
        ({"points": "none"}, r"points 'none' where"),
        ({"points": CORNERS, "label": ""}, "a shape without a label"),
        ({"shape_type": "mask", "points": CORNERS, "mask": "AAAA"}, "bitmap that cannot be read"),
    ],
)
def test_labelme_refuses_with_file_shape_and_reason(shape: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"a\.json, shape 1: .*{message}"):
        open_split(_labelme(tmp_path, shape), "all")


def test_labelme_pictures_are_found_by_backslashes_in_other_folders_and_by_the_json_s_name(tmp_path: Path) -> None:
    for split, seeds in brought.SPLITS.items():
        for seed in seeds:
            name = f"{seed:03d}"
            brought.save_picture(tmp_path / "images" / split / f"{name}.png", seed)
            written = f"..\\..\\images\\{split}\\{name}.png" if seed % 2 else "gone.jpg"
            brought.labelme_json(tmp_path / "labels" / split / f"{name}.json", seed, written)
    assert splits(tmp_path) == ["train", "val"]
    assert brought.on_their_objects(open_split(tmp_path, "train")) == (6, 6)
    assert brought.on_their_objects(open_split(tmp_path, "val")) == (4, 4)


def test_labelme_pictures_that_were_renamed_with_their_json_are_not_mixed_up(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        brought.save_picture(tmp_path / f"{seed:03d}.jpg", seed)
        brought.labelme_json(tmp_path / f"{seed:03d}.json", seed, f"{seed - 1:03d}.jpg")  # the name before
    assert brought.on_their_objects(open_split(tmp_path, "all")) == (6, 6)


def test_a_damaged_file_of_labelme_is_told_of(tmp_path: Path) -> None:
    for seed in (1, 2):
        brought.save_picture(tmp_path / f"{seed}.jpg", seed)
        brought.labelme_json(tmp_path / f"{seed}.json", seed, f"{seed}.jpg")
    (tmp_path / "2.json").write_text((tmp_path / "2.json").read_text()[:120])
    with pytest.raises(DataError, match=r"2\.json: not valid JSON"):
        open_split(tmp_path, "all")


@pytest.mark.parametrize("name", ["coco", "voc", "kitti", "widerface"])
def test_conversion_to_labelme_reads_back_equal(name: str, tmp_path: Path) -> None:
    before = open_split(scenes.WRITERS[name](tmp_path / "in"), "train")
    _, counts = convert_data(tmp_path / "in", tmp_path / "out", to="labelme")
    after = open_split(tmp_path / "out", "train")
    assert recognise(tmp_path / "out") == "labelme" and counts["images hard-linked"] == 2
    assert after.class_names == before.class_names and after.has_masks == before.has_masks
    # the crowd's box of the COCO scene is larger than its mask
    assert counts["boxes that differ from their masks, which alone labelme can hold"] == (name == "coco")
    for one, other in zip(before.records, after.records):
        np.testing.assert_allclose(other.boxes[: 1 if name == "coco" else 2], one.boxes[: 1 if name == "coco" else 2])
        assert other.labels.tolist() == one.labels.tolist() and other.ignore.tolist() == one.ignore.tolist()
        for mask, same in zip(one.segmentations or (), other.segmentations or ()):
            assert segmentation_area(mask) == pytest.approx(segmentation_area(same))


def test_a_set_without_its_pictures_is_not_converted(tmp_path: Path) -> None:
    root = brought.yolo_set(tmp_path / "yolo", yaml="train: train.txt\nnames: [cat, dog]\n")
    (root / "train.txt").write_text("images/train/gone.jpg\n")
    with pytest.raises(DataError, match=r"split 'train' has no images that can be read \(.*gone\.jpg"):
        convert_data(root, tmp_path / "out", to="coco")
    root = brought.coco_set(tmp_path / "coco")
    for path in root.glob("val/*"):
        path.unlink()
    with pytest.raises(DataError, match=r"split 'val': none of its 2 images is there; the first is looked for at"):
        convert_data(root, tmp_path / "out", to="labelme")
    assert not (tmp_path / "out").exists()


def test_conversion_brings_the_classes_of_all_splits_together(tmp_path: Path) -> None:
    for (split, seeds), names in zip(brought.SPLITS.items(), (brought.NAMES, brought.NAMES[::-1])):
        content = brought.coco(tmp_path / split, seeds, names=names)
        brought.write_json(tmp_path / "annotations" / f"instances_{split}.json", content)
    convert_data(tmp_path, tmp_path.parent / "yolo", to="yolo")
    for split, count in (("train", 6), ("val", 4)):
        assert brought.on_their_objects(open_split(tmp_path.parent / "yolo", split)) == (count, count)


# CVAT


def _cvat(root: Path, shape: Any = brought.cvat_box, **more: str) -> Path:
    for seed in (1, 2, 3):
        brought.save_picture(root / "images" / f"{seed:03d}.jpg", seed)
    (root / "annotations.xml").write_text(brought.cvat_xml((1, 2, 3), shape, **more))
    return root


def _rotated(label: str, x: int, y: int, wide: int, high: int) -> str:
    """The sides exchanged about the centre and turned by 90 degrees."""
    left, top = x + wide / 2 - high / 2, y + high / 2 - wide / 2
    return f'<box label="{label}" xtl="{left}" ytl="{top}" xbr="{left + high}" ybr="{top + wide}" rotation="90.00"/>'


def _polygon(label: str, x: int, y: int, wide: int, high: int) -> str:
    points = f"{x},{y};{x + wide},{y};{x + wide},{y + high};{x},{y + high}"
    return f'<polygon label="{label}" points="{points}" occluded="1"/>'


def _mask(label: str, x: int, y: int, wide: int, high: int) -> str:
    return f'<mask label="{label}" rle="0, {wide * high}" left="{x}" top="{y}" width="{wide}" height="{high}"/>'


def _ellipse(label: str, x: int, y: int, wide: int, high: int) -> str:
    return f'<ellipse label="{label}" cx="{x + wide / 2}" cy="{y + high / 2}" rx="{wide / 2}" ry="{high / 2}"/>'


@pytest.mark.parametrize(
    ("shape", "filled"), [(brought.cvat_box, 1), (_rotated, 1), (_polygon, 1), (_mask, 1), (_ellipse, math.pi / 4)]
)
def test_cvat_shapes_become_boxes_and_masks(shape: Any, filled: float, tmp_path: Path) -> None:
    root = _cvat(tmp_path, shape)
    assert recognise(root) == "cvat" and splits(root) == ["all"]
    split = open_split(root, "all")
    assert split.class_names == ("dog", "cat")  # the task's order
    assert brought.on_their_objects(split) == (6, 6)
    assert split.has_masks == (shape is not brought.cvat_box)
    for record in split.records:
        areas = (record.boxes[:, 2:] - record.boxes[:, :2]).prod(axis=1)
        np.testing.assert_allclose(record.areas, areas * filled, rtol=2e-3)
    assert [problem.kind for problem in split.problems] == (["rotated-box"] if shape is _rotated else [])
    assert (split.records[0].attributes["occluded"] == (shape is _polygon)).all()


def test_a_turned_box_turns_clockwise(tmp_path: Path) -> None:
    """About (50, 50), 45 degrees: the right end of a flat box goes down."""
    root = _cvat(tmp_path, lambda *_: '<box label="cat" xtl="30" ytl="49" xbr="70" ybr="51" rotation="45"/>')
    mask = (open_split(root, "all").records[0].segmentations or [None])[0]
    assert isinstance(mask, list)
    right_end = np.mean([mask[0][2:4], mask[0][4:6]], axis=0)
    np.testing.assert_allclose(right_end, 50 + 20 * math.sqrt(0.5))


def test_cvat_masks_run_along_rows(tmp_path: Path) -> None:
    root = _cvat(tmp_path, lambda *_: '<mask label="cat" rle="2, 1, 3" left="10" top="20" width="3" height="2"/>')
    record = open_split(root, "all").records[0]
    assert record.boxes[0].tolist() == [12, 20, 13, 21] and record.areas[0] == 1


def test_cvat_counts_shapes_without_area(tmp_path: Path) -> None:
    extra = '<polyline label="cat" points="1,2;3,4"/><points label="cat" points="1,2"/><tag label="cat"/>'
    split = open_split(_cvat(tmp_path, extra=extra), "all")
    assert {problem.message for problem in split.problems} == {"3 x polyline, left out", "3 x points, left out"}
    assert brought.on_their_objects(split) == (6, 6)


def test_cvat_for_video_is_refused_by_name_whatever_the_split(tmp_path: Path) -> None:
    root = _cvat(tmp_path)
    path = root / "annotations.xml"
    path.write_text(path.read_text().replace("</annotations>", '<track id="0" label="cat"></track></annotations>'))
    for split in ("all", "train"):
        with pytest.raises(DataError, match=r"annotations\.xml: 1 tracks of CVAT for video 1\.1; export the task"):
            open_split(root, split)


@pytest.mark.parametrize(
    ("element", "message"),
    [
        ('<box label="cat" xtl="1" ytl="2" xbr="x" ybr="4"/>', "xbr='x'"),
        ('<polygon label="cat" points="1,2;3"/>', "x,y;x,y"),
        ('<mask label="cat" rle="1, 2" left="1" top="1" width="2" height="2"/>', "do not fill its 2 x 2 pixels"),
        ('<box label="" xtl="1" ytl="2" xbr="3" ybr="4"/>', "a shape without a label"),
        ('<box label="cat" outside="1" xtl="1" ytl="2" xbr="3" ybr="4"/>', "CVAT for video"),
    ],
)
def test_cvat_refuses_with_image_shape_and_reason(element: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"annotations\.xml, image '001\.jpg'.*{message}"):
        open_split(_cvat(tmp_path, lambda *_: element), "all")
