"""From detections to AP with intervals.

The numbers are the product's own COCO metrics. For the intervals AP is computed again from which detection matches an
object, for samples of the evaluated images drawn with replacement, the same samples for every network: differences
between rows are therefore paired by image. That this second computation gives the product's AP on the images as they
are is checked for every list of detections.

T IoU thresholds, N detections, G objects of an image, R samples, I images.
"""

from __future__ import annotations

import gzip
import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from explore import read_ways
from numpy.typing import NDArray
from product import IOUS, coco_truth, evaluate_coco, open_split

RECALLS = np.linspace(0, 1, 101)
TOLERANCE = 2e-3  # boxes are stored in 1/64 pixels, and COCO breaks ties between objects in another order
Floats = NDArray[np.float64]


def overlaps(a: Floats, b: Floats) -> Floats:
    """IoU [N, G] of boxes xyxy."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    both = np.clip(high - low, 0, None).prod(axis=2)
    areas = [(one[:, 2:] - one[:, :2]).prod(axis=1) for one in (a, b)]
    return both / np.maximum(areas[0][:, None] + areas[1][None] - both, 1e-9)


def match_image(table: Floats) -> NDArray[np.bool_]:
    """Which detections [N, T] match an object, for IoU [N, G] in falling order of score; greedy, as COCO does it."""
    found = np.zeros((len(table), len(IOUS)), dtype=bool)
    if table.size == 0:
        return found
    limits = np.array(IOUS)
    free = np.ones((len(IOUS), table.shape[1]), dtype=bool)
    rows = np.arange(len(IOUS))
    for n in np.flatnonzero(table.max(axis=1) >= limits[0]):
        left = np.where(free, table[n], -1.0)  # [T, G]
        best = left.argmax(axis=1)
        hit = left[rows, best] >= limits
        found[n] = hit
        free[rows[hit], best[hit]] = False
    return found


class Matched:
    """One list of detections against the truth, in falling order of score, for each class."""

    def __init__(self, images: int, limit: int) -> None:
        self.images, self.limit = images, limit
        self.classes: list[tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]] = []

    def add_class(self, per_image: list[tuple[Floats, Floats]]) -> None:
        """``per_image``: of each image the scores [N] and IoU [N, G] of one class."""
        image, scores, found = [], [], []
        for row, (score, table) in enumerate(per_image):
            order = np.argsort(-score, kind="stable")[: self.limit]
            image.append(np.full(len(order), row))
            scores.append(score[order])
            found.append(match_image(table[order]))
        objects = np.array([table.shape[1] for _, table in per_image])
        order = np.argsort(-np.concatenate(scores), kind="stable")
        self.classes.append((np.concatenate(image)[order], np.concatenate(found)[order], objects))

    def average_precision(self, times: NDArray[np.int64]) -> Floats:
        """AP [T], mean over classes, where image i counts ``times[i]`` times."""
        values = [_class_ap(times, *one) for one in self.classes if (one[2] * times).sum() > 0]
        return np.mean(values, axis=0) if values else np.zeros(len(IOUS))


def _class_ap(
    times: NDArray[np.int64], image: NDArray[np.int64], found: NDArray[np.bool_], objects: NDArray[np.int64]
) -> Floats:
    weight = times[image]
    used = weight > 0
    weight, found = weight[used], found[used]
    if not len(weight):
        return np.zeros(found.shape[1])
    good = np.cumsum(weight[:, None] * found, axis=0)  # [N, T]
    precision = good / np.cumsum(weight)[:, None]
    precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    recall = good / float((objects * times).sum())
    result = np.zeros(found.shape[1])
    for t in range(found.shape[1]):
        place = np.searchsorted(recall[:, t], RECALLS, side="left")
        result[t] = precision[place[place < len(precision)], t].sum() / len(RECALLS)
    return result


def samples(images: int, count: int) -> NDArray[np.int64]:
    """How often each image is drawn [R, I]; the same numbers for every network."""
    rng = np.random.default_rng(images)
    return rng.multinomial(images, np.full(images, 1 / images), size=count)


def score_job(work: Path, name: str, bootstrap: int) -> Path:
    """Write ``WORK/scores/JOB.npz``: by way the product's AP by IoU ``WAY/ap`` [T], and that of the samples
    ``WAY/samples`` [R, T]; for masks the way is ``masks``."""
    raw, out = work / "raw", work / "scores" / f"{name}.npz"
    source = raw / f"{name}.json"
    if out.exists() and out.stat().st_mtime > source.stat().st_mtime and _sampled(out) == bootstrap:
        return out
    facts = json.loads(source.read_text(encoding="utf-8"))
    split = open_split(work / "data" / facts["data"], facts["val"])
    truth = coco_truth(split)
    drawn = samples(len(split), bootstrap)
    limit = 300
    arrays: dict[str, NDArray[Any]] = {"bootstrap": np.array(bootstrap)}
    ways = read_ways(raw / f"{name}.npz")
    same = next((way for way in ("round1", *(f"ensemble{k}" for k in range(9, 1, -1))) if way in ways), "")
    if same:  # which is what the product does
        del ways["final"]
    for way, found in ways.items():
        results = _results(found, [image["id"] for image in truth["images"]], split.category_ids)
        matched = _match_boxes(found, split, limit)
        arrays |= _scored(way, matched, evaluate_coco(truth, results, iou_type="bbox", max_detections=limit), drawn)
    if same:
        arrays |= {f"final/{what}": arrays[f"{same}/{what}"] for what in ("ap", "samples")}
    masks = raw / f"{name}.masks.json.gz"
    if masks.exists():
        with gzip.open(masks, "rt") as file:
            results = json.load(file)
        metrics = evaluate_coco(truth, results, iou_type="segm", max_detections=limit)
        arrays |= _scored("masks", _match_masks(results, truth, split, limit), metrics, drawn, kind="segm")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".tmp.npz")
    np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]
    temporary.replace(out)
    return out


def _sampled(path: Path) -> int:
    with np.load(path) as arrays:
        return int(arrays["bootstrap"])


def _scored(
    way: str, matched: Matched, metrics: dict[str, float | None], drawn: NDArray[np.int64], *, kind: str = "bbox"
) -> dict[str, NDArray[Any]]:
    own = np.array([metrics[f"{kind}/AP@{iou:.2f}"] for iou in IOUS], dtype=float)
    again = matched.average_precision(np.ones(matched.images, dtype=np.int64))
    worst = float(np.abs(own - again).max())
    assert worst < TOLERANCE, f"{way}: the product's AP and the one behind the intervals differ by {worst:.4f}"
    each = np.array([matched.average_precision(times) for times in drawn])
    return {f"{way}/ap": own, f"{way}/samples": each.astype(np.float32)}


def _results(found: dict[str, NDArray[Any]], ids: list[Any], categories: tuple[int, ...]) -> list[dict[str, Any]]:
    boxes = np.concatenate([found["box"][:, :2], found["box"][:, 2:] - found["box"][:, :2]], axis=1).tolist()
    columns = zip(found["image"].tolist(), found["label"].tolist(), found["score"].tolist(), boxes)
    return [
        {"image_id": ids[row], "category_id": categories[label], "score": score, "bbox": box}
        for row, label, score, box in columns
    ]


def _match_boxes(found: dict[str, NDArray[Any]], split: Any, limit: int) -> Matched:
    matched = Matched(len(split), limit)
    for label in range(len(split.class_names)):
        per_image = []
        for row, record in enumerate(split.records):
            mine = (found["image"] == row) & (found["label"] == label)
            objects = record.boxes[record.labels == label]
            per_image.append((found["score"][mine].astype(float), overlaps(found["box"][mine], objects)))
        matched.add_class(per_image)
    return matched


def _match_masks(results: list[dict[str, Any]], truth: dict[str, Any], split: Any, limit: int) -> Matched:
    from faster_coco_eval.core import mask as coco_mask

    matched = Matched(len(split), limit)
    for category in split.category_ids:
        per_image = []
        for image in truth["images"]:
            mine = [one for one in results if (one["image_id"], one["category_id"]) == (image["id"], category)]
            own = [
                one["segmentation"]
                for one in truth["annotations"]
                if (one["image_id"], one["category_id"]) == (image["id"], category)
            ]
            table = np.zeros((len(mine), len(own)))
            if mine and own:
                table = np.asarray(coco_mask.iou([one["segmentation"] for one in mine], own, [0] * len(own)))
            per_image.append((np.array([one["score"] for one in mine], dtype=float), table))
        matched.add_class(per_image)
    return matched


def score_all(work: Path, names: list[str], bootstrap: int, *, processes: int) -> None:
    """Score the jobs that are done, in several processes."""
    done = [name for name in names if (work / "raw" / f"{name}.json").is_file()]
    if processes < 2:
        for name in done:
            score_job(work, name, bootstrap)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        list(pool.map(score_job, [work] * len(done), done, [bootstrap] * len(done)))
