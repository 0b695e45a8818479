"""CityPersons log-average miss rate against the official script's numbers and against plain loops."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import locations
from cascade_rcnn.errors import DataError
from cascade_rcnn.evaluation import citypersons, read_results
from cascade_rcnn.evaluation.citypersons import (
    SUBSETS,
    Subset,
    candidates_of,
    evaluate_citypersons,
    read_truth,
    recall_at_points,
)

CASES = locations.FIXTURES / "metrics" / "citypersons"
NAMES = (
    "edge_all_ignored",
    "edge_no_heavy",
    "edge_no_pedestrian_detections",
    "edge_perfect",
    "edge_range_limits",
    "edge_small_set",
    "edge_top_false_positive",
)
OURS = {"Reasonable": "Reasonable", "Reasonable_small": "Small", "Reasonable_occ=heavy": "Heavy", "All": "All"}


def _check_all(truth: Path, results: Path, expected: dict[str, Any]) -> None:
    metrics = evaluate_citypersons(truth, results)
    assert set(metrics) == {f"citypersons/MR/{name}" for name in OURS.values()}
    people = read_truth(truth)
    table = read_results.parse_results(
        read_results.read_json(results), name="results", images=people.image_ids, categories=people.categories
    )
    candidates = candidates_of(people, table)
    for theirs, name in OURS.items():
        numbers = expected["setups"][theirs]
        recall = recall_at_points(people, candidates, SUBSETS[name])
        assert (recall is None) == (numbers["n_gt"] == 0)
        if recall is None:
            assert metrics[f"citypersons/MR/{name}"] is None
            continue
        assert metrics[f"citypersons/MR/{name}"] == pytest.approx(numbers["MR"], abs=1e-9), name
        assert recall.tolist() == pytest.approx(numbers["recall_at_9_fppi"], abs=1e-9), name
    others = expected.get("other_published_setups_CSP_repo", {})
    subsets = {name: Subset(tuple(numbers["height"]), tuple(numbers["visibility"])) for name, numbers in others.items()}
    for key, value in evaluate_citypersons(truth, results, subsets=subsets).items():
        wanted = others[key.split("/")[-1]]["MR"]
        assert value == (None if wanted == -1 else pytest.approx(wanted, abs=1e-9)), key


@pytest.mark.parametrize("case", NAMES)
def test_equals_the_official_script(case: str) -> None:
    expected = json.loads((CASES / case / "expected.json").read_text())
    _check_all(CASES / case / "gt.json", CASES / case / "val_dt.json", expected)


def test_no_detection_misses_everybody() -> None:
    folder = CASES / "edge_no_detections"
    expected = json.loads((folder / "expected.json").read_text())["expected_by_definition"]
    metrics = evaluate_citypersons(folder / "gt.json", folder / "val_dt.json")
    for theirs, name in OURS.items():
        assert metrics[f"citypersons/MR/{name}"] == expected[theirs] == 1.0


def test_an_empty_subset_is_undefined_with_a_reason() -> None:
    notes: list[str] = []
    folder = CASES / "edge_no_heavy"
    metrics = evaluate_citypersons(folder / "gt.json", folder / "val_dt.json", notes=notes)
    assert metrics["citypersons/MR/Heavy"] is None and metrics["citypersons/MR/All"] is not None
    assert len(notes) == 1 and "citypersons/MR/Heavy" in notes[0]


def _naive(truth: dict[str, Any], results: list[dict[str, Any]], subset: Subset) -> float:
    (low, high), (least, most) = subset
    people: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in truth["images"]}
    total = 0
    for one in truth["annotations"]:
        counts = low <= one["height"] <= high and least <= one["vis_ratio"] <= most and not one["ignore"]
        people[one["image_id"]].append(one | {"counts": counts, "taken": False})
        total += counts
    events = []
    for image, objects in people.items():
        mine = [one for one in results if one["image_id"] == image and one["category_id"] == 1]
        mine = sorted(mine, key=lambda one: -one["score"])[:1000]
        for one in mine:
            x, y, w, h = one["bbox"]
            if not low / 1.25 <= h < high * 1.25:
                continue
            best, chosen, ignored = 0.5, None, False
            for other in objects:
                a, b, c, d = other["bbox"]
                both = max(min(x + w, a + c) - max(x, a), 0) * max(min(y + h, b + d) - max(y, b), 0)
                if other["counts"] and not other["taken"] and both / (w * h + c * d - both) >= best:
                    best, chosen = both / (w * h + c * d - both), other
                ignored |= not other["counts"] and both / (w * h) >= 0.5
            if chosen is not None:
                chosen["taken"] = True
                events.append((one["score"], 1))
            elif not ignored:
                events.append((one["score"], 0))
    events.sort(key=lambda event: -event[0])
    recalls, logs = [], []
    for point in (0.01, 0.0178, 0.0316, 0.0562, 0.1, 0.1778, 0.3162, 0.5623, 1.0):
        true = false = 0
        recall = None
        for _, hit in events:
            true, false = true + hit, false + 1 - hit
            if false / len(people) <= point:
                recall = true / total
        recalls.append(recall if recall is not None else (true / total if events else 0.0))
    logs = [math.log(1 - recall) for recall in recalls]
    return math.exp(sum(logs) / 9)


@pytest.mark.parametrize("seed", range(5))
def test_equals_plain_loops_in_crowds_with_ties(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)

    def box() -> list[int]:
        return [*rng.integers(0, 60, 2).tolist(), int(rng.integers(20, 60)), int(rng.integers(30, 110))]

    truth: dict[str, Any] = {
        "images": [{"id": i} for i in range(1, 41)],
        "categories": [{"id": 1}, {"id": 2}],
        "annotations": [
            {
                "id": n,
                "image_id": int(rng.integers(1, 41)),
                "category_id": 1,
                "bbox": (b := box()),
                "height": b[3],
                "vis_ratio": float(rng.choice([0.1, 0.2, 0.5, 0.65, 0.9])),
                "ignore": int(rng.random() < 0.2),
            }
            for n in range(1, 150)
        ],
    }
    results = [
        {
            "image_id": int(rng.integers(1, 41)),
            "category_id": 1 + int(rng.random() < 0.1),
            "bbox": box(),
            "score": int(rng.integers(0, 40)) / 40,
        }
        for _ in range(400)
    ]
    (tmp_path / "gt.json").write_text(json.dumps(truth))
    (tmp_path / "dt.json").write_text(json.dumps(results))
    metrics = evaluate_citypersons(tmp_path / "gt.json", tmp_path / "dt.json")
    for name, subset in SUBSETS.items():
        assert metrics[f"citypersons/MR/{name}"] == pytest.approx(_naive(truth, results, subset), abs=1e-12), name


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ("{}", "not the layout of val_gt.json"),
        ("[1", "line 1: not JSON"),
        ("", "not JSON"),
        ('{"images": [{"id": 1}], "categories": [], "annotations": [{"category_id": 1}]}', "not the layout"),
    ],
)
def test_bad_ground_truth_is_named(truth: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "gt.json").write_text(truth)
    (tmp_path / "dt.json").write_text("[]")
    with pytest.raises(DataError, match=message):
        evaluate_citypersons(tmp_path / "gt.json", tmp_path / "dt.json")


def test_a_broken_mat_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "anno_val.mat").write_bytes(b"not a mat file" * 20)
    (tmp_path / "dt.json").write_text("[]")
    with pytest.raises(DataError, match=r"anno_val\.mat"):
        evaluate_citypersons(tmp_path / "anno_val.mat", tmp_path / "dt.json")
    with pytest.raises(DataError, match="not found"):
        evaluate_citypersons(tmp_path / "other.mat", tmp_path / "dt.json")


def test_a_detection_takes_the_later_of_two_people_that_it_overlaps_equally() -> None:
    """So the earlier is left to the next detection, which reaches nobody else."""
    found = citypersons.Candidates(
        heights=np.array([100.0, 100.0]),
        scores=np.array([0.9, 0.8]),
        detections=np.array([0, 0, 1]),
        people=np.array([0, 1, 0]),
        iou=np.array([0.6, 0.6, 0.7]),
        share=np.array([0.6, 0.6, 0.7]),
    )
    hit, ignored = citypersons._match(found, np.ones(2, bool), np.zeros(2, bool))
    assert hit.tolist() == [True, True] and not ignored.any()
