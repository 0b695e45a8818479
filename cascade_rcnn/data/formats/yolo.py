"""YOLO txt: one text file per image, a line per object, coordinates as fractions of the image.

``class cx cy width height`` is a box, ``class x1 y1 x2 y2 x3 y3 ...`` a polygon. Names and splits come from
``data.yaml``; without it names come from ``classes.txt`` and splits from the folders (``images/train``,
``train/images``). The text file of ``images/a.jpg`` is ``labels/a.txt``, or ``a.txt`` beside the picture.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cascade_rcnn.data import files
from cascade_rcnn.data.images import image_size
from cascade_rcnn.data.problems import Problems
from cascade_rcnn.data.records import DataSplit, ImageRecord, Segmentation
from cascade_rcnn.errors import DataError
from cascade_rcnn.messages import printable, shown

_YAML = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
_NAMES = ("classes.txt", "obj.names", "_darknet.labels")
_SPLITS = ("train", "training", "val", "valid", "validation", "test")


@dataclass(slots=True)
class _Layout:
    names: tuple[str, ...]
    splits: dict[str, list[Path]]  # folders of images or text files that list images


def yolo_splits(root: Path) -> list[str]:
    """Names of the splits of a YOLO data set; none where the folder is none."""
    if _yaml_file(root) is None and _names_file(root) is None:
        return []
    return list(_layout(root).splits)


def _yaml_file(root: Path) -> Path | None:
    if root.suffix in (".yaml", ".yml") and files.is_file(root):
        return root
    return next((root / name for name in _YAML if files.is_file(root / name)), None)


def _names_file(root: Path) -> Path | None:
    folders = (root, root / "labels", root / "train", root / "train" / "labels", root / "labels" / "train")
    return next((folder / name for folder in folders for name in _NAMES if files.is_file(folder / name)), None)


def _layout(root: Path) -> _Layout:
    if path := _yaml_file(root):
        return _read_yaml(path)
    path = _names_file(root)
    if path is None:
        raise DataError(f"{printable(root)}: neither data.yaml nor classes.txt; this is not YOLO's layout")
    names = tuple(line.strip() for line in files.read_lines(path) if line.strip())
    return _Layout(names, _folder_splits(root))


def _folder_splits(root: Path) -> dict[str, list[Path]]:
    splits = {}
    for name in _SPLITS:
        for folder in (root / "images" / name, root / name / "images", root / name):
            if files.list_files(folder):
                splits[name] = [folder]
                break
    rest = next((folder for folder in (root / "images", root) if files.list_files(folder)), root)
    return splits or {"all": [rest]}


def _read_yaml(path: Path) -> _Layout:
    import yaml  # type: ignore[import-untyped,unused-ignore]  # comes with timm's hub client

    text = "\n".join(files.read_lines(path)).encode("utf-8", "replace").decode("utf-8")
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ValueError("aliases, which can expand without end, are refused")
        # the base loader makes no objects and keeps words as words: a class may be called no, or 2
        content: Any = yaml.load(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{printable(path)}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise DataError(f"{printable(path)}: no keys; YOLO's data file has train, val and names")
    names = content.get("names")
    if isinstance(names, dict):
        names = [names.get(str(number)) for number in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise DataError(f"{printable(path)}: names {shown(names)}; a list of class names is wanted")
    base = path.parent
    if isinstance(content.get("path"), str) and files.is_dir(base / content["path"]):
        base = base / content["path"]
    splits = {}
    others = [
        key
        for key, value in content.items()
        if key not in (*_SPLITS, "path")
        and isinstance(key, str)
        and isinstance(value, str)
        and value
        and files.is_dir(base / value)
    ]
    for name in (*_SPLITS, *others):
        value = content.get(name)
        entries = value if isinstance(value, list) else [value]
        words = [entry for entry in entries if isinstance(entry, str) and entry not in ("", "~", "null")]
        if places := [_place(path, base, word) for word in words]:
            splits[name] = places
    return _Layout(tuple(names), splits or _folder_splits(path.parent))


def _place(path: Path, base: Path, entry: str) -> Path:
    """The folder or list that a split's entry means. Roboflow writes ``../train/images`` for ``train/images``."""
    try:
        return files.safe_path(path.parent, base, entry)
    except ValueError as error:
        inside = Path(*[part for part in Path(entry).parts if part not in ("..", "/")])
        if files.is_dir(path.parent / inside) or files.is_file(path.parent / inside):
            return path.parent / inside
        raise DataError(f"{printable(path)}: {error}; put the folders beside {path.name}") from None


def read_yolo(root: Path, split: str, *, problems: Problems | None = None) -> DataSplit:
    """Reads one split; boxes are scaled by the sizes in the images' headers. Raises ``DataError`` with its place."""
    problems = problems or Problems()
    layout = _layout(root)
    name = files.resolve_split(list(layout.splits), split, root)
    base = root.parent if files.is_file(root) else root
    records = []
    for image in dict.fromkeys(image for place in layout.splits[name] for image in _images(base, place, problems)):
        size = image_size(image)
        if size is None:
            problems.add(
                "unreadable-image",
                printable(image),
                "no readable image, and YOLO's boxes need its size; it is left out",
            )
            continue
        records.append(_read_record(image, base, size, layout.names, problems))
    has_masks = any(record.segmentations and any(record.segmentations) for record in records)
    if not has_masks:
        for record in records:
            record.segmentations = None
    return DataSplit(
        "yolo",
        name,
        base,
        records,
        layout.names,
        tuple(range(len(layout.names))),
        has_masks=has_masks,
        problems=problems.items,
    )


def _images(root: Path, place: Path, problems: Problems) -> list[Path]:
    if files.is_dir(place):
        return files.list_files(place) or [
            image for below in files.subfolders(place) for image in files.list_files(below)
        ]
    if place.suffix != ".txt":
        raise DataError(f"{printable(place)}: no such folder of images; mend data.yaml")
    images = []
    for number, line in enumerate(files.read_lines(place)):
        if line.strip():
            try:
                images.append(files.safe_path(root, root, line.strip()))
            except ValueError as error:
                problems.add("unsafe-path", f"{printable(place)}, line {number + 1}", str(error))
    return images


def _label_file(image: Path) -> Path:
    """``labels/`` for the last ``images/`` of the path, else beside the picture."""
    parts = list(image.parts)
    for number in range(len(parts) - 2, -1, -1):
        if parts[number] == "images":
            return Path(*parts[:number], "labels", *parts[number + 1 :]).with_suffix(".txt")
    return image.with_suffix(".txt")


def _read_record(
    image: Path, root: Path, size: tuple[int, int], names: tuple[str, ...], problems: Problems
) -> ImageRecord:
    path = _label_file(image)
    boxes: list[tuple[float, float, float, float]] = []
    labels: list[int] = []
    masks: list[Segmentation | None] = []
    for number, line in enumerate(files.read_lines(path, may_be_empty=True) if files.is_file(path) else []):
        words = line.split()
        if not words:
            continue
        place = f"{printable(path)}, line {number + 1}"
        row = _read_row(words, len(names), place, problems)
        if row is None:
            continue
        label, values = row
        box, polygon = _scale(values, size)
        if box[2] <= box[0] or box[3] <= box[1]:
            problems.add("empty-box", place, f"{shown(line.strip())} has no area")
        elif box[0] >= size[1] or box[1] >= size[0] or box[2] <= 0 or box[3] <= 0:
            problems.add("outside-box", place, f"{shown(line.strip())} lies outside the image")
        else:
            boxes.append(box)
            labels.append(label)
            masks.append(polygon)
    table = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    areas = (table[:, 2] - table[:, 0]) * (table[:, 3] - table[:, 1])
    name = os.path.relpath(image, root)
    return ImageRecord(
        image,
        name,
        name.rsplit(".", 1)[0],
        size[0],
        size[1],
        table,
        np.array(labels, dtype=np.int64),
        np.zeros(len(table), dtype=np.bool_),
        areas,
        masks,
        source=printable(path),
    )


def _read_row(words: list[str], classes: int, place: str, problems: Problems) -> tuple[int, list[float]] | None:
    try:
        values = [float(word) for word in words]
    except ValueError:
        values = [float("nan")]
    if not all(abs(value) < 1e9 for value in values):  # false for NaN
        problems.add("bad-number", place, shown(" ".join(words)))
    elif len(values) != 5 and (len(values) < 5 or len(values) % 2 == 0):
        problems.add("bad-annotation", place, f"{len(values)} numbers; a box has 5, a polygon 7, 9, 11, ...")
    elif values[0] != int(values[0]) or not 0 <= values[0] < classes:
        problems.add("unknown-category", place, f"class {shown(words[0])} of {classes} named classes")
    elif max(map(abs, values[1:])) > 2:
        problems.add("bad-number", place, f"{shown(' '.join(words))}: pixels, where fractions of the image are wanted")
    else:
        return int(values[0]), values[1:]
    return None


def _scale(
    values: list[float], size: tuple[int, int]
) -> tuple[tuple[float, float, float, float], list[list[float]] | None]:
    """Box in pixels, and polygon where the row is one."""
    height, width = size
    if len(values) == 4:
        x, y, w, h = values
        return ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height), None
    points = np.array(values).reshape(-1, 2) * (width, height)
    (left, top), (right, bottom) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    return (left, top, right, bottom), [points.reshape(-1).tolist()]
