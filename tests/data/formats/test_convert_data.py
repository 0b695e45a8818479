"""Converted data sets read back as the same objects, and say what could not be kept."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import scenes
from cascade_rcnn.data.formats.convert import convert_data, run_convert_data
from cascade_rcnn.data.formats.open import open_split, recognise
from cascade_rcnn.errors import DataError


@pytest.mark.parametrize("to", ["coco", "voc", "yolo"])
@pytest.mark.parametrize("name", scenes.WRITERS)
def test_every_format_converts_to_every_target(name: str, to: str, tmp_path: Path) -> None:
    source = open_split(scenes.WRITERS[name](tmp_path / "in"), "train")
    _, counts = convert_data(tmp_path / "in", tmp_path / "out", to=to)
    assert recognise(tmp_path / "out") == to and counts["images hard-linked"] == 2
    split = open_split(tmp_path / "out", "train")
    assert split.class_names == source.class_names
    for before, after in zip(source.records, sorted(split.records, key=lambda record: record.path.name)):
        kept = ~before.ignore if to == "yolo" else np.ones(len(before.ignore), dtype=bool)
        np.testing.assert_allclose(after.boxes, before.boxes[kept], atol=1e-9)
        np.testing.assert_array_equal(after.ignore, before.ignore[kept])
        np.testing.assert_array_equal(after.labels, before.labels[kept])
        assert after.path.read_bytes() == before.path.read_bytes()
        assert (after.height, after.width) == (before.height, before.width)
    ignored = sum(int(record.ignore.sum()) for record in source.records)
    assert counts["ignore regions that YOLO cannot hold, left out"] == (ignored if to == "yolo" else 0)
    assert split.has_masks == (name == "coco" and to != "voc")


def test_masks_ids_and_crowds_survive_coco_to_coco(tmp_path: Path) -> None:
    source = open_split(scenes.write_coco(tmp_path / "in"), "train")
    convert_data(tmp_path / "in", tmp_path / "out", to="coco")
    split = open_split(tmp_path / "out", "train")
    assert split.category_ids == (3,)
    for before, after in zip(source.records, split.records):
        assert before.segmentations == after.segmentations and before.image_id == after.image_id
        np.testing.assert_array_equal(before.attributes["ids"], after.attributes["ids"])
        np.testing.assert_array_equal(before.areas, after.areas)


def test_pictures_are_linked_by_name_or_copied_where_hard_links_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError("another file system")

    scenes.write_kitti(tmp_path / "in")
    monkeypatch.setattr("os.link", fails)
    assert convert_data(tmp_path / "in", tmp_path / "linked", to="coco")[1]["images linked by name"] == 2
    assert (tmp_path / "linked" / "train" / "a.png").is_symlink()
    monkeypatch.setattr("pathlib.Path.symlink_to", fails)
    assert convert_data(tmp_path / "in", tmp_path / "copied", to="coco")[1]["images copied"] == 2
    assert len(open_split(tmp_path / "copied", "train")) == 2


def test_same_name_in_two_splits_stays_two_images(tmp_path: Path) -> None:
    scenes.write_coco(tmp_path / "in")
    scenes.write_coco(tmp_path / "in", split="val")
    shutil.copy(tmp_path / "in" / "val" / "b.png", tmp_path / "in" / "val" / "a.png")
    content = scenes.coco_content()
    content["annotations"], content["images"][0]["height"], content["images"][0]["width"] = [], 40, 40
    scenes.write_text(tmp_path / "in" / "annotations" / "instances_val.json", str(content).replace("'", '"'))
    convert_data(tmp_path / "in", tmp_path / "out", to="voc")
    train, val = open_split(tmp_path / "out", "train"), open_split(tmp_path / "out", "val")
    assert [len(record.boxes) for record in (train.records + val.records)] == [2, 0, 0, 0]
    assert train.records[0].path != val.records[0].path


def test_refusals_and_the_command_s_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenes.write_kitti(tmp_path / "in")
    with pytest.raises(DataError, match="choose coco, voc, yolo or labelme"):
        convert_data(tmp_path / "in", tmp_path / "out", to="tfrecord")
    assert run_convert_data(tmp_path / "in", tmp_path / "out", to="yolo") == 0
    printed = capsys.readouterr().out
    assert "2 images hard-linked" in printed and "1 ignore regions that YOLO cannot hold" in printed
    with pytest.raises(DataError, match="not an empty folder"):
        convert_data(tmp_path / "in", tmp_path / "out", to="yolo")
