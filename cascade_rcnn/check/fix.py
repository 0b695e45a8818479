"""``check --fix OUT``: a repaired copy of the annotations as COCO json, pictures linked, every change listed.

What cannot be decided by a program (a stray class, an image in two splits) is left as it is. Pictures whose labels
count the pixels as stored are written upright with their labels turned; labels of a resized picture are scaled with it;
a picture that was cropped or squashed since is left out, since nothing says where its objects are now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.check.images import truncation
from cascade_rcnn.check.objects import (
    CORNER_AND_SIZE,
    boxes_are_centred,
    boxes_are_corners,
    mask_is_off,
    polygon_coding,
)
from cascade_rcnn.config import Orientation
from cascade_rcnn.data import files
from cascade_rcnn.data.formats.write import write_coco
from cascade_rcnn.data.images import read_header
from cascade_rcnn.data.masks import segmentation_area, segmentation_box
from cascade_rcnn.data.orientation import annotated_size, fit_resized, record_view, settled
from cascade_rcnn.data.problems import KINDS, READ_ANYWAY, REWRITTEN
from cascade_rcnn.data.records import DataSplit, ImageRecord, Segmentation
from cascade_rcnn.errors import DataError
from cascade_rcnn.messages import printable, shown


def fix_dataset(splits: Sequence[DataSplit], out: Path, *, orientation: Orientation = "auto") -> list[str]:
    """Writes the repaired splits into the empty folder ``out`` and returns the changes, also in ``changes.txt``.

    ``splits`` were opened with ``strict=False``: what their readers left out stays out and is listed.
    ``orientation`` is ``data.orientation``.

    Raises:
        DataError: ``out`` is in use, or a split's objects would all be lost; nothing is written then.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{printable(out)}: not an empty folder; name a new one")
    fixed = [fix_split(split, orientation=orientation) for split in splits]
    for split, (repaired, done) in zip(splits, fixed):
        _refuse_emptied(split, repaired, done)
    out.mkdir(parents=True, exist_ok=True)
    for repaired, _ in fixed:
        write_coco(repaired, out)
    changes = [change for _, done in fixed for change in done]
    (out / "changes.txt").write_text("".join(printable(change) + "\n" for change in changes), encoding="utf-8")
    return changes


def _refuse_emptied(split: DataSplit, repaired: DataSplit, changes: list[str]) -> None:
    """A copy without any object is no repair: what the objects were lost by must be mended by hand."""
    lost = [
        problem
        for problem in split.problems
        if KINDS[problem.kind].severity != "note" and problem.kind not in READ_ANYWAY
    ]
    had = sum(len(record.boxes) for record in split.records)
    if not any(len(record.boxes) for record in repaired.records) and (had or lost):
        first = lost[0] if lost else None
        dropped = next((change for change in changes if " dropped " in change), "none is usable")
        reason = f"{len(lost):,} x {first.kind}, first {first.where}: {first.message}" if first else dropped
        raise DataError(
            f"{printable(split.root)} {split.name}: no object would be left ({reason}); nothing was written: mend the "
            "annotations by hand"
        )


def fix_split(split: DataSplit, *, orientation: Orientation = "auto") -> tuple[DataSplit, list[str]]:
    """A repaired split and the list of changes: recoded, clipped, merged and dropped boxes, sizes, dropped images."""
    changes = [
        f"{problem.where}: {'rewritten' if problem.kind in REWRITTEN else 'left out'} "
        f"({problem.kind}: {problem.message})"
        for problem in split.problems
        if problem.kind in REWRITTEN or problem.kind not in READ_ANYWAY
    ]
    suspects, total = boxes_are_corners(split)
    corners = split.format in CORNER_AND_SIZE and total >= 3 and suspects >= 0.25 * total
    centred = not corners and boxes_are_centred(split)
    learnable = any((~record.ignore).any() for record in split.records)
    all_crowd = not learnable and any(record.attributes.get("iscrowd", np.zeros(1)).any() for record in split.records)
    relative = _are_relative(split)
    coding = polygon_coding(split)
    records: list[ImageRecord] = []
    wrong_sizes = _sizes_are_wrong(split)
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
        if centred:
            record.boxes -= np.tile((record.boxes[:, 2:] - record.boxes[:, :2]) / 2, 2)
        if relative:
            record.boxes *= (record.width, record.height, record.width, record.height)
            record.areas = _areas(record)
        if coding in ("y, x", "fractions"):
            record.segmentations = [_recoded(mask, coding, record) for mask in record.segmentations or ()]
            record.areas = _areas(record)
        if all_crowd:
            record.ignore[:] = False
            record.attributes["iscrowd"] = np.zeros_like(record.ignore, dtype=np.int64)
        if have_images:
            seen = _fit_picture(record, split, changes, orientation=orientation, wrong_sizes=wrong_sizes)
            if seen is None:
                continue
            record = seen
        records.append(_fix_objects(record, changes, from_masks=coding != "unknown"))
    where = f"{printable(split.root)} {split.name}"
    changes += [f"{where}: all boxes rewritten from corners to x, y, width, height"] * corners
    changes += [f"{where}: all boxes rewritten from centre and size to x, y, width, height"] * centred
    changes += [f"{where}: all boxes rewritten from fractions to pixels"] * relative
    changes += [f"{where}: all polygons rewritten from {coding} to x, y in pixels"] * (coding in ("y, x", "fractions"))
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


def _recoded(mask: Segmentation | None, coding: str, record: ImageRecord) -> Segmentation | None:
    """Polygons of y, x or of fractions as x, y in pixels; run lengths as they are."""
    if not isinstance(mask, list):
        return mask
    points = [np.array(polygon, dtype=np.float64).reshape(-1, 2) for polygon in mask]
    if coding == "y, x":
        return [part[:, ::-1].reshape(-1).tolist() for part in points]
    return [(part * (record.width, record.height)).reshape(-1).tolist() for part in points]


def _areas(record: ImageRecord) -> NDArray[np.float64]:
    areas: NDArray[np.float64] = (record.boxes[:, 2:] - record.boxes[:, :2]).prod(axis=1)
    for row, mask in enumerate(record.segmentations or ()):
        areas[row] = segmentation_area(mask) or areas[row]
    return areas


def _sizes_are_wrong(split: DataSplit) -> bool:
    """Whether the annotation's sizes, not its boxes, are wrong: some boxes leave the size that is annotated, and all
    lie within the picture that is there (width and height swapped, one size written for all).
    """
    leaves = False
    for record in split.records:
        annotated = annotated_size(record, split.format)
        if annotated is None or not len(record.boxes) or not files.is_file(record.path):
            continue
        header = read_header(record.path)
        if header.error or header.orientation != 1 or header.stored == annotated:
            continue
        far = record.boxes[:, 2:].max(axis=0)
        if (far > np.array(header.stored[::-1]) + 1).any():
            return False
        leaves = leaves or bool((far > np.array(annotated[::-1]) + 1).any())
    return leaves


def _fit_picture(
    record: ImageRecord, split: DataSplit, changes: list[str], *, orientation: Orientation, wrong_sizes: bool
) -> ImageRecord | None:
    """The record with its labels where the objects are in the picture that is there; None where nobody can know.

    Where only the user can say how it was labelled it stays as it is.
    """
    header = read_header(record.path)
    view = record_view(record, split.format, header, orientation)
    if view == "undecided":
        # a size that is the file's own would decide in the copy what nobody has decided
        return record if record.sized else replace(record, height=0, width=0)
    if view != "differs":
        fitted = settled(record, header, view)
        if fitted.turn != 1:
            what = "with its labels turned along" if view == "stored" else "as its labels are"
            changes.append(f"{record.source}: image written upright (orientation tag {fitted.turn}), {what}")
        return fitted
    old = f"{record.source}: size {record.width} x {record.height}"
    if wrong_sizes and header.orientation == 1:
        changes.append(f"{old} set to the file's {header.width} x {header.height}, within which all boxes lie")
        return replace(record, height=header.height, width=header.width)
    scaled, why = fit_resized(record, header, orientation)
    if why == "undecided":
        changes.append(
            f"{old} is another than the file's {header.width} x {header.height} and its orientation tag "
            f"{header.orientation} leaves open how it was labelled: not scaled; say --orientation upright or stored"
        )
        return record
    if scaled is None:
        changes.append(
            f"{record.source}: image {shown(record.file_name)} dropped with its {len(record.boxes)} objects (it is "
            f"{header.width} x {header.height}, the annotation says {record.width} x {record.height}: cropped, "
            "squashed or another picture)"
        )
        return None
    turned = ", and the image is written upright" if scaled.turn != 1 else ""
    changes.append(f"{old}: labels scaled to the file's {scaled.width} x {scaled.height}{turned}")
    return scaled


def _fix_objects(record: ImageRecord, changes: list[str], *, from_masks: bool) -> ImageRecord:
    """Takes boxes from masks that they do not fit, clips, and drops empty and repeated boxes."""
    keep = np.ones(len(record.boxes), dtype=np.bool_)
    seen: set[tuple[Any, ...]] = set()
    for row in range(len(record.boxes)):
        place = f"{record.source}, " + (
            f"annotation id {record.attributes['ids'][row]}" if "ids" in record.attributes else f"object {row + 1}"
        )
        box, old = record.boxes[row], np.round(record.boxes[row], 2).tolist()
        around = segmentation_box(record.segmentations[row]) if record.segmentations is not None else None
        if from_masks and around is not None and mask_is_off(box, around, record):
            box[:] = around
            changes.append(f"{place}: box {old} set to its mask's {np.round(around, 2).tolist()}")
        clipped = np.clip(box, 0, (record.width or np.inf, record.height or np.inf) * 2)
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
