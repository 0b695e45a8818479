"""Checkpoints of other libraries become ours: every value in its place, decisions said, what does not fit listed."""

from __future__ import annotations

import collections
import functools
import json
import os
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from conftest import RunCommand
from faster_coco_eval.core import mask as coco_mask
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from cascade_rcnn.checkpoint import load_checkpoint
from cascade_rcnn.config import ModelConfig
from cascade_rcnn.convert import checkpoint
from cascade_rcnn.convert.checkpoint import run_convert
from cascade_rcnn.convert.class_names import COCO_IDS, COCO_NAMES
from cascade_rcnn.convert.config_text import Hints, read_config_text
from cascade_rcnn.convert.decide import Asked, Decisions, match_preprocessing
from cascade_rcnn.convert.find_weights import FoundWeights
from cascade_rcnn.convert.infer_config import Structure
from cascade_rcnn.convert.key_tables import recognise, rename
from cascade_rcnn.convert.values import absorb_preprocessing
from cascade_rcnn.errors import CheckpointError
from cascade_rcnn.inference.detector import load
from cascade_rcnn.models.build import build_model, load_backbone_weights
from foreign_checkpoints import (
    CLASSES,
    D2,
    MANIFESTS,
    MASK,
    detectron_blobs,
    foreign_state,
    mmdetection_name,
    small_state,
)


def torchvision_state() -> dict[str, Tensor]:
    detection = torchvision.models.detection
    body = detection.backbone_utils.resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    head = detection.faster_rcnn.TwoMLPHead(256 * 49, 16)
    predictor = detection.faster_rcnn.FastRCNNPredictor(16, CLASSES + 1)
    return dict(
        detection.MaskRCNN(
            body,
            box_head=head,
            box_predictor=predictor,
            mask_predictor=detection.mask_rcnn.MaskRCNNPredictor(256, 256, CLASSES + 1),
        ).state_dict()
    )


def convert(tmp_path: Path, content: object, *, name: str = "source.pth", config: str | None = None) -> Any:
    source, dest = tmp_path / name, tmp_path / "dest.safetensors"
    torch.save(content, source)
    run_convert(source, dest, config=config)
    return load_checkpoint(dest)


def assert_every_value_arrived(source: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    wanted = sorted(float(value.double().sum()) for key, value in source.items() if value.dim())
    found = sorted(float(value.double().sum()) for value in ours.values() if value.dim())
    assert wanted == pytest.approx(found, rel=1e-12)


MMDET_PAIRS = {
    "backbone.layer3.5.bn2.running_var": "backbone.body.layer3.5.bn2.running_var",
    "backbone.layer1.0.downsample.1.weight": "backbone.body.layer1.0.downsample.1.weight",
    "neck.lateral_convs.3.conv.weight": "fpn.lateral.3.weight",
    "neck.fpn_convs.0.conv.bias": "fpn.output.0.bias",
    "rpn_head.rpn_conv.weight": "rpn.conv.weight",
    "rpn_head.rpn_cls.bias": "rpn.objectness.bias",
    "rpn_head.rpn_reg.weight": "rpn.deltas.weight",
    "roi_head.bbox_head.2.shared_fcs.0.weight": "cascade.box_heads.2.fc1.weight",
    "roi_head.bbox_head.1.shared_fcs.1.bias": "cascade.box_heads.1.fc2.bias",
    "roi_head.bbox_head.0.fc_cls.weight": "cascade.box_heads.0.classifier.weight",
    "roi_head.bbox_head.2.fc_reg.bias": "cascade.box_heads.2.deltas.bias",
    "roi_head.mask_head.1.convs.3.conv.weight": "cascade.mask_heads.1.convs.3.weight",
    "roi_head.mask_head.2.upsample.weight": "cascade.mask_heads.2.upsample.weight",
    "roi_head.mask_head.0.conv_logits.weight": "cascade.mask_heads.0.logits.weight",
}
D2_PAIRS = {
    "backbone.bottom_up.stem.conv1.norm.running_mean": "backbone.body.bn1.running_mean",
    "backbone.bottom_up.res2.0.shortcut.weight": "backbone.body.layer1.0.downsample.0.weight",
    "backbone.bottom_up.res5.2.conv3.norm.bias": "backbone.body.layer4.2.bn3.bias",
    "backbone.fpn_lateral5.weight": "fpn.lateral.3.weight",
    "backbone.fpn_output2.weight": "fpn.output.0.weight",
    "proposal_generator.rpn_head.anchor_deltas.weight": "rpn.deltas.weight",
    "roi_heads.box_head.1.fc2.weight": "cascade.box_heads.1.fc2.weight",
    "roi_heads.box_predictor.2.cls_score.bias": "cascade.box_heads.2.classifier.bias",
    "roi_heads.mask_head.mask_fcn4.weight": "cascade.mask_heads.0.convs.3.weight",
    "roi_heads.mask_head.deconv.bias": "cascade.mask_heads.0.upsample.bias",
    "roi_heads.mask_head.predictor.weight": "cascade.mask_heads.0.logits.weight",
}


def test_mmdetection_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = foreign_state(MASK)
    meta = {"epoch": 12, "dataset_meta": {"classes": ("cat", "dog", "eel"), "palette": [(1, 2, 3)]}}
    made = convert(tmp_path, {"meta": meta, "state_dict": state, "optimizer": {"state": {0: torch.ones(3)}}})
    for theirs, ours in MMDET_PAIRS.items():
        assert torch.equal(made.state[ours], state[theirs]), theirs
    assert_every_value_arrived(state, made.state)
    assert made.class_names == ("cat", "dog", "eel") and made.category_ids == (1, 2, 3)
    model = made.config.model
    assert (model.backbone, model.semantics, model.style) == ("resnet50.tv_in1k", "mmdetection", "pytorch")
    assert model.masks == "every"
    assert (model.stage_ious, model.class_agnostic_boxes, model.norm) == ((0.5, 0.6, 0.7), True, "frozen_statistics")
    assert (model.fpn_channels, model.head_channels, model.mask_channels) == (32, 16, 32)
    build_model(model, CLASSES).load_state_dict(made.state)
    said = capsys.readouterr().out
    for word in ("format: mmdetection", "resnet50", "3 stages", "3 classes", "style: pytorch", "cat, dog, eel"):
        assert word in said


def test_mmdetection_2_with_moving_averages_and_data_parallel_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = small_state()
    stored = {f"module.{key}": value for key, value in state.items()}
    stored |= {"module.ema_" + key.replace(".", "_"): torch.zeros_like(value) for key, value in state.items()}
    meta = {"CLASSES": ["cat", "dog", "eel"], "mmdet_version": "2.28"}
    made = convert(tmp_path, {"meta": meta, "state_dict": stored})
    assert_every_value_arrived(state, made.state)
    assert made.class_names == ("cat", "dog", "eel")
    assert "EMA" in capsys.readouterr().out


def test_mmengine_keeps_the_averages_under_the_plain_keys(tmp_path: Path) -> None:
    state = small_state()
    raw = {f"module.{key}": value + 1 for key, value in state.items()} | {"steps": torch.tensor(10)}
    made = convert(tmp_path, {"state_dict": state, "ema_state_dict": raw, "meta": {}})
    assert_every_value_arrived(state, made.state)


@pytest.mark.parametrize("library", ["mmdetection", "detectron2"])
def test_one_stage_detectors_have_boxes_per_class(tmp_path: Path, library: str) -> None:
    state = {}
    for key, value in foreign_state(MASK if library == "mmdetection" else D2).items():
        if not re.search(r"(box_head|box_predictor|bbox_head|mask_head)\.[12]\.", key):
            key = re.sub(r"(box_head|box_predictor|bbox_head|mask_head)\.0\.", r"\1.", key)
            state[key] = torch.cat([value, value + 1, value + 2]) if "fc_reg" in key or "bbox_pred" in key else value
    made = convert(tmp_path, {"state_dict" if library == "mmdetection" else "model": state})
    assert_every_value_arrived(state, made.state)
    model = made.config.model
    assert (model.stage_ious, model.class_agnostic_boxes, model.masks) == ((0.5,), False, "every")
    reg = "roi_head.bbox_head.fc_reg.bias" if library == "mmdetection" else "roi_heads.box_predictor.bbox_pred.bias"
    assert torch.equal(made.state["cascade.box_heads.0.deltas.bias"], state[reg])
    assert model.semantics == library


def test_group_norm_and_convolutional_heads(tmp_path: Path) -> None:
    config = ModelConfig(
        backbone="resnet18",
        norm="group",
        box_head="4conv1fc_gn",
        masks="every",
        fpn_channels=32,
        head_channels=16,
        mask_channels=32,
    )
    ours = build_model(config, CLASSES).state_dict()
    made = convert(tmp_path, {"state_dict": {mmdetection_name(key, "gn"): value for key, value in ours.items()}})
    assert set(made.state) == set(ours) and all(torch.equal(made.state[key], ours[key]) for key in ours)
    assert (made.config.model.norm, made.config.model.box_head) == ("group", "4conv1fc_gn")


@torch.no_grad()
def test_batch_norm_in_neck_and_heads_is_folded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig(
        backbone="resnet18",
        rpn_convs=2,
        box_head="4conv1fc",
        masks="every",
        fpn_channels=32,
        head_channels=16,
        mask_channels=32,
    )
    state = {mmdetection_name(key): value for key, value in build_model(config, CLASSES).state_dict().items()}
    normed = [
        key.removesuffix(".conv.bias")
        for key in state
        if re.search(r"(lateral|fpn|head\.\d\.\w*)_?convs", key) and key.endswith("bias")
    ]
    layers = {}
    for name in normed:
        weight, norm = state[f"{name}.conv.weight"], nn.BatchNorm2d(32).eval()
        del state[f"{name}.conv.bias"]
        for value in (norm.weight, norm.bias, norm.running_mean):
            nn.init.normal_(value)
        nn.init.uniform_(norm.running_var, 0.1, 2)
        conv = nn.Conv2d(weight.shape[1], 32, weight.shape[2], bias=False)
        conv.weight.copy_(weight)
        layers[name] = nn.Sequential(conv, norm)
        state |= {f"{name}.bn.{key}": value for key, value in norm.state_dict().items()}
    made = convert(tmp_path, {"state_dict": state})
    # our box heads have such norms themselves; FPN and mask heads do not
    assert (made.config.model.rpn_convs, made.config.model.box_head) == (2, "4conv1fc_bn")
    for name in [name for name in layers if "bbox_head" in name]:
        norm = layers.pop(name)[1]
        k, i = re.findall(r"\d", name)
        for key, value in norm.state_dict().items():
            assert key == "num_batches_tracked" or torch.equal(
                made.state[f"cascade.box_heads.{k}.convs.{i}.1.{key}"], value
            )
    assert "folded" in capsys.readouterr().out and len(normed) == 4 + 4 + 3 * 4 + 3 * 4
    assert torch.equal(made.state["rpn.conv.2.weight"], state["rpn_head.rpn_conv.1.conv.weight"])
    for key, value in made.state.items():
        layer = layers.get(mmdetection_name(key).removesuffix(".conv.weight"))
        if layer is not None and key.endswith("weight"):
            x = torch.rand(1, value.shape[1], 5, 5)
            folded = nn.functional.conv2d(x, value, made.state[key.removesuffix("weight") + "bias"])
            assert torch.allclose(folded, layer(x), rtol=1e-4, atol=1e-5), key
            del layers[mmdetection_name(key).removesuffix(".conv.weight")]
    assert not layers


def test_more_rpn_convolutions_of_detectron2() -> None:
    state = {f"proposal_generator.rpn_head.conv.conv{i}.weight": torch.full((1,), i) for i in range(2)}
    assert recognise(state) == "detectron2"
    renamed, left_over = rename(state, "detectron2")
    assert {key: int(value) for key, value in renamed.items()} == {"rpn.conv.0.weight": 0, "rpn.conv.2.weight": 1}
    assert not left_over


CONFIG_TEXT_3 = """
norm_cfg = dict(requires_grad=False, type='BN')
model = dict(
    type='CascadeRCNN',
    backbone=dict(depth=50, frozen_stages=2, norm_cfg=norm_cfg, norm_eval=True, style='caffe', type='ResNet'),
    data_preprocessor=dict(bgr_to_rgb=False, mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0]),
    roi_head=dict(stage_loss_weights=[1, 0.5, 0.25], bbox_head=[
        dict(bbox_coder=dict(target_stds=[0.1, 0.1, 0.2, 0.2])),
        dict(bbox_coder=dict(target_stds=[0.05, 0.05, 0.1, 0.1])),
        dict(bbox_coder=dict(target_stds=[0.033, 0.033, 0.067, 0.067]))]),
    rpn_head=dict(anchor_generator=dict(ratios=[0.5, 1.0, 2.0], scales=[4])),
    train_cfg=dict(rcnn=[dict(assigner=dict(pos_iou_thr=t)) for t in (0.5,)]),
    test_cfg=dict(rcnn=dict(max_per_img=300, nms=dict(iou_threshold=0.6, type='soft_nms'), score_thr=0.001),
                  rpn=dict(max_per_img=500)))
test_pipeline = [dict(type='LoadImageFromFile'), dict(keep_ratio=True, scale=(1000, 600), type='Resize')]
evil = __import__('os').system('true')
"""
CONFIG_TEXT_2 = """
img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
model = dict(type='FasterRCNN', backbone=dict(type='ResNet', norm_cfg=dict(type='SyncBN', requires_grad=True),
             norm_eval=False, style='pytorch'), train_cfg=dict(rcnn=dict(assigner=dict(pos_iou_thr=0.4))),
             test_cfg=dict(rcnn=dict(score_thr=0.1, nms=dict(type='nms', iou_thr=0.3), max_per_img=50)))
test_pipeline = [dict(type='MultiScaleFlipAug', img_scale=(640, 480))]
"""


def test_the_config_text_in_the_metadata_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "system", lambda command: pytest.fail("the text was run"))
    state = foreign_state(MASK)
    made = convert(tmp_path, {"state_dict": state, "meta": {"cfg": CONFIG_TEXT_3}})
    model, data = made.config.model, made.config.data
    assert (model.style, model.norm, model.frozen_stages) == ("caffe", "frozen", 2)
    assert (model.score_threshold, model.nms, model.nms_iou, model.max_detections) == (0.001, "soft", 0.6, 300)
    assert (model.test_proposals, model.anchor_scales) == (500, (4.0,))
    assert model.stage_stds[2] == (0.033, 0.033, 0.067, 0.067)
    assert (data.short_side, data.long_side) == ((600,), 1000)
    assert torch.equal(made.state["backbone.body.conv1.weight"], state["backbone.conv1.weight"])


def test_config_text_of_version_2() -> None:
    hints = read_config_text(CONFIG_TEXT_2)
    assert hints.model == {
        "style": "pytorch",
        "norm": "sync",
        "stage_ious": (0.4,),
        "score_threshold": 0.1,
        "nms_iou": 0.3,
        "max_detections": 50,
    }
    assert hints.data == {"short_side": (480,), "long_side": 640}
    assert hints.preprocessing is not None and not hints.preprocessing.bgr


@pytest.mark.parametrize(
    "text",
    [
        "",
        "model = (",
        "(" * 5000,
        "model = 3",
        "model = dict(backbone=7, roi_head=[1])",
        "x" * 3_000_000,
        "model = -" + "-" * 50_000 + "1",
        "model = dict(test_cfg=dict(rcnn=[]))",
    ],
    ids=range(8),
)
def test_unusable_config_text_says_nothing(text: str) -> None:
    assert read_config_text(text).model == {}


def test_caffe_style_is_taken_from_the_files_name(tmp_path: Path) -> None:
    made = convert(tmp_path, {"state_dict": foreign_state(MASK)}, name="cascade_mask_rcnn_r50_caffe_fpn_1x.pth")
    assert (made.config.model.style, made.config.model.norm) == ("caffe", "frozen")


def test_a_recipe_can_be_named(tmp_path: Path) -> None:
    state = foreign_state(MASK)
    with pytest.raises(CheckpointError, match="another shape"):  # its heads are wider
        convert(tmp_path, {"state_dict": state}, config="cascade_mask_rcnn_r50_fpn_1x_coco")
    recipe = tmp_path / "narrow.py"
    recipe.write_text(
        "from cascade_rcnn.config import Config, ModelConfig\nconfig = Config(model=ModelConfig("
        "masks='every', fpn_channels=32, head_channels=16, mask_channels=32, score_threshold=0.2))\n"
    )
    made = convert(tmp_path, {"state_dict": state}, config=str(recipe))
    assert made.config.model.score_threshold == 0.2


@pytest.mark.parametrize("suffix", ["pth", "pkl"])
def test_detectron2(tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    state = foreign_state(D2)
    source, dest = tmp_path / f"model_final.{suffix}", tmp_path / "dest.safetensors"
    if suffix == "pth":
        mean = torch.tensor([103.53, 116.28, 123.675]).reshape(3, 1, 1)
        extra = {
            "pixel_mean": mean,
            "pixel_std": torch.ones(3, 1, 1),
        }
        torch.save({"model": state | extra, "optimizer": {}, "iteration": 89999}, source)
    else:
        arrays = {key: value.numpy() for key, value in state.items()}
        source.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
    run_convert(source, dest)
    assert "licence: detectron2's published weights are CC-BY-SA-3.0" in capsys.readouterr().out
    made = load_checkpoint(dest)
    for theirs, ours in D2_PAIRS.items():
        assert torch.equal(made.state[ours], state[theirs]), theirs
    assert_every_value_arrived(state, made.state)
    model = made.config.model
    assert (model.semantics, model.style, model.norm, model.masks) == ("detectron2", "caffe", "frozen", "one")
    assert made.class_names == ("class 1", "class 2", "class 3")


@pytest.mark.parametrize("stage", ["_{n}", "_{n}{th}"])
def test_the_authors_detectron_blobs(tmp_path: Path, stage: str) -> None:
    state = foreign_state(D2)
    source, dest = tmp_path / "model_final.pkl", tmp_path / "dest.safetensors"
    source.write_bytes(pickle.dumps({"blobs": detectron_blobs(state, stage), "cfg": "MODEL: {}"}, protocol=2))
    run_convert(source, dest)
    made = load_checkpoint(dest)
    for theirs, ours in D2_PAIRS.items():
        if "running" not in theirs:
            assert torch.equal(made.state[ours], state[theirs]), theirs
    assert torch.equal(made.state["backbone.body.layer2.1.bn2.running_var"], torch.full((128,), 1 - 1e-5))
    assert not made.state["backbone.body.bn1.running_mean"].any()  # the images are normalised with Detectron's mean
    model = made.config.model
    mean = build_model(model, len(made.class_names)).mean.flatten().tolist()
    assert mean == pytest.approx([102.9801, 115.9465, 122.7717])
    assert (model.semantics, model.style, model.masks, model.class_agnostic_boxes) == ("paper", "caffe", "last", True)


def test_the_authors_group_norm_blobs(tmp_path: Path) -> None:
    config = ModelConfig(
        backbone="resnet50", norm="group", box_head="4conv1fc_gn", semantics="paper", fpn_channels=32, head_channels=16
    )
    state = {key: torch.rand_like(value) for key, value in build_model(config, 3).state_dict().items()}
    last, blobs = {0: 2, 1: 3, 2: 5, 3: 2}, {}
    for key, value in state.items():
        name, _, end = key.rpartition(".")
        norm = "norm" in name or ".bn" in name or "downsample.1" in name or re.search(r"convs\.\d\.1", name) is not None
        if match := re.fullmatch(r"backbone\.body\.(?:conv1|bn1)", name):
            name = "conv1"
        elif match := re.fullmatch(r"backbone\.body\.layer(\d)\.(\d+)\.(?:(?:conv|bn)(\d)|downsample\.\d)", name):
            branch = f"branch2{'abc'[int(match[3]) - 1]}" if match[3] else "branch1"
            name = f"res{int(match[1]) + 1}_{match[2]}_{branch}"
        elif match := re.fullmatch(r"fpn\.(lateral|output)(?:_norm)?\.(\d)", name):
            level = int(match[2])
            inner, lateral = ("inner_", "_lateral" * (level < 3)) if match[1] == "lateral" else ("", "")
            name = f"fpn_{inner}res{level + 2}_{last[level]}_sum{lateral}"
        elif match := re.fullmatch(r"cascade\.box_heads\.(\d)\.(.*)", name):
            stage = ["", "_2", "_3"][int(match[1])]
            part = {"fc1": "fc6", "classifier": "cls_score", "deltas": "bbox_pred"}.get(match[2])
            if part == "cls_score":
                value = torch.cat([value[-1:], value[:-1]])
            if part == "bbox_pred":
                value = torch.cat([torch.full_like(value, 9), value])
            name = (part or f"head_conv{int(match[2][6]) + 1}") + stage
        else:
            name = {
                "rpn.conv": "conv_rpn_fpn2",
                "rpn.objectness": "rpn_cls_logits_fpn2",
                "rpn.deltas": "rpn_bbox_pred_fpn2",
            }[name]
        blobs[name + ("_gn" if norm else "") + ("_b" if end == "bias" else "_s" if norm else "_w")] = value.numpy()
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"blobs": blobs}, protocol=2))
    run_convert(tmp_path / "model.pkl", tmp_path / "dest.safetensors")
    made = load_checkpoint(tmp_path / "dest.safetensors")
    assert (made.config.model.style, made.config.model.norm, made.config.model.box_head) == (
        "pytorch",
        "group",
        "4conv1fc_gn",
    )
    assert made.state.keys() == state.keys()
    assert all(torch.equal(made.state[key], state[key]) for key in state)


def test_coco_names_follow_cocos_ids() -> None:
    assert len(COCO_NAMES) == len(COCO_IDS) == 80
    assert dict(zip(COCO_IDS, COCO_NAMES))[13] == "stop sign" and COCO_IDS[-1] == 90
    assert 12 not in COCO_IDS and COCO_NAMES[-1] == "toothbrush"


BACKBONES = {
    "torchvision": lambda state: state | {"fc.weight": torch.ones(10, 2048), "fc.bias": torch.ones(10)},
    "mmpretrain": lambda state: {
        "state_dict": {f"backbone.{key}": value for key, value in state.items()}
        | {"head.fc.weight": torch.ones(10, 2048)},
        "meta": {},
    },
    "caffe without statistics": lambda state: {key: value for key, value in state.items() if "running" not in key},
    "detectron2": lambda state: {
        "model": {d2_name(key): value for key, value in state.items() if "num_b" not in key}
        | {"stem.fc.weight": torch.ones(10, 2048)},
        "matching_heuristics": True,
    },
}


def d2_name(key: str) -> str:
    key = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", key)
    key = key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    key = re.sub(r"\bbn(\d)", r"conv\1.norm", key)
    return f"stem.{key}" if key.startswith("conv1") else key


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_alone_becomes_backbone_weights(tmp_path: Path, name: str) -> None:
    state = timm.create_model("resnet50", features_only=True).state_dict()
    source, dest = tmp_path / "backbone.pth", tmp_path / "backbone.safetensors"
    torch.save(BACKBONES[name](state), source)
    run_convert(source, dest)
    made = load_file(dest)
    assert set(made) == set(state)
    assert all(torch.equal(made[key], state[key]) for key in state if "running_var" not in key)
    model = build_model(ModelConfig(head_channels=8, fpn_channels=8), 2)
    load_backbone_weights(model.backbone, dest)
    assert torch.equal(model.backbone.body.state_dict()["layer4.2.conv3.weight"], state["layer4.2.conv3.weight"])
    with pytest.raises(CheckpointError, match="backbone"):
        load_checkpoint(dest)


def test_preprocessing_is_moved_into_the_stem() -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 64, 7, stride=2, bias=False).double(), nn.BatchNorm2d(64).double().eval()
    nn.init.normal_(norm.running_mean)
    image = torch.rand(1, 3, 40, 40, dtype=torch.float64) * 255  # RGB
    mean, std = (100.0, 110.0, 120.0), (2.0, 3.0, 4.0)  # of BGR images
    our_mean, our_std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    reference = norm(conv((image.flip(1) - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]))
    state = {"backbone.body.conv1.weight": conv.weight.detach(), "backbone.body.bn1.running_mean": norm.running_mean}
    assert absorb_preprocessing(state, bgr=True, mean=mean, std=std, our_bgr=False, our_mean=our_mean, our_std=our_std)
    conv.weight.data = state["backbone.body.conv1.weight"].double()
    norm.running_mean = state["backbone.body.bn1.running_mean"].double()
    ours = norm(conv((image - torch.tensor(our_mean)[:, None, None]) / torch.tensor(our_std)[:, None, None]))
    assert torch.allclose(ours, reference, rtol=1e-5, atol=1e-4)
    assert not absorb_preprocessing(
        state, bgr=False, mean=our_mean, std=our_std, our_bgr=False, our_mean=our_mean, our_std=our_std
    )


def test_mmdetections_bgr_resnext_is_turned_to_rgb() -> None:
    stem = {"backbone.body.conv1.weight": torch.rand(64, 3, 7, 7), "backbone.body.bn1.running_mean": torch.rand(64)}
    seen = Structure("resnext101_32x8d.tv_in1k", 101, 32, 8, 3, 80, {})
    for groups, turned in ((32, True), (64, False)):
        state = dict(stem)
        kind = replace(seen, groups=groups)
        made = Decisions(state, "mmdetection", kind, Hints(), "x.pth", Asked())
        match_preprocessing(made, ModelConfig(), FoundWeights({}))
        wanted = stem["backbone.body.conv1.weight"].flip(1) if turned else stem["backbone.body.conv1.weight"]
        assert torch.allclose(state["backbone.body.conv1.weight"], wanted)
        assert torch.equal(state["backbone.body.bn1.running_mean"], stem["backbone.body.bn1.running_mean"])
    state = dict(stem)  # detectron2's is BGR with a std that its semantics here do not divide by
    made = Decisions(state, "detectron2", seen, Hints(), "x.pth", Asked())
    match_preprocessing(made, ModelConfig(semantics="detectron2"), FoundWeights({}))
    std = torch.tensor([57.375, 57.12, 58.395])[:, None, None]
    assert torch.allclose(state["backbone.body.conv1.weight"], stem["backbone.body.conv1.weight"] / std)


def test_every_key_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    state = small_state()
    del state["neck.fpn_convs.2.conv.bias"]
    state["roi_head.extra.weight"] = torch.ones(2)
    state["backbone.layer2.0.conv9.weight"] = torch.ones(2)
    state["rpn_head.rpn_conv.weight"] = torch.ones(32, 32, 1, 1)
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path, {"state_dict": state})
    text = str(caught.value)
    assert "\n" not in text and str(tmp_path / "source.pth") in text
    assert "1 missing: fpn.output.2.bias" in text and "rpn.conv.weight (32, 32, 1, 1) instead of (32, 32, 3, 3)" in text
    assert "roi_head.extra.weight" in text and "layer2.0.conv9.weight" in text
    assert not (tmp_path / "dest.safetensors").exists()


STRANGE = {
    "missing": None,
    "a single number": torch.zeros(()),
    "empty": torch.zeros(3, 0),
    "flat": torch.ones(5),
    "deeper": torch.ones(7, 1, 1, 1, 1),
}


@pytest.mark.parametrize("library", ["mmdetection", "detectron2", "torchvision", "a backbone"])
def test_a_file_that_lacks_or_reshapes_any_weight_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    monkeypatch.setattr(checkpoint, "_shapes", functools.cache(checkpoint._shapes))
    monkeypatch.setattr(checkpoint, "save_checkpoint", lambda *args, **kwargs: pytest.fail("written"))
    monkeypatch.setattr(checkpoint, "write_tensors", lambda *args, **kwargs: pytest.fail("written"))
    whole = {
        "mmdetection": small_state,
        "detectron2": lambda: foreign_state(D2),
        "torchvision": torchvision_state,
        "a backbone": lambda: {key: value for key, value in small_state().items() if key.startswith("backbone")},
    }[library]()
    of_each_kind = {re.sub(r"\d", "0", key): key for key in whole if not key.endswith("num_batches_tracked")}
    assert len(of_each_kind) > 10
    for key in of_each_kind.values():
        for strange in STRANGE.values():
            state = {name: value for name, value in whole.items() if name != key}
            state |= {} if strange is None else {key: strange}
            with pytest.raises(CheckpointError) as caught:
                checkpoint._convert(FoundWeights(state), Path("x.safetensors"), Asked(), {"file": "x.pth"})
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("backbone.layer1.0.bn1.running_var", "1 missing: backbone.body.layer1.0.bn1.running_var"),
        ("backbone.bn1.running_mean", "1 missing: backbone.body.bn1.running_mean"),
        ("backbone.conv1.weight", "1 missing: backbone.body.conv1.weight"),
        ("roi_head.bbox_head.1.fc_cls.weight", "1 missing: cascade.box_heads.1.classifier.weight"),
        ("roi_head.mask_head.1.conv_logits.weight", "1 missing: cascade.mask_heads.1.logits.weight"),
    ],
)
def test_a_single_weight_that_is_missing_is_listed(tmp_path: Path, key: str, said: str) -> None:
    state = small_state()
    del state[key]
    with pytest.raises(CheckpointError, match=rf"do not fit the network \(resnet18.tv_in1k\); {re.escape(said)}$"):
        convert(tmp_path, {"state_dict": state})
    assert not (tmp_path / "dest.safetensors").exists()


def test_statistics_are_made_up_only_where_a_file_has_none_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stem = "backbone.bottom_up.stem.conv1.norm.running_"
    state = foreign_state(D2)
    del state[stem + "var"], state[stem + "mean"]
    with pytest.raises(CheckpointError, match=r"2 missing: backbone\.body\.bn1\.running_mean, "):
        convert(tmp_path, {"model": state})
    merged = {key: value for key, value in state.items() if "running" not in key}
    made = convert(tmp_path, {"model": merged})
    assert torch.equal(made.state["backbone.body.layer1.0.bn1.running_mean"], torch.zeros(64))
    assert "norms: without statistics; taken for batch norms merged into scale and bias" in capsys.readouterr().out
    parameters = {key: value for key, value in small_state().items() if "running" not in key}  # no state_dict
    (tmp_path / "dest.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"40 missing: backbone\.body\.\S+running_mean, "):
        convert(tmp_path, {"state_dict": parameters})


def test_a_negative_variance_is_refused(tmp_path: Path) -> None:
    state = small_state()
    state["backbone.bn1.running_var"].fill_(-1.0)
    with pytest.raises(
        CheckpointError, match=r"1 of its norms have a negative variance \(backbone.body.bn1.running_var"
    ):
        convert(tmp_path, {"state_dict": state})


def test_names_of_classes_are_printed_on_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("a\nb", "\x1b[31mc", "d")
    made = convert(tmp_path, {"state_dict": small_state(), "meta": {"CLASSES": names}})
    assert made.class_names == names
    assert "  class names: its metadata (a\\nb, \\x1b[31mc, d)\n" in capsys.readouterr().out


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    state = small_state()
    state["neck.fpn_convs.2.conv.bias"][3] = float("nan")
    with pytest.raises(CheckpointError, match=r"not finite \(fpn\.output\.2\.bias"):
        convert(tmp_path, {"state_dict": state})


def test_unknown_anchors_need_a_recipe(tmp_path: Path) -> None:
    state = small_state()
    state["rpn_head.rpn_cls.weight"], state["rpn_head.rpn_cls.bias"] = torch.ones(9, 32, 1, 1), torch.ones(9)
    state["rpn_head.rpn_reg.weight"], state["rpn_head.rpn_reg.bias"] = torch.ones(36, 32, 1, 1), torch.ones(36)
    with pytest.raises(CheckpointError, match=r"9 anchors.*--config"):
        convert(tmp_path, {"state_dict": state})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"state_dict": {"bbox_head.0.fc_cls.weight": torch.ones(2)}}, "mmdetection 1"),
        ({"model": {"detr.weight": torch.ones(2)}}, "none of the formats"),
        ({"epoch": 3}, "no weights"),
        ([1, 2], "not a state_dict"),
        (torch.ones(3), "not a state_dict"),
    ],
)
def test_other_checkpoints_are_named(tmp_path: Path, content: object, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        convert(tmp_path, content)
    assert "\n" not in str(caught.value) and not (tmp_path / "dest.safetensors").exists()


def test_a_hostile_checkpoint_writes_nothing(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    with pytest.raises(CheckpointError, match="refused"):
        convert(tmp_path, {"state_dict": {"w": torch.ones(1)}, "x": [Hostile()]})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.pth"]


def test_an_existing_file_is_kept_unless_it_is_the_same_conversion(tmp_path: Path) -> None:
    state = small_state()
    convert(tmp_path, collections.OrderedDict(state_dict=state))
    dest = tmp_path / "dest.safetensors"
    before = load_file(dest)
    run_convert(tmp_path / "source.pth", dest)
    assert all(torch.equal(value, before[key]) for key, value in load_file(dest).items())
    state["rpn_head.rpn_cls.bias"] += 1
    with pytest.raises(CheckpointError, match=r"exists.*--overwrite"):
        convert(tmp_path, {"state_dict": state})
    assert all(torch.equal(value, before[key]) for key, value in load_file(dest).items())
    other = tmp_path / "notes.safetensors"
    other.write_text("mine")
    with pytest.raises(CheckpointError, match="exists"):
        run_convert(tmp_path / "source.pth", other)
    run_convert(tmp_path / "source.pth", dest, overwrite=True)
    assert not torch.equal(load_file(dest)["rpn.objectness.bias"], before["rpn.objectness.bias"])
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="folder"):
        run_convert(tmp_path / "source.pth", tmp_path / "folder.safetensors", overwrite=True)
    with pytest.raises(CheckpointError, match="already a checkpoint"):
        run_convert(dest, tmp_path / "again.safetensors")
    with pytest.raises(CheckpointError, match="safetensors"):
        run_convert(tmp_path / "source.pth", tmp_path / "dest.pth")


@pytest.fixture
def small_detector(tmp_path: Path) -> Path:
    """A small mmdetection checkpoint with masks, whose config text asks for small images."""
    state = small_state()
    generator = torch.Generator().manual_seed(5)
    for key, std in (("fc_cls.weight", 0.5), ("fc_reg.weight", 0.05), ("conv_logits.weight", 0.5)):
        for name in (name for name in state if name.endswith(key)):
            state[name] = torch.randn(state[name].shape, generator=generator) * std
    text = (
        "model = dict(type='CascadeRCNN', test_cfg=dict(rcnn=dict(max_per_img=60)))\n"
        "test_pipeline = [dict(type='Resize', scale=(160, 96), keep_ratio=True)]\n"
    )
    path = tmp_path / "epoch_12.pth"
    torch.save({"state_dict": state, "meta": {"cfg": text, "dataset_meta": {"classes": ("cat", "dog", "eel")}}}, path)
    return path


def test_convert_and_predict_as_commands_give_what_python_gives(
    tmp_path: Path, small_detector: Path, run_command: RunCommand
) -> None:
    image, dest = MANIFESTS / "synthetic.png", tmp_path / "ours.safetensors"
    converted = run_command("convert", small_detector, dest)
    assert converted.returncode == 0, converted.stderr
    predicted = run_command("predict", dest, image, "--out", tmp_path / "found", "--score", "0.4")
    assert predicted.returncode == 0, predicted.stderr
    written = json.loads((tmp_path / "found" / "predictions.json").read_text(encoding="utf-8"))
    wanted = load(dest, device="cpu").predict(image)
    assert len(wanted) == len(written) == 60 and len(set(wanted.names)) > 1
    for result, known, name in zip(written, wanted.to_coco(), wanted.names):
        assert (result["category_id"], result["category"]) == (known["category_id"], name)
        assert result["bbox"] == pytest.approx(known["bbox"], abs=0.01)
        assert result["score"] == pytest.approx(known["score"], abs=1e-5)
        assert float(coco_mask.iou([result["segmentation"]], [known["segmentation"]], [0])[0, 0]) > 0.99
    with Image.open(image) as before, Image.open(tmp_path / "found" / "drawings" / "synthetic.png") as drawn:
        assert drawn.size == before.size
        difference = np.abs(np.asarray(drawn.convert("RGB"), int) - np.asarray(before.convert("RGB"), int)).sum(axis=2)
    x1, y1, _, y2 = (round(value) for value in wanted.boxes[0].tolist())
    assert np.median(difference[y1 + 1 : y2 - 1, x1]) > 100, "the best detection's box is drawn where it is"
