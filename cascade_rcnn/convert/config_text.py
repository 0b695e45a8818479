"""mmdetection's config text in a checkpoint's metadata: what is taken over, what is left out, what cannot be.

The text is Python; only its syntax tree is looked at (``config_syntax``). Every setting of the network and its tests
gets one of four answers, by the rules of ``config_rules``: taken over (or seen in the weights), ``left_out`` (training,
unknown names),
``unlike`` (the network here computes something else, but a recipe can be preferred to the text), or ``impossible``.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from cascade_rcnn.convert import anchors
from cascade_rcnn.convert.anchors import Anchors
from cascade_rcnn.convert.config_rules import IMPOSSIBLE, RULES, TAKEN, TEST_STEPS, TRAINING, UNLIKE
from cascade_rcnn.convert.config_syntax import UNREAD, assignments
from cascade_rcnn.convert.key_tables import BODY, BOX, MASK
from cascade_rcnn.errors import CheckpointError
from cascade_rcnn.messages import shown


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
    training: list[str] = field(default_factory=list)  # those of left_out that training needs, by the rules
    unlike: list[str] = field(default_factory=list)
    impossible: list[str] = field(default_factory=list)
    found: bool = False


def read_config_text(text: str | Mapping[str, Any]) -> Hints:
    """Hints from mmdetection's config, 2.x or 3.x (as text, or as dictionaries)."""
    names = assignments(text) if isinstance(text, str) else dict(text)
    model = as_dict(names.get("model"))
    model = as_dict(model.get("detector")) or model  # of a wrapper, as for semi-supervised training
    if not model:
        return Hints()
    for part in ("train_cfg", "test_cfg"):
        model[part] = model.get(part) or names.get(part) or {}
    hints = Hints(found=True)
    _apply_rules(model, hints)
    backbone, roi, rpn = (as_dict(model.get(part)) for part in ("backbone", "roi_head", "rpn_head"))
    hints.model |= _backbone_settings(backbone)
    norm = as_dict(backbone.get("norm_cfg"))
    if not str(norm.get("type")).rpartition(".")[2].startswith("LN"):
        hints.backbone_eps = next(iter(numbers([norm.get("eps")])), None)
    hints.standardized = _standardized(model)
    steps = _test_steps(names)
    hints.preprocessing = _preprocessing(model, names, steps)
    hints.model |= _stage_settings(roi, model["train_cfg"])
    if "box_loss" in hints.model:
        hints.left_out = [item for item in hints.left_out if "reg_decoded_bbox" not in item]
        hints.training = [item for item in hints.training if "bbox_head.reg_decoded_bbox" not in item]
    hints.model |= _sampling(model["train_cfg"], one_stage=not isinstance(roi.get("bbox_head"), list))
    hints.model |= _test_settings(as_dict(model["test_cfg"]), hints)
    try:
        older = {key.removeprefix("anchor_"): value for key, value in rpn.items() if key.startswith("anchor_")}
        hints.anchors = anchors.from_settings(as_dict(rpn.get("anchor_generator")) or older)
    except CheckpointError as error:
        hints.impossible.append(f"rpn_head.{error}")
    for head in as_list(roi.get("bbox_head")):
        number = as_dict(head).get("num_classes")
        hints.num_classes = number if isinstance(number, int) else hints.num_classes
    hints.data |= _scale(steps, hints)
    others = sorted(set(names) - {"model", "train_cfg", "test_cfg", "test_pipeline", "img_norm_cfg"})
    hints.left_out += others
    return hints


def _apply_rules(model: Mapping[str, Any], hints: Hints) -> None:
    for path, value in leaves(model):
        rule = next((rule for rule in RULES if fnmatch.fnmatchcase(path, rule[0])), None)
        if rule is None:
            if value is not None:
                hints.left_out.append(f"{path} = {shown(value)} (not known here)")
                hints.training.append(hints.left_out[-1])
            continue
        _, verdict, expected = rule
        if value is UNREAD:
            hints.left_out += [f"{path} (an expression, not read)"] if verdict != TAKEN else []
            continue
        if path.endswith("type") and isinstance(value, str):
            value = value.rpartition(".")[2]  # "mmdet.FPN", "torch.nn.Linear"
        if path == "roi_head.bbox_head.loss_cls.type" and value == "SeesawLoss":
            verdict = IMPOSSIBLE
        if verdict == TAKEN or any(same(value, item) for item in expected) or value is None:
            continue
        said = f"{path} = {shown(value)}"
        place = {IMPOSSIBLE: hints.impossible, UNLIKE: hints.unlike, TRAINING: hints.left_out}[verdict]
        if verdict != TRAINING and expected and expected != (None,):
            said += f" (here {shown(expected[0])})"
        if said not in place:
            place.append(said)
        if verdict == TRAINING and said not in hints.training:
            hints.training.append(said)


def leaves(value: object, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every setting; the stages of a list share their path."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
        for item in value:
            yield from leaves(item, path)
    else:
        yield path, value


def same(value: object, expected: object) -> bool:
    if isinstance(value, (list, tuple)) and isinstance(expected, list):
        return len(value) == len(expected) and all(same(a, b) for a, b in zip(value, expected))
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(value, (int, float)) and isinstance(expected, (int, float)):
        return abs(value - expected) <= 1e-6 * max(1e-3, abs(expected))
    return value == expected


def _backbone_settings(backbone: dict[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if backbone.get("style") in ("pytorch", "caffe"):
        settings["style"] = backbone["style"]
    kind, frozen = str(backbone.get("type")).rpartition(".")[2], backbone.get("frozen_stages")
    if isinstance(frozen, int) and -1 <= frozen <= 4:
        settings["frozen_stages"] = frozen if frozen or kind != "ConvNeXt" else -1  # mmpretrain: 0 freezes nothing
    rate = backbone.get("drop_path_rate")
    if kind in ("ConvNeXt", "SwinTransformer") and isinstance(rate, (int, float)) and 0 <= rate < 1:
        settings["drop_path"] = float(rate)
    deformable = as_dict(backbone.get("dcn"))
    if deformable:
        settings["deformable"] = "modulated" if deformable.get("type") == "DCNv2" else "plain"
        groups = deformable.get("deform_groups", deformable.get("deformable_groups", 1))
        settings["deformable_groups"] = groups if isinstance(groups, int) else 1
    norm = as_dict(backbone.get("norm_cfg"))
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
    roi = as_dict(model.get("roi_head"))
    places = {BODY: model.get("backbone"), "fpn.": model.get("neck")}
    places |= {BOX: roi.get("bbox_head"), MASK: roi.get("mask_head")}
    found = []
    for prefix, settings in places.items():
        kinds = {as_dict(as_dict(part).get("conv_cfg")).get("type") for part in as_list(settings)}
        if {"ConvWS", "ConvWS2d"} & {str(kind).rpartition(".")[2] for kind in kinds}:
            found.append(prefix)
    return tuple(found)


def _preprocessing(model: dict[str, Any], names: dict[str, Any], steps: list[dict[str, Any]]) -> Preprocessing | None:
    new = as_dict(model.get("data_preprocessor"))
    old = next((step for step in steps if step.get("type") == "Normalize"), {}) or as_dict(names.get("img_norm_cfg"))
    for found, rgb in (
        (new, bool(new.get("bgr_to_rgb", False)) or bool(new.get("rgb_to_bgr", False))),
        (old, old.get("to_rgb", True)),
    ):
        mean, std = numbers(found.get("mean")), numbers(found.get("std"))
        if len(mean) == 3 and len(std) == 3 and all(value > 0 for value in std):
            return Preprocessing(not rgb, mean, std)
    return None


def _stage_settings(roi: dict[str, Any], train: object) -> dict[str, Any]:
    heads = as_list(roi.get("bbox_head"))
    stages = roi.get("num_stages")
    if len(heads) == 1 and isinstance(stages, int) and 1 < stages < 10:
        heads *= stages  # one description for all
    rcnn = as_list(as_dict(train).get("rcnn"))
    settings: dict[str, Any] = {}
    ious = [as_dict(as_dict(stage).get("assigner")).get("pos_iou_thr") for stage in rcnn]
    if ious and all(isinstance(iou, float) and 0 < iou < 1 for iou in ious):
        settings["stage_ious"] = tuple(ious)
    coders = [as_dict(as_dict(head).get("bbox_coder")) or as_dict(head) for head in heads]  # early 2.x has no coder
    stds = [numbers(coder.get("target_stds")) for coder in coders]
    if stds and all(len(values) == 4 for values in stds):
        settings["stage_stds"] = tuple(stds)
    losses = [as_dict(as_dict(head).get("loss_bbox")) for head in heads]
    kinds = {str(loss.get("type")).removesuffix("Loss").lower() for loss in losses}
    if len(kinds) == 1 and kinds <= {"giou", "diou", "ciou"} and as_dict(heads[0]).get("reg_decoded_bbox") is True:
        settings["box_loss"] = kinds.pop()
    amounts = set(numbers([loss.get("loss_weight", 1.0) for loss in losses]))
    if len(amounts) == 1 and amounts != {1.0}:
        settings["box_loss_weight"] = amounts.pop()
    weights = numbers(roi.get("stage_loss_weights"))
    if weights:
        settings["stage_loss_weights"] = weights
    return settings


def _sampling(train: object, *, one_stage: bool) -> dict[str, Any]:
    """Sizes of training samples, where they are not the usual ones."""
    train = as_dict(train)
    rcnn = as_list(train.get("rcnn"))
    proposal = as_dict(train.get("rpn_proposal"))
    found = {
        "rpn_samples": (as_dict(as_dict(train.get("rpn")).get("sampler")).get("num"), 256),
        "roi_samples": (as_dict(as_dict(rcnn[0] if rcnn else None).get("sampler")).get("num"), 512),
        "train_proposals": (proposal.get("max_per_img", proposal.get("max_num")), 1000 if one_stage else 2000),
    }
    return {
        name: value for name, (value, usual) in found.items() if type(value) is int and value >= 1 and value != usual
    }


def _test_settings(test: dict[str, Any], hints: Hints) -> dict[str, Any]:
    rcnn, rpn = as_dict(test.get("rcnn")), as_dict(test.get("rpn"))
    nms = as_dict(rcnn.get("nms"))
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
    loader = as_dict(as_dict(names.get("test_dataloader")).get("dataset")).get("pipeline")
    steps = loader or as_dict(as_dict(names.get("data")).get("test")).get("pipeline") or names.get("test_pipeline")
    flat: list[dict[str, Any]] = []
    for step in as_list(steps):
        if not isinstance(step, Mapping):
            continue
        step = dict(step) | {"type": str(step.get("type", "")).rpartition(".")[2]}
        flat.append(step)
        # mmdetection 2: its Resize keeps the ratio unless told otherwise; that of 3 does not
        inner = [dict(item) for item in as_list(step.get("transforms")) if isinstance(item, Mapping)]
        flat += [{"keep_ratio": True} | item | {"type": str(item.get("type", "")).rpartition(".")[2]} for item in inner]
    return flat


def _scale(steps: list[dict[str, Any]], hints: Hints) -> dict[str, Any]:
    """The input size of the test pipeline: (longer, shorter) limits in either order."""
    found: dict[str, Any] = {}
    for step in steps:
        kind = step["type"]
        if kind and kind not in TEST_STEPS:
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
        sides = (float(size),) * 2 if isinstance(size, int) else numbers(size)
        if kind == "Resize" and "keep_ratio" in step and len(sides) != 2 and not found:
            hints.left_out.append(f"test_pipeline: {shown(step)}: no (longer, shorter) scale in it")
        if kind == "Resize" and step.get("keep_ratio", False) is not True:
            hints.unlike.append("test_pipeline: Resize with keep_ratio = False (here True)")
        if not found and len(sides) == 2 and min(sides) >= 32:
            found = {"short_side": (int(min(sides)),), "long_side": int(max(sides))}
    return found


def as_dict(value: object) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def as_list(value: object) -> list[Any]:
    if value is None or value is UNREAD:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def numbers(value: object) -> tuple[float, ...]:
    items = value if isinstance(value, (list, tuple)) else ()
    if not all(isinstance(item, (int, float)) and not isinstance(item, bool) for item in items):
        return ()
    return tuple(float(item) for item in items)
