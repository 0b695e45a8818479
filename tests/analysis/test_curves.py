"""Thresholds, confusion and calibration on cases that can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from cascade_rcnn.analysis.calibration import corrections, fit_isotonic, fit_temperature, reliability
from cascade_rcnn.analysis.confusion import confusion_matrix
from cascade_rcnn.analysis.curves import at_precision, at_recall, best_f1, class_curves, curve
from cascade_rcnn.analysis.matches import match
from cascade_rcnn.analysis.scenes import read_found, read_truth
from random_results import random_results


def test_curve_by_hand() -> None:
    scores = np.array([0.9, 0.8, 0.8, 0.3, 0.2])
    one = curve(scores, np.array([True, True, False, False, True]), objects=4)
    assert one.thresholds.tolist() == [0.9, 0.8, 0.3, 0.2]  # equal scores are one point
    assert one.precision.tolist() == [1.0, 2 / 3, 0.5, 0.6]
    assert one.recall.tolist() == [0.25, 0.5, 0.5, 0.75]
    best = best_f1(one)
    assert best is not None and best.threshold == 0.2 and best.f1 == pytest.approx(2 / 3)
    strict, complete = at_precision(one, 0.65), at_recall(one, 0.5)
    assert strict is not None and (strict.threshold, strict.recall) == (0.8, 0.5)
    assert complete is not None and complete.threshold == 0.8
    assert at_recall(one, 0.8) is None
    assert best_f1(curve(scores, scores > 1, objects=0)) is None


def test_the_threshold_keeps_what_it_promises() -> None:
    content, results = random_results(4, images=60)
    truth = read_truth(content)
    found = read_found(results, truth)
    for label, one in enumerate(class_curves(truth, found, match(truth, found))):
        best = best_f1(one)
        assert best is not None
        kept = found.chosen((found.scores >= best.threshold) & (found.label == label))
        correct = match(truth, kept).correct[0].sum()
        assert best.recall == pytest.approx(correct / one.objects)


def test_confusion_counts_every_object_and_detection_once() -> None:
    content, results = random_results(6)
    truth = read_truth(content)
    found = read_found(results, truth)
    matrix, kept, objects = confusion_matrix(truth, found, 0.3)
    assert matrix[:-1].sum(axis=1).tolist() == np.bincount(truth.label[~truth.crowd], minlength=3).tolist()
    assert matrix[:, :-1].sum() == (objects != -2).sum()
    assert np.diag(matrix)[:-1].sum() == match(truth, kept).correct[0].sum()
    assert matrix[:-1, :-1].sum() > np.trace(matrix)  # some are taken for another class


def test_reliability_by_hand() -> None:
    one = reliability(np.array([0.95, 0.95, 0.15, 1.0]), np.array([True, False, False, True]))
    assert one.counts.tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0, 3]
    assert one.error == pytest.approx((0.15 + 3 * abs(2.9 / 3 - 2 / 3)) / 4)
    assert reliability(np.zeros(0), np.zeros(0, np.bool_)).error is None


def test_corrections_find_a_known_distortion() -> None:
    rng = np.random.default_rng(0)
    odds = rng.normal(0, 1.5, 20000)
    correct = rng.random(20000) < 1 / (1 + np.exp(-odds))
    scores = 1 / (1 + np.exp(-3 * odds))  # three times too sure
    assert fit_temperature(scores, correct).temperature == pytest.approx(3, rel=0.08)
    steps = fit_isotonic(scores, correct)(np.linspace(0, 1, 50))
    assert (np.diff(steps) >= 0).all()
    one = corrections(np.arange(20000), scores, correct)
    assert one is not None and one.before is not None and one.isotonic is not None and one.temperature is not None
    assert one.before > 0.1 and one.isotonic < 0.02 and one.temperature < 0.02


def test_no_correction_from_too_little() -> None:
    assert corrections(np.arange(10), np.linspace(0, 1, 10), np.arange(10) > 5) is None
