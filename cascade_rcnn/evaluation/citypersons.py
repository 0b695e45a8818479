"""CityPersons log-average miss rate over nine false-positive rates: Reasonable, Small, Heavy occlusion, All.

Follows the official script (eval_MR_multisetup). Its index quirk is kept: where the very first detections already
exceed a false-positive rate, the script takes the final recall (Caltech's toolbox: recall 0).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.data.formats.citypersons import read_entries
from cascade_rcnn.errors import DataError
from cascade_rcnn.evaluation import read_results
from cascade_rcnn.evaluation.match_results import match_results
from cascade_rcnn.evaluation.pairwise import areas, intersections, pair_up

_IOU = 0.5
_MOST = 1000  # detections per image
_MARGIN = 1.25  # detections this much outside the height range still count
_POINTS = np.array(
    [0.01, 0.0178, 0.0316, 0.0562, 0.1, 0.1778, 0.3162, 0.5623, 1.0]
)  # rounded, as in the official script
_INFINITY = 1e10


class Subset(NamedTuple):
    """Which people count; both ends are included."""

    height: tuple[float, float]
    visibility: tuple[float, float]


SUBSETS = {
    "Reasonable": Subset((50, _INFINITY), (0.65, _INFINITY)),
    "Small": Subset((50, 75), (0.65, _INFINITY)),
    "Heavy": Subset((50, _INFINITY), (0.2, 0.65)),
    "All": Subset((20, _INFINITY), (0.2, _INFINITY)),
}


@dataclass
class People:
    """Ground truth; G people and ignore regions in file order, I images."""

    image_ids: dict[Hashable, int]  # id -> row, in the order of the ids
    categories: frozenset[int]
    rows: NDArray[np.int64]  # [G]
    boxes: NDArray[np.float64]  # [G, 4] xyxy
    heights: NDArray[np.float64]  # [G]
    visible: NDArray[np.float64]  # [G], visible share of the box
    ignore: NDArray[np.bool_]  # [G]


@dataclass
class Candidates:
    """Pedestrian detections (D) by image and descending score, and whom they may be matched with (pairs P)."""

    heights: NDArray[np.float64]  # [D]
    scores: NDArray[np.float64]  # [D]
    detections: NDArray[np.int64]  # [P]
    people: NDArray[np.int64]  # [P]
    iou: NDArray[np.float64]  # [P]
    share: NDArray[np.float64]  # [P], of the detection's own area


def evaluate_citypersons(
    truth: Path, results: Path, *, subsets: Mapping[str, Subset] = SUBSETS, notes: list[str] | None = None
) -> dict[str, float | None]:
    """Scores a JSON list ``{"image_id", "category_id": 1, "bbox": [x, y, w, h], "score"}`` against ``val_gt.json`` or
    ``anno_val.mat`` (image ids 1, 2, ... in the order of the file).

    Returns ``citypersons/MR/Reasonable``, ``Small``, ``Heavy``, ``All`` (or other ``subsets``): miss rates in 0..1,
    lower is better; None where no person belongs to the subset, with the reason in ``notes``. Without detections it
    is 1. Raises ``DataError``.
    """
    notes = [] if notes is None else notes
    people, found = read_truth(truth), read_results.read_json(results)
    if truth.suffix == ".json":
        found = match_results(found, read_results.read_json(truth), str(results), str(truth), notes)
    table = read_results.parse_results(found, name=str(results), images=people.image_ids, categories=people.categories)
    candidates = candidates_of(people, table)
    metrics: dict[str, float | None] = {}
    for name, subset in subsets.items():
        recall = recall_at_points(people, candidates, subset)
        metrics[f"citypersons/MR/{name}"] = None if recall is None else log_average(recall)
        if recall is None:
            notes.append(f"citypersons/MR/{name} is undefined: nobody in the ground truth belongs to this subset")
    return metrics


def log_average(recall: NDArray[np.float64]) -> float:
    """exp(mean(log(1 - recall))); exactly 0 where one recall is 1."""
    with np.errstate(divide="ignore"):
        return float(np.exp(np.mean(np.log(1.0 - recall))))


def candidates_of(people: People, table: read_results.ResultTable) -> Candidates:
    keep = np.flatnonzero(table.categories == 1)
    keep = keep[np.lexsort((-table.scores[keep], table.images[keep]))]  # stable
    rows = table.images[keep]
    starts = np.flatnonzero(np.r_[True, rows[1:] != rows[:-1]]) if len(rows) else np.zeros(0, np.int64)
    rank = np.arange(len(rows)) - np.repeat(starts, np.diff(np.r_[starts, len(rows)]))
    keep, rows = keep[rank < _MOST], rows[rank < _MOST]
    boxes = table.boxes[keep].copy()
    heights = table.boxes[keep, 3]
    boxes[:, 2:] += boxes[:, :2]
    own, theirs = table.boxes[keep, 2] * heights, areas(people.boxes)
    parts: list[tuple[NDArray[Any], ...]] = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), np.zeros(0))]
    for i, j in pair_up(rows, people.rows):
        both = intersections(boxes[i], people.boxes[j])
        near = both > 0
        i, j, both = i[near], j[near], both[near]
        iou, share = both / (own[i] + theirs[j] - both), both / own[i]
        near = np.maximum(iou, share) >= _IOU
        parts.append((i[near], j[near], iou[near], share[near]))
    return Candidates(heights, table.scores[keep], *(np.concatenate(column) for column in zip(*parts)))


def recall_at_points(people: People, candidates: Candidates, subset: Subset) -> NDArray[np.float64] | None:
    """Recall [9] at the nine false-positive rates; None without people in the subset."""
    (low, high), (least, most) = subset
    outside = (people.heights < low) | (people.heights > high) | (people.visible < least) | (people.visible > most)
    ignore = people.ignore | outside
    total = int((~ignore).sum())
    if total == 0:
        return None
    inside = (candidates.heights >= low / _MARGIN) & (candidates.heights < high * _MARGIN)
    hit, ignored = _match(candidates, inside, ignore)
    counted = np.flatnonzero(inside & ~ignored)
    counted = counted[np.argsort(-candidates.scores[counted], kind="stable")]
    if len(counted) == 0:
        return np.zeros(len(_POINTS))
    true = np.cumsum(hit[counted])
    rate = np.cumsum(~hit[counted]) / len(people.image_ids)
    index = np.searchsorted(rate, _POINTS, side="right") - 1  # -1 takes the last, as the script does
    return np.asarray((true / total)[index])


def _match(
    candidates: Candidates, inside: NDArray[np.bool_], ignore: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(true positives, ignored) [D]. By descending score each detection takes the free person of largest IoU (the later
    of equals); only if there is none, an ignore region, which may take many."""
    hit = np.zeros(len(inside), np.bool_)
    ignored = np.zeros(len(inside), np.bool_)
    region = ignore[candidates.people]
    reaches = inside[candidates.detections] & (region | (candidates.iou >= _IOU))
    ignored[candidates.detections[reaches & region]] = True
    real = np.flatnonzero(reaches & ~region)
    taken: set[int] = set()
    current, best, person = -1, 0.0, -1
    rows = zip(candidates.detections[real].tolist(), candidates.people[real].tolist(), candidates.iou[real].tolist())
    for detection, candidate, iou in [*rows, (-1, -1, 0.0)]:  # the last closes the last detection
        if detection != current:
            if person >= 0:
                taken.add(person)
                hit[current], ignored[current] = True, False
            current, best, person = detection, 0.0, -1
        if iou >= best and candidate not in taken:
            best, person = iou, candidate
    return hit, ignored


def read_truth(path: Path) -> People:
    """The ground truth from ``val_gt.json``, an ``anno_*.mat``, or a folder of ``gtBboxCityPersons``."""
    if path.suffix == ".mat" or path.is_dir():
        return _read_annotations(path)
    truth = read_results.read_json(path)
    try:
        ids = sorted(image["id"] for image in truth["images"])
        image_ids: dict[Hashable, int] = {image: row for row, image in enumerate(ids)}
        found = [one for one in truth["annotations"] if one["category_id"] == 1]
        boxes = np.array([one["bbox"] for one in found], np.float64).reshape(-1, 4)
        people = People(
            image_ids=image_ids,
            categories=frozenset(one["id"] for one in truth["categories"]) | {1},
            rows=np.array([image_ids[one["image_id"]] for one in found], np.int64),
            boxes=np.c_[boxes[:, :2], boxes[:, :2] + boxes[:, 2:]],
            heights=np.array([one["height"] for one in found], np.float64),
            visible=np.array([one["vis_ratio"] for one in found], np.float64),
            ignore=np.array([one.get("ignore", 0) for one in found]).astype(np.bool_),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path}: not the layout of val_gt.json ({type(error).__name__}: {error}): give val_gt.json or anno_val.mat"
        ) from error
    return _by_image(people)


def _read_annotations(path: Path) -> People:
    if not path.exists():
        raise DataError(f"{path}: not found: give val_gt.json or anno_val.mat")
    tables = []
    for number, entry in enumerate(read_entries(path), start=1):
        if isinstance(entry, ValueError):
            raise DataError(f"{path}: image {number}: {entry}: give anno_val.mat")
        tables.append(entry[2])
    rows = np.repeat(np.arange(len(tables)), [len(one) for one in tables])
    table = np.concatenate([*tables, np.zeros((0, 10))])
    size, seen = table[:, 3] * table[:, 4], table[:, 8] * table[:, 9]
    visible = np.round(np.divide(seen, size, out=np.zeros_like(size), where=size > 0), 12)  # as in val_gt.json
    boxes = np.c_[table[:, 1:3], table[:, 1:3] + table[:, 3:5]]
    ids: dict[Hashable, int] = {row + 1: row for row in range(len(tables))}
    return People(ids, frozenset(range(6)), rows, boxes, table[:, 4], visible, table[:, 0] != 1)


def _by_image(people: People) -> People:
    order = np.argsort(people.rows, kind="stable")
    return People(
        people.image_ids,
        people.categories,
        people.rows[order],
        people.boxes[order],
        people.heights[order],
        people.visible[order],
        people.ignore[order],
    )
