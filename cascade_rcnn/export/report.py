"""Whether an exported network says what PyTorch says, how long both take, and how good both are: ``report.json``."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.config import Config
from cascade_rcnn.data.formats.open import open_split
from cascade_rcnn.data.images import to_array
from cascade_rcnn.data.orientation import refuse_undecided
from cascade_rcnn.data.records import DataSplit
from cascade_rcnn.data.split_levels import with_range
from cascade_rcnn.data.synthetic_shapes import draw_scene
from cascade_rcnn.errors import DataError
from cascade_rcnn.evaluation.evaluate_model import detect_split, evaluate_results, match_classes
from cascade_rcnn.evaluation.metrics import Metrics
from cascade_rcnn.inference.detections import Detections
from cascade_rcnn.inference.detector import Detector, load
from cascade_rcnn.inference.media import collect
from cascade_rcnn.inference.run_model import Precision
from cascade_rcnn.models.boxes import pairwise_iou

IMAGES = 8  # that are compared
ROUNDS = 3
IOU, SCORE = 0.99, 1e-3  # of two detections that are the same
MASK_IOU = 0.99  # of their masks on average: below, they are called different

Pixels = NDArray[np.uint8]


def pictures(
    data: Path | None, split: str, *, folder: Path | None = None, levels: str = "auto"
) -> tuple[list[Pixels], str]:
    """Up to ``IMAGES`` pictures to compare on, spread evenly over a split or else a folder, and what they are.

    ``levels``: ``data.range``, for pictures of more than 8 bits.

    Raises:
        DataError: none of the split's can be read.
    """
    if data is None and folder is not None:
        paths = [file.path for file in collect([folder]) if not file.is_video]
        if read := _spread(paths, levels):
            return read, f"{len(read)} pictures of {folder.resolve().name}"
    if data is None:
        made = [draw_scene(np.random.default_rng(seed), size=480, objects=(3, 12))[0] for seed in range(IMAGES)]
        return made, f"{len(made)} generated pictures (--data DIR takes real ones)"
    opened = open_split(data, split, strict=False)
    read = _spread([record.path for record in opened.records], levels)
    if not read:
        raise DataError(f"{data}: none of the pictures of {split!r} can be read; check the data set first")
    return read, f"{len(read)} pictures of {data.resolve().name}, {split}"


def _spread(paths: Sequence[Path], levels: str) -> list[Pixels]:
    """Those that can be read of every so manieth, at most ``IMAGES``."""
    read: list[Pixels] = []
    for path in paths[:: max(1, len(paths) // IMAGES)]:
        with contextlib.suppress(DataError):
            read.append(to_array(path, range=levels))
        if len(read) == IMAGES:
            break
    return read


def compare(reference: Detector, exported: Detector, images: Sequence[Pixels]) -> dict[str, Any]:
    """Detections that both give, of as many as the one gives that gives more; their largest differences and masks."""
    total = matched = 0
    boxes, scores, masks = [0.0], [0.0], []
    for image in images:
        one, other = reference.predict(image), exported.predict(image)
        pairs = match(one, other)
        total, matched = total + max(len(one), len(other)), matched + len(pairs)
        rows, columns = [row for row, _ in pairs], [column for _, column in pairs]
        first, second = one[rows], other[columns]
        if pairs:
            boxes.append(float((first.boxes - second.boxes).abs().max()))
            scores.append(float((first.scores - second.scores).abs().max()))
        masks += [_mask_iou(a, b) for a, b in zip(first, second)] if first.mask_probs is not None else []
    report: dict[str, Any] = {
        "images": len(images),
        "detections": total,
        "matched": matched,
        "matched_at": {"iou": IOU, "score": SCORE},
        "largest_box_difference": max(boxes),
        "largest_score_difference": max(scores),
    }
    if masks:
        report |= {"mask_iou_mean": float(np.mean(masks)), "mask_iou_least": float(np.min(masks))}
    return report


def match(one: Detections, other: Detections) -> list[tuple[int, int]]:
    """Rows of detections that are the same: class, IoU above 0.99, score within 1e-3; each at most once."""
    if not len(one) or not len(other):
        return []
    same = pairwise_iou(one.boxes, other.boxes) > IOU
    same &= one.labels[:, None] == other.labels
    same &= (one.scores[:, None] - other.scores).abs() <= SCORE
    pairs, taken = [], set[int]()
    for row, candidates in enumerate(same):
        free = [column for column in candidates.nonzero().flatten().tolist() if column not in taken]
        if free:
            taken.add(free[0])
            pairs.append((row, free[0]))
    return pairs


def _mask_iou(one: Detections, other: Detections) -> float:
    assert one.masks is not None and other.masks is not None
    union = int((one.masks | other.masks).sum())
    return int((one.masks & other.masks).sum()) / union if union else 1.0


def time_both(reference: Detector, exported: Detector, images: Sequence[Pixels]) -> dict[str, Any]:
    """Milliseconds per picture, from pixels to detections, in turn: medians, and the median of each turn's ratio."""
    seconds: list[tuple[float, float]] = []
    for number in range(ROUNDS + 1):
        for image in images[:4]:
            turn = []
            for detector in (reference, exported):
                began = time.perf_counter()
                detector.predict(image)
                turn.append(time.perf_counter() - began)
            if number:  # the first round warms up
                seconds.append((turn[0], turn[1]))
    return {
        "pytorch_ms": 1000 * median(one for one, _ in seconds),
        "exported_ms": 1000 * median(other for _, other in seconds),
        "ratio": median(other / one for one, other in seconds),
        "turns": len(seconds),
    }


def average_precision(checkpoint: Path, exported: Path, data: Path, split: str) -> dict[str, dict[str, float]]:
    """AP of both on a split of a data set, each as ``evaluate`` measures it."""
    both = {name: metrics(path, data, split) for name, path in (("pytorch", checkpoint), ("exported", exported))}
    return {
        name: {key: value for key in ("bbox/AP", "segm/AP") if (value := found.get(key)) is not None}
        for name, found in both.items()
    }


def split_to_measure(
    path: Path, config: Config, class_names: Sequence[str], data: Path, split: str
) -> tuple[DataSplit, Config, list[int]]:
    """A split of a data set, the configuration to look at it with, and its label of each class of the network.

    Raises:
        DataError: no such data, or other classes; orientation or levels of the pictures that have to be said.
    """
    opened = open_split(data, split, orientation=config.data.orientation)
    refuse_undecided(opened, config.data.orientation)
    settings, _ = with_range(replace(config.data, val=split), opened)
    return opened, replace(config, data=settings), match_classes(class_names, opened, path, quiet=True)


def metrics(path: Path, data: Path, split: str, *, precision: Precision = "auto") -> Metrics:
    """What ``evaluate`` measures of a checkpoint or an export on a split of a data set, on the CPU."""
    detector = load(path, device="cpu", precision=precision)
    opened, config, class_map = split_to_measure(path, detector.config, detector.class_names, data, split)
    results, seen = detect_split(detector.model, config, opened, class_map=class_map, precision=precision)
    with contextlib.redirect_stdout(io.StringIO()):
        return evaluate_results(results, config, seen)
