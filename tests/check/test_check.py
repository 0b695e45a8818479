"""Each check finds the fault that was planted for it, and a sound data set gives none."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import scenes
from cascade_rcnn.check import dataset as check_module
from cascade_rcnn.check.dataset import check_before_training, check_dataset, run_check
from cascade_rcnn.check.objects import anchor_sides, best_anchor_iou
from cascade_rcnn.config import Config, DataConfig, ModelConfig
from cascade_rcnn.data.formats.open import open_split
from cascade_rcnn.data.problems import KINDS
from cascade_rcnn.errors import DataError

_DATA = DataConfig(short_side=(160,), long_side=320)
_MODEL = ModelConfig(anchor_scales=(4.0, 8.0))


def _content(images: int = 6, objects: int = 3) -> dict[str, Any]:
    """A sound data set: images of 64 x 48, objects of 20 x 16 pixels and two classes."""
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    for image in range(images):
        content["images"].append({"id": image, "file_name": f"{image}.png", "height": 48, "width": 64})
        for number in range(objects):
            x, y = 5 + 10 * number, 3 + 5 * number
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": image,
                    "category_id": 1 + number % 2,
                    "iscrowd": 0,
                    "bbox": [x, y, 20, 16],
                    "area": 320,
                    "segmentation": [[x, y, x + 20, y, x + 20, y + 16, x, y + 16]],
                }
            )
    return content


def _write(root: Path, content: dict[str, Any], *, split: str = "train", seed: int = 0) -> Path:
    random = np.random.default_rng(seed)
    for image in content["images"]:
        path = root / split / str(image.get("file_name"))
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(path)
    scenes.write_text(root / "annotations" / f"instances_{split}.json", json.dumps(content))
    return root


def _kinds(root: Path, **settings: Any) -> dict[str, int]:
    return check_dataset(root, data=settings.get("data", _DATA), model=settings.get("model", _MODEL)).counts


def test_sound_data_set_has_no_findings(tmp_path: Path) -> None:
    assert _kinds(_write(tmp_path, _content())) == {}


def _plant(key: str, value: Any, *, row: int = 0, table: str = "annotations") -> Callable[[dict[str, Any]], None]:
    return lambda content: content[table][row].__setitem__(key, value)


def _corners(content: dict[str, Any]) -> None:
    for row in content["annotations"]:
        x, y, w, h = row["bbox"]
        row["bbox"] = [x, y, x + w, y + h]
        row.pop("segmentation")


def _fractions(content: dict[str, Any]) -> None:
    for row in content["annotations"]:
        row["bbox"] = [value / 64 for value in row["bbox"]]
        row.pop("segmentation")


def _every(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: [row.__setitem__(key, value) for row in content["annotations"]] and None


def _stray(content: dict[str, Any]) -> None:
    more = _content(images=40)
    content["images"], content["annotations"] = more["images"], more["annotations"]
    content["categories"].append({"id": 3, "name": "pieces"})
    content["annotations"][7]["category_id"] = 3


def _imbalance(content: dict[str, Any]) -> None:
    for row in content["annotations"][9:]:
        row["category_id"] = 1
    more = [
        dict(row, id=row["id"] + 1000 * k, bbox=[k % 40, k // 40, 20, 16], segmentation=None)
        for k in range(1, 120)
        for row in content["annotations"][:3]
    ]
    content["annotations"] += [dict(row, category_id=1) for row in more]


@pytest.mark.parametrize(
    ("kind", "plant", "count"),
    [
        ("xyxy-as-xywh", _corners, 1),
        ("relative-boxes", _fractions, 1),
        ("empty-box", _plant("bbox", [5, 5, 0, 10]), 1),
        ("empty-box", _plant("bbox", [5, 5, 10, -3]), 1),
        ("outside-box", _plant("bbox", [70, 5, 10, 10]), 1),
        ("beyond-image", _plant("bbox", [50, 5, 30, 10]), 1),
        ("bad-number", _plant("bbox", [float("nan"), 5, 30, 10]), 1),
        ("unknown-category", _plant("category_id", 99), 1),
        ("unknown-category", _plant("category_id", "cat"), 1),
        ("unknown-image", _plant("image_id", 99), 1),
        ("duplicate-image-id", _plant("id", 1, table="images"), 1),
        ("duplicate-category", _plant("id", 2, table="categories"), 1),
        ("all-crowd", _every("iscrowd", 1), 1),
        ("size-mismatch", _plant("width", 100, table="images"), 1),
        ("image-without-objects", lambda content: content["annotations"].__delitem__(slice(3)), 1),
        ("mask-off-box", _plant("segmentation", [[40, 30, 60, 30, 60, 45, 40, 45]]), 1),
        ("missing-mask", _plant("segmentation", []), 1),
        ("bad-mask", _plant("segmentation", {"size": [48, 60], "counts": [48 * 60]}), 1),
        ("bad-mask", _plant("segmentation", {"size": [48, 64], "counts": [5, 6]}), 1),
        ("bad-mask", _plant("segmentation", {"size": [48, 64], "counts": "0~"}), 1),
        ("short-polygon", _plant("segmentation", [[1, 1, 9, 9]]), 1),
        ("class-without-objects", lambda content: content["categories"].append({"id": 3, "name": "cow"}), 1),
        ("stray-class", _stray, 1),
        ("class-imbalance", _imbalance, 1),
        ("duplicate-box", lambda content: content["annotations"].append(dict(content["annotations"][0], id=999)), 1),
        ("no-anchor", _every("bbox", [5, 5, 2, 2]), 1),
        ("tiny-object", _every("bbox", [5, 5, 30, 1]), 1),
    ],
)
def test_check_finds_a_fault_in_the_annotations(
    kind: str, plant: Callable[[dict[str, Any]], None], count: int, tmp_path: Path
) -> None:
    content = _content()
    plant(content)
    report = check_dataset(_write(tmp_path, content), data=_DATA, model=_MODEL)
    assert report.counts.get(kind) == count, report.counts
    problem = report.of(kind)[0]
    assert "train" in problem.where and problem.message and "\n" not in problem.message


def _jpeg(path: Path, **options: Any) -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="JPEG", quality=95, **options)


def _rotated(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    _jpeg(path, exif=exif)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _cut_jpeg(path: Path) -> None:
    _jpeg(path)
    _cut(path)


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        ("missing-image", Path.unlink),
        ("unreadable-image", lambda path: path.write_text("<html>404</html>")),
        ("unreadable-image", lambda path: path.write_bytes(b"")),
        ("truncated-image", _cut),
        ("truncated-image", _cut_jpeg),
        ("rotated-image", _rotated),
        ("size-mismatch", lambda path: Image.new("RGB", (48, 64)).save(path)),
        ("huge-image", lambda path: Image.new("1", (20000, 12000)).save(path)),
    ],
)
def test_check_finds_a_fault_in_an_image_file(kind: str, damage: Callable[[Path], Any], tmp_path: Path) -> None:
    root = _write(tmp_path, _content())
    damage(root / "train" / "2.png")
    report = check_dataset(root, data=_DATA, model=_MODEL)
    assert report.counts.get(kind) == 1, report.counts
    assert "images[2]" in report.of(kind)[0].where and "2.png" in report.of(kind)[0].message


def test_whole_images_with_trailing_bytes_are_not_called_truncated(tmp_path: Path) -> None:
    root = _write(tmp_path, _content())
    _jpeg(root / "train" / "1.png")
    for name in ("0.png", "1.png"):
        path = root / "train" / name
        path.write_bytes(path.read_bytes() + b"camera maker's remark" * 20)
    assert _kinds(root) == {}


def test_all_images_missing_is_one_finding(tmp_path: Path) -> None:
    root = _write(tmp_path, _content())
    for path in (root / "train").iterdir():
        path.unlink()
    assert _kinds(root) == {"no-images": 1}


def test_same_image_in_two_splits_is_found_by_content(tmp_path: Path) -> None:
    root = _write(_write(tmp_path, _content()), _content(), split="val", seed=1)
    assert _kinds(root) == {}
    (root / "val" / "4.png").write_bytes((root / "train" / "1.png").read_bytes())
    report = check_dataset(root, data=_DATA, model=_MODEL)
    assert report.counts == {"same-image-in-splits": 1}
    assert report.of("same-image-in-splits")[0].message == "'4.png' of 'val' is '1.png' of 'train'"
    (root / "train" / "5.png").write_bytes((root / "train" / "0.png").read_bytes())
    assert _kinds(root) == {"same-image-in-splits": 1, "same-image-twice": 1}


def test_different_class_lists_are_found(tmp_path: Path) -> None:
    content = _content()
    content["categories"][1]["name"] = "Dog"
    root = _write(_write(tmp_path, _content()), content, split="val", seed=1)
    assert _kinds(root) == {"different-classes": 1, "similar-classes": 1}


def test_more_objects_than_detections_are_found(tmp_path: Path) -> None:
    assert _kinds(_write(tmp_path, _content()), model=replace(_MODEL, max_detections=2)) == {"too-many-objects": 6}


def test_best_anchor_overlap_equals_the_full_table_of_anchors() -> None:
    random = np.random.default_rng(0)
    corner, size = random.uniform(100, 300, (40, 2)), random.uniform(5, 150, (40, 2))
    boxes = np.concatenate([corner, corner + size], axis=1)
    best = np.zeros(40)
    for stride in (4, 8, 16, 32, 64):
        centers = np.stack(np.meshgrid(*[np.arange(0, 640, stride)] * 2), axis=-1).reshape(-1, 2)
        for ratio in (0.5, 1.0, 2.0):
            side = 8.0 * stride * np.array([ratio**-0.5, ratio**0.5])
            low = np.maximum(boxes[:, None, :2], centers - side / 2)
            high = np.minimum(boxes[:, None, 2:], centers + side / 2)
            shared = np.clip(high - low, 0, None).prod(axis=2)
            best = np.maximum(best, (shared / (size.prod(axis=1)[:, None] + side.prod() - shared)).max(axis=1))
    np.testing.assert_allclose(
        best_anchor_iou(boxes, sizes=anchor_sides(ModelConfig()), ratios=(0.5, 1.0, 2.0)), best, rtol=1e-12
    )


def _broken(root: Path) -> Path:
    content = _content()
    rows = content["annotations"]
    rows[0]["bbox"], rows[1]["category_id"], rows[2]["bbox"] = [5, 5, 0, 3], 77, [50, 5, 30, 10]
    rows[2]["segmentation"] = [[50, 5, 80, 5, 80, 15, 50, 15]]
    rows[4]["segmentation"] = [[40, 30, 60, 30, 60, 45, 40, 45]]
    rows.append(dict(rows[6], id=500))
    content["images"][1] |= {"width": 128, "height": 96}  # the picture was halved since
    rows[3]["bbox"], rows[5]["bbox"] = [[2 * value for value in rows[number]["bbox"]] for number in (3, 5)]
    _write(root, content)
    _cut(root / "train" / "5.png")
    return root


def test_fix_writes_a_copy_without_faults_and_lists_each_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = _broken(tmp_path / "data"), tmp_path / "fixed"
    assert run_check(root, fix=out) == 0
    changes = (out / "changes.txt").read_text()
    for word in (
        "empty-box",
        "unknown-category",
        "clipped to",
        "set to its mask's",
        "repeated",
        "labels scaled to the file's 64 x 48",
        "'5.png' dropped with its 3 objects",
    ):
        assert word in changes, word
    assert "changes.txt" in capsys.readouterr().out
    assert not [kind for kind in _kinds(out) if KINDS[kind].severity != "note"]
    assert len(open_split(out, "train")) == 5 and open_split(out, "train").has_masks
    with pytest.raises(DataError, match="not an empty folder"):
        run_check(root, fix=out)


@pytest.mark.parametrize("plant", [_corners, _fractions, _every("iscrowd", 1)])
def test_fix_recodes_a_whole_file(plant: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    content = _content()
    for row in content["annotations"]:
        row["bbox"] = [row["bbox"][0], row["bbox"][1], 21, 15]  # 64 x 48: a fraction of the side is told apart
    plant(content)
    if plant is _fractions:
        for row in content["annotations"]:
            row["bbox"] = [value * 64 / (48 if place % 2 else 64) for place, value in enumerate(row["bbox"])]
    root, out = _write(tmp_path / "data", content), tmp_path / "fixed"
    run_check(root, fix=out)
    for record in open_split(out, "train").records:
        np.testing.assert_allclose(record.boxes[:, 2:] - record.boxes[:, :2], [[21, 15]] * 3)
        assert not record.ignore.any()


def test_report_and_sheet_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_check(_broken(tmp_path / "data"), draw=5, out=tmp_path / "out") == 1
    with Image.open(tmp_path / "out" / "samples.png") as sheet:
        colors = sheet.convert("RGB").getcolors(10**7)
        assert sheet.width > 1000 and colors is not None and len(colors) > 100
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["counts"]["unknown-category"]["count"] == 1
    printed = capsys.readouterr().out
    assert "annotations[1]: category_id 77 is not in the list" in printed and "what to do" in printed


def _config(root: Path, **data: Any) -> Config:
    return Config(data=replace(_DATA, root=str(root), val="train", **data), model=_MODEL)


def test_check_before_training_refuses_what_would_ruin_it(tmp_path: Path) -> None:
    root = _write(tmp_path, _content())
    assert check_before_training(_config(root)).counts == {}
    content = _content()
    _corners(content)
    _write(tmp_path, content)
    with pytest.raises(DataError, match=r"boxes leave their image when read as x, y, width, height.*--fix OUT"):
        check_before_training(_config(root))
    content["annotations"][3]["category_id"] = 5
    _write(tmp_path, content)
    with pytest.raises(DataError, match=r"instances_train.json, annotations\[3\]: category_id 5"):
        check_before_training(_config(root))


def test_check_before_training_is_cached_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = _write(tmp_path / "data", _content())
    runs: list[Path] = []

    def counted(path: Path, **settings: Any) -> Any:
        runs.append(path)
        return check_dataset(path, **settings)

    monkeypatch.setattr(check_module, "check_dataset", counted)
    for _ in range(3):
        check_before_training(_config(root))
    assert len(runs) == 1
    check_before_training(_config(root, max_pixels=1_000_000))
    assert len(runs) == 2
    os.utime(root / "train" / "3.png", (1, 1))
    check_before_training(_config(root))
    assert len(runs) == 3


def test_an_image_is_read_three_times_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What keeps large data sets quick: no file is read once for every object or every other image."""
    opened: list[Path] = []
    inner = Path.open

    def counted(self: Path, *arguments: Any, **options: Any) -> Any:
        opened.append(self)
        return inner(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", counted)
    most = []
    for images, objects in ((6, 1), (60, 6)):
        opened.clear()
        root = _write(tmp_path / str(images), _content(images=images, objects=objects))
        opened.clear()
        _kinds(root)
        most.append(max(Counter(path for path in opened if path.suffix == ".png").values(), default=0))
    assert 1 <= max(most) <= 3  # the ends of the file, its first bytes, and all of it where those are another's too


def test_a_missing_folder_is_refused_without_looking_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module.os, "walk", lambda *_, **__: pytest.fail("walks through the folder above"))
    with pytest.raises(DataError, match="no such folder"):
        check_before_training(Config(data=DataConfig(root=str(tmp_path / "nope"))))
