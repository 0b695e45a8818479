"""labelme: one JSON per image, beside it or in a folder of its own; the folders train and val make the splits.

Read are ``rectangle``, ``polygon``, ``circle`` (as a polygon), ``rotation`` (its four corners) and ``mask``; points and
lines hold no area and are counted. Polygons of one label and one ``group_id`` are one object in several parts.
Embedded pictures (``imageData``) are not looked at. Coordinates are pixels from 0; classes stand in the order of
``labels.txt`` where there is one, else by name. ``__ignore__`` marks regions to ignore, ``_background_`` is no class.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.data import files
from cascade_rcnn.data.formats.find_images import ImageFinder, same_name, stem_of
from cascade_rcnn.data.formats.shapes import (
    LeftOut,
    Shape,
    drop_unused_masks,
    ellipse_points,
    finite,
    make_record,
    mask_shape,
    polygon_shape,
)
from cascade_rcnn.data.images import image_size, quiet_pillow
from cascade_rcnn.data.problems import Problems
from cascade_rcnn.data.records import DataSplit, Segmentation
from cascade_rcnn.data.rle import MaskCrop, decode_rle, encode_crop
from cascade_rcnn.errors import DataError
from cascade_rcnn.messages import printable, shown

_FOLDERS = ("annotations", "Annotations", "labels", "json", "jsons", "labelme", "images")
_KEYS = (b'"shapes"', b'"imagePath"', b'"imageHeight"', b'"imageData"')
_IGNORE, _BACKGROUND = "__ignore__", ("_background_", "__background__")
_LOOK_AT = 20  # files of a folder that are looked at to recognise it


def labelme_splits(root: Path) -> list[str]:
    """Names of the splits: the folders train, val, ... that hold labelme's files, else ``all``."""
    return list(_split_files(root))


def _split_files(root: Path) -> dict[str, list[Path]]:
    if not files.is_dir(root):
        return {}
    for base in (root, *(root / name for name in _FOLDERS)):
        found = {}
        for child in files.subfolders(base):
            if files.split_word(child.name) and (paths := _labelme_files(child)):
                found[child.name] = paths
        if found:
            return found
    paths = _labelme_files(root)
    return {"all": paths} if paths else {}


def _labelme_files(folder: Path) -> list[Path]:
    """The files of labelme below a folder; none where the first ones are of another kind."""
    paths = files.list_files_below(folder, {".json"})
    if not any(_looks_like_labelme(path) for path in paths[:_LOOK_AT]):
        return []
    return [path for path in paths if _looks_like_labelme(path, keys=1)]  # a damaged file among them is told of


def _looks_like_labelme(path: Path, keys: int = 2) -> bool:
    """By the first and last kilobytes: some of labelme's keys."""
    try:
        with path.open("rb") as stream:
            head = stream.read(65536)
            stream.seek(max(0, path.stat().st_size - 65536))
            tail = stream.read()
    except OSError:
        return False
    return (
        head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")
        and sum(key in head or key in tail for key in _KEYS) >= keys
    )


def read_labelme(root: Path, split: str, *, problems: Problems | None = None) -> DataSplit:
    """Reads one split. ``image_id`` is the file's path below the folder, without ending.

    Raises ``DataError`` with file, shape and reason.
    """
    problems = problems or Problems()
    found = _split_files(root)
    name = files.resolve_split(list(found), split, root)
    names = _class_names(root, found)
    labels = {label: number for number, label in enumerate(names)}
    contents: list[tuple[Path, dict[str, Any]]] = []
    for path in found[name]:
        try:
            contents.append((path, _content(path, path.stat().st_mtime_ns)))
        except DataError as error:
            problems.add("bad-annotation", printable(path), str(error).removeprefix(f"{printable(path)}: "))
    left_out = LeftOut()
    records = []
    for (path, content), image in zip(contents, _find_images(root, name, contents, problems)):
        size = _size(content, path, problems)
        sized = all(size)
        if not sized:
            size = image_size(image) or (0, 0)
        shapes = _read_shapes(content, path, size, left_out, problems)
        for shape in shapes:
            shape.ignore = shape.ignore or shape.name == _IGNORE
        record = make_record(
            (image, *_names(root, path, image)),
            size,
            shapes,
            labels | {_IGNORE: 0},
            source=printable(path),
            sized=sized,
            problems=problems,
        )
        records.append(record)
    left_out.report(problems)
    return DataSplit(
        "labelme",
        name,
        root,
        records,
        names,
        tuple(range(1, len(names) + 1)),
        has_masks=drop_unused_masks(records),
        problems=problems.items,
    )


def _names(root: Path, path: Path, image: Path) -> tuple[str, str]:
    """The picture's name below the folder, and the annotation's without ending, which is the image's id."""
    inside = image.relative_to(root).as_posix() if image.is_relative_to(root) else image.name
    return inside, path.relative_to(root).with_suffix("").as_posix()


@lru_cache(maxsize=100_000)
def _content(path: Path, stamp: int) -> dict[str, Any]:
    """What a file says, without the picture that may be embedded. Raises ``DataError``."""
    content = files.read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise DataError(f"{printable(path)}: no list of shapes; this is not labelme's file")
    return {key: value for key, value in content.items() if key != "imageData"}


def _class_names(root: Path, found: dict[str, list[Path]]) -> tuple[str, ...]:
    """Labels of all splits: those of labels.txt in its order, then the others by name."""
    listed: list[str] = []
    if files.is_file(root / "labels.txt"):
        listed = [line.strip() for line in files.read_lines(root / "labels.txt") if line.strip()]
    used: set[str] = set()
    for path in (path for paths in found.values() for path in paths):
        try:
            shapes = _content(path, path.stat().st_mtime_ns)["shapes"]
        except DataError:
            continue  # its split will say so
        used.update(label for shape in shapes if (label := _label(shape)) and _kind(shape) in _READERS)
    names = [*dict.fromkeys(listed), *sorted(used - set(listed))]
    return tuple(name for name in names if name not in (_IGNORE, *_BACKGROUND))


def _label(shape: Any) -> str:
    label = shape.get("label") if isinstance(shape, dict) else None
    return str(label).strip() if isinstance(label, str | int) else ""


def _kind(shape: Any) -> str:
    return str(shape.get("shape_type") or "polygon") if isinstance(shape, dict) else ""


def _size(content: dict[str, Any], path: Path, problems: Problems) -> tuple[int, int]:
    sides = [content.get(key) or 0 for key in ("imageHeight", "imageWidth")]
    numbers = finite(sides)
    if numbers is None or not all(0 <= number < 10**6 and number == int(number) for number in numbers):
        problems.add("bad-number", printable(path), f"imageHeight {shown(sides[0])}, imageWidth {shown(sides[1])}")
        return 0, 0
    return int(numbers[0]), int(numbers[1])


def _find_images(
    root: Path, split: str, contents: Sequence[tuple[Path, dict[str, Any]]], problems: Problems
) -> list[Path]:
    """The picture that is called as the JSON, in most cases the one that ``imagePath`` names; else the latter."""
    by_folder: dict[Path, list[int]] = {}
    for number, (path, _) in enumerate(contents):
        by_folder.setdefault(path.parent, []).append(number)
    images: dict[int, Path] = {}
    for folder, numbers in by_folder.items():
        beside = [folder.parent / "images", folder.parent / "imgs", root / "images" / folder.name, root / "images"]
        finder = ImageFinder(root, [folder, *beside], split=split if split != "all" else "")
        sizes = [_size(contents[number][1], contents[number][0], Problems(strict=False)) for number in numbers]
        stems = [contents[number][0].stem for number in numbers]
        written = [_written_name(contents[number][1], contents[number][0].stem) for number in numbers]
        # renamed together the two have one name, and the JSON still names the old picture, which may be another's now
        agree = [_stem(name) == same_name(stem) for name, stem in zip(written, stems)]
        choices = [[name, stem] if same else [stem, name] for name, stem, same in zip(written, stems, agree)]
        found: dict[int, Path] = {}
        for choice in (0, 1):
            rest = [place for place in range(len(numbers)) if place not in found]
            names, its_sizes = [choices[place][choice] for place in rest], [sizes[place] for place in rest]
            taken = set(found.values())
            for place, file in zip(rest, finder.find(names, its_sizes, problems, printable(folder))):
                if isinstance(file, Path) and files.is_file(file) and file not in taken:
                    found[place] = file
        for place, number in enumerate(numbers):
            images[number] = found.get(place, folder / f"{stems[place]}.jpg")
    return [images[number] for number in range(len(contents))]


def _written_name(content: dict[str, Any], default: str) -> str:
    name = content.get("imagePath")
    return name if isinstance(name, str) and name.strip() else default


def _stem(name: str) -> str:
    return same_name(stem_of(name.replace("\\", "/").rsplit("/", 1)[-1]))


def _read_shapes(
    content: dict[str, Any], path: Path, size: tuple[int, int], left_out: LeftOut, problems: Problems
) -> list[Shape]:
    shapes: list[Shape] = []
    groups: dict[tuple[str, Any], Shape] = {}
    for number, entry in enumerate(content["shapes"], start=1):
        place, kind, label = f"{printable(path)}, shape {number}", _kind(entry), _label(entry)
        if not isinstance(entry, dict) or not label:
            problems.add("bad-annotation", place, "a shape without a label")
            continue
        if label in _BACKGROUND:
            continue
        if kind not in _READERS:
            left_out.add(kind, place)
            continue
        try:
            points = _points(entry.get("points"))
            shape = _READERS[kind](label, points, place, entry, size)
        except ValueError as error:
            problems.add("bad-annotation", place, f"{kind} {shown(label)}: {error}")
            continue
        if shape is None:
            problems.add("short-polygon", place, f"{kind} {shown(label)} of {len(points)} points")
            continue
        shape.ignore = _is_ignored(entry)
        group = entry.get("group_id")
        if isinstance(group, int | str) and isinstance(shape.mask, list):
            first = groups.setdefault((label, group), shape)
            if first is not shape and isinstance(first.mask, list):
                united = polygon_shape(label, [*first.mask, *shape.mask], first.place)
                first.box, first.mask = united.box, united.mask
                continue
        shapes.append(shape)
    return shapes


def _points(points: Any) -> list[tuple[float, float]]:
    if not isinstance(points, list) or not all(isinstance(point, list) and len(point) == 2 for point in points):
        raise ValueError(f"points {shown(points)} where [[x, y], ...] is wanted")
    numbers = finite(value for point in points for value in point)
    if numbers is None or len(numbers) != 2 * len(points):
        raise ValueError(f"points {shown(points)} with a coordinate that is not a finite number")
    return _pairs(numbers)


def _is_ignored(entry: dict[str, Any]) -> bool:
    """Tools of labelme's family mark hard objects with ``difficult``; flags of that name are the user's own."""
    flags = entry.get("flags")
    marks = [entry.get("difficult")]
    marks += [flags.get(key) for key in ("difficult", "ignore", "crowd", "iscrowd")] if isinstance(flags, dict) else []
    return any(mark in (True, 1, "1", "true") for mark in marks)


_Points = list[tuple[float, float]]


def _flat(points: Iterable[tuple[float, float]]) -> list[float]:
    return [value for point in points for value in point]


def _polygon(label: str, points: _Points, place: str, _: dict[str, Any], __: tuple[int, int]) -> Shape | None:
    return polygon_shape(label, [_flat(points)], place) if len(points) >= 3 else None


def _rectangle(label: str, points: _Points, place: str, _: dict[str, Any], __: tuple[int, int]) -> Shape | None:
    if len(points) < 2:
        return None
    xs, ys = zip(*points)
    return Shape(label, (min(xs), min(ys), max(xs), max(ys)), place)


def _circle(label: str, points: _Points, place: str, _: dict[str, Any], __: tuple[int, int]) -> Shape | None:
    if len(points) != 2:
        return None
    (x, y), (edge_x, edge_y) = points
    radius = float(np.hypot(edge_x - x, edge_y - y))
    return polygon_shape(label, [ellipse_points(x, y, radius, radius)], place)


def _mask(label: str, points: _Points, place: str, entry: dict[str, Any], size: tuple[int, int]) -> Shape | None:
    """A bitmap as PNG in base64, its corner at the first point."""
    from PIL import Image

    if not points or not isinstance(entry.get("mask"), str) or not all(size):
        raise ValueError("no bitmap, no corner, or no size of the image")
    try:
        with quiet_pillow(), Image.open(io.BytesIO(base64.b64decode(entry["mask"], validate=False))) as picture:
            if picture.width * picture.height > 4 * size[0] * size[1]:
                raise ValueError(f"bitmap of {picture.width} x {picture.height}")
            pixels = np.asarray(picture.convert("L")) > 0
    except ValueError:
        raise
    except Exception as error:  # a damaged picture makes the decoder raise whatever it likes
        raise ValueError(f"bitmap that cannot be read ({' '.join(str(error).split())})") from None
    left, top = (round(min(values)) for values in zip(*points))
    if left < 0 or top < 0:
        pixels, left, top = pixels[max(0, -top) :, max(0, -left) :], max(0, left), max(0, top)
    pixels = pixels[: max(0, size[0] - top), : max(0, size[1] - left)]
    if not pixels.any():
        return None
    return mask_shape(label, encode_crop(MaskCrop(top, left, pixels), size), place)


_READERS = {"polygon": _polygon, "rectangle": _rectangle, "rotation": _polygon, "circle": _circle, "mask": _mask}


def labelme_shapes(
    label: str, box: Sequence[float], mask: Segmentation | None, *, group: int, ignore: bool
) -> list[dict[str, Any]]:
    """An object as labelme writes it: its polygons (several share ``group``), its bitmap, or a rectangle."""
    shape = {"label": label, "group_id": None, "description": "", "flags": {"difficult": True} if ignore else {}}
    if isinstance(mask, dict):
        pixels = decode_rle(mask)
        rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
        if len(rows):
            top, bottom, left, right = int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])
            bitmap = _png(pixels[top : bottom + 1, left : right + 1])
            return [shape | {"shape_type": "mask", "points": [[left, top], [right, bottom]], "mask": bitmap}]
    elif mask:
        number = group if len(mask) > 1 else None
        return [
            shape | {"shape_type": "polygon", "group_id": number, "points": [list(point) for point in _pairs(part)]}
            for part in mask
        ]
    return [shape | {"shape_type": "rectangle", "points": [list(box[:2]), list(box[2:])]}]


def _pairs(values: Sequence[float]) -> list[tuple[float, float]]:
    return list(zip(values[::2], values[1::2]))


def _png(pixels: NDArray[np.bool_]) -> str:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8) * 255).convert("1").save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode("ascii")


def labelme_json(shapes: Sequence[dict[str, Any]], image: str, size: tuple[int, int]) -> str:
    """A file of labelme for the picture ``image`` beside it."""
    content: dict[str, Any] = {
        "version": "5.5.0",
        "flags": {},
        "shapes": list(shapes),
        "imagePath": image,
        "imageData": None,
        "imageHeight": size[0],
        "imageWidth": size[1],
    }
    return json.dumps(content, indent=1) + "\n"
