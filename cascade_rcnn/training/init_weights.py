"""Start a training from another checkpoint: a detector trained on COCO learns your 200 images much faster."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cascade_rcnn.checkpoint import find_checkpoint, load_checkpoint
from cascade_rcnn.errors import CheckpointError
from cascade_rcnn.zoo.store import resolve


def check_init(path: str) -> None:
    """Fetch what ``train.init`` names, where it is a name. Raises CheckpointError where there is no such checkpoint."""
    find_checkpoint(resolve(path))


@torch.no_grad()
def start_from(model: nn.Module, path: Path, class_names: Sequence[str]) -> str:
    """Copy the weights of the checkpoint ``path`` into ``model``, which detects ``class_names``; returns a summary.

    Layers with a row per class take the rows of classes with the same name; the other rows are left unchanged.
    Raises :class:`CheckpointError` where anything else is missing or has another shape.
    """
    source = load_checkpoint(resolve(path))
    known = {name: row for row, name in enumerate(source.class_names)}
    pairs = [(row, known[name]) for row, name in enumerate(class_names) if name in known]
    misfits = []
    for key, own in model.state_dict().items():
        if key.endswith("class_loss.counts"):
            continue  # how often each class was seen: of the other data set's classes
        given = source.state.get(key)
        per_class = None if given is None else _rows_per_class(key, own, len(class_names), given, len(known))
        if per_class is not None and given is not None and given.shape[1:] == own.shape[1:]:
            _copy_rows(own, given, pairs, per_class)
        elif given is not None and given.shape == own.shape:
            own.copy_(given)
        elif not key.endswith("num_batches_tracked"):
            misfits.append(key)
    if misfits:
        raise CheckpointError(
            f"{path}: another network than this recipe's ({len(misfits)} weights are missing or of another shape: "
            f"{', '.join(misfits[:3])}); use the recipe that it was trained with (cascade-rcnn config {path} prints it)"
        )
    shared = ", ".join(class_names[row] for row, _ in pairs) or "none"
    return f"weights of {path}; classes that it knows already: {shared}"


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
