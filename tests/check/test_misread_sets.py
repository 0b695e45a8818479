"""Data sets whose numbers mean something else than their format says: told, refused, and mended by --fix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import brought
from brought import HEIGHT, WIDTH, on_their_objects
from cascade_rcnn.check.dataset import check_dataset, run_check
from cascade_rcnn.check.objects import anchor_sides
from cascade_rcnn.cli import main
from cascade_rcnn.config import ModelConfig
from cascade_rcnn.data.formats.open import open_split, splits
from cascade_rcnn.data.problems import KINDS
from cascade_rcnn.data.records import DataSplit


def _kinds(root: Path) -> set[str]:
    small = {"some-without-anchor", "no-anchor"}
    return {kind for kind in check_dataset(root).counts if KINDS[kind].severity != "note"} - small


def _polygons(change: Callable[[np.ndarray[Any, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    def write(content: dict[str, Any]) -> None:
        for row in content["annotations"]:
            points = np.array(row["segmentation"][0], dtype=np.float64).reshape(-1, 2)
            row["segmentation"] = [np.asarray(change(points)).reshape(-1).tolist()]

    return write


@pytest.mark.parametrize("coding", ["y, x", "fractions"])
def test_polygons_in_another_coding_are_rewritten_and_boxes_kept(tmp_path: Path, coding: str) -> None:
    change = (lambda points: points[:, ::-1]) if coding == "y, x" else (lambda points: points / (WIDTH, HEIGHT))
    root = brought.coco_set(tmp_path / "a", _polygons(change))
    report = check_dataset(root)
    assert coding in report.of("misread-masks")[0].message and "mask-off-box" not in report.counts
    assert run_check(root, fix=tmp_path / "b") == 0
    split = open_split(tmp_path / "b", "train")
    assert on_their_objects(split) == (6, 6) and _kinds(tmp_path / "b") == set()


def test_convert_data_refuses_what_another_format_would_hide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turned = brought.coco_set(tmp_path / "turned", _polygons(lambda points: points[:, ::-1]))
    plain = brought.coco_set(tmp_path / "plain")
    assert main(["convert-data", str(turned), str(tmp_path / "a"), "--to", "yolo"]) == 2
    error = capsys.readouterr().err
    assert "y, x" in error and "check DATA --fix OUT" in error and not (tmp_path / "a").exists()
    assert run_check(turned, fix=tmp_path / "fixed") == 0
    for source, out in ((tmp_path / "fixed", "b"), (plain, "c")):
        assert main(["convert-data", str(source), str(tmp_path / out), "--to", "yolo"]) == 0
        assert on_their_objects(open_split(tmp_path / out, "train")) == (6, 6)


def test_fix_leaves_boxes_alone_where_most_masks_are_off_them(tmp_path: Path) -> None:
    root = brought.coco_set(tmp_path / "a", _polygons(lambda points: points / 3))
    assert _kinds(root) == {"unlike-masks", "mask-off-box"}
    assert run_check(root, fix=tmp_path / "b") == 1  # told again
    assert on_their_objects(open_split(tmp_path / "b", "train")) == (6, 6)


def test_boxes_around_their_centre_in_coco_are_refused_and_rewritten(tmp_path: Path) -> None:
    def centre(content: dict[str, Any]) -> None:
        for row in content["annotations"]:
            x, y, wide, high = row["bbox"]
            row.update(bbox=[x + wide / 2, y + high / 2, wide, high], segmentation=None)

    root = brought.coco_set(tmp_path / "a", centre)
    assert "centre-as-xywh" in _kinds(root) and KINDS["centre-as-xywh"].refuses
    assert run_check(root, fix=tmp_path / "b") == 0
    assert on_their_objects(open_split(tmp_path / "b", "train")) == (6, 6)


@pytest.mark.parametrize("coding", ["corners", "centre"])
def test_boxes_of_another_coding_in_widerface_are_refused_and_rewritten(tmp_path: Path, coding: str) -> None:
    lines = []
    for seed in brought.SPLITS["train"]:
        brought.save_picture(tmp_path / "a" / "WIDER_train" / "images" / "0--Parade" / f"{seed}.png", seed)
        lines += [f"0--Parade/{seed}.png", "2"]
        for _, x, y, wide, high in brought.objects(seed):
            box = (x, y, x + wide, y + high) if coding == "corners" else (x + wide // 2, y + high // 2, wide, high)
            lines.append(" ".join(map(str, [*box, 0, 0, 0, 0, 0, 0])))
    folder = tmp_path / "a" / "wider_face_split"
    folder.mkdir()
    (folder / "wider_face_train_bbx_gt.txt").write_text("\n".join(lines) + "\n")
    assert {"corners": "xyxy-as-xywh", "centre": "centre-as-xywh"}[coding] in _kinds(tmp_path / "a")
    assert run_check(tmp_path / "a", fix=tmp_path / "b") == 0
    assert _close_to_objects(open_split(tmp_path / "b", "train"))


def _close_to_objects(split: DataSplit) -> bool:
    """Within a pixel: WIDER FACE's boxes are whole numbers."""
    want = [[(x, y, x + w, y + h) for _, x, y, w, h in brought.objects(seed)] for seed in brought.SPLITS["train"]]
    return bool(np.abs(np.array([record.boxes for record in split.records]) - np.array(want)).max() <= 1)


def test_boxes_from_their_corner_in_yolo_are_refused_and_rewritten(tmp_path: Path) -> None:
    root = brought.yolo_set(tmp_path / "a", lambda label, *box: f"{label} " + " ".join(map(str, box)))
    assert _kinds(root) == {"topleft-as-centre"} and KINDS["topleft-as-centre"].refuses
    assert run_check(root, fix=tmp_path / "b") == 0
    assert on_their_objects(open_split(tmp_path / "b", "train")) == (6, 6)


def _pose(points: int) -> Callable[..., str]:
    random = np.random.default_rng(0)

    def row(label: int, x: float, y: float, wide: float, high: float) -> str:
        places = (np.array([x, y]) + random.random((points, 2)) * (wide, high)).reshape(-1)
        return brought.centred(label, x, y, wide, high) + "".join(f" {place:.6f}" for place in places)

    return row


@pytest.mark.parametrize("points", [1, 2])
def test_poses_of_one_or_two_points_are_no_triangles_and_no_rotated_boxes(tmp_path: Path, points: int) -> None:
    root = brought.yolo_set(tmp_path, _pose(points))
    assert _kinds(root) == {"pose-labels"}
    (root / "data.yaml").write_text((root / "data.yaml").read_text() + f"kpt_shape: [{points}, 2]\n")
    assert on_their_objects(open_split(root, "train")) == (6, 6)


def test_triangles_and_four_corners_in_the_middle_are_polygons(tmp_path: Path) -> None:
    def triangle(label: int, x: float, y: float, wide: float, high: float) -> str:
        return f"{label} {x + wide / 2} {y} {x + wide} {y + high} {x} {y + high}"

    assert _kinds(brought.yolo_set(tmp_path / "a", triangle)) == set()
    corners = brought.yolo_set(tmp_path / "b", lambda label, *_: f"{label} .4 .4 .6 .4 .6 .6 .4 .6")
    assert "pose-labels" not in _kinds(corners)


def test_a_test_split_that_was_never_exported_does_not_count(tmp_path: Path) -> None:
    yaml = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnames: [cat, dog]\n"
    root = brought.yolo_set(tmp_path, yaml=yaml, images="{split}/images", labels="{split}/labels")
    (root / "val").rename(root / "valid")
    assert list(splits(root)) == ["train", "val"] and check_dataset(root).counts["absent-split"] == 2
    assert _kinds(root) == set()


def test_an_object_outside_a_wrong_size_is_kept_where_the_picture_has_it(tmp_path: Path) -> None:
    def swap(content: dict[str, Any]) -> None:
        for image in content["images"]:
            image["width"], image["height"] = 90, HEIGHT  # the right half is beyond

    root = brought.coco_set(tmp_path / "a", swap)
    assert "outside-box" not in _kinds(root)
    assert run_check(root, fix=tmp_path / "b") == 0
    assert on_their_objects(open_split(tmp_path / "b", "train")) == (6, 6)


def test_an_image_listed_twice_with_other_objects_is_an_error(tmp_path: Path) -> None:
    def twice(content: dict[str, Any]) -> None:
        content["images"][1]["file_name"] = content["images"][0]["file_name"]

    assert "image-listed-twice" in _kinds(brought.coco_set(tmp_path, twice))


def test_pixels_that_are_no_number_and_further_pages_are_told(tmp_path: Path) -> None:
    root = brought.coco_set(
        tmp_path, lambda content: [one.update(file_name=one["file_name"][:3] + ".tif") for one in content["images"]]
    )
    for number, path in enumerate(sorted(root.rglob("*.jpg"))):
        picture = Image.open(path).convert("F")
        levels = np.array(picture) / 255
        levels[: 12 * (number == 0)] = np.nan
        pages = [Image.fromarray(np.float32(levels))] * (2 if number == 1 else 1)
        pages[0].save(path.with_suffix(".tif"), save_all=True, append_images=pages[1:])
        path.unlink()
    report = check_dataset(root)
    (one,) = report.of("not-a-number")
    assert "10.0% of its pixels" in one.message
    (note,) = report.of("more-pages")
    assert "has 2 pages" in note.message


def test_voc_names_that_end_like_a_flag_and_splits_below_xmls(tmp_path: Path) -> None:
    root = tmp_path / "a"
    for split, seeds in brought.SPLITS.items():
        for seed in seeds:
            brought.save_picture(root / "images" / split / f"bolt {seed}.jpg", seed)
            path = root / "annotations" / "xmls" / split / f"bolt {seed}.xml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(brought.voc_xml(seed))
    assert sorted(splits(root)) == ["train", "val"]
    assert on_their_objects(open_split(root, "val")) == (4, 4)
    flat = tmp_path / "b"
    for seed in (1, 2):
        brought.save_picture(flat / "JPEGImages" / f"bolt {seed}.jpg", seed)
        (flat / "Annotations").mkdir(exist_ok=True)
        (flat / "Annotations" / f"bolt {seed}.xml").write_text(brought.voc_xml(seed))
    (flat / "ImageSets" / "Main").mkdir(parents=True)
    (flat / "ImageSets" / "Main" / "train.txt").write_text("bolt 1\nbolt 2  1\n")
    split = open_split(flat, "train")
    assert on_their_objects(split) == (4, 4) and not split.problems


def test_anchors_in_pixels_are_those_that_objects_are_measured_against() -> None:
    model = replace(ModelConfig(), anchor_sizes=(6.0, 12.0, 24.0, 48.0, 96.0))
    assert anchor_sides(model) == [[6.0], [12.0], [24.0], [48.0], [96.0]]
    assert anchor_sides(ModelConfig())[0] == [32.0]


@pytest.mark.parametrize("kind", ["labelme", "cvat"])
def test_annotations_without_a_size_take_the_pictures_and_leave_its_orientation_open(tmp_path: Path, kind: str) -> None:
    for seed in (1, 2):
        picture = brought.save_picture(tmp_path / ("images" if kind == "cvat" else "train") / f"{seed}.jpg", seed)
        if kind == "labelme":
            path = brought.labelme_json(picture.with_suffix(".json"), seed, picture.name)
            text = path.read_text().replace('"imageHeight"', '"h"').replace('"imageWidth"', '"w"')
            path.write_text(text)
    if kind == "cvat":
        text = brought.cvat_xml((1, 2)).replace("width=", "w=").replace("height=", "h=")
        (tmp_path / "annotations.xml").write_text(text.replace("001.jpg", "1.jpg").replace("002.jpg", "2.jpg"))
    (name,) = splits(tmp_path)
    assert on_their_objects(open_split(tmp_path, name)) == (4, 4)
    with Image.open(picture) as image:
        exif = image.getexif()
        exif[0x112] = 6
        image.save(picture, exif=exif, quality=95)
    assert "undecided-orientation" in _kinds(tmp_path)
