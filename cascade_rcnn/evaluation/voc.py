"""Pascal VOC average precision: 11-point (VOC2007) and area under the curve (VOC2010 on).

Follows the community's accepted Python evaluation (py-faster-rcnn, detectron2), as the golden numbers do, with a stable
sort: equal scores keep the order of the file. One difference from the MATLAB development kit: an overlap equal to the
threshold is no match here (in the kit it is). Both agree on everything else, docs/metrics.md has the list.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.data.formats.voc import list_entry, parse_xml, read_objects
from cascade_rcnn.errors import DataError
from cascade_rcnn.evaluation import read_results
from cascade_rcnn.evaluation.pairwise import best_of_each, ious, pair_up
from cascade_rcnn.messages import few_names

CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
_RECALL_STEPS = np.arange(
    0.0, 1.1, 0.1
)  # 3 * 0.1 > 3 / 10: a recall of exactly 3/10 misses its step, as in the official code


@dataclass
class ClassObjects:
    """Objects of one class; G objects or D detections, image rows refer to the image set."""

    images: NDArray[np.int64]  # [G]
    boxes: NDArray[np.float64]  # [G, 4], xmin, ymin, xmax, ymax, 1-based, the last pixel included
    difficult: NDArray[np.bool_] | None = None  # [G]
    scores: NDArray[np.float64] | None = None  # [D], file order


def evaluate_voc(
    truth: Path, results: Path, *, split: str = "test", iou: float = 0.5, notes: list[str] | None = None
) -> dict[str, float | None]:
    """Scores ``comp4_det_SPLIT_CLASS.txt`` files against a VOC year folder.

    ``truth`` holds ``Annotations/`` and ``ImageSets/Main/SPLIT.txt``; ``results`` holds one file per class with lines
    ``image score xmin ymin xmax ymax`` (1-based). Returns ``voc/mAP07``, ``voc/mAP``, ``voc/AP07/CLASS`` and
    ``voc/AP/CLASS`` in 0..1; None where the official code gives NaN or cannot run, with the reason appended to
    ``notes``. Raises ``DataError``.
    """
    notes = [] if notes is None else notes
    objects, image_ids = read_truth(truth, split)
    detections = read_submission(results, split, image_ids)
    _check_classes(truth, results, split, objects, detections)
    ap07: dict[str, float | None] = {}
    area: dict[str, float | None] = {}
    for name in sorted({*objects, *detections}):
        if name not in detections:
            ap07[name] = area[name] = None
            continue
        ap07[name], area[name] = class_average_precision(objects.get(name), detections[name], iou)
    _explain(objects, detections, area, split, notes)
    metrics = {"voc/mAP07": _mean(ap07), "voc/mAP": _mean(area)}
    metrics |= {f"voc/AP07/{name}": value for name, value in ap07.items()}
    return metrics | {f"voc/AP/{name}": value for name, value in area.items()}


def class_average_precision(
    objects: ClassObjects | None, detections: ClassObjects, iou: float
) -> tuple[float, float | None]:
    """(11-point AP, area AP) of one class. Without objects that count the official code gives 0 for the first, and for
    the second 0 without detections but NaN (here None) with some."""
    positives = 0 if objects is None or objects.difficult is None else int((~objects.difficult).sum())
    if objects is None or positives == 0:
        return 0.0, (None if len(detections.images) else 0.0)
    hit, miss = _match(objects, detections, iou)
    true, false = np.cumsum(hit), np.cumsum(miss)
    recall = true / positives
    precision = true / np.maximum(true + false, np.finfo(np.float64).eps)
    return eleven_point(recall, precision), area_under(recall, precision)


def eleven_point(recall: NDArray[np.float64], precision: NDArray[np.float64]) -> float:
    """Mean over recall steps 0, 0.1, ..., 1 of the best precision at that recall or beyond; recall [D] never falls."""
    best = np.r_[np.maximum.accumulate(precision[::-1])[::-1], 0.0]
    return float(sum(best[np.searchsorted(recall, _RECALL_STEPS, side="left")] / 11.0))


def area_under(recall: NDArray[np.float64], precision: NDArray[np.float64]) -> float:
    """Area under the falling envelope of the curve; recall [D] never falls."""
    recall = np.r_[0.0, recall, 1.0]
    best = np.maximum.accumulate(np.r_[0.0, precision, 0.0][::-1])[::-1]
    return float(np.sum(np.diff(recall) * best[1:]))


def _match(objects: ClassObjects, detections: ClassObjects, iou: float) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """True and false positives [D] in the order of descending score.

    Only the object that a detection overlaps most counts: if difficult, the detection is neither; if taken, false.
    """
    assert detections.scores is not None and objects.difficult is not None
    order = np.argsort(-detections.scores, kind="stable")
    images, boxes = detections.images[order], detections.boxes[order]
    best = np.full(len(order), -1)
    overlap = np.zeros(len(order))
    for i, j in pair_up(images, objects.images):
        values = ious(boxes[i], objects.boxes[j], plus=1.0)
        rows = best_of_each(i, values)
        best[i[rows]], overlap[i[rows]] = j[rows], values[rows]
    reached = overlap > iou
    difficult = reached & objects.difficult[best]
    first = np.zeros(len(order), np.bool_)
    candidates = np.flatnonzero(reached & ~difficult)
    first[candidates[np.unique(best[candidates], return_index=True)[1]]] = True
    return first, ~first & ~difficult


def read_truth(root: Path, split: str) -> tuple[dict[str, ClassObjects], dict[str, int]]:
    """Objects per class of an image set of a VOC year folder, and the row of each image."""
    read_results.folder(root, "a VOC year folder with Annotations/ and ImageSets/Main/ (for example VOCdevkit/VOC2007)")
    listing = root / "ImageSets" / "Main" / f"{split}.txt"
    if not listing.is_file():
        known = few_names(sorted(path.stem for path in listing.parent.glob("*.txt"))) or "none"
        raise DataError(f"{listing}: not found: choose --split among {known}")
    lines = [line.strip() for line in read_results.read_text(listing).splitlines() if line.strip()]
    # a name may end like a flag: "bolt 1"
    lines = [line if (root / "Annotations" / f"{line}.xml").is_file() else list_entry(line) for line in lines]
    image_ids = {name: row for row, name in enumerate(lines)}
    if len(image_ids) != len(lines):
        twice = next(name for row, name in enumerate(lines) if image_ids[name] != row)
        raise DataError(f"{listing}: image {twice!r} is listed twice: remove one line")
    rows: dict[str, list[tuple[int, float, float, float, float, bool]]] = {}
    for name, row in image_ids.items():
        path = root / "Annotations" / f"{name}.xml"
        if not path.is_file():
            raise DataError(f"{listing}: image {name!r} has no {path}: add the annotation or remove the line")
        for label, box, difficult in _read_annotation(path):
            rows.setdefault(label, []).append((row, *box, difficult))
    objects = {}
    for label, found in rows.items():
        table = np.array(found, np.float64)
        objects[label] = ClassObjects(table[:, 0].astype(np.int64), table[:, 1:5], difficult=table[:, 5] != 0)
    return objects, image_ids


def _read_annotation(path: Path) -> list[tuple[str, tuple[float, float, float, float], bool]]:
    found = []
    for item in read_objects(parse_xml(path)):
        if not item.name or item.shape != "bndbox" or not np.isfinite(item.corners).all():
            raise DataError(
                f"{path}: object {item.name!r} has no readable bndbox ({list(item.corners)}): a name and four finite "
                "numbers are needed"
            )
        if item.flags["difficult"] is None:
            raise DataError(f"{path}: object {item.name!r}: difficult is neither 0 nor 1: correct it")
        found.append((item.name, item.corners, item.difficult))
    return found


def read_submission(results: Path, split: str, image_ids: dict[str, int]) -> dict[str, ClassObjects]:
    """Detections per class from ``comp4_det_SPLIT_CLASS.txt`` (``comp3`` is read too), in file order."""
    read_results.folder(results, f"the folder of comp4_det_{split}_CLASS.txt files")
    detections = {}
    for path in sorted(results.glob(f"comp[34]_det_{split}_*.txt")):
        label = path.stem.split(f"_det_{split}_", 1)[1]
        if label in detections:
            raise DataError(f"{path}: class {label!r} is there as comp3 and as comp4: keep one")
        names, table = read_results.read_table(path, columns="image score xmin ymin xmax ymax")
        rows = [image_ids.get(name, -1) for name in names]
        if -1 in rows:
            line = rows.index(-1)
            raise DataError(f"{path}: image {names[line]!r} is not in the image set {split!r}: score another --split")
        detections[label] = ClassObjects(np.array(rows, np.int64), table[:, 1:], scores=table[:, 0])
    if not detections:
        there = few_names(sorted(path.name for path in results.iterdir()), most=3) or "nothing"
        raise DataError(f"{results}: no comp4_det_{split}_CLASS.txt in it (found {there}): give --split or the folder")
    return detections


def _check_classes(
    truth: Path, results: Path, split: str, objects: dict[str, ClassObjects], detections: dict[str, ClassObjects]
) -> None:
    strange = set(detections) - set(objects) - set(CLASSES)
    if not strange:
        return
    for path in sorted((truth / "Annotations").glob("*.xml")):  # a class of another split is fine
        strange -= {label for label, _, _ in _read_annotation(path)}
        if not strange:
            return
    name = min(strange)
    raise DataError(
        f"{results}/comp4_det_{split}_{name}.txt: class {name!r} is in no annotation, "
        f"which have {few_names(sorted(objects))}: rename or remove the file"
    )


def _explain(
    objects: dict[str, ClassObjects],
    detections: dict[str, ClassObjects],
    area: dict[str, float | None],
    split: str,
    notes: list[str],
) -> None:
    missing = sorted(set(objects) - set(detections))
    if missing:
        notes.append(
            f"no file comp4_det_{split}_CLASS.txt for {few_names(missing)}: undefined, and so are the "
            "means; write an empty file for a class that was never detected"
        )
    undefined = [name for name, value in area.items() if value is None and name in detections]
    if undefined:
        defined = [value for value in area.values() if value is not None]
        rest = f"; the mean over the other {len(defined)} is {np.mean(defined):.4f}" if defined else ""
        notes.append(
            f"voc/AP is undefined for {few_names(sorted(undefined))} (detections, but no object that counts), "
            f"and so is voc/mAP, the plain mean{rest}"
        )
    zero = [name for name in detections if name not in objects or bool(np.all(objects[name].difficult))]
    if zero:
        notes.append(
            f"without objects that count: {few_names(sorted(zero))}; the official 11-point AP of such a class is "
            "0 and enters voc/mAP07"
        )


def _mean(values: dict[str, float | None]) -> float | None:
    known = [value for value in values.values() if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None
