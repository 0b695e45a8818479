"""Thresholds and non-maximum suppression."""

import math

import pytest
import torch
from torchvision.ops import batched_nms, nms

from cascade_rcnn.models.postprocess import nms_keep, select_detections, soft_nms_scores
from random_boxes import random_boxes

OPTIONS = {"score_threshold": 0.05, "nms": "class", "nms_iou": 0.5, "max_detections": 100}


def test_nms_of_a_batch_equals_torchvisions_of_each_image() -> None:
    boxes = torch.stack([random_boxes(80), random_boxes(80, seed=4)])
    scores = torch.rand(2, 80)
    groups = torch.randint(0, 3, (2, 80))
    valid = torch.rand(2, 80) > 0.2
    keep = nms_keep(boxes, scores, groups, valid, 0.5)
    for b in range(2):
        rows = valid[b].nonzero().squeeze(1)
        expected = rows[batched_nms(boxes[b][rows], scores[b][rows], groups[b][rows], 0.5)]
        assert set(keep[b].nonzero().squeeze(1).tolist()) == set(expected.tolist())


def test_spreading_groups_keeps_them_apart() -> None:
    boxes = random_boxes(60)[None]
    scores, groups = torch.rand(1, 60), torch.randint(0, 3, (1, 60))
    everything = torch.ones(1, 60, dtype=torch.bool)
    assert torch.equal(
        nms_keep(boxes, scores, groups, everything, 0.5), nms_keep(boxes, scores, groups, everything, 0.5, spread=True)
    )


def two_overlapping_of_two_classes() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60], [0, 0, 0, 0]]])
    scores = torch.tensor([[[0.9, 0.0], [0.1, 0.8], [0.04, 0.0], [0.9, 0.9]]])
    return scores, boxes, torch.tensor([[True, True, True, False]])


def test_classes_do_not_suppress_each_other() -> None:
    found = select_detections(*two_overlapping_of_two_classes(), **OPTIONS)
    kept = found.valid[0]
    assert found.scores[0, kept].tolist() == pytest.approx([0.9, 0.8])
    assert found.labels[0, kept].tolist() == [0, 1]


def test_class_agnostic_nms_leaves_one() -> None:
    found = select_detections(*two_overlapping_of_two_classes(), **(OPTIONS | {"nms": "agnostic"}))
    assert found.valid.sum() == 1 and found.scores[0, 0].item() == pytest.approx(0.9)


def test_soft_nms_lowers_scores_by_the_formula() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]])
    scores = soft_nms_scores(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3))
    assert scores.tolist() == pytest.approx([0.9, 0.8 * math.exp(-(0.9**2) / 0.5), 0.7], rel=1e-5)


def test_at_most_max_detections_sorted_by_score() -> None:
    boxes = random_boxes(300)[None]
    found = select_detections(
        torch.rand(1, 300, 4), boxes, torch.ones(1, 300, dtype=torch.bool), **(OPTIONS | {"max_detections": 17})
    )
    assert found.scores.shape == (1, 17)
    assert (found.scores[0, :-1] >= found.scores[0, 1:]).all()


def test_class_specific_boxes_go_with_their_class() -> None:
    boxes = torch.tensor([[[[0.0, 0, 10, 10], [20, 20, 30, 30]]]])  # one RoI, two classes
    found = select_detections(torch.tensor([[[0.3, 0.6]]]), boxes, torch.ones(1, 1, dtype=torch.bool), **OPTIONS)
    assert found.boxes[0, 0].tolist() == [20, 20, 30, 30] and found.labels[0, 0] == 1
    assert found.boxes[0, 1].tolist() == [0, 0, 10, 10]


def test_nothing_above_the_threshold_is_an_empty_result() -> None:
    found = select_detections(torch.zeros(2, 5, 3), torch.rand(2, 5, 4), torch.ones(2, 5, dtype=torch.bool), **OPTIONS)
    assert not found.valid.any() and (found.scores == 0).all()


def test_nms_result_equals_the_plain_one() -> None:
    boxes, scores = random_boxes(100), torch.rand(100)
    found = select_detections(scores[None, :, None], boxes[None], torch.ones(1, 100, dtype=torch.bool), **OPTIONS)
    above = (scores > 0.05).nonzero().squeeze(1)
    expected = above[nms(boxes[above], scores[above], 0.5)]
    torch.testing.assert_close(found.boxes[0, found.valid[0]], boxes[expected])
