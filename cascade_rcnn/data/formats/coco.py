"""COCO json: one file of images, annotations and categories per split, beside a folder of images.

Boxes are stored as x, y, width, height. Crowds are ignore regions. Masks stay as they are written.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.data import files
from cascade_rcnn.data.images import image_size
from cascade_rcnn.data.masks import polygon_points, segmentation_area
from cascade_rcnn.data.problems import Problems
from cascade_rcnn.data.records import DataSplit, ImageRecord, Segmentation
from cascade_rcnn.data.rle import rle_counts
from cascade_rcnn.errors import DataError
from cascade_rcnn.messages import printable, shown

_ROBOFLOW = "_annotations.coco.json"
_OTHER_TASKS = ("captions_", "person_keypoints_", "panoptic_", "stuff_", "image_info_")


@dataclass(slots=True)
class _Rows:
    """Annotations that are kept, still in the order of the file."""

    image: list[int] = field(default_factory=list)  # index into the images
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)  # x, y, width, height
    label: list[int] = field(default_factory=list)
    crowd: list[bool] = field(default_factory=list)
    ignore: list[bool] = field(default_factory=list)
    area: list[float] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    segmentation: list[Segmentation | None] = field(default_factory=list)


def coco_files(root: Path) -> dict[str, Path]:
    """The annotation file of each split of a COCO data set; empty where there is none.

    Looked at: a single json file; ``annotations/instances_*.json`` (or any json of the kind in ``annotations/``);
    ``train/_annotations.coco.json`` and its sisters; json files of the kind in the folder itself.
    """
    if files.is_file(root):
        return {_split_name(root): root} if root.suffix.lower() == ".json" else {}
    for folder in (root / "annotations", root / "Annotations"):
        if found := _jsons(folder):
            return found
    found = {child.name: child / _ROBOFLOW for child in files.subfolders(root) if files.is_file(child / _ROBOFLOW)}
    return found or _jsons(root)


def _jsons(folder: Path) -> dict[str, Path]:
    jsons = files.list_files(folder, {".json"})
    # By its name alone it is meant to be COCO: if it is damaged, reading it shall say so
    instances = [path for path in jsons if path.name.startswith("instances_")]
    candidates = [path for path in jsons if _looks_like_coco(path)]
    chosen = instances or [path for path in candidates if not path.name.startswith(_OTHER_TASKS)]
    return {_split_name(path): path for path in chosen}


def _looks_like_coco(path: Path) -> bool:
    """By the first and last kilobytes: an object (results are a list) with at least two of COCO's lists."""
    try:
        with path.open("rb") as stream:
            head = stream.read(65536)
            stream.seek(max(0, path.stat().st_size - 65536))
            tail = stream.read()
    except OSError:
        return False
    if not head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        return False
    return sum(key in head or key in tail for key in (b'"images"', b'"annotations"', b'"categories"')) >= 2


def _split_name(path: Path) -> str:
    name = path.name[: -len(path.suffix)]
    if path.name == _ROBOFLOW:
        return path.parent.name
    return name.removesuffix(".coco").removeprefix("instances_").removesuffix("_annotations") or name


def read_coco(root: Path, split: str, *, problems: Problems | None = None) -> DataSplit:
    """Reads one split of a COCO data set; ``root`` is its folder or the json file itself.

    Boxes without area and boxes outside their image are left out and listed in ``DataSplit.problems``. Raises
    ``DataError`` with file, index and reason for whatever else cannot be used.
    """
    problems = problems or Problems()
    found = coco_files(root)
    name = files.resolve_split(list(found), split, root)
    path = found[name]
    data = files.read_json(path)
    if not isinstance(data, dict):
        raise DataError(
            f"{printable(path)}: a {type(data).__name__} where COCO's object of images, annotations "
            "and categories is wanted; a results file belongs to `score --results`"
        )
    lists: dict[str, list[Any]] = {}
    for key in ("images", "annotations", "categories"):
        if not isinstance(data.get(key), list):
            raise DataError(f"{printable(path)}: no list {key!r}; this is not a COCO instances file")
        lists[key] = data[key]
    where = printable(path)
    categories = _read_categories(lists["categories"], lists["annotations"], where, problems)
    labels = {category: label for label, category in enumerate(categories)}
    records = _read_images(lists["images"], root, path, name, problems)
    index = {record.image_id: number for number, record in enumerate(records)}
    rows = _read_annotations(lists["annotations"], records, index, labels, where, problems)
    has_masks = any(rows.segmentation)
    _distribute(rows, records, has_masks)
    return DataSplit(
        "coco",
        name,
        root,
        records,
        tuple(categories.values()),
        tuple(categories),
        truth=path,
        has_masks=has_masks,
        problems=problems.items,
    )


def _read_categories(entries: list[Any], annotations: list[Any], where: str, problems: Problems) -> dict[int, str]:
    """Names by id, in the order of the ids."""
    names: dict[int, str] = {}
    for position, entry in enumerate(entries):
        place = f"{where}, categories[{position}]"
        number, name = (entry.get("id"), entry.get("name")) if isinstance(entry, dict) else (None, None)
        if type(number) is not int or not isinstance(name, str) or not name.strip() or abs(number) > 2**31:
            problems.add("bad-annotation", place, "a category needs a whole number as id and a name")
        elif number in names or name in names.values():
            problems.add("duplicate-category", place, f"category {number} {shown(name)} is listed twice")
        else:
            names[number] = name
    # Roboflow writes the project's name as category 0, parent of all others, and never uses it
    parents = {entry.get("supercategory") for entry in entries if isinstance(entry, dict) and entry.get("id") != 0}
    first = names.get(0)
    if (
        first is not None
        and len(names) > 1
        and parents == {first}
        and not any(isinstance(row, dict) and row.get("category_id") == 0 for row in annotations)
    ):
        del names[0]
    return dict(sorted(names.items()))


def _read_images(entries: list[Any], root: Path, path: Path, split: str, problems: Problems) -> list[ImageRecord]:
    base = (
        root if not files.is_file(root) else (path.parent.parent if path.parent.name == "annotations" else path.parent)
    )
    names = (entry.get("file_name") for entry in entries[:8] if isinstance(entry, dict))
    folder = _image_folder(base, path, split, [name for name in names if isinstance(name, str)])
    records: list[ImageRecord] = []
    seen: set[int | str] = set()
    for position, entry in enumerate(entries):
        place = f"{printable(path)}, images[{position}]"
        if not isinstance(entry, dict) or type(entry.get("id")) not in (int, str):
            problems.add("bad-annotation", place, "an image needs an id (whole number or text) and a file_name")
            continue
        image_id, name = entry["id"], entry.get("file_name")
        if image_id in seen:
            problems.add("duplicate-image-id", place, f"image id {shown(image_id)} is used twice")
            continue
        try:
            file = files.safe_path(base, folder, name)
        except ValueError as error:
            problems.add("unsafe-path", place, str(error))
            continue
        height, width = entry.get("height") or 0, entry.get("width") or 0
        if type(height) is not int or type(width) is not int or not (0 <= height < 10**6 and 0 <= width < 10**6):
            problems.add("bad-number", place, f"height {shown(height)}, width {shown(width)} is no size")
            continue
        sized = bool(height and width)
        if not sized:
            height, width = image_size(file) or (0, 0)
        seen.add(image_id)
        records.append(
            ImageRecord(
                file,
                str(name),
                image_id,
                height,
                width,
                np.zeros((0, 4)),
                np.zeros(0, np.int64),
                np.zeros(0, np.bool_),
                np.zeros(0),
                source=place,
                sized=sized,
            )
        )
    return records


def _image_folder(base: Path, path: Path, split: str, names: list[str]) -> Path:
    """The folder below ``base`` that holds most of the first images; a likely one where none is there."""
    words = (*files.split_synonyms(split.rstrip("0123456789")), split)
    plain = [base, path.parent] if path.name != _ROBOFLOW else [path.parent]
    likely = (
        [base / "images" / word for word in words]
        + [base / word for word in words]
        + [base / "images", base / "data", base / "JPEGImages", *plain]
    )
    for word in words:
        likely += [base / word / "images"]
    folders = list(dict.fromkeys(folder for folder in likely if folder.is_dir()))

    def hits(folder: Path) -> int:
        return sum(files.is_file(folder / name) for name in names)

    return max(folders, key=hits) if folders else base / "images"


def _read_annotations(
    entries: list[Any],
    records: list[ImageRecord],
    index: dict[int | str, int],
    labels: dict[int, int],
    where: str,
    problems: Problems,
) -> _Rows:
    rows = _Rows()
    for position, entry in enumerate(entries):
        place = f"{where}, annotations[{position}]"
        if not isinstance(entry, dict):
            problems.add("bad-annotation", place, f"a {type(entry).__name__} where an object is wanted")
            continue
        image_id, category = entry.get("image_id"), entry.get("category_id")
        image = index.get(image_id) if type(image_id) in (int, str) else None  # type: ignore[arg-type]
        if image is None:
            problems.add("unknown-image", place, f"image_id {shown(image_id)} is not in the list of images")
            continue
        if type(category) is not int or category not in labels:
            problems.add(
                "unknown-category",
                place,
                f"category_id {shown(category)} is not in the list of "
                f"categories ({', '.join(map(str, list(labels)[:12]))}{', ...' if len(labels) > 12 else ''})",
            )
            continue
        record = records[image]
        box = _read_box(entry.get("bbox"), record, place, problems)
        if box is None:
            continue
        try:
            segmentation = _read_segmentation(entry.get("segmentation"), record, place, problems)
        except ValueError as error:
            problems.add("bad-mask", place, str(error))
            continue
        crowd, area, number = bool(entry.get("iscrowd")), entry.get("area"), entry.get("id")
        if not isinstance(area, int | float) or not 0 <= area < 1e18:
            area = segmentation_area(segmentation) or box[2] * box[3]
        rows.image.append(image)
        rows.boxes.append(box)
        rows.label.append(labels[category])
        rows.crowd.append(crowd)
        rows.ignore.append(crowd or bool(entry.get("ignore")))
        rows.area.append(float(area))
        rows.ids.append(number if type(number) is int and abs(number) < 2**62 else position + 1)
        rows.segmentation.append(segmentation)
    return rows


def _read_box(
    box: object, record: ImageRecord, place: str, problems: Problems
) -> tuple[float, float, float, float] | None:
    """x, y, width, height of a box that can be learnt from."""
    if not isinstance(box, list) or len(box) != 4:
        problems.add("bad-annotation", place, f"bbox {shown(box)} where [x, y, width, height] is wanted")
        return None
    x, y, width, height = box
    # abs() < 1e9 is false for NaN, infinity and numbers too large for a float
    if not all(type(value) in (int, float) and abs(value) < 1e9 for value in box):
        problems.add("bad-number", place, f"bbox {shown(box)} of {shown(record.file_name)}")
        return None
    if width <= 0 or height <= 0:
        problems.add("empty-box", place, f"bbox {shown(box)} of {shown(record.file_name)} has no area")
        return None
    if record.width and (x >= record.width or y >= record.height or x + width <= 0 or y + height <= 0):
        problems.add(
            "outside-box",
            place,
            f"bbox {shown(box)} lies outside {shown(record.file_name)} ({record.width} x {record.height})",
        )
        return None
    return float(x), float(y), float(width), float(height)


def _read_segmentation(value: object, record: ImageRecord, place: str, problems: Problems) -> Segmentation | None:
    """The mask as it is written; polygons with fewer than three points are left out. Raises ``ValueError``."""
    if not value:
        return None
    if isinstance(value, dict):
        rle_counts(value, height=record.height, width=record.width)
        return value
    if not isinstance(value, list):
        raise ValueError(f"segmentation {shown(value)} is neither polygons nor RLE")
    polygons = value if isinstance(value[0], list) else [value]  # some tools write a single polygon unwrapped
    enough = [polygon_points(polygon) >= 3 for polygon in polygons]
    if all(enough):
        return polygons
    problems.add(
        "short-polygon",
        place,
        f"{enough.count(False)} of {len(enough)} polygons of an object of "
        f"{shown(record.file_name)} have fewer than 3 points",
    )
    return [polygon for polygon, keep in zip(polygons, enough) if keep] or None


def _distribute(rows: _Rows, records: list[ImageRecord], has_masks: bool) -> None:
    """Gives each image its rows, in the order of the file."""
    image = np.array(rows.image, dtype=np.int64)
    order = np.argsort(image, kind="stable")
    bounds = np.searchsorted(image[order], np.arange(len(records) + 1))

    def column(values: Iterable[Any], dtype: Any) -> NDArray[Any]:
        return np.array(list(values), dtype=dtype)[order]

    boxes = column(rows.boxes, np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    labels, ignore, areas = column(rows.label, np.int64), column(rows.ignore, np.bool_), column(rows.area, np.float64)
    crowd, ids = column(rows.crowd, np.int64), column(rows.ids, np.int64)
    for number, record in enumerate(records):
        part = slice(int(bounds[number]), int(bounds[number + 1]))
        record.boxes, record.labels, record.ignore = boxes[part], labels[part], ignore[part]
        record.areas = areas[part]
        record.attributes = {"iscrowd": crowd[part], "ids": ids[part]}
        if has_masks:
            record.segmentations = [rows.segmentation[row] for row in order[part]]
