"""What a converted checkpoint will be, and why: style, settings, anchors, norms, preprocessing; each with a note.

Weights come before the config text, the text before the library's habit; ``--config NAME`` replaces text and habit.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cascade_rcnn.config import Config, DataConfig, ModelConfig
from cascade_rcnn.convert import anchors
from cascade_rcnn.convert.class_names import Classes
from cascade_rcnn.convert.config_text import Hints, Preprocessing
from cascade_rcnn.convert.find_weights import FoundWeights
from cascade_rcnn.convert.infer_config import Structure, anchors_per_cell
from cascade_rcnn.convert.key_tables import BODY, BOX, MASK, Format
from cascade_rcnn.convert.values import (
    BN_EPS,
    absorb_preprocessing,
    change_eps,
    has_torchvisions_eps,
    reorder_anchors,
    standardize_weights,
)
from cascade_rcnn.errors import CheckpointError, UserError

_IMAGENET = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # RGB
_CAFFE = (103.53, 116.28, 123.675), (1.0, 1.0, 1.0)  # BGR
_CAFFE_SCALED = (103.53, 116.28, 123.675), (57.375, 57.12, 58.395)  # BGR; ResNeXt-101-32x8d, RegNets
_DETECTRON = (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0)  # BGR
_SEMANTICS = {
    "mmdetection": "mmdetection",
    "detectron2": "detectron2",
    "torchvision": "torchvision",
    "detectron": "paper",
}


@dataclass
class Asked:
    """What the user says of the checkpoint."""

    classes: Classes | None = None
    recipe_name: str = ""
    weight_standardization: bool = False
    recipe: Config | None = None

    def in_words(self) -> dict[str, str]:
        """For the metadata of the converted file."""
        names = ", ".join(self.classes.names) if self.classes is not None else ""
        standardized = "yes" if self.weight_standardization else ""
        return {"config": self.recipe_name, "classes": names, "weight_standardization": standardized}


@dataclass
class Decisions:
    """What the converted checkpoint will be, and why."""

    state: dict[str, Tensor]
    kind: Format
    seen: Structure
    hints: Hints
    file: str  # its name: the last resort for what neither weights nor text show
    asked: Asked
    notes: list[str] = field(default_factory=list)


def decide(made: Decisions, found: FoundWeights) -> tuple[Config, anchors.Anchors | None]:
    """The configuration, and the owner's anchors where they are known. The weights stay as they are."""
    seen, notes, hints = made.seen, made.notes, made.hints
    notes.append(f"format: {made.kind} (its keys)")
    stages = f"{seen.stages} stage{'s' if seen.stages > 1 else ''}"
    notes.append(
        f"network: {seen.backbone}, {stages}, {seen.classes} classes, masks: {seen.model['masks']}, "
        f"one box per {'RoI' if seen.model['class_agnostic_boxes'] else 'class'} (keys and shapes)"
    )
    if found.config and not hints.found:
        notes.append("its config text: not understood, nothing is taken from it")
    _refuse_what_differs(made)
    if made.kind == "detectron":
        hints.anchors = anchors.from_detectron(found.detectron_text)
    theirs = anchors.from_buffers(found.state) or hints.anchors
    if made.asked.recipe is not None:
        config = made.asked.recipe
        notes.append(f"everything else: the recipe {made.asked.recipe_name}, as asked")
        _say_what_the_text_wanted(made)
        theirs = anchors.from_buffers(found.state)
    else:
        config = _config_without_recipe(made)
        if theirs is not None:
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, **theirs.settings()))
    _check_anchors(made, config.model, theirs)
    return config, theirs


def change_values(made: Decisions, model: ModelConfig, theirs: anchors.Anchors | None, found: FoundWeights) -> None:
    """Move into the weights what of the owner's anchors, norms or preprocessing is not ours.

    All keys are there and have their shapes.
    """
    if theirs is not None:
        reorder_anchors(made.state, theirs.order)
    _match_norms(made)
    match_preprocessing(made, model, found)


def _refuse_what_differs(made: Decisions) -> None:
    """Settings of the config text under which this network would compute something else."""
    hints, seen = made.hints, made.seen
    if hints.impossible:
        raise CheckpointError(
            f"its config text asks for what has no counterpart here: {'; '.join(hints.impossible[:5])}"
        )
    if hints.num_classes and hints.num_classes != seen.classes:
        raise CheckpointError(
            f"its config text says num_classes = {hints.num_classes}, its weights have {seen.classes + 1} class "
            f"outputs, not {hints.num_classes + 1}: such heads have no counterpart here"
        )
    if hints.unlike and made.asked.recipe is None:
        raise CheckpointError(
            f"its config text asks for what is done differently here: {'; '.join(hints.unlike[:5])}; --config NAME "
            "converts it with a recipe's settings instead"
        )


def _config_without_recipe(made: Decisions) -> Config:
    """From weights, config text and the library's habits."""
    seen, hints, notes = made.seen, made.hints, made.notes
    style, reason = _style(made)
    if seen.model["box_head"] == "4conv1fc_bn" and "output_norms" in seen.model and not hints.found:
        seen.model.update(box_loss="giou", box_loss_weight=10.0, norm="sync")
        notes.append(
            "box loss: GIoU of the boxes, weight 10; batch norm of the box heads over all GPUs (the habit of such "
            "detectors; for further training)"
        )
    model: dict[str, Any] = {"semantics": _SEMANTICS[made.kind], "style": style, "norm": "frozen"}
    if made.kind == "mmdetection" and style != "caffe" and seen.group_width != 8:
        model["norm"] = "frozen_statistics"
    data: dict[str, Any] = {"short_side": (640, 672, 704, 736, 768, 800)} if made.kind == "detectron2" else {}
    model |= seen.model
    notes.append(f"style: {style} ({reason})")
    for key, value in hints.model.items():
        if not key.startswith("stage_") or len(value) == seen.stages:
            model[key] = value
        else:
            hints.left_out.append(f"{key}: {_in_words(value)}, for {seen.stages} stages")
    if "norm" in seen.model:
        model["norm"] = seen.model["norm"]
    if hints.found:
        taken = {key: value for key, value in hints.model.items() if model.get(key) == value} | hints.data
        said = ", ".join(f"{key} {_in_words(value)}" for key, value in sorted(taken.items()))
        notes.append(f"from its config text: {said or 'nothing that is not visible'}")
    if made.kind != "mmdetection" or not hints.found:
        notes.append(
            "thresholds, proposals and input size: the library's defaults, assumed (nothing in the file shows them)"
        )
    try:
        return Config(model=ModelConfig(**model), data=DataConfig(**(data | hints.data)))
    except (UserError, TypeError) as error:
        raise CheckpointError(f"its config text has invalid values ({error}): give --config NAME") from error


def _style(made: Decisions) -> tuple[str, str]:
    """Where a ResNet's blocks have their stride, and why we think so."""
    seen = made.seen
    is_plain_resnet = seen.groups == 1 and seen.depth >= 50 and seen.group_width == 64
    if "style" in made.hints.model:
        return made.hints.model["style"], "its config text"
    if made.kind == "mmdetection":
        if "caffe" in made.file and is_plain_resnet:
            return "caffe", "the file's name"
        where = "not in its" if made.hints.found else "no"
        return "pytorch", f"assumed: not visible in the weights, {where} config text; --config NAME for another"
    trained_anew = seen.model.get("norm") == "group"  # not converted from Caffe
    caffe = is_plain_resnet and not trained_anew and made.kind != "torchvision"
    return "caffe" if caffe else "pytorch", f"{made.kind}'s habit for this backbone; --config NAME for another"


def _say_what_the_text_wanted(made: Decisions) -> None:
    assert made.asked.recipe is not None
    chosen = {**vars(made.asked.recipe.model), **vars(made.asked.recipe.data)}
    wanted = made.hints.model | made.hints.data
    if made.hints.anchors is not None:
        wanted |= made.hints.anchors.settings()
    others = [
        f"{key} {_in_words(value)} (here {_in_words(chosen[key])})"
        for key, value in sorted(wanted.items())
        if chosen.get(key) is not None and chosen[key] != value
    ]
    others += made.hints.unlike
    if others:
        made.notes.append(f"its config text says otherwise: {', '.join(others)}")


def _check_anchors(made: Decisions, model: ModelConfig, theirs: anchors.Anchors | None) -> None:
    from cascade_rcnn.models.build import anchor_sizes

    sizes = anchor_sizes(model)
    number = len(sizes[0]) * len(model.anchor_ratios)
    if anchors_per_cell(made.state) != number:
        raise CheckpointError(
            f"its RPN has {anchors_per_cell(made.state)} anchors at each position, the configuration "
            f"{number}: name a recipe with its model.anchor_scales and anchor_ratios in --config"
        )
    ours = anchors.describe(sizes, model.anchor_ratios)
    if theirs is None:
        reason = (
            f"the recipe {made.asked.recipe_name}" if made.asked.recipe else "assumed: nothing in the file shows them"
        )
        made.notes.append(f"anchors: {ours} ({reason})")
        return
    if str(theirs) != ours:
        raise CheckpointError(
            f"its anchors are {theirs} ({theirs.seen_in}), those of the recipe {made.asked.recipe_name} {ours}: "
            "drop --config, or name a recipe with these model.anchor_sizes"
        )
    made.notes.append(f"anchors: {ours} ({theirs.seen_in})")


def _match_norms(made: Decisions) -> None:
    """An eps unlike ours, and weight standardisation, move into the weights."""
    state, hints, notes = made.state, made.hints, made.notes
    if made.kind == "torchvision" and has_torchvisions_eps(state):
        change_eps(state, 0.0)
        notes.append("batch norm of the backbone: without eps, as torchvision runs its COCO weights")
    if hints.backbone_eps is not None and hints.backbone_eps != BN_EPS:
        if made.seen.model.get("norm") == "group":
            raise CheckpointError(f"its group norms have eps {hints.backbone_eps:g}, which has no counterpart here")
        change_eps(state, hints.backbone_eps)
        notes.append(f"batch norm of the backbone: its eps {hints.backbone_eps:g} was moved into the scales")
    if made.kind != "mmdetection":
        return
    parts, reason = hints.standardized, "its config text"
    everywhere = (BODY, "fpn.", BOX, MASK)
    if made.asked.weight_standardization:
        parts, reason = parts or everywhere, "as asked"
    elif not hints.found and re.search(r"gn[-_+]?ws", made.file):
        parts, reason = everywhere, "the file's name"
    if parts:
        count = standardize_weights(state, parts)
        notes.append(
            f"weight standardisation ({reason}): done once in {count} convolutions; further training here is without it"
        )
    elif made.seen.model.get("norm") == "group" and not hints.found:
        notes.append("weight standardisation: assumed that there was none; --weight-standardization if there was")


def match_preprocessing(made: Decisions, model: ModelConfig, found: FoundWeights) -> None:
    """Move the owner's mean, std and channel order into the first convolution where they are not ours."""
    from cascade_rcnn.models.build import normalization

    theirs = _preprocessing(made, model, found)
    our_mean, our_std, our_bgr = normalization(model)
    changed = absorb_preprocessing(
        made.state,
        bgr=theirs.bgr,
        mean=theirs.mean,
        std=theirs.std,
        our_bgr=our_bgr,
        our_mean=our_mean,
        our_std=our_std,
    )
    if changed:
        order = "BGR" if theirs.bgr else "RGB"
        made.notes.append(
            f"its images were {order} with mean {_in_words(theirs.mean)} and std {_in_words(theirs.std)}: "
            "the difference was moved into the first convolution"
        )


def _preprocessing(made: Decisions, model: ModelConfig, found: FoundWeights) -> Preprocessing:
    """The owner's: said in the config text, in detectron2's buffers, else the library's habit."""
    seen = made.seen
    scaled = (seen.depth, seen.groups, seen.group_width) == (101, 32, 8) or seen.backbone.startswith("regnet")
    bgr = Preprocessing(True, *(_CAFFE_SCALED if scaled else _CAFFE))
    if made.hints.preprocessing is not None:
        return made.hints.preprocessing
    if made.kind == "mmdetection":
        return bgr if model.style == "caffe" or scaled else Preprocessing(False, *_IMAGENET)
    if made.kind == "detectron2":
        mean, std = (found.state.get(key, torch.empty(0)).flatten().tolist() for key in ("pixel_mean", "pixel_std"))
        return Preprocessing(True, tuple(mean), tuple(std)) if len(mean) == len(std) == 3 else bgr
    return Preprocessing(False, *_IMAGENET) if made.kind == "torchvision" else Preprocessing(True, *_DETECTRON)


def report_left_out(made: Decisions) -> None:
    settings = [item for item in made.hints.left_out if "=" in item or ":" in item or "." in item]
    names = [item for item in made.hints.left_out if item not in settings]
    if settings:
        made.notes.append(f"not taken over from its config text: {'; '.join(dict.fromkeys(settings))}")
    if names:
        made.notes.append(f"not read (training, data, logging): {', '.join(names)}")


def _in_words(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return " ".join(
            f"({_in_words(item)})" if isinstance(item, (tuple, list)) else _in_words(item) for item in value
        )
    return f"{value:g}" if isinstance(value, float) else str(value)
