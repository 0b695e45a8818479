"""WIDER FACE: ``wider_face_split/wider_face_SPLIT_bbx_gt.txt`` (or ``.mat``) beside ``WIDER_SPLIT/images/EVENT``.

The one class is ``face``; faces marked invalid are ignore regions. An image without faces has the count 0 and one row
of zeros.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

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

_COLUMNS = ("blur", "expression", "illumination", "invalid", "occlusion", "pose")
_Entry = tuple[str, str, NDArray[np.float64]]  # file name, place, rows of x y w h and the six columns


def widerface_splits(root: Path) -> list[str]:
    """Names of the splits: those with a ``wider_face_SPLIT_bbx_gt.txt`` or ``wider_face_SPLIT.mat``."""
    return list(_annotations(root))


def _annotations(root: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder in (root / "wider_face_split", root):
        for path in files.list_files(folder, {".txt", ".mat"}):
            name = path.stem.removeprefix("wider_face_")
            if name == path.stem or (path.suffix == ".txt" and not name.endswith("_bbx_gt")) or name == "test":
                continue
            if path.suffix == ".txt" or name not in found:
                found[name.removesuffix("_bbx_gt")] = path
    return found


def read_widerface(root: Path, split: str, *, problems: Problems | None = None) -> DataSplit:
    """Reads one split; sizes come from the images' headers. Attributes: blur, expression, illumination, invalid,
    occlusion, pose. Raises ``DataError`` with file, line and reason.
    """
    problems = problems or Problems()
    found = _annotations(root)
    name = files.resolve_split(list(found), split, root)
    path = found[name]
    folders = (root / f"WIDER_{name}" / "images", root / f"WIDER_{name}", root / "images" / name, root / "images")
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])
    entries = list(_read_text(path, problems) if path.suffix == ".txt" else _read_matlab(path, problems))
    finder = ImageFinder(root, [folder], split=name)
    images = finder.find([image for image, _, _ in entries], [(0, 0)] * len(entries), problems, printable(path))
    records = []
    for (image, place, rows), file in zip(entries, images):
        if isinstance(file, ValueError):
            problems.add("unsafe-path", place, str(file))
        else:
            records.append(_read_record(file, image, rows, place, problems))
    truth = next((root / base for base in ("ground_truth", "eval_tools/ground_truth") if (root / base).is_dir()), None)
    return DataSplit(
        "widerface",
        name,
        root,
        records,
        ("face",),
        (1,),
        truth=truth if name == "val" else None,
        problems=problems.items,
    )


def _read_text(path: Path, problems: Problems) -> Iterator[_Entry]:
    lines = files.read_lines(path)
    printed, at = printable(path), 0
    while at < len(lines):
        name, place = lines[at].strip(), f"{printed}, line {at + 1}"
        at += 1
        if not name:
            continue
        word = lines[at].strip() if at < len(lines) else ""
        if not (word.isascii() and word.isdigit() and len(word) < 8):
            problems.add(
                "bad-annotation",
                place,
                f"{shown(name)} is followed by {shown(word)}, where the number of faces is wanted",
            )
            continue
        count, at = int(word), at + 1
        rows: list[list[float]] = []
        for _ in range(count):
            row = _row(lines[at]) if at < len(lines) else None
            if row is None:
                problems.add(
                    "bad-annotation",
                    f"{printed}, line {at + 1}",
                    f"no row of 10 numbers, where {count} faces of {shown(name)} are announced and {len(rows)} read",
                )
                break
            rows.append(row)
            at += 1
        if count == 0 and at < len(lines) and (row := _row(lines[at])) is not None and not any(row):
            at += 1  # the row of zeros
        yield name, place, np.array(rows, dtype=np.float64).reshape(-1, 4 + len(_COLUMNS))


def _row(line: str) -> list[float] | None:
    words = line.split()
    if len(words) not in (4, 4 + len(_COLUMNS)):
        return None
    try:
        row = [float(word) for word in words]
    except ValueError:
        return None
    return row + [0.0] * (4 + len(_COLUMNS) - len(row))


def _read_matlab(path: Path, problems: Problems) -> Iterator[_Entry]:
    content = read_mat(path)
    numbers: Counter[str] = Counter()
    for entry in read_faces(path, content):
        if isinstance(entry, ValueError):
            problems.add("bad-annotation", printable(path), str(entry))
            continue
        number = numbers[entry.event]
        numbers[entry.event] += 1
        columns = []
        for column in _COLUMNS:
            table = content.get(f"{column}_label_list")
            try:
                values = None if table is None else cell(table, entry.event_row, number)
                columns.append(np.zeros(len(entry.boxes)) if values is None else values.reshape(len(entry.boxes)))
            except ValueError as error:
                problems.add("bad-annotation", entry.place, f"{column}: {error}")
                break
        else:
            yield (
                f"{entry.event}/{entry.name}.jpg",
                entry.place,
                np.concatenate([entry.boxes, np.stack(columns, axis=1)], axis=1),
            )


class Faces(NamedTuple):
    """The faces of one image of an official .mat file."""

    event: str
    name: str  # without ending
    event_row: int
    boxes: NDArray[np.float64]  # [G, 4] x, y, width, height
    place: str


def read_faces(path: Path, content: dict[str, Any]) -> Iterator[Faces | ValueError]:
    """The images of ``wider_face_*.mat`` in the order of the file, for training as for the official evaluation.

    An event that cannot be read is a ``ValueError`` with the reason. Raises ``DataError`` for another file.
    """
    missing = [key for key in ("event_list", "file_list", "face_bbx_list") if key not in content]
    if missing:
        raise DataError(f"{printable(path)}: no variable {', '.join(missing)}; this is not WIDER FACE's file")
    for row, event in enumerate(content["event_list"].reshape(-1)):
        try:
            names = content["file_list"].reshape(-1)[row].reshape(-1)
            for number, name in enumerate(names):
                boxes = cell(content["face_bbx_list"], row, number).reshape(-1, 4)
                place = f"{printable(path)}, event {row + 1}, image {number + 1}"
                yield Faces(text(event), text(name), row, boxes, place)
        except (ValueError, TypeError, IndexError, AttributeError) as error:
            yield ValueError(f"event {row + 1}: {error}")


def cell(table: Any, event: int, image: int) -> NDArray[np.float64]:
    """The numbers of an image in a table of cells by event. Raises ``ValueError`` where there are none."""
    try:
        return np.asarray(table.reshape(-1)[event].reshape(-1)[image], dtype=np.float64)
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{error}") from None


def _read_record(path: Path, name: str, rows: NDArray[np.float64], place: str, problems: Problems) -> ImageRecord:
    height, width = image_size(path) or (0, 0)
    keep = np.ones(len(rows), dtype=np.bool_)
    for number, row in enumerate(rows):
        left, top, wide, high = row[:4]
        where = f"{place}, face {number + 1}"
        if not np.all(np.abs(row) < 1e9):
            problems.add("bad-number", where, shown(row.tolist()))
        elif wide <= 0 or high <= 0:
            problems.add("empty-box", where, f"box {row[:4].tolist()} (x, y, width, height) has no area")
        elif width and (left >= width or top >= height or left + wide <= 0 or top + high <= 0):
            problems.add(
                "outside-box",
                where,
                f"box {row[:4].tolist()} (x, y, width, height) lies outside the image ({width} x {height})",
            )
        else:
            continue
        keep[number] = False
    rows = rows[keep]
    boxes = rows[:, :4].copy()
    boxes[:, 2:] += boxes[:, :2]
    attributes = {column: rows[:, 4 + number].astype(np.int64) for number, column in enumerate(_COLUMNS)}
    areas = rows[:, 2] * rows[:, 3]
    return ImageRecord(
        path,
        name,
        name.rsplit(".", 1)[0],
        height,
        width,
        boxes,
        np.zeros(len(rows), dtype=np.int64),
        attributes["invalid"] > 0,
        areas,
        attributes=attributes,
        source=place,
    )
