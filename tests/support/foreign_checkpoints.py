"""State dicts as other libraries would write them, small."""

from __future__ import annotations

import functools
import json
import re

import torch
from torch import Tensor

import locations
from cascade_rcnn.config import ModelConfig
from cascade_rcnn.models.build import build_model

MANIFESTS = locations.FIXTURES / "parity"
MASK = "mmdet_cascade_mask_rcnn_r50_fpn"
D2 = "detectron2_cascade_mask_rcnn_R_50_FPN"
CLASSES = 3
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


def small_state() -> dict[str, Tensor]:
    """A small network's weights as mmdetection would store them."""
    return {key: value.clone() for key, value in _small_state().items()}


@functools.cache
def _small_state() -> dict[str, Tensor]:
    config = ModelConfig(backbone="resnet18", masks="every", fpn_channels=32, head_channels=16, mask_channels=32)
    state = build_model(config, CLASSES).state_dict()
    return {mmdetection_name(key): value for key, value in state.items()}
