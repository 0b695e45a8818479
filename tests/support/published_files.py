"""Files as the listed weights have them: the published keys, heads narrower and for three classes, seeded values."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor

from cascade_rcnn.config import ModelConfig
from cascade_rcnn.models.backbone import Backbone
from cascade_rcnn.models.build import build_model
from foreign_checkpoints import CLASSES, D2, MASK, detectron_blobs, mmdetection_name, one_stage
from official_backbones import Shapes, detector, manifest

LSJ = "detectron2_new_baselines_mask_rcnn_R_50_FPN_LSJ"
_CLASSES_META = {"meta": {"dataset_meta": {"classes": ("cat", "dog", "eel")}}}
_NARROWER = {256: 32, 1024: 16, 12544: 32 * 49, 80: CLASSES, 81: CLASSES + 1, 320: 4 * CLASSES}
_TORCHVISION = {91: CLASSES + 1, 364: 4 * (CLASSES + 1)}  # background is one of its classes
_HEADS = re.compile(r"(?!backbone\.(?!fpn)).*")  # all but the backbone, whose widths are those of a network in timm


@dataclass(frozen=True)
class Family:
    """One entry of the list stands for a family: whose shapes its file has, and what the converted network must be."""

    name: str
    shapes: Callable[[], Shapes]
    backbone: str
    style: str = "pytorch"
    norm: str = "frozen"
    stages: int = 3
    masks: str = "every"
    said: str = ""  # a word of convert's report that this family must have


def narrowed(shapes: Mapping[str, Sequence[int]], table: Mapping[int, int] = _NARROWER) -> Shapes:
    """Heads and neck with fewer channels; the laterals keep their inputs."""
    found = {}
    for key, shape in shapes.items():
        if _HEADS.fullmatch(key):
            lateral = len(shape) == 4 and ("lateral" in key or "inner_blocks" in key)
            shape = [n if i and lateral else table.get(n, n) for i, n in enumerate(shape)]
        found[key] = tuple(shape)
    return found


def seeded(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {key: torch.rand(shape, generator=generator) + 0.5 for key, shape in shapes.items()}


def file_of(family: Family, ending: str) -> bytes:
    """mmdetection's, detectron2's and Detectron's (pickles of arrays) or torchvision's file."""
    state = seeded(family.shapes())
    if family.name.startswith("authors"):
        return pickle.dumps({"blobs": detectron_blobs(state, "_{n}"), "cfg": "MODEL: {}"}, protocol=2)
    if ending == ".pkl":
        arrays = {key: value.numpy() for key, value in state.items()}
        return pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}, protocol=4)
    content: Any = state if family.name.startswith("torchvision") else {"state_dict": state} | _CLASSES_META
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


# The families


def _of_mmdetection(config: ModelConfig) -> Callable[[], Shapes]:
    """Of a network of ours under mmdetection's names (tests/convert holds those against the manifests)."""

    def shapes() -> Shapes:
        with torch.device("meta"):
            state = build_model(config, CLASSES).state_dict()
        norm = "gn" if config.norm == "group" else "bn"
        found = {mmdetection_name(key, norm): tuple(value.shape) for key, value in state.items()}
        return found if len(config.stage_ious) > 1 else one_stage(found)

    return shapes


def _regnet_of_detectron2(name: str) -> Shapes:
    letters = {"conv1": "a", "conv2": "b", "conv3": "c"}
    heads = {key: shape for key, shape in narrowed(manifest(LSJ)).items() if "bottom_up" not in key}
    with torch.device("meta"):
        network = Backbone(name).body
    found = {}
    for key, value in network.state_dict().items():
        if match := re.fullmatch(r"(s\d\.b\d+)\.(\w+)\.(\w+)\.(\w+)", key):
            block, layer, kind, rest = match.groups()
            if layer == "downsample":
                inner = "proj" if kind == "conv" else "bn"
            elif layer == "se":
                inner = f"f.se.f_ex.{0 if kind == 'fc1' else 2}"
            else:
                inner = f"f.{letters[layer]}{'_bn' if kind == 'bn' else ''}"
            key = f"{block}.{inner}.{rest}"
        found[f"backbone.bottom_up.{key}"] = tuple(value.shape)
    for level, channels in enumerate(network.feature_info.channels()[-4:], start=2):
        heads[f"backbone.fpn_lateral{level}.weight"] = (32, channels, 1, 1)
    return found | heads


def _torchvision(function: str) -> Shapes:
    make = getattr(torchvision.models.detection, function)
    with torch.device("meta"):
        state = make(weights=None, weights_backbone=None).state_dict()
    return narrowed({key: tuple(value.shape) for key, value in state.items()}, _NARROWER | _TORCHVISION)


def _deformable_of_detectron2() -> Shapes:
    shapes = one_stage(narrowed(manifest(D2)))
    shapes["roi_heads.box_predictor.bbox_pred.weight"] = (4 * CLASSES, 16)
    shapes["roi_heads.box_predictor.bbox_pred.bias"] = (4 * CLASSES,)
    for key in [key for key in shapes if re.search(r"res[345]\.\d+\.conv2\.weight", key)]:
        place = key.replace("conv2.weight", "conv2_offset")
        shapes |= {f"{place}.weight": (18, shapes[key][0], 3, 3), f"{place}.bias": (18,)}
    return shapes


def _narrow(name: str) -> Callable[[], Shapes]:
    return lambda: narrowed(manifest(name))


_SMALL: Any = {"fpn_channels": 32, "head_channels": 16, "pretrained": False}
_SWIN = "swin_tiny_patch4_window7_224.ms_in1k"

FAMILIES = [
    Family("cascade_mask_rcnn_r50_fpn_1x_coco", _narrow(MASK), "resnet50.tv_in1k", norm="frozen_statistics"),
    Family(
        "cascade_rcnn_r50_caffe_fpn_1x_coco", _narrow("mmdet_cascade_rcnn_r50_fpn"), "resnet50.tv_in1k",
        style="caffe", masks="none", said="style: caffe (the file's name)",
    ),
    Family(
        "cascade_rcnn_x101_32x4d_fpn_1x_coco",
        _of_mmdetection(ModelConfig(backbone="resnext101_32x4d", **_SMALL)), "resnext101_32x4d.gluon_in1k",
        norm="frozen_statistics", masks="none",
    ),
    Family(
        "faster_rcnn_x50_32x4d_fpn_gn_ws_all_1x_coco",
        _of_mmdetection(
            ModelConfig(
                backbone="resnext50_32x4d", norm="group", box_head="4conv1fc_gn", stage_ious=(0.5,),
                class_agnostic_boxes=False, **_SMALL
            )
        ),
        "resnext50_32x4d.tv_in1k", norm="group", stages=1, masks="none", said="weight standardisation",
    ),
    Family(
        "faster_rcnn_r50_fpn_gn_ws_all_1x_coco", _narrow("mmdet_faster_rcnn_r50_fpn_gn_ws_all"), "resnet50.tv_in1k",
        norm="group", stages=1, masks="none", said="weight standardisation (the file's name)",
    ),
    Family(
        "cascade_rcnn_r50_fpn_dconv_c3_c5_1x_coco", _narrow("mmdet_cascade_rcnn_r50_fpn_dconv_c3_c5"),
        "resnet50.tv_in1k", norm="frozen_statistics", masks="none",
    ),
    Family(
        "cascade_mask_rcnn_regnetx_3.2GF_fpn_ms_3x_coco", _narrow("mmdet_cascade_mask_rcnn_regnetx_3.2GF_fpn"),
        "regnetx_032.pycls_in1k", norm="frozen_statistics",
    ),
    Family(
        "convnext_cascade_mask_rcnn_convnext_tiny_1k_3x", _narrow("convnext_cascade_mask_rcnn_tiny"),
        "convnext_tiny.fb_in1k", norm="sync",
    ),
    Family(
        "mask_rcnn_convnext_t_p4_w7_fpn_amp_ms_crop_3x_coco",
        lambda: narrowed(detector("convnext", "t", stages=1, own_names=True)), "convnext_tiny.fb_in1k",
        norm="frozen_statistics", stages=1,
    ),
    Family(
        "swin_cascade_mask_rcnn_swin_tiny_patch4_window7", _narrow("swin_cascade_mask_rcnn_tiny"), _SWIN, norm="sync"
    ),
    Family(
        "mask_rcnn_swin_t_p4_w7_fpn_1x_coco", lambda: narrowed(detector("swin", "t", stages=1, own_names=True)),
        _SWIN, norm="frozen_statistics", stages=1,
    ),
    Family("detectron2_cascade_mask_rcnn_r50_fpn_3x", _narrow(D2), "resnet50.tv_in1k", style="caffe", masks="one"),
    Family(
        "detectron2_mask_rcnn_r_50_fpn_100ep_lsj", _narrow(LSJ), "resnet50.tv_in1k",
        style="caffe", stages=1, said="folded",
    ),
    Family(
        "detectron2_mask_rcnn_regnetx_4gf_dds_fpn_100ep_lsj", lambda: _regnet_of_detectron2("regnetx_040"),
        "regnetx_040.pycls_in1k", stages=1,
    ),
    Family(
        "detectron2_mask_rcnn_regnety_4gf_dds_fpn_100ep_lsj", lambda: _regnet_of_detectron2("regnety_040"),
        "regnety_040.pycls_in1k", stages=1,
    ),
    Family(
        "detectron2_mask_rcnn_r_50_fpn_1x_dconv_c3-c5", _deformable_of_detectron2, "resnet50.tv_in1k",
        style="caffe", stages=1,
    ),
    Family("authors_R50-FPN-cascade-rcnn-mask", _narrow(D2), "resnet50.tv_in1k", style="caffe", masks="last"),
    Family(
        "torchvision_maskrcnn_resnet50_fpn", lambda: _torchvision("maskrcnn_resnet50_fpn"), "resnet50.tv_in1k", stages=1
    ),
    Family(
        "torchvision_fasterrcnn_resnet50_fpn_v2", lambda: _torchvision("fasterrcnn_resnet50_fpn_v2"),
        "resnet50.tv_in1k", stages=1, masks="none", said="folded",
    ),
]  # fmt: skip
