"""Anchors: size, shape, place and padding; which of them take part in the loss and become proposals."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from cascade_rcnn.models import rpn as rpn_module
from cascade_rcnn.models.anchors import AnchorGenerator
from cascade_rcnn.models.rpn import RPN, RPNDetails
from cascade_rcnn.structures import Targets
from tiny import squares, tiny_model


def test_anchors_have_the_scale_ratio_and_centre_asked_for() -> None:
    generator = AnchorGenerator((4, 8), scales=(8.0,), ratios=(0.5, 1.0, 2.0))
    fine, coarse = generator([(2, 3), (1, 2)])
    assert fine.shape == (2 * 3 * 3, 4) and coarse.shape == (1 * 2 * 3, 4)
    size = fine[:, 2:] - fine[:, :2]
    torch.testing.assert_close(size.prod(dim=1), torch.full((18,), 32.0**2))
    torch.testing.assert_close(size[:3, 1] / size[:3, 0], torch.tensor([0.5, 1.0, 2.0]))
    centres = (fine[:, :2] + fine[:, 2:]) / 2
    assert centres[::3].tolist() == [[0, 0], [4, 0], [8, 0], [0, 4], [4, 4], [8, 4]]  # row by row


def test_torchvisions_anchors_are_whole_pixels() -> None:
    from torchvision.models.detection.anchor_utils import AnchorGenerator as Reference

    ours = AnchorGenerator((4,), scales=(8.0,), ratios=(0.5, 1.0, 2.0), rounded=True)
    theirs = Reference(((32,),), ((0.5, 1.0, 2.0),)).generate_anchors((32,), (0.5, 1.0, 2.0))
    torch.testing.assert_close(ours.base[0], theirs)


def test_anchors_in_a_batchs_padding_are_outside() -> None:
    generator = AnchorGenerator((32,), scales=(1.0,), ratios=(1.0,))
    inside = generator.unpadded([(3, 4)], torch.tensor([[96, 128], [33, 64]]))
    assert inside[0].all()
    assert inside[1].view(3, 4).tolist() == [[True, True, False, False], [True, True, False, False], [False] * 4]


def rpn_of_one_level(scale: float = 1.0, **details: Any) -> RPN:
    """Stride 8, one square anchor per cell; on features of zero every logit and delta is 0."""
    anchors = AnchorGenerator((8,), scales=(scale,), ratios=(1.0,))
    return RPN(
        2, anchors, details=RPNDetails(**{"samples": 10**6, "fixed_normalizer": True, "nms_iou": 1.0, **details})
    )


def two_images() -> tuple[list[Tensor], Tensor, Targets]:
    """The first fills the batch of 64 x 96 pixels, the second has 32 x 32 of them."""
    return [torch.zeros(2, 2, 8, 12)], torch.tensor([[64, 96], [32, 32]]), Targets.empty(2)


@pytest.mark.parametrize(
    ("details", "anchors"),
    [
        ({"mask_padding": True}, 96 + 16),
        ({"mask_padding": False}, 96 + 96),
        ({"mask_padding": True, "inside_only": True}, 7 * 11 + 9),  # those of the first row and column cross the border
        ({"mask_padding": True, "samples": 20}, 20 + 16),
    ],
)
def test_anchors_in_a_batchs_padding_take_no_part_in_the_loss(details: dict[str, Any], anchors: int) -> None:
    rpn = rpn_of_one_level(**details)
    losses, _ = rpn.loss(*two_images())
    one = math.log(2) / (rpn.details.samples * 2)  # the loss of an anchor, objectness 1/2
    assert losses["rpn_cls"].item() / one == pytest.approx(anchors, rel=1e-4)
    assert losses["rpn_box"].item() == 0


@pytest.mark.parametrize(("mask_padding", "narrowest"), [(True, 16.0), (False, 8.0)])
@pytest.mark.parametrize("training", [True, False])
def test_anchors_in_a_batchs_padding_propose_nothing(mask_padding: bool, narrowest: float, training: bool) -> None:
    """Clipped to the image, an anchor of 32 pixels is 16 wide at its left border; one in the padding is 8 or none."""
    rpn = rpn_of_one_level(4.0, mask_padding=mask_padding)
    pyramid, sizes, targets = two_images()
    proposals = rpn.loss(pyramid, sizes, targets)[1] if training else rpn.propose(pyramid, sizes)
    small = proposals.boxes[1][proposals.valid[1]]
    assert (small[:, 2] - small[:, 0]).amin().item() == narrowest
    assert small.amax() <= 32 and small.amin() >= 0


def test_boxes_that_leave_the_image_are_no_proposals() -> None:
    rpn = rpn_of_one_level()
    pyramid, sizes, _ = two_images()
    assert rpn.propose(pyramid, sizes).valid.any(dim=1).all()
    torch.nn.init.constant_(rpn.deltas.bias, 100.0)  # a hundred anchors' sides to the right and down
    proposals = rpn.propose(pyramid, sizes)
    assert not proposals.valid.any() and not proposals.boxes.any()
    assert proposals.scores is not None and (proposals.scores == -torch.inf).all()


def test_outputs_that_are_there_already_are_used() -> None:
    rpn = rpn_of_one_level()
    pyramid, sizes, _ = two_images()
    outputs = rpn(pyramid)
    outputs[0][0][0, 50] = 3.0
    best = rpn.propose(pyramid, sizes, outputs).boxes[0, 0]
    assert best.tolist() == rpn.anchors([(8, 12)])[0][50].tolist()


@pytest.mark.parametrize("semantics", ["mmdetection", "detectron2", "paper", "torchvision"])
def test_each_semantics_has_its_rules(monkeypatch: pytest.MonkeyPatch, semantics: str) -> None:
    seen: list[dict[str, Any]] = []
    inner = rpn_module.nms_keep

    def nms_keep(*arguments: Any, **options: Any) -> Tensor:
        seen.append(options)
        return inner(*arguments, **options)

    monkeypatch.setattr(rpn_module, "nms_keep", nms_keep)
    model = tiny_model(semantics=semantics, masks="none")
    images, _ = squares(images=1)
    model.rpn.propose(model.pyramid(images), images.sizes)
    assert [options["offset_groups"] for options in seen] == [semantics == "mmdetection"]
    details = model.rpn.details
    assert details.limit_shrinking == (semantics == "mmdetection")
    assert details.rematch_best == (semantics == "mmdetection")
    assert details.mask_padding == (semantics in ("mmdetection", "paper"))
    assert details.inside_only == (semantics in ("mmdetection", "paper"))
    assert details.best_box_iou == (0.3 if semantics == "mmdetection" else 0.0)


@pytest.mark.parametrize("limit_shrinking", [True, False])
def test_proposals_shrink_as_the_details_say(limit_shrinking: bool) -> None:
    rpn = rpn_of_one_level(limit_shrinking=limit_shrinking)
    with torch.no_grad():
        rpn.deltas.bias[2:] = -6.0
    proposals = rpn.propose([torch.zeros(1, 2, 8, 12)], torch.tensor([[64, 96]]))
    first = proposals.boxes[0, 0]
    width = 8 * 16 / 1000 if limit_shrinking else 8 * math.exp(-6)
    assert (first[2] - first[0]).item() == pytest.approx(width / 2, rel=1e-3), "half of it is in the image"


def test_levels_do_not_suppress_each_other() -> None:
    details = RPNDetails(nms_iou=0.3)
    pyramid, sizes = [torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 4, 4)], torch.tensor([[64, 64]])

    def proposed(strides: tuple[int, ...], levels: list[Tensor]) -> list[list[float]]:
        anchors = AnchorGenerator(strides, scales=(1.0,), ratios=(1.0,), sizes=((32,),) * len(strides))
        found = RPN(2, anchors, details=details).propose(levels, sizes)
        return sorted(found.boxes[0, found.valid[0]].tolist())

    fine, coarse = proposed((8,), pyramid[:1]), proposed((16,), pyramid[1:])
    assert proposed((8, 16), pyramid) == sorted(fine + coarse)


def test_anchors_are_positive_from_070_and_negative_below_030() -> None:
    rpn = rpn_of_one_level(4.0, best_box_iou=2.0)
    pyramid, sizes, targets = [torch.zeros(1, 2, 8, 8)], torch.tensor([[64, 64]]), Targets.empty(1)
    targets.valid[0, 0] = True
    for width, best in ((9.0, 9 / 32), (10.0, 10 / 32), (22.0, 22 / 32), (23.0, 23 / 32)):
        targets.boxes[0, 0] = torch.tensor([0.0, 0, width, 32])  # within the anchor around (16, 16)
        ious = box_iou(rpn.anchors([(8, 8)])[0], targets.boxes[0, :1])
        assert ious.max().item() == pytest.approx(best)
        losses, _ = rpn.loss(pyramid, sizes, targets)
        drawn = losses["rpn_cls"].item() * 10**6 / math.log(2)
        assert drawn == pytest.approx(int(((ious < 0.3) | (ious >= 0.7)).sum()), rel=1e-4)
        assert (losses["rpn_box"].item() > 0) == (best >= 0.7)


@pytest.mark.parametrize("beta", [1 / 9, 1.0])
def test_the_box_loss_of_an_anchor(beta: float) -> None:
    rpn = rpn_of_one_level(4.0, box_beta=beta, samples=100)
    targets = Targets.empty(1)
    targets.valid[0, 0], targets.boxes[0, 0] = True, torch.tensor([8.0, 0, 40, 32])  # the anchor of a cell, 8 to ...
    targets.boxes[0, 0] += torch.tensor([3.2, 0, 3.2, 0])  # ... and a tenth of its width to the right
    loss = rpn.loss([torch.zeros(1, 2, 8, 8)], torch.tensor([[64, 64]]), targets)[0]["rpn_box"].item()
    matched = [shift for shift in (0.1, 0.1 - 0.25, 0.1 + 0.25) if (1 - abs(shift)) / (1 + abs(shift)) >= 0.7]
    one = [abs(x) - beta / 2 if abs(x) >= beta else x * x / (2 * beta) for x in matched]
    assert loss == pytest.approx(sum(one) / 100, rel=1e-4)


def test_outputs_come_in_the_order_of_the_anchors() -> None:
    rpn = rpn_of_one_level()
    feature = torch.zeros(1, 2, 4, 6)
    feature[0, 0, 1, 4] = 1.0
    for layer in (rpn.conv, rpn.objectness, rpn.deltas):
        torch.nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
        layer.weight.data[:, 0, layer.weight.shape[2] // 2, layer.weight.shape[3] // 2] = 1.0  # type: ignore[union-attr]
    logits, deltas = rpn([feature])
    place = 1 * 6 + 4
    assert logits[0].nonzero().tolist() == [[0, place]] and deltas[0][0].any(dim=1).nonzero().tolist() == [[place]]
    anchor = rpn.anchors([(4, 6)])[0][place]
    assert ((anchor[:2] + anchor[2:]) / 2).tolist() == [4 * 8, 1 * 8]


def test_training_and_test_have_their_own_numbers_of_proposals() -> None:
    rpn = rpn_of_one_level(pre_nms=(30, 20), post_nms=(12, 7))
    pyramid, sizes, targets = two_images()
    assert rpn.loss(pyramid, sizes, targets)[1].boxes.shape[1] == 12
    assert rpn.propose(pyramid, sizes).boxes.shape[1] == 7
    rpn = rpn_of_one_level(pre_nms=(30, 20), post_nms=(100, 100))
    assert rpn.loss(pyramid, sizes, targets)[1].boxes.shape[1] == 30
    assert rpn.propose(pyramid, sizes).boxes.shape[1] == 20
