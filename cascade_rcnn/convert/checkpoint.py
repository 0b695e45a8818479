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
from cascade_rcnn.convert.decide import Asked, Decisions, change_values, decide, report_left_out
from cascade_rcnn.convert.find_weights import FoundWeights, find_weights
from cascade_rcnn.convert.infer_config import backbone_of, structure_of
from cascade_rcnn.convert.key_tables import BODY, recognise, rename
from cascade_rcnn.convert.no_counterpart import missing_counterpart
from cascade_rcnn.convert.values import adapt_values, lacks_statistics, refuse_impossible
from cascade_rcnn.errors import CheckpointError
from cascade_rcnn.messages import printable

_LISTED = 20  # keys named in an error
_COUNTER = "num_batches_tracked"  # of a batch norm; only training from scratch uses it


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
        text = printable(error)
        raise CheckpointError(text if text.startswith(str(dest)) else f"{source}: {text}") from None
    print("\n".join([f"{source}:", *(f"  {printable(note)}" for note in found.notes), f"written: {dest}"]))


def _convert(found: FoundWeights, dest: Path, asked: Asked, origin: dict[str, str]) -> None:
    kind = recognise(found.state)
    part = missing_counterpart(found.state)
    if part and (kind != "backbone" or "one-stage" in part):
        raise CheckpointError(f"no counterpart here for {part}: it cannot be converted")
    renamed, left_over = rename(found.state, kind)
    refuse_impossible(renamed)
    state = adapt_values(renamed, kind)
    if any(key.endswith(".bn.running_var") for key in renamed):
        found.notes.append("batch norm of FPN and heads: folded into their convolutions")
    if kind in ("backbone", "detectron2") and f"{BODY}bn1.weight" in renamed and lacks_statistics(renamed):
        found.notes.append(
            "norms: without statistics; taken for batch norms merged into scale and bias, as Caffe's files have them "
            "(a group norm's look the same)"
        )
    if kind == "backbone":
        _write_backbone(dest, state, left_over, origin, found.notes)
        return
    if kind == "detectron2":
        found.notes.append(
            "licence: detectron2's published weights are CC-BY-SA-3.0 (share alike, with attribution), and what is "
            "trained from them too; the file does not say whether it is one of them"
        )
    seen = structure_of(state, kind)
    hints = read_config_text(found.config) if found.config else Hints()
    made = Decisions(state, kind, seen, hints, origin["file"], asked, found.notes)
    settings, theirs = decide(made, found)
    wanted = _shapes(settings.model, seen.classes)
    _check_keys(state, wanted, left_over, network=settings.model.backbone)
    change_values(made, settings.model, theirs, found)
    names = choose_classes(asked.classes, found.class_names, seen.classes, found.notes)
    report_left_out(made)
    save_checkpoint(
        dest,
        _fitted(state, wanted),
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


def _shapes(model: ModelConfig, classes: int) -> dict[str, torch.Size]:
    """Of all weights of the network, in its own order."""
    from cascade_rcnn.models.build import build_model
    from cascade_rcnn.models.cascade_rcnn import NoInitialValues

    with torch.device("meta"), NoInitialValues():
        wanted = build_model(model, classes).state_dict()
    return {key: value.shape for key, value in wanted.items()}


def _check_keys(
    state: Mapping[str, Tensor], wanted: Mapping[str, torch.Size], left_over: list[str], *, network: str
) -> None:
    """CheckpointError that lists every key which does not fit; counters, which ``_fitted`` sets, aside."""
    problems = {
        "missing": [key for key in wanted if key not in state and not key.endswith(_COUNTER)],
        "left over": [*left_over, *(key for key in state if key not in wanted and not key.endswith(_COUNTER))],
        "of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(shape)}"
            for key, shape in wanted.items()
            if key in state and state[key].shape != shape and not key.endswith(_COUNTER)
        ],
    }
    listed = [
        f"{len(keys)} {what}: {', '.join(keys[:_LISTED])}{', ...' if len(keys) > _LISTED else ''}"
        for what, keys in problems.items()
        if keys
    ]
    if listed:
        raise CheckpointError(f"its keys do not fit the network ({network}); {'; '.join(listed)}")


def _fitted(state: Mapping[str, Tensor], wanted: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The weights in the network's own order. Raises CheckpointError for whole numbers, infinite ones and NaN."""
    fitted = {key: torch.tensor(0) if key.endswith(_COUNTER) else state[key] for key in wanted}
    whole = [key for key, value in fitted.items() if not value.is_floating_point() and not key.endswith(_COUNTER)]
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
    return fitted


def _write_backbone(
    dest: Path,
    state: dict[str, Tensor],
    left_over: list[str],
    origin: Mapping[str, str],
    notes: list[str],
) -> None:
    """Save a backbone under timm's keys, as ``--model.backbone-weights`` reads it."""
    body = {key.removeprefix("backbone.body."): value for key, value in state.items()}
    name = "vgg16"
    if "features.0.weight" not in body:
        import timm

        name = backbone_of(body)[0]
        with torch.device("meta"):
            network = timm.create_model(name, pretrained=False, features_only=True)
        wanted = {key: value.shape for key, value in network.state_dict().items()}
        _check_keys(body, wanted, left_over, network=name)
        body = _fitted(body, wanted)
    notes.append(f"format: a backbone alone, {name} (its keys)")
    style = "; with --model.style caffe if it was trained in Caffe or comes from detectron2 (BGR, stride in the 1x1)"
    notes.append(
        f"use it with --model.backbone {name} --model.backbone-weights {dest}"
        + ("" if name.startswith(("convnext", "swin")) else style)
    )
    write_tensors(dest, body, {"kind": "backbone", "extra": json.dumps({"converted_from": dict(origin)})})
