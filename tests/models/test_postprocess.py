"""Thresholds and non-maximum suppression."""

import math

import pytest
import torch
from torchvision.ops import batched_nms, nms

from cascade_rcnn.models.postprocess import _nms_exported, _nms_of_all, nms_keep, select_detections, soft_nms_scores
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


def test_offset_groups_round_the_iou_where_the_group_lies() -> None:
    """mmdetection's NMS over levels decides ties so: far from zero float32 has no eighths, and 5.125 becomes 5.

    torchvision's NMS moves groups apart too where boxes are few, here by 1,500,000, where there are eighths.
    """
    far = 1_500_000.0
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 5.125], [far - 9, far - 9, far - 1, far - 1]]])
    scores, valid = torch.tensor([[0.9, 0.8, 0.7]]), torch.ones(1, 3, dtype=torch.bool)
    for group, stays in ((0, False), (1, True)):
        groups = torch.full((1, 3), group)
        assert not nms_keep(boxes, scores, groups, valid, 0.5)[0, 1]
        assert bool(nms_keep(boxes, scores, groups, valid, 0.5, offset_groups=True)[0, 1]) is stays


def test_groups_that_overlap_only_when_not_offset_stay_apart() -> None:
    boxes = random_boxes(60)[None]
    scores, groups = torch.rand(1, 60), torch.randint(0, 3, (1, 60))
    everything = torch.ones(1, 60, dtype=torch.bool)
    offset = nms_keep(boxes, scores, groups, everything, 0.5, offset_groups=True)
    assert torch.equal(nms_keep(boxes, scores, groups, everything, 0.5), offset)
    assert offset.sum() > nms_keep(boxes, scores, groups * 0, everything, 0.5).sum()


@pytest.mark.filterwarnings("ignore:`create_unbacked_symint`:FutureWarning")  # torchvision calls it
@pytest.mark.parametrize("candidates", [0, 1, 2])
def test_exported_nms_may_keep_nothing(candidates: int) -> None:
    """A program of torch.export once stopped with an assertion where an image had fewer than two detections."""

    class Nms(torch.nn.Module):
        def forward(self, boxes: torch.Tensor, scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
            return _nms_exported(boxes, scores, torch.zeros_like(scores, dtype=torch.int64), valid, 0.5)

    corner = 100.0 * torch.arange(5)[None, :, None]
    boxes = torch.cat((corner, corner, corner + 10, corner + 10), dim=2)
    scores, valid = torch.full((1, 5), 0.5), torch.ones(1, 5, dtype=torch.bool)
    program = torch.export.export(Nms(), (boxes, scores, valid), strict=False).module()
    valid[:, candidates:] = False
    assert torch.equal(program(boxes, scores, valid), valid)


def test_exported_nms_keeps_many_classes_and_images_apart() -> None:
    """1,203 classes and 8 images of 1,333 pixels: as exact as NMS of each group alone, but for ties at the limit."""
    dice = torch.Generator().manual_seed(0)
    corner = 1200 + 100 * torch.rand(8, 400, 2, generator=dice)
    boxes = torch.cat((corner, corner + 20 + 20 * torch.rand(8, 400, 2, generator=dice)), dim=-1).clamp(max=1333)
    scores, valid = torch.rand(8, 400, generator=dice), torch.rand(8, 400, generator=dice) > 0.1
    groups = torch.randint(1200, 1203, (8, 400), generator=dice)
    keep = nms_keep(boxes, scores, groups, valid, 0.5)
    assert int((_nms_exported(boxes, scores, groups, valid, 0.5) != keep).sum()) <= 2


def test_without_a_gpus_kernel_every_box_goes_to_nms_and_the_same_stay() -> None:
    boxes, scores, groups = random_boxes(80)[None], torch.rand(1, 80), torch.randint(0, 3, (1, 80))
    valid = torch.rand(1, 80) > 0.3
    own_group = torch.where(valid, groups, -1)
    kept = _nms_of_all(boxes, scores.masked_fill(~valid, -1e30), own_group, 0.5) & valid
    assert torch.equal(kept, nms_keep(boxes, scores, groups, valid, 0.5))


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


def test_boxes_without_extent_are_no_detections() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [20, 20, 20, 40], [30, 40, 50, 40]]])
    found = select_detections(torch.full((1, 3, 1), 0.9), boxes, torch.ones(1, 3, dtype=torch.bool), **OPTIONS)
    assert found.boxes[0, found.valid[0]].tolist() == [[0, 0, 10, 10]]


def test_boxes_that_are_not_valid_are_no_detections() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [20, 20, 30, 40]]])
    found = select_detections(torch.full((1, 2, 1), 0.9), boxes, torch.tensor([[True, False]]), **OPTIONS)
    assert found.boxes[0, found.valid[0]].tolist() == [[0, 0, 10, 10]]


def test_soft_nms_leaves_other_classes_alone() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 9]])
    scores = soft_nms_scores(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 1, 2]))
    assert scores.tolist() == pytest.approx([0.9, 0.8, 0.7])
