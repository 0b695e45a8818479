"""Reading what users give to ``score``: JSON, text tables, folders.

Input that cannot be used raises a one-line ``DataError``: file, place, value, remedy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Hashable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.errors import DataError
from cascade_rcnn.messages import few_names, shown


class ResultTable(NamedTuple):
    """A results list in COCO's layout as arrays; N detections in the order of the list."""

    images: NDArray[np.int64]  # [N], row of the image
    categories: NDArray[np.int64]  # [N], category ids as given
    boxes: NDArray[np.float64]  # [N, 4], x, y, width, height
    scores: NDArray[np.float64]  # [N]


def folder(path: Path, what: str) -> Path:
    """``path``, which must be a folder; ``what`` says what belongs there."""
    if path.is_dir():
        return path
    state = "is a file" if path.exists() else "does not exist"
    raise DataError(f"{path} {state}: give {what}")


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8 text: write the file as UTF-8") from error


def read_json(path: Path) -> Any:
    """A strict JSON file; NaN and Infinity are refused."""

    def refuse(word: str) -> float:
        raise DataError(f"{path}: holds {word}, which is not JSON: remove detections without a finite score and box")

    try:
        return json.loads(read_text(path), parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: line {error.lineno}: not JSON ({error.msg}): give the JSON file of this format, whole"
        ) from error
    except RecursionError as error:
        raise DataError(f"{path}: JSON nested too deeply: not a file of this format") from error


def read_table(path: Path, *, columns: str, names: int = 1, skip: int = 0) -> tuple[list[str], NDArray[np.float64]]:
    """Rows of a text file of ``columns`` (names separated by blanks); the first ``names`` (0 or 1) of them are words.

    The first ``skip`` lines are left out, empty lines too. Returns the words [N] and the numbers [N, columns - names].
    """
    expected = len(columns.split())
    lines = read_text(path).splitlines()[skip:]
    rows = [row for row in map(str.split, lines) if row]
    if all(len(row) == expected for row in rows):
        try:
            numbers = np.array([row[names:] for row in rows], dtype=np.float64).reshape(len(rows), expected - names)
        except ValueError:
            numbers = np.full((1, 1), np.nan)
        if np.isfinite(numbers).all():
            return [row[0] for row in rows] if names else [], numbers
    raise _first_bad_line(path, lines, columns, names, skip)


def _first_bad_line(path: Path, lines: list[str], columns: str, names: int, skip: int) -> DataError:
    expected = len(columns.split())
    for number, line in enumerate(lines, start=1 + skip):
        row = line.split()
        if row and len(row) != expected:
            return DataError(
                f"{path}: line {number} has {len(row)} columns, not the {expected} of '{columns}': "
                f"{shown(line.strip())}"
            )
        for value in row[names:]:
            if not _finite(value):
                return DataError(
                    f"{path}: line {number}: {shown(value)} is not a finite number: each line is '{columns}'"
                )
    return DataError(f"{path}: cannot be read as lines of '{columns}'")  # numbers that only NumPy refuses


def parse_results(
    found: Any, *, name: str, images: Mapping[Hashable, int], categories: Collection[int], need_box: bool = True
) -> ResultTable:
    """A results list in COCO's layout, checked; ``name`` is its file, for messages.

    ``images`` gives the row of each image id. With ``need_box`` false, ``bbox`` may be absent (mask results) and the
    boxes of the table are zero.
    """
    if not isinstance(found, list):
        raise DataError(
            f"{name}: holds {_kind(found)}, not a list of detections: "
            'give [{"image_id", "category_id", "bbox": [x, y, width, height], "score"}, ...]'
        )
    for index, entry in enumerate(found):
        problem = _entry_problem(entry, images, categories, need_box)
        if problem:
            raise DataError(f"{name}: detection {index}: {problem}")
    empty = (0.0, 0.0, 0.0, 0.0)
    return ResultTable(
        np.array([images[entry["image_id"]] for entry in found], np.int64),
        np.array([entry["category_id"] for entry in found], np.int64),
        np.array([entry.get("bbox", empty) if need_box else empty for entry in found], np.float64).reshape(-1, 4),
        np.array([entry["score"] for entry in found], np.float64),
    )


def _entry_problem(
    entry: Any, images: Mapping[Hashable, int], categories: Collection[int], need_box: bool
) -> str | None:
    if not isinstance(entry, dict):
        return f"{shown(entry)} is not an object with image_id, category_id, bbox and score"
    for key in ("image_id", "category_id", "bbox", "score") if need_box else ("image_id", "category_id", "score"):
        if key not in entry:
            return f"has no {key!r}: each needs image_id, category_id, {'bbox' if need_box else 'segmentation'}, score"
    image, category, score = entry["image_id"], entry["category_id"], entry["score"]
    if isinstance(image, (list, dict)) or image not in images:
        return f"image_id {shown(image)} is not in the ground truth: was it made for another split?"
    if isinstance(category, (list, dict)) or category not in categories:
        return f"category_id {shown(category)} is not in the ground truth, which has {few_names(sorted(categories))}"
    if not _number(score):
        return f"score {shown(score)} is not a finite number"
    if need_box:
        box = entry["bbox"]
        if not isinstance(box, (list, tuple, np.ndarray)) or len(box) != 4 or not all(map(_number, box)):
            return f"bbox {shown(box)} is not four finite numbers x, y, width, height"
        if box[2] < 0 or box[3] < 0:
            return f"bbox {shown(box)} has a negative width or height: give x, y, width, height"
    return None


def _number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and math.isfinite(value)


def _finite(word: str) -> bool:
    try:
        return math.isfinite(float(word)) and "_" not in word
    except ValueError:
        return False


def _kind(value: Any) -> str:
    return {dict: "an object", str: "a string", type(None): "null"}.get(type(value), f"a {type(value).__name__}")
