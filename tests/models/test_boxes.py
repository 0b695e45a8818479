"""Arithmetic of boxes."""

import math

import pytest
import torch
from torchvision.ops import box_iou

from cascade_rcnn.models.boxes import clip_boxes, decode_boxes, encode_boxes, iou_loss, pairwise_iof, pairwise_iou
from random_boxes import random_boxes


def test_iou_equals_torchvisions() -> None:
    a, b = random_boxes(40), random_boxes(30, seed=5)
    torch.testing.assert_close(pairwise_iou(a, b), box_iou(a, b))


def test_iou_of_empty_boxes_is_zero() -> None:
    assert pairwise_iou(torch.zeros(1, 4), torch.zeros(1, 4)).item() == 0


def test_share_inside_a_region_is_of_the_boxs_own_area() -> None:
    box, region = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[5.0, 0, 100, 100]])
    assert pairwise_iof(box, region).item() == pytest.approx(0.5)


@pytest.mark.parametrize("limit_shrinking", [True, False])
def test_decoding_undoes_encoding(limit_shrinking: bool) -> None:
    boxes, targets, stds = random_boxes(50), random_boxes(50, seed=9), torch.tensor([0.1, 0.1, 0.2, 0.2])
    deltas = encode_boxes(boxes, targets, stds)
    back = decode_boxes(deltas, boxes, stds, limit_shrinking=limit_shrinking)
    torch.testing.assert_close(back, targets, rtol=1e-4, atol=1e-3)


def test_growth_in_one_step_is_limited() -> None:
    box = torch.tensor([[0.0, 0, 10, 10]])
    grown = decode_boxes(torch.full((1, 4), 100.0), box, torch.ones(4))
    assert (grown[0, 2] - grown[0, 0]).item() == pytest.approx(10 * 1000 / 16, rel=1e-5)


@pytest.mark.parametrize(("limit_shrinking", "width"), [(True, 10 * 16 / 1000), (False, 0.0)])
def test_shrinking_in_one_step_is_limited_if_asked(limit_shrinking: bool, width: float) -> None:
    box = torch.tensor([[0.0, 0, 10, 10]])
    shrunk = decode_boxes(torch.tensor([[0.0, 0, -50, -50]]), box, torch.ones(4), limit_shrinking=limit_shrinking)
    assert (shrunk[0, 2] - shrunk[0, 0]).item() == pytest.approx(width, abs=1e-6)


def test_padding_rows_encode_to_finite_values() -> None:
    assert torch.isfinite(encode_boxes(torch.zeros(3, 4), torch.zeros(3, 4), torch.ones(4))).all()


def test_boxes_are_clipped_to_each_image_of_a_batch() -> None:
    boxes = torch.tensor([[[-5.0, -5, 500, 500]], [[-5.0, -5, 500, 500]]])
    clipped = clip_boxes(boxes, torch.tensor([[100, 200], [30, 40]]))
    assert clipped[:, 0].tolist() == [[0, 0, 200, 100], [0, 0, 40, 30]]


def test_boxes_of_every_class_are_clipped_to_each_image() -> None:
    boxes = torch.tensor([-5.0, -5, 500, 500]).expand(2, 7, 3, 4)
    clipped = clip_boxes(boxes, torch.tensor([[100, 200], [30, 40]]))
    assert clipped[:, 6, 2].tolist() == [[0, 0, 200, 100], [0, 0, 40, 30]]


def test_the_limit_is_that_of_the_published_code() -> None:
    assert math.isclose(
        math.exp(
            encode_boxes(torch.tensor([[0.0, 0, 16, 16]]), torch.tensor([[0.0, 0, 1000, 1000]]), torch.ones(4))[
                0, 2
            ].item()
        ),
        62.5,
        rel_tol=1e-5,
    )


@pytest.mark.parametrize("kind", ["giou", "diou", "ciou"])
def test_iou_losses_equal_torchvisions(kind: str) -> None:
    from torchvision.ops import complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou_loss

    theirs = {"giou": generalized_box_iou_loss, "diou": distance_box_iou_loss, "ciou": complete_box_iou_loss}[kind]
    torch.manual_seed(0)
    a, b = (torch.rand(64, 4) * 50 for _ in range(2))
    a, b = (torch.cat([box[:, :2], box[:, :2] + box[:, 2:] + 1], dim=1) for box in (a, b))
    b[:16] = a[:16] + torch.randn(16, 4) * 0.5  # near ones too, where the weight of the aspect counts
    if kind == "ciou":  # below an IoU of a half the aspect does not count, as in mmdetection; torchvision counts it
        close = pairwise_iou(a, b).diagonal() > 0.5
        assert 8 < close.sum() < 64
        far = iou_loss(a[~close], b[~close], kind="ciou")
        torch.testing.assert_close(far, iou_loss(a[~close], b[~close], kind="diou"))
        a, b = a[close], b[close]
    ours, wanted = a.clone().requires_grad_(), a.clone().requires_grad_()
    loss, reference = iou_loss(ours, b, kind=kind), theirs(wanted, b)
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-5)
    loss.sum().backward()
    reference.sum().backward()
    torch.testing.assert_close(ours.grad, wanted.grad, rtol=1e-3, atol=1e-5)


def test_iou_losses_of_empty_boxes_are_finite() -> None:
    boxes = torch.zeros(1, 4, requires_grad=True)
    for kind in ("giou", "diou", "ciou"):
        loss = iou_loss(boxes, torch.zeros(1, 4), kind=kind)
        loss.sum().backward()
        assert torch.isfinite(loss).all() and boxes.grad is not None and torch.isfinite(boxes.grad).all()
