"""What each format says beyond boxes: layouts, conventions, attributes, refusals with file, place and reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import scenes
from cascade_rcnn.data.formats.open import open_split, recognise, splits
from cascade_rcnn.errors import DataError

# COCO


def _move(root: Path, *pairs: tuple[str, str]) -> Path:
    for source, target in pairs:
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        (root / source).rename(root / target)
    return root


@pytest.mark.parametrize(
    ("moves", "name"),
    [
        ((), "train"),
        (
            (("annotations/instances_train.json", "annotations/instances_train2017.json"), ("train", "train2017")),
            "train2017",
        ),
        ((("annotations/instances_train.json", "train/_annotations.coco.json"),), "train"),
        ((("annotations/instances_train.json", "instances_train.json"), ("train", "images")), "train"),
        ((("annotations/instances_train.json", "train.json"), ("train", "images/train")), "train"),
        ((("annotations/instances_train.json", "annotations/train.json"), ("train", "images")), "train"),
        ((("annotations/instances_train.json", "labels.json"), ("train", "data")), "labels"),
    ],
)
def test_coco_layouts(moves: tuple[tuple[str, str], ...], name: str, tmp_path: Path) -> None:
    root = _move(scenes.write_coco(tmp_path), *moves)
    scenes.write_text(root / "annotations" / "person_keypoints_train2017.json", '{"images": [], "annotations": []}')
    scenes.write_text(root / "results.json", '[{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}]')
    assert recognise(root) == "coco" and splits(root) == [name]
    split = open_split(root, "train" if name != "labels" else "all")
    assert [record.path.is_file() for record in split.records] == [True, True]
    assert split.truth is not None and split.truth.suffix == ".json"


def test_single_json_is_a_data_set(tmp_path: Path) -> None:
    root = _move(scenes.write_coco(tmp_path), ("annotations/instances_train.json", "mine.json"), ("train", "images"))
    assert splits(root / "mine.json") == ["mine"]
    for word in ("mine", "all", "mine:0-100"):
        assert len(open_split(root / "mine.json", word)) == 2
    with pytest.raises(DataError, match=r"--data.train mine:0-90"):
        open_split(root / "mine.json", "train")


def test_coco_keeps_ids_masks_and_crowds(tmp_path: Path) -> None:
    split = open_split(scenes.write_coco(tmp_path), "train")
    record = split.records[0]
    assert split.category_ids == (3,) and split.has_masks and record.image_id == 7
    assert record.attributes["ids"].tolist() == [1, 2] and record.attributes["iscrowd"].tolist() == [0, 1]
    assert record.segmentations == [row["segmentation"] for row in scenes.coco_content()["annotations"]]
    assert record.source.endswith("instances_train.json, images[0]")


def test_classes_stand_in_the_order_of_their_ids_and_roboflow_s_parent_is_no_class(tmp_path: Path) -> None:
    content = scenes.coco_content()
    content["categories"] = [
        {"id": 3, "name": "b", "supercategory": "cells"},
        {"id": 0, "name": "cells", "supercategory": "none"},
        {"id": 1, "name": "a", "supercategory": "cells"},
    ]
    split = open_split(scenes.write_coco(tmp_path, content), "train")
    assert split.class_names == ("a", "b") and split.category_ids == (1, 3)
    content["annotations"][0]["category_id"] = 0
    assert open_split(scenes.write_coco(tmp_path, content), "train").class_names == ("cells", "a", "b")


@pytest.mark.parametrize(
    ("table", "key", "value", "message"),
    [
        ("annotations", "category_id", 8, r"annotations\[0\]: category_id 8 is not in the list of categories \(3\)"),
        ("annotations", "bbox", [1, 2, 3], r"annotations\[0\]: bbox \[1, 2, 3\] where \[x, y, width, height\]"),
        ("annotations", "bbox", [1, 2, "3", 4], r"annotations\[0\]: bbox"),
        (
            "annotations",
            "segmentation",
            {"size": [64, 48], "counts": [3072]},
            r"annotations\[0\]: RLE of size \[64, 48\]",
        ),
        ("annotations", "segmentation", [[1, 2, 3, 4, 5]], r"annotations\[0\]: polygon of 5 numbers"),
        ("images", "id", 8, r"images\[1\]: image id 8 is used twice"),
        ("images", "file_name", "", r"images\[0\]: image name '' is not a name"),
        ("images", "height", -4, r"images\[0\]: height -4"),
        ("categories", "name", None, r"categories\[0\]: a category needs"),
    ],
)
def test_coco_refuses_with_file_place_and_reason(
    table: str, key: str, value: Any, message: str, tmp_path: Path
) -> None:
    content = scenes.coco_content()
    content[table][0][key] = value
    with pytest.raises(DataError, match=r"instances_train\.json, " + message):
        open_split(scenes.write_coco(tmp_path, content), "train")


def test_a_results_file_given_as_data_is_explained(tmp_path: Path) -> None:
    path = scenes.write_text(tmp_path / "results.json", "[]")
    with pytest.raises(DataError, match="a results file belongs to `score --results`"):
        open_split(path, "all")


def test_coco_sizes_come_from_the_header_where_the_json_has_none(tmp_path: Path) -> None:
    content = scenes.coco_content()
    for image in content["images"]:
        del image["height"], image["width"]
    records = open_split(scenes.write_coco(tmp_path, content), "train").records
    assert [(record.height, record.width) for record in records] == list(scenes.SIZES.values())


# VOC


def test_voc_counts_pixels_from_one_and_marks_difficult(tmp_path: Path) -> None:
    root = scenes.write_voc(tmp_path)
    text = scenes.voc_xml("a").replace("<difficult>1", "<truncated>1</truncated><difficult>1")
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    scenes.write_text(root / "Annotations" / "a.xml", text.replace("</object>", part + "</object>", 1))
    record = open_split(root, "train").records[0]
    assert record.boxes.tolist() == [list(scenes.OBJECT), list(scenes.IGNORED)]  # parts are no objects
    assert record.attributes["difficult"].tolist() == [0, 1] and record.attributes["truncated"].tolist() == [0, 1]
    assert record.image_id == "a" and record.file_name == "a.png"


def test_voc_years_join_and_bare_names_mean_all_years(tmp_path: Path) -> None:
    for year in ("2007", "2012"):
        root = scenes.write_voc(tmp_path / "VOCdevkit" / f"VOC{year}")
        _move(
            root,
            *(
                (f"{folder}/{name}{suffix}", f"{folder}/{year}_{name}{suffix}")
                for folder, suffix in (("Annotations", ".xml"), ("JPEGImages", ".png"))
                for name in "ab"
            ),
        )
        (root / "ImageSets" / "Main" / "train.txt").rename(root / "ImageSets" / "Main" / "trainval.txt")
        scenes.write_text(root / "ImageSets" / "Main" / "trainval.txt", f"{year}_a\n{year}_b\n")
        scenes.write_text(root / "ImageSets" / "Main" / "dog_trainval.txt", f"{year}_a  1\n{year}_b -1\n")
    for root in (tmp_path, tmp_path / "VOCdevkit"):
        assert splits(root) == ["2007_trainval", "2012_trainval"]
        names = [record.image_id for record in open_split(root, "2007_trainval+2012_trainval").records]
        assert names == ["2007_a", "2007_b", "2012_a", "2012_b"]
        assert [record.image_id for record in open_split(root, "trainval").records] == names
        one = open_split(root, "2012_trainval")
        assert len(one) == 2 and one.truth == tmp_path / "VOCdevkit" / "VOC2012"
    assert len(open_split(tmp_path / "VOCdevkit" / "VOC2007", "2007_trainval")) == 2


def test_voc_without_lists_is_one_split_to_hold_out_from(tmp_path: Path) -> None:
    root = scenes.write_voc(tmp_path)
    (root / "ImageSets" / "Main" / "train.txt").unlink()
    assert splits(root) == ["all"] and len(open_split(root, "all:0-50")) == 1
    with pytest.raises(DataError, match=r"--data.train all:0-90 --data.val all:90-100"):
        open_split(root, "train")


def test_voc_class_names_are_those_of_all_splits(tmp_path: Path) -> None:
    root = scenes.write_voc(tmp_path)
    text = scenes.voc_xml("a").replace("Pedestrian", "Car")
    scenes.write_text(root / "Annotations" / "c.xml", text)
    scenes.write_text(root / "ImageSets" / "Main" / "val.txt", "c\n")
    assert open_split(root, "train").class_names == open_split(root, "val").class_names == ("Car", "Pedestrian")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<ymax>25</ymax>", "", r"object 1: bndbox"),
        ("<ymax>25</ymax>", "<ymax>nan</ymax>", r"object 1: bndbox"),
        ("<name>Pedestrian</name>", "", "object 1: an object without a name"),
        ("</annotation>", "", "not usable XML"),
    ],
)
def test_voc_refuses_with_file_place_and_reason(old: str, new: str, message: str, tmp_path: Path) -> None:
    root = scenes.write_voc(tmp_path)
    scenes.write_text(root / "Annotations" / "a.xml", scenes.voc_xml("a").replace(old, new, 1))
    with pytest.raises(DataError, match=r"a\.xml.*" + message):
        open_split(root, "train")


def test_an_empty_box_is_left_out_and_named(tmp_path: Path) -> None:
    """As BCCD has two: xmin, ymin, xmax and ymax are 0."""
    root = scenes.write_voc(tmp_path)
    path = root / "Annotations" / "b.xml"
    empty = "<object><name>Pedestrian</name><bndbox>" + "".join(
        f"<{side}>0</{side}>" for side in ("xmin", "ymin", "xmax", "ymax")
    )
    path.write_text(path.read_text().replace("</annotation>", f"{empty}</bndbox></object></annotation>"))
    split = open_split(root, "train")
    assert [(problem.kind, Path(problem.where.split(",")[0]).stem) for problem in split.problems] == [
        ("empty-box", "b")
    ]
    assert [len(record.boxes) for record in split.records] == [2, 0]


# KITTI


def test_kitti_attributes_and_classes_in_kitti_s_order(tmp_path: Path) -> None:
    root = scenes.write_kitti(tmp_path)
    row = "0.30 2 0 1 2 9 9 0 0 0 0 0 0 0\n"
    scenes.write_text(root / "training" / "label_2" / "b.txt", f"Tram {row}Car {row}Zeppelin {row}")
    split = open_split(root, "train")
    assert split.class_names == ("Car", "Pedestrian", "Tram", "Zeppelin")
    record = split.records[1]
    assert record.labels.tolist() == [2, 0, 3] and record.attributes["truncated"].tolist() == [0.3] * 3
    assert record.attributes["occluded"].tolist() == [2] * 3
    assert split.records[0].attributes["dontcare"].tolist() == [0, 1] and split.truth == root / "training" / "label_2"


def test_kitti_without_lists_is_split_and_says_so(tmp_path: Path) -> None:
    root = scenes.write_kitti(tmp_path)
    (root / "ImageSets" / "train.txt").unlink()
    train, val = open_split(root, "train"), open_split(root, "val")
    assert [[record.image_id for record in split.records] for split in (train, val)] == [["a"], ["b"]]
    assert [problem.kind for problem in train.problems] == ["made-split"]
    assert len(open_split(root, "trainval")) == 2 and open_split(root, "trainval").problems == []


def test_kitti_lists_may_name_images_that_are_not_there(tmp_path: Path) -> None:
    root = scenes.write_kitti(tmp_path)
    scenes.write_text(root / "ImageSets" / "train.txt", "a\nb\nc\n")
    scenes.write_text(root / "ImageSets" / "test.txt", "a\n")
    split = open_split(root, "train")
    assert len(split) == 2 and [problem.kind for problem in split.problems] == ["missing-annotation"]
    assert "train.txt, line 3" in split.problems[0].where and splits(root) == ["train"]


def test_kitti_refuses_with_line(tmp_path: Path) -> None:
    root = scenes.write_kitti(tmp_path)
    with (root / "training" / "label_2" / "a.txt").open("a") as stream:
        stream.write("Car 0 0 0 1 2 3\n")
    with pytest.raises(DataError, match=r"a\.txt, line 3: 7 columns where KITTI has 15"):
        open_split(root, "train")


# CityPersons and WIDER FACE


def test_citypersons_keeps_visible_boxes_and_kinds_and_needs_no_images(tmp_path: Path) -> None:
    root = scenes.write_citypersons(tmp_path)
    for path in (root / "leftImg8bit").rglob("*.png"):
        path.unlink()
    split = open_split(root, "train")
    record = split.records[0]
    assert record.attributes["visible_boxes"].tolist() == [list(scenes.OBJECT), list(scenes.IGNORED)]
    assert record.attributes["kind"].tolist() == [1, 0] and (record.height, record.width) == (1024, 2048)
    assert [record.image_id for record in split.records] == [1, 2]
    assert record.path == root / "leftImg8bit" / "train" / "ulm" / "a.png"


def _as_cityscapes_json(root: Path) -> None:
    """The annotations of ``write_citypersons`` as Cityscapes hands them out, in place of the .mat file."""
    (root / "annotations" / "anno_train.mat").unlink()
    folder = root / "gtBboxCityPersons" / "train" / "ulm"
    folder.mkdir(parents=True)
    labelled = {"a": [("pedestrian", scenes.OBJECT), ("ignore", scenes.IGNORED)], "b": []}
    for name, rows in labelled.items():
        boxes = [(label, [*box[:2], box[2] - box[0], box[3] - box[1]]) for label, box in rows]
        objects = [{"label": label, "bbox": box, "bboxVis": box, "instanceId": 1} for label, box in boxes]
        (folder / f"{name}_gtBboxCityPersons.json").write_text(json.dumps({"objects": objects}))
        image = root / "leftImg8bit" / "train" / "ulm" / f"{name}.png"
        image.rename(image.with_name(f"{name}_leftImg8bit.png"))


def test_citypersons_json_files_equal_the_matlab_file(tmp_path: Path) -> None:
    root = scenes.write_citypersons(tmp_path)
    want = open_split(root, "train").records
    _as_cityscapes_json(root)
    assert recognise(root) == "citypersons" and splits(root) == ["train"]
    for record, other in zip(open_split(root, "train").records, want, strict=True):
        assert record.path.is_file() and record.image_id == other.image_id
        assert record.boxes.tolist() == other.boxes.tolist() and record.ignore.tolist() == other.ignore.tolist()
        assert record.attributes["visible_boxes"].tolist() == other.attributes["visible_boxes"].tolist()


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ([{"label": "bus", "bbox": [1, 2, 3, 4], "bboxVis": [1, 2, 3, 4]}], "label 'bus' is none of"),
        ([{"label": "rider", "bbox": [1, 2, 3], "bboxVis": [1, 2, 3, 4]}], "bboxVis of four numbers"),
        ({}, "no list of objects"),
    ],
)
def test_citypersons_json_that_cannot_be_read_is_refused(tmp_path: Path, objects: Any, message: str) -> None:
    root = scenes.write_citypersons(tmp_path)
    _as_cityscapes_json(root)
    path = root / "gtBboxCityPersons" / "train" / "ulm" / "a_gtBboxCityPersons.json"
    path.write_text(json.dumps({"objects": objects}))
    with pytest.raises(DataError, match=message) as caught:
        open_split(root, "train")
    assert path.name in str(caught.value)


def test_citypersons_classes_beyond_its_six_are_told(tmp_path: Path) -> None:
    import scipy.io

    root = scenes.write_citypersons(tmp_path)
    path = root / "annotations" / "anno_train.mat"
    cells = scipy.io.loadmat(str(path))["anno_train_aligned"]
    cells[0, 0]["bbs"][0, 0][0, 0] = 6
    scipy.io.savemat(str(path), {"anno_train_aligned": cells, "made_by": "a script"})  # further variables are no harm
    with pytest.raises(DataError, match="class 6 is none of CityPersons' 0 to 5"):
        open_split(root, "train")


def test_widerface_matlab_file_equals_the_text_file(tmp_path: Path) -> None:
    import scipy.io

    root = scenes.write_widerface(tmp_path)
    text = open_split(root, "train")
    (root / "wider_face_split" / "wider_face_train_bbx_gt.txt").unlink()

    def cells(*values: Any) -> Any:
        table = np.empty((len(values), 1), dtype=object)
        table[:, 0] = values
        return table

    boxes = np.array([[*box[:2], box[2] - box[0], box[3] - box[1]] for box in (scenes.OBJECT, scenes.IGNORED)])
    scipy.io.savemat(
        str(root / "wider_face_split" / "wider_face_train.mat"),
        {
            "event_list": cells("0--Parade"),
            "file_list": cells(cells("a", "b")),
            "face_bbx_list": cells(cells(boxes, np.zeros((0, 4)))),
            "invalid_label_list": cells(cells(np.array([[0], [1]]), np.zeros((0, 1)))),
        },
    )
    matlab = open_split(root, "train")
    assert len(matlab) == 2
    for one, other in zip(text.records, matlab.records):
        np.testing.assert_array_equal(one.boxes, other.boxes)
        np.testing.assert_array_equal(one.ignore, other.ignore)
        assert one.image_id == other.image_id.removesuffix(".jpg")


def test_widerface_refuses_with_line(tmp_path: Path) -> None:
    root = scenes.write_widerface(tmp_path)
    path = root / "wider_face_split" / "wider_face_train_bbx_gt.txt"
    path.write_text(path.read_text().replace("\n2\n", "\n3\n"))
    with pytest.raises(DataError, match=r"bbx_gt\.txt, line 5: no row of 10 numbers, where 3 faces of '0--Par"):
        open_split(root, "train")


# YOLO


def test_yolo_polygons_are_masks(tmp_path: Path) -> None:
    root = scenes.write_yolo(tmp_path)
    scenes.write_text(root / "labels" / "train" / "b.txt", "0 0.25 0.25 0.75 0.25 0.5 0.75\n0 0.5 0.5 0.5 0.5\n")
    split = open_split(root, "train")
    assert split.has_masks and split.records[0].segmentations == [None]
    record = split.records[1]
    assert record.segmentations == [[[10, 10, 30, 10, 20, 30]], None]
    np.testing.assert_allclose(record.boxes, [[10, 10, 30, 30], [10, 10, 30, 30]])


@pytest.mark.parametrize(
    "yaml",
    [
        "train: ../train/images\nval: ../valid/images\nnc: 1\nnames: ['Pedestrian']\n",  # as Roboflow writes it
        "path: .\ntrain: [train/images]\nnames: {0: Pedestrian}\n",
        "train: train.txt\nnames:\n- Pedestrian\n",
    ],
)
def test_yolo_splits_as_exporters_write_them(yaml: str, tmp_path: Path) -> None:
    root = _move(scenes.write_yolo(tmp_path), ("images/train", "train/images"), ("labels/train", "train/labels"))
    (root / "valid" / "images").mkdir(parents=True)
    scenes.write_text(root / "train.txt", "./train/images/a.png\n./train/images/b.png\n")
    scenes.write_text(root / "data.yaml", yaml)
    split = open_split(root, "train")
    assert len(split) == 2 and sum(len(record.boxes) for record in split.records) == 1


def test_yolo_without_yaml_takes_names_from_classes_txt(tmp_path: Path) -> None:
    root = scenes.write_yolo(tmp_path)
    (root / "data.yaml").unlink()
    scenes.write_text(root / "classes.txt", "Pedestrian\nCar\n")
    assert open_split(root, "train").class_names == ("Pedestrian", "Car")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 0.5 0.5 0.1 0.1", "class '1' of 1 named classes"),
        ("0 0.5 0.5 0.1", "4 numbers; a box has 5"),
        ("0 0.5 0.5 0.1 0.1 0.1", "6 numbers"),
        ("0 32 24 10 10", "pixels, where fractions"),
        ("0 0.5 nan 0.1 0.1", "'0 0.5 nan 0.1 0.1'"),
    ],
)
def test_yolo_refuses_with_file_line_and_reason(line: str, message: str, tmp_path: Path) -> None:
    root = scenes.write_yolo(tmp_path)
    scenes.write_text(root / "labels" / "train" / "a.txt", f"0 0.5 0.5 0.1 0.1\n{line}\n")
    with pytest.raises(DataError, match=r"a\.txt, line 2: .*" + message):
        open_split(root, "train")
