"""KITTI object detection in the image (2D boxes): AP at 11 and 40 recall positions, easy, moderate, hard.

Follows the C++ evaluation in its 40-point form of 2020 (and the Python ports): a labelled box exactly as high as the
limit is ignored (the kits of 2013 and 2017 counted it). docs/metrics.md has the list.

Matching is greedy in the order of the label file and runs twice: once over all detections, to find the scores that lie
at 41 recall positions, and once for each of these thresholds. Here all thresholds and all frames go together: round r
treats the r-th labelled object of every frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.errors import DataError
from cascade_rcnn.evaluation import read_results
from cascade_rcnn.evaluation.pairwise import areas, intersections, ious, pair_up

CLASSES = ("Car", "Pedestrian", "Cyclist")
DIFFICULTIES = ("easy", "moderate", "hard")
_MIN_OVERLAP = {"car": 0.7, "pedestrian": 0.5, "cyclist": 0.5}
_NEIGHBOUR = {"car": "van", "pedestrian": "person_sitting"}
_KNOWN = frozenset(("car", "van", "truck", "pedestrian", "person_sitting", "cyclist", "tram", "misc", "dontcare"))
_MIN_HEIGHT = {"easy": 40, "moderate": 25, "hard": 25}
_MAX_OCCLUSION = {"easy": 0, "moderate": 1, "hard": 2}
_MAX_TRUNCATION = {"easy": 0.15, "moderate": 0.3, "hard": 0.5}
_POSITIONS = 41
_LABEL = "type truncated occluded alpha x1 y1 x2 y2 height width length x y z rotation"


@dataclass
class Boxes:
    """Labelled boxes (G) or detections (D) of all frames, in the order of the files."""

    frames: NDArray[np.int64]  # [G]
    types: NDArray[np.str_]  # [G], lower case
    boxes: NDArray[np.float64]  # [G, 4], x1, y1, x2, y2 in pixels
    numbers: NDArray[np.float64]  # [G, 14] of a label line or [D, 15] of a result line


@dataclass
class _Pairs:
    """Overlapping (object, detection) pairs [P] of one class, objects rising, detections in file order."""

    objects: NDArray[np.int64]
    detections: NDArray[np.int64]
    overlaps: NDArray[np.float64]


def evaluate_kitti(truth: Path, results: Path, *, notes: list[str] | None = None) -> dict[str, float | None]:
    """Scores ``results/data/NNNNNN.txt`` (16 columns) against ``label_2/NNNNNN.txt`` (15 columns).

    Returns ``kitti/CLASS/DIFFICULTY/R11`` and ``/R40`` in 0..1 for Car, Pedestrian, Cyclist; None for a class that was
    never detected, for which the official program prints nothing; reasons go to ``notes``. As officially, the frames
    are those that have a results file: an image without detections needs an empty one. Raises ``DataError``.
    """
    notes = [] if notes is None else notes
    labels, detections, left_out = read_kitti_files(truth, results)
    if left_out:
        notes.append(
            f"{len(left_out)} frames of {truth} have no results file ({min(left_out)}.txt first) and are left "
            "out, as officially; write an empty file for an image without detections"
        )
    metrics: dict[str, float | None] = {}
    for name in CLASSES:
        curves = precision_curves(labels, detections, name)
        if curves is None:
            notes.append(f"kitti/{name} is undefined: no detection of this class (the official program prints nothing)")
        for difficulty in DIFFICULTIES:
            curve = curves[difficulty] if curves else None
            metrics[f"kitti/{name}/{difficulty}/R11"] = None if curve is None else float(curve[::4].mean())
            metrics[f"kitti/{name}/{difficulty}/R40"] = None if curve is None else float(curve[1:].mean())
            if curve is not None and not _valid(labels, name, difficulty).any():
                notes.append(f"kitti/{name}/{difficulty} has no valid object: officially 0")
    return metrics


def precision_curves(labels: Boxes, detections: Boxes, name: str) -> dict[str, NDArray[np.float64]] | None:
    """Precision at the 41 recall positions [41] per difficulty, as the program writes it; None when not evaluated."""
    kind = name.lower()
    if not bool(((detections.types == kind) & (detections.boxes[:, 0] >= 0)).any()):
        return None
    near = np.flatnonzero((labels.types == kind) | (labels.types == _NEIGHBOUR.get(kind, kind)))
    pairs = _overlapping(labels, detections, near, _MIN_OVERLAP[kind])
    covered = _covered(labels, detections, _MIN_OVERLAP[kind])
    return {level: _curve(labels, detections, pairs, covered, kind, level) for level in DIFFICULTIES}


def _valid(labels: Boxes, name: str, difficulty: str) -> NDArray[np.bool_]:
    """Which labelled boxes [G] count for a class at a difficulty."""
    height = labels.boxes[:, 3] - labels.boxes[:, 1]
    return np.asarray(
        (labels.types == name.lower())
        & (labels.numbers[:, 1] <= _MAX_OCCLUSION[difficulty])
        & (labels.numbers[:, 0] <= _MAX_TRUNCATION[difficulty])
        & (height > _MIN_HEIGHT[difficulty])
    )


def _overlapping(labels: Boxes, detections: Boxes, near: NDArray[np.int64], least: float) -> _Pairs:
    objects, found, overlaps = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0)]
    for i, j in pair_up(labels.frames[near], detections.frames):
        i = near[i]
        values = ious(detections.boxes[j], labels.boxes[i])
        keep = values > least
        objects.append(i[keep])
        found.append(j[keep])
        overlaps.append(values[keep])
    return _Pairs(np.concatenate(objects), np.concatenate(found), np.concatenate(overlaps))


def _covered(labels: Boxes, detections: Boxes, least: float) -> NDArray[np.bool_]:
    """Detections [D] of which more than ``least`` of their own area lies in one DontCare region."""
    regions = np.flatnonzero(labels.types == "dontcare")
    covered = np.zeros(len(detections.frames), np.bool_)
    own = areas(detections.boxes)
    for i, j in pair_up(labels.frames[regions], detections.frames):
        inside = intersections(detections.boxes[j], labels.boxes[regions[i]])
        covered[j[inside > least * own[j]]] = True
    return covered


def _curve(
    labels: Boxes, detections: Boxes, pairs: _Pairs, covered: NDArray[np.bool_], kind: str, difficulty: str
) -> NDArray[np.float64]:
    valid = _valid(labels, kind, difficulty)
    height = np.abs(detections.boxes[:, 1] - detections.boxes[:, 3]).astype(np.int64)  # the program cuts to an integer
    small = height < _MIN_HEIGHT[difficulty]  # of any class: may be assigned, then counts nowhere
    regular = ~small & (detections.types == kind)
    scores = detections.numbers[:, 14]
    keep = (small | regular)[pairs.detections]
    pairs = _Pairs(pairs.objects[keep], pairs.detections[keep], pairs.overlaps[keep])
    curve = np.zeros(_POSITIONS)
    hits, _ = _assign(labels, pairs, scores[pairs.detections], scores, np.full(1, -np.inf), valid, regular)
    hit_scores = scores[hits[0]]
    thresholds = _thresholds(hit_scores, int(valid.sum()))[:_POSITIONS]
    if len(thresholds) == 0:
        return curve
    # A regular detection beats an ignored one; regular ones are ranked by overlap, ignored ones by the file order.
    preference = np.where(regular[pairs.detections], pairs.overlaps, -1.0)
    hits, taken = _assign(labels, pairs, preference, scores, thresholds, valid, regular)
    counted = regular & ~covered
    rising = np.sort(scores[counted])
    for k, threshold in enumerate(thresholds):
        alive = len(rising) - int(np.searchsorted(rising, threshold, side="left"))
        false = alive - int(counted[taken[k]].sum())
        true = len(hits[k])
        curve[k] = true / (true + false) if true + false else 0.0
    return np.asarray(np.maximum.accumulate(curve[::-1])[::-1])


def _thresholds(scores: NDArray[np.float64], valid: int) -> list[float]:
    """Scores of the true positives whose recall lies nearest to 0, 1/40, 2/40, ...; the last is always taken."""
    falling = np.sort(scores)[::-1].tolist()
    target, taken, last = 0.0, [], len(falling) - 1
    for i, score in enumerate(falling):
        here = (i + 1) / valid
        after = (i + 2) / valid if i < last else here
        if i < last and after - target < target - here:
            continue
        taken.append(score)
        target += 1.0 / (_POSITIONS - 1.0)
    return taken


def _assign(
    labels: Boxes,
    pairs: _Pairs,
    preference: NDArray[np.float64],
    scores: NDArray[np.float64],
    thresholds: list[float] | NDArray[np.float64],
    valid: NDArray[np.bool_],
    regular: NDArray[np.bool_],
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """Gives each object in turn the free detection that it prefers (first of equals), for T thresholds at once.

    Returns, per threshold, the detections that are true positives and all detections that were taken.
    """
    columns = len(thresholds)
    used, compact = np.unique(pairs.detections, return_inverse=True)
    free = scores[used][:, None] >= np.asarray(thresholds)[None, :]  # [U, T]
    hits: list[list[NDArray[np.int64]]] = [[] for _ in range(columns)]
    taken: list[list[NDArray[np.int64]]] = [[] for _ in range(columns)]
    for rows in _rounds(labels.frames, pairs.objects):
        objects, found, value = pairs.objects[rows], compact[rows], preference[rows]
        starts = np.flatnonzero(np.r_[True, objects[1:] != objects[:-1]])
        lengths = np.diff(np.r_[starts, len(objects)])
        open_value = np.where(free[found], value[:, None], -np.inf)  # [P, T]
        largest = np.maximum.reduceat(open_value, starts, axis=0)
        equal = open_value == np.repeat(largest, lengths, axis=0)
        first = np.minimum.reduceat(np.where(equal, np.arange(len(objects))[:, None], len(objects)), starts, axis=0)
        some = np.maximum.reduceat(free[found], starts, axis=0)  # [objects of this round, T]
        counts = valid[objects[starts]]
        for k in range(columns):
            chosen = found[first[some[:, k], k]]
            free[chosen, k] = False
            detections = used[chosen]
            taken[k].append(detections)
            hits[k].append(detections[counts[some[:, k]] & regular[detections]])
    none = np.zeros(0, np.int64)
    return [np.concatenate([none, *part]) for part in hits], [np.concatenate([none, *part]) for part in taken]


def _rounds(frames: NDArray[np.int64], objects: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Rows of the pairs, split so that a round holds at most one object of each frame, in the order of the file."""
    if len(objects) == 0:
        return []
    unique, inverse = np.unique(objects, return_inverse=True)
    frame = frames[unique]
    starts = np.flatnonzero(np.r_[True, frame[1:] != frame[:-1]])
    rank = np.arange(len(unique)) - np.repeat(starts, np.diff(np.r_[starts, len(unique)]))
    round_of = rank[inverse]
    order = np.argsort(round_of, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(round_of[order])) + 1)


def read_kitti_files(truth: Path, results: Path) -> tuple[Boxes, Boxes, set[str]]:
    """Labels and detections of the frames that have a results file, and the labelled frames that have none."""
    truth = truth / "label_2" if (truth / "label_2").is_dir() else truth
    results = results / "data" if (results / "data").is_dir() else results
    read_results.folder(truth, "the folder label_2 of NNNNNN.txt files")
    read_results.folder(results, "the folder results/data of NNNNNN.txt files")
    paths = sorted(results.glob("*.txt"))
    if not paths:
        raise DataError(f"{results}: no .txt file in it: write one per image (empty where nothing was detected)")
    labelled = {path.stem for path in truth.glob("*.txt")}
    for path in paths:
        if path.stem not in labelled:
            raise DataError(f"{path}: there is no {truth / path.name}: was it made for another split?")
    labels = _read([truth / path.name for path in paths], _LABEL)
    detections = _read(paths, f"{_LABEL} score", known=_KNOWN.union(labels.types.tolist()))
    return labels, detections, labelled - {path.stem for path in paths}


def _read(paths: list[Path], columns: str, *, known: frozenset[str] | None = None) -> Boxes:
    frames, types, tables = [], [], [np.zeros((0, len(columns.split()) - 1))]
    for frame, path in enumerate(paths):
        words, table = read_results.read_table(path, columns=columns)
        lower = [word.lower() for word in words]
        for word, kind in zip(words, lower):
            if known is not None and kind not in known:
                raise DataError(f"{path}: unknown type {word!r}: use {read_results.names_of(CLASSES)}")
        frames += [frame] * len(words)
        types += lower
        tables.append(table)
    numbers = np.concatenate(tables)
    return Boxes(np.array(frames, np.int64), np.array(types, np.str_), numbers[:, 3:7], numbers)
