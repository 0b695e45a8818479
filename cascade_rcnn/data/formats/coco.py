"""COCO json: one file of images, annotations and categories per split, beside a folder of images.

Boxes are stored as x, y, width, height. Crowds are ignore regions. Masks stay as they are written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.data import files
from cascade_rcnn.data.formats.find_images import ImageFinder
from cascade_rcnn.data.images import image_size, lies_in_file
from cascade_rcnn.data.masks import polygon_points, segmentation_area, segmentation_box, usual_segmentation
from cascade_rcnn.data.problems import Problems
from cascade_rcnn.data.records import DataSplit, ImageRecord, Segmentation, empty_record
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
    if not found:  # annotations/train/anything.json, one json per folder
        for child in files.subfolders(root / "annotations"):
            if files.split_word(child.name) and len(inner := _jsons(child)) == 1:
                found[child.name] = next(iter(inner.values()))
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
    categories, labels = _read_categories(lists["categories"], lists["annotations"], where, problems)
    records = _read_images(lists["images"], root, path, name, problems)
    index = _Ids({record.image_id: number for number, record in enumerate(records)})
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


def _whole(value: object) -> object:
    """A number written 1.0 as 1; anything else as it is."""
    return int(value) if type(value) is float and value.is_integer() else value


class _Ids:
    """Finds what an id stands for; "12" and 12 are the same where only one of them is listed."""

    def __init__(self, known: dict[Any, int]) -> None:
        self.known = known
        texts = Counter(str(key) for key in known)
        self._by_text = {str(key): number for key, number in known.items() if texts[str(key)] == 1}

    def get(self, value: object) -> int | None:
        value = _whole(value)
        if type(value) not in (int, str):
            return None
        found = self.known.get(value)
        return found if found is not None else self._by_text.get(str(value).strip())


def _flag(value: object) -> bool:
    """A flag as it is written: 1, 1.0, true, "1", "true". Raises ``ValueError`` for what is neither yes nor no."""
    if isinstance(value, str):
        words = {"0": 0, "0.0": 0, "false": 0, "no": 0, "": 0, "1": 1, "1.0": 1, "true": 1, "yes": 1}
        value = words.get(value.strip().lower(), value)
    if value is None:
        return False
    if not isinstance(value, int | float) or value not in (0, 1):
        raise ValueError(f"{shown(value)} is neither 0 nor 1")
    return bool(value)


def _read_categories(
    entries: list[Any], annotations: list[Any], where: str, problems: Problems
) -> tuple[dict[int, str], _Ids]:
    """Names by id, in the order of the ids, and the label of each id."""
    used = {_whole(row.get("category_id")) for row in annotations if isinstance(row, dict) and _is_id(row)}
    names: dict[int, str] = {}
    same: dict[int, int] = {}  # id of a repeated name: the id of the first
    for position, entry in enumerate(_without_parent(entries, used)):
        place = f"{where}, categories[{position}]"
        number, name = (_whole(entry.get("id")), entry.get("name")) if isinstance(entry, dict) else (None, None)
        if isinstance(number, str) and number.strip().isdecimal() and len(number) < 10:
            number = int(number)
        if type(number) is not int or not isinstance(name, str) or not name.strip() or abs(number) > 2**31:
            problems.add("bad-annotation", place, "a category needs a whole number as id and a name")
        elif number in names or number in same:
            problems.add("duplicate-category", place, f"category {number} {shown(name)} is listed twice")
        elif name in names.values():
            first = next(key for key, known in names.items() if known == name)
            problems.add(
                "duplicate-category", place, f"category {number} {shown(name)} is listed twice, first with id {first}"
            )
            same[number] = first
        else:
            names[number] = name
    names = dict(sorted(names.items()))
    labels = {number: label for label, number in enumerate(names)}
    return names, _Ids(labels | {number: labels[first] for number, first in same.items()})


def _is_id(row: dict[str, Any]) -> bool:
    return isinstance(row.get("category_id"), int | float | str)


def _without_parent(entries: list[Any], used: set[object]) -> list[Any]:
    """Roboflow writes the project's name as category 0, parent of all others, and never uses it.

    The project may be called as one of its classes: without the parent that class is no repetition.
    """
    known = [entry for entry in entries if isinstance(entry, dict)]
    first = next((entry for entry in known if _whole(entry.get("id")) == 0), None)
    parents = [entry.get("supercategory") for entry in known if _whole(entry.get("id")) != 0]
    if first is None or not parents or 0 in used or any(parent != first.get("name") for parent in parents):
        return entries
    return [entry for entry in entries if entry is not first]


def _read_images(entries: list[Any], root: Path, path: Path, split: str, problems: Problems) -> list[ImageRecord]:
    base = (
        root if not files.is_file(root) else (path.parent.parent if path.parent.name == "annotations" else path.parent)
    )
    kept: list[tuple[str, Any, Any, int, int]] = []  # place, id, name, height, width
    seen: set[int | str] = set()
    for position, entry in enumerate(entries):
        place = f"{printable(path)}, images[{position}]"
        image_id = _whole(entry.get("id")) if isinstance(entry, dict) else None
        if type(image_id) not in (int, str):
            problems.add("bad-annotation", place, "an image needs an id (whole number or text) and a file_name")
            continue
        assert isinstance(image_id, int | str)
        if image_id in seen:
            problems.add("duplicate-image-id", place, f"image id {shown(image_id)} is used twice")
            continue
        height, width = (_side(entry.get(key)) for key in ("height", "width"))
        if height is None or width is None:
            values = f"height {shown(entry.get('height'))}, width {shown(entry.get('width'))}"
            problems.add("bad-number", place, f"{values} is no size")
            continue
        seen.add(image_id)
        kept.append((place, image_id, entry.get("file_name"), height, width))
    folder = _image_folder(base, path, split, [name for _, _, name, _, _ in kept[:8] if isinstance(name, str)])
    found = ImageFinder(base, [folder, path.parent], split=split).find(
        [name for _, _, name, _, _ in kept],
        [(height, width) for _, _, _, height, width in kept],
        problems,
        printable(path),
    )
    records: list[ImageRecord] = []
    for (place, image_id, name, height, width), file in zip(kept, found):
        if isinstance(file, ValueError):
            problems.add("unsafe-path", place, str(file))
            continue
        sized = bool(height and width)
        if not sized:
            height, width = image_size(file) or (0, 0)
        record = empty_record(file, str(name), image_id, (height, width), source=place, sized=sized)
        records.append(record)
    return records


def _side(value: object) -> int | None:
    """A height or width: 120, 120.0 or "120"; 0 where there is none; None for what is no size."""
    value = _whole(value)
    if isinstance(value, str) and value.strip().isdecimal() and len(value) < 10:
        value = int(value)
    if value is None:
        return 0
    return value if type(value) is int and 0 <= value < 10**6 else None


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
        likely += [base / word / "images", base / word / "data"]
    likely += [path.parent / "images", base / "images" / "default"]
    folders = list(dict.fromkeys(folder for folder in likely if folder.is_dir()))

    def hits(folder: Path) -> int:
        return sum(files.is_file(folder / name.replace("\\", "/")) for name in names)

    return max(folders, key=hits) if folders else base / "images"


def _read_annotations(
    entries: list[Any], records: list[ImageRecord], index: _Ids, labels: _Ids, where: str, problems: Problems
) -> _Rows:
    rows = _Rows()
    from_masks: list[str] = []
    for position, entry in enumerate(entries):
        place = f"{where}, annotations[{position}]"
        if not isinstance(entry, dict):
            problems.add("bad-annotation", place, f"a {type(entry).__name__} where an object is wanted")
            continue
        image, label = index.get(entry.get("image_id")), labels.get(entry.get("category_id"))
        if image is None:
            problems.add(
                "unknown-image", place, f"image_id {shown(entry.get('image_id'))} is not in the list of images"
            )
            continue
        if label is None:
            listed = ", ".join(map(str, list(labels.known)[:12])) + (", ..." if len(labels.known) > 12 else "")
            category = shown(entry.get("category_id"))
            problems.add(
                "unknown-category", place, f"category_id {category} is not in the list of categories ({listed})"
            )
            continue
        record = records[image]
        crowd, ignore = _read_flags(entry, place, problems)
        try:
            segmentation = _read_segmentation(entry.get("segmentation"), record, place, problems)
        except ValueError as error:
            problems.add("bad-mask", place, str(error))
            continue
        box = _box_of_mask(entry.get("bbox"), segmentation, record)
        if box is not None:
            from_masks.append(place)
        else:
            box = _read_box(entry.get("bbox"), record, place, problems)
        if box is None:
            continue
        area, number = entry.get("area"), entry.get("id")
        if not isinstance(area, int | float) or not 0 <= area < 1e18:
            area = segmentation_area(segmentation) or box[2] * box[3]
        rows.image.append(image)
        rows.boxes.append(box)
        rows.label.append(label)
        rows.crowd.append(crowd)
        rows.ignore.append(crowd or ignore)
        rows.area.append(float(area))
        rows.ids.append(number if type(number) is int and abs(number) < 2**62 else position + 1)
        rows.segmentation.append(segmentation)
    if from_masks:
        problems.add("box-from-mask", where, f"{len(from_masks):,} objects have no box, the first is {from_masks[0]}")
    return rows


def _read_flags(entry: dict[str, Any], place: str, problems: Problems) -> tuple[bool, bool]:
    """(iscrowd, ignore) of an annotation; what is neither yes nor no is told, and means that the object is ignored."""
    flags = []
    for key in ("iscrowd", "ignore"):
        try:
            flags.append(_flag(entry.get(key)))
        except ValueError as error:
            problems.add("bad-flag", place, f"{key} {error}")
            flags.append(True)
    return flags[0], flags[1]


def _box_of_mask(
    box: object, segmentation: Segmentation | None, record: ImageRecord
) -> tuple[float, float, float, float] | None:
    """The box around a mask, where the annotation has none (or one of four zeros)."""
    if segmentation is None or (box and box != [0, 0, 0, 0]):
        return None
    around = segmentation_box(segmentation)
    if around is None or (around[2:] <= around[:2]).any():
        return None
    if (around[2:] <= 0).any() or (record.width and (around[:2] >= (record.width, record.height)).any()):
        return None  # outside: told of as of every other box
    x1, y1, x2, y2 = around.tolist()
    return x1, y1, x2 - x1, y2 - y1


def _read_box(
    box: object, record: ImageRecord, place: str, problems: Problems
) -> tuple[float, float, float, float] | None:
    """x, y, width, height of a box that can be learned from."""
    if not isinstance(box, list) or len(box) != 4:
        problems.add("bad-annotation", place, f"bbox {shown(box)} where [x, y, width, height] is wanted")
        return None
    numbers = _numbers(box)
    if numbers is None:
        problems.add("bad-number", place, f"bbox {shown(box)} of {shown(record.file_name)}")
        return None
    x, y, width, height = numbers
    if width <= 0 or height <= 0:
        problems.add("empty-box", place, f"bbox {shown(box)} of {shown(record.file_name)} has no area")
        return None
    beyond = x >= record.width or y >= record.height
    if record.width and (x + width <= 0 or y + height <= 0 or (beyond and not lies_in_file(record.path, x, y))):
        problems.add(
            "outside-box",
            place,
            f"bbox {shown(box)} lies outside {shown(record.file_name)} ({record.width} x {record.height})",
        )
        return None
    return x, y, width, height


def _numbers(values: list[Any]) -> list[float] | None:
    """Finite numbers, also where all of them are written as text; None for anything else."""
    if all(isinstance(value, str) for value in values):
        try:
            values = [float(value) for value in values]
        except ValueError:
            return None
    # abs() < 1e9 is false for NaN, infinity and numbers too large for a float
    if not all(type(value) in (int, float) and abs(value) < 1e9 for value in values):
        return None
    return [float(value) for value in values]


def _read_segmentation(value: object, record: ImageRecord, place: str, problems: Problems) -> Segmentation | None:
    """The mask in COCO's spelling; polygons with fewer than three points are left out. Raises ``ValueError``."""
    mask = usual_segmentation(value)
    if isinstance(mask, dict):
        rle_counts(mask, height=record.height, width=record.width)
        return mask
    if not mask:
        return None
    enough = [polygon_points(polygon) >= 3 for polygon in mask]
    if all(enough):
        return mask
    problems.add(
        "short-polygon",
        place,
        f"{enough.count(False)} of {len(enough)} polygons of an object of "
        f"{shown(record.file_name)} have fewer than 3 points",
    )
    return [polygon for polygon, keep in zip(mask, enough) if keep] or None


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
