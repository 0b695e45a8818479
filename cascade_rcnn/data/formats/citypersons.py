"""CityPersons: ``anno_train.mat`` and ``anno_val.mat`` on Cityscapes images (``leftImg8bit/val/CITY/*.png``).

Or the same annotations as Cityscapes hands them out, a file per image: ``gtBboxCityPersons/val/CITY/*.json``.
Pedestrians are the one class; riders, sitting and other persons, groups and marked regions are ignore regions.
``image_id`` counts from 1 in the order of the file (by city and name), as the official ``val_gt.json`` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.data import files
from cascade_rcnn.data.formats.find_images import ImageFinder
from cascade_rcnn.data.formats.matlab import read_mat, text
from cascade_rcnn.data.images import image_size
from cascade_rcnn.data.problems import Problems
from cascade_rcnn.data.records import DataSplit, ImageRecord
from cascade_rcnn.errors import DataError
from cascade_rcnn.messages import printable, shown

_PEDESTRIAN = 1
_KINDS = {"ignore": 0, "pedestrian": 1, "rider": 2, "sitting person": 3, "person (other)": 4, "person group": 5}
_JSON = "gtBboxCityPersons"
_HEIGHT, _WIDTH = 1024, 2048  # of every Cityscapes image


def citypersons_splits(root: Path) -> list[str]:
    """Names of the splits: those with an ``anno_SPLIT.mat``, else the folders of ``gtBboxCityPersons``."""
    return list(_annotations(root))


def _annotations(root: Path) -> dict[str, Path]:
    for folder in (root / "annotations", root, *(files.subfolders(root) if root.is_dir() else [])):
        found = {
            path.stem.removeprefix("anno_"): path
            for path in files.list_files(folder, {".mat"})
            if path.name.startswith("anno_")
        }
        if found:
            return found
    return {folder.name: folder for folder in files.subfolders(root / _JSON)} if files.is_dir(root / _JSON) else {}


def read_citypersons(root: Path, split: str, *, problems: Problems | None = None) -> DataSplit:
    """Reads one split. Attributes: ``visible_boxes`` [G, 4] xyxy, ``kind`` (the file's class 0..5).

    Raises ``DataError`` with file, image and reason.
    """
    problems = problems or Problems()
    found = _annotations(root)
    name = files.resolve_split(list(found), split, root)
    path = found[name]
    folder = next((root / base for base in ("leftImg8bit", "images") if (root / base).is_dir()), root / "leftImg8bit")
    entries: list[tuple[int, str, NDArray[np.float64]]] = []
    for number, entry in enumerate(read_entries(path), start=1):
        if isinstance(entry, ValueError):
            problems.add("bad-annotation", f"{printable(path)}, image {number}", str(entry))
        else:
            city, image, rows = entry
            entries.append((number, f"{name}/{city}/{image}", rows))
    finder = ImageFinder(root, [folder], split=name)
    images = finder.find([image for _, image, _ in entries], [(0, 0)] * len(entries), problems, printable(path))
    records = []
    for (number, _, rows), file in zip(entries, images):
        place = f"{printable(path)}, image {number}"
        if isinstance(file, ValueError):
            problems.add("bad-annotation", place, str(file))
        else:
            records.append(_read_record(file, number, rows, place, problems))
    truth = root / "evaluation" / "val_gt.json"
    return DataSplit(
        "citypersons",
        name,
        root,
        records,
        ("pedestrian",),
        (1,),
        truth=truth if name == "val" and files.is_file(truth) else path,
        problems=problems.items,
    )


def read_entries(path: Path) -> Iterator[tuple[str, str, NDArray[np.float64]] | ValueError]:
    """City, image name and rows [G, 10] of each image, for training and official evaluation.

    ``path`` is an ``anno_*.mat`` or a folder of ``gtBboxCityPersons``. A row is class, x, y, width, height, id, and
    x, y, width, height of the visible part. An entry that cannot be read is a ``ValueError`` with the reason. Raises
    ``DataError`` for another file.
    """
    if path.is_dir():
        for file in sorted(files.list_files_below(path, {".json"}), key=lambda file: (file.parent.name, file.name)):
            try:
                yield _fields_of_json(file)
            except (ValueError, DataError) as error:
                yield ValueError(f"{file.name}: {error}")
        return
    variables = read_mat(path)
    named = [value for name, value in variables.items() if name.startswith("anno_")] or list(variables.values())
    if len(named) != 1 or not isinstance(named[0], np.ndarray):
        raise DataError(f"{printable(path)}: {len(named)} variables where CityPersons has one, anno_SPLIT_aligned")
    for entry in named[0].reshape(-1):
        try:
            yield _fields(entry)
        except ValueError as error:
            yield error


def _fields_of_json(path: Path) -> tuple[str, str, NDArray[np.float64]]:
    content = files.read_json(path)
    objects = content.get("objects") if isinstance(content, dict) else None
    if not isinstance(objects, list):
        raise ValueError("no list of objects")
    rows = np.zeros((len(objects), 10))
    for row, entry in zip(rows, objects):
        label = entry.get("label") if isinstance(entry, dict) else None
        if label not in _KINDS:
            raise ValueError(f"label {shown(label)} is none of {', '.join(_KINDS)}")
        try:
            whole, visible = (np.array(entry[key], np.float64).reshape(4) for key in ("bbox", "bboxVis"))
        except (KeyError, TypeError, ValueError):
            raise ValueError("an object without bbox and bboxVis of four numbers") from None
        row[:] = [_KINDS[label], *whole, 0, *visible]
    return path.parent.name, path.name.replace("_gtBboxCityPersons.json", "_leftImg8bit.png"), rows


def _fields(entry: Any) -> tuple[str, str, NDArray[np.float64]]:
    while isinstance(entry, np.ndarray) and entry.dtype.names is None and entry.size == 1:
        entry = entry.reshape(-1)[0]
    if not isinstance(entry, np.ndarray | np.void) or entry.dtype.names is None:
        raise ValueError("no structure of cityname, im_name and bbs")
    names = {field.lower(): field for field in entry.dtype.names}
    if not {"cityname", "im_name", "bbs"} <= set(names):
        raise ValueError(f"fields {', '.join(names)} where cityname, im_name and bbs are wanted")
    city, image = (text(entry[names[field]]) for field in ("cityname", "im_name"))
    rows = entry[names["bbs"]]
    while isinstance(rows, np.ndarray) and rows.dtype == object and rows.size == 1:
        rows = rows.reshape(-1)[0]
    if not isinstance(rows, np.ndarray) or rows.dtype.kind not in "iuf":
        raise ValueError("bbs is not a table of numbers")
    if rows.size and (rows.ndim != 2 or rows.shape[1] != 10):
        raise ValueError(f"bbs of shape {rows.shape} where rows of 10 numbers are wanted")
    # the file's unsigned 16 bits would overflow in x + w
    return city, image, rows.astype(np.float64).reshape(-1, 10)


def _read_record(path: Path, image_id: int, rows: NDArray[np.float64], place: str, problems: Problems) -> ImageRecord:
    height, width = image_size(path) or (_HEIGHT, _WIDTH)
    keep = np.ones(len(rows), dtype=np.bool_)
    for number, row in enumerate(rows):
        left, top, wide, high = row[1:5]
        where = f"{place}, row {number + 1}"
        if not np.all(np.abs(row) < 1e9):
            problems.add("bad-number", where, shown(row.tolist()))
        elif row[0] not in _KINDS.values():
            problems.add("bad-annotation", where, f"class {row[0]:g} is none of CityPersons' 0 to 5")
        elif wide <= 0 or high <= 0:
            problems.add("empty-box", where, f"box {row[1:5].tolist()} (x, y, width, height) has no area")
        elif left >= width or top >= height or left + wide <= 0 or top + high <= 0:
            problems.add("outside-box", where, f"box {row[1:5].tolist()} (x, y, width, height) lies outside the image")
        else:
            continue
        keep[number] = False
    rows = rows[keep]
    boxes, visible = rows[:, 1:5].copy(), rows[:, 6:10].copy()
    boxes[:, 2:] += boxes[:, :2]
    visible[:, 2:] += visible[:, :2]
    kind = rows[:, 0].astype(np.int64)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return ImageRecord(
        path,
        path.name,
        image_id,
        height,
        width,
        boxes,
        np.zeros(len(rows), dtype=np.int64),
        kind != _PEDESTRIAN,
        areas,
        attributes={"visible_boxes": visible, "kind": kind},
        source=place,
    )
