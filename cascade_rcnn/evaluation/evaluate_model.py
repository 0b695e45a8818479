"""Metrics of a network on a split, computed by all processes of a run together."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cascade_rcnn import distributed
from cascade_rcnn.config import Config
from cascade_rcnn.data.dataset import DetectionDataset
from cascade_rcnn.data.formats.classes import strange_classes
from cascade_rcnn.data.loader import eval_loader
from cascade_rcnn.data.records import DataSplit
from cascade_rcnn.errors import DataError
from cascade_rcnn.evaluation.coco import coco_truth, evaluate_coco
from cascade_rcnn.evaluation.metrics import Metrics
from cascade_rcnn.inference.detections import Detections
from cascade_rcnn.inference.exported import ExportedNetwork
from cascade_rcnn.inference.run_model import Precision, detect, to_detections
from cascade_rcnn.messages import few_names, printable
from cascade_rcnn.models.cascade_rcnn import CascadeRCNN
from cascade_rcnn.progress import progress_bar


def evaluate_model(
    model: CascadeRCNN,
    config: Config,
    split: DataSplit,
    *,
    device: torch.device | None = None,
    progress: bool = True,
    batch_size: int = 1,
    class_map: Sequence[int] | None = None,
    workers: int | None = None,
    look: Callable[[Detections], None] | None = None,
) -> Metrics:
    """COCO metrics of a model on a split: ``bbox/AP``, ``bbox/AP@0.50``, ``bbox/AP/CLASS``, ... and ``segm/...``.

    Every process of a torchrun calls this with its own copy of the model; each image is evaluated once, and every
    process gets the same metrics. Values are 0..1, None where the split has no object of the kind.

    Args:
        class_map: [K] the split's label of each label of the model, -1 for none; None: they are the same.
        workers: loader processes; None: ``config.data.workers``.
        look: called with the detections of each image of this process, e.g. to draw them.
    """
    if device is not None:
        model = model.to(device)
    results, split = detect_split(
        model, config, split, progress=progress, batch_size=batch_size, class_map=class_map, workers=workers, look=look
    )
    metrics = evaluate_results(results, config, split) if distributed.rank() == 0 else {}
    return distributed.broadcast(metrics)


def detect_split(
    model: CascadeRCNN,
    config: Config,
    split: DataSplit,
    *,
    progress: bool = True,
    batch_size: int = 1,
    class_map: Sequence[int] | None = None,
    workers: int | None = None,
    look: Callable[[Detections], None] | None = None,
    precision: Precision = "auto",
) -> tuple[list[dict[str, Any]], DataSplit]:
    """COCO results of a model on a split (on rank 0 those of all processes, elsewhere none), and what was looked at:
    the split without the images that cannot be read. Those are named on stderr.

    Raises:
        DataError: no image can be read.
    """
    canvas = model.canvas if isinstance(model, ExportedNetwork) else None
    dataset = DetectionDataset(split, config.data, training=False, semantics=config.model.semantics, canvas=canvas)
    rank, size = distributed.rank(), distributed.world_size()
    loader = eval_loader(dataset, batch_size=batch_size, rank=rank, world_size=size, workers=workers)
    names, ids, _ = as_split(split, class_map)
    results: list[dict[str, Any]] = []
    seen: list[int | str] = []
    bad: dict[str, str] = {}
    try:
        with progress_bar(len(dataset), show=progress and rank == 0) as advance:
            for images, _ in loader:
                bad |= dict(images.bad)
                found = to_detections(detect(model, images, precision), images, names, ids)
                for path, detections in zip(images.paths, found, strict=True):
                    seen.append(detections.image_id if detections.image_id is not None else len(seen))
                    if path in bad:
                        continue
                    results.extend(one for one in detections.to_coco() if one["category_id"] != NOT_IN_SPLIT)
                    if look is not None:
                        look(detections)
                advance(len(images) * size)
    finally:
        loader.close()
    parts = distributed.gather((results, seen, bad))
    if not parts:
        return [], split
    looked_at = sorted(str(image) for _, images, _ in parts for image in images)
    assert looked_at == sorted(str(record.image_id) for record in split.records), "each image once over all processes"
    read = without_unread(split, {path: reason for _, _, some in parts for path, reason in some.items()})
    return [one for part, _, _ in parts for one in part], read


def without_unread(split: DataSplit, bad: Mapping[str, str]) -> DataSplit:
    """The split without the images (path: reason) that cannot be read; names them."""
    if not bad:
        return split
    kept = [record for record in split.records if str(record.path) not in bad]
    reasons = list(bad.values())
    if not kept:
        raise DataError(f"{reasons[0]} (so with all {len(split):,} images of {split.name!r}: nothing to evaluate on)")
    for reason in reasons[:_NAMED]:
        print(f"left out of the evaluation: {reason}", file=sys.stderr)
    print(
        f"{len(split) - len(kept):,} of {len(split):,} images of {split.name!r} cannot be read: the metrics are those "
        "of the others",
        file=sys.stderr,
    )
    return replace(split, records=kept)


_NAMED = 5  # unreadable images that are named, of all that are counted
NOT_IN_SPLIT = -(2**31)  # a category id that no data set uses


def as_split(split: DataSplit, class_map: Sequence[int] | None) -> tuple[tuple[str, ...], tuple[int, ...], int]:
    """Name and category id in the split of each label of the model, and the id of those that the split has not."""
    if class_map is None:
        return split.class_names, split.category_ids, NOT_IN_SPLIT
    names = tuple(split.class_names[label] if label >= 0 else "" for label in class_map)
    ids = tuple(split.category_ids[label] if label >= 0 else NOT_IN_SPLIT for label in class_map)
    return names, ids, NOT_IN_SPLIT


def evaluate_results(
    results: list[dict[str, Any]], config: Config, split: DataSplit, *, notes: list[str] | None = None
) -> Metrics:
    """COCO metrics of what ``detect_split`` gave; ``model.max_detections`` above 100 (dense scenes) counts here too."""
    truth = coco_truth(split)
    limit = max(100, config.model.max_detections)
    metrics = evaluate_coco(truth, results, iou_type="bbox", max_detections=limit, notes=notes)
    have_masks = split.has_masks and all("segmentation" in one for one in truth["annotations"])
    if have_masks and config.model.masks != "none":
        metrics |= evaluate_coco(truth, results, iou_type="segm", max_detections=limit, notes=notes)
    return metrics


def match_classes(known: Sequence[str], split: DataSplit, checkpoint: str | Path, *, quiet: bool = False) -> list[int]:
    """The split's label of each class that the checkpoint knows, by name; -1 where the split has no such class.

    Raises:
        DataError: the split has objects of classes that the checkpoint does not know; names both lists and a remedy.
    """
    ours, theirs = few_names(known, most=20), few_names(split.class_names, most=20)
    strange = list(strange_classes(known, split))
    if strange:
        raise DataError(
            f"{printable(split.root)}: the classes do not fit {printable(checkpoint)}, which does not know "
            f"{few_names(strange, most=20)}; data: {theirs}; checkpoint: {ours}; rename the classes "
            "in the annotations, or train on this data set (cascade-rcnn train finetune --data ...)"
        )
    if not quiet and len(known) > len(split.class_names):
        print(
            f"the checkpoint knows {len(known)} classes ({ours}), the data have {len(split.class_names)} "
            f"of them ({theirs}): the others are left out",
            file=sys.stderr,
        )
    return [split.class_names.index(name) if name in split.class_names else -1 for name in known]
