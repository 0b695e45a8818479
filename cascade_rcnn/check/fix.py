"""``check --fix OUT``: a repaired copy of the annotations as COCO json, pictures linked, every change listed.

What cannot be decided by a program (a stray class, an image in two splits, a turned image) is left as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.check.images import read_header, truncation
from cascade_rcnn.check.objects import boxes_are_corners, mask_is_off
from cascade_rcnn.data import files
from cascade_rcnn.data.formats.write import write_coco
from cascade_rcnn.data.masks import segmentation_area, segmentation_box
from cascade_rcnn.data.problems import READ_ANYWAY, REWRITTEN
from cascade_rcnn.data.records import DataSplit, ImageRecord
from cascade_rcnn.errors import DataError
from cascade_rcnn.messages import printable, shown


def fix_dataset(splits: Sequence[DataSplit], out: Path) -> list[str]:
    """Writes the repaired splits into the empty folder ``out`` and returns the changes, also in ``changes.txt``.

    ``splits`` were opened with ``strict=False``: what their readers left out stays out and is listed.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{printable(out)}: not an empty folder; name a new one")
    out.mkdir(parents=True, exist_ok=True)
    changes: list[str] = []
    for split in splits:
        fixed, done = fix_split(split)
        changes += done
        write_coco(fixed, out)
    (out / "changes.txt").write_text("".join(printable(change) + "\n" for change in changes), encoding="utf-8")
    return changes


def fix_split(split: DataSplit) -> tuple[DataSplit, list[str]]:
    """A repaired split and the list of changes: recoded, clipped, merged and dropped boxes, sizes, dropped images."""
    changes = [
        f"{problem.where}: {'rewritten' if problem.kind in REWRITTEN else 'left out'} "
        f"({problem.kind}: {problem.message})"
        for problem in split.problems
        if problem.kind in REWRITTEN or problem.kind not in READ_ANYWAY
    ]
    suspects, total = boxes_are_corners(split)
    corners = split.format == "coco" and total >= 3 and suspects >= 0.25 * total
    learnable = any((~record.ignore).any() for record in split.records)
    all_crowd = not learnable and any(record.attributes.get("iscrowd", np.zeros(1)).any() for record in split.records)
    relative = _are_relative(split)
    records = []
    have_images = any(files.is_file(record.path) for record in split.records)  # none at all: not downloaded yet
    for record in split.records:
        if have_images and (reason := _unusable(record)):
            changes.append(
                f"{record.source}: image {shown(record.file_name)} dropped with its "
                f"{len(record.boxes)} objects ({reason})"
            )
            continue
        record = _copy(record)
        if corners:
            record.boxes[:, 2:] -= record.boxes[:, :2]
            record.areas = _areas(record)
        if relative:
            record.boxes *= (record.width, record.height, record.width, record.height)
            record.areas = _areas(record)
        if all_crowd:
            record.ignore[:] = False
            record.attributes["iscrowd"] = np.zeros_like(record.ignore, dtype=np.int64)
        if have_images:
            changes += _fix_size(record)
        records.append(_fix_objects(record, changes))
    where = f"{printable(split.root)} {split.name}"
    changes += [f"{where}: all boxes rewritten from corners to x, y, width, height"] * corners
    changes += [f"{where}: all boxes rewritten from fractions to pixels"] * relative
    changes += [f"{where}: iscrowd set to 0 for every object"] * all_crowd
    return replace(split, records=records), changes


def _are_relative(split: DataSplit) -> bool:
    boxes = [record.boxes for record in split.records if record.width > 16 and record.height > 16]
    return split.format != "yolo" and sum(map(len, boxes)) >= 3 and all((box <= 1.5).all() for box in boxes)


def _unusable(record: ImageRecord) -> str:
    if not files.is_file(record.path):
        return "no such file"
    return read_header(record.path).error or truncation(record.path)


def _copy(record: ImageRecord) -> ImageRecord:
    return replace(
        record,
        boxes=record.boxes.copy(),
        ignore=record.ignore.copy(),
        areas=record.areas.copy(),
        attributes=dict(record.attributes),
    )


def _areas(record: ImageRecord) -> NDArray[np.float64]:
    areas: NDArray[np.float64] = (record.boxes[:, 2:] - record.boxes[:, :2]).prod(axis=1)
    for row, mask in enumerate(record.segmentations or ()):
        areas[row] = segmentation_area(mask) or areas[row]
    return areas


def _fix_size(record: ImageRecord) -> list[str]:
    header = read_header(record.path)
    if (record.height, record.width) == (header.height, header.width):
        return []
    change = (
        f"{record.source}: size {record.width} x {record.height} set to the file's {header.width} x {header.height}"
    )
    record.height, record.width = header.height, header.width
    return [change]


def _fix_objects(record: ImageRecord, changes: list[str]) -> ImageRecord:
    """Takes boxes from masks that they do not fit, clips, and drops empty and repeated boxes."""
    keep = np.ones(len(record.boxes), dtype=np.bool_)
    seen: set[tuple[Any, ...]] = set()
    for row in range(len(record.boxes)):
        place = f"{record.source}, " + (
            f"annotation id {record.attributes['ids'][row]}" if "ids" in record.attributes else f"object {row + 1}"
        )
        box, old = record.boxes[row], np.round(record.boxes[row], 2).tolist()
        around = segmentation_box(record.segmentations[row]) if record.segmentations is not None else None
        if around is not None and mask_is_off(box, around, record):
            box[:] = around
            changes.append(f"{place}: box {old} set to its mask's {np.round(around, 2).tolist()}")
        clipped = np.clip(box, 0, (record.width, record.height, record.width, record.height))
        if np.abs(clipped - box).max() > 0:
            if np.abs(clipped - box).max() > 1e-6:
                changes.append(f"{place}: box {np.round(box, 2).tolist()} clipped to {np.round(clipped, 2).tolist()}")
            box[:] = clipped
        key = (int(record.labels[row]), bool(record.ignore[row]), *np.round(box, 2).tolist())
        if box[2] <= box[0] or box[3] <= box[1] or key in seen:
            changes.append(f"{place}: box {old} dropped ({'repeated' if key in seen else 'empty'})")
            keep[row] = False
        seen.add(key)
    masks = record.segmentations
    return replace(
        record,
        boxes=record.boxes[keep],
        labels=record.labels[keep],
        ignore=record.ignore[keep],
        areas=record.areas[keep],
        segmentations=[mask for mask, kept in zip(masks, keep) if kept] if masks is not None else None,
        attributes={name: values[keep] for name, values in record.attributes.items()},
    )
