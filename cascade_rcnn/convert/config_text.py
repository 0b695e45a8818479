"""mmdetection's config text in a checkpoint's metadata: what is taken over, what is left out, what cannot be.

The text is Python; only its syntax tree is looked at (``config_syntax``). Every setting of the network and its tests
gets one of four answers, by the rules of ``config_rules``: taken over (or seen in the weights), ``left_out`` (training,
unknown names),
``unlike`` (the network here computes something else, but a recipe can be preferred to the text), or ``impossible``.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cascade_rcnn.convert import anchors
from cascade_rcnn.convert.anchors import Anchors
from cascade_rcnn.convert.config_rules import IMPOSSIBLE, RULES, TAKEN, TEST_STEPS, TRAINING, UNLIKE
from cascade_rcnn.convert.config_syntax import UNREAD, assignments
from cascade_rcnn.convert.config_values import (
    SYNCED,
    as_dict,
    as_list,
    flag,
    leaves,
    number,
    numbers,
    same,
    whole,
    word,
)
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

    def misread(self, path: str, value: object, here: str) -> None:
        """Say a value that is not understood; an expression that was not read is said by the rules."""
        if value is UNREAD or (isinstance(value, list) and UNREAD in value):
            return
        said = f"{path} = {shown(value)} (here {here})"
        if said not in self.unlike:
            self.unlike.append(said)


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
    hints.model |= _backbone_settings(backbone, hints)
    norm = as_dict(backbone.get("norm_cfg"))
    if not word(norm.get("type")).startswith("LN"):
        hints.backbone_eps = next(iter(numbers([norm.get("eps")])), None)
    hints.standardized = _standardized(model)
    steps = test_steps(names)
    hints.preprocessing = _preprocessing(model, names, steps)
    hints.model |= _stage_settings(roi, model["train_cfg"], hints)
    if "box_loss" in hints.model:
        hints.left_out = [item for item in hints.left_out if "reg_decoded_bbox" not in item]
        hints.training = [item for item in hints.training if "bbox_head.reg_decoded_bbox" not in item]
    hints.model |= _sampling(model["train_cfg"], hints, one_stage=not isinstance(roi.get("bbox_head"), list))
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
            value = word(value)
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


def _backbone_settings(backbone: dict[str, Any], hints: Hints) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if backbone.get("style") in ("pytorch", "caffe"):
        settings["style"] = backbone["style"]
    kind, frozen = word(backbone.get("type")), whole(backbone.get("frozen_stages"))
    if frozen is not None and -1 <= frozen <= 4:
        settings["frozen_stages"] = frozen if frozen or kind != "ConvNeXt" else -1  # mmpretrain: 0 freezes nothing
    rate = backbone.get("drop_path_rate")
    if kind in ("ConvNeXt", "SwinTransformer") and isinstance(rate, (int, float)) and 0 <= rate < 1:
        settings["drop_path"] = float(rate)
    deformable = as_dict(backbone.get("dcn"))
    if deformable:
        settings["deformable"] = "modulated" if word(deformable.get("type")) == "DCNv2" else "plain"
        groups = deformable.get("deform_groups", deformable.get("deformable_groups", 1))
        settings["deformable_groups"] = whole(groups) or 1
        if whole(groups) is None:
            hints.misread("backbone.dcn.deform_groups", groups, "a whole number")
    norm = as_dict(backbone.get("norm_cfg"))
    if not norm and "norm_eval" in backbone and kind.startswith("Res"):
        norm = {"type": "BN"}  # mmdetection's default
    if norm:
        is_fixed = flag(backbone.get("norm_eval", True))
        if is_fixed is None:
            hints.misread("backbone.norm_eval", backbone["norm_eval"], "True or False")
        settings["norm"] = _norm(norm, frozen_statistics=is_fixed is not False)
    return settings


def _norm(norm: dict[str, Any], *, frozen_statistics: bool) -> str:
    kind = word(norm.get("type"))
    if kind == "GN":
        return "group"
    if not frozen_statistics:
        return "sync" if kind in SYNCED else "batch"
    return "frozen_statistics" if norm.get("requires_grad", True) else "frozen"


def _standardized(model: Mapping[str, Any]) -> tuple[str, ...]:
    """Our prefixes of the parts whose ``conv_cfg`` is ConvWS."""
    roi = as_dict(model.get("roi_head"))
    places = {BODY: model.get("backbone"), "fpn.": model.get("neck")}
    places |= {BOX: roi.get("bbox_head"), MASK: roi.get("mask_head")}
    found = []
    for prefix, settings in places.items():
        kinds = {as_dict(as_dict(part).get("conv_cfg")).get("type") for part in as_list(settings)}
        if {"ConvWS", "ConvWS2d"} & set(map(word, kinds)):
            found.append(prefix)
    return tuple(found)


def _preprocessing(model: dict[str, Any], names: dict[str, Any], steps: list[dict[str, Any]]) -> Preprocessing | None:
    new = as_dict(model.get("data_preprocessor"))
    old = next((step for step in steps if step.get("type") == "Normalize"), {}) or as_dict(names.get("img_norm_cfg"))
    for found, rgb in (
        (new, bool(new.get("bgr_to_rgb", False)) or bool(new.get("rgb_to_bgr", False))),  # both turn BGR round
        (old, old.get("to_rgb", True)),
    ):
        mean, std = numbers(found.get("mean")), numbers(found.get("std"))
        if len(mean) == 3 and len(std) == 3 and all(value > 0 for value in std):
            return Preprocessing(not rgb, mean, std)
    return None


def _stage_settings(roi: dict[str, Any], train: object, hints: Hints) -> dict[str, Any]:
    heads = as_list(roi.get("bbox_head"))
    stages = whole(roi.get("num_stages"))
    if len(heads) == 1 and stages is not None and 1 < stages < 10:
        heads *= stages  # one description for all
    rcnn = as_list(as_dict(train).get("rcnn"))
    settings: dict[str, Any] = {}
    ious = [as_dict(as_dict(stage).get("assigner")).get("pos_iou_thr") for stage in rcnn]
    if ious and all(isinstance(iou, float) and 0 < iou < 1 for iou in ious):
        settings["stage_ious"] = tuple(ious)
    elif any(iou is not None for iou in ious):
        hints.misread("train_cfg.rcnn.assigner.pos_iou_thr", ious, "a number between 0 and 1 for each stage")
    if heads:
        settings |= _stds(list(map(as_dict, heads)), hints)
    losses = [as_dict(as_dict(head).get("loss_bbox")) for head in heads]
    kinds = {word(loss.get("type")).removesuffix("Loss").lower() for loss in losses}
    if len(kinds) == 1 and kinds <= {"giou", "diou", "ciou"} and flag(as_dict(heads[0]).get("reg_decoded_bbox")):
        settings["box_loss"] = kinds.pop()
    amounts = [loss.get("loss_weight", 1.0) for loss in losses]
    if any(number(amount) is None for amount in amounts):
        hints.misread("roi_head.bbox_head.loss_bbox.loss_weight", amounts, "a number")
    elif len(set(amounts)) == 1 and amounts[0] != 1.0:
        settings["box_loss_weight"] = float(amounts[0])
    weights = numbers(roi.get("stage_loss_weights"))
    if weights:
        settings["stage_loss_weights"] = weights
    elif roi.get("stage_loss_weights") is not None:
        hints.misread("roi_head.stage_loss_weights", roi["stage_loss_weights"], "a list of numbers, one for each stage")
    return settings


def _stds(heads: list[dict[str, Any]], hints: Hints) -> dict[str, Any]:
    """Those of each stage's coder; absent, mmdetection's: 1 in a coder, (.1, .1, .2, .2) in a head without one."""
    found = []
    for head in heads:
        path, part, usual = "roi_head.bbox_head.bbox_coder", as_dict(head.get("bbox_coder")), [1.0, 1.0, 1.0, 1.0]
        if not part:
            path, part, usual = "roi_head.bbox_head", head, [0.1, 0.1, 0.2, 0.2]  # early 2.x has no coder
        stds = part.get("target_stds", usual)
        if len(numbers(stds)) != 4 or min(numbers(stds)) <= 0:
            hints.misread(f"{path}.target_stds", stds, "four numbers above 0")
        found.append(numbers(stds))
    return {"stage_stds": tuple(found)} if all(len(stds) == 4 for stds in found) else {}


def _sampling(train: object, hints: Hints, *, one_stage: bool) -> dict[str, Any]:
    """Sizes of training samples, where they are not the usual ones."""
    train = as_dict(train)
    rcnn = as_list(train.get("rcnn"))
    proposal = as_dict(train.get("rpn_proposal"))
    rpn, first = as_dict(train.get("rpn")), as_dict(rcnn[0] if rcnn else None)
    found = {
        "rpn_samples": ("rpn.sampler.num", as_dict(rpn.get("sampler")).get("num"), 256),
        "roi_samples": ("rcnn.sampler.num", as_dict(first.get("sampler")).get("num"), 512),
        "train_proposals": (
            "rpn_proposal.max_per_img",
            proposal.get("max_per_img", proposal.get("max_num")),
            1000 if one_stage else 2000,
        ),
    }
    settings = {}
    for name, (path, value, usual) in found.items():
        count = whole(value)
        if value is not None and (count is None or count < 1):
            hints.misread(f"train_cfg.{path}", value, "a whole number of at least 1")
        elif count is not None and count != usual:
            settings[name] = count
    return settings


def _test_settings(test: dict[str, Any], hints: Hints) -> dict[str, Any]:
    rcnn, rpn = as_dict(test.get("rcnn")), as_dict(test.get("rpn"))
    nms = as_dict(rcnn.get("nms"))
    settings: dict[str, Any] = {}
    rows: list[tuple[str, str, Mapping[str, Any], tuple[str, ...]]] = [
        ("score_threshold", "rcnn", rcnn, ("score_thr",)),
        ("nms_iou", "rcnn.nms", nms, ("iou_threshold", "iou_thr")),
        ("max_detections", "rcnn", rcnn, ("max_per_img",)),
        ("test_proposals", "rpn", rpn, ("max_per_img", "max_num")),
    ]
    for name, place, part, keys in rows:
        key = next((key for key in keys if key in part), None)
        if key is None:
            continue
        is_count = name in ("max_detections", "test_proposals")
        read = whole(part[key]) if is_count else number(part[key])
        if read is not None and read >= (1 if is_count else 0):
            settings[name] = read
        else:
            here = "a whole number of at least 1" if is_count else "a number from 0 to 1"
            hints.misread(f"test_cfg.{place}.{key}", part[key], here)
    settings |= _nms(nms, hints)
    pre_nms, ours = rpn.get("nms_pre"), max(1000, settings.get("test_proposals", 1000))
    if pre_nms is not None and whole(pre_nms) != ours:
        hints.unlike.append(f"test_cfg.rpn.nms_pre = {shown(pre_nms)} (here {ours})")
    return settings


def _nms(nms: Mapping[str, Any], hints: Hints) -> dict[str, Any]:
    """Which NMS of the detections; its threshold is read with the others."""
    agnostic = flag(nms.get("class_agnostic", False))
    if agnostic is None:
        hints.misread("test_cfg.rcnn.nms.class_agnostic", nms["class_agnostic"], "True or False")
    if word(nms.get("type")) != "soft_nms":
        return {"nms": "agnostic"} if agnostic else {}
    if agnostic:
        hints.unlike.append("test_cfg.rcnn.nms.class_agnostic = True (here False in soft NMS)")
    usual = {"method": "linear", "sigma": 0.5, "min_score": 1e-3}
    theirs = {name: nms.get(name, value) for name, value in usual.items()}
    if theirs["method"] != "gaussian" or not same(theirs["sigma"], 0.5):
        hints.left_out.append("test_cfg.rcnn.nms: soft NMS is Gaussian with sigma 0.5 here, other settings of it")
    if not same(theirs["min_score"], 1e-3):
        hints.left_out.append(
            f"test_cfg.rcnn.nms.min_score = {shown(theirs['min_score'])}: here detections above score_thr are kept"
        )
    return {"nms": "soft"}


def test_steps(names: Mapping[str, Any]) -> list[dict[str, Any]]:
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
        if kind in ("Resize", "FixScaleResize") and flag(step.get("keep_ratio", False)) is not True:
            hints.unlike.append(
                f"test_pipeline: {kind} with keep_ratio = {shown(step.get('keep_ratio', False))} (here True)"
            )
        if kind == "Pad" and (step.get("size") is not None or not same(step.get("pad_val", 0), 0)):
            said = shown({key: step[key] for key in ("size", "pad_val") if key in step})
            hints.unlike.append(f"test_pipeline: Pad with {said} (here by 0 to a multiple of data.pad_multiple)")
        if not found and len(sides) == 2 and min(sides) >= 32:
            found = {"short_side": (int(min(sides)),), "long_side": int(max(sides))}
    return found
