"""bfloat16 for the network, float32 for everything about boxes: autocast on a CPU, as ``optim.py`` uses it on GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torchvision.ops import box_iou

from cascade_rcnn.benchmark.stopwatch import seed_weights
from cascade_rcnn.models import boxes, cascade, detectron_rules, matching, postprocess, rpn
from cascade_rcnn.models.cascade_rcnn import CascadeRCNN
from cascade_rcnn.models.mask_head import mask_targets
from cascade_rcnn.models.ops.roi_align import roi_align_rows
from cascade_rcnn.models.ops.roi_sampling import Sampling
from cascade_rcnn.models.ops.winograd import WinogradConv2d
from tiny import squares, tiny_model

# Where a function is looked up, and its name.
ARITHMETIC = [
    (rpn, "decode_boxes"),
    (rpn, "encode_boxes"),
    (rpn, "clip_boxes"),
    (rpn, "nms_keep"),
    (rpn, "smooth_l1"),
    (cascade, "decode_boxes"),
    (cascade, "encode_boxes"),
    (cascade, "clip_boxes"),
    (cascade, "smooth_l1"),
    (cascade, "select_detections"),
    (detectron_rules, "clip_to_last_pixel"),
    (detectron_rules, "scale_boxes"),
    (matching, "pairwise_iou"),
    (matching, "pairwise_iof"),
    (postprocess, "batched_nms"),
    (torch.nn.functional, "cross_entropy"),
    (torch.nn.functional, "binary_cross_entropy_with_logits"),
    (boxes, "box_area"),
    (cascade, "mask_targets"),
]
AT_TEST = {
    "rpn.decode_boxes",
    "rpn.nms_keep",
    "cascade.decode_boxes",
    "cascade.select_detections",
    "postprocess.batched_nms",
}
CLIPPING = {"rpn.clip_boxes", "cascade.clip_boxes"}
DETECTRON = {"detectron_rules.clip_to_last_pixel", "detectron_rules.scale_boxes"}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[torch.dtype]]:
    """Floating types that went into and came out of the arithmetic of boxes and losses, by function."""
    found: dict[str, set[torch.dtype]] = {}

    def watch(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            values = result._map(lambda t: t) if hasattr(result, "_map") else result
            tensors = tree_leaves((args, kwargs, vars(values) if hasattr(values, "__dict__") else values))
            found.setdefault(name, set()).update(
                t.dtype for t in tensors if isinstance(t, Tensor) and t.is_floating_point()
            )
            return result

        return watched

    for module, name in ARITHMETIC:
        label = f"{module.__name__.rpartition('.')[2]}.{name}"
        monkeypatch.setattr(module, name, watch(label, getattr(module, name)))
    return found


def heads_see(model: CascadeRCNN) -> set[torch.dtype]:
    """Types of what the network's own layers give."""
    types: set[torch.dtype] = set()
    for part in (model.backbone, model.fpn, *model.cascade.box_heads, *model.cascade.mask_heads):
        part.register_forward_hook(lambda _, __, out: types.update(t.dtype for t in tree_leaves(out)))
    return types


@pytest.mark.parametrize("semantics", ["mmdetection", "detectron2", "paper", "torchvision"])
def test_boxes_and_losses_are_float32(seen: dict[str, set[torch.dtype]], semantics: str) -> None:
    model = tiny_model(semantics=semantics, masks="every", norm="batch")
    types = heads_see(model)
    images, targets = squares()
    targets.ignore[:, -1] = True
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.loss(images, targets)
    assert torch.bfloat16 in types
    assert {name: kinds for name, kinds in seen.items() if kinds != {torch.float32}} == {}
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert len(seen) >= 12
    torch.stack(list(losses.values())).sum().backward()
    assert {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None} == {torch.float32}


@pytest.mark.parametrize("semantics", ["mmdetection", "detectron2", "paper", "torchvision"])
def test_detections_are_float32(seen: dict[str, set[torch.dtype]], semantics: str) -> None:
    model = tiny_model(semantics=semantics, masks="one").eval()
    types = heads_see(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.detect(squares()[0])
    assert torch.bfloat16 in types
    assert {name: kinds for name, kinds in seen.items() if kinds != {torch.float32}} == {}
    assert set(seen) >= AT_TEST | (DETECTRON if semantics == "paper" else CLIPPING)
    assert found.masks is not None
    assert found.boxes.dtype == found.scores.dtype == found.masks.dtype == torch.float32


def test_losses_are_near_those_of_float32() -> None:
    model = tiny_model(masks="every")
    images, targets = squares()
    values = []
    for half in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            values.append(torch.stack(list(model.loss(images, targets).values())).detach())
    assert not torch.equal(*values)
    torch.testing.assert_close(values[1], values[0], rtol=0.05, atol=0.02)


def test_detections_are_near_those_of_float32() -> None:
    """Seeded weights, whose scores spread; the best 30 of an image, as the last ones live by the luck of rounding."""
    model = tiny_model(masks="one").eval()
    seed_weights(model)
    images, _ = squares()
    plain = model.detect(images)
    with torch.autocast("cpu", torch.bfloat16):
        half = model.detect(images)
    assert not torch.equal(plain.scores, half.scores) and plain.valid[:, :30].all()
    near = []
    for b in range(len(images)):
        overlap = box_iou(plain.boxes[b, :30], half.boxes[b]) > 0.8
        same = plain.labels[b, :30, None] == half.labels[b]
        score = (plain.scores[b, :30, None] - half.scores[b]).abs() < 0.05
        near.append((overlap & same & score).any(dim=1))
    assert torch.cat(near).float().mean() >= 0.9


def test_mask_targets_do_not_depend_on_autocast() -> None:
    images, targets = squares()
    assert targets.masks is not None
    targets.masks.pixels = torch.randint(0, 2, targets.masks.pixels.shape, dtype=torch.uint8)
    corner, side = torch.rand(2, 200, 2) * 60, torch.rand(2, 200, 2) * 60 + 4
    arguments = (targets.masks, torch.cat((corner, corner + side), dim=2), torch.randint(0, 2, (2, 200)), images.sizes)
    expected = mask_targets(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mask_targets(*arguments), expected)
    assert 0 < expected.mean() < 1


def test_weights_kept_in_bfloat16_give_what_autocast_gives() -> None:
    """On a CPU; no layer is Winograd's, whose transforms need float32. Boxes, scores and masks come in float32."""
    images, _ = squares()
    plain, kept = (tiny_model(masks="last", fpn_channels=192).eval() for _ in range(2))
    for model in (plain, kept):
        seed_weights(model)
    kept.optimize_for_inference(bfloat16=True)
    layers = [m for m in kept.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.Linear))]
    assert {layer.weight.dtype for layer in layers} == {torch.bfloat16}
    assert not any(isinstance(module, WinogradConv2d) for module in kept.modules())
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        features, expected = kept.pyramid(images), plain.pyramid(images)
        found = kept.detect(images)
    assert {feature.dtype for feature in features} == {torch.bfloat16}
    for one, other in zip(features, expected):
        scale = float(other.float().std())
        assert float((one.float() - other.float()).square().mean().sqrt()) < 0.03 * scale
    assert found.masks is not None
    assert {found.boxes.dtype, found.scores.dtype, found.masks.dtype} == {torch.float32}


def test_winograd_stays_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(192, 192, 3, padding=1).requires_grad_(False)
    x = torch.randn(1, 192, 12, 16).bfloat16()
    exact = conv(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        made = WinogradConv2d(conv)(x)
    assert made.dtype == torch.bfloat16
    assert float((made.float() - exact).abs().max()) <= 2**-8 * float(exact.abs().max())  # rounded once


def test_roi_align_of_bfloat16_features_sums_in_float32() -> None:
    torch.manual_seed(0)
    features = [torch.randn(1, 64, 200 // s, 272 // s).contiguous(memory_format=torch.channels_last) for s in (1, 2)]
    corner = torch.rand(1, 50, 2) * 400
    boxes = torch.cat((corner, corner + torch.rand(1, 50, 2) * 400), dim=2)
    sampling = Sampling(7, (4, 8))
    exact = roi_align_rows([f.bfloat16().float() for f in features], boxes, sampling)
    half = roi_align_rows([f.bfloat16() for f in features], boxes, sampling)
    assert half.dtype == torch.bfloat16
    error = (half.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 3.5e-3  # rounding the result alone gives 1.7e-3; sums in bfloat16 would give 1e-2
