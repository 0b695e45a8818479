"""WIDER FACE average precision: easy, medium, hard.

Follows the Python port that the field reports (wondervictor's, used by RetinaFace), with one thing from the MATLAB
tools: detections are sorted by score on reading, so that an unsorted file is not penalised. MATLAB normalises scores in
single precision and differs in the sixth digit. docs/metrics.md has the list.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.data.formats.matlab import read_mat
from cascade_rcnn.data.formats.widerface import cell, read_faces
from cascade_rcnn.errors import DataError
from cascade_rcnn.evaluation import read_results
from cascade_rcnn.evaluation.pairwise import best_of_each, ious, pair_up
from cascade_rcnn.evaluation.voc import area_under

SETTINGS = ("easy", "medium", "hard")
_IOU = 0.5
_THRESHOLDS = 1 - np.arange(1, 1001) / 1000


@dataclass
class Faces:
    """The official validation files; G faces."""

    images: dict[tuple[str, str], int]  # (event, image name without extension) -> row
    rows: NDArray[np.int64]  # [G], row of the image
    boxes: NDArray[np.float64]  # [G, 4], x, y, x + width, y + height
    evaluated: dict[str, NDArray[np.bool_]]  # per setting [G], faces that count


def evaluate_widerface(truth: Path, results: Path, *, notes: list[str] | None = None) -> dict[str, float | None]:
    """Scores event folders of text files against the official ``wider_{face,easy,medium,hard}_val.mat``.

    ``results`` holds ``EVENT/IMAGE.txt``: image name, count, then lines ``x y width height score``. Returns
    ``widerface/easy``, ``/medium``, ``/hard`` in 0..1, None where a setting has no face; reasons go to ``notes``. An
    image without a file counts as without detections. Raises ``DataError``.
    """
    notes = [] if notes is None else notes
    faces = read_truth(truth)
    rows, boxes, scores = read_submission(results, faces.images, notes)
    scores = _normalised(scores)
    order = np.lexsort((-scores, rows))  # stable: equal scores keep the order of the file
    rows, boxes, scores = rows[order], boxes[order], scores[order]
    best = np.full(len(rows), -1)
    for i, j in pair_up(rows, faces.rows):
        values = ious(boxes[i], faces.boxes[j], plus=1.0)
        picked = best_of_each(i, values)
        picked = picked[values[picked] >= _IOU]
        best[i[picked]] = j[picked]
    with_faces = np.isin(rows, faces.rows)
    metrics: dict[str, float | None] = {}
    for setting in SETTINGS:
        counts = faces.evaluated[setting]
        metrics[f"widerface/{setting}"] = _average_precision(best[with_faces], scores[with_faces], counts)
        if not counts.any():
            notes.append(f"widerface/{setting} is undefined: the ground truth has no face in this setting")
    return metrics


def _average_precision(
    best: NDArray[np.int64], scores: NDArray[np.float64], evaluated: NDArray[np.bool_]
) -> float | None:
    """AP over 1000 thresholds. ``best`` [D] is the face that a detection overlaps most, -1 for none, by descending
    score within each image; ``evaluated`` [G] the faces of the setting."""
    total = int(evaluated.sum())
    if total == 0:
        return None
    matched = best >= 0
    left_out = matched & ~evaluated[best]  # on a face outside the setting: neither found nor a false positive
    candidates = np.flatnonzero(matched & ~left_out)
    found = candidates[np.unique(best[candidates], return_index=True)[1]]
    proposals = _at_least(scores[~left_out])
    hits = _at_least(scores[found])
    precision = np.divide(hits, proposals, out=np.zeros(len(hits)), where=proposals > 0)
    return area_under(hits / total, precision)


def _at_least(scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """How many scores reach each of the thresholds [1000]; NaN reaches none."""
    rising = np.sort(scores[~np.isnan(scores)])
    return len(rising) - np.searchsorted(rising, _THRESHOLDS, side="left")


def _normalised(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores of the whole submission on 0..1, as the port does: its range starts as [1, 0], so that scores outside
    0..1 are rescaled together with 0 or 1; equal scores become NaN and pass no threshold."""
    if len(scores) == 0:
        return scores
    low, high = min(1.0, float(scores.min())), max(0.0, float(scores.max()))
    return (scores - low) / (high - low) if high != low else np.full(len(scores), np.nan)


def read_truth(root: Path) -> Faces:
    """The four official ``.mat`` files of a folder."""
    read_results.folder(
        root, "the folder of wider_face_val.mat, wider_easy_val.mat, wider_medium_val.mat, wider_hard_val.mat"
    )
    path = root / "wider_face_val.mat"
    table = _load(path, ("event_list", "file_list", "face_bbx_list"))
    lists = {name: _load(root / f"wider_{name}_val.mat", ("gt_list",))["gt_list"] for name in SETTINGS}
    images: dict[tuple[str, str], int] = {}
    rows, boxes = [], []
    counted: dict[str, list[NDArray[np.bool_]]] = {name: [] for name in SETTINGS}
    numbers: Counter[int] = Counter()
    for faces in read_faces(path, table):
        if isinstance(faces, ValueError):
            raise DataError(f"{path}: not the official cell layout ({faces}): download it again")
        number = numbers[faces.event_row]
        numbers[faces.event_row] += 1
        rows.append(np.full(len(faces.boxes), len(images)))
        boxes.append(faces.boxes)
        for setting, cells in lists.items():
            inside = np.zeros(len(faces.boxes), np.bool_)
            try:
                inside[cell(cells, faces.event_row, number).reshape(-1).astype(np.int64) - 1] = True
            except (ValueError, IndexError) as error:
                raise DataError(f"{path}: not the official cell layout ({error}): download it again") from error
            counted[setting].append(inside)
        images[faces.event, faces.name] = len(images)
    flat = np.concatenate([*boxes, np.zeros((0, 4))])
    flat[:, 2:] += flat[:, :2]
    evaluated = {name: np.concatenate([*parts, np.zeros(0, np.bool_)]) for name, parts in counted.items()}
    return Faces(images, np.concatenate([*rows, np.zeros(0, np.int64)]).astype(np.int64), flat, evaluated)


def _load(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"{path}: not found: give the folder of the official .mat files (eval_tools/ground_truth)")
    table = read_mat(path)
    for key in keys:
        if key not in table:
            raise DataError(f"{path}: has no {key}: this is not an official WIDER FACE file")
    return table


def read_submission(
    results: Path, images: dict[tuple[str, str], int], notes: list[str]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Image rows [D], boxes [D, 4] as x, y, x + width, y + height, and scores [D] of all files."""
    read_results.folder(results, "the folder of event folders (results/0--Parade/0_Parade_....txt)")
    rows, tables = [np.zeros(0, np.int64)], [np.zeros((0, 5))]
    seen = set()
    for path in sorted(results.glob("*/*.txt")):
        key = (path.parent.name, path.stem)
        if key not in images:
            known = {event for event, _ in images}
            place = "image" if path.parent.name in known else "event"
            raise DataError(f"{path}: this {place} is not in the ground truth: was it made for another split?")
        seen.add(key)
        _, table = read_results.read_table(path, columns="x y width height score", names=0, skip=2)
        _check_count(path, len(table))
        rows.append(np.full(len(table), images[key]))
        tables.append(table)
    if not seen:
        raise DataError(f"{results}: no EVENT/IMAGE.txt in it: give the folder that holds the event folders")
    if len(seen) < len(images):
        event, name = next(key for key in images if key not in seen)
        notes.append(
            f"{len(images) - len(seen)} of {len(images)} images have no file ({event}/{name}.txt first): they "
            "count as without detections"
        )
    table = np.concatenate(tables)
    table[:, 2:4] += table[:, :2]
    return np.concatenate(rows), table[:, :4], table[:, 4]


def _check_count(path: Path, found: int) -> None:
    lines = read_results.read_text(path).splitlines()
    if len(lines) < 2 or lines[1].strip() != str(found):
        count = lines[1].strip() if len(lines) > 1 else ""
        raise DataError(
            f"{path}: line 2 says {count!r} detections and {found} lines follow: "
            "write image name, count, then one line for each"
        )
