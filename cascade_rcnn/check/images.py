"""Checks of image files by their headers and ends: nothing is decoded but files whose end looks torn, and a sample of
those with more than 8 bits per channel, for their levels.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from cascade_rcnn.config import DataConfig, Orientation, pixel_range
from cascade_rcnn.data.files import is_file
from cascade_rcnn.data.images import Header, quiet_pillow, read_header
from cascade_rcnn.data.levels import Levels, levels_of, written
from cascade_rcnn.data.orientation import record_view, undecided
from cascade_rcnn.data.problems import Problems
from cascade_rcnn.data.records import DataSplit, ImageRecord
from cascade_rcnn.data.split_levels import read_all, spread
from cascade_rcnn.messages import printable, shown

_LEVELS_OF = 200  # deep pictures of a split that are decoded, spread evenly
_DARK = 0.0625  # of the range: sixteen grey levels of 256
_CLIPPED = 0.01
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}  # what a whole file ends with, perhaps before some padding


def truncation(path: Path) -> str:
    """Why an image file is torn, or nothing. JPEG and PNG files that end as they should are not decoded."""
    from PIL import Image

    with path.open("rb") as stream:
        head = stream.read(8)
        stream.seek(max(0, path.stat().st_size - 64))
        tail = stream.read()
    kind = "JPEG" if head.startswith(b"\xff\xd8") else "PNG" if head.startswith(b"\x89PNG") else ""
    if not kind or _ENDS[kind] in tail:
        return ""
    with quiet_pillow():
        try:
            with Image.open(path) as image:
                image.load()
        except Exception as error:  # as above
            return " ".join(str(error).split()) or type(error).__name__
    return ""


def check_images(split: DataSplit, problems: Problems, *, data: DataConfig) -> None:
    """Adds missing, unreadable, truncated, huge, turned images, and sizes that differ from the annotation's."""
    missing = [record for record in split.records if not is_file(record.path)]
    if len(missing) == len(split) and missing:
        problems.add(
            "no-images",
            f"{split.root} {split.name}",
            f"none of the {len(split):,} image files is there; the first is looked for at {printable(missing[0].path)}",
        )
        return
    absent = set(map(id, missing))
    deep = []
    for record in split.records:
        if id(record) in absent:
            problems.add("missing-image", record.source, f"no file {printable(record.path)}")
            continue
        header = check_image(record, split.format, problems, data=data)
        deep += [record] * header.deep
    _check_levels(split, deep, problems, data)


def check_image(record: ImageRecord, split_format: str, problems: Problems, *, data: DataConfig) -> Header:
    """As ``check_images`` for one file that is there, without its levels."""
    header = read_header(record.path)
    if _check_file(record, header, problems, data.max_pixels):
        _check_view(record, split_format, header, problems, data.orientation)
    return header


def _check_file(record: ImageRecord, header: Header, problems: Problems, max_pixels: int) -> bool:
    """Whether the file is an image with a header."""
    where, name = record.source, shown(record.file_name)
    if header.error:
        problems.add("unreadable-image", where, f"{name}: {header.error}")
        return False
    if header.height * header.width > max_pixels:
        problems.add(
            "huge-image",
            where,
            f"{name} has {header.width} x {header.height} pixels, data.max_pixels is {max_pixels:,}",
        )
    elif torn := truncation(record.path):
        problems.add("truncated-image", where, f"{name}: {torn}")
    elif header.pages > 1:
        problems.add("more-pages", where, f"{name} has {header.pages} pages or frames")
    return True


def _check_view(
    record: ImageRecord, split_format: str, header: Header, problems: Problems, orientation: Orientation
) -> None:
    where, name, tag = record.source, shown(record.file_name), header.orientation
    view = record_view(record, split_format, header, orientation)
    if view == "differs":
        turned = f" ({header.height} x {header.width} upright)" if tag >= 5 else ""
        problems.add(
            "size-mismatch",
            where,
            f"{name} is {header.width} x {header.height}{turned}, the annotation says {record.width} x {record.height}",
        )
    elif view == "undecided":
        problems.add("undecided-orientation", where, undecided(record.file_name, header.stored, tag))
    elif tag != 1:
        problems.add(
            "rotated-image" if view == "stored" else "turned-image", where, f"{name} has orientation tag {tag}"
        )


def _check_levels(split: DataSplit, deep: list[ImageRecord], problems: Problems, data: DataConfig) -> None:
    """Levels in use of pictures of more than 8 bits, against the range that the data set is read by."""
    chosen = spread(deep, _LEVELS_OF)
    pictures = []
    for record in chosen:
        for pixels in read_all([record.path], data=data):
            pictures.append((record, levels_of([pixels])))
            unknown = 1 - float(np.isfinite(pixels).mean())
            if unknown:
                problems.add("not-a-number", record.source, f"{shown(record.file_name)}: {unknown:.1%} of its pixels")
    known = [(record, levels) for record, levels in pictures if levels is not None]
    together = Levels.of([levels for _, levels in known])
    if together is None:
        return
    where = f"{split.root} {split.name}"
    wanted = pixel_range(data.range)
    if wanted == "auto":
        wanted = together.range()
    elif wanted == "dtype" and not together.depth:
        problems.add("unknown-range", where, f"{together}, and data.range dtype has no range for them")
        return
    elif wanted == "dtype":
        wanted = (0.0, together.depth)
    read_as = "each stretched by its own percentiles" if wanted == "percentile" else f"'{written(*wanted)}'"
    problems.add("deep-pictures", where, f"{len(deep):,} of {len(split):,}: {together}; read as data.range {read_as}")
    if isinstance(wanted, str):
        return
    low, high = wanted
    if together.usual_high - low < _DARK * (high - low):
        problems.add(
            "narrow-levels",
            where,
            f"99.8% of the pixels lie in {together.usual_low:g} to {together.usual_high:g}, the range is "
            f"'{written(low, high)}'",
        )
    for record, levels in known:
        name = shown(record.file_name)
        if levels.high > levels.low and levels.high - low < _DARK * (high - low):
            problems.add("dark-levels", record.source, f"{name} has {levels}; the range is '{written(low, high)}'")
        elif levels.share_outside(low, high) > _CLIPPED:
            problems.add(
                "clipped-levels",
                record.source,
                f"{name}: {levels.share_outside(low, high):.0%} of the pixels lie outside '{written(low, high)}'",
            )


def check_same_images(splits: list[DataSplit], problems: Problems) -> None:
    """Adds image files of equal content in two splits, or twice in one; contents are compared, names are not."""
    files = [
        (number, record)
        for number, split in enumerate(splits)
        for record in split.records
        if is_file(record.path) and _size(record.path)
    ]
    groups: Iterable[list[tuple[int, ImageRecord]]] = [files]
    for key in (_size, _first_bytes, _content):  # each only where the one before leaves a doubt
        groups = [group for old in groups for group in _grouped(old, key)]
    for group in groups:
        number, first = group[0]
        for other, record in group[1:]:
            kind = "same-image-twice" if other == number else "same-image-in-splits"
            if other == number and record.path == first.path and not _same_objects(record, first):
                kind = "image-listed-twice"
            problems.add(
                kind,
                record.source,
                f"{shown(record.file_name)} of {splits[other].name!r} is "
                f"{shown(first.file_name)} of {splits[number].name!r}",
            )


def _same_objects(one: ImageRecord, other: ImageRecord) -> bool:
    return np.array_equal(one.labels, other.labels) and np.array_equal(one.boxes, other.boxes)


def _grouped(members: list[tuple[int, ImageRecord]], key: Any) -> list[list[tuple[int, ImageRecord]]]:
    groups = defaultdict(list)
    for member in members:
        groups[key(member[1].path)].append(member)
    return [group for group in groups.values() if len(group) > 1]


def _size(path: Path) -> int:
    return path.stat().st_size


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as stream:
        return hashlib.sha256(stream.read(16384)).digest()


def _content(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()
