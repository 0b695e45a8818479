"""``cascade-rcnn convert SOURCE DEST.safetensors``: checkpoints of other libraries become ours.

Whose it is shows in its keys; the network in keys and shapes; what neither shows (the style of a ResNet, thresholds)
comes from the config text in its metadata, else from the library's habit, or from ``--config NAME``. Every decision is
printed with its reason, and so is every setting that was not taken over. The renamed weights must fit the built network
key by key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cascade_rcnn.checkpoint import save_checkpoint, write_tensors
from cascade_rcnn.config import ModelConfig
from cascade_rcnn.convert.class_names import choose_classes, read_classes
from cascade_rcnn.convert.config_text import Hints, read_config_text
from cascade_rcnn.convert.decide import Asked, Decisions, decide, report_left_out
from cascade_rcnn.convert.find_weights import FoundWeights, find_weights
from cascade_rcnn.convert.infer_config import backbone_of, structure_of
from cascade_rcnn.convert.key_tables import recognise, rename
from cascade_rcnn.convert.no_counterpart import missing_counterpart
from cascade_rcnn.convert.values import adapt_values
from cascade_rcnn.errors import CheckpointError

_LISTED = 20  # keys named in an error


def run_convert(
    source: Path,
    dest: Path,
    *,
    config: str | None = None,
    classes: Sequence[str] = (),
    classes_from: Path | None = None,
    weight_standardization: bool = False,
    overwrite: bool = False,
) -> None:
    """Convert ``source`` (.pth, .pkl, .safetensors of another library) to ``dest``, or write nothing.

    ``config`` is a recipe for what the weights do not show; ``classes`` or the file ``classes_from`` name the classes;
    ``weight_standardization`` says that it was trained with it, where the file does not. A backbone alone becomes a
    file for ``--model.backbone-weights``. An existing ``dest`` that is not the same conversion is kept unless
    ``overwrite``. Raises CheckpointError: unsafe or unknown file, keys that are missing, left over or of another shape,
    parts and settings without a counterpart, an existing ``dest``.
    """
    if dest.suffix != ".safetensors":
        raise CheckpointError(f"{dest}: converted checkpoints end in .safetensors: name it {dest.stem}.safetensors")
    asked = Asked(read_classes(classes, classes_from), config or "", weight_standardization)
    if config is not None:
        from cascade_rcnn.recipes import load_config

        asked.recipe = load_config(config)
    found = find_weights(source)
    origin = {"sha256": _sha256(source), "file": source.name, **asked.in_words()}
    _check_destination(dest, origin, overwrite)
    try:
        _convert(found, dest, asked, origin)
    except CheckpointError as error:
        text = str(error)
        raise CheckpointError(text if text.startswith(str(dest)) else f"{source}: {text}") from None
    print("\n".join([f"{source}:", *(f"  {note}" for note in found.notes), f"written: {dest}"]))


def _convert(found: FoundWeights, dest: Path, asked: Asked, origin: dict[str, str]) -> None:
    kind = recognise(found.state)
    part = missing_counterpart(found.state)
    if part and (kind != "backbone" or "one-stage" in part):
        raise CheckpointError(f"no counterpart here for {part}: it cannot be converted")
    renamed, left_over = rename(found.state, kind)
    state = adapt_values(renamed, kind)
    if any(key.endswith(".bn.running_var") for key in renamed):
        found.notes.append("batch norm of FPN and heads: folded into their convolutions")
    if kind == "backbone":
        _write_backbone(dest, state, renamed, left_over, origin, found.notes)
        return
    if kind == "detectron2":
        found.notes.append(
            "licence: detectron2's published weights are CC-BY-SA-3.0 (share alike, with attribution), and what is "
            "trained from them too; the file does not say whether it is one of them"
        )
    seen = structure_of(state, kind)
    hints = read_config_text(found.config) if found.config else Hints()
    made = Decisions(state, kind, seen, hints, origin["file"], asked, found.notes)
    settings = decide(made, found)
    names = choose_classes(asked.classes, found.class_names, seen.classes, found.notes)
    report_left_out(made)
    fitted = _fitted(state, settings.model, len(names.names), left_over)
    save_checkpoint(
        dest,
        fitted,
        config=settings,
        class_names=names.names,
        category_ids=names.ids,
        extra={"converted_from": origin | {"format": kind}},
    )


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
    if any((before.get(key) or "") != value for key, value in origin.items() if key != "file"):
        raise CheckpointError(f"{dest}: exists and is not this conversion: name another file, or give --overwrite")


# Fitting


def _fitted(state: dict[str, Tensor], model: ModelConfig, classes: int, left_over: list[str]) -> dict[str, Tensor]:
    """The weights in the network's own order, or an error that lists every key which does not fit."""
    from cascade_rcnn.models.build import build_model
    from cascade_rcnn.models.cascade_rcnn import NoInitialValues

    with torch.device("meta"), NoInitialValues():
        wanted = build_model(model, classes).state_dict()
    shapes = {key: value.shape for key, value in wanted.items()}
    return _compare(state, shapes, left_over, network=model.backbone)


def _compare(
    state: dict[str, Tensor], wanted: Mapping[str, torch.Size], left_over: list[str], *, network: str
) -> dict[str, Tensor]:
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
        raise CheckpointError(f"its keys do not fit the network ({network}); {'; '.join(listed)}")
    whole = [key for key, value in fitted.items() if not value.is_floating_point() and key[-7:] != "tracked"]
    if whole:
        raise CheckpointError(
            f"{len(whole)} of its weights are whole numbers ({whole[0]}: {fitted[whole[0]].dtype}), as in a quantised "
            "network, whose scales are not in them: take the checkpoint from before the quantisation"
        )
    broken = [key for key, value in fitted.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise CheckpointError(
            f"{len(broken)} of its weights are not finite ({', '.join(broken[:3])}): take an earlier checkpoint"
        )
    return {key: fitted[key] for key in wanted}


def _write_backbone(
    dest: Path,
    state: dict[str, Tensor],
    renamed: Mapping[str, Tensor],
    left_over: list[str],
    origin: Mapping[str, str],
    notes: list[str],
) -> None:
    """Save a backbone under timm's keys, as ``--model.backbone-weights`` reads it."""
    if not any(key.endswith("running_var") for key in renamed) and "backbone.body.bn1.weight" in renamed:
        notes.append(
            "norms: without statistics; taken for batch norms merged into scale and bias, as Caffe's files have them "
            "(a group norm's look the same)"
        )
    body = {key.removeprefix("backbone.body."): value for key, value in state.items()}
    name = "vgg16"
    if "features.0.weight" not in body:
        import timm

        name = backbone_of(body)[0]
        with torch.device("meta"):
            wanted = timm.create_model(name, pretrained=False, features_only=True).state_dict()
        body = _compare(body, {key: value.shape for key, value in wanted.items()}, left_over, network=name)
    notes.append(f"format: a backbone alone, {name} (its keys)")
    style = "; with --model.style caffe if it was trained in Caffe or comes from detectron2 (BGR, stride in the 1x1)"
    notes.append(
        f"use it with --model.backbone {name} --model.backbone-weights {dest}"
        + ("" if name.startswith(("convnext", "swin")) else style)
    )
    write_tensors(dest, body, {"kind": "backbone", "extra": json.dumps({"converted_from": dict(origin)})})
