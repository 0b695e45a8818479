"""Pictures that lie among those of a data set but belong to no annotation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from cascade_rcnn.data import files
from cascade_rcnn.data.formats.open import disjoint_splits, open_split
from cascade_rcnn.data.problems import Problems
from cascade_rcnn.data.records import DataSplit
from cascade_rcnn.errors import DataError
from cascade_rcnn.messages import printable

_BY_LISTS = ("voc", "kitti", "citypersons", "widerface")  # official lists leave images out on purpose
_NO_PICTURES = frozenset({"masks", "mask", "segmentationclass", "segmentationobject", "labels", "visualization"})


def report_unlisted(root: Path, splits: Sequence[DataSplit], problems: Problems) -> None:
    """Counts, folder by folder, the pictures that no split's annotations name: they are left out.

    YOLO's reader takes every picture of a folder, with or without a label file, and says so itself.
    """
    splits = [split for split in splits if split.format != "yolo"]
    unlisted = _unlisted(splits)
    if unlisted:  # another split than those that were opened may name them
        opened = {split.name for split in splits}
        try:
            others = [open_split(root, name, strict=False) for name in disjoint_splits(root) if name not in opened]
        except DataError:
            others = []
        named = {_key(record.path) for split in others for record in split.records}
        unlisted = {path for path in unlisted if _key(path) not in named}
    folders: dict[Path, list[Path]] = {}
    for path in sorted(unlisted):
        folders.setdefault(path.parent, []).append(path)
    official = bool(splits) and splits[0].format in _BY_LISTS and any(split.truth is not None for split in splits)
    for folder, paths in folders.items():
        problems.add(
            "unlisted-image" if official else "unlabelled-image",
            printable(folder),
            f"{len(paths):,} of {len(files.list_files(folder)):,} images belong to no annotation and are left out, "
            f"e.g. {printable(paths[0].name)}",
        )


def _unlisted(splits: Sequence[DataSplit]) -> set[Path]:
    named = {_key(record.path) for split in splits for record in split.records}
    places: set[Path] = set()
    for split in splits:
        folders = {os.path.normpath(record.path.parent) for record in split.records if files.is_file(record.path)}
        top = Path(os.path.commonpath(folders)) if folders else None
        if top is not None and os.path.normpath(top) != os.path.normpath(split.root):
            places.add(top)
        else:
            places.update(map(Path, folders))
    found: set[Path] = set()
    for place in places:
        below = any(place == Path(os.path.normpath(split.root)) for split in splits)
        paths = files.list_files(place) if below else files.list_files_below(place, skip=_NO_PICTURES)
        found.update(path for path in paths if _key(path) not in named)
    return found


def _key(path: Path) -> str:
    return os.path.normpath(path)
