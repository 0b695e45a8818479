"""YOLO txt: one text file per image, a line per object, coordinates as fractions of the image.

``class cx cy width height`` is a box, ``class x1 y1 x2 y2 x3 y3 ...`` a polygon; with ``kpt_shape: [n, 2 or 3]`` in the
data file a box is followed by keypoints, which are left out. Names and splits come from ``data.yaml``; without it names
come from ``classes.txt`` or ``obj.names`` and splits from the lists (``train.txt``, ``valid.txt``) or the folders
(``images/train``, ``train/images``). The text file of ``images/a.jpg`` is ``labels/a.txt``, or ``a.txt`` beside it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.data import files
from cascade_rcnn.data.formats.find_images import ImageFinder, same_name
from cascade_rcnn.data.images import image_size
from cascade_rcnn.data.problems import Problems
from cascade_rcnn.data.records import DataSplit, ImageRecord, Segmentation
from cascade_rcnn.errors import DataError
from cascade_rcnn.messages import printable, shown

_YAML = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
_NAMES = ("classes.txt", "obj.names", "_darknet.labels", "predefined_classes.txt")
_SPLITS = ("train", "training", "val", "valid", "validation", "test")
_LABELS = ("labels", "Labels", "label", "annotations", "txt")  # beside images/, the first that is there
_SLACK = 0.01  # of the image's side, by which rounded fractions may leave it


@dataclass(slots=True)
class _Layout:
    root: Path  # which every name stays below
    names: dict[int, str]  # by the number that label files write
    splits: dict[str, list[Path]]  # folders of images or text files that list images
    keypoints: int = 0  # numbers after each box
    broken: dict[str, DataError] = field(default_factory=dict)  # splits whose folder cannot be read, and why
    notes: list[tuple[str, str, str]] = field(default_factory=list)  # kind, where, message


@dataclass(slots=True)
class _Row:
    """A line of a label file that can be read."""

    place: str
    text: str
    label: int
    values: list[float]  # four numbers, or the points of a polygon


def yolo_splits(root: Path) -> list[str]:
    """Names of the splits of a YOLO data set; none where the folder is none."""
    if _yaml_file(root) is None and _names_file(root) is None:
        return []
    return list(_layout(root).splits)


def _yaml_file(root: Path) -> Path | None:
    """``data.yaml``, or the one file of any name that holds ``names`` and a split."""
    if root.suffix in (".yaml", ".yml"):
        return root if files.is_file(root) else None
    if known := next((root / name for name in _YAML if files.is_file(root / name)), None):
        return known
    found = [path for path in files.list_files(root, {".yaml", ".yml"}) if _is_data_file(path)]
    if len(found) > 1:
        raise DataError(
            f"{printable(root)}: {len(found)} data files ({', '.join(path.name for path in found[:4])}); "
            f"name one of them: --data {printable(found[0])}"
        )
    return found[0] if found else None


def _is_data_file(path: Path) -> bool:
    try:
        keys = {line.split(":")[0].strip("'\"") for line in files.read_lines(path) if line[:1].strip() and ":" in line}
    except DataError:
        return False
    return "names" in keys and bool(keys & {"path", *_SPLITS})


def _names_file(root: Path) -> Path | None:
    """The list of class names; none where train/ and val/ have each their own, other one: those are two data sets."""
    folders = (root, root / "labels", root / "train", root / "train" / "labels", root / "labels" / "train")
    found = next((folder / name for folder in folders for name in _NAMES if files.is_file(folder / name)), None)
    if found is not None and (root / "train") in found.parents:
        for child in files.subfolders(root):
            other = child / found.relative_to(root / "train")
            if files.split_word(child.name) and files.is_file(other) and other.read_bytes() != found.read_bytes():
                return None
    return found


def _layout(root: Path) -> _Layout:
    if path := _yaml_file(root):
        return _read_yaml(path)
    path = _names_file(root)
    if path is None:
        raise DataError(f"{printable(root)}: neither data.yaml nor classes.txt; this is not YOLO's layout")
    names = [line.strip() for line in files.read_lines(path) if line.strip()]
    return _Layout(root, dict(enumerate(names)), _list_splits(root) or _folder_splits(root))


def _list_splits(root: Path) -> dict[str, list[Path]]:
    """CVAT and darknet: lists of images, named in ``obj.data`` or lying beside it as ``train.txt``, ``valid.txt``."""
    splits = {}
    for name in _SPLITS:
        path = root / f"{name}.txt"
        if files.is_file(path):
            splits[name] = [path]
    data = root / "obj.data"
    for line in files.read_lines(data) if files.is_file(data) else []:
        key, _, value = (word.strip() for word in line.partition("="))
        path = root / value.replace("\\", "/").rsplit("/", 1)[-1]
        if key in _SPLITS and value and files.is_file(path) and [path] not in splits.values():
            splits[key] = [path]
    return splits


def _folder_splits(root: Path) -> dict[str, list[Path]]:
    splits = {}
    for name in _SPLITS:
        for folder in (root / "images" / name, root / name / "images", root / name):
            if files.is_dir(folder) and files.list_files_below(folder):
                splits[name] = [folder]
                break
    if splits:
        return splits
    for parent in (root / "images", root):  # my_train, my_val
        found = {child.name: [child] for child in files.subfolders(parent) if files.split_word(child.name)}
        if found := {name: places for name, places in found.items() if files.list_files_below(places[0])}:
            return found
    return {"all": [next((folder for folder in (root / "images", root) if files.list_files_below(folder)), root)]}


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
    layout = _Layout(path.parent, _read_names(content.get("names"), path), {}, _read_keypoints(content, path))
    base = _base_folder(content.get("path"), path, layout)
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
        try:
            places = [_place(path, base, word, layout, name) for word in words]
        except DataError as error:  # the other splits may be read
            if name == "test" and layout.splits and not any((base / word).exists() for word in words):
                layout.notes.append(("absent-split", printable(path), f"test: {shown(value)} is not there"))
                continue  # Roboflow names it although nothing is in it
            places, layout.broken[name] = [], error
        if words:
            layout.splits[name] = places
    layout.splits = layout.splits or _folder_splits(path.parent)
    return layout


def _read_names(names: Any, path: Path) -> dict[int, str]:
    """Class names by number, from a list or from a mapping that may begin at any number."""
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        return dict(enumerate(names))
    if isinstance(names, dict) and names and all(isinstance(name, str) for name in names.values()):
        numbers = [str(key).strip() for key in names]
        if all(number.isdecimal() and len(number) < 7 for number in numbers):
            found = {int(number): name for number, name in zip(numbers, names.values())}
            if len(found) == len(numbers):
                return dict(sorted(found.items()))
    raise DataError(f"{printable(path)}: names {shown(names)}; a list of class names is wanted")


def _read_keypoints(content: dict[str, Any], path: Path) -> int:
    shape = content.get("kpt_shape")
    if shape is None:
        return 0
    if not (isinstance(shape, list) and len(shape) == 2 and all(str(side).isdecimal() for side in shape)):
        raise DataError(f"{printable(path)}: kpt_shape {shown(shape)}; [number of points, 2 or 3] is wanted")
    return int(shape[0]) * int(shape[1])


def _base_folder(value: Any, path: Path, layout: _Layout) -> Path:
    """The folder that ``path`` names, where it lies below the data file's; else the data file's own."""
    here = path.parent
    if not isinstance(value, str) or value in ("", "~", "null"):
        return here
    base = here / value.replace("\\", "/")
    if files.is_dir(base):
        if os.path.realpath(base) == os.path.realpath(here):
            return here
        try:
            return files.safe_path(here.parent if here.name else here, here, value)
        except ValueError:
            return base  # whether its folders may be read is for _place to say
    layout.notes.append(("other-path", printable(path), f"path {shown(value)} is not here"))
    return here


def _place(path: Path, base: Path, entry: str, layout: _Layout, split: str) -> Path:
    """The folder or list that a split's entry means. Roboflow writes ``../train/images`` for ``train/images``."""
    entry = entry.replace("\\", "/")
    reason = ""
    try:
        place = files.safe_path(path.parent, base, entry)
        if files.is_dir(place) or files.is_file(place):
            return place
    except ValueError as error:
        reason = str(error)
    for inside in _ends_of(entry):
        there = path.parent / inside
        if files.is_dir(there) or files.is_file(there):
            if str(inside) != entry.lstrip("./"):
                layout.notes.append(("other-path", printable(path), f"{shown(entry)} is not here"))
            return there
    beside = {files.split_word(name): places for name, places in _folder_splits(path.parent).items()}
    word = files.split_word(split)
    if word and word == files.split_word(entry) and word in beside:
        place = beside[word][0]
        layout.notes.append(("other-path", printable(path), f"{shown(entry)} is not here, {printable(place)} is read"))
        return place
    if reason:
        there = base / entry
        if files.is_dir(there) or files.is_file(there):
            folder = printable(base) if base != path.parent else "that folder"
            raise DataError(
                f"{printable(path)}: {reason}; copy {path.name} into {folder} and give that as --data, "
                "or put the images beside it"
            )
        raise DataError(f"{printable(path)}: {reason}; put the folders beside {path.name}")
    raise DataError(f"{printable(place)}: no such folder of images; fix {path.name}")


def _ends_of(entry: str) -> Iterator[Path]:
    """The end of a path from another machine, as long as it still names its split: /data/set/train/images is
    train/images, or images/train, but never images, which may hold another split too.
    """
    parts = [part for part in entry.split("/") if part not in ("..", ".", "")]
    words = [number for number, part in enumerate(parts) if files.split_word(part)]
    last = words[-1] if words else len(parts) - 1
    yield from (Path(*parts[start:]) for start in range(last + 1))
    if words and len(parts) - last == 2:
        yield Path(parts[-1], parts[last])


def read_yolo(root: Path, split: str, *, problems: Problems | None = None) -> DataSplit:
    """Reads one split; boxes are scaled by the sizes in the images' headers. Raises ``DataError`` with its place."""
    problems = problems or Problems()
    layout = _layout(root)
    name = files.resolve_split(list(layout.splits), split, root)
    if name in layout.broken:
        raise layout.broken[name]
    base = root.parent if files.is_file(root) else root
    for note in layout.notes:
        problems.add(*note)
    labels = _LabelFiles()
    rows: list[list[_Row]] = []
    images: list[tuple[Path, Path, tuple[int, int]]] = []  # picture, label file, (height, width)
    numbers = {number: label for label, number in enumerate(layout.names)}
    unlabelled: list[Path] = []
    for image in dict.fromkeys(image for place in layout.splits[name] for image in _images(layout, place, problems)):
        size = image_size(image)
        if size is None:
            problems.add("unreadable-image", printable(image), "YOLO's boxes need its size; it is left out")
            continue
        label_file = labels.of(image)
        if label_file is None:
            unlabelled.append(image)
            label_file = labels.usual(image)
        images.append((image, label_file, size))
        rows.append(_read_rows(label_file, numbers, layout, problems))
    _report_missing(layout.splits[name], labels, unlabelled, len(images), problems)
    where = f"{printable(base)} {name}"
    _find_misread_rows(rows, layout, where, problems)
    records = [
        _record(image, base, size, of_image, label_file, problems)
        for (image, label_file, size), of_image in zip(images, rows)
    ]
    has_masks = any(record.segmentations and any(record.segmentations) for record in records)
    if not has_masks:
        for record in records:
            record.segmentations = None
    return DataSplit(
        "yolo",
        name,
        base,
        records,
        tuple(layout.names.values()),
        tuple(layout.names),
        has_masks=has_masks,
        problems=problems.items,
    )


def _images(layout: _Layout, place: Path, problems: Problems) -> list[Path]:
    if files.is_dir(place):
        return files.list_files_below(place, skip=frozenset({"labels", "label"}))
    if place.suffix != ".txt":
        raise DataError(f"{printable(place)}: no such folder of images; fix data.yaml")
    lines = [(number, line.strip()) for number, line in enumerate(files.read_lines(place), start=1) if line.strip()]
    finder = ImageFinder(layout.root, [layout.root, place.parent], split=place.stem)
    found = finder.find([line for _, line in lines], [(0, 0)] * len(lines), problems, printable(place))
    images = []
    for (number, line), path in zip(lines, found):
        where = f"{printable(place)}, line {number}"
        if isinstance(path, ValueError):
            problems.add("unsafe-path", where, str(path))
        elif not files.is_file(path):
            problems.add("missing-image", where, f"no file {shown(line)}; YOLO's boxes need its size: left out")
        else:
            images.append(path)
    return images


class _LabelFiles:
    """The label file of each image, and those that belong to none."""

    def __init__(self) -> None:
        self._used: set[Path] = set()
        self._listings: dict[Path, dict[str, Path]] = {}

    def of(self, image: Path) -> Path | None:
        """``labels/`` for the last ``images/`` of the path, else beside the picture; None where there is no file."""
        for folder in self._folders(image):
            if found := self._listing(folder).get(same_name(image.stem)):
                self._used.add(found)
                return found
        return None

    def usual(self, image: Path) -> Path:
        """Where an image's label file is looked for first."""
        return (next(self._folders(image)) / image.name).with_suffix(".txt")

    def orphans(self, places: Sequence[Path]) -> list[Path]:
        """Label files in the folders of a split's images, or in those that belong to them, which no image has."""
        folders = {folder for place in places for folder in self._folders(place / "_") if files.is_dir(folder)}
        found = {path for folder in folders for path in files.list_files_below(folder, {".txt"})}
        not_labels = {*_NAMES, *(f"{name}.txt" for name in _SPLITS)}
        return sorted(path for path in found - self._used if path.name not in not_labels and _is_label_file(path))

    def _folders(self, image: Path) -> Iterator[Path]:
        parts = list(image.parent.parts)
        for number in range(len(parts) - 1, -1, -1):
            if parts[number].lower() in ("images", "image", "imgs", "img"):
                for word in _LABELS:
                    yield Path(*parts[:number], word, *parts[number + 1 :])
                break
        yield image.parent

    def _listing(self, folder: Path) -> dict[str, Path]:
        if folder not in self._listings:
            self._listings[folder] = {same_name(path.stem): path for path in files.list_files(folder, {".txt"})}
        return self._listings[folder]


def _is_label_file(path: Path) -> bool:
    """Whether the first line holds numbers, five or more."""
    try:
        first = next((line.split() for line in files.read_lines(path, may_be_empty=True) if line.strip()), [])
        return len([float(word) for word in first]) >= 5
    except (DataError, ValueError):
        return False


def _report_missing(
    places: Sequence[Path], labels: _LabelFiles, unlabelled: list[Path], total: int, problems: Problems
) -> None:
    """Label files without an image; images without a label file, which YOLO means as background."""
    for path in labels.orphans([place for place in places if files.is_dir(place)]):
        problems.add("orphan-label", printable(path), f"no image {path.stem}.* beside it or in its images folder")
    if unlabelled and len(unlabelled) < total:
        problems.add(
            "unlabelled-image",
            printable(unlabelled[0]),
            f"{len(unlabelled):,} of {total:,} images have no label file: they are learned as background; "
            "write an empty file for those that are meant to be",
        )


def _read_rows(path: Path, numbers: dict[int, int], layout: _Layout, problems: Problems) -> list[_Row]:
    rows = []
    for line_number, line in enumerate(files.read_lines(path, may_be_empty=True) if files.is_file(path) else []):
        if words := line.split():
            place = f"{printable(path)}, line {line_number + 1}"
            if row := _read_row(words, numbers, layout, place, problems):
                rows.append(row)
    return rows


def _read_row(
    words: list[str], numbers: dict[int, int], layout: _Layout, place: str, problems: Problems
) -> _Row | None:
    text = " ".join(words)
    try:
        values = [float(word) for word in words]
    except ValueError:
        values = [float("nan")]
    count, pose = len(values), layout.keypoints
    if not all(abs(value) < 1e9 for value in values):  # false for NaN
        problems.add("bad-number", place, shown(text))
    elif pose and count not in (5, 5 + pose):
        problems.add("bad-annotation", place, f"{count} numbers; a box has 5, with kpt_shape {5 + pose}")
    elif not pose and count == 6:
        problems.add(
            "bad-annotation", place, "6 numbers; a box has 5 (a sixth, the score of a prediction, is no label)"
        )
    elif not pose and _is_pose(values):
        problems.add("pose-labels", place, f"{count} numbers: a box and {(count - 5) // 3} keypoints of three numbers")
    elif not pose and count != 5 and (count < 7 or count % 2 == 0):
        problems.add("bad-annotation", place, f"{count} numbers; a box has 5, a polygon 7, 9, 11, ...")
    elif values[0] != int(values[0]) or int(values[0]) not in numbers:
        listed = f"{min(numbers)} to {max(numbers)}"
        problems.add("unknown-category", place, f"class {shown(words[0])} of {len(numbers)} named classes ({listed})")
    elif max(map(abs, values[1:5] if pose else values[1:])) > 2:
        problems.add("bad-number", place, f"{shown(text)}: pixels, where fractions of the image are wanted")
    else:
        return _Row(place, text, numbers[int(values[0])], values[1:5] if pose else values[1:])
    return None


def _is_pose(values: list[float]) -> bool:
    """A box and points of three numbers, the third 0, 1 or 2, all within the box; a polygon is never like that."""
    if len(values) < 8 or (len(values) - 5) % 3:
        return False
    points = np.array(values[5:]).reshape(-1, 3)
    x, y, w, h = values[1:5]
    seen = points[points[:, 2] > 0, :2]
    inside = np.abs(seen - (x, y)) <= np.array([w, h]) / 2 + _SLACK
    return bool(np.isin(points[:, 2], (0, 1, 2)).all() and len(seen) and inside.mean() > 0.9)


def _find_misread_rows(rows: list[list[_Row]], layout: _Layout, where: str, problems: Problems) -> None:
    """What only all rows of a split show: corners for centre and size, poses without kpt_shape, rotated boxes."""
    every = [row for of_image in rows for row in of_image]
    boxes = np.array([row.values for row in every if len(row.values) == 4]).reshape(-1, 4)
    if len(boxes) >= 3 and _are_corners(boxes):
        problems.add(
            "corner-fractions",
            where,
            f"as cx cy w h many of {len(boxes):,} boxes leave their image, as x1 y1 x2 y2 none does; "
            f"e.g. {shown(next(row.text for row in every if len(row.values) == 4))}",
        )
        for row in every:
            if len(row.values) == 4:
                x1, y1, x2, y2 = row.values
                row.values = [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]
    elif len(boxes) >= 3 and _are_from_corner(boxes):
        problems.add(
            "topleft-as-centre",
            where,
            f"as cx cy w h many of {len(boxes):,} boxes leave their image, as x y w h from the upper left corner none "
            f"does; e.g. {shown(next(row.text for row in every if len(row.values) == 4))}",
        )
        for row in every:
            if len(row.values) == 4:
                x, y, width, height = row.values
                row.values = [x + width / 2, y + height / 2, width, height]
    if layout.keypoints and every:
        problems.add("keypoints", where, f"the keypoints of {len(every):,} objects are left out")
    shapes = {len(row.values) for row in every}
    count = shapes.pop() if len(shapes) == 1 and len(every) >= 3 else 0
    if count >= 6:
        values = np.array([row.values for row in every])
        if not layout.keypoints and _are_poses(values):
            triangles = "; if they are triangles, write the first corner again at the end" if count == 6 else ""
            problems.add(
                "pose-labels",
                where,
                f"all {len(every):,} rows hold {count + 1} numbers, like a box and {(count - 4) // 2} keypoints"
                f"{triangles}",
            )
        elif count == 8 and not layout.keypoints:
            problems.add("rotated-box", where, f"all {len(every):,} objects have four corners (8 numbers)")


def _are_corners(boxes: NDArray[np.float64]) -> bool:
    """Whether boxes [N, 4] that leave the image as centre and size would all fit as corners."""
    low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    leaves = (low < -_SLACK).any(axis=1) | (high > 1 + _SLACK).any(axis=1)
    fits = (
        (boxes[:, 2:] > boxes[:, :2]).all(axis=1) & (boxes >= -_SLACK).all(axis=1) & (boxes <= 1 + _SLACK).all(axis=1)
    )
    return bool(leaves.mean() >= 0.25 and fits.mean() >= 0.95)


def _are_from_corner(boxes: NDArray[np.float64]) -> bool:
    """Whether boxes [N, 4] that leave the image as centre and size would all fit as upper left corner and size."""
    leaves = (np.abs(boxes[:, :2] - 0.5) + boxes[:, 2:] / 2 > 0.5 + _SLACK).any(axis=1)
    fits = (boxes >= -_SLACK).all(axis=1) & (boxes[:, :2] + boxes[:, 2:] <= 1 + _SLACK).all(axis=1)
    return bool(leaves.mean() >= 0.25 and fits.mean() >= 0.95)


def _are_poses(values: NDArray[np.float64]) -> bool:
    """Whether rows [N, 4 + 2 P] are all a box (centre, size) within the image and P points within that box.

    Polygons in the middle of their image may look like that, but their outline hardly ever crosses itself; with a box
    and two points it does so now and then. Triangles (a box and one point) cannot.
    """
    centre, size = values[:, None, :2], values[:, None, 2:4]
    points = values[:, 4:].reshape(len(values), -1, 2)
    box_inside = (np.abs(centre - 0.5) + size / 2 <= 0.5 + _SLACK).all()
    if not (box_inside and (np.abs(points - centre) <= size / 2 + _SLACK).all()):
        return False
    some = values[:100].reshape(min(len(values), 100), -1, 2)
    if values.shape[1] == 6:
        return True
    crossing = float(np.mean([_crosses_itself(polygon) for polygon in some]))
    return crossing > (0.5 if values.shape[1] > 8 else 0.1)


def _crosses_itself(polygon: NDArray[np.float64]) -> bool:
    """Whether two sides of a closed polygon [P, 2] that do not share a corner cross."""
    start, end = polygon, np.roll(polygon, -1, axis=0)

    def side(a: NDArray[np.float64], b: NDArray[np.float64], c: NDArray[np.float64]) -> NDArray[np.float64]:
        return (b[..., 0] - a[..., 0]) * (c[..., 1] - a[..., 1]) - (b[..., 1] - a[..., 1]) * (c[..., 0] - a[..., 0])

    one, other = np.triu_indices(len(polygon), k=2)
    a, b, c, d = start[one], end[one], start[other], end[other]
    return bool(((side(a, b, c) * side(a, b, d) < 0) & (side(c, d, a) * side(c, d, b) < 0)).any())


def _record(
    image: Path, root: Path, size: tuple[int, int], rows: list[_Row], label_file: Path, problems: Problems
) -> ImageRecord:
    boxes, labels, masks = [], [], []
    for row in rows:
        box, polygon = _scale(row.values, size)
        if box[2] <= box[0] or box[3] <= box[1]:
            problems.add("empty-box", row.place, f"{shown(row.text)} has no area")
        elif box[0] >= size[1] or box[1] >= size[0] or box[2] <= 0 or box[3] <= 0:
            problems.add("outside-box", row.place, f"{shown(row.text)} lies outside the image")
        else:
            boxes.append(box)
            labels.append(row.label)
            masks.append(polygon)
    table = np.array(boxes, dtype=np.float64).reshape(-1, 4)
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
        (table[:, 2] - table[:, 0]) * (table[:, 3] - table[:, 1]),
        masks,
        source=printable(label_file),
    )


def _scale(values: list[float], size: tuple[int, int]) -> tuple[tuple[float, float, float, float], Segmentation | None]:
    """Box in pixels, and polygon where the row is one."""
    height, width = size
    if len(values) == 4:
        x, y, w, h = values
        return ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height), None
    points = np.array(values).reshape(-1, 2) * (width, height)
    (left, top), (right, bottom) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    return (left, top, right, bottom), [points.reshape(-1).tolist()]
