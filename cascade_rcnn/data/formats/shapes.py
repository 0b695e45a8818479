"""Shapes of labelling tools as objects: corners, polygons, circles and bitmaps become boxes and masks of a record."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.data.masks import segmentation_area, segmentation_box
from cascade_rcnn.data.problems import Problems
from cascade_rcnn.data.records import ImageRecord, Segmentation, empty_record
from cascade_rcnn.messages import shown

_ROUND = 64  # corners of the polygon for a circle: at a radius of 100 pixels it is off by 0.1


@dataclass(slots=True)
class Shape:
    """One object as a tool wrote it."""

    name: str
    box: Sequence[float]  # x1, y1, x2, y2
    place: str  # file and index, for messages
    mask: Segmentation | None = None
    ignore: bool = False
    facts: dict[str, int] = field(default_factory=dict)  # occluded, ...


def polygon_shape(name: str, parts: Sequence[Sequence[float]], place: str) -> Shape:
    """An object of one or several polygons [x1, y1, x2, y2, ...]; its box is the one around them."""
    return mask_shape(name, [[float(value) for value in part] for part in parts], place)


def mask_shape(name: str, mask: Segmentation, place: str) -> Shape:
    """An object whose box is the one around its mask; without area where the mask is empty."""
    around = segmentation_box(mask)
    return Shape(name, (0.0,) * 4 if around is None else around.tolist(), place, mask)


def ellipse_points(x: float, y: float, across: float, along: float, degrees: float = 0.0) -> list[float]:
    """Points of an ellipse around (x, y) with the radii ``across`` (x) and ``along`` (y), turned clockwise."""
    angles = np.arange(_ROUND) * (2 * math.pi / _ROUND)
    points = np.stack([across * np.cos(angles), along * np.sin(angles)], axis=1)
    return _turned(points, (x, y), degrees)


def rotated_corners(box: Sequence[float], degrees: float) -> list[float]:
    """The corners x1, y1, ..., x4, y4 of a box (xyxy) that is turned clockwise about its centre."""
    x1, y1, x2, y2 = box
    half = np.array([x2 - x1, y2 - y1]) / 2
    points = half * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    return _turned(points, ((x1 + x2) / 2, (y1 + y2) / 2), degrees)


def _turned(points: NDArray[np.float64], centre: tuple[float, float], degrees: float) -> list[float]:
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turned = points @ np.array([[cosine, sine], [-sine, cosine]]) + np.array(centre)  # y points down: clockwise
    values: list[float] = turned.reshape(-1).tolist()
    return values


def make_record(
    image: tuple[Path, str, int | str],
    size: tuple[int, int],
    shapes: Iterable[Shape],
    labels: Mapping[str, int],
    *,
    source: str,
    sized: bool,
    problems: Problems,
) -> ImageRecord:
    """A record of the image (file, name, id) of ``size`` (height, width; 0 where unknown); unusable boxes are told.

    ``sized``: the annotation gives the size.
    """
    record = empty_record(*image, size, source=source, sized=sized)
    height, width = size
    kept: list[Shape] = []
    for shape in shapes:
        x1, y1, x2, y2 = shape.box
        text = f"box {[round(value, 2) for value in shape.box]} of {shown(shape.name)}"
        if not all(abs(value) < 1e9 for value in shape.box):  # false for NaN
            problems.add("bad-number", shape.place, text)
        elif x2 <= x1 or y2 <= y1:
            problems.add("empty-box", shape.place, f"{text} has no area")
        elif width and (x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0):
            problems.add("outside-box", shape.place, f"{text} lies outside the image ({width} x {height})")
        else:
            kept.append(shape)
    boxes = np.array([shape.box for shape in kept], dtype=np.float64).reshape(-1, 4)
    record.boxes = boxes
    record.labels = np.array([labels[shape.name] for shape in kept], dtype=np.int64)
    record.ignore = np.array([shape.ignore for shape in kept], dtype=np.bool_)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    masks = [segmentation_area(shape.mask) for shape in kept]
    record.areas = np.array([mask or area for mask, area in zip(masks, areas.tolist())], dtype=np.float64)
    record.segmentations = [shape.mask for shape in kept]
    for fact in sorted({fact for shape in kept for fact in shape.facts}):
        record.attributes[fact] = np.array([shape.facts.get(fact, 0) for shape in kept], dtype=np.int64)
    return record


def drop_unused_masks(records: Sequence[ImageRecord]) -> bool:
    """Whether any object has a mask; where none has, the records are made records of boxes alone."""
    has_masks = any(any(record.segmentations or ()) for record in records)
    if not has_masks:
        for record in records:
            record.segmentations = None
    return has_masks


class LeftOut:
    """Counts the shapes that are not read, by their kind, for one problem per kind and split."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, kind: str, place: str) -> None:
        self._counts[kind] += 1
        self._first.setdefault(kind, place)

    def report(self, problems: Problems) -> None:
        for kind, number in self._counts.items():
            problems.add("other-shape", self._first[kind], f"{number:,} x {kind}, left out")


def finite(values: Iterable[Any]) -> list[float] | None:
    """Numbers, also written as text; None where one is none or not finite."""
    try:
        numbers = [float(value) for value in values if type(value) is not bool]
    except (TypeError, ValueError, OverflowError):
        return None
    return numbers if all(abs(number) < 1e9 for number in numbers) else None
