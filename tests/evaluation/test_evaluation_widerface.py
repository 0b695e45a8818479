"""WIDER FACE AP against the numbers of the official tools and against plain loops."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import locations
from cascade_rcnn.errors import DataError
from cascade_rcnn.evaluation.widerface import SETTINGS, evaluate_widerface, read_submission, read_truth

CASES = locations.FIXTURES / "metrics" / "widerface"
NAMES = (
    "edge_all_ignored",
    "edge_negative_scores",
    "edge_no_detections",
    "edge_perfect",
    "edge_perfect_equal_scores",
    "edge_scores_not_in_01",
    "edge_unsorted_predictions",
    "main",
)


def _unpack(archive: Path, folder: Path) -> dict[str, Any]:
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    expected: dict[str, Any] = json.loads((archive.parent / "expected.json").read_text())
    return expected


@pytest.mark.parametrize("case", NAMES)
def test_equals_the_official_tools(case: str, tmp_path: Path) -> None:
    expected = _unpack(CASES / case / "data.tar.gz", tmp_path)
    # The port needs sorted files; on unsorted ones MATLAB's tool, which sorts, has the right number
    primary = "AP_matlab_tool" if case == "edge_unsorted_predictions" else "AP_python_port"
    metrics = evaluate_widerface(tmp_path / "ground_truth", tmp_path / "pred")
    assert set(metrics) == {f"widerface/{setting}" for setting in SETTINGS}
    for setting, value in expected[primary].items():
        assert metrics[f"widerface/{setting}"] == (None if value == "NaN" else pytest.approx(value, abs=1e-9))
    for setting, value in expected["AP_matlab_tool"].items():  # single precision there
        assert metrics[f"widerface/{setting}"] == (None if value == "NaN" else pytest.approx(value, abs=2e-5))
    faces = read_truth(tmp_path / "ground_truth")
    assert {setting: int(faces.evaluated[setting].sum()) for setting in SETTINGS} == expected["n_faces"]


def test_a_missing_file_counts_as_no_detection_and_is_said(tmp_path: Path) -> None:
    _unpack(CASES / "edge_perfect" / "data.tar.gz", tmp_path)
    gone = sorted((tmp_path / "pred").glob("*/*.txt"))[0]
    text = gone.read_text()
    gone.write_text(f"{gone.stem}\n0\n")
    empty = evaluate_widerface(tmp_path / "ground_truth", tmp_path / "pred")
    gone.unlink()
    notes: list[str] = []
    missing = evaluate_widerface(tmp_path / "ground_truth", tmp_path / "pred", notes=notes)
    assert missing == empty and text.count("\n") > 2
    hard = missing["widerface/hard"]
    assert hard is not None and hard < 1
    assert gone.name in notes[0] and "1 of" in notes[0]


def _naive(folder: Path, setting: str) -> float:
    """AP with a loop over images, detections and thresholds."""
    faces = read_truth(folder / "ground_truth")
    rows, boxes, scores = read_submission(folder / "pred", faces.images, [])
    low, high = min(1.0, scores.min()), max(0.0, scores.max())
    scores = (scores - low) / (high - low)
    counts = faces.evaluated[setting]
    proposals, hits = np.zeros(1000), np.zeros(1000)
    for image in range(len(faces.images)):
        g = np.flatnonzero(faces.rows == image)
        mine = sorted(np.flatnonzero(rows == image), key=lambda d: -scores[d])
        if len(g) == 0 or not mine:
            continue
        found: set[int] = set()
        history = []  # (score, proposals so far, found so far)
        number = 0
        for d in mine:
            overlaps = []
            for j in g:
                a, b = boxes[d], faces.boxes[j]
                w = max(min(a[2], b[2]) - max(a[0], b[0]) + 1, 0)
                h = max(min(a[3], b[3]) - max(a[1], b[1]) + 1, 0)
                union = (a[2] - a[0] + 1) * (a[3] - a[1] + 1) + (b[2] - b[0] + 1) * (b[3] - b[1] + 1) - w * h
                overlaps.append(w * h / union)
            best = int(np.argmax(overlaps))
            matched = overlaps[best] >= 0.5
            number += not (matched and not counts[g[best]])
            if matched and counts[g[best]]:
                found.add(best)
            history.append((scores[d], number, len(found)))
        for t in range(1000):
            passing = [entry for entry in history if entry[0] >= 1 - (t + 1) / 1000]
            if passing:
                proposals[t] += passing[-1][1]
                hits[t] += passing[-1][2]
    recall, area, before = hits / counts.sum(), 0.0, 0.0
    precision = np.divide(hits, proposals, out=np.zeros(1000), where=proposals > 0)
    for t in range(1000):
        area += (recall[t] - before) * precision[t:].max()
        before = recall[t]
    return float(area)


@pytest.mark.parametrize("setting", SETTINGS)
def test_equals_plain_loops(setting: str, tmp_path: Path) -> None:
    _unpack(CASES / "edge_scores_not_in_01" / "data.tar.gz", tmp_path)
    metrics = evaluate_widerface(tmp_path / "ground_truth", tmp_path / "pred")
    assert metrics[f"widerface/{setting}"] == pytest.approx(_naive(tmp_path, setting), abs=1e-12)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name\n2\n1 2 3 4 0.5\n", "line 2 says '2' detections and 1 lines follow"),
        ("name\n1\n1 2 3 4\n", "line 3 has 4 columns"),
        ("name\n1\n1 2 3 4 nan\n", "line 3: 'nan'"),
        ("", "line 2 says ''"),
    ],
)
def test_bad_files_are_named(content: str, message: str, tmp_path: Path) -> None:
    _unpack(CASES / "edge_perfect" / "data.tar.gz", tmp_path)
    path = sorted((tmp_path / "pred").glob("*/*.txt"))[0]
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        evaluate_widerface(tmp_path / "ground_truth", tmp_path / "pred")
    assert message in str(caught.value) and path.name in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_images_events_and_broken_truth_are_named(tmp_path: Path) -> None:
    _unpack(CASES / "edge_perfect" / "data.tar.gz", tmp_path)
    event = sorted((tmp_path / "pred").iterdir())[0]
    (event / "other.txt").write_text("other\n0\n")
    with pytest.raises(DataError, match=r"other\.txt: this image is not in the ground truth"):
        evaluate_widerface(tmp_path / "ground_truth", tmp_path / "pred")
    (event / "other.txt").rename(tmp_path / "ground_truth" / "other.txt")
    with pytest.raises(DataError, match="this event is not"):
        evaluate_widerface(tmp_path / "ground_truth", tmp_path)
    (tmp_path / "ground_truth" / "wider_easy_val.mat").write_bytes(b"broken" * 50)
    with pytest.raises(DataError, match="wider_easy_val"):
        evaluate_widerface(tmp_path / "ground_truth", tmp_path / "pred")
    (tmp_path / "ground_truth" / "wider_easy_val.mat").unlink()
    with pytest.raises(DataError, match="not found"):
        evaluate_widerface(tmp_path / "ground_truth", tmp_path / "pred")
