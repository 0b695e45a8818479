"""Pascal VOC: one XML file per image, lists of images in ImageSets/Main, perhaps several years side by side.

VOC counts pixels from 1 and includes the last one: (xmin, ymin, xmax, ymax) is the box x1 = xmin - 1, y1 = ymin - 1,
x2 = xmax, y2 = ymax here. Difficult objects are ignored in training as in the official evaluation.

Without ImageSets the folders make the splits: ``train/images`` with ``train/annotations``, ``images/train`` with
``annotations/train``, ``train/`` with pictures and XML together; a single folder is the split ``all``.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from cascade_rcnn.data import files
from cascade_rcnn.data.formats.find_images import ImageFinder, same_name, stem_of
from cascade_rcnn.data.images import IMAGE_SUFFIXES, image_size, lies_in_file
from cascade_rcnn.data.problems import Problems
from cascade_rcnn.data.records import DataSplit, ImageRecord
from cascade_rcnn.errors import DataError
from cascade_rcnn.messages import printable, shown

_LABEL_SIDES = ("xmin", "ymin", "xmax", "ymax")
_FLAGS = ("difficult", "truncated", "occluded")
_IMAGES = ("JPEGImages", "images", "Images", "imgs", "img", "image")
_ANNOTATIONS = ("Annotations", "annotations", "xmls", "xml", "labels", "Labels")
_MASKS = frozenset({"segmentationclass", "segmentationobject", "masks", "mask"})


@dataclass(frozen=True, slots=True)
class _List:
    """A list of images: of a file in ImageSets/Main, or all annotations of a folder."""

    prefix: str  # the year, or the folder's name
    name: str
    folder: Path  # the year folder
    annotations: Path
    images: Path
    file: Path | None


@dataclass(frozen=True, slots=True)
class VocObject:
    """One ``object`` element as it is written; numbers that cannot be read are NaN."""

    name: str
    corners: tuple[float, float, float, float]  # xmin, ymin, xmax, ymax, from 1, the last pixel included
    flags: dict[str, bool | None]  # difficult, truncated, occluded; None for what is neither yes nor no
    shape: str = "bndbox"  # the element that gives the corners; "" where there is none

    @property
    def difficult(self) -> bool:
        """Whether the object is marked as difficult."""
        return bool(self.flags["difficult"])


class _NoDoctype(ElementTree.TreeBuilder):
    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("a document type declaration, which can expand without end, is refused")


def parse_xml(path: Path) -> ElementTree.Element:
    """The root of an XML file. Raises ``DataError`` for what is not XML and for any document type declaration."""
    data = files.read_bytes(path)
    declared = re.match(rb"""\s*<\?xml[^>]*encoding=["']([\w.-]+)["'][^>]*\?>""", data[:300])
    try:
        if declared and declared[1].lower() not in (b"utf-8", b"utf-16", b"us-ascii", b"iso-8859-1"):
            # gb2312, shift_jis, ...: Python knows more encodings than the parser
            data = data[declared.end() :].decode(declared[1].decode()).encode("utf-8")
        return ElementTree.fromstring(data, ElementTree.XMLParser(target=_NoDoctype()))
    except DataError:
        raise
    except (ElementTree.ParseError, ValueError, LookupError, RecursionError) as error:
        raise DataError(f"{printable(path)}: not usable XML ({error})") from None


def read_objects(tree: ElementTree.Element) -> Iterator[VocObject]:
    """The objects of an annotation, for training as for the official evaluation."""
    for item in tree.iterfind("object"):
        shape, corners = _corners(item)
        flags = {flag: _flag(item.findtext(flag)) for flag in _FLAGS}
        yield VocObject((item.findtext("name") or "").strip(), corners, flags, shape)


def list_entry(line: str) -> str:
    """The image of a line of a list: ``000001``, or ``000001  -1`` of a list per class."""
    name, _, flag = line.strip().rpartition(" ")
    return name.strip() if flag in ("1", "-1", "0") and name.strip() else line.strip()


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
        for name in _ANNOTATIONS:
            if folder.name not in _ANNOTATIONS and _has_xml(folder / name):
                found += _lists_of_folder(folder, folder / name)
                break
        if found and folder == root:
            return found
    words = [files.split_word(entry.folder.name) for entry in found]
    if found and all(words) and len(set(words)) == len(words):
        # train/images with train/annotations, or an export in each of train/ and val/: the folders are the splits
        return [replace(entry, prefix="", name=entry.folder.name) for entry in found]
    if not found:  # Roboflow: train/, valid/, test/ with pictures and XML together
        found = [
            _List("", child.name, child, child, _pictures_of(child, children), None)
            for child in children
            if _has_xml(child, depth=0)
        ]
    if not found and _has_xml(root, depth=0):
        found = [_List("", "all", root, root, root, None)]
    return found


def _pictures_of(folder: Path, children: Sequence[Path]) -> Path:
    """Where the pictures of a folder of XML files are: with them, else in train_images beside train_annotations."""
    word = files.split_word(folder.name)
    if not word or files.list_files(folder):
        return folder
    same = [child for child in children if files.split_word(child.name) == word and files.list_files(child)]
    return same[0] if len(same) == 1 else folder


def _lists_of_folder(folder: Path, annotations: Path) -> Iterator[_List]:
    images = next((folder / name for name in _IMAGES if (folder / name).is_dir()), folder)
    prefix = folder.name.removeprefix("VOC")
    wanted = {path.stem: path for path in files.list_files(folder / "ImageSets" / "Main", {".txt"})}
    for place in (folder / "ImageSets", folder):  # lists that lie where other tools put them
        if not wanted:
            lists = files.list_files(place, {".txt"})
            wanted = {path.stem: path for path in lists if files.split_word(path.stem) or path.stem == "trainval"}
    # aeroplane_train.txt and its like repeat train.txt with a flag per image
    names = [stem for stem in wanted if "_" not in stem or stem.split("_")[-1] not in wanted]
    for name in names:
        yield _List(prefix, name, folder, annotations, images, wanted[name])
    if names:
        return
    inner = _split_folders(annotations)
    if not inner and not files.list_files(annotations, {".xml"}):  # annotations/xmls/train
        inner = [child for middle in files.subfolders(annotations) for child in _split_folders(middle)]
    for child in inner:  # annotations/train with images/train
        pictures = next((images / p.name for p in files.subfolders(images) if p.name == child.name), images)
        yield _List(prefix, child.name, folder, child, pictures, None)
    if not inner:
        yield _List(prefix, "all", folder, annotations, images, None)


def _split_folders(folder: Path) -> list[Path]:
    return [child for child in files.subfolders(folder) if files.split_word(child.name) and _has_xml(child)]


def _has_xml(folder: Path, depth: int = 3) -> bool:
    """Whether a folder holds annotations, itself or in folders below; CVAT's one XML for all images is none of them."""
    try:
        first = next((path for path in sorted(folder.iterdir()) if path.suffix.lower() == ".xml"), None)
        if first is not None:
            with first.open("rb") as stream:
                return b"<annotations" not in stream.read(4096)
    except OSError:
        return False
    return depth > 0 and any(_has_xml(child, depth - 1) for child in files.subfolders(folder))


def read_voc(root: Path, split: str, *, problems: Problems | None = None) -> DataSplit:
    """Reads one split of a VOC data set: ``train``, ``2007_trainval``; a bare name means all years that have it.

    ``image_id`` is the name without suffix; difficult objects have the ignore flag and the attribute ``difficult``.
    Raises ``DataError`` with file, object and reason.
    """
    problems = problems or Problems()
    lists = _lists(root)
    chosen = [entry for entry in lists if split in (f"{entry.prefix}_{entry.name}", entry.name)]
    name = split
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
    usual = chosen[0].folder / "ImageSets" / "Main" / f"{chosen[0].name}.txt"
    official = len(chosen) == 1 and chosen[0].file == usual and chosen[0].annotations.name == "Annotations"
    for entry in chosen:
        part, plain = _read_list(entry, labels, problems)
        records += part
        official = official and plain
    return DataSplit(
        "voc",
        name if chosen[0].file is None else split,
        root,
        records,
        tuple(names),
        tuple(range(1, len(names) + 1)),
        truth=chosen[0].folder if official else None,
        problems=problems.items,
    )


def _stamp(folder: Path) -> int:
    return sum(place.stat().st_mtime_ns for place in (folder, *files.subfolders(folder)))


@lru_cache(maxsize=16)
def _class_names(folder: Path, stamp: int) -> frozenset[str]:
    """Names of all objects below a folder of XML files, whatever the split; unreadable files are met by their split."""
    found: set[str] = set()
    for path in files.list_files_below(folder, {".xml"}):
        try:
            found.update(item.name for item in read_objects(parse_xml(path)) if item.name)
        except DataError:
            continue
    return frozenset(found)


def _read_list(entry: _List, labels: dict[str, int], problems: Problems) -> tuple[list[ImageRecord], bool]:
    """Records of a list, and whether the list names its annotation files plainly, as the official evaluation wants."""
    annotations = _stems(entry.annotations, {".xml"})
    if entry.file is None:
        names = [_name_below(entry.annotations, path) for path in files.list_files_below(entry.annotations, {".xml"})]
    else:
        lines = [line.strip() for line in files.read_lines(entry.file) if line.strip()]
        # a name may end like a flag: "bolt 1"
        names = list(dict.fromkeys(line if same_name(line) in annotations else list_entry(line) for line in lines))
    trees: list[tuple[str, Path, ElementTree.Element]] = []
    plain = True
    for number, name in enumerate(names):
        where = f"{printable(entry.file)}, entry {number + 1}" if entry.file else printable(entry.folder)
        path: Path | ValueError
        try:
            path = files.safe_path(entry.folder, entry.annotations, f"{name}.xml")
        except ValueError as error:
            path = error
        if isinstance(path, ValueError) or not files.is_file(path):
            plain = False
            same = _by_end(annotations, name)
            if same is None and isinstance(path, ValueError):
                problems.add("unsafe-path", where, str(path))
                continue
            if same is None:
                problems.add("missing-annotation", where, f"{shown(name)} has no file {printable(path)}")
                continue
            name, path = _name_below(entry.annotations, same), same
        try:
            trees.append((name, path, parse_xml(path)))
        except DataError as error:
            problems.add("bad-annotation", where, str(error))
    images = _find_images(entry, trees, problems)
    written = [_size(tree) for _, _, tree in trees]
    sizes = [size if all(size) else image_size(image) or (0, 0) for size, image in zip(written, images)]
    objects = [list(read_objects(tree)) for _, _, tree in trees]
    _find_other_coding(objects, sizes, printable(entry.file or entry.annotations), problems)
    records = [
        _read_record(image, size, of_image, labels, (name, printable(path)), problems)
        for image, size, of_image, (name, path, _) in zip(images, sizes, objects, trees)
    ]
    for record, size in zip(records, written):
        record.sized = all(size)
    return records, plain


def _find_other_coding(
    objects: list[list[VocObject]], sizes: Sequence[tuple[int, int]], where: str, problems: Problems
) -> None:
    """Boxes that all are fractions of the image, or x, y, width, height: told, and read as what they are."""
    scale = np.array([(width, height) for (height, width), of_image in zip(sizes, objects) for _ in of_image])
    corners = np.array([item.corners for of_image in objects for item in of_image]).reshape(-1, 4)
    if not len(corners) or not scale.all() or not np.isfinite(corners).all():
        return
    if (corners >= -0.01).all() and (corners <= 1.01).all() and (corners % 1).any():
        right = corners * np.tile(scale, 2) + (1, 1, 0, 0)
        kind, text = "relative-boxes", "lie between 0 and 1"
    else:
        empty = (corners[:, 2:] < corners[:, :2]).any(axis=1)
        fits = (corners[:, :2] + corners[:, 2:] <= scale + 1).all(axis=1) & (corners[:, 2:] > 0).all(axis=1)
        if len(corners) < 3 or empty.mean() < 0.25 or fits.mean() < 0.95:
            return
        right = np.c_[corners[:, :2] + 1, corners[:, :2] + corners[:, 2:]]
        kind, text = "xywh-as-corners", "end before they begin, but fit as x, y, width, height"
    first = shown(corners[0].round(4).tolist())
    problems.add(kind, where, f"bndbox of {len(corners):,} objects {text}; e.g. {first} (xmin, ymin, xmax, ymax)")
    rows = iter(right.tolist())
    for of_image in objects:
        of_image[:] = [replace(item, corners=tuple(next(rows))) for item in of_image]


def _stems(folder: Path, suffixes: frozenset[str] | set[str] = IMAGE_SUFFIXES) -> dict[str, list[Path]]:
    """Files below a folder by their path without ending, and by their name alone."""
    found: dict[str, list[Path]] = defaultdict(list)
    for path in files.list_files_below(folder, suffixes, skip=_MASKS):
        for key in {same_name(_name_below(folder, path)), same_name(path.stem)}:
            found[key].append(path)
    return found


def _name_below(folder: Path, path: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def _by_end(table: dict[str, list[Path]], name: str) -> Path | None:
    """The only file that a name with an ending, another folder or another spelling can mean."""
    parts = name.replace("\\", "/").split("/")
    for text in ("/".join(parts[start:]) for start in range(len(parts))):
        for key in (same_name(text), same_name(stem_of(text))):
            if len(found := table.get(key, [])) == 1:
                return found[0]
    return None


def _find_images(
    entry: _List, trees: Sequence[tuple[str, Path, ElementTree.Element]], problems: Problems
) -> list[Path]:
    """The picture of each annotation: that of the same name, else the one that its ``filename`` means."""
    table = _stems(entry.images)
    images: dict[int, Path] = {}
    for number, (name, path, tree) in enumerate(trees):
        written = (tree.findtext("filename") or "").strip()
        found = table.get(same_name(name)) or table.get(same_name(path.stem), [])
        found = [file for file in found if same_name(_name_below(entry.images, file)) == same_name(name)] or found
        # two pictures of one name (a.jpg, a.png): the one that the annotation names, then the one spelled alike
        found = sorted(
            found, key=lambda file: (file.name != written, file.stem != path.stem, file.suffix.lower() != ".jpg")
        )
        if len(found) == 1 or (found and found[0].parent == found[-1].parent):
            images[number] = found[0]
    rest = [number for number in range(len(trees)) if number not in images]
    names = [(trees[number][2].findtext("filename") or "").strip() or f"{trees[number][0]}.jpg" for number in rest]
    sizes = [_size(trees[number][2]) for number in rest]
    split = entry.name if entry.file is None else ""
    finder = ImageFinder(entry.folder, [entry.images], split=split)
    for number, image in zip(rest, finder.find(names, sizes, problems, printable(entry.annotations)) if rest else []):
        there = isinstance(image, Path) and files.is_file(image)
        images[number] = image if there and isinstance(image, Path) else entry.images / f"{trees[number][0]}.jpg"
    return [images[number] for number in range(len(trees))]


def _size(tree: ElementTree.Element) -> tuple[int, int]:
    """(height, width) by the annotation, zeros where it does not say."""
    width, height = (_number(tree.findtext(f"size/{side}")) for side in ("width", "height"))
    return (int(height), int(width)) if 1 <= width < 10**6 and 1 <= height < 10**6 else (0, 0)


def _read_record(
    image: Path,
    size: tuple[int, int],
    objects: list[VocObject],
    labels: dict[str, int],
    source: tuple[str, str],
    problems: Problems,
) -> ImageRecord:
    """``source``: the image's id and its annotation file."""
    (height, width), (name, where) = size, source
    boxes, kept, flags = [], [], []
    for position, item in enumerate(objects):
        place = f"{where}, object {position + 1}"
        box = _read_box(item, (height, width), image, place, problems)
        label = labels.get(item.name)
        if label is None:
            problems.add("bad-annotation", place, "an object without a name")
        elif box is not None:
            for flag, value in item.flags.items():
                if value is None:
                    problems.add("bad-flag", place, f"{flag} is neither 0 nor 1; read as 0")
            boxes.append(box)
            kept.append(label)
            flags.append([bool(item.flags[flag]) for flag in _FLAGS])
    table = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    marks = np.array(flags, dtype=np.bool_).reshape(-1, 3)
    return ImageRecord(
        image,
        image.name,
        name,
        height,
        width,
        table,
        np.array(kept, dtype=np.int64),
        marks[:, 0].copy(),
        (table[:, 2] - table[:, 0]) * (table[:, 3] - table[:, 1]),
        attributes={flag: marks[:, column].astype(np.int64) for column, flag in enumerate(_FLAGS)},
        source=where,
    )


def _number(text: str | None, default: float = math.nan) -> float:
    try:
        return float(text) if text is not None else default
    except ValueError:
        return default


def _flag(text: str | None) -> bool | None:
    """Whether a flag is set; writers put numbers, words or nothing. None for anything else."""
    word = (text or "").strip().lower()
    if word in ("", "no", "false", "unspecified", "none"):
        return False
    if word in ("yes", "true"):
        return True
    number = _number(word)
    return None if math.isnan(number) else number > 0


def _corners(item: ElementTree.Element) -> tuple[str, tuple[float, float, float, float]]:
    """The element that gives an object's box, and xmin, ymin, xmax, ymax as VOC counts them."""
    if (box := item.find("bndbox")) is not None:
        left, top, right, bottom = (_number(box.findtext(side)) for side in _LABEL_SIDES)
        return "bndbox", (left, top, right, bottom)
    points: list[tuple[float, float]] = []
    shape = ""
    if (turned := item.find("robndbox")) is not None:  # roLabelImg: centre, size, angle in radians
        x, y, wide, high, angle = (_number(turned.findtext(key)) for key in ("cx", "cy", "w", "h", "angle"))
        across, along = (math.cos(angle), math.sin(angle)) if math.isfinite(angle) else (math.nan, math.nan)
        for u, v in ((-1, -1), (1, -1), (1, 1), (-1, 1)):
            points.append(
                (x + (u * wide * across - v * high * along) / 2, y + (u * wide * along + v * high * across) / 2)
            )
        shape = "robndbox"
    elif (polygon := item.find("polygon")) is not None:  # Roboflow: x1 y1 x2 y2 ...; LabelMe: pt/x, pt/y
        for number in range(1, len(polygon) // 2 + 1):
            if polygon.find(f"x{number}") is not None:
                points.append((_number(polygon.findtext(f"x{number}")), _number(polygon.findtext(f"y{number}"))))
        points += [(_number(pt.findtext("x")), _number(pt.findtext("y"))) for pt in polygon.iterfind("pt")]
        shape = "polygon" if len(points) >= 2 else ""
    if not shape:
        return "", (math.nan,) * 4
    if any(math.isnan(value) for point in points for value in point):
        return shape, (math.nan,) * 4
    xs, ys = zip(*points)
    return shape, (min(xs) + 1, min(ys) + 1, max(xs), max(ys))


def _read_box(
    item: VocObject, size: tuple[int, int], image: Path, place: str, problems: Problems
) -> tuple[float, float, float, float] | None:
    left, top, right, bottom = item.corners
    height, width = size
    if not item.shape:
        problems.add("bad-annotation", place, "an object without bndbox")
        return None
    if not all(abs(value) < 1e9 for value in item.corners):  # false for NaN
        problems.add("bad-number", place, f"{item.shape} {shown(list(item.corners))} (xmin, ymin, xmax, ymax)")
        return None
    # xmax = xmin is an object one pixel wide; a box of a single pixel is a slip of the mouse
    if right < left or bottom < top or (right == left and bottom == top):
        problems.add("empty-box", place, f"bndbox {shown([left, top, right, bottom])} has no area")
        return None
    beyond = left > width or top > height
    if width and (right < 1 or bottom < 1 or (beyond and not lies_in_file(image, left - 1, top - 1))):
        problems.add(
            "outside-box",
            place,
            f"bndbox {shown([left, top, right, bottom])} lies outside the image ({width} x {height})",
        )
        return None
    if item.shape != "bndbox":
        kind = "rotated-box" if item.shape == "robndbox" else "box-from-mask"
        problems.add(kind, place, f"no bndbox; the box is taken from its {item.shape}")
    return left - 1, top - 1, right, bottom
