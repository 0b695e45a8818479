"""torchvision's Faster and Mask R-CNN, v1 and v2, give the same detections after conversion."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from cascade_rcnn.checkpoint import Checkpoint, load_checkpoint
from cascade_rcnn.convert.checkpoint import run_convert
from cascade_rcnn.errors import CheckpointError
from cascade_rcnn.models.build import build_model
from cascade_rcnn.structures import ImageBatch

CLASSES = 3


def convert(folder: Path, state: dict[str, Tensor]) -> Checkpoint:
    torch.save(state, folder / "source.pth")
    run_convert(folder / "source.pth", folder / "dest.safetensors")
    return load_checkpoint(folder / "dest.safetensors")


def torchvision_model(masks: bool) -> nn.Module:
    detection = torchvision.models.detection
    torch.manual_seed(1)
    backbone = detection.backbone_utils.resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    kind = detection.MaskRCNN if masks else detection.FasterRCNN
    faster = detection.faster_rcnn
    model: nn.Module = kind(
        backbone,
        min_size=96,
        max_size=160,
        box_head=faster.TwoMLPHead(256 * 49, 64),
        box_predictor=faster.FastRCNNPredictor(64, CLASSES + 1),
        **({"mask_predictor": detection.mask_rcnn.MaskRCNNPredictor(256, 256, CLASSES + 1)} if masks else {}),
    )
    nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.5)
    nn.init.normal_(model.roi_heads.box_predictor.bbox_pred.weight, std=0.05)
    return model.eval()


def torchvision_v2_model(masks: bool) -> nn.Module:
    """torchvision's v2 detector as its own function puts it together, on a ResNet-18; random norms."""
    torch.manual_seed(3)
    with pytest.MonkeyPatch.context() as patch:
        for module in (torchvision.models.detection.faster_rcnn, torchvision.models.detection.mask_rcnn):
            patch.setattr(module, "resnet50", torchvision.models.resnet18)
        make = getattr(torchvision.models.detection, f"{'mask' if masks else 'faster'}rcnn_resnet50_fpn_v2")
        model: nn.Module = make(weights=None, weights_backbone=None, num_classes=CLASSES + 1, min_size=96, max_size=160)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.eps == 1e-5
            nn.init.normal_(norm.running_mean, std=0.1)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.1)
    nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.1)
    nn.init.normal_(model.roi_heads.box_predictor.bbox_pred.weight, std=0.02)
    return model.eval()


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("version", [1, 2])
def test_torchvision_gives_the_same_detections(tmp_path: Path, version: int, masks: bool) -> None:
    theirs = torchvision_model(masks) if version == 1 else torchvision_v2_model(masks)
    made = convert(tmp_path, theirs.state_dict())
    model = made.config.model
    assert (model.semantics, model.backbone, model.stage_ious) == ("torchvision", "resnet18.tv_in1k", (0.5,))
    assert not model.class_agnostic_boxes and model.masks == ("every" if masks else "none")
    assert (model.rpn_convs, model.box_head) == ((1, "2fc") if version == 1 else (2, "4conv1fc"))
    ours = build_model(model, CLASSES).eval()
    ours.load_state_dict(made.state)
    pixels = torch.randint(0, 256, (1, 3, 96, 160), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    seen: dict[str, Tensor] = {}
    if masks:
        theirs.roi_heads.mask_predictor.register_forward_hook(lambda _, inputs, output: seen.update(logits=output))
    with torch.no_grad():
        wanted = theirs([pixels[0] / 255])[0]
        found = ours.detect(ImageBatch(pixels, torch.tensor([[96, 160]]), torch.tensor([[96, 160]])))
    count = int(found.valid.sum())
    assert len(wanted["scores"]) > 5
    assert abs(count - len(wanted["scores"])) <= 1
    iou = torchvision.ops.box_iou(found.boxes[0][found.valid[0]], wanted["boxes"])
    same = (iou > 0.99) & (found.labels[0][found.valid[0]][:, None] == wanted["labels"][None] - 1)
    scores = found.scores[0][found.valid[0]]
    same &= (scores[:, None] - wanted["scores"][None]).abs() < 1e-4
    if masks:
        assert found.masks is not None
        in_boxes = seen["logits"].sigmoid()[torch.arange(len(wanted["labels"])), wanted["labels"]]  # [D, 28, 28]
        difference = found.masks[0][found.valid[0]][:, None] - in_boxes[None]
        same &= difference.abs().amax(dim=(2, 3)) < 1e-3
    assert same.any(dim=1).sum() >= 0.98 * count  # a box at the edge of a threshold may fall on its other side


def test_torchvisions_old_names(tmp_path: Path) -> None:
    new = torchvision_model(True).state_dict()
    renames = [
        (r"(inner_blocks|layer_blocks)\.(\d)\.0\.", r"\1.\2."),
        (r"head\.conv\.0\.0\.", "head.conv."),
        (r"mask_head\.(\d)\.0\.", lambda match: f"mask_head.mask_fcn{int(match[1]) + 1}."),
    ]
    old = {}
    for key, value in new.items():
        for pattern, replacement in renames:
            key = re.sub(pattern, replacement, key)  # type: ignore[call-overload]
        if not key.endswith("num_batches_tracked"):
            old[key] = value
    assert set(old) != set(new)
    for name in "ab":
        (tmp_path / name).mkdir()
    first, second = convert(tmp_path / "a", old), convert(tmp_path / "b", new)
    assert all(torch.equal(first.state[key], value) for key, value in second.state.items())


def test_ninety_one_torchvision_classes_keep_cocos_ids(tmp_path: Path) -> None:
    state = torchvision_model(False).state_dict()
    for name, rows in (("cls_score", 91), ("bbox_pred", 364)):
        for part in ("weight", "bias"):
            key = f"roi_heads.box_predictor.{name}.{part}"
            state[key] = torch.zeros(rows, *state[key].shape[1:])
    made = convert(tmp_path, state)
    assert made.class_names[:2] == ("person", "bicycle") and made.class_names[11] == "unused 12"
    assert made.class_names[89] == "toothbrush" and made.category_ids == tuple(range(1, 91))


@torch.no_grad()
def test_torchvisions_coco_weights_run_without_eps(tmp_path: Path) -> None:
    theirs = torchvision_model(False)
    predictor = torchvision.models.detection.faster_rcnn.FastRCNNPredictor(64, 91)
    theirs.roi_heads.box_predictor = predictor
    frozen = [norm for norm in theirs.modules() if isinstance(norm, torchvision.ops.FrozenBatchNorm2d)]
    for norm in frozen:  # as torchvision's own function does for weights=COCO_V1
        norm.eps = 0.0
        nn.init.uniform_(norm.running_var, 2e-5, 1e-4)
        norm.weight *= norm.running_var.sqrt()
    made = convert(tmp_path, theirs.state_dict())
    ours = build_model(made.config.model, 90).eval()
    ours.load_state_dict(made.state)
    image = torch.rand(1, 3, 64, 64)
    wanted = theirs.backbone(image)
    found = ours.fpn(ours.backbone(image))
    assert len(frozen) == 20 and len(found) == 5
    for feature, value in zip(found, wanted.values()):
        assert torch.allclose(feature, value, rtol=1e-4, atol=1e-4 * float(value.abs().max()))


@pytest.mark.parametrize("part", ["running_var", "running_mean", "weight", "size"])
def test_a_norm_that_is_not_whole_is_named(tmp_path: Path, part: str) -> None:
    state = dict(torchvision_v2_model(False).state_dict())
    norm = "roi_heads.box_head.2.1."
    if part == "size":
        state[norm + "bias"] = torch.zeros(3)
    else:
        del state[norm + part]
    with pytest.raises(CheckpointError, match=rf"behind cascade\.box_heads\.0\.convs\.2\.0 is not whole \(.*{part}"):
        convert(tmp_path, state)
    assert not (tmp_path / "dest.safetensors").exists()
