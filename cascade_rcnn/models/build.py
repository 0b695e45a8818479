"""From a configuration to modules: the only place where the two meet; and the table of what implementations do
differently."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cascade_rcnn.config import ModelConfig
from cascade_rcnn.errors import CheckpointError
from cascade_rcnn.models.anchors import AnchorGenerator
from cascade_rcnn.models.backbone import STRIDES, Backbone, Deformable
from cascade_rcnn.models.box_head import BoxHead, ConvBoxHead
from cascade_rcnn.models.cascade import Cascade, CascadeDetails, Stage, StageDetails
from cascade_rcnn.models.cascade_rcnn import CascadeRCNN
from cascade_rcnn.models.class_losses import build_class_loss
from cascade_rcnn.models.detectron_rules import (
    DetectronAnchorGenerator,
    DetectronCascade,
    DetectronRPN,
    DetectronStage,
    inclusive_nms_limit,
)
from cascade_rcnn.models.fpn import FeaturePyramid
from cascade_rcnn.models.mask_head import MaskHead
from cascade_rcnn.models.ops.roi_sampling import Frame, Sampling
from cascade_rcnn.models.rpn import RPN, RPNDetails

RGB_MEAN, RGB_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
BGR_MEAN, BGR_STD = (103.53, 116.28, 123.675), (1.0, 1.0, 1.0)
DETECTRON_MEAN = (102.9801, 115.9465, 122.7717)  # BGR


@dataclass(frozen=True, kw_only=True)
class Rules:
    """One implementation's choices where the published ones differ (docs/parity.md)."""

    halving_loss_weights: bool  # stage losses 1, 0.5, 0.25 or 1, 1, 1
    resample: bool
    divide_gradient: bool  # the gradient from each of n box heads into the features is divided by n
    box_beta: float
    rpn_box_beta: float
    one_stage_box_beta: float  # a single stage (Faster R-CNN) uses this for both losses; Detectron not in its RPN
    train_proposals: int
    one_stage_train_proposals: int
    best_box_iou: float
    rematch_best: bool
    fixed_rpn_normalizer: bool
    limit_shrinking: bool
    mean_of_logits: bool
    bgr: bool  # network input BGR with std 1 whatever the style
    mask_padding: bool = True
    mmdetection_ranking: bool = False  # its float32 rounding where scores or overlaps tie
    anchors_inside: bool = False  # the RPN of a cascade (not of one stage) learns from anchors inside the image only
    rounded_anchors: bool = False
    sampling_ratio: int = 0
    roi_frame: Frame = Frame.ALIGNED
    detectron: bool = False  # the authors' release, whose rules are in models/detectron_rules.py


SEMANTICS = {
    "mmdetection": Rules(
        halving_loss_weights=True,
        resample=True,
        divide_gradient=False,
        box_beta=1.0,
        rpn_box_beta=1 / 9,
        one_stage_box_beta=0.0,
        train_proposals=2000,
        one_stage_train_proposals=1000,
        best_box_iou=0.3,
        rematch_best=True,
        fixed_rpn_normalizer=False,
        limit_shrinking=True,
        mean_of_logits=True,
        bgr=False,
        anchors_inside=True,
        mmdetection_ranking=True,
    ),
    "detectron2": Rules(
        halving_loss_weights=False,
        resample=False,
        divide_gradient=True,
        box_beta=0.0,
        rpn_box_beta=0.0,
        one_stage_box_beta=0.0,
        train_proposals=2000,
        one_stage_train_proposals=1000,
        best_box_iou=0.0,
        rematch_best=False,
        fixed_rpn_normalizer=True,
        limit_shrinking=False,
        mean_of_logits=False,
        bgr=True,
        mask_padding=False,
    ),
    "paper": Rules(
        halving_loss_weights=True,
        resample=False,
        divide_gradient=False,
        box_beta=1.0,
        rpn_box_beta=1 / 9,
        one_stage_box_beta=1.0,
        train_proposals=2000,
        one_stage_train_proposals=2000,
        best_box_iou=0.0,
        rematch_best=False,
        fixed_rpn_normalizer=True,
        limit_shrinking=False,
        mean_of_logits=False,
        bgr=True,
        sampling_ratio=2,
        roi_frame=Frame.PLUS_ONE,
        detectron=True,
    ),
    "torchvision": Rules(
        halving_loss_weights=False,
        resample=True,
        divide_gradient=False,
        box_beta=1 / 9,
        rpn_box_beta=1 / 9,
        one_stage_box_beta=1 / 9,
        train_proposals=2000,
        one_stage_train_proposals=2000,
        best_box_iou=0.0,
        rematch_best=False,
        fixed_rpn_normalizer=False,
        limit_shrinking=False,
        mean_of_logits=False,
        bgr=False,
        mask_padding=False,
        rounded_anchors=True,
        sampling_ratio=2,
        roi_frame=Frame.UNALIGNED,
    ),
}


def normalization(config: ModelConfig) -> tuple[tuple[float, float, float], tuple[float, float, float], bool]:
    """Mean and std of the network's input in its own order of channels, and whether that is BGR."""
    semantics = SEMANTICS[config.semantics]
    if semantics.detectron:
        return DETECTRON_MEAN, BGR_STD, True
    bgr = semantics.bgr or config.style == "caffe"
    return (BGR_MEAN, BGR_STD, True) if bgr else (RGB_MEAN, RGB_STD, False)


def stage_stds(config: ModelConfig) -> tuple[tuple[float, ...], ...]:
    """Standard deviations of each stage's deltas: (.1, .1, .2, .2) divided by 1, 2, 3, ..., rounded in mmdetection."""
    if config.stage_stds is not None:
        return config.stage_stds
    if config.semantics in ("detectron2", "paper"):  # box weights (10, 10, 5, 5) times 1, 2, 3
        return tuple(tuple(s / (k + 1) for s in (0.1, 0.1, 0.2, 0.2)) for k in range(len(config.stage_ious)))
    table = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067), (0.025, 0.025, 0.05, 0.05))
    more = tuple(tuple(s / (k + 1) for s in table[0]) for k in range(4, len(config.stage_ious)))
    return (table + more)[: len(config.stage_ious)]


def check_backbone(config: ModelConfig) -> None:
    """Raise ConfigError for a backbone that cannot be used as it is configured; nothing is downloaded or allocated."""
    with torch.device("meta"):
        _backbone(config)


def anchor_sizes(config: ModelConfig) -> tuple[tuple[float, ...], ...]:
    """Sides of the anchors in pixels at each level."""
    sizes, strides = config.anchor_sizes, (*STRIDES, 64)
    if sizes is None:
        return tuple(tuple(scale * stride for scale in config.anchor_scales) for stride in strides)
    each = len(sizes) // len(strides)
    return tuple(tuple(sizes[i : i + each]) for i in range(0, len(sizes), each))


def build_model(config: ModelConfig, num_classes: int, *, pretrained: bool = False) -> CascadeRCNN:
    """The network of ``config`` for ``num_classes`` classes (without background), in training mode.

    ``pretrained`` also loads the backbone's ImageNet weights that the configuration names; give False when a whole
    checkpoint is loaded afterwards.
    """
    semantics = SEMANTICS[config.semantics]
    wanted = pretrained and config.pretrained
    mean, std, bgr = normalization(config)
    if wanted and not config.backbone_weights and config.style == "caffe":
        raise CheckpointError(
            "timm has no Caffe-style ImageNet weights: give a file with --model.backbone-weights FILE (detectron2's "
            "R-50.pkl through cascade-rcnn convert), or use --model.style pytorch, or --model.pretrained False"
        )
    backbone = _backbone(config, pretrained=wanted and not config.backbone_weights)
    if wanted and config.backbone_weights:
        load_backbone_weights(backbone, Path(config.backbone_weights))
    fpn = FeaturePyramid(backbone.channels, config.fpn_channels, norm=_norm_elsewhere(config))
    model = CascadeRCNN(
        backbone,
        fpn,
        _build_rpn(config, semantics),
        _build_cascade(config, semantics, num_classes),
        mean=mean,
        std=std,
        bgr=bgr,
    )
    return model.train()


def _norm_elsewhere(config: ModelConfig) -> str:
    """Of FPN and mask heads."""
    return "group" if config.norm == "group" else "batch" if config.fpn_and_mask_norms else "none"


def _backbone(config: ModelConfig, *, pretrained: bool = False) -> Backbone:
    deformable = Deformable(config.deformable_stages, config.deformable == "modulated", config.deformable_groups)
    return Backbone(
        config.backbone,
        pretrained=pretrained,
        style=config.style,
        norm=config.norm,
        frozen_stages=config.frozen_stages,
        deformable=None if config.deformable == "none" else deformable,
        output_norms=config.output_norms,
        drop_path=config.drop_path,
    )


def _build_rpn(config: ModelConfig, semantics: Rules) -> RPN:
    one_stage, detectron = len(config.stage_ious) == 1, semantics.detectron
    train_proposals = config.train_proposals or (
        semantics.one_stage_train_proposals if one_stage else semantics.train_proposals
    )
    details = RPNDetails(
        samples=config.rpn_samples,
        box_beta=semantics.one_stage_box_beta if one_stage and not detectron else semantics.rpn_box_beta,
        best_box_iou=semantics.best_box_iou,
        rematch_best=semantics.rematch_best,
        fixed_normalizer=semantics.fixed_rpn_normalizer,
        pre_nms=(config.train_proposals or 2000, max(1000, config.test_proposals)),
        post_nms=(train_proposals, config.test_proposals),
        limit_shrinking=semantics.limit_shrinking,
        nms_iou=inclusive_nms_limit(0.7) if detectron else 0.7,
        mask_padding=semantics.mask_padding,
        inside_only=detectron or (semantics.anchors_inside and not one_stage),
        offset_levels=semantics.mmdetection_ranking,
        rank_by_probability=semantics.mmdetection_ranking,
    )
    make_anchors, make_rpn = (DetectronAnchorGenerator, DetectronRPN) if detectron else (AnchorGenerator, RPN)
    anchors = make_anchors(
        (*STRIDES, 64),
        scales=config.anchor_scales,
        ratios=config.anchor_ratios,
        sizes=anchor_sizes(config) if config.anchor_sizes else None,
        rounded=semantics.rounded_anchors,
    )
    return make_rpn(config.fpn_channels, anchors, convs=config.rpn_convs, details=details)


def _build_stages(config: ModelConfig, semantics: Rules, num_classes: int) -> list[Stage]:
    stages = len(config.stage_ious)
    falling = 0.5 if semantics.halving_loss_weights else 1.0
    weights = config.stage_loss_weights or tuple(falling**k for k in range(stages))
    make_stage = DetectronStage if semantics.detectron else Stage
    made = []
    for k, (iou, stds, weight) in enumerate(zip(config.stage_ious, stage_stds(config), weights)):
        draws = semantics.resample or k == 0
        feature_gradient = 1 / stages if semantics.divide_gradient else 1.0
        details = StageDetails(
            iou=iou,
            stds=stds,
            loss_weight=weight,
            mask_weight=1.0 if semantics.detectron else weight,
            samples=config.roi_samples if draws else None,
            add_truth=draws or semantics.detectron,
            keep_truth=not (semantics.resample or semantics.detectron),
            box_beta=semantics.one_stage_box_beta if stages == 1 else semantics.box_beta,
            box_loss=config.box_loss,
            box_loss_weight=config.box_loss_weight,
            feature_gradient=weight if semantics.detectron else feature_gradient,
            limit_shrinking=semantics.limit_shrinking,
        )
        plain = config.class_loss == "cross_entropy"
        made.append(make_stage(details, None if plain else build_class_loss(config.class_loss, num_classes)))
    return made


def _build_cascade(config: ModelConfig, semantics: Rules, num_classes: int) -> Cascade:
    stages = len(config.stage_ious)
    choices: dict[str, Callable[..., BoxHead]] = {
        "2fc": BoxHead,
        "4conv1fc": partial(ConvBoxHead, norm="none"),
        "4conv1fc_gn": partial(ConvBoxHead, norm="group"),
        "4conv1fc_bn": partial(ConvBoxHead, norm="batch"),
    }
    make_box_head = choices[config.box_head]
    box_heads: list[nn.Module] = [
        make_box_head(
            config.fpn_channels, num_classes, width=config.head_channels, class_agnostic=config.class_agnostic_boxes
        )
        for _ in range(stages)
    ]
    number = {"none": 0, "every": stages, "last": 1, "one": 1}[config.masks]
    mask_heads = [
        MaskHead(config.fpn_channels, num_classes, width=config.mask_channels, norm=_norm_elsewhere(config))
        for _ in range(number)
    ]
    details = CascadeDetails(
        mean_of_logits=semantics.mean_of_logits,
        masks=config.masks,
        score_threshold=config.score_threshold,
        nms=config.nms,
        nms_iou=inclusive_nms_limit(config.nms_iou) if semantics.detectron else config.nms_iou,
        max_detections=config.max_detections,
    )
    make_cascade = DetectronCascade if semantics.detectron else Cascade
    cascade = make_cascade(
        _build_stages(config, semantics, num_classes),
        box_heads,
        mask_heads,
        sampling=Sampling(7, STRIDES, semantics.sampling_ratio, semantics.roi_frame),
        details=details,
    )
    if config.stop_after_stage:
        cascade.stages_at_test = config.stop_after_stage
    return cascade


def load_backbone_weights(backbone: Backbone, path: Path) -> None:
    """Load a state_dict (.safetensors or .pth) into ``backbone``; keys of a classifier are left out.

    Raises :class:`CheckpointError` if the file is missing or does not fit.
    """
    if not path.is_file():
        raise CheckpointError(f"model.backbone_weights {path}: no such file")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state: dict[str, Any] = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state) if isinstance(state, dict) else state
    wanted = backbone.body.state_dict()
    state = {key.removeprefix("backbone.").removeprefix("body."): value for key, value in state.items()}
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    wrong = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    if missing or wrong:
        raise CheckpointError(
            f"model.backbone_weights {path} does not fit {type(backbone.body).__name__}: {len(missing)} keys are "
            f"missing ({', '.join(missing[:3])}), {len(wrong)} have another shape ({', '.join(wrong[:3])})"
        )
    backbone.body.load_state_dict({key: state.get(key, wanted[key]) for key in wanted})
