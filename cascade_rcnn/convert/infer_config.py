"""What a converted checkpoint's configuration must be: seen in the weights, read in the metadata's own config text.

The text (mmdetection keeps its whole config in the checkpoint) is Python; only its syntax tree is looked at.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from cascade_rcnn.convert.key_tables import Format
from cascade_rcnn.errors import CheckpointError

_MAX_TEXT = 2_000_000
_BLOCKS: dict[tuple[str, tuple[int, ...]], int] = {
    ("basic", (2, 2, 2, 2)): 18,
    ("basic", (3, 4, 6, 3)): 34,
    ("bottleneck", (3, 4, 6, 3)): 50,
    ("bottleneck", (3, 4, 23, 3)): 101,
    ("bottleneck", (3, 8, 36, 3)): 152,
}
# (depth, groups, channels per group in the first stage's 3x3) to timm's name, with weights of the kind that was used.
_TIMM = {
    (18, 1, 64): "resnet18.tv_in1k",
    (34, 1, 64): "resnet34.tv_in1k",
    (50, 1, 64): "resnet50.tv_in1k",
    (101, 1, 64): "resnet101.tv_in1k",
    (152, 1, 64): "resnet152.tv_in1k",
    (50, 32, 4): "resnext50_32x4d.tv_in1k",
    (101, 32, 4): "resnext101_32x4d.gluon_in1k",
    (101, 32, 8): "resnext101_32x8d.tv_in1k",
    (101, 64, 4): "resnext101_64x4d.tv_in1k",
    (50, 1, 128): "wide_resnet50_2.tv_in1k",
    (101, 1, 128): "wide_resnet101_2.tv_in1k",
}


@dataclass(frozen=True)
class Structure:
    """What the weights show."""

    backbone: str
    depth: int
    groups: int
    group_width: int
    stages: int
    classes: int
    model: dict[str, Any]  # fields of ModelConfig


@dataclass
class Preprocessing:
    """How the owner normalises images: mean and std in the order of its channels."""

    bgr: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass
class Hints:
    """What the metadata's config text says; empty without one."""

    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None
    found: bool = False


def backbone_of(state: Mapping[str, Tensor]) -> tuple[str, int, int, int]:
    """timm's name, depth, groups and channels per group from our keys (with or without ``backbone.body.``)."""
    keys = {key.removeprefix("backbone.body."): value for key, value in state.items()}
    counts = []
    for stage in range(1, 5):
        blocks = {int(match[1]) for key in keys if (match := re.match(rf"layer{stage}\.(\d+)\.", key))}
        counts.append(len(blocks))
    kind = "bottleneck" if "layer1.0.conv3.weight" in keys else "basic"
    depth = _BLOCKS.get((kind, tuple(counts)))
    conv = keys.get("layer1.0.conv2.weight")
    if depth is None or conv is None:
        raise CheckpointError(
            f"its backbone has {counts} {kind} blocks, which is no ResNet or ResNeXt known here; "
            "only those can be converted"
        )
    per_group = int(conv.shape[1])
    groups = int(conv.shape[0]) // per_group
    name = _TIMM.get((depth, groups, per_group))
    if name is None:
        raise CheckpointError(
            f"its backbone is a ResNet-{depth} with {groups} groups of {per_group} channels, which timm does not have"
        )
    return name, depth, groups, per_group


def structure_of(state: Mapping[str, Tensor], source: Format) -> Structure:
    """Depth, stages, classes, masks and widths from our keys. Raises CheckpointError for parts without counterpart."""
    name, depth, groups, per_group = backbone_of(state)
    stages = _count(state, r"cascade\.box_heads\.(\d)\.classifier\.weight")
    mask_heads = _count(state, r"cascade\.mask_heads\.(\d)\.logits\.weight")
    required = (
        "fpn.lateral.0.weight",
        "rpn.objectness.weight",
        "cascade.box_heads.0.classifier.weight",
        "cascade.box_heads.0.fc1.weight",
        "cascade.box_heads.0.deltas.weight",
    )
    for key in required:
        if key not in state:
            raise CheckpointError(f"it has nothing for {key}: not a two-stage detector with an FPN and linear heads")
    classes = int(state["cascade.box_heads.0.classifier.weight"].shape[0]) - 1
    masks = "none"
    if mask_heads:
        masks = "every" if mask_heads == stages else {"detectron2": "one", "detectron": "last"}.get(source, "one")
    delta_rows = int(state["cascade.box_heads.0.deltas.weight"].shape[0])
    model: dict[str, Any] = {
        "backbone": name,
        "fpn_channels": int(state["fpn.lateral.0.weight"].shape[0]),
        "head_channels": int(state["cascade.box_heads.0.fc1.weight"].shape[0]),
        "class_agnostic_boxes": delta_rows == 4 and (classes > 1 or stages > 1),  # one class: both are the same
        "rpn_convs": max(1, _count(state, r"rpn\.conv\.(\d)\.weight")),
        "box_head": _box_head(state),
        "stage_ious": tuple(round(min(0.5 + 0.1 * k, 0.9), 1) for k in range(stages)),
        "masks": masks,
    }
    if "fpn.lateral_norm.0.weight" in state:
        model["norm"] = "group"
    if mask_heads:
        model["mask_channels"] = int(state["cascade.mask_heads.0.convs.0.weight"].shape[0])
    return Structure(name, depth, groups, per_group, stages, classes, model)


def _box_head(state: Mapping[str, Tensor]) -> str:
    if "cascade.box_heads.0.convs.0.0.weight" not in state:
        return "2fc"
    return "4conv1fc_gn" if "cascade.box_heads.0.convs.0.1.weight" in state else "4conv1fc"


def anchors_per_cell(state: Mapping[str, Tensor]) -> int:
    """Anchors at each position of a level."""
    return int(state["rpn.objectness.weight"].shape[0])


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return len({match[1] for key in state if (match := re.fullmatch(pattern, key))})


def read_config_text(text: str) -> Hints:
    """Hints from mmdetection's config text, 2.x or 3.x; whatever is not there or not understood stays out."""
    names = _assignments(text)
    model = names.get("model")
    if not isinstance(model, dict):
        return Hints()
    hints = Hints(found=True)
    backbone, roi = _dict(model.get("backbone")), _dict(model.get("roi_head"))
    if backbone.get("style") in ("pytorch", "caffe"):
        hints.model["style"] = backbone["style"]
    if isinstance(backbone.get("frozen_stages"), int) and -1 <= backbone["frozen_stages"] <= 4:
        hints.model["frozen_stages"] = backbone["frozen_stages"]
    norm = _dict(backbone.get("norm_cfg"))
    if norm:
        hints.model["norm"] = _norm(norm, frozen_statistics=backbone.get("norm_eval") is not False)
    hints.preprocessing = _preprocessing(model, names)
    train = _dict(model.get("train_cfg") or names.get("train_cfg"))
    test = _dict(model.get("test_cfg") or names.get("test_cfg"))
    hints.model |= _stage_settings(roi, train) | _test_settings(test) | _anchors(_dict(model.get("rpn_head")))
    hints.data |= _scale(names)
    return hints


def _norm(norm: dict[str, Any], *, frozen_statistics: bool) -> str:
    if norm.get("type") == "GN":
        return "group"
    if not frozen_statistics:
        return "sync" if norm.get("type") == "SyncBN" else "batch"
    return "frozen_statistics" if norm.get("requires_grad", True) else "frozen"


def _preprocessing(model: dict[str, Any], names: dict[str, Any]) -> Preprocessing | None:
    new = _dict(model.get("data_preprocessor"))
    old = _dict(names.get("img_norm_cfg"))
    for found, rgb in ((new, new.get("bgr_to_rgb", False)), (old, old.get("to_rgb", True))):
        mean, std = _numbers(found.get("mean")), _numbers(found.get("std"))
        if len(mean) == 3 and len(std) == 3 and all(value > 0 for value in std):
            return Preprocessing(not rgb, mean, std)
    return None


def _stage_settings(roi: dict[str, Any], train: dict[str, Any]) -> dict[str, Any]:
    heads = roi.get("bbox_head")
    rcnn = train.get("rcnn")
    heads = heads if isinstance(heads, list) else [heads]
    rcnn = rcnn if isinstance(rcnn, list) else [rcnn]
    settings: dict[str, Any] = {}
    ious = [_dict(_dict(stage).get("assigner")).get("pos_iou_thr") for stage in rcnn]
    if all(isinstance(iou, float) and 0 < iou < 1 for iou in ious):
        settings["stage_ious"] = tuple(ious)
    stds = [_numbers(_dict(_dict(head).get("bbox_coder")).get("target_stds")) for head in heads]
    if all(len(values) == 4 for values in stds):
        settings["stage_stds"] = tuple(stds)
    weights = _numbers(roi.get("stage_loss_weights"))
    if weights:
        settings["stage_loss_weights"] = weights
    return settings


def _test_settings(test: dict[str, Any]) -> dict[str, Any]:
    rcnn, rpn = _dict(test.get("rcnn")), _dict(test.get("rpn"))
    nms = _dict(rcnn.get("nms"))
    settings: dict[str, Any] = {}
    found = {
        "score_threshold": rcnn.get("score_thr"),
        "nms_iou": nms.get("iou_threshold", nms.get("iou_thr")),
        "max_detections": rcnn.get("max_per_img"),
        "test_proposals": rpn.get("max_per_img", rpn.get("max_num")),
    }
    for name, value in found.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0:
            settings[name] = float(value) if name in ("score_threshold", "nms_iou") else int(value)
    if nms.get("type") == "soft_nms":
        settings["nms"] = "soft"
    elif nms.get("class_agnostic") is True:
        settings["nms"] = "agnostic"
    return settings


def _anchors(rpn: dict[str, Any]) -> dict[str, Any]:
    generator = _dict(rpn.get("anchor_generator"))
    scales, ratios = _numbers(generator.get("scales")), _numbers(generator.get("ratios"))
    return {name: values for name, values in (("anchor_scales", scales), ("anchor_ratios", ratios)) if values}


def _scale(names: dict[str, Any]) -> dict[str, Any]:
    """The input size of the test pipeline: (longer, shorter) limits in either order."""
    steps = names.get("test_pipeline")
    for step in steps if isinstance(steps, list) else []:
        size = _numbers(_dict(step).get("img_scale") or _dict(step).get("scale"))
        if len(size) == 2 and min(size) >= 32:
            return {"short_side": (int(min(size)),), "long_side": int(max(size))}
    return {}


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _numbers(value: object) -> tuple[float, ...]:
    items = value if isinstance(value, (list, tuple)) else ()
    if not all(isinstance(item, (int, float)) and not isinstance(item, bool) for item in items):
        return ()
    return tuple(float(item) for item in items)


def _assignments(text: str) -> dict[str, Any]:
    """Top-level ``name = literal or dict(...)`` of a Python text; nothing is run, what is not a literal is None."""
    if len(text) > _MAX_TEXT:
        return {}
    names: dict[str, Any] = {}
    try:
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                names[node.targets[0].id] = _value(node.value, names)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    return names


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(item, names) for item in node.elts]
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _value(node.operand, names)
        return -value if isinstance(value, (int, float)) else None
    if isinstance(node, ast.Dict):
        return {
            key.value: _value(value, names)
            for key, value in zip(node.keys, node.values)
            if isinstance(key, ast.Constant) and isinstance(key.value, str)
        }
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {word.arg: _value(word.value, names) for word in node.keywords if word.arg is not None}
    return None
