"""mmdetection's config text in a checkpoint's metadata: what is taken over, what is left out, what cannot be.

The text is Python; only its syntax tree is looked at. Every setting of the network and its tests gets one of four
answers, by the rules below: taken over (or seen in the weights), ``left_out`` (training, and what is not known here),
``unlike`` (the network here computes something else, but a recipe can be preferred to the text), or ``impossible``.
"""

from __future__ import annotations

import ast
import fnmatch
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from cascade_rcnn.convert import anchors
from cascade_rcnn.convert.anchors import Anchors
from cascade_rcnn.convert.key_tables import BODY, BOX, MASK
from cascade_rcnn.errors import CheckpointError
from cascade_rcnn.messages import shown

_MAX_TEXT = 2_000_000
_ZEROS, _ONES = [0, 0, 0, 0], [1, 1, 1, 1]


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
    anchors: Anchors | None = None
    num_classes: int = 0
    backbone_eps: float | None = None
    standardized: tuple[str, ...] = ()  # our prefixes whose convolutions have weight standardisation
    left_out: list[str] = field(default_factory=list)
    unlike: list[str] = field(default_factory=list)
    impossible: list[str] = field(default_factory=list)
    found: bool = False


# The rules: (path in the text, verdict, values that mean what is done here). The first row that fits a path decides; a
# list of stages counts as one path. "taken": read by a function below, or seen in the weights, or without effect.
_TAKEN, _IMPOSSIBLE, _UNLIKE, _TRAINING = "taken", "impossible", "unlike", "training"
_Rule = tuple[str, str, tuple[Any, ...]]


def _coder(path: str, stds: str, *expected_stds: Any) -> list[_Rule]:
    return [
        (f"{path}.bbox_coder.type", _IMPOSSIBLE, ("DeltaXYWHBBoxCoder",)),
        (f"{path}.bbox_coder.target_means", _IMPOSSIBLE, (_ZEROS,)),
        (f"{path}.bbox_coder.target_stds", stds, expected_stds),
        (f"{path}.bbox_coder.clip_border", _IMPOSSIBLE, (True,)),
        (f"{path}.bbox_coder.add_ctr_clamp", _IMPOSSIBLE, (False,)),
        (f"{path}.bbox_coder.ctr_clamp", _TAKEN, ()),
        (f"{path}.bbox_coder.use_box_type", _TAKEN, ()),
    ]


def _norm_rules(path: str) -> list[_Rule]:
    return [
        (f"{path}.norm_cfg.type", _IMPOSSIBLE, ("BN", "BN2d", "SyncBN", "MMSyncBN", "NaiveSyncBN", "GN")),
        (f"{path}.norm_cfg.num_groups", _IMPOSSIBLE, (32,)),
        (f"{path}.norm_cfg.eps", _IMPOSSIBLE, (1e-5,)),
        (f"{path}.norm_cfg.requires_grad", _TAKEN, ()),
        (f"{path}.norm_cfg.*", _TAKEN, ()),
        (f"{path}.conv_cfg.type", _IMPOSSIBLE, ("Conv", "Conv2d", "ConvWS")),
    ]


_RULES: list[_Rule] = [
    ("*.init_cfg.*", _TAKEN, ()),
    ("*.init_cfg", _TAKEN, ()),
    ("*pretrained", _TAKEN, ()),
    ("init_cfg*", _TAKEN, ()),
    ("type", _IMPOSSIBLE, ("FasterRCNN", "MaskRCNN", "CascadeRCNN", "TwoStageDetector")),
    ("data_preprocessor.pad_size_divisor", _TRAINING, (32, 1)),
    ("data_preprocessor.pad_value", _TRAINING, (0,)),
    ("data_preprocessor.batch_augments*", _TRAINING, (None,)),
    ("data_preprocessor.*", _TAKEN, ()),
    # Backbone
    ("backbone.type", _IMPOSSIBLE, ("ResNet", "ResNeXt", "ResNetV1c", "ResNetV1d", "TIMMBackbone")),
    ("backbone.norm_cfg.eps", _TAKEN, ()),
    *_norm_rules("backbone"),
    ("backbone.strides", _IMPOSSIBLE, ([1, 2, 2, 2],)),
    ("backbone.dilations", _IMPOSSIBLE, ([1, 1, 1, 1],)),
    ("backbone.out_indices", _IMPOSSIBLE, ([0, 1, 2, 3],)),
    ("backbone.num_stages", _IMPOSSIBLE, (4,)),
    ("backbone.dcn*", _IMPOSSIBLE, (None, False)),
    ("backbone.plugins*", _IMPOSSIBLE, (None,)),
    *[
        (f"backbone.{name}", _TAKEN, ())
        for name in (
            *(
                "depth",
                "groups",
                "base_width",
                "base_channels",
                "stem_channels",
                "in_channels",
                "deep_stem",
                "avg_down",
            ),
            *("style", "frozen_stages", "norm_eval", "with_cp", "zero_init_residual", "stage_with_dcn"),
            *("model_name", "features_only"),
        )
    ],
    # Neck
    ("neck.type", _IMPOSSIBLE, ("FPN",)),
    ("neck.num_outs", _IMPOSSIBLE, (5,)),
    ("neck.start_level", _IMPOSSIBLE, (0,)),
    ("neck.end_level", _IMPOSSIBLE, (-1, 3)),
    ("neck.add_extra_convs", _IMPOSSIBLE, (False,)),
    ("neck.act_cfg*", _IMPOSSIBLE, (None,)),
    ("neck.upsample_cfg.mode", _IMPOSSIBLE, ("nearest",)),
    ("neck.upsample_cfg.scale_factor", _IMPOSSIBLE, (2,)),
    *_norm_rules("neck"),
    *[
        (f"neck.{name}", _TAKEN, ())
        for name in (
            *("in_channels", "out_channels", "relu_before_extra_convs", "no_norm_on_lateral"),
            "extra_convs_on_inputs",
        )
    ],
    # RPN
    ("rpn_head.type", _IMPOSSIBLE, ("RPNHead",)),
    ("rpn_head.anchor_generator.type", _IMPOSSIBLE, ("AnchorGenerator",)),
    ("rpn_head.anchor_generator.center_offset", _IMPOSSIBLE, (0,)),
    ("rpn_head.anchor_generator.centers", _IMPOSSIBLE, (None,)),
    ("rpn_head.anchor_generator.*", _TAKEN, ()),
    *_coder("rpn_head", _IMPOSSIBLE, _ONES),
    ("rpn_head.loss_cls.use_sigmoid", _IMPOSSIBLE, (True,)),
    ("rpn_head.loss_cls.type", _TRAINING, ("CrossEntropyLoss",)),
    ("rpn_head.loss_bbox.type", _TRAINING, ("SmoothL1Loss", "L1Loss")),
    ("rpn_head.loss_*.loss_weight", _TRAINING, (1,)),
    ("rpn_head.loss_bbox.beta", _TRAINING, (0.1111111111111111, 0.1111111, 0.111)),
    ("rpn_head.loss_*", _TRAINING, ()),
    ("rpn_head.reg_decoded_bbox", _TRAINING, (False,)),
    *[(f"rpn_head.{name}", _TAKEN, ()) for name in ("in_channels", "feat_channels", "num_convs", "num_classes")],
    # RoI heads
    ("roi_head.type", _IMPOSSIBLE, ("StandardRoIHead", "CascadeRoIHead", "PISARoIHead", "DynamicRoIHead")),
    ("roi_head.num_stages", _TAKEN, ()),
    ("roi_head.stage_loss_weights", _TAKEN, ()),
    ("roi_head.*_roi_extractor.type", _IMPOSSIBLE, ("SingleRoIExtractor",)),
    ("roi_head.*_roi_extractor.roi_layer.type", _IMPOSSIBLE, ("RoIAlign",)),
    ("roi_head.*_roi_extractor.roi_layer.sampling_ratio", _IMPOSSIBLE, (0, -1)),
    ("roi_head.*_roi_extractor.roi_layer.aligned", _IMPOSSIBLE, (True,)),
    ("roi_head.*_roi_extractor.roi_layer.pool_mode", _IMPOSSIBLE, ("avg",)),
    ("roi_head.bbox_roi_extractor.roi_layer.output_size", _IMPOSSIBLE, (7, [7, 7])),
    ("roi_head.mask_roi_extractor.roi_layer.output_size", _IMPOSSIBLE, (14, [14, 14])),
    ("roi_head.*_roi_extractor.roi_layer.*", _TAKEN, ()),
    ("roi_head.*_roi_extractor.featmap_strides", _IMPOSSIBLE, ([4, 8, 16, 32],)),
    ("roi_head.*_roi_extractor.finest_scale", _IMPOSSIBLE, (56,)),
    ("roi_head.*_roi_extractor.out_channels", _TAKEN, ()),
    ("roi_head.mask_roi_extractor", _TAKEN, ()),
    *_coder("roi_head.bbox_head", _TAKEN),
    (
        "roi_head.bbox_head.type",
        _IMPOSSIBLE,
        ("Shared2FCBBoxHead", "Shared4Conv1FCBBoxHead", "ConvFCBBoxHead", "BBoxHead"),
    ),
    ("roi_head.bbox_head.loss_cls.use_sigmoid", _IMPOSSIBLE, (False,)),
    ("roi_head.bbox_head.loss_cls.type", _TRAINING, ("CrossEntropyLoss",)),
    ("roi_head.bbox_head.loss_bbox.type", _TRAINING, ("SmoothL1Loss", "L1Loss")),
    ("roi_head.bbox_head.loss_bbox.beta", _TRAINING, (1,)),
    ("roi_head.*.loss_*.loss_weight", _TRAINING, (1,)),
    ("roi_head.bbox_head.loss_*", _TRAINING, ()),
    ("roi_head.bbox_head.reg_decoded_bbox", _TRAINING, (False,)),
    ("roi_head.bbox_head.*_predictor_cfg.type", _IMPOSSIBLE, ("Linear",)),
    ("roi_head.bbox_head.*_predictor_cfg.*", _TAKEN, ()),
    ("roi_head.bbox_head.with_avg_pool", _IMPOSSIBLE, (False,)),
    ("roi_head.bbox_head.roi_feat_size", _IMPOSSIBLE, (7, [7, 7])),
    ("roi_head.bbox_head.with_cls", _IMPOSSIBLE, (True,)),
    ("roi_head.bbox_head.with_reg", _IMPOSSIBLE, (True,)),
    *_norm_rules("roi_head.bbox_head"),
    *[
        (f"roi_head.bbox_head.{name}", _TAKEN, ())
        for name in (
            *("in_channels", "fc_out_channels", "conv_out_channels", "num_classes", "reg_class_agnostic"),
            *("num_shared_convs", "num_shared_fcs", "num_cls_convs", "num_cls_fcs", "num_reg_convs", "num_reg_fcs"),
        )
    ],
    ("roi_head.mask_head.type", _IMPOSSIBLE, ("FCNMaskHead",)),
    ("roi_head.mask_head.predictor_cfg.type", _IMPOSSIBLE, ("Conv", "Conv2d")),
    ("roi_head.mask_head.predictor_cfg.*", _TAKEN, ()),
    ("roi_head.mask_head.upsample_cfg.type", _IMPOSSIBLE, ("deconv",)),
    ("roi_head.mask_head.upsample_cfg.scale_factor", _IMPOSSIBLE, (2,)),
    ("roi_head.mask_head.conv_kernel_size", _IMPOSSIBLE, (3,)),
    ("roi_head.mask_head.class_agnostic", _IMPOSSIBLE, (False,)),
    ("roi_head.mask_head.roi_feat_size", _IMPOSSIBLE, (14, [14, 14])),
    ("roi_head.mask_head.loss_mask.type", _TRAINING, ("CrossEntropyLoss",)),
    ("roi_head.mask_head.loss_mask.use_mask", _IMPOSSIBLE, (True,)),
    ("roi_head.mask_head.loss_mask.*", _TRAINING, ()),
    *_norm_rules("roi_head.mask_head"),
    *[
        (f"roi_head.mask_head.{name}", _TAKEN, ())
        for name in ("in_channels", "conv_out_channels", "num_convs", "num_classes")
    ],
    ("roi_head.mask_head", _TAKEN, ()),
    ("roi_head.bbox_head", _TAKEN, ()),
    ("roi_head.*", _IMPOSSIBLE, (None,)),
    # Tests
    ("test_cfg.rpn.nms_pre", _TAKEN, ()),  # see _test_settings
    ("test_cfg.rpn.max_per_img", _TAKEN, ()),
    ("test_cfg.rpn.max_num", _TAKEN, ()),
    ("test_cfg.rpn.nms_post", _TAKEN, ()),
    ("test_cfg.rpn.nms_across_levels", _UNLIKE, (False,)),
    ("test_cfg.rpn.nms.type", _UNLIKE, ("nms",)),
    ("test_cfg.rpn.nms.iou_thr*", _UNLIKE, (0.7,)),
    ("test_cfg.rpn.nms_thr", _UNLIKE, (0.7,)),
    ("test_cfg.rpn.min_bbox_size", _UNLIKE, (0,)),
    ("test_cfg.rcnn.score_thr", _TAKEN, ()),
    ("test_cfg.rcnn.max_per_img", _TAKEN, ()),
    ("test_cfg.rcnn.nms.type", _UNLIKE, ("nms", "soft_nms")),
    ("test_cfg.rcnn.nms.*", _TAKEN, ()),  # see _test_settings
    ("test_cfg.rcnn.mask_thr_binary", _UNLIKE, (0.5,)),
    # Training
    ("train_cfg.rcnn.assigner.pos_iou_thr", _TAKEN, ()),
    ("train_cfg.*.sampler.num", _TAKEN, ()),
    ("train_cfg.rpn_proposal.max_per_img", _TAKEN, ()),
    ("train_cfg.rpn_proposal.max_num", _TAKEN, ()),
    ("train_cfg.*.assigner.type", _TRAINING, ("MaxIoUAssigner",)),
    ("train_cfg.rpn.assigner.pos_iou_thr", _TRAINING, (0.7,)),
    ("train_cfg.rpn.assigner.neg_iou_thr", _TRAINING, (0.3,)),
    ("train_cfg.rpn.assigner.min_pos_iou", _TRAINING, (0.3,)),
    ("train_cfg.rpn.assigner.match_low_quality", _TRAINING, (True,)),
    ("train_cfg.rcnn.assigner.neg_iou_thr", _TRAINING, (0.5, 0.6, 0.7)),
    ("train_cfg.rcnn.assigner.min_pos_iou", _TRAINING, (0.5, 0.6, 0.7)),
    ("train_cfg.rcnn.assigner.match_low_quality", _TRAINING, (False,)),
    ("train_cfg.*.assigner.ignore_iof_thr", _TRAINING, (-1,)),
    ("train_cfg.*.sampler.type", _TRAINING, ("RandomSampler",)),
    ("train_cfg.rpn.sampler.pos_fraction", _TRAINING, (0.5,)),
    ("train_cfg.rcnn.sampler.pos_fraction", _TRAINING, (0.25,)),
    ("train_cfg.*.sampler.neg_pos_ub", _TRAINING, (-1,)),
    ("train_cfg.rpn.sampler.add_gt_as_proposals", _TRAINING, (False,)),
    ("train_cfg.rcnn.sampler.add_gt_as_proposals", _TRAINING, (True,)),
    ("train_cfg.rpn.allowed_border", _TRAINING, (0, -1)),
    ("train_cfg.*.pos_weight", _TRAINING, (-1,)),
    ("train_cfg.*.debug", _TAKEN, ()),
    ("train_cfg.rcnn.mask_size", _TRAINING, (28,)),
    ("train_cfg.rpn_proposal.nms_pre", _TRAINING, (2000,)),
    ("train_cfg.rpn_proposal.nms.type", _TRAINING, ("nms",)),
    ("train_cfg.rpn_proposal.nms.iou_thr*", _TRAINING, (0.7,)),
    ("train_cfg.rpn_proposal.min_bbox_size", _TRAINING, (0,)),
    ("train_cfg.rpn_proposal.nms_across_levels", _TRAINING, (False,)),
]
_TEST_STEPS = {
    *("LoadImageFromFile", "LoadImageFromWebcam", "LoadAnnotations", "Resize", "FixScaleResize", "RandomFlip"),
    *("Normalize", "Pad", "ImageToTensor", "DefaultFormatBundle", "Collect", "PackDetInputs", "ToTensor"),
    "MultiScaleFlipAug",
}


class _Unread:
    """Stands for an expression that is not a literal."""

    def __repr__(self) -> str:
        return "an expression"


_UNREAD = _Unread()


def read_config_text(text: str | Mapping[str, Any]) -> Hints:
    """Hints from mmdetection's config, 2.x or 3.x (as text, or as dictionaries)."""
    names = _assignments(text) if isinstance(text, str) else dict(text)
    model = names.get("model")
    if not isinstance(model, Mapping):
        return Hints()
    model = dict(model)
    for part in ("train_cfg", "test_cfg"):
        model[part] = model.get(part) or names.get(part) or {}
    hints = Hints(found=True)
    _apply_rules(model, hints)
    backbone, roi, rpn = (_dict(model.get(part)) for part in ("backbone", "roi_head", "rpn_head"))
    hints.model |= _backbone_settings(backbone)
    hints.backbone_eps = next(iter(_numbers([_dict(backbone.get("norm_cfg")).get("eps")])), None)
    hints.standardized = _standardized(model)
    steps = _test_steps(names)
    hints.preprocessing = _preprocessing(model, names, steps)
    hints.model |= _stage_settings(roi, model["train_cfg"])
    hints.model |= _sampling(model["train_cfg"], one_stage=not isinstance(roi.get("bbox_head"), list))
    hints.model |= _test_settings(_dict(model["test_cfg"]), hints)
    try:
        hints.anchors = anchors.from_settings(_dict(rpn.get("anchor_generator")))
    except CheckpointError as error:
        hints.impossible.append(f"rpn_head.{error}")
    for head in _as_list(roi.get("bbox_head")):
        number = _dict(head).get("num_classes")
        hints.num_classes = number if isinstance(number, int) else hints.num_classes
    hints.data |= _scale(steps, hints)
    others = sorted(set(names) - {"model", "train_cfg", "test_cfg", "test_pipeline", "img_norm_cfg"})
    hints.left_out += others
    return hints


def _apply_rules(model: Mapping[str, Any], hints: Hints) -> None:
    for path, value in _leaves(model):
        rule = next((rule for rule in _RULES if fnmatch.fnmatchcase(path, rule[0])), None)
        if rule is None:
            if value is not None:
                hints.left_out.append(f"{path} = {shown(value)} (not known here)")
            continue
        _, verdict, expected = rule
        if value is _UNREAD:
            hints.left_out += [f"{path} (an expression, not read)"] if verdict != _TAKEN else []
            continue
        if path.endswith("type") and isinstance(value, str):
            value = value.rpartition(".")[2]  # "mmdet.FPN", "torch.nn.Linear"
        if path == "roi_head.bbox_head.loss_cls.type" and value == "SeesawLoss":
            verdict = _IMPOSSIBLE
        if verdict == _TAKEN or any(_same(value, item) for item in expected) or value is None:
            continue
        said = f"{path} = {shown(value)}"
        place = {_IMPOSSIBLE: hints.impossible, _UNLIKE: hints.unlike, _TRAINING: hints.left_out}[verdict]
        if verdict != _TRAINING and expected and expected != (None,):
            said += f" (here {shown(expected[0])})"
        if said not in place:
            place.append(said)


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every setting; the stages of a list share their path."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
        for item in value:
            yield from _leaves(item, path)
    else:
        yield path, value


def _same(value: object, expected: object) -> bool:
    if isinstance(value, (list, tuple)) and isinstance(expected, list):
        return len(value) == len(expected) and all(_same(a, b) for a, b in zip(value, expected))
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(value, (int, float)) and isinstance(expected, (int, float)):
        return abs(value - expected) <= 1e-6 * max(1e-3, abs(expected))
    return value == expected


def _backbone_settings(backbone: dict[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if backbone.get("style") in ("pytorch", "caffe"):
        settings["style"] = backbone["style"]
    frozen = backbone.get("frozen_stages")
    if isinstance(frozen, int) and -1 <= frozen <= 4:
        settings["frozen_stages"] = frozen
    norm = _dict(backbone.get("norm_cfg"))
    if norm:
        settings["norm"] = _norm(norm, frozen_statistics=backbone.get("norm_eval") is not False)
    return settings


def _norm(norm: dict[str, Any], *, frozen_statistics: bool) -> str:
    if norm.get("type") == "GN":
        return "group"
    if not frozen_statistics:
        return "sync" if norm.get("type") == "SyncBN" else "batch"
    return "frozen_statistics" if norm.get("requires_grad", True) else "frozen"


def _standardized(model: Mapping[str, Any]) -> tuple[str, ...]:
    """Our prefixes of the parts whose ``conv_cfg`` is ConvWS."""
    roi = _dict(model.get("roi_head"))
    places = {BODY: model.get("backbone"), "fpn.": model.get("neck")}
    places |= {BOX: roi.get("bbox_head"), MASK: roi.get("mask_head")}
    found = []
    for prefix, settings in places.items():
        kinds = {_dict(_dict(part).get("conv_cfg")).get("type") for part in _as_list(settings)}
        if "ConvWS" in {str(kind).rpartition(".")[2] for kind in kinds}:
            found.append(prefix)
    return tuple(found)


def _preprocessing(model: dict[str, Any], names: dict[str, Any], steps: list[dict[str, Any]]) -> Preprocessing | None:
    new = _dict(model.get("data_preprocessor"))
    old = next((step for step in steps if step.get("type") == "Normalize"), {}) or _dict(names.get("img_norm_cfg"))
    for found, rgb in (
        (new, bool(new.get("bgr_to_rgb", False)) or bool(new.get("rgb_to_bgr", False))),
        (old, old.get("to_rgb", True)),
    ):
        mean, std = _numbers(found.get("mean")), _numbers(found.get("std"))
        if len(mean) == 3 and len(std) == 3 and all(value > 0 for value in std):
            return Preprocessing(not rgb, mean, std)
    return None


def _stage_settings(roi: dict[str, Any], train: object) -> dict[str, Any]:
    heads = _as_list(roi.get("bbox_head"))
    rcnn = _as_list(_dict(train).get("rcnn"))
    settings: dict[str, Any] = {}
    ious = [_dict(_dict(stage).get("assigner")).get("pos_iou_thr") for stage in rcnn]
    if ious and all(isinstance(iou, float) and 0 < iou < 1 for iou in ious):
        settings["stage_ious"] = tuple(ious)
    stds = [_numbers(_dict(_dict(head).get("bbox_coder")).get("target_stds")) for head in heads]
    if stds and all(len(values) == 4 for values in stds):
        settings["stage_stds"] = tuple(stds)
    weights = _numbers(roi.get("stage_loss_weights"))
    if weights:
        settings["stage_loss_weights"] = weights
    return settings


def _sampling(train: object, *, one_stage: bool) -> dict[str, Any]:
    """Sizes of training samples, where they are not the usual ones."""
    train = _dict(train)
    rcnn = _as_list(train.get("rcnn"))
    proposal = _dict(train.get("rpn_proposal"))
    found = {
        "rpn_samples": (_dict(_dict(train.get("rpn")).get("sampler")).get("num"), 256),
        "roi_samples": (_dict(_dict(rcnn[0] if rcnn else None).get("sampler")).get("num"), 512),
        "train_proposals": (proposal.get("max_per_img", proposal.get("max_num")), 1000 if one_stage else 2000),
    }
    return {
        name: value for name, (value, usual) in found.items() if type(value) is int and value >= 1 and value != usual
    }


def _test_settings(test: dict[str, Any], hints: Hints) -> dict[str, Any]:
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
    if str(nms.get("type")).rpartition(".")[2] == "soft_nms":
        settings["nms"] = "soft"
        if nms.get("method", "linear") != "gaussian" or nms.get("sigma", 0.5) != 0.5:
            hints.left_out.append("test_cfg.rcnn.nms: soft NMS is Gaussian with sigma 0.5 here, other settings of it")
    elif nms.get("class_agnostic") is True:
        settings["nms"] = "agnostic"
    pre_nms, ours = rpn.get("nms_pre"), max(1000, settings.get("test_proposals", 1000))
    if isinstance(pre_nms, int) and pre_nms != ours:
        hints.unlike.append(f"test_cfg.rpn.nms_pre = {pre_nms} (here {ours})")
    return settings


def _test_steps(names: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The steps of the test pipeline, those inside of MultiScaleFlipAug behind it."""
    loader = _dict(_dict(names.get("test_dataloader")).get("dataset")).get("pipeline")
    steps = loader or _dict(_dict(names.get("data")).get("test")).get("pipeline") or names.get("test_pipeline")
    flat: list[dict[str, Any]] = []
    for step in _as_list(steps):
        if not isinstance(step, Mapping):
            continue
        step = dict(step) | {"type": str(step.get("type", "")).rpartition(".")[2]}
        flat.append(step)
        # mmdetection 2: its Resize keeps the ratio unless told otherwise; that of 3 does not
        inner = [dict(item) for item in _as_list(step.get("transforms")) if isinstance(item, Mapping)]
        flat += [{"keep_ratio": True} | item | {"type": str(item.get("type", "")).rpartition(".")[2]} for item in inner]
    return flat


def _scale(steps: list[dict[str, Any]], hints: Hints) -> dict[str, Any]:
    """The input size of the test pipeline: (longer, shorter) limits in either order."""
    found: dict[str, Any] = {}
    for step in steps:
        kind = step["type"]
        if kind and kind not in _TEST_STEPS:
            hints.unlike.append(f"test_pipeline: a step {shown(kind)} (here resize, normalise and pad)")
        if step.get("flip") is True or (kind == "RandomFlip" and (step.get("prob") or step.get("flip_ratio"))):
            hints.left_out.append("test_pipeline: flipped copies at test time")
        if step.get("color_type", "color") not in ("color", "color_ignore_orientation"):
            hints.unlike.append(f"test_pipeline: color_type = {shown(step['color_type'])} (here 'color')")
        size: Any = step.get("img_scale") or step.get("scale")
        is_several = isinstance(size, (list, tuple)) and any(isinstance(item, (list, tuple)) for item in size)
        if is_several and len(size) > 1:
            hints.left_out.append(f"test_pipeline: several scales {shown(size)}; the first is used")
        if is_several:
            size = size[0]
        sides = _numbers(size)
        if kind == "Resize" and step.get("keep_ratio", False) is not True:
            hints.unlike.append("test_pipeline: Resize with keep_ratio = False (here True)")
        if not found and len(sides) == 2 and min(sides) >= 32:
            found = {"short_side": (int(min(sides)),), "long_side": int(max(sides))}
    return found


def _dict(value: object) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _as_list(value: object) -> list[Any]:
    if value is None or value is _UNREAD:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _numbers(value: object) -> tuple[float, ...]:
    items = value if isinstance(value, (list, tuple)) else ()
    if not all(isinstance(item, (int, float)) and not isinstance(item, bool) for item in items):
        return ()
    return tuple(float(item) for item in items)


# The text


def _assignments(text: str) -> dict[str, Any]:
    """Top-level ``name = literal or dict(...)`` of a Python text; nothing is run."""
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


_OPERATORS: dict[type[ast.operator], Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(item, names) for item in node.elts]
    if isinstance(node, ast.Name):
        return names.get(node.id, _UNREAD)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _value(node.operand, names)
        return -value if isinstance(value, (int, float)) else _UNREAD
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left, names), _value(node.right, names)
        if (
            isinstance(left, (int, float))
            and isinstance(right, (int, float))
            and (right or type(node.op) is not ast.Div)
        ):
            return _OPERATORS[type(node.op)](left, right)
        return _UNREAD
    if isinstance(node, ast.Dict):
        return {
            key.value: _value(value, names)
            for key, value in zip(node.keys, node.values)
            if isinstance(key, ast.Constant) and isinstance(key.value, str)
        }
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {word.arg: _value(word.value, names) for word in node.keywords if word.arg is not None}
    return _UNREAD
