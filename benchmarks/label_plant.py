"""Plants known errors into the annotations of a data set: what ``label_errors.py`` then looks for.

Of the objects, each drawn once: 5 % missed (their annotation is removed), 5 % shifted (the box overlaps its old self by
0.4 to 0.7), 5 % of another class, 2 % doubled (a second box overlaps the first by 0.6 to 0.9); boxes around nothing,
as many as 2 % of the objects, are added. Detectors are then trained on the data as they are, errors included.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cascade_rcnn.data.formats.write import write_coco
from cascade_rcnn.data.records import DataSplit, ImageRecord
from cascade_rcnn.labels.evidence import iou_matrix, iou_of_pairs

SHARES = {"missed": 0.05, "shifted": 0.05, "class": 0.05, "doubled": 0.02, "nothing": 0.02}
_SMALLEST = 6.0  # pixels of a side: what is smaller is left alone


@dataclass(frozen=True)
class Planted:
    """Where the errors are. A row is an annotation of its image in the planted data."""

    rows: dict[str, dict[tuple[int, int], float]]  # of each kind but missed: (image, row) and the object's size
    missed: list[tuple[int, list[float], int]]  # image, box, label
    true_boxes: dict[tuple[int, int], list[float]]  # of the shifted
    true_labels: dict[tuple[int, int], int]  # of those of another class

    def count(self, kind: str) -> int:
        return len(self.missed) if kind == "missed" else len(self.rows[kind])


def plant(split: DataSplit, *, seed: int = 0) -> tuple[DataSplit, Planted]:
    """A copy of the split with errors, and where they are."""
    random = np.random.default_rng(seed)
    objects = [
        (image, row)
        for image, record in enumerate(split.records)
        for row in np.flatnonzero(~record.ignore)
        if (record.boxes[row, 2:] - record.boxes[row, :2]).min() >= _SMALLEST
    ]
    order = random.permutation(len(objects))
    kinds: dict[tuple[int, int], str] = {}
    start = 0
    for kind in ("missed", "shifted", "class", "doubled"):
        count = round(SHARES[kind] * len(objects))
        if kind != "class" or len(split.class_names) > 1:
            kinds |= {objects[place]: kind for place in order[start : start + count]}
        start += count
    around_nothing = np.bincount(
        random.integers(len(split), size=round(SHARES["nothing"] * len(objects))), minlength=len(split)
    )
    planted = Planted({kind: {} for kind in ("shifted", "class", "doubled", "nothing")}, [], {}, {})
    pool = np.concatenate([record.boxes[~record.ignore] for record in split.records])
    records = [
        _plant_image(record, image, kinds, planted, (random, split, pool, int(around_nothing[image])))
        for image, record in enumerate(split.records)
    ]
    return replace(split, records=records, format="coco", has_masks=False), planted


def _plant_image(
    record: ImageRecord, image: int, kinds: dict[tuple[int, int], str], planted: Planted, settings: Any
) -> ImageRecord:
    random, split, pool, around_nothing = settings
    boxes: list[list[float]] = []
    labels: list[int] = []
    ignore: list[bool] = []
    for row, (box, label, ignored) in enumerate(zip(record.boxes, record.labels.tolist(), record.ignore.tolist())):
        kind = kinds.get((image, row), "")
        if kind == "missed":
            planted.missed.append((image, box.tolist(), label))
            continue
        place = (image, len(boxes))
        size = float(np.sqrt((box[2] - box[0]) * (box[3] - box[1])))
        if kind in ("shifted", "class"):
            planted.rows[kind][place] = size
        if kind == "shifted":
            planted.true_boxes[place] = box.tolist()
            box = _moved(box, random.uniform(0.4, 0.7), (record.width, record.height), random)
        if kind == "class":
            planted.true_labels[place] = label
            label = int(random.choice([k for k in range(len(split.class_names)) if k != label]))
        boxes.append(list(box))
        labels.append(label)
        ignore.append(ignored)
        if kind == "doubled":
            planted.rows[kind][(image, len(boxes))] = size
            boxes.append(list(_moved(box, random.uniform(0.6, 0.9), (record.width, record.height), random)))
            labels.append(label)
            ignore.append(False)
    for _ in range(around_nothing):
        box = _empty_place(record, pool, random)
        if box is not None:
            planted.rows["nothing"][(image, len(boxes))] = float(np.sqrt((box[2] - box[0]) * (box[3] - box[1])))
            boxes.append(list(box))
            labels.append(int(random.integers(len(split.class_names))))
            ignore.append(False)
    array = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    return replace(
        record,
        boxes=array,
        labels=np.array(labels, dtype=np.int64),
        ignore=np.array(ignore, dtype=np.bool_),
        areas=(array[:, 2] - array[:, 0]) * (array[:, 3] - array[:, 1]),
        segmentations=None,
        attributes={},
    )


def _moved(box: Any, wanted: float, size: tuple[int, int], random: np.random.Generator) -> Any:
    """A box in a random direction and of another size that overlaps ``box`` by about ``wanted``."""
    limits = np.array([*size, *size], dtype=np.float64)
    sides = np.tile(box[2:] - box[:2], 2)
    for _ in range(50):
        angle, grow = random.uniform(0, 2 * np.pi), random.normal(0, 0.4, 2)
        way = np.array([np.cos(angle), np.sin(angle)])
        change = np.concatenate([way - grow / 2, way + grow / 2]) * sides
        low, high = 0.0, 2.0
        for _ in range(40):
            middle = (low + high) / 2
            moved = np.clip(box + middle * change, 0, limits)
            low, high = (middle, high) if iou_of_pairs(box, moved) > wanted else (low, middle)
        if abs(float(iou_of_pairs(box, moved)) - wanted) < 0.02 and (moved[2:] - moved[:2]).min() >= 2:
            return moved
    raise AssertionError(f"no place for a box beside {box}")


def _empty_place(record: ImageRecord, pool: Any, random: np.random.Generator) -> Any:
    """A box as large as some object of the data, where it overlaps no object by more than a tenth."""
    for _ in range(200):
        box = pool[random.integers(len(pool))]
        sides = box[2:] - box[:2]
        room = np.array([record.width, record.height]) - sides
        if (room < 0).any():
            continue
        corner = random.uniform(0, 1, 2) * room
        moved = np.concatenate([corner, corner + sides])
        if not len(record.boxes) or iou_matrix(moved[None], record.boxes).max() < 0.1:
            return moved
    return None


def write_planted(split: DataSplit, planted: Planted, out: Path) -> None:
    """The planted data as a COCO data set, and ``planted.json`` beside it."""
    write_coco(replace(split, name="all"), out)
    content = {
        "missed": planted.missed,
        "rows": {kind: [[*place, size] for place, size in rows.items()] for kind, rows in planted.rows.items()},
        "true_boxes": [[*place, box] for place, box in planted.true_boxes.items()],
        "true_labels": [[*place, label] for place, label in planted.true_labels.items()],
    }
    (out / "planted.json").write_text(json.dumps(content), encoding="utf-8")
