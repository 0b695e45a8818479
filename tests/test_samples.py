"""Official numbers on published data that may not be passed on: run where the files are, by ``pytest -m samples``.

``CASCADE_RCNN_SAMPLES`` names a folder with ``data/`` (parts of COCO, VOC, KITTI, CityPersons, WIDER FACE, BCCD and
nuclei as their owners publish them) and ``metrics/`` (results, and what the official code says of them). The same
evaluations run by default on small made-up cases: tests/evaluation.
"""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cascade_rcnn.check.dataset import check_dataset
from cascade_rcnn.data.formats.open import open_split, recognise
from cascade_rcnn.evaluation.citypersons import evaluate_citypersons
from cascade_rcnn.evaluation.coco import evaluate_coco
from cascade_rcnn.evaluation.widerface import evaluate_widerface

pytestmark = pytest.mark.samples
TOLERANCE = 1e-9


@pytest.fixture(scope="module")
def samples() -> Path:
    folder = os.environ.get("CASCADE_RCNN_SAMPLES")
    assert folder and (Path(folder) / "data").is_dir(), "set CASCADE_RCNN_SAMPLES to the folder of data/ and metrics/"
    return Path(folder)


def _expected(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "expected.json").read_text())
    return content


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("case", ["val2017_sample", "val2014_100"])
def test_coco_equals_pycocotools(samples: Path, case: str, iou_type: Any) -> None:
    folder = samples / "metrics" / "coco" / case
    expected = _expected(folder)
    truth = samples / "data" / expected["ground_truth"].split(" ")[0]
    results = folder / f"{iou_type}_results.json"
    if not results.exists():
        fake = {"bbox": "fakebbox", "segm": "fakesegm"}[iou_type]
        results = truth.parent / f"instances_val2014_{fake}100_results.json"
    metrics = evaluate_coco(truth, results, iou_type=iou_type)
    for name, value in expected[iou_type]["stats"].items():
        wanted = None if value == -1 else pytest.approx(value, abs=TOLERANCE)
        assert metrics[f"{iou_type}/{name}"] == wanted, name


@pytest.mark.parametrize("truth", ["evaluation/val_gt.json", "annotations/anno_val.mat"])
def test_citypersons_equals_the_official_script(samples: Path, truth: str) -> None:
    folder = samples / "metrics" / "citypersons" / "main"
    metrics = evaluate_citypersons(samples / "data" / "citypersons" / truth, folder / "val_dt.json")
    theirs = {"Reasonable": "Reasonable", "Small": "Reasonable_small", "Heavy": "Reasonable_occ=heavy", "All": "All"}
    setups = _expected(folder)["setups"]
    for name, setup in theirs.items():
        assert metrics[f"citypersons/MR/{name}"] == pytest.approx(setups[setup]["MR"], abs=TOLERANCE), name


def test_widerface_equals_the_port_on_the_whole_validation_set(samples: Path, tmp_path: Path) -> None:
    folder = samples / "metrics" / "widerface" / "full_val"
    with tarfile.open(folder / "pred.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    metrics = evaluate_widerface(samples / "data" / "widerface" / "ground_truth", tmp_path / "pred")
    for setting, value in _expected(folder)["AP_python_port"].items():
        assert metrics[f"widerface/{setting}"] == pytest.approx(value, abs=TOLERANCE)


def test_citypersons_reader_equals_the_official_truth_file(samples: Path) -> None:
    root = samples / "data" / "citypersons"
    split = open_split(root, "val")
    assert split.truth == root / "evaluation" / "val_gt.json"
    truth = json.loads(split.truth.read_text())
    assert [image["im_name"] for image in truth["images"]] == [record.file_name for record in split.records]
    want = [row["bbox"] for row in truth["annotations"] if not row["ignore"]]
    have = [
        [box[0], box[1], box[2] - box[0], box[3] - box[1]]
        for record in split.records
        for box in record.boxes[~record.ignore].tolist()
    ]
    assert sorted(want) == sorted(have)


@pytest.mark.parametrize(
    ("folder", "name", "split", "images", "objects", "ignored"),
    [
        ("bccd/BCCD", "voc", "train", 205, 2804, 0),
        ("coco2017_sample", "coco", "val", 158, 1408, 16),
        ("kitti", "kitti", "val", 2, 5, 4),
        ("citypersons", "citypersons", "val", 500, 3157, 2638),
        ("widerface", "widerface", "val", 120, 1340, 10),
        ("voc", "voc", "2007_test+2012_test", 2, 3, 0),
        ("nuclei", "coco", "val", 132, 5545, 0),
    ],
)
def test_samples_hold_what_their_sources_state(
    samples: Path, folder: str, name: str, split: str, images: int, objects: int, ignored: int
) -> None:
    data = open_split(samples / "data" / folder, split)
    assert recognise(samples / "data" / folder) == name and len(data) == images
    flags = np.concatenate([record.ignore for record in data.records])
    assert ((~flags).sum(), flags.sum()) == (objects, ignored)
    if folder != "citypersons":
        assert all(record.path.is_file() and record.height for record in data.records)


@pytest.mark.parametrize(
    ("folder", "kinds"),
    [
        ("bccd", {"empty-box": 2}),
        ("coco2017_sample", {"class-imbalance": 1, "some-without-anchor": 1}),
        ("kitti", {"missing-annotation": 7478, "class-without-objects": 1}),
        ("widerface", {"empty-box": 1, "too-many-objects": 2, "no-anchor": 2}),
        ("citypersons", {"no-images": 2}),
    ],
)
def test_findings_in_the_samples(samples: Path, folder: str, kinds: dict[str, int]) -> None:
    counts = check_dataset(samples / "data" / folder).counts
    assert {kind: counts.get(kind) for kind in kinds} == kinds
