"""State dicts as other libraries would write them, small."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

import locations
from cascade_rcnn.config import ModelConfig
from cascade_rcnn.models.build import build_model

MANIFESTS = locations.FIXTURES / "parity"
MASK = "mmdet_cascade_mask_rcnn_r50_fpn"
D2 = "detectron2_cascade_mask_rcnn_R_50_FPN"
CLASSES = 3
T = TypeVar("T")
_SMALLER = {256: 32, 1024: 16, 12544: 32 * 49, 80: CLASSES, 81: CLASSES + 1}


def foreign_state(name: str) -> dict[str, Tensor]:
    """The keys of a published checkpoint, its heads narrower and for three classes, random values."""
    return {key: value.clone() for key, value in _foreign_state(name).items()}


@functools.cache
def _foreign_state(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in json.loads((MANIFESTS / f"{name}.manifest.json").read_text(encoding="utf-8"))["keys"]:
        if not key.startswith(("backbone.conv", "backbone.bn", "backbone.layer", "backbone.bottom_up")):
            lateral = "lateral" in key and len(shape) == 4
            shape = [_SMALLER.get(n, n) if i == 0 or not lateral else n for i, n in enumerate(shape)]
        state[key] = torch.zeros(()) if not shape else torch.rand(shape, generator=generator) + 0.5
    return state


def mmdetection_name(key: str, norm: str = "bn") -> str:
    """mmdetection's name of one of our keys."""
    for ours, theirs in (
        (r"backbone\.body\.(.*)\bbn(\d)\.", rf"backbone.\1{norm}\2."),
        (r"backbone\.body\.(.*)\bconv2\.offset\.", r"backbone.\1conv2.conv_offset."),
        (r"backbone\.body\.", "backbone."),
        (r"fpn\.lateral\.(\d)", r"neck.lateral_convs.\1.conv"),
        (r"fpn\.output\.(\d)", r"neck.fpn_convs.\1.conv"),
        (r"fpn\.lateral_norm\.(\d)", r"neck.lateral_convs.\1.gn"),
        (r"fpn\.output_norm\.(\d)", r"neck.fpn_convs.\1.gn"),
        (r"rpn\.conv\.0", "rpn_head.rpn_conv.0.conv"),
        (r"rpn\.conv\.2", "rpn_head.rpn_conv.1.conv"),
        (r"rpn\.conv", "rpn_head.rpn_conv"),
        (r"rpn\.objectness", "rpn_head.rpn_cls"),
        (r"rpn\.deltas", "rpn_head.rpn_reg"),
        (r"cascade\.box_heads\.(\d)\.convs\.(\d)\.0", r"roi_head.bbox_head.\1.shared_convs.\2.conv"),
        (r"cascade\.box_heads\.(\d)\.convs\.(\d)\.1", r"roi_head.bbox_head.\1.shared_convs.\2.gn"),
        (r"cascade\.box_heads\.(\d)\.fc1", r"roi_head.bbox_head.\1.shared_fcs.0"),
        (r"cascade\.box_heads\.(\d)\.fc2", r"roi_head.bbox_head.\1.shared_fcs.1"),
        (r"cascade\.box_heads\.(\d)\.classifier", r"roi_head.bbox_head.\1.fc_cls"),
        (r"cascade\.box_heads\.(\d)\.deltas", r"roi_head.bbox_head.\1.fc_reg"),
        (r"cascade\.mask_heads\.(\d)\.convs\.(\d)", r"roi_head.mask_head.\1.convs.\2.conv"),
        (r"cascade\.mask_heads\.(\d)\.norms\.(\d)", r"roi_head.mask_head.\1.convs.\2.gn"),
        (r"cascade\.mask_heads\.(\d)\.upsample", r"roi_head.mask_head.\1.upsample"),
        (r"cascade\.mask_heads\.(\d)\.logits", r"roi_head.mask_head.\1.conv_logits"),
    ):
        renamed, count = re.subn("^" + ours, theirs, key)
        if count:
            return renamed
    raise AssertionError(key)


def one_stage(state: Mapping[str, T]) -> dict[str, T]:
    """The first stage's head alone, named as Faster and Mask R-CNN name theirs."""
    kept = {key: value for key, value in state.items() if not re.search(r"_(head|predictor)\.[12]\.", key)}
    return {re.sub(r"_(head|predictor)\.0\.", r"_\1.", key): value for key, value in kept.items()}


def detectron_blobs(state: dict[str, Tensor], stage: str) -> dict[str, np.ndarray[Any, Any]]:
    """A detectron2 checkpoint under Detectron's names, with background first and boxes for it, without statistics."""
    blobs: dict[str, np.ndarray[Any, Any]] = {"lr": np.float32(0.1), "fc6_w_momentum": np.ones(3, np.float32)}
    last = {2: 2, 3: 3, 4: 5, 5: 2}
    for key, value in state.items():
        if "running" in key:
            continue
        name, end = key.rsplit(".", 1)
        end = "_w" if end == "weight" else "_b"
        if match := re.fullmatch(r"backbone\.bottom_up\.res(\d)\.(\d+)\.(conv\d|shortcut)(\.norm)?", name):
            branch = "branch1" if match[3] == "shortcut" else "branch2" + "abc"[int(match[3][-1]) - 1]
            name = f"res{match[1]}_{match[2]}_{branch}"
            end = ("_bn_s" if end == "_w" else "_bn_b") if match[4] else end
        elif name.startswith("backbone.bottom_up.stem"):
            name, end = ("res_conv1_bn", "_s" if end == "_w" else "_b") if "norm" in name else ("conv1", end)
        elif name.startswith("backbone.fpn"):
            level = int(name[-1])
            lateral = "_lateral" if level < 5 else ""
            name = (
                f"fpn_inner_res{level}_{last[level]}_sum{lateral}"
                if "lateral" in name
                else f"fpn_res{level}_{last[level]}_sum"
            )
        elif name.startswith("proposal"):
            name = {
                "conv": "conv_rpn_fpn2",
                "objectness_logits": "rpn_cls_logits_fpn2",
                "anchor_deltas": "rpn_bbox_pred_fpn2",
            }[name.rsplit(".", 1)[1]]
        elif match := re.fullmatch(r"roi_heads\.box_\w+\.(\d)\.(\w+)", name):
            part = {"fc1": "fc6", "fc2": "fc7"}.get(match[2], match[2])
            k = int(match[1])
            name = part + (stage.format(n=k + 1, th=["", "nd", "rd"][k]) if k else "")
            if part == "cls_score":
                value = torch.cat([value[-1:], value[:-1]])
            if part == "bbox_pred":
                value = torch.cat([torch.full_like(value, 9), value])
        else:
            part = name.rsplit(".", 1)[1]
            name = {"deconv": "conv5_mask", "predictor": "mask_fcn_logits"}.get(part, f"_[mask]_fcn{part[-1]}")
            value = torch.cat([torch.full_like(value[:1], 9), value]) if part == "predictor" else value
        blobs[name + end] = value.numpy()
    return blobs


def small_state() -> dict[str, Tensor]:
    """A small network's weights as mmdetection would store them."""
    return {key: value.clone() for key, value in _small_state().items()}


@functools.cache
def _small_state() -> dict[str, Tensor]:
    config = ModelConfig(backbone="resnet18", masks="every", fpn_channels=32, head_channels=16, mask_channels=32)
    state = build_model(config, CLASSES).state_dict()
    return {mmdetection_name(key): value for key, value in state.items()}
