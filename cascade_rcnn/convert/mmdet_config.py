"""mmdetection's config files as recipes of ours: ``cascade-rcnn config --from-mmdet their_config.py > recipe.py``.

Nothing in a config is run (``config_files``, ``config_syntax``). Each of its settings is taken over, or listed as not
taken over, or the config is refused by that setting's name because a training with it gives something else.

    here             what the network is
    mmdet_backbones  its backbone
    mmdet_data       data set
    mmdet_pipeline   steps of its pipeline
    mmdet_schedule   optimizer, schedule, hooks
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cascade_rcnn.config import Config, ModelConfig
from cascade_rcnn.convert.config_files import read_config_file
from cascade_rcnn.convert.config_rules import DETECTORS, RULES
from cascade_rcnn.convert.config_text import Hints, read_config_text
from cascade_rcnn.convert.config_values import SYNCED, as_dict, as_list, flag, same, word
from cascade_rcnn.convert.mmdet_backbones import BACKBONES, backbone_settings
from cascade_rcnn.convert.mmdet_data import data_settings
from cascade_rcnn.convert.mmdet_defaults import fill_defaults, marked, missing
from cascade_rcnn.convert.mmdet_findings import Findings, same_settings
from cascade_rcnn.convert.mmdet_schedule import train_settings
from cascade_rcnn.errors import ConfigError
from cascade_rcnn.messages import few_names, printable, shown
from cascade_rcnn.recipes import config_from_dict, config_to_python

# (path, values), beyond config_rules: what a converted checkpoint does not need to have, but a training does.
_FOR_TRAINING: list[tuple[str, tuple[Any, ...]]] = [
    ("roi_head.type", ("StandardRoIHead", "CascadeRoIHead")),
    ("rpn_head.bbox_coder.type", ("DeltaXYWHBBoxCoder",)),
    ("*.conv_cfg.type", ("Conv", "Conv2d")),
]
# Differences that training hardly feels: listed with what they change, not refused.
_LISTED = {
    "train_cfg.rcnn.assigner.match_low_quality": "a box that covers two objects well enough learns the one whose best "
    "box it is there, here the one that it covers better",
    "data_preprocessor.pad_size_divisor": "batches are padded to multiples of data.pad_multiple here",
    "data_preprocessor.pad_value": "the padding is 0 here",
    "data_preprocessor.batch_augments": "",
}


@dataclass
class MmdetRecipe:
    """What became of a config."""

    config: Config
    files: dict[Path, list[str]]  # each file that was read, and the names that it sets
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_python(self) -> str:
        """The recipe file, with a comment on where its values came from."""
        first, *others = self.files.items()
        lines = [f"# From mmdetection's config {printable(first[0])} ({few_names(first[1], most=20) or 'nothing'})"]
        lines += [f"#   its base {printable(path)} ({few_names(names, most=20)})" for path, names in others]
        lines.append("# What these files leave out is mmdetection's default.")
        lines += [f"# Not taken over: {item}" for item in self.left_out]
        lines += [f"# Note: {item}" for item in self.notes]
        return "\n".join([*lines, config_to_python(self.config)])

    def report(self) -> list[str]:
        """What was not taken over and what to look at, a line each."""
        return [f"not taken over: {item}" for item in self.left_out] + [f"note: {item}" for item in self.notes]


def recipe_from_mmdetection(path: str | Path) -> MmdetRecipe:
    """Read a config of mmdetection 2.x or 3.x with its base files.

    Raises ConfigError: a file that cannot be read without running it (with the line), or parts of the config that have
    no counterpart here (with their names).
    """
    from cascade_rcnn.models.build import check_backbone

    where = printable(path)
    names, files, used = read_config_file(path)
    model = as_dict(names.get("model"))
    if not model:
        raise ConfigError(f"{where}: it has no model = dict(...): not a config of a detector")
    kind = word(model.get("type"))
    if kind not in DETECTORS:
        raise ConfigError(
            f"{where}: no counterpart here for model.type = {shown(kind)}: {', '.join(DETECTORS)} are read"
        )
    backbone = word(as_dict(model.get("backbone")).get("type"))
    if backbone not in BACKBONES:
        raise ConfigError(
            f"{where}: no counterpart here for backbone.type = {shown(backbone)}: {', '.join(BACKBONES)} are read, the "
            "last with the model_name of any network of timm"
        )
    found = Findings()
    _check_kinds(model, found)
    model |= {"train_cfg": _train_cfg(names), "test_cfg": as_dict(model.get("test_cfg") or names.get("test_cfg"))}
    filled = fill_defaults(model)
    found.refused += missing(model)
    hints = read_config_text(dict(names) | {"model": model})
    settings = _model_settings(model, hints, found)
    _check_starts(model, found)
    data = data_settings(names, hints.data, settings["masks"] != "none", found)
    train = train_settings(names, settings, found, used=used)
    found.left_out = [marked(said, filled) for said in found.left_out]
    if found.refused:
        found.refused = [marked(said, filled) for said in dict.fromkeys(found.refused)]
        raise ConfigError(f"{where}: no counterpart here for {few_names(found.refused, most=3)}")
    config = config_from_dict({"model": settings, "data": data, "train": train}, source=where)
    try:
        check_backbone(config.model)  # a recipe that is printed can be trained
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return MmdetRecipe(config, files, list(dict.fromkeys(found.left_out)), list(dict.fromkeys(found.notes)))


def _train_cfg(names: Mapping[str, Any]) -> dict[str, Any]:
    return as_dict(as_dict(names["model"]).get("train_cfg") or names.get("train_cfg"))


def _check_kinds(model: Mapping[str, Any], found: Findings) -> None:
    """Refuse parts that are no dictionary, or lists of stages that are not all one."""
    for part in ("backbone", "neck", "rpn_head", "roi_head"):
        if not as_dict(model.get(part)):
            found.refuse(part, model.get(part), "one dictionary")
    roi = as_dict(model.get("roi_head"))
    for part in ("bbox_head", "mask_head"):
        value = roi.get(part)
        if isinstance(value, list) and any(as_dict(item) for item in value) and not all(map(as_dict, value)):
            found.refuse(f"roi_head.{part}", [bool(as_dict(item)) for item in value], "a head at every stage or none")
        elif value is not None and not all(as_dict(item) for item in as_list(value)):
            found.refuse(f"roi_head.{part}", value, "one dictionary, or one for each stage")


def _check_starts(model: Mapping[str, Any], found: Findings) -> None:
    """init_cfg of anything but the backbone, which ``mmdet_backbones`` reads."""
    places: list[tuple[str, Any]] = [("", model)]
    places += [(f"{part}.", model.get(part)) for part in ("neck", "rpn_head", "roi_head")]
    roi = as_dict(model.get("roi_head"))
    places += [(f"roi_head.{part}.", head) for part in ("bbox_head", "mask_head") for head in as_list(roi.get(part))]
    for path, part in places:
        for start in map(as_dict, as_list(as_dict(part).get("init_cfg"))):
            said = f"{path}init_cfg.type = {shown(start.get('type'))}: these layers start as mmdetection's usual ones"
            if word(start.get("type")) == "Pretrained":
                said = f"{path}init_cfg.checkpoint = {shown(start.get('checkpoint'))}: the weights of this part or of "
                said += "the whole detector; convert that checkpoint, and give --train.init"
            found.left_out.append(said)


def _model_settings(model: dict[str, Any], hints: Hints, found: Findings) -> dict[str, Any]:
    """Fields of ModelConfig."""
    backbone, neck, rpn, roi = (as_dict(model.get(part)) for part in ("backbone", "neck", "rpn_head", "roi_head"))
    stages = len(hints.model.get("stage_ious", ()))
    _apply_hints(model, hints, found)
    settings: dict[str, Any] = {"style": "pytorch", "norm": "frozen_statistics", "frozen_stages": -1}
    settings |= hints.model
    if not stages:
        found.refused.append("train_cfg.rcnn without assigner.pos_iou_thr")
        settings["stage_ious"] = (0.5,)
    if hints.anchors is not None:
        settings |= hints.anchors.settings()
    settings |= backbone_settings(backbone, model, found)
    settings["fpn_channels"] = neck.get("out_channels", 256)
    for name in ("feat_channels", "in_channels"):
        found.expect(rpn.get(name, settings["fpn_channels"]), f"rpn_head.{name}", settings["fpn_channels"])
    settings["rpn_convs"] = rpn.get("num_convs", 1)
    settings |= _heads(roi, stages, settings, found)
    settings["norm"] = _head_norm(roi, settings, found)
    settings["fpn_and_mask_norms"] = _norms_elsewhere(model, settings, found)
    _check_momentum(model, settings, found)
    _check_losses(model, stages, found)
    _check_border(as_dict(model["train_cfg"].get("rpn")), stages, found)
    _check_stages(as_list(model["train_cfg"].get("rcnn")), as_list(roi.get("bbox_head")), found)
    _drop_defaults(settings)
    _check_preprocessing(settings, hints, found)
    return settings


def _apply_hints(model: dict[str, Any], hints: Hints, found: Findings) -> None:
    """What the rules for checkpoints' texts have found, sorted for a training."""
    training = set(hints.training)
    listed = {said: why for said in hints.training for path, why in _LISTED.items() if said.startswith(path)}
    found.refused += [said for said in hints.impossible + hints.unlike if said not in listed]
    refused = [said for said in hints.training if said not in listed]
    if any(said.startswith("roi_head.bbox_head.loss_bbox.type") for said in refused):  # it says enough
        refused = [said for said in refused if "bbox_head.reg_decoded_bbox" not in said]
    found.refused += map(_with_ours, refused)
    found.left_out += [said for said in hints.left_out if said not in training and ("=" in said or ":" in said)]
    found.left_out += [f"{said}: {why}" for said, why in listed.items() if why]  # mmdet_data looks at batch_augments
    for path, values in _FOR_TRAINING:
        for place, value in found.leaves(model):
            if fnmatch.fnmatchcase(place, path) and not any(same(word(value), item) for item in values):
                found.refuse(place, value)


def _with_ours(said: str) -> str:
    """``path = value`` with the values that are possible here."""
    path = said.partition(" = ")[0]
    values = next((values for pattern, _, values in RULES if fnmatch.fnmatchcase(path, pattern)), ())
    listed = ", ".join(shown(value) for value in values if value is not None)
    return f"{said} (here {listed})" if listed and "(here " not in said else said


# Heads


def _heads(roi: Mapping[str, Any], stages: int, settings: Mapping[str, Any], found: Findings) -> dict[str, Any]:
    """Fields for box and mask heads; the stages must be alike but for their coders."""
    heads = [as_dict(head) for head in as_list(roi.get("bbox_head"))]
    single = word(roi.get("type")) == "StandardRoIHead"
    number = found.whole(roi.get("num_stages", len(heads)), "roi_head.num_stages", least=1) if not single else 1
    if not heads or number != stages or len(heads) not in (1, stages):
        found.refused.append(f"roi_head with {len(heads)} box heads and {stages} IoUs for {number} stages")
        return {"masks": "none"}
    plain = [{key: value for key, value in head.items() if key != "bbox_coder"} for head in heads]
    if any(not same_settings(head, plain[0]) for head in plain):
        found.refused.append("roi_head.bbox_head with stages that differ in more than their bbox_coder")
    head, channels = heads[0], settings["fpn_channels"]
    agnostic = found.flag(head.get("reg_class_agnostic", False), "roi_head.bbox_head.reg_class_agnostic")
    result: dict[str, Any] = {"class_agnostic_boxes": agnostic}
    result["head_channels"] = head.get("fc_out_channels", 1024)
    result["box_head"] = _box_head(head, channels, found)
    masks = [as_dict(item) for item in as_list(roi.get("mask_head"))]
    result["masks"] = "every" if masks and masks[0] else "none"
    if result["masks"] == "every":
        mask = masks[0]
        found.expect(mask.get("num_convs", 4), "roi_head.mask_head.num_convs", 4)
        found.expect(mask.get("in_channels", channels), "roi_head.mask_head.in_channels", channels)
        result["mask_channels"] = mask.get("conv_out_channels", 256)
        if any(not same_settings(item, mask) for item in masks):
            found.refused.append("roi_head.mask_head with stages that differ")
    return result


def _box_head(head: Mapping[str, Any], channels: object, found: Findings) -> str:
    kind, path = word(head.get("type")), "roi_head.bbox_head"
    usual = {"Shared2FCBBoxHead": (0, 2), "Shared4Conv1FCBBoxHead": (4, 1)}.get(kind, (0, 0))
    convs, layers = head.get("num_shared_convs", usual[0]), head.get("num_shared_fcs", usual[1])
    for name in ("num_cls_convs", "num_cls_fcs", "num_reg_convs", "num_reg_fcs"):
        found.expect(head.get(name, 0), f"{path}.{name}", 0)
    found.expect(head.get("in_channels", channels), f"{path}.in_channels", channels)
    if (convs, layers) == (0, 2):
        return "2fc"
    if (convs, layers) != (4, 1):
        found.refused.append(f"{path} with {convs} shared convolutions and {layers} layers")
    found.expect(head.get("conv_out_channels", 256), f"{path}.conv_out_channels", channels)
    norm = word(as_dict(head.get("norm_cfg")).get("type"))
    if norm not in ("", "GN", "BN", *SYNCED):
        found.refuse(f"{path}.norm_cfg.type", norm, "none, GN, BN or SyncBN")
    return {"": "4conv1fc", "GN": "4conv1fc_gn"}.get(norm, "4conv1fc_bn")


def _head_norm(roi: Mapping[str, Any], settings: Mapping[str, Any], found: Findings) -> str:
    """model.norm, which also says whether the batch norms of the box heads are those of all GPUs."""
    norm: str = settings["norm"]
    if settings.get("box_head") != "4conv1fc_bn":
        return norm
    kind = word(as_dict(as_dict(as_list(roi.get("bbox_head"))[0]).get("norm_cfg")).get("type"))
    if settings.get("output_norms"):  # no batch norm in the backbone
        return "sync" if kind in SYNCED else "batch"
    if (kind in SYNCED) != (norm == "sync"):
        usual = "SyncBN" if norm == "sync" else "BN"
        found.refuse("roi_head.bbox_head.norm_cfg.type", kind, f"{usual}, as the backbone's norm has it")
    return norm


def _norms_elsewhere(model: Mapping[str, Any], settings: Mapping[str, Any], found: Findings) -> bool:
    """Whether FPN and mask heads have batch norm like the backbone; group norm is everywhere or nowhere."""
    roi = as_dict(model.get("roi_head"))
    parts = {"neck": as_dict(model.get("neck"))}
    if settings["masks"] != "none":
        parts["roi_head.mask_head"] = as_dict(as_list(roi.get("mask_head"))[0])
    norms = {path: as_dict(part.get("norm_cfg")) for path, part in parts.items()}
    batch = {"batch": ("BN", "BN2d"), "sync": SYNCED}.get(settings["norm"], ())
    everywhere = any(word(norm.get("type")) in batch for norm in norms.values())
    usual = batch if everywhere else ("GN",) if settings["norm"] == "group" else ("",)
    for path, norm in norms.items():
        kind = word(norm.get("type"))
        if kind not in usual:
            found.refuse(f"{path}.norm_cfg.type", kind or None, f"{usual[0] or 'none'}, as the backbone's norm has it")
        found.expect(norm.get("requires_grad", True), f"{path}.norm_cfg.requires_grad", True)
    if norms["neck"]:
        found.expect(parts["neck"].get("no_norm_on_lateral", False), "neck.no_norm_on_lateral", False)
    return everywhere


def _check_momentum(model: Mapping[str, Any], settings: Mapping[str, Any], found: Findings) -> None:
    """Of batch norms whose statistics are trained."""
    roi = as_dict(model.get("roi_head"))
    parts = [("neck", model.get("neck"))]
    parts += [(f"roi_head.{part}", head) for part in ("bbox_head", "mask_head") for head in as_list(roi.get(part))]
    if settings["norm"] in ("batch", "sync"):
        parts.append(("backbone", model.get("backbone")))
    for path, part in parts:
        norm = as_dict(as_dict(part).get("norm_cfg"))
        if word(norm.get("type", "BN")) in ("BN", "BN2d", *SYNCED):
            found.expect(norm.get("momentum", 0.1), f"{path}.norm_cfg.momentum", 0.1)


def _check_losses(model: Mapping[str, Any], stages: int, found: Findings) -> None:
    """mmdetection's cascades learn boxes with smooth L1, its Faster and Mask R-CNN with L1: both are done here."""
    roi = as_dict(model.get("roi_head"))
    heads = [("rpn_head", as_dict(model.get("rpn_head")), 1 / 9)]
    heads += [("roi_head.bbox_head", as_dict(head), 1.0) for head in as_list(roi.get("bbox_head"))]
    for path, head, beta in heads:
        loss = as_dict(head.get("loss_bbox")) or {"type": "SmoothL1Loss", "beta": beta}
        kind = word(loss.get("type"))
        theirs = 0.0 if kind == "L1Loss" else found.number(loss.get("beta", 1.0), f"{path}.loss_bbox.beta")
        ours = beta if stages > 1 else 0.0
        decoded = found.flag(head.get("reg_decoded_bbox", False), f"{path}.reg_decoded_bbox")
        if kind in ("GIoULoss", "DIoULoss", "CIoULoss") and not decoded:
            found.refuse(f"{path}.loss_bbox.type", kind, "with reg_decoded_bbox = True")
        weight = loss.get("loss_weight", 1.0)
        if kind in ("L1Loss", "SmoothL1Loss") and not same(weight, 1.0):
            found.refuse(f"{path}.loss_bbox.loss_weight", weight, "1 for this loss")
        if kind in ("L1Loss", "SmoothL1Loss") and abs(theirs - ours) > 1e-3:
            place = "a cascade" if stages > 1 else "one stage"
            found.refuse(f"{path}.loss_bbox", f"{kind}, beta {theirs:g}", f"beta {ours:.3g} in {place}; 0 is L1")


def _check_border(rpn: Mapping[str, Any], stages: int, found: Findings) -> None:
    usual = 0 if stages > 1 else -1
    border = rpn.get("allowed_border", usual)
    if border != usual:
        place = "inside the image only" if stages > 1 else "everywhere"
        found.left_out.append(f"train_cfg.rpn.allowed_border = {shown(border)} (here anchors {place} learn)")


def _check_stages(rcnn: list[Any], heads: list[Any], found: Findings) -> None:
    numbers = [as_dict(as_dict(stage).get("sampler")).get("num", 512) for stage in rcnn]
    if len(set(map(repr, numbers))) > 1:
        found.refuse("train_cfg.rcnn.sampler.num", numbers, "one number for all stages")
    for stage in rcnn:
        assigner = as_dict(as_dict(stage).get("assigner"))
        # Without match_low_quality nothing reads min_pos_iou.
        reads_least = flag(assigner.get("match_low_quality")) is not False or "min_pos_iou" in assigner
        for name in ("neg_iou_thr", "min_pos_iou") if reads_least else ("neg_iou_thr",):
            found.expect(
                assigner.get(name, assigner.get("pos_iou_thr")),
                f"train_cfg.rcnn.assigner.{name}",
                assigner.get("pos_iou_thr"),
            )


def _drop_defaults(settings: dict[str, Any]) -> None:
    """None where a setting is what None means."""
    from cascade_rcnn.models.build import stage_stds

    stages = len(settings["stage_ious"])
    if same(settings.get("stage_loss_weights"), [0.5**k for k in range(stages)]) or stages == 1:
        settings["stage_loss_weights"] = None
    usual = stage_stds(ModelConfig(stage_ious=settings["stage_ious"]))
    stds = settings.get("stage_stds") or ()
    if len(stds) == stages and all(same(a, list(b)) for a, b in zip(stds, usual)):
        settings["stage_stds"] = None


def _check_preprocessing(settings: Mapping[str, Any], hints: Hints, found: Findings) -> None:
    from cascade_rcnn.models.build import normalization

    theirs = hints.preprocessing
    if theirs is None:
        found.refused.append("a data_preprocessor (or Normalize) without three means and stds")
        return
    mean, std, bgr = normalization(ModelConfig(style=settings["style"]))
    flip = -1 if theirs.bgr != bgr else 1
    if not same(theirs.mean[::flip], list(mean)) or not same(theirs.std[::flip], list(std)):
        words = "style caffe: BGR, std 1" if bgr else "style pytorch: RGB, ImageNet's"
        order = "BGR" if theirs.bgr else "RGB"
        found.refuse("data_preprocessor", f"{order} mean {list(theirs.mean)} std {list(theirs.std)}", words)
    elif flip == -1:
        found.left_out.append("data_preprocessor: the order of the channels, which goes with the backbone's weights")
