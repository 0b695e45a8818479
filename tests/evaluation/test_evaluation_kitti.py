"""KITTI AP against the C++ evaluation's numbers and against plain loops."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import locations
from cascade_rcnn.errors import DataError
from cascade_rcnn.evaluation.kitti import Boxes, _match, _Pairs, evaluate_kitti, precision_curves, read_kitti_files

CASES = locations.FIXTURES / "metrics" / "kitti"
NAMES = (
    "edge_all_ignored",
    "edge_class_absent",
    "edge_class_never_detected",
    "edge_few_objects",
    "edge_height_on_boundary",
    "edge_no_detections",
    "edge_perfect",
    "main",
)
LEVELS = ("easy", "moderate", "hard")


def _unpack(case: str, folder: Path) -> dict[str, Any]:
    with tarfile.open(CASES / case / "data.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    expected: dict[str, Any] = json.loads((CASES / case / "expected.json").read_text())
    return expected


@pytest.mark.parametrize("case", NAMES)
def test_equals_the_official_program(case: str, tmp_path: Path) -> None:
    expected = _unpack(case, tmp_path)["AP"]
    metrics = evaluate_kitti(tmp_path / "label_2", tmp_path / "results" / "data")
    labels, detections, left_out = read_kitti_files(tmp_path / "label_2", tmp_path / "results" / "data")
    assert not left_out
    for name, numbers in expected.items():
        curves = precision_curves(labels, detections, name)
        assert (curves is None) == (numbers["R40"] is None)
        for level in LEVELS:
            for points in ("R11", "R40"):  # percent there, fractions here
                wanted = None if curves is None else pytest.approx(numbers[points][level] / 100, abs=1e-8)
                assert metrics[f"kitti/{name}/{level}/{points}"] == wanted, (name, level, points)
            if curves is not None:
                assert curves[level].tolist() == pytest.approx(
                    numbers["precision_at_41_recall_positions"][level], abs=1e-9
                )
    assert len(metrics) == 3 * 3 * 2


def test_perfect_detections_lose_to_rounding_as_officially(tmp_path: Path) -> None:
    expected = _unpack("main", tmp_path)["perfect_detections_made_from_main_label_2"]["AP"]
    results = tmp_path / "perfect" / "data"
    results.mkdir(parents=True)
    k = 0
    for path in sorted((tmp_path / "label_2").glob("*.txt")):
        lines = []
        for line in path.read_text().splitlines():
            if line.split()[0] in ("Car", "Pedestrian", "Cyclist"):
                k += 1
                lines.append(f"{line} {1 - k * 1e-4!r}\n")
        (results / path.name).write_text("".join(lines))
    metrics = evaluate_kitti(tmp_path, tmp_path / "perfect")  # the folders above are found too
    for name, numbers in expected.items():
        for points in ("R11", "R40"):
            for level in LEVELS:
                wanted = pytest.approx(numbers[points][level] / 100, abs=1e-8)
                assert metrics[f"kitti/{name}/{level}/{points}"] == wanted, (name, points, level)


def test_the_example_of_greedy_matching() -> None:
    """A (0) wants a (0), then b (1); B (1) wants a. A never leaves a to B, so that b is a false positive."""
    pairs = _Pairs(np.array([0, 0, 1]), np.array([0, 1, 0]), np.array([0.8, 0.6, 0.9]))
    free = np.array([[0.9], [0.5]]) >= np.array([[0.7, 0.4]])
    hits = _match(pairs, free, np.array([True, True]), np.array([True, True]))
    assert hits.tolist() == [[True, True], [False, False]]
    assert free.tolist() == [[False, False], [False, True]]
    free = np.ones((2, 1), np.bool_)
    hits = _match(pairs, free, np.array([False, True]), np.array([True, True]))
    assert not hits.any() and free.tolist() == [[False], [True]]  # A counts nowhere, and still takes a


def test_undefined_and_left_out_come_with_reasons(tmp_path: Path) -> None:
    _unpack("edge_class_never_detected", tmp_path)
    gone = sorted((tmp_path / "results" / "data").glob("*.txt"))[3]
    gone.unlink()
    notes: list[str] = []
    metrics = evaluate_kitti(tmp_path / "label_2", tmp_path / "results" / "data", notes=notes)
    assert metrics["kitti/Cyclist/easy/R40"] is None and metrics["kitti/Car/hard/R40"] is not None
    text = "\n".join(notes)
    assert "kitti/Cyclist is undefined" in text and gone.name in text and "empty file" in text


def _overlap(a: Any, b: Any, *, own: bool = False) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    first = (a[2] - a[0]) * (a[3] - a[1])
    return float(w * h / (first if own else first + (b[2] - b[0]) * (b[3] - b[1]) - w * h))


def _pass(frame: dict[str, Any], least: float, threshold: float | None) -> tuple[list[float], int]:
    """One frame by the definition: scores of true positives, number of false ones."""
    assigned = [False] * len(frame["boxes"])
    true: list[float] = []
    for box, ignored in frame["objects"]:
        best, chosen, chosen_ignored = -1e9, -1, False
        for j, (found, score, flag) in enumerate(frame["boxes"]):
            if flag == -1 or assigned[j] or (threshold is not None and score < threshold):
                continue
            overlap = _overlap(found, box)
            if overlap <= least:
                continue
            if threshold is None:
                if score > best:
                    best, chosen = score, j
            elif flag == 0 and (chosen < 0 or chosen_ignored or overlap > best):
                best, chosen, chosen_ignored = overlap, j, False
            elif flag == 1 and chosen < 0:
                chosen, chosen_ignored = j, True
        if chosen >= 0:
            assigned[chosen] = True
            if not ignored and frame["boxes"][chosen][2] == 0:
                true.append(frame["boxes"][chosen][1])
    false = 0
    for j, (found, score, flag) in enumerate(frame["boxes"]):
        alive = flag == 0 and not assigned[j] and (threshold is None or score >= threshold)
        if alive and not any(_overlap(found, region, own=True) > least for region in frame["dontcare"]):
            false += 1
    return true, false


def _naive_curve(frames: list[dict[str, Any]], least: float) -> list[float]:
    valid = sum(not ignored for frame in frames for _, ignored in frame["objects"])
    scores = sorted((score for frame in frames for score in _pass(frame, least, None)[0]), reverse=True)
    thresholds, recall = [], 0.0
    for i, score in enumerate(scores):
        left, last = (i + 1) / valid, i == len(scores) - 1
        right = left if last else (i + 2) / valid
        if right - recall < recall - left and not last:
            continue
        thresholds.append(score)
        recall += 1 / 40
    curve = [0.0] * 41
    for k, threshold in enumerate(thresholds):
        counts = [_pass(frame, least, threshold) for frame in frames]
        true, false = sum(len(t) for t, _ in counts), sum(f for _, f in counts)
        curve[k] = true / (true + false) if true + false else 0.0
    return [max(curve[k:]) for k in range(41)]


@pytest.mark.parametrize("seed", range(6))
def test_equals_plain_loops_in_crowds_with_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)

    def boxes(n: int) -> Any:
        corner = rng.integers(0, 60, (n, 2))
        return np.c_[corner, corner + rng.integers(30, 60, (n, 2))].astype(np.float64)

    def pick(names: list[str], n: int) -> Any:
        return np.array(names)[rng.integers(0, len(names), n)]

    truth = boxes(60)
    labels = Boxes(
        np.sort(rng.integers(0, 6, 60)),
        pick(["pedestrian"] * 2 + ["person_sitting", "dontcare"], 60),
        truth,
        np.c_[rng.choice([0, 0.2, 0.4], 60), rng.integers(0, 3, 60), np.zeros(60), truth, np.zeros((60, 7))],
    )
    found = boxes(250)
    scores = rng.integers(1, 30, 250) / 30
    detections = Boxes(
        np.sort(rng.integers(0, 6, 250)),
        pick(["pedestrian", "pedestrian", "car"], 250),
        found,
        np.c_[np.zeros((250, 3)), found, np.zeros((250, 7)), scores],
    )
    curves = precision_curves(labels, detections, "Pedestrian")
    assert curves is not None
    limits = {"easy": (40, 0, 0.15), "moderate": (25, 1, 0.3), "hard": (25, 2, 0.5)}
    for level, (height, occlusion, truncation) in limits.items():
        frames = []
        for frame in range(6):
            g, d = np.flatnonzero(labels.frames == frame), np.flatnonzero(detections.frames == frame)
            objects = []
            for i in g[np.isin(labels.types[g], ["pedestrian", "person_sitting"])]:
                row = labels.numbers[i]
                beyond = row[1] > occlusion or row[0] > truncation or truth[i, 3] - truth[i, 1] <= height
                objects.append((truth[i], bool(beyond) or labels.types[i] != "pedestrian"))
            flags = [
                1 if int(found[j, 3] - found[j, 1]) < height else 0 if detections.types[j] == "pedestrian" else -1
                for j in d
            ]
            frames.append(
                {
                    "objects": objects,
                    "boxes": [(found[j], scores[j], flag) for j, flag in zip(d, flags)],
                    "dontcare": truth[g[labels.types[g] == "dontcare"]],
                }
            )
        assert curves[level].tolist() == pytest.approx(_naive_curve(frames, 0.5), abs=1e-12), level


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Car -1 -1 -10 1 2 30 40 -1 -1 -1 -1000 -1000 -1000 -10", "line 1 has 15 columns, not the 16"),
        ("Car -1 -1 -10 1 2 inf 40 -1 -1 -1 -1000 -1000 -1000 -10 0.5", "'inf' is not a finite number"),
        ("Bicycle -1 -1 -10 1 2 30 40 -1 -1 -1 -1000 -1000 -1000 -10 0.5", "unknown type 'Bicycle'"),
    ],
)
def test_bad_lines_are_named(line: str, message: str, tmp_path: Path) -> None:
    _unpack("edge_few_objects", tmp_path)
    path = sorted((tmp_path / "results" / "data").glob("*.txt"))[0]
    path.write_text(line + "\n")
    with pytest.raises(DataError) as caught:
        evaluate_kitti(tmp_path / "label_2", tmp_path / "results" / "data")
    assert message in str(caught.value) and path.name in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_frames_and_empty_folders_are_named(tmp_path: Path) -> None:
    _unpack("edge_few_objects", tmp_path)
    (tmp_path / "results" / "data" / "999999.txt").write_text("")
    with pytest.raises(DataError, match=r"999999\.txt: there is no"):
        evaluate_kitti(tmp_path / "label_2", tmp_path / "results" / "data")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no \.txt file"):
        evaluate_kitti(tmp_path / "label_2", tmp_path / "empty")
    with pytest.raises(DataError, match="does not exist"):
        evaluate_kitti(tmp_path / "labels", tmp_path / "empty")
