"""The whole network: losses, gradients, batches, overfitting."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torchvision.ops import box_iou

from cascade_rcnn.structures import ImageBatch, Targets
from tiny import squares, tiny_model

SEMANTICS = ("mmdetection", "detectron2", "paper", "torchvision")


def one(images: ImageBatch, b: int) -> ImageBatch:
    return dataclasses.replace(
        images, **{name: getattr(images, name)[b : b + 1] for name in ("pixels", "sizes", "original_sizes")}
    )


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("masks", ["every", "one"])
def test_every_trainable_parameter_receives_a_gradient(semantics: str, empty: bool, masks: str) -> None:
    model = tiny_model(semantics=semantics, masks=masks)
    torch.stack(list(model.loss(*squares(empty=empty)).values())).sum().backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    broken = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    assert not without and not broken


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_an_image_without_objects_has_exactly_no_box_and_mask_loss(semantics: str) -> None:
    losses = tiny_model(semantics=semantics).loss(*squares(empty=True))
    for name, value in losses.items():
        if name.endswith(("box", "mask")):
            assert value.item() == 0.0, name
        else:
            assert value.item() > 0.0, name


def test_losses_have_the_documented_names() -> None:
    names = set(tiny_model(masks="every").loss(*squares()))
    assert names == {"rpn_cls", "rpn_box", *(f"s{k}.{part}" for k in range(3) for part in ("cls", "box", "mask"))}
    one_stage = tiny_model(stage_ious=(0.5,), masks="none")
    assert set(one_stage.loss(*squares())) == {"rpn_cls", "rpn_box", "s0.cls", "s0.box"}


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_a_batch_of_two_detects_what_two_batches_of_one_do(semantics: str) -> None:
    model = tiny_model(semantics=semantics, score_threshold=0.01).eval()
    for layer in (model.rpn.objectness, *(head.classifier for head in model.cascade.box_heads)):
        layer.weight.data.mul_(50)  # scores far apart, so that rounding seldom changes their order
    images, _ = squares()
    images.sizes[1] = torch.tensor([90, 128])  # as if padded: the rest of the image is not looked at
    both = model.detect(images)
    for b in range(2):
        alone = model.detect(one(images, b))
        count = int(alone.valid[0].sum())
        assert both.valid[b].sum() == count > 20
        torch.testing.assert_close(both.scores[b], alone.scores[0], rtol=1e-3, atol=1e-4)
        same = (both.labels[b] == alone.labels[0, :count, None]) & both.valid[b]
        found = (box_iou(alone.boxes[0, :count], both.boxes[b]) * same).amax(dim=1) > 0.99
        assert found.sum() >= 0.97 * count


def test_the_loss_of_twice_the_same_image_is_that_of_one() -> None:
    # Every anchor and RoI takes part, so that nothing is random.
    model = tiny_model(rpn_samples=10**6, roi_samples=10**6, masks="every")
    images, targets = squares(images=1)
    single = model.loss(images, targets)
    assert targets.masks is not None
    masks = dataclasses.replace(
        targets.masks,
        **{name: getattr(targets.masks, name).repeat_interleave(2, 0) for name in ("offsets", "origins", "sizes")},
    )
    rows = ("boxes", "labels", "valid", "ignore")
    twice = Targets(*(getattr(targets, name).repeat_interleave(2, 0) for name in rows), masks)
    parts = ("pixels", "sizes", "original_sizes")
    images = ImageBatch(*(getattr(images, name).repeat_interleave(2, 0) for name in parts))
    double = model.loss(images, twice)
    for name, value in single.items():
        torch.testing.assert_close(double[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_two_images_are_learnt_by_heart() -> None:
    model = tiny_model()
    images, targets = squares()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    first = last = 0.0
    for _ in range(120):
        loss = torch.stack(list(model.loss(images, targets).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = first or loss.item(), loss.item()
    assert last < 0.05 * first
    found = model.eval().detect(images)
    for b in range(2):
        kept = found.valid[b] & (found.scores[b] > 0.5)
        assert found.labels[b, kept].sort().values.tolist() == [0, 1]
        iou = box_iou(targets.boxes[b, :2], found.boxes[b, kept])
        assert iou.amax(dim=1).min() > 0.85
        assert found.masks is not None and (found.masks[b, kept] > 0.5).float().mean() > 0.9


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_stopping_after_a_stage_uses_the_first_stages_only(stages: int) -> None:
    model = tiny_model(stop_after_stage=stages, score_threshold=0.01).eval()
    for head in model.cascade.box_heads[stages:]:
        torch.nn.init.constant_(head.classifier.weight, float("nan"))  # would spoil everything if it were used
    found = model.detect(squares()[0])
    assert found.scores.isfinite().all() and found.valid.any()


def test_five_stages_learn_and_vote() -> None:
    ious = (0.4, 0.5, 0.6, 0.7, 0.8)
    model = tiny_model(stage_ious=ious, masks="none", score_threshold=0.0)
    assert [stage.details.iou for stage in model.cascade.stages] == list(ious)
    losses = model.loss(*squares())
    for k, head in enumerate(model.cascade.box_heads):
        parameters = [head.classifier.weight, head.deltas.weight]
        own = torch.autograd.grad(losses[f"s{k}.cls"] + losses[f"s{k}.box"], parameters, retain_graph=True)
        assert all(gradient.any() for gradient in own), "each stage learns from its own loss"
    images, _ = squares()
    before = model.eval().detect(images).scores
    for k in range(5):
        classifier = model.cascade.box_heads[k].classifier
        kept = classifier.bias.detach().clone()
        classifier.bias.data[0] += 5.0
        assert not torch.allclose(model.detect(images).scores, before), f"stage {k} has a say in the scores"
        classifier.bias.data.copy_(kept)


@pytest.mark.parametrize("agnostic", [True, False])
@pytest.mark.parametrize("stages", [(0.5,), (0.5, 0.6, 0.7)])
def test_class_specific_boxes_train_and_detect(agnostic: bool, stages: tuple[float, ...]) -> None:
    model = tiny_model(class_agnostic_boxes=agnostic, stage_ious=stages, score_threshold=0.01)
    assert model.cascade.box_heads[0].deltas.out_features == (4 if agnostic else 12)
    torch.stack(list(model.loss(*squares()).values())).sum().backward()
    assert model.eval().detect(squares()[0]).valid.any()


def test_padding_is_zero_after_normalisation_and_colours_are_in_order() -> None:
    images, _ = squares()
    images.sizes[0] = torch.tensor([100, 80])
    for semantics in ("mmdetection", "detectron2"):
        model = tiny_model(semantics=semantics)
        x = model.normalize(images)
        assert (x[0, :, 100:] == 0).all() and (x[0, :, :, 80:] == 0).all() and (x[1] != 0).any()
        red = (images.pixels[1, 0, 5, 5].float() - 123.675) / (58.395 if semantics == "mmdetection" else 1.0)
        assert x[1, 0 if semantics == "mmdetection" else 2, 5, 5].item() == pytest.approx(red.item(), rel=1e-5)


def test_optimizing_for_inference_changes_nothing() -> None:
    model = tiny_model(backbone="resnet18.tv_in1k", norm="frozen_statistics", score_threshold=0.01).eval()
    for module in model.backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.8, 1.2)
    images, _ = squares()
    before = [feature.clone() for feature in model.pyramid(images)]
    detections = model.detect(images)
    model.optimize_for_inference()
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.backbone.modules())
    for a, b in zip(before, model.pyramid(images)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model.detect(images).scores, detections.scores, rtol=1e-3, atol=1e-4)


def test_ignored_regions_are_no_negatives() -> None:
    model = tiny_model(masks="none", rpn_samples=10**6, roi_samples=10**6)
    images, targets = squares(empty=True)
    with_background = model.loss(images, targets)
    targets.boxes[:, 0] = torch.tensor([-500.0, -500, 700, 700])
    targets.ignore[:, 0] = True
    without = model.loss(images, targets)
    assert with_background["rpn_cls"] > 0 and without["rpn_cls"] == 0
    assert without["s0.cls"] == 0


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for on in (False, True):
        model = tiny_model(masks="none", norm="frozen")
        model.set_activation_checkpointing(on)
        torch.manual_seed(3)
        torch.stack(list(model.loss(*squares()).values())).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("box_head", ["2fc", "4conv1fc", "4conv1fc_gn"])
def test_other_heads_train_and_detect(box_head: str) -> None:
    model = tiny_model(box_head=box_head, rpn_convs=2, masks="none", score_threshold=0.01)
    torch.stack(list(model.loss(*squares()).values())).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert model.eval().detect(squares()[0]).valid.any()


def test_the_papers_ensemble_classifies_the_last_boxes() -> None:
    model = tiny_model(semantics="paper", masks="none", score_threshold=0.0, nms_iou=1.0, max_detections=30).eval()
    images, _ = squares(images=1)
    pyramid = model.pyramid(images)
    proposals = model.rpn.propose(pyramid, images.sizes)
    boxes = proposals.boxes
    for k in range(2):
        _, deltas = model.cascade._run_stage(k, pyramid, boxes, proposals.valid)
        boxes = model.cascade.stages[k].move(deltas, boxes, deltas, images.sizes)
    classified = [model.cascade._run_stage(k, pyramid, boxes, proposals.valid)[0].softmax(-1) for k in range(3)]
    expected = torch.stack(classified).mean(0)[0, proposals.valid[0], :-1].flatten().sort(descending=True).values[:30]
    torch.testing.assert_close(model.detect(images).scores[0], expected, rtol=1e-4, atol=1e-5)
