"""What check and --fix make of turned, resized, cropped and deep pictures: boxes on their objects, or a word of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import turned_pictures
from cascade_rcnn.check.dataset import check_dataset, run_check
from cascade_rcnn.config import Config, DataConfig
from cascade_rcnn.data.formats.convert import convert_data
from cascade_rcnn.data.formats.open import open_split
from cascade_rcnn.errors import DataError
from turned_pictures import on_their_objects


def _kinds(root: Path, **settings: Any) -> dict[str, int]:
    small = ("some-without-anchor", "no-anchor", "class-without-objects")
    counts = check_dataset(root, data=DataConfig(**settings)).counts
    return {kind: number for kind, number in counts.items() if kind not in small}


def _resize(root: Path, size: tuple[int, int]) -> None:
    for path in (root / "train").iterdir():
        with Image.open(path) as picture:
            exif = picture.getexif()
            picture.resize(size, Image.Resampling.NEAREST).save(path, exif=exif)


@pytest.mark.parametrize("tag", range(2, 9))
@pytest.mark.parametrize("labelled", ["upright", "stored"])
def test_fix_settles_every_orientation(tmp_path: Path, tag: int, labelled: Any) -> None:
    root = turned_pictures.write_coco(tmp_path / "a", tag, labelled=labelled, rle=tag in (4, 7))
    orientation = labelled if tag < 5 else "auto"
    if tag < 5:
        assert _kinds(root) == {"undecided-orientation": 4}
        assert run_check(root, fix=tmp_path / "undecided") == 1  # left as it is, and said so
    assert _kinds(root, orientation=orientation) == {"turned-image" if labelled == "upright" else "rotated-image": 4}
    recipe = Config(data=DataConfig(orientation=orientation))
    assert run_check(root, fix=tmp_path / "b", recipe=recipe) == 0
    assert on_their_objects(open_split(tmp_path / "b", "train")) == (4, 4)  # without being told anything
    upright = labelled == "stored" or tag < 5  # those pictures are written anew
    assert _kinds(tmp_path / "b") == ({} if upright else {"turned-image": 4})


@pytest.mark.parametrize(("tag", "labelled"), [(1, "upright"), (6, "upright"), (8, "stored")])
@pytest.mark.parametrize("rle", [False, True])
def test_fix_scales_labels_of_pictures_that_were_resized(
    tmp_path: Path, tag: int, labelled: str, rle: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    root = turned_pictures.write_coco(tmp_path / "a", tag, labelled=labelled, rle=rle)
    _resize(root, (40, 30) if tag >= 5 else (30, 40))  # stored (width, height): half of it
    assert _kinds(root)["size-mismatch"] == 4
    assert run_check(root, fix=tmp_path / "b") == 0
    assert on_their_objects(open_split(tmp_path / "b", "train"))[0] == 4
    assert "the copy was checked: no errors" in capsys.readouterr().out
    assert "labels scaled to the file's" in (tmp_path / "b" / "changes.txt").read_text()


@pytest.mark.parametrize("what", ["cropped", "squashed", "trimmed"])
def test_fix_leaves_out_what_was_cropped_or_squashed(tmp_path: Path, what: str) -> None:
    root = turned_pictures.write_coco(tmp_path / "a", 1)
    path = root / "train" / "0.png"
    with Image.open(path) as picture:
        box = (0, 0, 50, 80) if what == "cropped" else (1, 2, 59, 79)
        changed = picture.resize((60, 60)) if what == "squashed" else picture.crop(box)
    changed.save(path)
    assert run_check(root, fix=tmp_path / "b") == 0
    split = open_split(tmp_path / "b", "train")
    assert on_their_objects(split) == (3, 3) and len(split) == 3
    assert "'0.png' dropped with its 1 objects" in (tmp_path / "b" / "changes.txt").read_text()
    for path in (root / "train").iterdir():
        changed.resize((50, 50)).save(path)
    with pytest.raises(DataError, match=r"no object would be left .*nothing was written"):
        run_check(root, fix=tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_fix_takes_the_files_size_where_the_boxes_show_that_the_annotations_is_wrong(tmp_path: Path) -> None:
    root = turned_pictures.write_coco(tmp_path / "a", 1)
    path = root / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    for image in content["images"]:
        image["width"], image["height"] = 80, 60  # swapped
    far = max(content["annotations"], key=lambda row: row["bbox"][1] + row["bbox"][3])
    assert far["bbox"][1] + far["bbox"][3] > 61
    path.write_text(json.dumps(content))
    run_check(root, fix=tmp_path / "b")
    split = open_split(tmp_path / "b", "train")
    assert on_their_objects(split)[0] == sum(len(record.boxes) for record in split.records) >= 3


def _deep(root: Path, *factors: int) -> Path:
    turned_pictures.write_coco(root, 1)
    for path, factor in zip(sorted((root / "train").iterdir()), factors):
        with Image.open(path) as picture:
            levels = np.asarray(picture.convert("L")).astype(np.uint16) * factor
        Image.fromarray(levels).save(path)
    return root


def test_levels_in_use_are_named_and_pictures_that_they_leave_black(tmp_path: Path) -> None:
    report = check_dataset(_deep(tmp_path / "a", 16, 16, 16, 16))
    (note,) = report.of("deep-pictures")
    assert " to 3680, 5.6% of 0 to 65535" in note.message and "data.range '0 4095'" in note.message
    assert not report.has("warning")
    assert _kinds(tmp_path / "a", range="dtype")["dark-levels"] == 4
    assert _kinds(tmp_path / "a", range="0 1000")["clipped-levels"] == 4
    assert _kinds(tmp_path / "a", range="percentile") == {"deep-pictures": 1}
    assert _kinds(_deep(tmp_path / "b", 256, 256, 256, 4)) == {"deep-pictures": 1, "dark-levels": 1}


def test_samples_are_drawn_as_training_reads_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, root in (
        ("deep", _deep(tmp_path / "a", 257, 257, 257, 257)),
        ("flat", _deep(tmp_path / "b", 1, 1, 1, 1)),
    ):
        run_check(root, draw=4, out=tmp_path / name)
    with Image.open(tmp_path / "deep" / "samples.png") as one, Image.open(tmp_path / "flat" / "samples.png") as other:
        deep, flat = (np.asarray(sheet.convert("L")).astype(int) for sheet in (one, other))
    assert np.abs(deep - flat).mean() < 1  # neither black nor white


def test_fix_decides_nothing_that_only_the_user_can(tmp_path: Path) -> None:
    unsized = turned_pictures.write_coco(tmp_path / "a", 6, sized=False)
    assert run_check(unsized, fix=tmp_path / "fixed_a") == 1
    assert _kinds(tmp_path / "fixed_a") == {"undecided-orientation": 4}
    resized = turned_pictures.write_coco(tmp_path / "b", 3, labelled="stored")
    _resize(resized, (30, 40))
    assert run_check(resized, fix=tmp_path / "fixed_b") == 1
    assert "say --orientation" in (tmp_path / "fixed_b" / "changes.txt").read_text()
    recipe = Config(data=DataConfig(orientation="stored"))
    assert run_check(resized, fix=tmp_path / "fixed_c", recipe=recipe) == 0
    assert on_their_objects(open_split(tmp_path / "fixed_c", "train"))[0] == 4


def test_yolo_has_no_sizes_that_would_show_a_cropped_picture(tmp_path: Path) -> None:
    root = turned_pictures.write_coco(tmp_path / "a", 1)
    for name, size in (("0.png", (30, 40)), ("1.png", (60, 60))):  # half as large; squashed
        with Image.open(root / "train" / name) as picture:
            changed = picture.resize(size, Image.Resampling.NEAREST)
        changed.save(root / "train" / name)
    _, counts = convert_data(root, tmp_path / "b", to="yolo")
    assert counts["left out: size-mismatch"] == 1
    assert on_their_objects(open_split(tmp_path / "b", "train"))[0] == 3
