"""KITTI object detection in the image (2D boxes): AP at 11 and 40 recall positions, easy, moderate, hard.

Follows the C++ evaluation in its 40-point form of 2020 (and the Python ports): a labelled box exactly as high as the
limit is ignored (the kits of 2013 and 2017 counted it). docs/metrics.md has the list.

Matching is greedy in the order of the label file and runs twice: once over all detections, to find the scores that lie
at 41 recall positions, and once for each of these thresholds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.errors import DataError
from cascade_rcnn.evaluation import read_results
from cascade_rcnn.evaluation.pairwise import areas, intersections, ious, pair_up
from cascade_rcnn.messages import few_names

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
    """Labelled boxes (G) or detections (D) of all frames, in file order."""

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

    def chosen(self, rows: NDArray[np.bool_] | NDArray[np.int64]) -> _Pairs:
        return _Pairs(self.objects[rows], self.detections[rows], self.overlaps[rows])

    def ordered(self, preference: NDArray[np.float64]) -> _Pairs:
        """Each object's detections by falling ``preference`` [P], equal ones in file order."""
        return self.chosen(np.lexsort((-preference, self.objects)))


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
    """Precision at the 41 recall positions [41]; ``covered`` [D] detections in a DontCare region are ignored."""
    valid = _valid(labels, kind, difficulty)
    height = np.abs(detections.boxes[:, 1] - detections.boxes[:, 3]).astype(
        np.int64
    )  # the program truncates to an integer
    small = height < _MIN_HEIGHT[difficulty]  # of any class: may be matched, then counts nowhere
    regular = ~small & (detections.types == kind)
    scores = detections.numbers[:, 14]
    pairs = pairs.chosen((small | regular)[pairs.detections])

    # The scores at 41 recall positions, from a matching in which each object takes the highest score.
    everything = np.ones((len(scores), 1), np.bool_)
    hits = _match(pairs.ordered(scores[pairs.detections]), everything, valid, regular)[:, 0]
    thresholds = _thresholds(scores[hits], int(valid.sum()))[:_POSITIONS]

    # At each of them, each object takes the best overlap among the regular detections, else the first small one.
    free = scores[:, None] >= np.array(thresholds)[None, :]  # [D, T]
    preference = np.where(regular[pairs.detections], pairs.overlaps, -1.0)
    true = _match(pairs.ordered(preference), free, valid, regular).sum(axis=0)  # [T]
    false = free[regular & ~covered].sum(axis=0)  # matched with no object
    curve = np.zeros(_POSITIONS)
    curve[: len(thresholds)] = true / np.maximum(true + false, 1)
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


def _match(
    pairs: _Pairs, free: NDArray[np.bool_], valid: NDArray[np.bool_], regular: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Gives each object in turn the first detection of its list that is still free, at T thresholds at once.

    ``free`` [D, T] says which detections reach which threshold; those that are given away are cleared in it. Returns
    the true positives [D, T]: a ``regular`` detection (the others count nowhere) given to a ``valid`` object.

    Example: A wants a, then b; B wants a. The scores are a 0.9, b 0.5.

        threshold 0.7:  A takes a;  B finds a taken and gets nothing         true: a
        threshold 0.4:  the same, though A could have b and leave a to B     true: a, b stays free (a false positive)
    """
    hits = np.zeros_like(free)
    current, unmatched = -1, np.zeros(0, np.bool_)
    for one, detection in zip(pairs.objects.tolist(), pairs.detections.tolist()):
        if one != current:
            current, unmatched = one, np.ones(free.shape[1], np.bool_)  # [T]
        given = unmatched & free[detection]  # the thresholds at which this object takes this detection
        free[detection] &= ~given
        unmatched &= ~given
        if valid[one] and regular[detection]:
            hits[detection] |= given
    return hits


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
                raise DataError(f"{path}: unknown type {word!r}: use {few_names(sorted(CLASSES))}")
        frames += [frame] * len(words)
        types += lower
        tables.append(table)
    numbers = np.concatenate(tables)
    return Boxes(np.array(frames, np.int64), np.array(types, np.str_), numbers[:, 3:7], numbers)
