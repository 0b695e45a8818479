"""KITTI object, 2D boxes: ``training/label_2/*.txt`` beside ``training/image_2`` and, perhaps, ``ImageSets``.

Boxes are (left, top, right, bottom) in pixels counted from 0 and are taken as x1, y1, x2, y2. DontCare regions are
ignored (label 0, attribute ``dontcare``). Classes are those of KITTI that occur in the labels, in KITTI's order.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import numpy as np

from cascade_rcnn.data import files
from cascade_rcnn.data.formats.find_images import ImageFinder, stem_of
from cascade_rcnn.data.images import image_size
from cascade_rcnn.data.problems import Problems
from cascade_rcnn.data.records import DataSplit, ImageRecord
from cascade_rcnn.errors import DataError
from cascade_rcnn.messages import printable, shown

KITTI_CLASSES = ("Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram", "Misc")
_COLUMNS = 15  # class, truncation, occlusion, alpha, left, top, right, bottom, and seven of the 3D box


def kitti_splits(root: Path) -> list[str]:
    """Names of the splits; without ImageSets there is ``trainval``, every other image of which is train or val."""
    labels = _label_folder(root)
    if labels is None:
        return []
    lists = _lists(root, labels)
    names = [name for name in lists if _has_a_label(lists[name], labels)]
    return names or ["train", "val", "trainval"]


def _has_a_label(path: Path, labels: Path) -> bool:
    """A list such as the official test set names no labelled image."""
    try:
        names = [line.strip() for line in files.read_lines(path, may_be_empty=True)]
    except DataError:
        return True  # reading the split will say what is wrong with it
    have = {file.stem for file in files.list_files(labels, {".txt"})}
    return any(name in have or stem_of(name.rsplit("/", 1)[-1]) in have for name in names) and path.stem != "test"


def _label_folder(root: Path) -> Path | None:
    for folder in (root / "training", root, root / "object" / "training", root / "train"):
        labels = folder / "label_2"
        if labels.is_dir() and files.list_files(labels, {".txt"}):
            return labels
    return None


def _lists(root: Path, labels: Path) -> dict[str, Path]:
    for folder in (root / "ImageSets", labels.parent / "ImageSets", labels.parent.parent / "ImageSets"):
        if found := {path.stem: path for path in files.list_files(folder, {".txt"})}:
            return found
    return {}


def read_kitti(root: Path, split: str, *, problems: Problems | None = None) -> DataSplit:
    """Reads one split of KITTI's object data; sizes come from the images' headers.

    Attributes: ``truncated`` (0..1), ``occluded`` (0..3), ``dontcare``. Raises ``DataError`` with file, line, reason.
    """
    problems = problems or Problems()
    labels = _label_folder(root)
    if labels is None:
        raise DataError(f"{printable(root)}: no training/label_2 with text files; this is not KITTI's layout")
    name = files.resolve_split(kitti_splits(root), split, root)
    names, where = _image_names(root, labels, name, problems)
    classes = _classes(labels, labels.stat().st_mtime_ns)
    index = {word.lower(): label for label, word in enumerate(classes)}
    listed: list[tuple[str, Path]] = []
    for number, word in enumerate(names):
        place = f"{where}, line {number + 1}"
        path = _label_path(root, labels, word)
        if isinstance(path, ValueError):
            problems.add("unsafe-path", place, str(path))
        elif not files.is_file(path):
            problems.add("missing-annotation", place, f"{shown(word)} has no file {printable(path)}")
        else:
            listed.append((path.stem, path))
    folder = labels.parent / "image_2"
    by_stem = {path.stem: path for path in files.list_files(folder)}
    wanted = [by_stem[word].name if word in by_stem else f"{word}.png" for word, _ in listed]
    found = ImageFinder(labels.parent, [folder]).find(wanted, [(0, 0)] * len(wanted), problems, printable(labels))
    records = [
        _read_record(path, word, image if isinstance(image, Path) else folder / name, index, problems)
        for (word, path), image, name in zip(listed, found, wanted)
    ]
    return DataSplit(
        "kitti", name, root, records, classes, tuple(range(1, len(classes) + 1)), truth=labels, problems=problems.items
    )


def _label_path(root: Path, labels: Path, word: str) -> Path | ValueError:
    """The label file of a line of a list: ``000001``, or a path such as ``image_2/000001.png``."""
    names = [f"{word}.txt", f"{stem_of(word.replace(chr(92), '/').rsplit('/', 1)[-1])}.txt"]
    paths: list[Path | ValueError] = []
    for name in names:
        try:
            paths.append(files.safe_path(root, labels, name))
        except ValueError as error:
            paths.append(error)
    return next((path for path in paths if isinstance(path, Path) and files.is_file(path)), paths[0])


def _image_names(root: Path, labels: Path, split: str, problems: Problems) -> tuple[list[str], str]:
    lists = _lists(root, labels)
    if split in lists:
        lines = files.read_lines(lists[split])
        return list(dict.fromkeys(line.strip() for line in lines if line.strip())), printable(lists[split])
    names = [path.stem for path in files.list_files(labels, {".txt"})]
    if split != "trainval":
        names = names[0::2] if split == "train" else names[1::2]
        problems.add("made-split", printable(labels), f"no ImageSets/{split}.txt: every other image is {split}")
    return names, printable(labels)


@lru_cache(maxsize=4)
def _classes(labels: Path, stamp: int) -> tuple[str, ...]:
    """Classes that occur in any label file: KITTI's in its order, then others by name."""
    found: set[str] = set()
    for path in files.list_files(labels, {".txt"}):
        try:
            text = path.read_bytes().decode("utf-8-sig", "replace")
        except OSError:
            continue
        found.update(line.split(None, 1)[0] for line in text.splitlines() if line.strip())
    found = {word for word in found if word.lower() != "dontcare"}
    usual = [name for name in KITTI_CLASSES if name in found]
    return (*usual, *sorted(found - set(usual)))


def _read_record(path: Path, name: str, image: Path, index: dict[str, int], problems: Problems) -> ImageRecord:
    height, width = image_size(image) or (0, 0)
    rows, labels, flags = [], [], []
    for number, line in enumerate(files.read_lines(path, may_be_empty=True)):
        words, place = line.split(), f"{printable(path)}, line {number + 1}"
        if not words:
            continue
        if len(words) not in (_COLUMNS, _COLUMNS + 1):
            problems.add("bad-annotation", place, f"{len(words)} columns where KITTI has {_COLUMNS}")
            continue
        dontcare = words[0].lower() == "dontcare"
        label = 0 if dontcare else index.get(words[0].lower())
        if label is None:
            problems.add("unknown-category", place, f"class {shown(words[0])}")
            continue
        try:
            values = [float(word) for word in words[1:8]]
        except ValueError:
            values = [math.nan]
        if not all(abs(value) < 1e9 for value in values):
            problems.add("bad-number", place, f"{shown(' '.join(words[1:8]))}")
            continue
        truncated, occluded, _, left, top, right, bottom = values
        if right <= left or bottom <= top:
            problems.add("empty-box", place, f"box {[left, top, right, bottom]} has no area")
            continue
        if width and (left >= width or top >= height or right <= 0 or bottom <= 0):
            problems.add(
                "outside-box", place, f"box {[left, top, right, bottom]} lies outside the image ({width} x {height})"
            )
            continue
        rows.append((left, top, right, bottom))
        labels.append(label)
        flags.append((truncated, occluded, dontcare))
    boxes = np.array(rows, dtype=np.float64).reshape(-1, 4)
    facts = np.array(flags, dtype=np.float64).reshape(-1, 3)
    ignore = facts[:, 2] > 0
    attributes = {
        "truncated": facts[:, 0],
        "occluded": facts[:, 1].astype(np.int64),
        "dontcare": ignore.astype(np.int64),
    }
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return ImageRecord(
        image,
        image.name,
        name,
        height,
        width,
        boxes,
        np.array(labels, dtype=np.int64),
        ignore,
        areas,
        attributes=attributes,
        source=printable(path),
    )
