"""Checks that need annotations only: boxes, masks, classes, and sizes against anchors. NumPy over whole splits.

G objects of a split, A anchors per cell, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.config import DataConfig, ModelConfig
from cascade_rcnn.data.formats.classes import similar_names, strange_classes
from cascade_rcnn.data.masks import segmentation_box
from cascade_rcnn.data.problems import Problems
from cascade_rcnn.data.records import DataSplit, ImageRecord
from cascade_rcnn.messages import shown

CORNER_AND_SIZE = ("coco", "citypersons", "widerface")  # formats whose boxes are x, y, width, height
_SLACK = 1.0  # pixels by which a box may leave its image: formats that count from 1, rounding
STRIDES = (4, 8, 16, 32, 64)
_TINY = 4.0  # pixels at the network's input: one cell of the finest level


@dataclass(frozen=True)
class ObjectTable:
    """All objects of a split, one row each."""

    image: NDArray[np.int64]  # [G] index of the record
    row: NDArray[np.int64]  # [G] index within the record
    boxes: NDArray[np.float64]  # [G, 4]
    sizes: NDArray[np.float64]  # [G, 2] (width, height) of the image, 0 where unknown
    labels: NDArray[np.int64]
    ignore: NDArray[np.bool_]


def object_table(split: DataSplit) -> ObjectTable:
    """The objects of all images, in the order of the records."""
    counts = [len(record.boxes) for record in split.records]
    image = np.repeat(np.arange(len(counts)), counts)
    sizes = np.array([(record.width, record.height) for record in split.records], dtype=np.float64).reshape(-1, 2)
    return ObjectTable(
        image,
        np.concatenate([np.arange(count) for count in counts] or [np.zeros(0, np.int64)]),
        np.concatenate([record.boxes for record in split.records] or [np.zeros((0, 4))]),
        sizes[image],
        np.concatenate([record.labels for record in split.records] or [np.zeros(0, np.int64)]),
        np.concatenate([record.ignore for record in split.records] or [np.zeros(0, np.bool_)]),
    )


def check_objects(split: DataSplit, problems: Problems, *, data: DataConfig, model: ModelConfig) -> None:
    """Adds to ``problems`` whatever the annotations of a split alone show."""
    table = object_table(split)
    for record in split.records:
        if not len(record.boxes):
            problems.add("image-without-objects", record.source, f"{shown(record.file_name)} has no object")
        elif (learnt := int((~record.ignore).sum())) > model.max_detections:
            problems.add(
                "too-many-objects",
                record.source,
                f"{shown(record.file_name)} has {learnt} objects and model.max_detections is {model.max_detections}",
            )
    where = f"{split.root} {split.name}"
    if not (~table.ignore).any():
        crowds = sum(
            int(record.attributes["iscrowd"].sum()) for record in split.records if "iscrowd" in record.attributes
        )
        kind = "all-crowd" if crowds and crowds == len(table.boxes) else "no-learnable-objects"
        problems.add(kind, where, f"{len(table.boxes)} objects in {len(split)} images, none of which is to be learnt")
    misread = _check_coding(split, table, where, problems)
    if not misread:
        _check_edges(split, table, problems)
        _check_masks(split, problems)
        _check_anchors(split, table, problems, data=data, model=model)
    _check_doubles(split, table, problems)


def boxes_are_centred(split: DataSplit) -> bool:
    """Whether boxes leave their image as x, y, width, height, and fit when x, y is their centre."""
    table = object_table(split)
    known = (table.sizes > 0).all(axis=1)
    return int(known.sum()) >= 3 and split.format in CORNER_AND_SIZE and _centre_fits(table, known)


def _centre_fits(table: ObjectTable, known: NDArray[np.bool_] | np.bool_) -> bool:
    centred = table.boxes[known].copy()
    half = (centred[:, 2:] - centred[:, :2]) / 2
    centred -= np.tile(half, 2)
    inside = (centred[:, :2] >= -_SLACK).all(axis=1) & (centred[:, 2:] <= table.sizes[known] + _SLACK).all(axis=1)
    beyond = (table.boxes[known][:, 2:] > table.sizes[known] + _SLACK).any(axis=1)
    return bool(beyond.mean() >= 0.25 and inside.mean() >= 0.95)


def boxes_are_corners(split: DataSplit) -> tuple[int, int]:
    """How many boxes leave their image as x, y, width, height although they fit as corners, and how many there are.

    Read as width and height, the far corner (x2, y2) lands at (x1 + x2, y1 + y2), mostly outside.
    """
    table = object_table(split)
    known = (table.sizes > 0).all(axis=1)
    leaves, fits = _leaves_and_fits(table)
    return int((leaves & fits & known).sum()), int(known.sum())


def _leaves_and_fits(table: ObjectTable) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    corners = table.boxes.copy()
    corners[:, 2:] -= corners[:, :2]
    leaves: NDArray[np.bool_] = np.any(table.boxes[:, 2:] > table.sizes + _SLACK, axis=1)
    inside = (corners[:, 2:] <= table.sizes + _SLACK) & (corners[:, 2:] > corners[:, :2])
    fits: NDArray[np.bool_] = np.all(inside, axis=1)
    return leaves, fits


def _check_coding(split: DataSplit, table: ObjectTable, where: str, problems: Problems) -> bool:
    """Corners read as x, y, width, height; fractions read as pixels. True where boxes mean something else."""
    known = (table.sizes > 0).all(axis=1)
    total = int(known.sum())
    if total < 3 or split.format == "yolo":
        return False
    if split.format in CORNER_AND_SIZE:
        leaves, fits = _leaves_and_fits(table)
        if (leaves & known).sum() >= 0.25 * total and (fits & known).sum() >= 0.95 * total:
            first = int(np.flatnonzero(leaves & known)[0])
            record = split.records[table.image[first]]
            box = table.boxes[first]
            problems.add(
                "xyxy-as-xywh",
                where,
                f"{int((leaves & known).sum())} of {total} boxes leave their image "
                f"when read as x, y, width, height, all fit as corners; e.g. [{box[0]:g}, {box[1]:g}, "
                f"{box[2] - box[0]:g}, {box[3] - box[1]:g}] in {shown(record.file_name)} "
                f"({record.width} x {record.height})",
            )
            return True
        if _centre_fits(table, known):
            beyond = int((table.boxes[known][:, 2:] > table.sizes[known] + _SLACK).any(axis=1).sum())
            problems.add(
                "centre-as-xywh",
                where,
                f"{beyond} of {total} boxes leave their image when read as x, y, width, height, all fit "
                "around x, y as their centre",
            )
            return True
    if (table.boxes[known] <= 1.5).all() and (table.sizes[known] > 16).all():
        problems.add("relative-boxes", where, f"all {total} boxes lie between 0 and 1.5 pixels")
        return True
    return False


def _name(split: DataSplit, table: ObjectTable, index: int) -> tuple[str, str]:
    """Where an object stands, and its image."""
    record = split.records[table.image[index]]
    row = int(table.row[index])
    place = f"annotation id {record.attributes['ids'][row]}" if "ids" in record.attributes else f"object {row + 1}"
    return f"{record.source}, {place}", shown(record.file_name)


def _check_edges(split: DataSplit, table: ObjectTable, problems: Problems) -> None:
    known = (table.sizes > 0).all(axis=1)
    beyond = np.maximum(-table.boxes[:, :2], table.boxes[:, 2:] - table.sizes).max(axis=1, initial=0.0)
    for index in np.flatnonzero(known & (beyond > _SLACK)).tolist():
        where, name = _name(split, table, index)
        problems.add(
            "beyond-image",
            where,
            f"box {np.round(table.boxes[index], 1).tolist()} leaves {name} "
            f"({table.sizes[index, 0]:.0f} x {table.sizes[index, 1]:.0f}) by {beyond[index]:.1f} pixels",
        )


def _check_doubles(split: DataSplit, table: ObjectTable, problems: Problems) -> None:
    keys = np.column_stack([table.image, table.labels, table.ignore, np.round(table.boxes, 2)])
    if len(keys) < 2:
        return
    order = np.lexsort(keys.T)
    same = np.flatnonzero((keys[order][1:] == keys[order][:-1]).all(axis=1))
    for index in order[same + 1].tolist():
        where, name = _name(split, table, index)
        problems.add("duplicate-box", where, f"box {np.round(table.boxes[index], 2).tolist()} stands twice in {name}")


def _check_masks(split: DataSplit, problems: Problems) -> None:
    if not split.has_masks:
        return
    coding = polygon_coding(split)
    if coding not in ("", "unknown"):
        problems.add(
            "misread-masks",
            f"{split.root} {split.name}",
            f"nearly all polygons lie off their boxes, and on them when read as {coding}",
        )
        return
    if coding:
        problems.add(
            "unlike-masks", f"{split.root} {split.name}", "half of the polygons or more are off their boxes, as below"
        )
    for record in split.records:
        for row, mask in enumerate(record.segmentations or ()):
            place = f"{record.source}, annotation id {record.attributes.get('ids', range(10**9))[row]}"
            if not mask:
                if not record.ignore[row]:
                    problems.add("missing-mask", place, f"an object of {shown(record.file_name)} has a box only")
                continue
            around, box = segmentation_box(mask), record.boxes[row]
            if around is None or mask_is_off(box, around, record):
                text = "is empty" if around is None else f"spans {np.round(around, 1).tolist()}"
                problems.add("mask-off-box", place, f"box {np.round(box, 1).tolist()}, mask {text}")


def polygon_coding(split: DataSplit) -> str:
    """What polygons that mostly lie off their boxes are: ``y, x``, ``fractions``; ``unknown`` for neither, empty where
    most lie on their boxes.
    """
    off, total, fits = 0, 0, {"y, x": 0, "fractions": 0}
    for record in split.records:
        for box, mask in zip(record.boxes, record.segmentations or ()):
            around = segmentation_box(mask) if isinstance(mask, list) else None
            if around is None:
                continue
            total += 1
            if mask_is_off(box, around, record):
                off += 1
                fits["y, x"] += not mask_is_off(box, around[[1, 0, 3, 2]], record)
                sides = np.array([record.width, record.height] * 2, dtype=np.float64)
                fits["fractions"] += bool((around <= 1.5).all()) and not mask_is_off(box, around * sides, record)
    found = [coding for coding, count in fits.items() if count >= 0.9 * off]
    if off < 3 or off < 0.5 * total:
        return ""
    return found[0] if found and off >= 0.75 * total else "unknown"


def mask_is_off(box: NDArray[np.float64], around: NDArray[np.float64], record: ImageRecord) -> bool:
    """Whether a mask's extent (xyxy) is another box within the image: IoU below 0.7, an edge over 2 pixels away."""
    if record.height and record.width:
        box, around = (np.clip(edges, 0, (record.width, record.height) * 2) for edges in (box, around))
    if np.abs(box - around).max() <= 2:
        return False
    shared = np.clip(np.minimum(box[2:], around[2:]) - np.maximum(box[:2], around[:2]), 0, None).prod()
    return bool(shared < 0.7 * ((box[2:] - box[:2]).prod() + (around[2:] - around[:2]).prod() - shared))


def best_anchor_iou(
    boxes: NDArray[np.float64], *, sizes: Sequence[Sequence[float]], ratios: Sequence[float]
) -> NDArray[np.float64]:
    """Highest IoU [G] of each box (xyxy, input pixels) with any anchor of the pyramid's grids, borders aside.

    An anchor of each side in a level's ``sizes`` and any ``ratio`` (height over width) stands at each multiple of the
    level's stride.
    """
    width, height = (boxes[:, 2] - boxes[:, 0]), (boxes[:, 3] - boxes[:, 1])
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    best = np.zeros(len(boxes))
    for stride, sides in zip(STRIDES, sizes, strict=True):
        offset = np.abs(center - np.round(center / stride) * stride)  # to the nearest anchor's centre
        for side in sides:
            for ratio in ratios:
                high, wide = side * ratio**0.5, side / ratio**0.5
                shared = np.clip(np.minimum(np.minimum(width, wide), (width + wide) / 2 - offset[:, 0]), 0, None)
                shared = shared * np.clip(
                    np.minimum(np.minimum(height, high), (height + high) / 2 - offset[:, 1]), 0, None
                )
                best = np.maximum(best, shared / (width * height + wide * high - shared))
    return best


def anchor_sides(model: ModelConfig) -> list[list[float]]:
    """Sides in pixels of the anchors of each level."""
    if model.anchor_sizes:
        each = len(model.anchor_sizes) // len(STRIDES)
        return [list(model.anchor_sizes[level * each : (level + 1) * each]) for level in range(len(STRIDES))]
    return [[scale * stride for scale in model.anchor_scales] for stride in STRIDES]


def _check_anchors(
    split: DataSplit, table: ObjectTable, problems: Problems, *, data: DataConfig, model: ModelConfig
) -> None:
    """Objects at the size in which the network sees them at test time, against its anchors."""
    learnt = ~table.ignore & (table.sizes > 0).all(axis=1)
    if not learnt.any():
        return
    sizes = table.sizes[learnt]
    short = data.test_short_side or max(data.short_side)
    scale = np.minimum(short / sizes.min(axis=1), data.long_side / sizes.max(axis=1))
    boxes = table.boxes[learnt] * scale[:, None]
    best = best_anchor_iou(boxes, sizes=anchor_sides(model), ratios=model.anchor_ratios)
    sides = boxes[:, 2:] - boxes[:, :2]
    lost, tiny = best < 0.5, sides.min(axis=1) < _TINY
    total, where = len(best), f"{split.root} {split.name}"
    if lost.mean() > 0.05:
        problems.add(
            "no-anchor" if lost.mean() > 0.25 else "some-without-anchor",
            where,
            f"{int(lost.sum()):,} of "
            f"{total:,} objects ({lost.mean():.1%}) meet no anchor with IoU 0.5 at the input's size: "
            + _why_lost(sides[lost], model),
        )
    if tiny.mean() > 0.01:
        problems.add(
            "tiny-object",
            where,
            f"{int(tiny.sum()):,} of {total:,} objects ({tiny.mean():.1%}) have a side "
            f"below {_TINY:.0f} pixels when images are scaled by {np.median(scale):.2f}",
        )


def _why_lost(sides: NDArray[np.float64], model: ModelConfig) -> str:
    """How many of the objects (width, height [G, 2], input pixels) are too small, too large, too long for anchors."""
    anchors = anchor_sides(model)
    smallest, largest = min(map(min, anchors)), max(map(max, anchors))
    setting = "model.anchor_sizes" if model.anchor_sizes else "model.anchor_scales"
    side, aspect = np.sqrt(sides.prod(axis=1)), sides[:, 1] / np.maximum(sides[:, 0], 1e-9)
    small, large = side < 0.8 * smallest, side > 1.25 * largest
    long = ~small & ~large & ((aspect < min(model.anchor_ratios) / 1.4) | (aspect > max(model.anchor_ratios) * 1.4))
    parts = [
        (
            small,
            f"smaller than the smallest anchor ({smallest:g} pixels; median {np.median(side):.0f}): a larger "
            f"data.short_side or smaller {setting}",
        ),
        (large, f"larger than the largest anchor ({largest:g} pixels): larger {setting}"),
        (
            long,
            f"longer than model.anchor_ratios {', '.join(f'{ratio:g}' for ratio in model.anchor_ratios)} "
            f"(height over width {np.percentile(aspect, 10):.2f} to {np.percentile(aspect, 90):.2f}): more ratios",
        ),
    ]
    named = [f"{int(mask.sum()):,} {text}" for mask, text in parts if mask.mean() > 0.05]
    return "; ".join(named) or "they fall between sizes and positions"


def check_classes(splits: list[DataSplit], problems: Problems) -> None:
    """Lists of classes that differ between splits; classes without, with a handful of, with very many objects.

    The first split is taken for the one that is trained on.
    """
    first = splits[0]
    where = f"{first.root} {first.name}"
    for split in splits[1:]:
        if strange := strange_classes(first.class_names, split):
            listed = ", ".join(f"{shown(name)} ({number} objects)" for name, number in list(strange.items())[:6])
            problems.add(
                "different-classes",
                f"{split.root} {split.name}",
                f"classes that {first.name!r} does not have: {listed}",
            )
        elif (split.class_names, split.category_ids) != (first.class_names, first.category_ids):
            only = sorted(set(split.class_names) ^ set(first.class_names)) or ["the order or the ids"]
            problems.add(
                "other-classes",
                f"{split.root} {split.name}",
                f"classes are not listed as in {first.name!r}: {', '.join(map(shown, only[:6]))}",
            )
    for one, other in similar_names(sorted({name for split in splits for name in split.class_names})):
        problems.add("similar-classes", where, f"{shown(one)} and {shown(other)}")
    table = object_table(first)
    counts = np.bincount(table.labels[~table.ignore], minlength=len(first.class_names))
    names = dict(enumerate(first.class_names))
    none = [names[label] for label in np.flatnonzero(counts == 0).tolist()]
    if none and counts.any():
        problems.add(
            "class-without-objects",
            where,
            f"{len(none)} of {len(names)}: {', '.join(map(shown, none[:8]))}{', ...' if len(none) > 8 else ''}",
        )
    present = counts[counts > 0]
    middle = float(np.median(present)) if len(present) else 0.0
    stray = np.flatnonzero((counts > 0) & (counts <= max(2, 0.01 * middle)) & (middle >= 20)).tolist()
    for label in stray:
        problems.add(
            "stray-class",
            where,
            f"{shown(names[label])} has {counts[label]} object"
            f"{'s' * int(counts[label] != 1)}, the others {middle:,.0f} in the middle: "
            f"{_places(first, label)}",
        )
    usual = {label: int(number) for label, number in enumerate(counts) if number and label not in stray}
    if usual and max(usual.values()) > 100 * min(usual.values()):
        most, least = max(usual, key=lambda label: usual[label]), min(usual, key=lambda label: usual[label])
        problems.add(
            "class-imbalance",
            where,
            f"{shown(names[most])} has {usual[most]:,} objects, {shown(names[least])} {usual[least]:,}",
        )


def _places(split: DataSplit, label: int) -> str:
    found = [record.source for record in split.records if (record.labels == label).any()]
    return found[0] if found else ""
