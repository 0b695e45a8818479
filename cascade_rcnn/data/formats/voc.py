"""Pascal VOC: one XML file per image, lists of images in ImageSets/Main, perhaps several years side by side.

VOC counts pixels from 1 and includes the last one: (xmin, ymin, xmax, ymax) is the box x1 = xmin - 1, y1 = ymin - 1,
x2 = xmax, y2 = ymax here. Difficult objects are ignored in training as in the official evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from cascade_rcnn.data import files
from cascade_rcnn.data.images import image_size
from cascade_rcnn.data.problems import Problems
from cascade_rcnn.data.records import DataSplit, ImageRecord
from cascade_rcnn.errors import DataError
from cascade_rcnn.messages import printable, shown

_LABEL_SIDES = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True, slots=True)
class _List:
    """A list of images: of a file in ImageSets/Main, or all annotations of a folder."""

    prefix: str  # the year, or the folder's name
    name: str
    folder: Path  # the year folder
    annotations: Path
    images: Path
    file: Path | None


class _NoDoctype(ElementTree.TreeBuilder):
    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("a document type declaration, which can expand without end, is refused")


def parse_xml(path: Path) -> ElementTree.Element:
    """The root of an XML file. Raises ``DataError`` for what is not XML and for any document type declaration."""
    try:
        return ElementTree.fromstring(files.read_bytes(path), ElementTree.XMLParser(target=_NoDoctype()))
    except DataError:
        raise
    except (ElementTree.ParseError, ValueError, LookupError, RecursionError) as error:
        raise DataError(f"{printable(path)}: not usable XML ({error})") from None


def voc_splits(root: Path) -> list[str]:
    """Names of the splits: ``train``, or ``2007_train`` where several years lie side by side."""
    lists = _lists(root)
    several = len({entry.folder for entry in lists}) > 1 and len({entry.prefix for entry in lists}) > 1
    if not several:
        return list(dict.fromkeys(entry.name for entry in lists))
    return [f"{entry.prefix}_{entry.name}" for entry in lists]


def _lists(root: Path) -> list[_List]:
    found: list[_List] = []
    children = files.subfolders(root) if files.is_dir(root) else []
    grandchildren = [
        below for child in children if child.name.startswith("VOCdevkit") for below in files.subfolders(child)
    ]
    for folder in [root, *children, *grandchildren]:
        for name in ("Annotations", "annotations", "xmls"):
            if _has_xml(folder / name):
                found += _lists_of_folder(folder, folder / name)
                break
        if found and folder == root:
            return found
    if not found:  # Roboflow: train/, valid/, test/ with pictures and XML together
        found = [_List("", child.name, child, child, child, None) for child in children if _has_xml(child)]
    if not found and _has_xml(root):
        found = [_List("", "all", root, root, root, None)]
    return found


def _lists_of_folder(folder: Path, annotations: Path) -> Iterator[_List]:
    images = next(
        (folder / name for name in ("JPEGImages", "images", "Images", "img") if (folder / name).is_dir()), folder
    )
    prefix = folder.name.removeprefix("VOC")
    wanted = {path.stem: path for path in files.list_files(folder / "ImageSets" / "Main", {".txt"})}
    # aeroplane_train.txt and its like repeat train.txt with a flag per image
    names = [stem for stem in wanted if "_" not in stem or stem.split("_")[-1] not in wanted]
    for name in names:
        yield _List(prefix, name, folder, annotations, images, wanted[name])
    if not names:
        yield _List(prefix, "all", folder, annotations, images, None)


def _has_xml(folder: Path) -> bool:
    try:
        return any(path.suffix.lower() == ".xml" for path in islice(folder.iterdir(), 2000))
    except OSError:
        return False


def read_voc(root: Path, split: str, *, problems: Problems | None = None) -> DataSplit:
    """Reads one split of a VOC data set: ``train``, ``2007_trainval``; a bare name means all years that have it.

    ``image_id`` is the name without suffix; difficult objects have the ignore flag and the attribute ``difficult``.
    Raises ``DataError`` with file, object and reason.
    """
    problems = problems or Problems()
    lists = _lists(root)
    chosen = [entry for entry in lists if split in (f"{entry.prefix}_{entry.name}", entry.name)]
    if not chosen:
        name = files.resolve_split(list(dict.fromkeys(entry.name for entry in lists)), split, root)
        chosen = [entry for entry in lists if entry.name == name]
    names = sorted(
        set().union(
            *(_class_names(folder, _stamp(folder)) for folder in dict.fromkeys(entry.annotations for entry in lists))
        )
    )
    labels = {name: label for label, name in enumerate(names)}
    records: list[ImageRecord] = []
    for entry in chosen:
        records += _read_list(entry, labels, problems)
    truth = chosen[0].folder if len(chosen) == 1 else None
    return DataSplit(
        "voc", split, root, records, tuple(names), tuple(range(1, len(names) + 1)), truth=truth, problems=problems.items
    )


def _stamp(folder: Path) -> int:
    return folder.stat().st_mtime_ns


@lru_cache(maxsize=16)
def _class_names(folder: Path, stamp: int) -> frozenset[str]:
    """Names of all objects below a folder of XML files, whatever the split; unreadable files are met by their split."""
    found: set[str] = set()
    for path in files.list_files(folder, {".xml"}):
        try:
            found.update(
                name for item in parse_xml(path).iterfind("object") if (name := (item.findtext("name") or "").strip())
            )
        except DataError:
            continue
    return frozenset(found)


def _read_list(entry: _List, labels: dict[str, int], problems: Problems) -> list[ImageRecord]:
    if entry.file is None:
        names = [path.stem for path in files.list_files(entry.annotations, {".xml"})]
    else:
        names = list(dict.fromkeys(_list_entry(line) for line in files.read_lines(entry.file) if line.strip()))
    # a listing once instead of a look at the disk per image
    images = {path.stem: path for path in files.list_files(entry.images)}
    records = []
    for number, name in enumerate(names):
        where = f"{printable(entry.file)}, entry {number + 1}" if entry.file else printable(entry.folder)
        try:
            path = files.safe_path(entry.folder, entry.annotations, f"{name}.xml")
            default = files.safe_path(entry.folder, entry.images, f"{name}.jpg")
        except ValueError as error:
            problems.add("unsafe-path", where, str(error))
            continue
        if not files.is_file(path):
            problems.add("missing-annotation", where, f"{shown(name)} has no file {printable(path)}")
            continue
        try:
            tree = parse_xml(path)
        except DataError as error:
            problems.add("bad-annotation", where, str(error))
            continue
        records.append(_read_record(tree, name, path, images.get(name, default), labels, problems))
    return records


def _list_entry(line: str) -> str:
    """``000001``, or ``000001  -1`` of a list per class."""
    name, _, flag = line.strip().rpartition(" ")
    return name.strip() if flag in ("1", "-1", "0") and name.strip() else line.strip()


def _read_record(
    tree: ElementTree.Element, name: str, path: Path, image: Path, labels: dict[str, int], problems: Problems
) -> ImageRecord:
    where = printable(path)
    width, height = (_number(tree.findtext(f"size/{side}")) for side in ("width", "height"))
    sized = 1 <= width < 10**6 and 1 <= height < 10**6
    if not sized:
        height, width = image_size(image) or (0, 0)
    boxes, kept, flags = [], [], []
    for position, item in enumerate(tree.iterfind("object")):
        place = f"{where}, object {position + 1}"
        box = _read_box(item, int(height), int(width), place, problems)
        label = labels.get((item.findtext("name") or "").strip())
        if label is None:
            problems.add("bad-annotation", place, "an object without a name")
        elif box is not None:
            boxes.append(box)
            kept.append(label)
            flags.append([_number(item.findtext(flag), 0.0) > 0 for flag in ("difficult", "truncated", "occluded")])
    table = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    marks = np.array(flags, dtype=np.bool_).reshape(-1, 3)
    areas = (table[:, 2] - table[:, 0]) * (table[:, 3] - table[:, 1])
    attributes = {
        flag: marks[:, column].astype(np.int64) for column, flag in enumerate(("difficult", "truncated", "occluded"))
    }
    return ImageRecord(
        image,
        image.name,
        name,
        int(height),
        int(width),
        table,
        np.array(kept, dtype=np.int64),
        marks[:, 0].copy(),
        areas,
        attributes=attributes,
        source=where,
        sized=sized,
    )


def _number(text: str | None, default: float = math.nan) -> float:
    try:
        return float(text) if text is not None else default
    except ValueError:
        return default


def _read_box(
    item: ElementTree.Element, height: int, width: int, place: str, problems: Problems
) -> tuple[float, float, float, float] | None:
    if item.find("bndbox") is None:
        problems.add("bad-annotation", place, "an object without bndbox")
        return None
    texts = [item.findtext(f"bndbox/{side}") for side in _LABEL_SIDES]
    left, top, right, bottom = (_number(text) for text in texts)
    if not all(abs(value) < 1e9 for value in (left, top, right, bottom)):  # false for NaN
        problems.add("bad-number", place, f"bndbox {shown(texts)} (xmin, ymin, xmax, ymax)")
        return None
    # xmax = xmin is an object one pixel wide; a box of a single pixel is a slip of the mouse
    if right < left or bottom < top or (right == left and bottom == top):
        problems.add("empty-box", place, f"bndbox {shown([left, top, right, bottom])} has no area")
        return None
    if width and (left > width or top > height or right < 1 or bottom < 1):
        problems.add(
            "outside-box",
            place,
            f"bndbox {shown([left, top, right, bottom])} lies outside the image ({width} x {height})",
        )
        return None
    return left - 1, top - 1, right, bottom
