"""The levels that the deep pictures of a split use, and the one ``data.range`` that its data set is read by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from cascade_rcnn.config import DataConfig
from cascade_rcnn.data.files import is_file
from cascade_rcnn.data.images import read_header, read_levels
from cascade_rcnn.data.levels import Levels, levels_of, written
from cascade_rcnn.data.records import DataSplit
from cascade_rcnn.errors import DataError

_LOOKED_AT = 200  # pictures, spread evenly: headers first, so that a set of 8-bit pictures costs milliseconds


def deep_paths(split: DataSplit, *, limit: int = _LOOKED_AT) -> list[Path]:
    """Pictures of more than 8 bits among ``limit`` of a split, spread evenly over it."""
    count = len(split.records)
    chosen = [split.records[place * count // min(limit, count)].path for place in range(min(limit, count))]
    return [path for path in chosen if is_file(path) and read_header(path).deep]


def read_all(paths: Sequence[Path], *, max_pixels: int) -> Iterator[NDArray[Any]]:
    """Their levels one after the other, without those that cannot be read."""
    for path in paths:
        try:
            yield read_levels(path, max_pixels=max_pixels)
        except DataError:
            continue  # check names it


def levels_in_use(split: DataSplit, *, max_pixels: int) -> Levels | None:
    """What the deep pictures of a split use; None where there are none."""
    return levels_of(read_all(deep_paths(split), max_pixels=max_pixels))


def with_range(data: DataConfig, split: DataSplit) -> tuple[DataConfig, str]:
    """The configuration with ``data.range`` auto settled by a split's pictures, and a line that says so.

    Where the split has no deep picture auto stays, and the line is empty.
    """
    if data.range != "auto":
        return data, ""
    levels = levels_in_use(split, max_pixels=data.max_pixels)
    if levels is None:
        return data, ""
    range = written(*levels.range())
    text = f"{split.name}: pictures of more than 8 bits, {levels}; read as data.range '{range}'"
    return replace(data, range=range), text
