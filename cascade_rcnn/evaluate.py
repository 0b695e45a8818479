"""How good a model is on a split: COCO metrics for boxes and masks, and the data set's own official metric.

cascade-rcnn evaluate runs/demo --data runs/demo/data --out metrics.json
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade_rcnn import distributed
from cascade_rcnn.atomic_files import write_json
from cascade_rcnn.config import Config, DataConfig, Orientation
from cascade_rcnn.data.formats.open import open_split
from cascade_rcnn.data.orientation import refuse_undecided
from cascade_rcnn.data.records import DataSplit
from cascade_rcnn.data.split_levels import with_range
from cascade_rcnn.errors import DataError
from cascade_rcnn.evaluation.evaluate_model import detect_split, evaluate_results, match_classes
from cascade_rcnn.evaluation.evaluate_tiles import detect_in_tiles, merged_limits
from cascade_rcnn.evaluation.metrics import Metrics, print_metrics
from cascade_rcnn.inference.run_model import AS_SAVED, Inference
from cascade_rcnn.messages import printable
from cascade_rcnn.score import FORMATS, score
from cascade_rcnn.zoo.store import published_for

if TYPE_CHECKING:
    from cascade_rcnn.inference.detector import Detector


def run_evaluate(
    checkpoint: str | Path,
    *,
    data: str | Path,
    split: str = "",
    orientation: Orientation | None = None,
    out: Path | None = None,
    submission: Path | None = None,
    device: str = "auto",
    inference: Inference = AS_SAVED,
) -> Metrics:
    """The command ``evaluate``: prints the metrics of a checkpoint on a data set, and writes them.

    Args:
        data: folder of the data set; its format is recognised.
        split: name of the split; empty: the one that the checkpoint was validated on.
        orientation: ``data.orientation`` of this data set; None: as in the training.
        out: JSON file (or folder, for ``metrics.json`` in it) for the metrics.
        submission: folder for the results in the benchmark's own format; a split without annotations gives only that.

    Raises:
        CheckpointError, DataError: what cannot be read, or classes of the data that the checkpoint does not know.
    """
    from cascade_rcnn.inference.detector import load
    from cascade_rcnn.inference.exported import usual_device

    with distributed.start(usual_device(checkpoint, device)) as world:
        detector = load(checkpoint, device=world.device, **inference.of_load())
        if world.is_main:
            print(detector.choices())
        settings = detector.config.data
        settings = replace(settings, val=split or settings.val, orientation=orientation or settings.orientation)
        chosen = _open(data, settings, submission)
        settings, line = with_range(settings, chosen)
        if line and world.is_main:
            print(line)
        detector.config = replace(detector.config, data=settings)
        class_map = match_classes(detector.class_names, chosen, checkpoint, quiet=not world.is_main)
        results, seen = _detect(detector, chosen, class_map, inference)
        missing, chosen = len(chosen) - len(seen), seen
        if not world.is_main:
            return distributed.broadcast({})
        notes: list[str] = []
        config = detector.config
        chosen = _without_whole_truth(chosen, missing, notes)
        if inference.tiling is not None:
            config, chosen = merged_limits(results, config, chosen, notes)
        metrics = _measure(results, config, chosen, submission, notes)
        if metrics:
            title = f"{printable(checkpoint)} on {chosen.name} of {printable(chosen.root)}"
            print_metrics(metrics, notes=notes, title=title)
            _print_published(Path(checkpoint), metrics)
        if metrics and out is not None:
            _write_metrics(metrics, out)
        return distributed.broadcast(metrics)


def _detect(
    detector: Detector, split: DataSplit, class_map: list[int], inference: Inference
) -> tuple[list[dict[str, Any]], DataSplit]:
    """COCO results of all processes, on rank 0, and the split that was looked at."""
    if inference.tiling is not None:
        options: dict[str, Any] = {"class_map": class_map, "batch_size": inference.batch_size}
        return detect_in_tiles(detector, split, inference.tiling, **options)
    return detect_split(
        detector.model,
        detector.config,
        split,
        class_map=class_map,
        batch_size=inference.batch_size,
        precision=inference.precision,
    )


def _without_whole_truth(split: DataSplit, missing: int, notes: list[str]) -> DataSplit:
    """The split of which some images could not be read: official programs would count their objects as missed.

    KITTI's leaves frames without a results file out by itself. Raises ``DataError`` where no object is left.
    """
    if missing and not any(len(record.boxes) for record in split.records):
        raise DataError(
            f"{printable(split.root)}: the {len(split):,} images of {split.name!r} that can be read have no objects: "
            f"nothing to measure; replace the {missing:,} others"
        )
    if not missing or split.truth is None or split.format in ("coco", "kitti"):
        return split
    notes.append(
        f"the metric of {split.format} is left out: its program would count the objects of {missing:,} unreadable "
        "images as missed; replace them"
    )
    return replace(split, truth=None)


def _measure(
    results: list[dict[str, Any]], config: Config, split: DataSplit, submission: Path | None, notes: list[str]
) -> Metrics:
    """COCO metrics, where there are objects, and the benchmark's own."""
    metrics: Metrics = {}
    if any(len(record.boxes) for record in split.records):
        metrics = evaluate_results(results, config, split, notes=notes)
    return metrics | _official(split, results, submission, notes)


def _print_published(checkpoint: Path, metrics: Metrics) -> None:
    """Beside what was measured, what was published for these weights."""
    entry = published_for(checkpoint)
    if entry is None:
        return
    for kind, published in (("bbox", entry.box_ap), ("segm", entry.mask_ap)):
        measured = metrics.get(f"{kind}/AP")
        if published is not None and measured is not None:
            print(
                f"{kind} AP: {100 * measured:.1f} here, {published:.1f} published by {entry.library} ({entry.dataset})"
            )


def _write_metrics(metrics: Metrics, out: Path) -> None:
    path = out / "metrics.json" if out.is_dir() or not out.suffix else out
    write_json(path, metrics)
    print(f"metrics: {printable(path)}")


def _open(data: str | Path, settings: DataConfig, submission: Path | None) -> DataSplit:
    """The split; one without objects is refused where they are all that is asked for."""
    split = open_split(data, settings.val, orientation=settings.orientation)
    if submission is None and not any(len(record.boxes) for record in split.records):
        raise DataError(
            f"{printable(split.root)}: split {split.name!r} has no objects in its {len(split):,} images: nothing to "
            "measure; name another --split, or write the detections with --submission OUT"
        )
    refuse_undecided(split, settings.orientation)
    return split


def _official(split: DataSplit, results: list[dict[str, Any]], submission: Path | None, notes: list[str]) -> Metrics:
    """The benchmark's own metric, from the very files that one would submit; nothing for formats without one.

    Where nobody asked for those files, what keeps them from being written is a note, not an error.
    """
    own_metric = split.format in FORMATS and split.format != "coco"
    if submission is None and not (own_metric and split.truth is not None):
        return {}
    try:
        return _score_submission(split, results, submission, notes, own_metric=own_metric)
    except DataError as error:
        if submission is not None:
            raise
        notes.append(f"the metric of {split.format} is left out: {error}")
        return {}


def _score_submission(
    split: DataSplit, results: list[dict[str, Any]], submission: Path | None, notes: list[str], *, own_metric: bool
) -> Metrics:
    from cascade_rcnn.evaluation.submission import voc_list_name, write_submission

    with tempfile.TemporaryDirectory() as scratch:
        folder = submission or Path(scratch) / "submission"
        written = write_submission(split.format if own_metric else "coco", split, results, folder)
        if submission is not None:
            print(f"submission: {printable(written)}")
        if not own_metric or split.truth is None or not any(len(record.boxes) for record in split.records):
            return {}
        name = voc_list_name(split) if split.format == "voc" else split.name
        return score(format=split.format, truth=split.truth, results=written, split=name, notes=notes)
