"""Checks of image files by their headers and ends: nothing is decoded unless its end looks torn."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade_rcnn.data.files import is_file
from cascade_rcnn.data.images import quiet_pillow
from cascade_rcnn.data.problems import Problems
from cascade_rcnn.data.records import DataSplit, ImageRecord
from cascade_rcnn.messages import printable, shown

_ORIENTATION = 0x0112
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}  # what a whole file ends with, perhaps before some padding


@dataclass(frozen=True)
class _Header:
    height: int
    width: int
    orientation: int  # EXIF: 1 as stored, 3 upside down, 5 to 8 turned on the side
    error: str  # why the file is no image


def read_header(path: Path) -> _Header:
    """Size and EXIF orientation of an image file; ``error`` says why it is none."""
    from PIL import Image

    with quiet_pillow():
        try:
            with Image.open(path) as image:
                orientation = 1
                if image.info.get("exif"):
                    orientation = int(image.getexif().get(_ORIENTATION, 1) or 1)
                return _Header(image.height, image.width, orientation, "")
        except Exception as error:  # decoders raise what they like on damaged headers
            reason = "empty file" if path.stat().st_size == 0 else " ".join(str(error).split())
            return _Header(0, 0, 1, reason.replace(str(path), path.name) or type(error).__name__)


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


def check_images(split: DataSplit, problems: Problems, *, max_pixels: int) -> None:
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
    for record in split.records:
        if id(record) in absent:
            problems.add("missing-image", record.source, f"no file {printable(record.path)}")
        else:
            _check_image(record, problems, max_pixels)


def _check_image(record: ImageRecord, problems: Problems, max_pixels: int) -> None:
    where, name = record.source, shown(record.file_name)
    header = read_header(record.path)
    if header.error:
        problems.add("unreadable-image", where, f"{name}: {header.error}")
        return
    if header.height * header.width > max_pixels:
        problems.add(
            "huge-image",
            where,
            f"{name} has {header.width} x {header.height} pixels, data.max_pixels is {max_pixels:,}",
        )
    elif torn := truncation(record.path):
        problems.add("truncated-image", where, f"{name}: {torn}")
    turned = header.orientation in (5, 6, 7, 8)
    differs = record.height and (record.height, record.width) != (header.height, header.width)
    if differs:
        as_viewed = turned and (record.height, record.width) == (header.width, header.height)
        problems.add(
            "size-mismatch",
            where,
            f"{name} is {header.width} x {header.height}, the annotation says "
            f"{record.width} x {record.height}" + (": labelled in a viewer that turned it" if as_viewed else ""),
        )
    if header.orientation not in (0, 1):
        problems.add("rotated-image", where, f"{name} has EXIF orientation {header.orientation}")


def check_same_images(splits: list[DataSplit], problems: Problems) -> None:
    """Adds image files of equal content in two splits, or twice in one; contents are compared, names are not."""
    files = [
        (number, record) for number, split in enumerate(splits) for record in split.records if is_file(record.path)
    ]
    groups: Iterable[list[tuple[int, ImageRecord]]] = [files]
    for key in (_size, _first_bytes, _content):  # each only where the one before leaves a doubt
        groups = [group for old in groups for group in _grouped(old, key)]
    for group in groups:
        number, first = group[0]
        for other, record in group[1:]:
            kind = "same-image-twice" if other == number else "same-image-in-splits"
            problems.add(
                kind,
                record.source,
                f"{shown(record.file_name)} of {splits[other].name!r} is "
                f"{shown(first.file_name)} of {splits[number].name!r}",
            )


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
