"""Scores results that lie in a benchmark's own submission format; needs neither a model nor images.

cascade-rcnn score --format coco --truth instances_val2017.json --results results.json --out metrics.json
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cascade_rcnn.atomic_files import write_json
from cascade_rcnn.errors import DataError
from cascade_rcnn.evaluation.metrics import Metrics, print_metrics


def run_score(
    *, format: str, truth: Path, results: Path, split: str = "test", iou: float = 0.5, out: Path | None = None
) -> Metrics:
    """Scores ``results`` against ``truth`` as the benchmark ``format`` does, prints a table, writes ``metrics.json``.

    ``truth`` and ``results`` are in the benchmark's own layouts (docs/metrics.md). ``split`` and ``iou`` matter for VOC
    only. ``out`` is the JSON file to write, or a folder. Returns flat metrics with values in 0..1, None where the
    official code leaves them undefined (the reasons are printed). Raises ``DataError`` for input that cannot be scored.
    """
    notes: list[str] = []
    metrics = score(format=format, truth=truth, results=results, split=split, iou=iou, notes=notes)
    overlap = f", overlap {iou:g}" if format == "voc" else ""
    print_metrics(metrics, notes=notes, title=f"{results} against {truth}{overlap}")
    if out is not None:
        path = out / "metrics.json" if out.is_dir() else out
        write_json(path, metrics)
        print(f"Written to {path} (values in 0..1)")
    return metrics


def score(
    *, format: str, truth: Path, results: Path, split: str = "test", iou: float = 0.5, notes: list[str] | None = None
) -> Metrics:
    """``run_score`` without printing or writing; reasons for None are appended to ``notes``."""
    if not 0 < iou <= 1:
        raise DataError(f"iou {iou}: above 0 and at most 1")
    if format in ("coco", "citypersons") and (results / "results.json").is_file():
        results = results / "results.json"  # the folder that --submission wrote
    if format not in FORMATS:
        raise DataError(f"format {format!r}: choose one of {', '.join(FORMATS)}")
    return _EVALUATIONS[format](truth, results, split, iou, notes)


# Each is imported when it is wanted: the command line asks for the names alone.


def _coco(truth: Path, results: Path, split: str, iou: float, notes: list[str] | None) -> Metrics:
    from cascade_rcnn.evaluation.coco import evaluate_coco_files

    return evaluate_coco_files(truth, results, notes=notes)


def _voc(truth: Path, results: Path, split: str, iou: float, notes: list[str] | None) -> Metrics:
    from cascade_rcnn.evaluation.voc import evaluate_voc

    return evaluate_voc(truth, results, split=split, iou=iou, notes=notes)


def _kitti(truth: Path, results: Path, split: str, iou: float, notes: list[str] | None) -> Metrics:
    from cascade_rcnn.evaluation.kitti import evaluate_kitti

    return evaluate_kitti(truth, results, notes=notes)


def _citypersons(truth: Path, results: Path, split: str, iou: float, notes: list[str] | None) -> Metrics:
    from cascade_rcnn.evaluation.citypersons import evaluate_citypersons

    return evaluate_citypersons(truth, results, notes=notes)


def _widerface(truth: Path, results: Path, split: str, iou: float, notes: list[str] | None) -> Metrics:
    from cascade_rcnn.evaluation.widerface import evaluate_widerface

    return evaluate_widerface(truth, results, notes=notes)


_EVALUATIONS: dict[str, Callable[[Path, Path, str, float, list[str] | None], Metrics]] = {
    "coco": _coco,
    "voc": _voc,
    "kitti": _kitti,
    "citypersons": _citypersons,
    "widerface": _widerface,
}
FORMATS = tuple(_EVALUATIONS)
