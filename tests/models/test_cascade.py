"""The rules of a stage: what it samples, what it learns, what it hands on; and how stages are put together."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade_rcnn.config import ModelConfig
from cascade_rcnn.errors import ConfigError
from cascade_rcnn.models.cascade import Stage, StageDetails, deltas_of_labels, most_likely, scale_gradient
from cascade_rcnn.models.mask_head import MaskSamples
from cascade_rcnn.models.matching import Samples, rows_in_use
from cascade_rcnn.structures import Proposals, RawDetections, Targets
from tiny import squares, tiny_model

SIZES = torch.tensor([[100, 200]])
TRUTH = torch.tensor([[10.0, 10, 50, 50], [60, 20, 90, 80]])
BOXES = torch.tensor(
    [[12.0, 10, 50, 50], [61, 20, 90, 80], [0, 60, 30, 100], [150, 10, 200, 60]]
)  # two of them positive
KEPT = {"mmdetection": False, "detectron2": True, "paper": False, "torchvision": False}


def stage(**details: Any) -> Stage:
    return Stage(
        StageDetails(
            **{"iou": 0.5, "stds": (0.1, 0.1, 0.2, 0.2), "loss_weight": 1.0, "mask_weight": 1.0, "samples": 100}
            | details
        )
    )


def proposals() -> Proposals:
    return Proposals(BOXES[None], torch.ones(1, len(BOXES), dtype=torch.bool))


def targets() -> Targets:
    """Two objects of the classes 0 and 2, and a row of padding."""
    made = Targets.empty(1, rows=3)
    made.boxes[0, :2], made.valid[0, :2], made.labels[0, :2] = TRUTH, True, torch.tensor([0, 2])
    return made


def is_among(boxes: Tensor, others: Tensor) -> Tensor:
    return (boxes[:, None] == others[None]).all(-1).any(1)


def test_ground_truth_takes_part() -> None:
    samples = stage().sample(proposals(), targets())
    assert samples.valid.sum() == len(BOXES) + len(TRUTH)
    assert is_among(TRUTH, samples.boxes[0, samples.is_truth[0]]).all() and samples.is_truth.sum() == 2
    assert samples.positive.sum() == 4 and samples.positive[0, :4].all(), "positives lie in front"
    for box, matched, label in zip(samples.boxes[0, :4], samples.matched_boxes[0], samples.matched_labels[0]):
        g = 0 if box[0] < 55 else 1
        assert matched.tolist() == TRUTH[g].tolist() and label == (0, 2)[g]


def test_objects_that_are_alike_are_each_their_own() -> None:
    alike = targets()
    alike.boxes[0, 1] = TRUTH[0]
    samples = stage().sample(proposals(), alike)
    assert sorted(samples.matched_labels[0, samples.is_truth[0]].tolist()) == [0, 2]


def test_without_ground_truth_and_drawing_all_boxes_are_samples_in_their_order() -> None:
    samples = stage(samples=None, add_truth=False).sample(proposals(), targets())
    assert torch.equal(samples.boxes, BOXES[None]) and not samples.is_truth.any()
    assert samples.positive[0].tolist() == [True, True, False, False] and samples.valid.all()


def test_a_quarter_of_what_is_drawn_is_positive() -> None:
    many = Proposals(
        torch.cat([BOXES[:1].expand(30, 4), BOXES[2:3].expand(30, 4)])[None], torch.ones(1, 60, dtype=torch.bool)
    )
    samples = stage(samples=16).sample(many, targets())
    assert samples.positive.sum() == 4 and samples.valid.sum() == 16 and samples.max_positives == 4


@pytest.mark.parametrize("iou", [0.5, 0.94, 0.96])
def test_a_stage_is_as_strict_as_its_iou(iou: float) -> None:
    samples = stage(iou=iou, add_truth=False, samples=None).sample(proposals(), targets())  # IoU 0.95 and 0.967
    assert samples.positive[0].tolist() == [iou < 0.95, True, False, False]


def outputs(samples: Samples, *, delta: float = 0.0, classes: int = 3) -> tuple[Tensor, Tensor]:
    logits = torch.randn(*samples.valid.shape, classes + 1, generator=torch.Generator().manual_seed(0))
    return logits, torch.full((*samples.valid.shape, 4), delta)


@pytest.mark.parametrize("keep_truth", [False, True])
def test_ground_truth_is_handed_on_or_stays_behind(keep_truth: bool) -> None:
    one = stage(keep_truth=keep_truth)
    samples = one.sample(proposals(), targets())
    handed_on = one.refine(*outputs(samples), samples, SIZES)
    boxes = handed_on.boxes[0, handed_on.valid[0]]
    assert is_among(BOXES, boxes).all() and is_among(TRUTH, boxes).tolist() == [keep_truth, keep_truth]


def test_refined_boxes_are_clipped_to_the_image() -> None:
    one = stage(add_truth=False, samples=None)
    samples = one.sample(proposals(), targets())
    logits, deltas = outputs(samples)
    deltas[..., 2:] = 3.0  # in units of 0.2: e^0.6 times as wide and high
    boxes = one.refine(logits, deltas, samples, SIZES).boxes[0]
    assert boxes[:, 0].amin() == 0 and boxes[:, 2].amax() == 200 and boxes[:, 3].amax() == 100
    assert (boxes[1, 2] - boxes[1, 0]).item() == pytest.approx(29 * 2.718281828**0.6, rel=1e-5)


def test_boxes_that_leave_the_image_are_not_handed_on() -> None:
    one = stage(add_truth=False, samples=None)
    samples = one.sample(proposals(), targets())
    logits, deltas = outputs(samples)
    deltas[0, 1, 0] = 200.0  # in units of 0.1: twenty widths to the right
    refined = one.refine(logits, deltas, samples, SIZES)
    assert refined.valid[0].tolist() == [True, False, True, True]
    assert not refined.boxes[0, 1].any()


def test_no_gradient_flows_through_the_boxes() -> None:
    one = stage()
    samples = one.sample(proposals(), targets())
    logits, deltas = outputs(samples)
    assert not one.refine(logits, deltas.requires_grad_(), samples, SIZES).boxes.requires_grad


def test_losses_are_weighted() -> None:
    samples = stage().sample(proposals(), targets())
    logits, deltas = outputs(samples, delta=0.7)
    whole, half = (stage(loss_weight=weight).loss(logits, deltas, samples) for weight in (1.0, 0.5))
    assert set(whole) == {"cls", "box"} and all(value > 0 for value in whole.values())
    assert half["cls"] == 0.5 * whole["cls"] and half["box"] == 0.5 * whole["box"]


def test_losses_are_what_the_paper_says() -> None:
    samples = stage(samples=None, add_truth=False).sample(proposals(), targets())
    logits, deltas = outputs(samples, delta=0.3)
    losses = stage(box_beta=0.0).loss(logits, deltas, samples)
    wanted_class = torch.tensor([0, 2, 3, 3])
    assert losses["cls"].item() == pytest.approx(torch.nn.functional.cross_entropy(logits[0], wanted_class).item())
    centre = lambda box: torch.stack([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2])  # noqa: E731
    total = 0.0
    for box, truth in zip(BOXES[:2], TRUTH):
        size = box[2:] - box[:2]
        shift = (centre(truth) - centre(box)) / size / 0.1
        scale = ((truth[2:] - truth[:2]) / size).log() / 0.2
        total += float((torch.cat([shift, scale]) - 0.3).abs().sum())
    assert losses["box"].item() == pytest.approx(total / 4, rel=1e-5)


def test_a_class_specific_head_moves_each_box_as_its_class_says() -> None:
    deltas = torch.arange(24.0).view(1, 2, 12)
    assert deltas_of_labels(deltas, torch.tensor([[1, 2]]))[0].tolist() == [[4, 5, 6, 7], [20, 21, 22, 23]]
    one = stage(add_truth=False, samples=None)
    samples = one.sample(proposals(), targets())
    logits = torch.zeros(1, 4, 4)
    logits[..., 1] = 1.0  # the guess is class 1; background is the last
    moved = torch.zeros(1, 4, 3, 4)
    moved[0, :, 1, 0] = 1.0  # class 1 moves by a tenth of the width, 0 and 2 by nothing
    boxes = one.refine(logits, moved.flatten(2), samples, SIZES).boxes[0]
    assert torch.equal(boxes[:2], BOXES[:2]), "positives as their objects' classes say"
    assert boxes[2].tolist() == pytest.approx([3, 60, 33, 100])


@pytest.mark.parametrize(("limit_shrinking", "width"), [(True, 38 * 16 / 1000), (False, 0.0)])
def test_a_stage_limits_shrinking_if_asked(limit_shrinking: bool, width: float) -> None:
    moved = stage(limit_shrinking=limit_shrinking).decode(torch.tensor([0.0, 0, -200, -200]), BOXES[0])
    assert (moved[2] - moved[0]).item() == pytest.approx(width, abs=1e-4)


# What build.py makes of each semantics


@pytest.mark.parametrize("semantics", KEPT)
def test_each_semantics_has_its_stages(semantics: str) -> None:
    stages = [one.details for one in tiny_model(semantics=semantics, masks="none").cascade.stages]
    halving = semantics in ("mmdetection", "paper")
    weights = [1.0, 0.5, 0.25] if halving else [1.0, 1.0, 1.0]
    assert [one.iou for one in stages] == [0.5, 0.6, 0.7]
    assert [one.loss_weight for one in stages] == weights
    assert [one.mask_weight for one in stages] == ([1.0] * 3 if semantics == "paper" else weights)
    draws_again = semantics in ("mmdetection", "torchvision")
    assert [one.samples for one in stages] == [64, *[64 if draws_again else None] * 2]
    assert [one.add_truth for one in stages] == [True, *[semantics != "detectron2"] * 2]
    assert all(one.keep_truth == KEPT[semantics] for one in stages)
    assert all(one.limit_shrinking == (semantics == "mmdetection") for one in stages)
    gradients = {"detectron2": [1 / 3] * 3, "paper": weights}.get(semantics, [1.0] * 3)
    assert [one.feature_gradient for one in stages] == gradients


def test_weights_of_the_configuration_replace_those_of_the_semantics() -> None:
    stages = tiny_model(stage_loss_weights=(1.0, 2.0, 3.0), masks="every").cascade.stages
    assert [(one.details.loss_weight, one.details.mask_weight) for one in stages] == [(1, 1), (2, 2), (3, 3)]


def test_scaling_a_gradient_leaves_the_value() -> None:
    x = torch.tensor([3.0], requires_grad=True)
    y = scale_gradient(x, 0.25)
    y.backward()
    assert y.item() == 3.0 and x.grad is not None and x.grad.item() == 0.25


@pytest.mark.parametrize(("semantics", "factor"), [("mmdetection", 1.0), ("detectron2", 1 / 3)])
def test_detectron2_divides_the_gradient_into_the_features_by_the_number_of_stages(
    semantics: str, factor: float
) -> None:
    model = tiny_model(semantics=semantics, masks="none")
    boxes, valid = BOXES[None], torch.ones(1, len(BOXES), dtype=torch.bool)
    gradients = []
    for training in (True, False):
        model.train(training)
        features = [torch.ones(1, 32, 128 // s, 256 // s).requires_grad_() for s in (4, 8, 16, 32)]
        logits, deltas = model.cascade._run_stage(1, features, boxes, valid)
        (logits.sum() + deltas.sum()).backward()
        gradients.append(features[0].grad)
    assert gradients[0] is not None and gradients[1] is not None and gradients[1].any()
    torch.testing.assert_close(gradients[0], gradients[1] * factor)


@pytest.mark.parametrize("of_logits", [True, False])
def test_the_ensemble_is_the_mean_over_the_stages(of_logits: bool) -> None:
    cascade = tiny_model(semantics="mmdetection" if of_logits else "detectron2", masks="none").cascade
    logits = [torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    stacked = torch.stack(logits)
    expected = stacked.mean(0).softmax(-1) if of_logits else stacked.softmax(-1).mean(0)
    torch.testing.assert_close(cascade._ensemble(logits), expected)


@pytest.mark.parametrize(("masks", "trained"), [("none", ""), ("every", "012"), ("last", "2"), ("one", "0")])
def test_mask_heads_learn_at_their_stages(masks: str, trained: str) -> None:
    cascade = tiny_model(masks=masks).cascade
    assert [k for k in range(3) if cascade._mask_head_trained_at(k) is not None] == [int(k) for k in trained]
    if masks == "every":
        assert all(cascade._mask_head_trained_at(k) is cascade.mask_heads[k] for k in range(3))


def test_later_stages_see_what_the_stage_before_hands_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling all, in mmdetection's way: ground truth is added anew at each stage, and only once."""
    model = tiny_model(masks="none", roi_samples=10**6)
    images, targets_ = squares()
    seen: list[Samples] = []
    inner = Stage.sample

    def sample(self: Stage, *arguments: Any) -> Samples:
        seen.append(inner(self, *arguments))
        return seen[-1]

    monkeypatch.setattr(Stage, "sample", sample)
    model.loss(images, targets_)
    assert [int(samples.is_truth.sum()) for samples in seen] == [4, 4, 4]
    first, second = (samples.valid.sum(1) for samples in seen[:2])
    assert (second <= first).all() and (second > 10).all()


def test_rows_in_use_end_with_the_last_valid_one() -> None:
    valid = torch.zeros(2, 6, dtype=torch.bool)
    assert rows_in_use(valid) == 1 and rows_in_use(valid[:, :0]) == 0
    valid[0, 1] = valid[1, 3] = True
    assert rows_in_use(valid) == 4


def test_names_in_checkpoints_have_no_stages() -> None:
    names = {name.split(".")[1] for name in tiny_model(masks="every").state_dict() if name.startswith("cascade.")}
    assert names == {"box_heads", "mask_heads"}


def test_the_class_that_moves_a_box_is_never_the_background() -> None:
    assert most_likely(torch.tensor([[[0.1, 0.3, 0.2, 9.0]]])).tolist() == [[1]]


def test_the_background_is_no_detection() -> None:
    cascade = tiny_model(masks="none").cascade
    probabilities = torch.tensor([[[0.2, 0.1, 0.3, 0.4], [0.01, 0.01, 0.01, 0.97], [0.9, 0.05, 0.05, 0.0]]])
    found = cascade._select(probabilities, BOXES[None, [0, 2, 3]], torch.ones(1, 3, dtype=torch.bool))
    best = found.valid[0] & (found.scores[0] > 0.25)
    assert found.scores[0, best].tolist() == pytest.approx([0.9, 0.3]) and found.labels[0, best].tolist() == [0, 2]


def test_mask_losses_are_weighted() -> None:
    model = tiny_model(masks="every")
    images, targets_ = squares()
    losses = []
    for weight in (1.0, 0.5):
        for one in model.cascade.stages:
            one.details = dataclasses.replace(one.details, mask_weight=weight)
        torch.manual_seed(0)
        losses.append(model.loss(images, targets_))
    for k in range(3):
        assert losses[0][f"s{k}.mask"] > 0
        torch.testing.assert_close(losses[1][f"s{k}.mask"], 0.5 * losses[0][f"s{k}.mask"])


@pytest.mark.parametrize("training", [True, False])
def test_each_stage_begins_where_the_stage_before_has_moved_the_boxes(
    monkeypatch: pytest.MonkeyPatch, training: bool
) -> None:
    model = tiny_model(masks="none", semantics="detectron2", roi_samples=10**6)  # which hands on all samples in order
    for head in model.cascade.box_heads:
        torch.nn.init.zeros_(head.deltas.weight)
        head.deltas.bias.data[0] = 1.0  # a tenth of its width to the right, or less in later stages
    images, targets_ = squares(images=1)
    seen: list[Tensor] = []
    inner = model.cascade._run_stage

    def run_stage(k: int, pyramid: list[Tensor], boxes: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(boxes[valid])
        return inner(k, pyramid, boxes, valid)

    monkeypatch.setattr(model.cascade, "_run_stage", run_stage)
    model.train(training).loss(images, targets_) if training else model.eval().detect(images)
    assert len(seen) == 3
    inside = seen[0][:, 2] < 100  # neither clipped now nor in the next stage
    first = seen[0][inside]
    moved = first + (first[:, 2] - first[:, 0])[:, None] * torch.tensor([0.1, 0, 0.1, 0])
    assert len(first) > 5
    assert all(((seen[1] - box).abs().amax(dim=1) < 1e-2).any() for box in moved)
    assert not torch.equal(seen[1], seen[2])


def test_batch_norm_of_a_box_head_does_not_count_padding() -> None:
    model = tiny_model(box_head="4conv1fc_bn", masks="none")
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(2, 32, 128 // s, 128 // s, generator=generator) for s in (4, 8, 16, 32)]
    boxes = torch.rand(2, 5, 4, generator=generator) * 40 + torch.tensor([0.0, 0.0, 60.0, 60.0])
    valid = torch.tensor([[True, True, True, True, True], [True, False, True, False, False]])
    head = model.cascade.box_heads[0]
    alone = copy.deepcopy(head)
    wanted = alone(model.cascade._pool(features, boxes, valid).flatten(0, 1)[valid.flatten()])
    found = model.cascade._run_stage(0, features, boxes, valid)
    for ours, theirs in zip(found, wanted):
        torch.testing.assert_close(ours[valid], theirs)
        assert not ours[~valid].any()
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(head.state_dict()[name], value)
    logits, deltas = model.cascade._run_stage(0, features, boxes, torch.zeros_like(valid))
    (logits.sum() + deltas.sum()).backward()  # no box at all: still a step
    assert all(p.grad is not None for p in head.parameters())


BATCH_NORMS = {"norm": "batch", "fpn_and_mask_norms": True, "box_head": "4conv1fc_bn"}


def test_batch_norm_of_a_mask_head_does_not_count_padding() -> None:
    model = tiny_model(**BATCH_NORMS)
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(2, 32, 128 // s, 128 // s, generator=generator) for s in (4, 8, 16, 32)]
    boxes = torch.rand(2, 3, 4, generator=generator) * 40 + torch.tensor([0.0, 0.0, 60.0, 60.0])
    labels = torch.tensor([[0, 1, 2], [1, 0, 0]])
    targets = (torch.rand(2, 3, 28, 28, generator=generator) > 0.5).float()
    valid = torch.tensor([[True, False, True], [True, False, False]])
    (head,) = model.cascade.mask_heads
    alone, x = copy.deepcopy(head), model.cascade._pool(features, boxes, valid, size=14).flatten(0, 1)
    logits = alone(x[valid.flatten()])[torch.arange(3), labels[valid]]
    wanted = F.binary_cross_entropy_with_logits(logits, targets[valid])
    found = model.cascade._mask_loss(head, features, MaskSamples(boxes, labels, valid, targets))
    torch.testing.assert_close(found, wanted)
    before = copy.deepcopy(head.state_dict())
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(before[name], value)
    none = model.cascade._mask_loss(head, features, MaskSamples(boxes, labels, torch.zeros_like(valid), targets))
    none.backward()  # no object at all: still a step, and nothing is learnt of masks
    assert none == 0 and all(p.grad is not None and not p.grad.any() for p in head.parameters())
    for name, value in head.state_dict().items():
        assert name.endswith("num_batches_tracked") or torch.equal(value, before[name])


@torch.no_grad()
def test_batch_norms_of_fpn_and_mask_heads_are_folded_for_inference() -> None:
    model = tiny_model(**BATCH_NORMS, masks="every", score_threshold=0.0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(value, 0.5, 0.2)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    images, _ = squares()
    plain = model.eval().detect(images)
    folded = copy.deepcopy(model).optimize_for_inference()
    assert not folded.fpn.lateral_norm and not folded.fpn.output_norm and not folded.cascade.mask_heads[0].norms  # type: ignore[union-attr]
    found = folded.detect(images)
    torch.testing.assert_close(found.scores, plain.scores, rtol=1e-3, atol=1e-4)
    assert found.masks is not None and plain.masks is not None
    torch.testing.assert_close(found.masks, plain.masks, rtol=1e-3, atol=1e-3)


def test_fpn_and_mask_norms_ask_for_batch_norm() -> None:
    with pytest.raises(ConfigError, match=r"fpn_and_mask_norms with model.norm frozen_statistics: give batch"):
        ModelConfig(fpn_and_mask_norms=True)


@pytest.mark.filterwarnings("ignore:`create_unbacked_symint`:FutureWarning")  # torchvision calls it
def test_exported_masks_are_those_of_the_boxes_that_are_found() -> None:
    """All of them, some, one, and none."""
    cascade = tiny_model(masks="every").eval().cascade

    class Masks(torch.nn.Module):
        def forward(self, p2: Tensor, p3: Tensor, p4: Tensor, p5: Tensor, boxes: Tensor, valid: Tensor) -> Tensor:
            labels = torch.arange(10).view_as(valid) % 3
            return cascade._masks([p2, p3, p4, p5], RawDetections(boxes, valid.float(), labels, valid))

    pyramid = [torch.rand(2, 32, 48 // stride, 48 // stride) for stride in (1, 2, 4, 8)]
    corner = 100 * torch.rand(2, 5, 2)
    boxes, valid = torch.cat((corner, corner + 30 + 60 * torch.rand(2, 5, 2)), dim=2), torch.ones(2, 5).bool()
    with torch.no_grad():
        program = torch.export.export(Masks(), (*pyramid, boxes, valid), strict=False).module()
        for found in ((5, 5), (1, 4), (1, 0), (0, 0)):
            valid = torch.arange(5) < torch.tensor(found)[:, None]
            mine, theirs = program(*pyramid, boxes, valid), Masks()(*pyramid, boxes, valid)
            assert mine.shape == theirs.shape == (2, 5, 28, 28)
            torch.testing.assert_close(mine[valid], theirs[valid], rtol=1e-4, atol=1e-5)
            assert sum(found) == 0 or float(mine[valid].std()) > 0
