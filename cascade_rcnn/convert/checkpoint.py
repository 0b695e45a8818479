"""``cascade-rcnn convert SOURCE DEST.safetensors``: checkpoints of other libraries become ours.

Whose it is shows in its keys; the network in keys and shapes; what neither shows (the style of a ResNet, thresholds)
comes from the config text in its metadata, else from the library's habit, or from ``--config NAME``. Every decision is
printed with its reason. The renamed weights must fit the built network key by key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade_rcnn.checkpoint import save_checkpoint, write_tensors
from cascade_rcnn.config import Config, DataConfig, ModelConfig
from cascade_rcnn.convert.infer_config import (
    Hints,
    Preprocessing,
    Structure,
    anchors_per_cell,
    backbone_of,
    read_config_text,
    structure_of,
)
from cascade_rcnn.convert.key_tables import Format, absorb_preprocessing, adapt_values, recognise, remove_eps, rename
from cascade_rcnn.convert.pickle_makers import Placeholder
from cascade_rcnn.convert.safe_pickle import as_tensor, read_pickled
from cascade_rcnn.errors import CheckpointError, UserError

# Names of COCO's category ids 1..90; "-" where an id was never used.
_COCO_90_TEXT = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,-,stop sign,"
    "parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,-,backpack,umbrella,-,-,"
    "handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,"
    "surfboard,tennis racket,bottle,-,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,"
    "carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,-,dining table,-,-,toilet,-,tv,laptop,mouse,"
    "remote,keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,-,book,clock,vase,scissors,teddy bear,"
    "hair drier,toothbrush"
)
_COCO_90 = tuple(_COCO_90_TEXT.split(","))
COCO_IDS = tuple(number for number, name in enumerate(_COCO_90, 1) if name != "-")
COCO_NAMES = tuple(name for name in _COCO_90 if name != "-")

_IMAGENET = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # RGB
_CAFFE = (103.53, 116.28, 123.675), (1.0, 1.0, 1.0)  # BGR
_CAFFE_SCALED = (103.53, 116.28, 123.675), (57.375, 57.12, 58.395)  # BGR, detectron2's ResNeXt-101-32x8d
_DETECTRON = (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0)  # BGR
_LISTED = 20  # keys named in an error


@dataclass
class _Source:
    """What was found in the file."""

    state: dict[str, Tensor]
    class_names: tuple[str, ...] = ()
    config_text: str = ""
    notes: list[str] = field(default_factory=list)


def run_convert(source: Path, dest: Path, *, config: str | None = None, overwrite: bool = False) -> None:
    """Convert ``source`` (.pth, .pkl, .safetensors of another library) to ``dest``, or write nothing.

    ``config`` is a recipe for what the weights do not show. A backbone alone becomes a file for
    ``--model.backbone-weights``. Raises CheckpointError: unsafe or unknown file, keys that are missing, left over or of
    another shape. An existing ``dest`` that is not the same conversion is kept (CheckpointError) unless ``overwrite``.
    """
    if dest.suffix != ".safetensors":
        raise CheckpointError(f"{dest}: converted checkpoints end in .safetensors: name it {dest.stem}.safetensors")
    found = _read(source)
    origin = {"sha256": _sha256(source), "file": source.name, "config": config or ""}
    _check_destination(dest, origin, overwrite)
    try:
        kind = recognise(found.state)
        renamed, left_over = rename(found.state, kind)
        state = adapt_values(renamed, kind)
        if any(key.endswith(".bn.running_var") for key in renamed):
            found.notes.append("batch norm of FPN and heads: folded into their convolutions")
        if kind == "torchvision" and remove_eps(state):
            found.notes.append("batch norm of the backbone: without eps, as torchvision runs its COCO weights")
        if kind == "backbone":
            _write_backbone(dest, state, left_over, origin, found.notes)
        else:
            made, names = _decide(state, kind, found, source, config)
            model = _fitted(state, made.model, len(names), left_over)
            ids = COCO_IDS if names == COCO_NAMES else tuple(range(1, len(names) + 1))
            save_checkpoint(
                dest,
                model,
                config=made,
                class_names=names,
                category_ids=ids,
                extra={"converted_from": origin | {"format": kind}},
            )
    except CheckpointError as error:
        text = str(error)
        raise CheckpointError(text if text.startswith(str(dest)) else f"{source}: {text}") from None
    print("\n".join([f"{source}:", *(f"  {note}" for note in found.notes), f"written: {dest}"]))


def _read(path: Path) -> _Source:
    """The weights in a file, wherever its library puts them, and what it says about them."""
    content: object = _read_safetensors(path) if path.suffix == ".safetensors" else read_pickled(path)
    if not isinstance(content, Mapping):
        what = f"a pickled {content.kind}" if isinstance(content, Placeholder) else f"a {type(content).__name__}"
        raise CheckpointError(f"{path}: holds {what}, not a state_dict: save model.state_dict() where it was made")
    found = _Source({})
    places = (content.get(key) for key in ("state_dict", "model", "blobs", "model_state_dict", "ema_state_dict"))
    holder: Mapping[Any, Any] = next((place for place in places if isinstance(place, Mapping)), content)
    for key, value in holder.items():
        tensor = as_tensor(value)
        if tensor is not None and isinstance(key, str):
            found.state[key] = tensor
    if found.state and all(key.startswith("module.") or key == "steps" for key in found.state):
        found.state = {key.removeprefix("module."): value for key, value in found.state.items() if key != "steps"}
    if not found.state:
        keys = ", ".join(str(key)[:40] for key in list(content)[:5])
        raise CheckpointError(f"{path}: no weights found (it holds {keys or 'nothing'}); give one with a state_dict")
    if "ema_state_dict" in content or any(key.startswith("ema_") for key in found.state):
        found.notes.append("weights: the moving averages (EMA), which its library stores under the plain keys")
    _read_metadata(found, content)
    return found


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            if "cascade_rcnn" in (file.metadata() or {}):
                raise CheckpointError(f"{path}: already a checkpoint of this program: use it as it is")
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:100]
        raise CheckpointError(f"{path}: not a readable safetensors file ({reason}): fetch it again") from error


def _read_metadata(found: _Source, content: Mapping[Any, Any]) -> None:
    meta = content.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    dataset = meta.get("dataset_meta")
    for place in (dataset if isinstance(dataset, Mapping) else {}, meta):
        for key in ("classes", "CLASSES"):
            names = place.get(key)
            if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
                found.class_names = found.class_names or tuple(names)
    for key in ("cfg", "config"):
        if isinstance(meta.get(key), str):
            found.config_text = found.config_text or meta[key]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_destination(dest: Path, origin: Mapping[str, str], overwrite: bool) -> None:
    """An existing file may be written again only with the same content."""
    if dest.is_dir():
        raise CheckpointError(f"{dest}: is a folder: name a file in it")
    if not dest.exists() or overwrite:
        return
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(dest, framework="pt") as file:
            before = json.loads((file.metadata() or {}).get("extra", "{}")).get("converted_from", {})
    except (SafetensorError, OSError, ValueError, AttributeError):
        before = {}
    if any(before.get(key) != value for key, value in origin.items() if key != "file"):
        raise CheckpointError(f"{dest}: exists and is not this conversion: name another file, or give --overwrite")


# Decisions


def _decide(
    state: dict[str, Tensor], kind: Format, found: _Source, source: Path, name: str | None
) -> tuple[Config, tuple[str, ...]]:
    """The configuration and the class names; changes ``state`` where the owner's preprocessing is not ours."""
    seen = structure_of(state, kind)
    notes = found.notes
    notes.append(f"format: {kind} (its keys)")
    stages = f"{seen.stages} stage{'s' if seen.stages > 1 else ''}"
    notes.append(
        f"network: {seen.backbone}, {stages}, {seen.classes} classes, masks: {seen.model['masks']}, "
        f"one box per {'RoI' if seen.model['class_agnostic_boxes'] else 'class'} (keys and shapes)"
    )
    hints = read_config_text(found.config_text) if found.config_text else Hints()
    if name is not None:
        from cascade_rcnn.recipes import load_config

        config = load_config(name)
        notes.append(f"everything else: the recipe {name}, as asked")
    else:
        config = _config_without_recipe(seen, kind, hints, source, notes)
    anchors = len(config.model.anchor_scales) * len(config.model.anchor_ratios)
    if anchors_per_cell(state) != anchors:
        raise CheckpointError(
            f"its RPN has {anchors_per_cell(state)} anchors at each position, the configuration "
            f"{anchors}: name a recipe with its model.anchor_scales and anchor_ratios in --config"
        )
    _match_preprocessing(state, kind, seen, config.model, hints, found)
    return config, _class_names(found, seen.classes, notes)


def _config_without_recipe(seen: Structure, kind: Format, hints: Hints, source: Path, notes: list[str]) -> Config:
    model: dict[str, Any] = {}
    data: dict[str, Any] = {}
    caffe = seen.groups == 1 and seen.depth >= 50 and seen.group_width == 64
    if kind == "mmdetection":
        reason = (
            f"not visible in the weights, {'not in its' if hints.found else 'no'} config text: mmdetection's "
            "default; --config NAME for another"
        )
        style = "pytorch"
        if "caffe" in source.name and caffe:
            style, reason = "caffe", "the file's name"
        if "style" in hints.model:
            style, reason = hints.model["style"], "its config text"
        model |= {
            "semantics": "mmdetection",
            "style": style,
            "norm": "frozen" if style == "caffe" or seen.group_width == 8 else "frozen_statistics",
        }
    else:
        semantics = {"detectron2": "detectron2", "torchvision": "torchvision", "detectron": "paper"}[kind]
        caffe = caffe and seen.model.get("norm") != "group"  # such ResNets were trained anew, not in Caffe
        style = "caffe" if caffe and kind != "torchvision" else "pytorch"
        reason = f"{kind}'s habit for this backbone; --config NAME for another"
        model |= {"semantics": semantics, "style": style, "norm": "frozen"}
        if kind == "detectron2":
            data = {"short_side": (640, 672, 704, 736, 768, 800)}
    model |= seen.model
    notes.append(f"style: {style} ({reason})")
    for key, value in hints.model.items():
        if not key.startswith("stage_") or len(value) == seen.stages:
            model[key] = value
    if hints.found:
        said = ", ".join(sorted([*(key for key in hints.model if model.get(key) == hints.model[key]), *hints.data]))
        notes.append(f"from its config text: {said or 'nothing that is not visible'}")
    if kind != "mmdetection" or not hints.found:
        notes.append("thresholds, proposals and input size: the library's defaults")
    try:
        return Config(model=ModelConfig(**model), data=DataConfig(**(data | hints.data)))
    except (UserError, TypeError) as error:
        raise CheckpointError(f"its config text asks for the impossible ({error}): give --config NAME") from error


def _match_preprocessing(
    state: dict[str, Tensor], kind: Format, seen: Structure, model: ModelConfig, hints: Hints, found: _Source
) -> None:
    from cascade_rcnn.models.build import normalization

    scaled = (seen.depth, seen.groups, seen.group_width) == (101, 32, 8)
    if kind == "mmdetection":
        theirs = Preprocessing(False, *_IMAGENET)
        if model.style == "caffe" or scaled:
            theirs = Preprocessing(True, *(_CAFFE_SCALED if scaled else _CAFFE))
    elif kind == "detectron2":
        theirs = Preprocessing(True, *(_CAFFE_SCALED if scaled else _CAFFE))
        mean, std = (found.state.get(key, torch.empty(0)).flatten().tolist() for key in ("pixel_mean", "pixel_std"))
        if len(mean) == 3 and len(std) == 3:
            theirs = Preprocessing(True, tuple(mean), tuple(std))
    else:
        theirs = Preprocessing(False, *_IMAGENET) if kind == "torchvision" else Preprocessing(True, *_DETECTRON)
    theirs = hints.preprocessing or theirs
    our_mean, our_std, our_bgr = normalization(model)
    changed = absorb_preprocessing(
        state, bgr=theirs.bgr, mean=theirs.mean, std=theirs.std, our_bgr=our_bgr, our_mean=our_mean, our_std=our_std
    )
    if changed:
        order = "BGR" if theirs.bgr else "RGB"
        found.notes.append(
            f"its images were {order} with mean {_short(theirs.mean)} and std {_short(theirs.std)}: "
            "the difference was moved into the first convolution"
        )


def _short(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _class_names(found: _Source, classes: int, notes: list[str]) -> tuple[str, ...]:
    if len(found.class_names) == classes:
        notes.append(f"class names: its metadata ({', '.join(found.class_names[:3])}{', ...' if classes > 3 else ''})")
        return found.class_names
    unusable = f"its metadata has {len(found.class_names)} names for {classes} classes; " if found.class_names else ""
    if classes == len(COCO_NAMES):
        notes.append(f"class names: {unusable}none in the file; 80 classes are taken for COCO's")
        return COCO_NAMES
    if classes == len(_COCO_90):
        notes.append(f"class names: {unusable}none in the file; 90 classes are taken for COCO's ids, ten unused")
        return tuple(f"unused {number}" if name == "-" else name for number, name in enumerate(_COCO_90, 1))
    notes.append(f"class names: {unusable}none in the file: class 1 .. class {classes}")
    return tuple(f"class {number}" for number in range(1, classes + 1))


# Fitting


def _fitted(state: dict[str, Tensor], model: ModelConfig, classes: int, left_over: list[str]) -> dict[str, Tensor]:
    """The weights in the network's own order, or an error that lists every key which does not fit."""
    from cascade_rcnn.models.build import build_model

    with torch.device("meta"):
        wanted = build_model(model, classes).state_dict()
    return _compare(state, {key: value.shape for key, value in wanted.items()}, left_over)


def _compare(state: dict[str, Tensor], wanted: Mapping[str, torch.Size], left_over: list[str]) -> dict[str, Tensor]:
    fitted = dict(state)
    for key in set(wanted) | set(state):
        if key.endswith("num_batches_tracked"):  # a counter that only training from scratch uses
            fitted.pop(key, None)
            if key in wanted:
                fitted[key] = torch.tensor(0)
    problems = {
        "missing": [key for key in wanted if key not in fitted],
        "left over": [*left_over, *(key for key in fitted if key not in wanted)],
        "of another shape": [
            f"{key} {tuple(fitted[key].shape)} instead of {tuple(wanted[key])}"
            for key in wanted
            if key in fitted and fitted[key].shape != wanted[key]
        ],
    }
    listed = [
        f"{len(keys)} {what}: {', '.join(keys[:_LISTED])}{', ...' if len(keys) > _LISTED else ''}"
        for what, keys in problems.items()
        if keys
    ]
    if listed:
        raise CheckpointError(
            f"its keys do not fit the network; {'; '.join(listed)}; if another recipe describes it, name it in --config"
        )
    broken = [key for key, value in fitted.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise CheckpointError(
            f"{len(broken)} of its weights are not finite ({', '.join(broken[:3])}): take an earlier checkpoint"
        )
    return {key: fitted[key] for key in wanted}


def _write_backbone(
    dest: Path, state: dict[str, Tensor], left_over: list[str], origin: Mapping[str, str], notes: list[str]
) -> None:
    """Save a backbone under timm's keys, as ``--model.backbone-weights`` reads it."""
    body = {key.removeprefix("backbone.body."): value for key, value in state.items()}
    name = "vgg16"
    if "features.0.weight" not in body:
        import timm

        name = backbone_of(body)[0]
        with torch.device("meta"):
            wanted = timm.create_model(name, pretrained=False, features_only=True).state_dict()
        body = _compare(body, {key: value.shape for key, value in wanted.items()}, left_over)
    notes.append(f"format: a backbone alone, {name} (its keys)")
    notes.append(
        f"use it with --model.backbone {name} --model.backbone-weights {dest}; with --model.style caffe if it "
        "was trained in Caffe or comes from detectron2 (BGR, stride in the 1x1)"
    )
    write_tensors(dest, body, {"kind": "backbone", "extra": json.dumps({"converted_from": dict(origin)})})
