"""Data sets as people bring them: read right, refused by name, or read with a word about what is left out.

Right means that each box covers its object in the picture; ``brought.on_their_objects`` counts.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import brought
from brought import NAMES, SPLITS
from cascade_rcnn.check.dataset import check_dataset
from cascade_rcnn.check.fix import fix_dataset
from cascade_rcnn.data.formats.open import disjoint_splits, open_split, splits
from cascade_rcnn.data.masks import segmentation_area
from cascade_rcnn.data.rle import encode_rle
from cascade_rcnn.errors import DataError


def _kinds(root: Path, split: str = "train") -> set[str]:
    return {problem.kind for problem in open_split(root, split, strict=False).problems}


def _all_right(root: Path, *, train: int = 6, val: int = 4) -> None:
    """The splits train and val, by the words of a training, hold all objects, and each box covers its own."""
    for name, count in (("train", train), ("val", val)):
        if count:
            assert brought.on_their_objects(open_split(root, name)) == (count, count), name


# Image names


def _rename(how: Callable[[str, str], str]) -> Callable[[Path], Path]:
    def build(root: Path) -> Path:
        for split, seeds in SPLITS.items():
            content = brought.coco(root / split, seeds)
            for image in content["images"]:
                image["file_name"] = how(split, image["file_name"])
            brought.write_json(root / "annotations" / f"instances_{split}.json", content)
        return root

    return build


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        (lambda split, name: f"{split}\\{name}", ""),
        (lambda split, name: f"../{split}/{name}", ""),
        (lambda split, name: f"C:\\Users\\me\\set\\{split}\\{name}", "image-name"),
        (lambda split, name: f"/home/me/export/{name}", "image-name"),
        (lambda split, name: f"https://host/bucket/{split}/{name}?d=1".removesuffix("?d=1"), "image-name"),
        (lambda split, name: name.upper(), "image-name"),
        (lambda split, name: name.replace(".jpg", ".png"), "image-elsewhere"),
        (lambda split, name: name.replace(".jpg", ""), "image-elsewhere"),
    ],
)
def test_image_names_of_other_machines_are_found_and_said(how: Any, kind: str, tmp_path: Path) -> None:
    root = _rename(how)(tmp_path)
    _all_right(root)
    assert _kinds(root) == ({kind} if kind else set())


@pytest.mark.parametrize("place", ["beside", "inside", "above"])
def test_absolute_names_inside_the_folder_are_read_wherever_one_stands(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = _rename(lambda split, name: str(tmp_path / "set" / split / name))(tmp_path / "set")
    monkeypatch.chdir({"beside": tmp_path, "inside": root, "above": root / "train"}[place])
    relative = Path({"beside": "set", "inside": ".", "above": ".."}[place])
    _all_right(relative)
    assert _kinds(relative) == set()


def test_decomposed_letters_are_the_same_name(tmp_path: Path) -> None:
    root = _rename(lambda _, name: unicodedata.normalize("NFD", f"é{name}"))(tmp_path)
    for path in list(root.glob("*/*.jpg")):
        path.rename(path.with_name(unicodedata.normalize("NFC", f"é{path.name}")))
    _all_right(root)


def _count_names(content: dict[str, Any]) -> None:
    for number, image in enumerate(content["images"]):
        image["file_name"] = f"{number}.jpg"


def test_another_split_s_picture_of_the_same_name_is_never_taken(tmp_path: Path) -> None:
    root = brought.coco_set(
        tmp_path, lambda content: [image.update(file_name=f"{n}.jpg") for n, image in enumerate(content["images"])]
    )
    for path in list(root.glob("train/*.jpg")):
        path.rename(path.with_name(f"{int(path.stem) - 1}.jpg"))
    for path in root.glob("val/*"):
        path.unlink()
    assert not any(record.path.is_file() for record in open_split(root, "val").records)
    assert "no-images" in check_dataset(root).counts


def test_a_picture_is_not_given_to_two_names_and_a_mask_file_is_no_picture(tmp_path: Path) -> None:
    root = _rename(lambda split, name: f"cam{int(name[:3]) % 2}/001.jpg")(tmp_path)
    assert not any(record.path.is_file() for record in open_split(root, "train").records)
    root = brought.coco_set(tmp_path / "masks")
    (root / "masks").mkdir()
    for path in list(root.glob("train/*.jpg")):
        path.rename(root / "masks" / path.with_suffix(".png").name)
    assert not any(record.path.is_file() for record in open_split(root, "train").records)


def test_another_size_is_another_picture(tmp_path: Path) -> None:
    root = _rename(lambda split, name: name.replace(".jpg", ".png"))(tmp_path)
    path = root / "annotations" / "instances_train.json"
    path.write_text(path.read_text().replace('"width": 160', '"width": 161'))
    assert not any(record.path.is_file() for record in open_split(root, "train").records)


@pytest.mark.parametrize("folders", [("pictures", "pictures"), ("train_images", "val_images"), ("a/b", "c")])
def test_picture_folders_of_any_name_are_found_and_said(folders: tuple[str, str], tmp_path: Path) -> None:
    for (split, seeds), folder in zip(SPLITS.items(), folders):
        brought.write_json(tmp_path / f"{split}.json", brought.coco(tmp_path / folder, seeds))
    _all_right(tmp_path)
    assert _kinds(tmp_path) == {"image-elsewhere"}


# Numbers, flags, ids, masks of COCO


def _annotations(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    def apply(content: dict[str, Any]) -> None:
        for entry in content["annotations"]:
            change(entry)

    return apply


def _ids_as(kind: Callable[[int], Any]) -> Callable[[dict[str, Any]], None]:
    def apply(content: dict[str, Any]) -> None:
        for entry in content["annotations"]:
            entry.update(image_id=kind(entry["image_id"]), category_id=kind(entry["category_id"]))
        for entry in content["images"] + content["categories"]:
            entry["id"] = kind(entry["id"])

    return apply


def _points(entry: dict[str, Any]) -> list[list[float]]:
    values = entry["segmentation"][0]
    return [list(point) for point in zip(values[::2], values[1::2])]


def _rle(entry: dict[str, Any]) -> dict[str, Any]:
    x, y, wide, high = entry["bbox"]
    mask = np.zeros((brought.HEIGHT, brought.WIDTH), bool)
    mask[y : y + high, x : x + wide] = True
    return encode_rle(mask)


def _halves(entry: dict[str, Any]) -> list[dict[str, Any]]:
    x, y, wide, high = entry["bbox"]
    return [_rle({"bbox": [x, y, wide, high // 2]}), _rle({"bbox": [x, y + high // 2, wide, high - high // 2]})]


@pytest.mark.parametrize(
    "change",
    [
        _ids_as(float),
        _ids_as(str),
        _annotations(
            lambda entry: entry.update(image_id=str(entry["image_id"]), category_id=str(entry["category_id"]))
        ),
        lambda content: [image.update(id=str(image["id"])) for image in content["images"]],
        lambda content: [image.update(width=160.0, height="120") for image in content["images"]],
        _annotations(lambda entry: entry.update(iscrowd="0", ignore="false")),
        _annotations(lambda entry: entry.update(iscrowd="False", ignore="0.0")),
        _annotations(lambda entry: entry.update(iscrowd=0.0, ignore=None)),
        _annotations(lambda entry: entry.update(bbox=[str(value) for value in entry["bbox"]])),
        _annotations(lambda entry: entry.pop("bbox")),
        _annotations(lambda entry: entry.update(bbox=[])),
        _annotations(lambda entry: entry.update(bbox=[0, 0, 0, 0])),
    ],
)
def test_numbers_flags_and_ids_are_read_as_they_are_meant(change: Any, tmp_path: Path) -> None:
    root = brought.coco_set(tmp_path, change)
    _all_right(root)
    assert open_split(root, "train").class_names == NAMES


@pytest.mark.parametrize(
    "mask",
    [
        _points,
        lambda entry: [_points(entry)],
        lambda entry: [entry["segmentation"]],
        lambda entry: entry["segmentation"][0],
        _rle,
        lambda entry: [_rle(entry)],
        _halves,
        lambda entry: _rle(entry) | {"counts": [float(run) for run in _rle(entry)["counts"]], "size": [120.0, 160.0]},
    ],
)
def test_masks_in_every_spelling_keep_their_area(mask: Any, tmp_path: Path) -> None:
    root = brought.coco_set(tmp_path, _annotations(lambda entry: entry.update(segmentation=mask(entry))))
    split = open_split(root, "train")
    assert split.has_masks and split.problems == []
    for record in split.records:
        areas = [segmentation_area(segmentation) for segmentation in record.segmentations or ()]
        np.testing.assert_allclose(areas, (record.boxes[:, 2:] - record.boxes[:, :2]).prod(axis=1))


def test_only_crowds_of_a_true_flag_are_ignored_and_odd_flags_refused(tmp_path: Path) -> None:
    def half(content: dict[str, Any]) -> None:
        content["annotations"][0]["iscrowd"] = "1"

    assert [int(record.ignore.sum()) for record in open_split(brought.coco_set(tmp_path, half), "train").records] == [
        1,
        0,
        0,
    ]
    root = brought.coco_set(tmp_path / "odd", _annotations(lambda entry: entry.update(iscrowd="maybe")))
    with pytest.raises(DataError, match=r"^[^;]*annotations\[0\]: iscrowd 'maybe' is neither 0 nor 1; write 0 or 1"):
        open_split(root, "train")


@pytest.mark.parametrize("names", [("cat",), ("cat", "dog")])
def test_roboflow_s_project_may_be_called_as_its_class(names: tuple[str, ...], tmp_path: Path) -> None:
    for split, seeds in SPLITS.items():
        content = brought.coco(tmp_path / split, seeds)
        content["categories"] = [{"id": 0, "name": "cat", "supercategory": "none"}]
        content["categories"] += [{"id": n + 1, "name": name, "supercategory": "cat"} for n, name in enumerate(names)]
        content["annotations"] = [one for one in content["annotations"] if one["category_id"] <= len(names)]
        brought.write_json(tmp_path / split / "_annotations.coco.json", content)
    split_read = open_split(tmp_path, "train")
    assert split_read.class_names == names and brought.on_their_objects(split_read) == (3 * len(names),) * 2
    fix_dataset([split_read], tmp_path / "out")
    assert brought.on_their_objects(open_split(tmp_path / "out", "train")) == (3 * len(names),) * 2


def test_a_repeated_class_name_is_refused_and_the_repair_keeps_its_objects(tmp_path: Path) -> None:
    def repeat(content: dict[str, Any]) -> None:
        content["categories"].append({"id": 9, "name": "cat"})
        content["annotations"][0].update(category_id=9 if content["annotations"][0]["category_id"] == 1 else 2)

    root = brought.coco_set(tmp_path, repeat)
    with pytest.raises(DataError, match=r"category 9 'cat' is listed twice, first with id 1"):
        open_split(root, "train")
    assert brought.on_their_objects(open_split(root, "train", strict=False)) == (6, 6)


# Splits


def _voc_folders(images: str, annotations: str) -> Callable[[Path], Path]:
    return lambda root: brought.voc_set(root, images=images, annotations=annotations, lists=False)


def _side_by_side(write: Callable[[Path, str, tuple[int, ...]], Any]) -> Callable[[Path], Path]:
    def build(root: Path) -> Path:
        for split, seeds in SPLITS.items():
            write(root / split, split, seeds)
        return root

    return build


def _coco_export(folder: Path, _: str, seeds: tuple[int, ...]) -> None:
    brought.write_json(
        folder / "annotations" / "instances_default.json", brought.coco(folder / "images" / "default", seeds)
    )


def _label_studio_export(folder: Path, _: str, seeds: tuple[int, ...]) -> None:
    content = brought.coco(folder / "images", seeds)
    for image in content["images"]:
        image["file_name"] = "images\\" + image["file_name"]
    brought.write_json(folder / "result.json", content)


def _voc_export(folder: Path, _: str, seeds: tuple[int, ...]) -> None:
    for seed in seeds:
        brought.save_picture(folder / "JPEGImages" / f"{seed:03d}.jpg", seed)
        (folder / "Annotations").mkdir(exist_ok=True)
        (folder / "Annotations" / f"{seed:03d}.xml").write_text(brought.voc_xml(seed))
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "ImageSets" / "Main" / "default.txt").write_text("".join(f"{seed:03d}\n" for seed in seeds))


def _yolo_export(folder: Path, split: str, seeds: tuple[int, ...]) -> None:
    """The lists of classes differ in their order: labels have to be read by each own."""
    names = NAMES if split == "train" else NAMES[::-1]
    for seed in seeds:
        brought.save_picture(folder / "images" / f"{seed:03d}.jpg", seed)
        (folder / "labels").mkdir(exist_ok=True)
        rows = [brought.centred(names.index(NAMES[label]), *box) for label, *box in brought.yolo_box(seed)]
        (folder / "labels" / f"{seed:03d}.txt").write_text("\n".join(rows))
    (folder / "classes.txt").write_text("\n".join(names))


def _labelme_export(folder: Path, _: str, seeds: tuple[int, ...]) -> None:
    for seed in seeds:
        brought.save_picture(folder / f"{seed:03d}.jpg", seed)
        brought.labelme_json(folder / f"{seed:03d}.json", seed, f"{seed:03d}.jpg")


def _cvat_export(folder: Path, _: str, seeds: tuple[int, ...]) -> None:
    for seed in seeds:
        brought.save_picture(folder / "images" / f"{seed:03d}.jpg", seed)
    (folder / "annotations.xml").write_text(brought.cvat_xml(seeds))


def _cvat_lists(root: Path) -> Path:
    brought.yolo_set(root, yaml=None, images="obj_{split}_data", labels="obj_{split}_data")
    (root / "obj.names").write_text("cat\ndog\n")
    for split, file in (("train", "train.txt"), ("val", "valid.txt")):
        (root / file).write_text("".join(f"data/obj_{split}_data/{seed:03d}.jpg\n" for seed in SPLITS[split]))
    return root


def _subsets(root: Path) -> Path:
    text = ""
    for split, subset in (("train", "Train"), ("val", "Validation")):
        for seed in SPLITS[split]:
            brought.save_picture(root / "images" / subset / f"{seed:03d}.jpg", seed)
        one = brought.cvat_xml(SPLITS[split], more=f'subset="{subset}"')
        text = one if not text else text.replace("</annotations>", one[one.index("<image") :])
    (root / "annotations.xml").write_text(text)
    return root


_ROBOFLOW_YAML = "train: ../train/images\nval: ../valid/images\nnames: [cat, dog]\n"


def _lists_beside(root: Path) -> Path:
    for path in list((root / "ImageSets" / "Main").iterdir()):
        path.rename(root / path.name)
    return root


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "coco, json per folder": _side_by_side(
        lambda folder, split, seeds: brought.write_json(
            folder.parent / "annotations" / split / "labels.json", brought.coco(folder.parent / "images" / split, seeds)
        )
    ),
    "coco, longer names": _side_by_side(
        lambda folder, split, seeds: brought.write_json(
            folder.parent / f"my_{split}_set.json", brought.coco(folder.parent / "images" / split, seeds)
        )
    ),
    "voc train/images": _voc_folders("{split}/images", "{split}/annotations"),
    "voc images/train": _voc_folders("images/{split}", "annotations/{split}"),
    "voc together": _voc_folders("{split}", "{split}"),
    "voc nested": lambda root: brought.voc_set(
        root, images="JPEGImages/day1", annotations="Annotations/day1", line="day1/{name}"
    ),
    "voc lists with endings": lambda root: brought.voc_set(root, line="JPEGImages\\{name}.jpg"),
    "yolo, train/images": lambda root: brought.yolo_set(
        root,
        images="{split}/images",
        labels="{split}/labels",
        yaml=_ROBOFLOW_YAML,
    ),
    "yolo, another machine": lambda root: brought.yolo_set(
        root, yaml="path: C:/Users/me/set\ntrain: images/train\nval: images/val\nnames: [cat, dog]\n"
    ),
    "yolo lists of CVAT": _cvat_lists,
    "cvat subsets": _subsets,
    "coco exports": _side_by_side(_coco_export),
    "label studio exports": _side_by_side(_label_studio_export),
    "voc exports": _side_by_side(_voc_export),
    "yolo exports": _side_by_side(_yolo_export),
    "labelme exports": _side_by_side(_labelme_export),
    "exports of two formats": _side_by_side(
        lambda folder, split, seeds: (_coco_export if split == "train" else _voc_export)(folder, split, seeds)
    ),
    "exports in folders of their own": _side_by_side(
        lambda folder, split, seeds: _cvat_export(folder / "task_1_2026", split, seeds)
    ),
    "voc lists beside the folders": lambda root: _lists_beside(brought.voc_set(root)),
    "cvat exports": _side_by_side(_cvat_export),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_check_and_training_find_the_same_splits(layout: str, tmp_path: Path) -> None:
    root = LAYOUTS[layout](tmp_path / "set")
    _all_right(root)
    assert len(splits(root)) == 2
    for name in disjoint_splits(root):  # what check looks at
        assert len(open_split(root, name)) in (3, 2)
    assert len(open_split(root, "train")) == 3 and len(open_split(root, "val")) == 2


def test_small_sets_give_both_parts_an_image(tmp_path: Path) -> None:
    brought.write_json(tmp_path / "annotations" / "instances_all.json", brought.coco(tmp_path / "all", (1, 2, 3, 4)))
    train, val = (open_split(tmp_path, f"all:{part}") for part in ("0-90", "90-100"))
    assert (len(train), len(val)) == (3, 1) and not {r.path for r in train.records} & {r.path for r in val.records}
    with pytest.raises(DataError, match=r"part 92-95 of split 'all' holds none of its 4 images"):
        open_split(tmp_path, "all:92-95")


# Classes


def test_classes_of_splits_are_matched_by_name(tmp_path: Path) -> None:
    for (split, seeds), names in zip(SPLITS.items(), (NAMES, NAMES[::-1])):
        content = brought.coco(tmp_path / split, seeds, names=names)
        brought.write_json(tmp_path / "annotations" / f"instances_{split}.json", content)
    report = check_dataset(tmp_path)
    assert not report.refusals and "other-classes" in report.counts
    both = open_split(tmp_path, "train+val")
    assert both.class_names == NAMES and brought.on_their_objects(both) == (10, 10)


def test_a_class_that_training_lacks_is_refused_only_where_it_has_objects(tmp_path: Path) -> None:
    root = brought.coco_set(tmp_path)
    path = root / "annotations" / "instances_val.json"
    path.write_text(path.read_text().replace('"name": "dog"}', '"name": "dog"}, {"id": 5, "name": "owl"}'))
    assert not check_dataset(root).refusals
    path.write_text(path.read_text().replace('"category_id": 1', '"category_id": 5'))
    assert [problem.kind for problem in check_dataset(root).refusals] == ["different-classes"]
    assert "'owl' (2 objects)" in check_dataset(root).refusals[0].message


def test_class_names_that_differ_in_spelling_are_told(tmp_path: Path) -> None:
    root = brought.coco_set(tmp_path, lambda content: content["categories"].append({"id": 3, "name": "Cat "}))
    assert check_dataset(root).of("similar-classes")[0].message == "'Cat ' and 'cat'"


# YOLO's rows


def _pose(points: int, numbers: int) -> Callable[..., str]:
    def row(label: int, x: float, y: float, wide: float, high: float) -> str:
        random = np.random.default_rng(int(x * 1e6))
        text = brought.centred(label, x, y, wide, high)
        for _ in range(points):
            text += f" {x + wide * random.random():.6f} {y + high * random.random():.6f}" + " 2" * (numbers == 3)
        return text

    return row


@pytest.mark.parametrize(("points", "numbers"), [(12, 2), (4, 3), (17, 3)])
def test_pose_labels_give_boxes_and_without_kpt_shape_are_refused(points: int, numbers: int, tmp_path: Path) -> None:
    yaml = "train: images/train\nval: images/val\nnames: [cat, dog]\n"
    root = brought.yolo_set(tmp_path, _pose(points, numbers), yaml=f"{yaml}kpt_shape: [{points}, {numbers}]\n")
    _all_right(root)
    assert _kinds(root) == {"keypoints"} and not open_split(root, "train").has_masks
    (root / "data.yaml").write_text(yaml)
    with pytest.raises(DataError, match=r"kpt_shape: \[NUMBER OF POINTS"):
        open_split(root, "train")


def test_polygons_of_equal_length_in_the_middle_are_no_poses(tmp_path: Path) -> None:
    ring = [(math.cos(angle), math.sin(angle)) for angle in np.arange(8) * math.pi / 4]
    row = "0 " + " ".join(f"{0.5 + 0.1 * x:.4f} {0.5 + 0.1 * y:.4f}" for x, y in ring)
    root = brought.yolo_set(tmp_path, lambda *_: row)
    assert open_split(root, "train").has_masks and _kinds(root) == set()


def test_rotated_boxes_are_named_and_the_box_around_them_is_read(tmp_path: Path) -> None:
    root = brought.yolo_set(tmp_path, lambda c, x, y, w, h: f"{c} {x} {y} {x + w} {y} {x + w} {y + h} {x} {y + h}")
    _all_right(root)
    assert _kinds(root) == {"rotated-box"}


def test_corners_as_fractions_are_refused_and_repaired(tmp_path: Path) -> None:
    root = brought.yolo_set(tmp_path / "set", lambda c, x, y, w, h: f"{c} {x} {y} {x + w} {y + h}")
    with pytest.raises(DataError, match=r"many of 6 boxes leave their image.*--fix OUT` rewrites them"):
        open_split(root, "train")
    changes = fix_dataset([open_split(root, name, strict=False) for name in splits(root)], tmp_path / "out")
    assert len(changes) == 2 and all("rewritten (corner-fractions" in change for change in changes)
    _all_right(tmp_path / "out")


@pytest.mark.parametrize("first", [1, 10])
def test_class_numbers_may_begin_anywhere(first: int, tmp_path: Path) -> None:
    yaml = f"train: images/train\nval: images/val\nnames: {{{first}: cat, {first + 5}: dog}}\n"
    root = brought.yolo_set(tmp_path, lambda label, *box: brought.centred(first + 5 * label, *box), yaml=yaml)
    _all_right(root)
    assert open_split(root, "train").category_ids == (first, first + 5)


def test_a_data_file_of_any_name_is_found_and_two_are_asked_about(tmp_path: Path) -> None:
    root = brought.yolo_set(tmp_path)
    (root / "data.yaml").rename(root / "bees.yaml")
    _all_right(root)
    (root / "more.yaml").write_text((root / "bees.yaml").read_text())
    with pytest.raises(DataError, match=r"2 data files \(bees.yaml, more.yaml\); name one of them: --data .*bees.yaml"):
        open_split(root, "train")


def test_a_path_outside_the_folder_is_refused_with_a_remedy_that_works(tmp_path: Path) -> None:
    there = brought.yolo_set(tmp_path / "there", yaml=None)
    here = tmp_path / "here"
    here.mkdir()
    yaml = "path: ../there\ntrain: images/train\nval: images/val\nnames: [cat, dog]\n"
    (here / "data.yaml").write_text(yaml)
    with pytest.raises(DataError, match=r"copy data.yaml into .*there and give that as --data"):
        open_split(here, "train")
    (there / "data.yaml").write_text(yaml)
    _all_right(there)


# What belongs to nothing


def test_yolo_s_orphans_are_counted(tmp_path: Path) -> None:
    root = brought.yolo_set(tmp_path)
    (root / "images" / "train" / "001.jpg").unlink()
    (root / "labels" / "train" / "002.txt").unlink()
    report = check_dataset(root)
    assert {kind: number for kind, number in report.counts.items() if "label" in kind} == {
        "orphan-label": 1,
        "unlabelled-image": 1,
    }
    assert report.has("error") and "001.txt" in report.of("orphan-label")[0].where
    assert "1 of 2 images have no label file" in report.of("unlabelled-image")[0].message


def _write_format(name: str, root: Path) -> tuple[Path, Path, Path]:
    """A set of one split, one of its pictures, one of its annotations (COCO: none)."""
    seeds = (1, 2, 3)
    if name == "coco":
        path = brought.write_json(root / "annotations" / "instances_train.json", brought.coco(root / "train", seeds))
        return root, root / "train" / "001.jpg", path
    if name == "voc":
        _voc_export(root, "train", seeds)
        (root / "ImageSets" / "Main" / "default.txt").unlink()
        return root, root / "JPEGImages" / "001.jpg", root / "Annotations" / "002.xml"
    if name == "labelme":
        _labelme_export(root, "train", seeds)
        return root, root / "001.jpg", root / "002.json"
    if name == "cvat":
        _cvat_export(root, "train", seeds)
        return root, root / "images" / "001.jpg", root / "annotations.xml"
    for seed in seeds:
        brought.save_picture(root / "training" / "image_2" / f"{seed:03d}.png", seed)
        rows = [f"{NAMES[c]} 0 0 0 {x} {y} {x + w} {y + h} 0 0 0 0 0 0 0\n" for c, x, y, w, h in brought.objects(seed)]
        (root / "training" / "label_2").mkdir(exist_ok=True)
        (root / "training" / "label_2" / f"{seed:03d}.txt").write_text("".join(rows))
    return root, root / "training" / "image_2" / "001.png", root / "training" / "label_2" / "002.txt"


@pytest.mark.parametrize("name", ["coco", "voc", "kitti", "labelme", "cvat"])
def test_vanished_pictures_and_pictures_without_annotation_are_counted(name: str, tmp_path: Path) -> None:
    root, picture, annotation = _write_format(name, tmp_path / "set")
    split = splits(root)[-1]  # KITTI's trainval
    assert brought.on_their_objects(open_split(root, split)) == (6, 6)
    brought.save_picture(picture.with_name("extra" + picture.suffix), 9)
    picture.unlink()
    if name not in ("coco", "cvat"):
        annotation.unlink()
    counts = Counter(problem.kind for problem in check_dataset(root, split=split).problems)
    assert counts["missing-image"] == 1 and counts["unlabelled-image"] + counts["unlisted-image"] == 1


def test_pictures_of_a_split_that_is_not_checked_are_not_called_unlabelled(tmp_path: Path) -> None:
    for name, seeds in (("train", (1, 2)), ("val", (3,)), ("test", (4,))):
        content = brought.coco(tmp_path / "images", seeds)
        brought.write_json(tmp_path / "annotations" / f"instances_{name}.json", content)
    assert "unlabelled-image" not in check_dataset(tmp_path, split="train,val").counts
    brought.save_picture(tmp_path / "images" / "extra.jpg", 9)
    found = check_dataset(tmp_path, split="train,val").of("unlabelled-image")
    assert [problem.message.split(" images")[0] for problem in found] == ["1 of 5"]


def test_files_of_other_endings_are_pictures_too(tmp_path: Path) -> None:
    root = brought.yolo_set(tmp_path)
    for path, ending in zip(sorted(root.glob("images/train/*.jpg")), (".jfif", ".JPEG", ".jpe")):
        path.rename(path.with_suffix(ending))
    _all_right(root)


@pytest.mark.parametrize("subs", [("cam1/day1", "cam2/day1"), ("", "cam2")])
def test_pictures_in_folders_of_any_depth_are_read(subs: tuple[str, str], tmp_path: Path) -> None:
    root = brought.yolo_set(tmp_path)
    for kind in ("images", "labels"):
        for path in list(root.glob(f"{kind}/*/*.*")):
            target = path.parent / subs[int(path.stem) % 2] / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
    _all_right(root)


# VOC's codings


def _fractions(x: float, y: float, wide: float, high: float) -> str:
    left, top, right, bottom = x / 160, y / 120, (x + wide) / 160, (y + high) / 120
    return f"<bndbox><xmin>{left}</xmin><ymin>{top}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox>"


def _xywh(x: float, y: float, wide: float, high: float) -> str:
    return f"<bndbox><xmin>{x}</xmin><ymin>{y}</ymin><xmax>{wide}</xmax><ymax>{high}</ymax></bndbox>"


@pytest.mark.parametrize(("corners", "kind"), [(_fractions, "relative-boxes"), (_xywh, "xywh-as-corners")])
def test_voc_boxes_of_another_coding_are_refused_and_repaired(corners: Any, kind: str, tmp_path: Path) -> None:
    root = brought.voc_set(tmp_path / "set", corners=corners)
    with pytest.raises(DataError, match="--fix OUT` rewrites them"):
        open_split(root, "train")
    assert kind in check_dataset(root).counts
    fix_dataset([open_split(root, name, strict=False) for name in splits(root)], tmp_path / "out")
    _all_right(tmp_path / "out")


def _polygon(x: float, y: float, wide: float, high: float) -> str:
    points = [(x, y), (x + wide, y), (x + wide, y + high), (x, y + high)]
    return (
        "<polygon>" + "".join(f"<x{n}>{a}</x{n}><y{n}>{b}</y{n}>" for n, (a, b) in enumerate(points, 1)) + "</polygon>"
    )


def _turned(x: float, y: float, wide: float, high: float) -> str:
    """roLabelImg: the sides exchanged and turned by a right angle."""
    centre = f"<cx>{x + wide / 2}</cx><cy>{y + high / 2}</cy>"
    return f"<robndbox>{centre}<w>{high}</w><h>{wide}</h><angle>{math.pi / 2}</angle></robndbox>"


@pytest.mark.parametrize(("corners", "kind"), [(_polygon, "box-from-mask"), (_turned, "rotated-box")])
def test_voc_objects_without_bndbox_take_it_from_their_shape(corners: Any, kind: str, tmp_path: Path) -> None:
    root = brought.voc_set(tmp_path, corners=corners)
    _all_right(root)
    assert _kinds(root) == {kind}


@pytest.mark.parametrize(("text", "ignored"), [("Unspecified", 0), ("true", 6), ("1.0", 6), ("", 0)])
def test_voc_s_difficult_may_be_a_word(text: str, ignored: int, tmp_path: Path) -> None:
    root = brought.voc_set(tmp_path, flags=f"<difficult>{text}</difficult>")
    assert sum(int(record.ignore.sum()) for record in open_split(root, "train").records) == ignored


def test_voc_pictures_are_found_by_filename_where_the_xml_is_called_otherwise(tmp_path: Path) -> None:
    root = brought.voc_set(tmp_path, lists=False)
    for path in list(root.glob("Annotations/*.xml")):
        path.rename(path.with_name(f"ann_{path.name}"))
    assert brought.on_their_objects(open_split(root, "all")) == (10, 10)


@pytest.mark.parametrize(
    ("images", "annotations"), [("{split}_images", "{split}_annotations"), ("imgs-{split}", "{split}-xml")]
)
def test_voc_pictures_are_found_in_the_folder_of_the_same_split(images: str, annotations: str, tmp_path: Path) -> None:
    root = brought.voc_set(tmp_path, images=images, annotations=annotations, lists=False)
    for split, wanted in (("train", (6, 6)), ("val", (4, 4))):
        assert brought.on_their_objects(open_split(root, split)) == wanted
