"""CVAT for images 1.1: one XML (``annotations.xml``) for all images, beside them or beside ``images/``.

Read are ``box`` (a rotated one by its corners and the box around them), ``polygon``, ``mask`` and ``ellipse`` (as a
polygon); points, polylines, cuboids and skeletons are counted. A project's subsets are the splits; several XML files
are one split each. Coordinates are pixels from 0. "CVAT for video" has tracks, which need frames: it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from cascade_rcnn.data import files
from cascade_rcnn.data.formats.find_images import ImageFinder
from cascade_rcnn.data.formats.shapes import (
    LeftOut,
    Shape,
    drop_unused_masks,
    ellipse_points,
    finite,
    make_record,
    mask_shape,
    polygon_shape,
    rotated_corners,
)
from cascade_rcnn.data.formats.voc import parse_xml
from cascade_rcnn.data.images import image_size
from cascade_rcnn.data.problems import Problems
from cascade_rcnn.data.records import DataSplit
from cascade_rcnn.data.rle import MaskCrop, encode_crop
from cascade_rcnn.errors import DataError
from cascade_rcnn.messages import printable, shown

_NO_AREA = ("points", "polyline", "cuboid", "skeleton")
_READ = ("box", "polygon", "mask", "ellipse")


def cvat_splits(root: Path) -> list[str]:
    """Names of the splits: the subsets, the files where they are several, else ``all``."""
    found: list[str] = []
    paths = _xml_files(root)
    for path in paths:
        try:
            found += [_split_of(image, path, paths) for image in _tree(path, path.stat().st_mtime_ns).iterfind("image")]
        except DataError:
            found.append(path.stem)  # reading it will say what is wrong
    return list(dict.fromkeys(found)) or (["all"] if paths else [])


def _xml_files(root: Path) -> list[Path]:
    if files.is_file(root):
        return [root] if root.suffix.lower() == ".xml" and _looks_like_cvat(root) else []
    for folder in (root, root / "annotations", root / "Annotations"):
        if found := [path for path in files.list_files(folder, {".xml"})[:50] if _looks_like_cvat(path)]:
            return found
    return []


def _looks_like_cvat(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return b"<annotations" in stream.read(4096)
    except OSError:
        return False


@lru_cache(maxsize=4)
def _tree(path: Path, stamp: int) -> ElementTree.Element:
    return parse_xml(path)


def _split_of(image: ElementTree.Element, path: Path, paths: Sequence[Path]) -> str:
    if subset := (image.get("subset") or "").strip():
        return subset
    return path.stem if len(paths) > 1 else "all"


def read_cvat(root: Path, split: str, *, problems: Problems | None = None) -> DataSplit:
    """Reads one split; classes are the labels of the task, in its order. ``image_id`` is CVAT's number of the image.

    Raises ``DataError`` with file, image and reason.
    """
    problems = problems or Problems()
    paths = _xml_files(root)
    for path in paths:
        _refuse_video(_tree(path, path.stat().st_mtime_ns), path, problems)
    name = files.resolve_split(cvat_splits(root), split, root)
    base = root.parent if files.is_file(root) else root
    names: dict[str, None] = {}
    chosen: list[tuple[Path, ElementTree.Element]] = []
    for path in paths:
        tree = _tree(path, path.stat().st_mtime_ns)
        names |= dict.fromkeys(_class_names(tree))
        chosen += [(path, image) for image in tree.iterfind("image") if _split_of(image, path, paths) == name]
    labels = {label: number for number, label in enumerate(names)}
    sizes = [_size(image) for _, image in chosen]
    finder = ImageFinder(base, [base / "images", base, base / name, base / "images" / name], split=name)
    found = finder.find([image.get("name") for _, image in chosen], sizes, problems, printable(paths[0]))
    left_out, seen = LeftOut(), set()
    records = []
    rotated = 0
    for number, ((path, image), file, size) in enumerate(zip(chosen, found, sizes)):
        place = f"{printable(path)}, image {shown(image.get('name') or '')}"
        if isinstance(file, ValueError):
            problems.add("unsafe-path", place, str(file))
            continue
        text = image.get("id") or str(number)
        key: int | str = int(text) if text.isdecimal() and len(text) < 18 else text
        if key in seen:  # tasks of a project each count from 0
            key = f"{path.stem}/{text}/{number}"
        seen.add(key)
        sized = all(size)
        size = size if sized else image_size(file) or (0, 0)
        shapes = list(_read_shapes(image, place, size, left_out, problems))
        rotated += sum(bool(shape.facts.pop("rotated", 0)) for shape in shapes)
        written = str(image.get("name"))
        records.append(
            make_record((file, written, key), size, shapes, labels, source=place, sized=sized, problems=problems)
        )
    left_out.report(problems)
    if rotated:
        problems.add("rotated-box", f"{printable(base)} {name}", f"{rotated:,} boxes are rotated")
    return DataSplit(
        "cvat",
        name,
        base,
        records,
        tuple(names),
        tuple(range(1, len(names) + 1)),
        has_masks=drop_unused_masks(records),
        problems=problems.items,
    )


def _refuse_video(tree: ElementTree.Element, path: Path, problems: Problems) -> None:
    tracks = len(tree.findall("track"))
    if tracks:
        problems.add(
            "other-format",
            printable(path),
            f"{tracks:,} tracks of CVAT for video 1.1",
        )


def _class_names(tree: ElementTree.Element) -> Iterator[str]:
    """The labels of the task or project (parts of skeletons left out), then those that occur without being listed."""
    for label in tree.iterfind("meta//labels/label"):
        if label.find("parent") is None and (name := (label.findtext("name") or "").strip()):
            yield name
    used = {
        (shape.get("label") or "").strip() for image in tree.iterfind("image") for shape in image if shape.tag in _READ
    }
    yield from sorted(used - {""})


def _size(image: ElementTree.Element) -> tuple[int, int]:
    """(height, width) by the annotation, zeros where it does not say."""
    sides = finite([image.get("height") or 0, image.get("width") or 0]) or [0.0, 0.0]
    return (int(sides[0]), int(sides[1])) if all(1 <= side < 10**6 for side in sides) else (0, 0)


def _read_shapes(
    image: ElementTree.Element, where: str, size: tuple[int, int], left_out: LeftOut, problems: Problems
) -> Iterator[Shape]:
    for number, element in enumerate(image, start=1):
        place, label = f"{where}, {element.tag} {number}", (element.get("label") or "").strip()
        if element.tag == "tag":
            continue  # a word about the whole image
        if element.tag not in _READ:
            left_out.add(element.tag, place)
            continue
        if not label:
            problems.add("bad-annotation", place, "a shape without a label")
            continue
        if element.get("outside") == "1":
            problems.add("other-format", place, "outside='1' belongs to CVAT for video")
            continue
        try:
            shape = _read_shape(element, label, place, size)
        except ValueError as error:
            problems.add("bad-annotation", place, str(error))
            continue
        if shape is None:
            problems.add("short-polygon", place, f"{element.tag} {shown(label)} with fewer than 3 points")
            continue
        shape.facts["occluded"] = int(element.get("occluded") == "1")
        yield shape


def _read_shape(element: ElementTree.Element, label: str, place: str, size: tuple[int, int]) -> Shape | None:
    if element.tag == "box":
        box = _attributes(element, "xtl", "ytl", "xbr", "ybr")
        angle = _attributes(element, "rotation")[0] if element.get("rotation") else 0.0
        if angle % 360 == 0:
            return Shape(label, box, place)
        shape = polygon_shape(label, [rotated_corners(box, angle)], place)
        shape.facts["rotated"] = 1
        return shape
    if element.tag == "ellipse":
        angle = _attributes(element, "rotation")[0] if element.get("rotation") else 0.0
        x, y, across, along = _attributes(element, "cx", "cy", "rx", "ry")
        return polygon_shape(label, [ellipse_points(x, y, across, along, angle)], place)
    if element.tag == "polygon":
        points = finite((element.get("points") or "").replace(";", ",").split(","))
        if points is None or len(points) % 2:
            raise ValueError(f"points {shown(element.get('points') or '')} where x,y;x,y;... is wanted")
        return polygon_shape(label, [points], place) if len(points) >= 6 else None
    return _read_mask(element, label, place, size)


def _attributes(element: ElementTree.Element, *names: str) -> list[float]:
    numbers = finite(element.get(name) for name in names)
    if numbers is None:
        given = ", ".join(f"{name}={element.get(name)!r}" for name in names)
        raise ValueError(f"{given} where numbers are wanted")
    return numbers


def _read_mask(element: ElementTree.Element, label: str, place: str, size: tuple[int, int]) -> Shape:
    """Runs of 0 and 1 along the rows of the mask's own rectangle, beginning with 0."""
    left, top, width, height = (int(value) for value in _attributes(element, "left", "top", "width", "height"))
    runs = finite((element.get("rle") or "").split(","))
    if runs is None or any(run < 0 or run != int(run) for run in runs) or min(width, height) < 1:
        raise ValueError(f"rle {shown(element.get('rle') or '')} is no list of runs")
    counts = [int(run) for run in runs]
    if sum(counts) != width * height or width * height > 10**9:
        raise ValueError(f"rle whose runs do not fill its {width} x {height} pixels")
    if not all(size):
        raise ValueError("a mask in an image of unknown size")
    pixels = np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(height, width)
    pixels = pixels[max(0, -top) : max(0, size[0] - top), max(0, -left) : max(0, size[1] - left)]
    if not pixels.any():
        return Shape(label, (0.0,) * 4, place)
    return mask_shape(label, encode_crop(MaskCrop(max(0, top), max(0, left), pixels), size), place)
