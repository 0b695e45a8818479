"""How good a model is on a split: COCO metrics for boxes and masks, and the data set's own official metric.

cascade-rcnn evaluate runs/demo --data runs/demo/data --out metrics.json
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from cascade_rcnn import distributed
from cascade_rcnn.atomic_files import write_json
from cascade_rcnn.config import Config, Orientation
from cascade_rcnn.data.formats.open import open_split
from cascade_rcnn.data.orientation import refuse_undecided
from cascade_rcnn.data.records import DataSplit
from cascade_rcnn.data.split_levels import with_range
from cascade_rcnn.evaluation.evaluate_model import detect_split, evaluate_results, match_classes
from cascade_rcnn.evaluation.metrics import Metrics, print_metrics
from cascade_rcnn.inference.run_model import AS_SAVED, Inference
from cascade_rcnn.messages import printable
from cascade_rcnn.score import score
from cascade_rcnn.zoo.store import published_for


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

    with distributed.start(None if device == "auto" else device) as world:
        detector = load(
            checkpoint,
            device=world.device,
            precision=inference.precision,
            compile=inference.compile,
            stop_after_stage=inference.stages,
            score_threshold=inference.score_threshold,
            max_detections=inference.max_detections,
            range=inference.range,
        )
        if world.is_main:
            print(detector.choices())
        chosen, detector.config = _open(data, split, detector.config, orientation, quiet=not world.is_main)
        class_map = match_classes(detector.class_names, chosen, checkpoint, quiet=not world.is_main)
        results = detect_split(
            detector.model,
            detector.config,
            chosen,
            class_map=class_map,
            batch_size=inference.batch_size,
            precision=inference.precision,
        )
        if not world.is_main:
            return distributed.broadcast({})
        notes: list[str] = []
        labelled = any(len(record.boxes) for record in chosen.records)
        metrics = evaluate_results(results, detector.config, chosen, notes=notes) if labelled else {}
        metrics |= _official(chosen, results, submission, notes)
        if metrics:
            title = f"{printable(checkpoint)} on {chosen.name} of {printable(chosen.root)}"
            print_metrics(metrics, notes=notes, title=title)
            _print_published(Path(checkpoint), metrics)
            _write(metrics, out)
        return distributed.broadcast(metrics)


def _write(metrics: Metrics, out: Path | None) -> None:
    if out is None:
        return
    path = out / "metrics.json" if out.is_dir() or not out.suffix else out
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, metrics)
    print(f"metrics: {printable(path)}")


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


def _open(
    root: str | Path, split: str, config: Config, orientation: Orientation | None, *, quiet: bool
) -> tuple[DataSplit, Config]:
    """The split, and the configuration with what is known of its pictures' orientation and range."""
    data = replace(config.data, orientation=orientation or config.data.orientation)
    chosen = open_split(root, split or data.val, orientation=data.orientation)
    refuse_undecided(chosen, data.orientation)
    data, line = with_range(data, chosen)
    if line and not quiet:
        print(line)
    return chosen, replace(config, data=data)


def _official(split: DataSplit, results: list[dict[str, Any]], submission: Path | None, notes: list[str]) -> Metrics:
    """The benchmark's own metric, from the very files that one would submit; nothing for formats without one."""
    own_metric = split.format in ("voc", "kitti", "citypersons", "widerface")
    if submission is None and not (own_metric and split.truth is not None):
        return {}
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
