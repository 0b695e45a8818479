"""The levels that the deep pictures of a split use, and the one ``data.range`` that its data set is read by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from numpy.typing import NDArray

from cascade_rcnn.config import DataConfig
from cascade_rcnn.data.files import is_file
from cascade_rcnn.data.images import read_header, read_levels
from cascade_rcnn.data.levels import levels_of, written
from cascade_rcnn.data.records import DataSplit
from cascade_rcnn.errors import DataError

_T = TypeVar("_T")
_HEADERS, _DECODED = 2000, 200  # pictures of a split that are looked at, spread evenly
_NEVER_DEEP = frozenset({".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".webp"})


def spread(items: Sequence[_T], limit: int) -> list[_T]:
    """At most ``limit`` of the items, spread evenly over them."""
    count = min(limit, len(items))
    return [items[place * len(items) // count] for place in range(count)]


def deep_paths(split: DataSplit) -> list[Path]:
    """Pictures of a split with more than 8 bits per channel, of at most 2000 headers and spread evenly."""
    candidates = [record.path for record in split.records if record.path.suffix.lower() not in _NEVER_DEEP]
    deep = [path for path in spread(candidates, _HEADERS) if is_file(path) and read_header(path).deep]
    return spread(deep, _DECODED)


def read_all(paths: Sequence[Path], *, data: DataConfig) -> Iterator[NDArray[Any]]:
    """Their levels one after the other, without those that cannot be read."""
    for path in paths:
        try:
            yield read_levels(path, max_pixels=data.max_pixels)
        except DataError:
            continue  # check names it


def with_range(data: DataConfig, split: DataSplit) -> tuple[DataConfig, str]:
    """The configuration with ``data.range`` auto settled by a split's pictures, and a line that says so.

    Where the split has no deep picture auto stays, and the line is empty.
    """
    if data.range != "auto":
        return data, ""
    levels = levels_of(read_all(deep_paths(split), data=data))
    if levels is None:
        return data, ""
    range = written(*levels.range())
    text = f"{split.name}: pictures of more than 8 bits, {levels}; read as data.range '{range}'"
    return replace(data, range=range), text
