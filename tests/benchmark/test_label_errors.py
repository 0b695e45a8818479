"""The measurement of label errors: what it plants, how it counts, and that a cascade without faults finds all of it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import locations
import perfect_cascade
from cascade_rcnn.data.formats.open import open_split
from cascade_rcnn.data.records import DataSplit, ImageRecord
from cascade_rcnn.data.synthetic_shapes import generate_shapes
from cascade_rcnn.labels.evidence import Evidence, iou_of_pairs
from cascade_rcnn.labels.rank import KINDS

sys.path.insert(0, str(locations.REPOSITORY / "benchmarks"))

import label_errors
import label_plant
from label_plant import Planted


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> DataSplit:
    root = generate_shapes(
        tmp_path_factory.mktemp("shapes"), train_images=60, val_images=1, size=128, objects=(3, 5), seed=3
    )
    return open_split(root, "train")


@pytest.fixture(scope="module")
def planted(clean: DataSplit) -> tuple[DataSplit, Planted]:
    return label_plant.plant(clean, seed=1)


def _objects(record: ImageRecord) -> list[perfect_cascade.Object]:
    return [(*box, label) for box, label in zip(record.boxes.tolist(), record.labels.tolist())]


def _evidence(clean: DataSplit, split: DataSplit) -> list[Evidence]:
    return [
        perfect_cascade.evidence(_objects(one), _objects(other), classes=len(clean.class_names))
        for one, other in zip(clean.records, split.records)
    ]


def test_every_error_is_planted_where_it_is_said_to_be(clean: DataSplit, planted: tuple[DataSplit, Planted]) -> None:
    split, errors = planted
    total = sum(len(record.boxes) for record in clean.records)
    for kind, share in label_plant.SHARES.items():
        assert errors.count(kind) == pytest.approx(share * total, abs=1)
    for (image, row), box in errors.true_boxes.items():
        assert 0.35 < iou_of_pairs(split.records[image].boxes[row], np.array(box)) < 0.75
    for (image, row), label in errors.true_labels.items():
        assert split.records[image].labels[row] != label
    for image, box, _ in errors.missed:
        assert box in clean.records[image].boxes.tolist() and box not in split.records[image].boxes.tolist()
    touched = {place for rows in errors.rows.values() for place in rows}
    sound = sum(
        box in clean.records[image].boxes.tolist()
        for image, record in enumerate(split.records)
        for row, box in enumerate(record.boxes.tolist())
        if (image, row) not in touched
    )
    changed = len(errors.missed) + len(errors.true_boxes) + len(errors.true_labels)
    assert sound == total - changed


def test_the_clean_data_stay_as_they_were(clean: DataSplit) -> None:
    before = [record.boxes.copy() for record in clean.records]
    label_plant.plant(clean, seed=2)
    assert all((record.boxes == boxes).all() for record, boxes in zip(clean.records, before))


def test_planted_data_are_read_again(planted: tuple[DataSplit, Planted], tmp_path: Path) -> None:
    split, errors = planted
    label_plant.write_planted(split, errors, tmp_path)
    again = open_split(tmp_path, "all")
    for one, other in zip(again.records, split.records):
        np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-6)
        assert one.labels.tolist() == other.labels.tolist()


def test_measures_by_hand() -> None:
    ranking = [(0.9, True, 1.0), (0.8, False, 0.0), (0.7, True, 1.0), (0.1, True, 1.0)]
    precision, average, recall = label_errors.measure(ranking, 2)
    assert (precision, average, recall) == pytest.approx((0.5, (1 + 2 / 3 + 3 / 4) / 2, 1.5))
    assert label_errors.measure([], 3) == (0, 0, 0)


def test_a_cascade_without_faults_finds_what_is_planted(clean: DataSplit, planted: tuple[DataSplit, Planted]) -> None:
    split, errors = planted
    rankings = label_errors.our_rankings(errors, _evidence(clean, split))
    for kind in KINDS:
        precision, average, _ = label_errors.measure(rankings[kind], errors.count(kind))
        assert precision > 0.7 and average > 0.7, (kind, precision, average)


def test_the_table_has_both_beside_each_other(clean: DataSplit, planted: tuple[DataSplit, Planted]) -> None:
    pytest.importorskip("cleanlab")
    split, errors = planted
    text = label_errors.table(split, errors, _evidence(clean, split))
    rows = [line for line in text.splitlines() if line.startswith("| ") and line[2:].split(" ")[0] in KINDS]
    assert len(rows) == 2 * len(KINDS)
