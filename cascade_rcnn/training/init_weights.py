"""Start a training from another checkpoint: a detector trained on COCO learns your 200 images much faster."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cascade_rcnn.checkpoint import find_checkpoint, load_checkpoint
from cascade_rcnn.config import ModelConfig
from cascade_rcnn.errors import CheckpointError
from cascade_rcnn.models.build import stage_stds
from cascade_rcnn.zoo.store import resolve


def check_init(path: str) -> None:
    """Fetch what ``train.init`` names, where it is a name. Raises CheckpointError where there is no such checkpoint."""
    find_checkpoint(resolve(path))


# Settings that do not change any weight's shape, and what the weights have learnt with them.
_LEARNT_WITH = ("semantics", "anchor_scales", "anchor_sizes", "anchor_ratios")
_CLASS_COUNTS, _BATCH_COUNT = "class_loss.counts", "num_batches_tracked"  # what losses and norms have seen


@torch.no_grad()
def start_from(model: nn.Module, path: Path, class_names: Sequence[str], config: ModelConfig) -> str:
    """Copy the weights of the checkpoint ``path`` into ``model``, which detects ``class_names``; returns a summary.

    Layers with a row per class take the rows of classes with the same name; the other rows are left unchanged. Heads
    that ``model`` does not have are left out. ``config`` is the model's: settings that the checkpoint has learnt
    otherwise are told.

    Raises:
        CheckpointError: anything else is missing, left over or has another shape; or the backbone has another style,
            in which weights of the same names and shapes mean something else.
    """
    source = load_checkpoint(resolve(path))
    theirs = source.config.model
    if theirs.style != config.style:
        raise CheckpointError(
            f"{path}: its backbone has model.style {theirs.style} (channels and strides of its images), this recipe's "
            f"{config.style}; add --model.style {theirs.style}"
        )
    known = {name: row for row, name in enumerate(source.class_names)}
    pairs = [(row, known[name]) for row, name in enumerate(class_names) if name in known]
    misfits = []
    state = model.state_dict()
    for key, own in state.items():
        if key.endswith(_CLASS_COUNTS):
            continue  # of the other data set's classes
        given = source.state.get(key)
        per_class = None if given is None else _rows_per_class(key, own, len(class_names), given, len(known))
        if per_class is not None and given is not None and given.shape[1:] == own.shape[1:]:
            _copy_rows(own, given, pairs, per_class)
        elif given is not None and given.shape == own.shape:
            own.copy_(given)
        elif not key.endswith(_BATCH_COUNT):
            misfits.append(key)
    heads = {_head(key) for key in state}
    extra = [key for key in source.state if key not in state and not key.endswith((_CLASS_COUNTS, _BATCH_COUNT))]
    misfits += [key for key in extra if not _head(key) or _head(key) in heads]
    if misfits:
        raise CheckpointError(
            f"{path}: another network than this recipe's ({len(misfits)} weights are missing, left over or of another "
            f"shape: {', '.join(misfits[:3])}); use the recipe that it was trained with (cascade-rcnn config {path} "
            "prints it)"
        )
    shared = ", ".join(class_names[row] for row, _ in pairs) or "none"
    lines = [f"weights of {path}; classes that it knows already: {shared}"]
    if extra:
        lines.append(f"not in this recipe, and left out: {', '.join(sorted({_head(key) for key in extra}))}")
    return "\n".join(lines + _learnt_otherwise(theirs, config))


def _head(key: str) -> str:
    """``box_heads.1`` of a weight of the second stage's box head, ``mask_heads.0``; empty for weights of no head."""
    found = re.match(r"cascade\.((box|mask)_heads\.\d+)\.", key)
    return found[1] if found else ""


def _learnt_otherwise(theirs: ModelConfig, ours: ModelConfig) -> list[str]:
    """A line for each setting that differs: the network starts from what it knows, and has to learn that anew."""
    lines = []
    for name in _LEARNT_WITH:
        learnt, wanted = getattr(theirs, name), getattr(ours, name)
        if learnt != wanted:
            line = f"it has learnt with model.{name} {_words(learnt)}, and this recipe has {_words(wanted)}"
            option = f"--model.{name.replace('_', '-')} {_words(learnt)}"
            lines.append(line if learnt is None else f"{line}; {option} keeps what it knows")
    shared = min(len(theirs.stage_ious), len(ours.stage_ious))
    if stage_stds(theirs)[:shared] != stage_stds(ours)[:shared]:
        lines.append("it has learnt with other model.stage_stds: its box heads begin with boxes that are off")
    return lines


def _words(value: Any) -> str:
    return " ".join(f"{one}" for one in value) if isinstance(value, tuple) else str(value).lower()


def _rows_per_class(key: str, own: Tensor, classes: int, given: Tensor, given_classes: int) -> tuple[int, int] | None:
    """(rows of each class, rows behind the last class) of a layer that has rows per class; None for the others."""
    if ".classifier." in key:
        return 1, 1  # the background comes last
    if ".mask_heads." in key and ".logits." in key:
        return 1, 0
    if ".deltas." in key and len(own) == 4 * classes and len(given) == 4 * given_classes and key.startswith("cascade."):
        return 4, 0
    return None


def _copy_rows(own: Tensor, given: Tensor, pairs: list[tuple[int, int]], layout: tuple[int, int]) -> None:
    each, behind = layout
    for to_row, from_row in pairs:
        own[to_row * each : (to_row + 1) * each] = given[from_row * each : (from_row + 1) * each]
    if behind:
        own[-behind:] = given[-behind:]
