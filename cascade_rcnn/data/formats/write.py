"""Writing a split as COCO json, VOC, YOLO txt or labelme: for ``convert-data``, ``check --fix`` and evaluation.

Pictures are hard-linked where source and destination share a file system, else linked by name, else copied. Those that
are marked to be turned (``ImageRecord.turn``) are written anew, upright.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from cascade_rcnn.data import files
from cascade_rcnn.data.formats.labelme import labelme_json, labelme_shapes
from cascade_rcnn.data.images import quiet_pillow, read_header
from cascade_rcnn.data.masks import segmentation_box
from cascade_rcnn.data.records import DataSplit, ImageRecord
from cascade_rcnn.errors import DataError
from cascade_rcnn.messages import printable


def coco_image_ids(split: DataSplit) -> list[int]:
    """Whole numbers that stand for the images in COCO's json: their own ids where they are such, else 1, 2, 3, ..."""
    ids = [record.image_id for record in split.records]
    if all(isinstance(image_id, int) for image_id in ids):
        return [int(image_id) for image_id in ids]
    return list(range(1, len(ids) + 1))


def coco_dict(
    split: DataSplit, *, names: Sequence[str] | None = None, image_ids: Sequence[int | str] | None = None
) -> dict[str, Any]:
    """A split of any format as COCO's object of images, annotations and categories.

    Ignore regions become crowds, which COCO's evaluation neither rewards nor punishes. ``names`` replaces the
    images' file names, ``image_ids`` the whole numbers of ``coco_image_ids``.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    used = Counter(number for record in split.records for number in record.attributes.get("ids", ()))
    keep_ids = bool(used) and max(used.values()) == 1 and all("ids" in record.attributes for record in split.records)
    for place, (record, image_id) in enumerate(zip(split.records, image_ids or coco_image_ids(split))):
        images.append(
            {
                "id": image_id,
                "file_name": names[place] if names else record.file_name,
                "height": record.height,
                "width": record.width,
            }
        )
        crowd = record.attributes.get("iscrowd", record.ignore)
        corners = record.boxes.astype(np.float64)
        boxes = np.c_[corners[:, :2], corners[:, 2:] - corners[:, :2]].tolist()
        for row, box in enumerate(boxes):
            entry: dict[str, Any] = {
                "id": int(record.attributes["ids"][row]) if keep_ids else len(annotations) + 1,
                "image_id": image_id,
                "category_id": split.category_ids[int(record.labels[row])],
                "bbox": box,
                "area": float(record.areas[row]),
                "iscrowd": int(crowd[row]),
            }
            if record.ignore[row] and not crowd[row]:
                entry["ignore"] = 1
            if record.segmentations is not None and record.segmentations[row]:
                entry["segmentation"] = record.segmentations[row]
            annotations.append(entry)
    categories = [{"id": number, "name": name} for number, name in zip(split.category_ids, split.class_names)]
    return {
        "info": {"description": f"{split.format} {split.name}"},
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }


def write_coco(split: DataSplit, out: Path) -> Counter[str]:
    """Writes ``annotations/instances_SPLIT.json`` and the pictures in ``SPLIT/``; counts how pictures were placed."""
    names = _new_names(split)
    folder = out / _word(split)
    counts = _place_images(split.records, [folder / name for name in names])
    _write(out / "annotations" / f"instances_{_word(split)}.json", json.dumps(coco_dict(split, names=names)) + "\n")
    return counts


def write_voc(split: DataSplit, out: Path) -> Counter[str]:
    """Writes ``Annotations/NAME.xml``, ``JPEGImages/`` and ``ImageSets/Main/SPLIT.txt``; ignore means difficult."""
    names = [name.replace("/", "_") for name in _new_names(split)]
    # all splits share one folder: a name that another split's picture has taken gets the split's name in front
    names = [
        f"{_word(split)}_{name}" if _is_taken(out / "JPEGImages" / name, record) else name
        for name, record in zip(names, split.records)
    ]
    stems = [Path(name).stem for name in names]
    counts = _place_images(split.records, [out / "JPEGImages" / name for name in names])
    for record, name, stem in zip(split.records, names, stems):
        root = ElementTree.Element("annotation")
        for key, text in (("folder", "JPEGImages"), ("filename", name)):
            ElementTree.SubElement(root, key).text = _xml_text(text)
        size = ElementTree.SubElement(root, "size")
        for key, number in (("width", record.width), ("height", record.height), ("depth", 3)):
            ElementTree.SubElement(size, key).text = str(number)
        for row, box in enumerate(record.boxes.tolist()):
            item = ElementTree.SubElement(root, "object")
            ElementTree.SubElement(item, "name").text = _xml_text(split.class_names[int(record.labels[row])])
            for key in ("truncated", "difficult"):
                value = record.ignore[row] if key == "difficult" else record.attributes.get(key, record.ignore * 0)[row]
                ElementTree.SubElement(item, key).text = str(int(value > 0))
            corners = ElementTree.SubElement(item, "bndbox")
            for key, number in zip(("xmin", "ymin", "xmax", "ymax"), (box[0] + 1, box[1] + 1, box[2], box[3])):
                ElementTree.SubElement(corners, key).text = _shortest(number)
        ElementTree.indent(root)
        _write(out / "Annotations" / f"{stem}.xml", ElementTree.tostring(root, encoding="unicode") + "\n")
    _write(out / "ImageSets" / "Main" / f"{_word(split)}.txt", "".join(f"{stem}\n" for stem in stems))
    counts["masks that VOC's boxes cannot hold"] = sum(
        1 for record in split.records for mask in record.segmentations or () if mask
    )
    return counts


def write_yolo(split: DataSplit, out: Path) -> Counter[str]:
    """Writes ``images/SPLIT/``, ``labels/SPLIT/NAME.txt``; masks of one polygon become polygons, others boxes."""
    names = [name.replace("/", "_") for name in _new_names(split)]
    counts = _place_images(split.records, [out / "images" / _word(split) / name for name in names])
    for record, name in zip(split.records, names):
        if not (record.height and record.width):
            raise DataError(
                f"{printable(record.path)}: no readable image and no size in the annotation; YOLO's "
                "fractions need it: complete the images first"
            )
        lines = []
        for row, box in enumerate(record.boxes.tolist()):
            if record.ignore[row]:
                counts["ignore regions that YOLO cannot hold, left out"] += 1
                continue
            mask = record.segmentations[row] if record.segmentations is not None else None
            if isinstance(mask, list) and len(mask) == 1:
                values = mask[0]
            else:
                counts["masks of several parts or run lengths, written as boxes"] += bool(mask)
                values = [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2, box[2] - box[0], box[3] - box[1]]
            fractions = [value / (record.height if place % 2 else record.width) for place, value in enumerate(values)]
            lines.append(" ".join([str(int(record.labels[row])), *map(_shortest, fractions)]) + "\n")
        _write((out / "labels" / _word(split) / name).with_suffix(".txt"), "".join(lines))
    return counts


def write_yolo_index(splits: Sequence[DataSplit], out: Path) -> None:
    """Writes ``data.yaml`` once all splits are there."""
    lines = [f"{json.dumps(_word(split))}: images/{_word(split)}\n" for split in splits]
    lines.append("names:\n")
    lines += [f"  {number}: {json.dumps(name)}\n" for number, name in enumerate(splits[0].class_names)]
    _write(out / "data.yaml", "".join(lines))


def write_labelme(split: DataSplit, out: Path) -> Counter[str]:
    """Writes ``SPLIT/NAME.json`` beside ``SPLIT/NAME.jpg``: polygons or bitmaps for masks, else rectangles.

    The parts of an object share a ``group_id``; ignore regions are marked as ``difficult``.
    """
    names = [name.replace("/", "_") for name in _new_names(split)]
    folder = out / _word(split)
    counts = _place_images(split.records, [folder / name for name in names])
    for record, name in zip(split.records, names):
        shapes: list[dict[str, Any]] = []
        for row, box in enumerate(record.boxes.tolist()):
            mask = record.segmentations[row] if record.segmentations is not None else None
            around = segmentation_box(mask)
            if around is not None and np.abs(around - record.boxes[row]).max() > 1:
                counts["boxes that differ from their masks, which alone labelme can hold"] += 1
            shapes += labelme_shapes(
                split.class_names[int(record.labels[row])], box, mask, group=row + 1, ignore=bool(record.ignore[row])
            )
        _write((folder / name).with_suffix(".json"), labelme_json(shapes, name, (record.height, record.width)))
    _write(out / "labels.txt", "".join(f"{name}\n" for name in split.class_names))
    return counts


def _word(split: DataSplit) -> str:
    """A split's name as a file name: train:0-90 becomes train_0-90."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in split.name)


def _new_names(split: DataSplit) -> list[str]:
    """File names below one folder: the data set's own where they are plain, else without folders if still unique."""
    own = [record.file_name.replace("\\", "/") for record in split.records]
    bare = [name.rsplit("/", 1)[-1] for name in own]
    plain = all(not name.startswith("/") and ".." not in name.split("/") for name in own)
    if plain and split.format == "coco":
        return own
    if len({Path(name).stem.lower() for name in bare}) == len(bare):
        return bare
    return [name.lstrip("/").replace("../", "") for name in own]


def _place_images(records: Sequence[ImageRecord], targets: Sequence[Path]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for record, target in zip(records, targets):
        target.parent.mkdir(parents=True, exist_ok=True)
        counts["images " + _place_image(record.path, target, record.turn)] += 1
    return counts


def _is_taken(target: Path, record: ImageRecord) -> bool:
    return target.exists() and files.is_file(record.path) and target.read_bytes() != record.path.read_bytes()


def _place_image(source: Path, target: Path, turn: int = 1) -> str:
    if not files.is_file(source):
        return "missing, not placed"
    source = source.resolve()
    if target.exists():
        return "already there"
    if turn != 1:
        _write_upright(source, target, turn)
        return "written upright"
    try:
        os.link(source, target)
        return "hard-linked"
    except OSError:
        pass
    try:
        target.symlink_to(source)
        return "linked by name"
    except OSError:
        shutil.copyfile(source, target)
        return "copied"


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LOSSLESS: dict[str, dict[str, Any]] = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}


def _write_upright(source: Path, target: Path, tag: int) -> None:
    """The picture turned by its orientation tag and without it, in its own format; JPEG loses one generation."""
    try:
        with quiet_pillow(), Image.open(source) as picture:
            kind = "JPEG" if picture.format == "MPO" else picture.format or "PNG"
            if read_header(source).deep and picture.mode[0] not in "IF":
                raise DataError(
                    f"{printable(source)}: 16-bit colour cannot be written upright without losing levels; turn it with "
                    "another program, then label or export it anew"
                )
            picture.load()  # a TIFF is turned by this already
            turned = picture if kind == "TIFF" else picture.transpose(_TURNS[tag])
            kept = {"icc_profile": picture.info["icc_profile"]} if picture.info.get("icc_profile") else {}
            turned.save(target, format=kind, **kept, **_LOSSLESS.get(kind, {}))
    except (OSError, ValueError, SyntaxError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{printable(source)}: cannot be written upright ({reason}); replace it") from None


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", errors="surrogateescape")


def _xml_text(text: str) -> str:
    return "".join(letter if letter.isprintable() or letter == " " else "?" for letter in text)


def _shortest(number: float) -> str:
    """The shortest decimal that reads back as the same number; whole numbers without a point."""
    return str(int(number)) if number == int(number) else repr(float(number))
