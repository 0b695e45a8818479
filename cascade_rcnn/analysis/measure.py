"""All numbers of a report: what ``report.json`` holds, from the detections of each stage.

Values of AP, precision, recall and score are 0..1; TIDE's are points of AP (0..100).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cascade_rcnn.analysis.calibration import Reliability, corrections, reliability
from cascade_rcnn.analysis.confusion import confusion_matrix
from cascade_rcnn.analysis.curves import Operating, at_precision, at_recall, best_f1, class_curves
from cascade_rcnn.analysis.matches import (
    IOU_THRESHOLDS,
    Matches,
    average_precisions,
    bootstrap,
    interval,
    match,
    mean_ap,
)
from cascade_rcnn.analysis.scenes import Floats, Found, Truth
from cascade_rcnn.analysis.slices import slice_aps
from cascade_rcnn.analysis.tide import tide

Report = dict[str, Any]


@dataclass(frozen=True)
class Wanted:
    """What the reader asked for."""

    precision: float = 0.9  # of the second threshold
    recall: float = 0.9  # of the third
    thresholds_by: str = "f1"  # which of them --set-thresholds writes: "f1", "precision" or "recall"
    resamples: int = 200  # of the images, for intervals
    limit: int = 100  # detections of an image that TIDE looks at


def measure(truth: Truth, outputs: Mapping[str, Found], wanted: Wanted) -> Report:
    """The numbers of one detector; the last of ``outputs`` is what it says in the end, those before its stages."""
    matches = {name: match(truth, found) for name, found in outputs.items()}
    final = list(outputs)[-1]
    found, last = outputs[final], matches[final]
    values = average_precisions(truth, found, last)
    samples = bootstrap(truth, found, last, resamples=wanted.resamples)
    report: Report = {
        "images": len(truth.image_ids),
        "objects": int((~truth.crowd).sum()),
        "final": final,
        "iou_thresholds": [round(float(iou), 2) for iou in IOU_THRESHOLDS],
        "outputs": {name: _output(truth, one, matches[name], wanted.limit) for name, one in outputs.items()},
        "interval": interval(_means(samples), mean_ap(values) or 0.0),
        "classes": _classes(truth, found, last, (values, samples), wanted),
        "slices": slice_aps(truth, found),
    }
    report["confusion"] = _confusion(report, truth, found)
    return report


def measure_curves(truth: Truth, found: Found) -> Report:
    """The curves, thresholds and confusions of a report, without its intervals: quick enough for a training."""
    matches = match(truth, found)
    values = average_precisions(truth, found, matches)
    unknown = np.zeros((0, values.shape[0]))
    report: Report = {
        "images": len(truth.image_ids),
        "objects": int((~truth.crowd).sum()),
        "classes": _classes(truth, found, matches, (values, unknown), Wanted()),
    }
    report["confusion"] = _confusion(report, truth, found)
    return report


def _confusion(report: Report, truth: Truth, found: Found) -> Report:
    limits = thresholds(report, truth, "f1")
    matrix, _, _ = confusion_matrix(truth, found, limits)
    return {
        "labels": [*truth.class_names, "background"],
        "thresholds": limits.tolist(),
        "matrix": matrix.tolist(),
    }


def _means(samples: Floats) -> Floats:
    """Mean over the classes drawn [R] of AP [R, K]."""
    known = np.isfinite(samples)
    means: Floats = np.where(known, samples, 0.0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    return means


def _output(truth: Truth, found: Found, matches: Matches, limit: int) -> Report:
    values = average_precisions(truth, found, matches)
    errors = tide(truth, found, limit=limit)
    return {
        "detections": len(found),
        "AP": mean_ap(values),
        "AP_by_iou": [mean_ap(values[:, t : t + 1]) for t in range(values.shape[1])],
        "tide": {
            "AP50": errors.ap,
            "lost": errors.lost,
            "false_positives": errors.false_positives,
            "false_negatives": errors.false_negatives,
            "counts": errors.counts,
        },
        "calibration": _calibration(truth, found, matches),
    }


def _calibration(truth: Truth, found: Found, matches: Matches) -> Report:
    """At IoU 0.5; ignored detections left out."""
    rows = ~matches.ignored[0]
    image, label, scores, correct = (
        found.image[rows], found.label[rows], found.scores[rows], matches.correct[0][rows]
    )  # fmt: skip
    fitted = corrections(image, scores, correct)
    per_class = {}
    for number, name in enumerate(truth.class_names):
        own = label == number
        one = corrections(image[own], scores[own], correct[own])
        per_class[name] = {
            "D-ECE": reliability(scores[own], correct[own]).error,
            "detections": int(own.sum()),
            "correction": None if one is None else dataclasses.asdict(one),
        }
    return {
        **_bins(reliability(scores, correct)),
        "correction": None if fitted is None else dataclasses.asdict(fitted),
        "classes": per_class,
    }


def _bins(one: Reliability) -> Report:
    filled = one.counts > 0
    return {
        "D-ECE": one.error,
        "mean_scores": one.scores[filled].tolist(),
        "precision": one.precision[filled].tolist(),
        "counts": one.counts[filled].tolist(),
    }


def _classes(truth: Truth, found: Found, matches: Matches, aps: tuple[Floats, Floats], wanted: Wanted) -> Report:
    values, samples = aps
    result = {}
    for label, (name, curve) in enumerate(zip(truth.class_names, class_curves(truth, found, matches))):
        thin = curve.thinned()
        result[name] = {
            "objects": curve.objects,
            "detections": int((found.label == label).sum()),
            "AP": None if np.isnan(values[label, 0]) else float(values[label].mean()),
            "AP50": None if np.isnan(values[label, 0]) else float(values[label, 0]),
            "interval": interval(samples[:, label], float(values[label].mean())) if curve.objects else None,
            "best_f1": _point(best_f1(curve)),
            "at_precision": _point(at_precision(curve, wanted.precision)),
            "at_recall": _point(at_recall(curve, wanted.recall)),
            "curve": {
                "thresholds": thin.thresholds.tolist(),
                "precision": thin.precision.tolist(),
                "recall": thin.recall.tolist(),
                "f1": thin.f1.tolist(),
            },
        }
    return result


def _point(one: Operating | None) -> Report | None:
    return None if one is None else dataclasses.asdict(one)


def thresholds(report: Report, truth: Truth, by: str) -> Floats:
    """The score threshold [K] of each class; where the wanted is never reached, that of the best F1, else 0.5."""
    key = {"f1": "best_f1", "precision": "at_precision", "recall": "at_recall"}[by]
    rows = [report["classes"][name] for name in truth.class_names]
    return np.array([(row[key] or row["best_f1"] or {"threshold": 0.5})["threshold"] for row in rows])


def compare(truth: Truth, first: Found, second: Found, *, resamples: int = 200) -> Report:
    """AP of two detectors on the same images, and the second less the first, with intervals over the same resamples."""
    matches = [match(truth, found) for found in (first, second)]
    values = [average_precisions(truth, found, one).mean(axis=1) for found, one in zip((first, second), matches)]
    samples = [
        bootstrap(truth, found, one, resamples=resamples) for found, one in zip((first, second), matches)
    ]  # the same images for both
    rows: Report = {}
    for label, name in enumerate(truth.class_names):
        if np.isfinite(values[0][label]):
            pair = (values[0][label], values[1][label])
            rows[name] = _difference(*pair, samples[0][:, label], samples[1][:, label])
    means = [float(np.nanmean(one)) for one in values]
    return {"all": _difference(means[0], means[1], _means(samples[0]), _means(samples[1])), "classes": rows}


def _difference(a: float, b: float, first: Floats, second: Floats) -> Report:
    return {
        "AP": [float(a), float(b)],
        "intervals": [interval(first, a), interval(second, b)],
        "difference": float(b - a),
        "interval": interval(second - first, b - a),
    }
