"""The anchors that a checkpoint was trained with, from detectron2's buffers or mmdetection's settings."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cascade_rcnn.convert.config_syntax import UNREAD
from cascade_rcnn.convert.config_values import flag, number, whole
from cascade_rcnn.errors import CheckpointError
from cascade_rcnn.messages import shown

STRIDES = (4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Anchors:
    """Sides in pixels at each level, and ratios (height over width); ``order`` lists the owner's rows in our order."""

    sizes: tuple[tuple[float, ...], ...]
    ratios: tuple[float, ...]
    order: tuple[int, ...]
    seen_in: str

    def settings(self) -> dict[str, Any]:
        """Fields of ModelConfig."""
        scales = [tuple(size / stride for size in level) for level, stride in zip(self.sizes, STRIDES)]
        uniform = all(math.isclose(a, b, rel_tol=1e-6) for level in scales for a, b in zip(level, scales[0]))
        return {
            "anchor_scales": scales[0],
            "anchor_sizes": None if uniform else tuple(size for level in self.sizes for size in level),
            "anchor_ratios": self.ratios,
        }

    def __str__(self) -> str:
        return describe(self.sizes, self.ratios)


def describe(sizes: Sequence[Sequence[float]], ratios: Sequence[float]) -> str:
    """``32 64 128 256 512 pixels, ratios 0.5 1 2``; several sizes of a level are joined by a plus."""
    levels = " ".join("+".join(f"{size:g}" for size in level) for level in sizes)
    return f"{levels} pixels, ratios {' '.join(f'{ratio:g}' for ratio in ratios)}"


def from_settings(generator: Mapping[str, Any]) -> Anchors | None:
    """Anchors of mmdetection's ``anchor_generator`` settings; None without sizes in them.

    Raises CheckpointError (the setting, and what is wrong with it) for strides or numbers of levels unlike ours, and
    for values that are no lists of numbers above 0.
    """
    strides = _flat(generator, "strides")
    if strides and strides != tuple(map(float, STRIDES)):
        raise CheckpointError(
            f"anchor_generator.strides = {_words(strides)}: five levels of strides {_words(STRIDES)} are supported"
        )
    base = _flat(generator, "base_sizes") or tuple(map(float, STRIDES))
    if len(base) != len(STRIDES):
        raise CheckpointError(f"anchor_generator.base_sizes = {_words(base)}: one for each of five levels is supported")
    scales = _flat(generator, "scales") or _octave(generator)
    ratios = _flat(generator, "ratios")
    if not scales and not ratios and "base_sizes" not in generator:
        return None
    scales, ratios = scales or (8.0,), ratios or (0.5, 1.0, 2.0)
    order = list(range(len(scales) * len(ratios)))  # ratios outside, scales inside: ours too
    if flag(generator.get("scale_major")) is False:
        order = [s * len(ratios) + r for r, s in itertools.product(range(len(ratios)), range(len(scales)))]
    sizes = tuple(tuple(side * scale for scale in scales) for side in base)
    return Anchors(sizes, ratios, tuple(order), "its config text")


def from_buffers(state: Mapping[str, Tensor]) -> Anchors | None:
    """Anchors of detectron2's ``cell_anchors`` buffers; None if there are none.

    Raises CheckpointError for anchors that are no product of sizes and ratios around the middle of a cell.
    """
    name = "proposal_generator.anchor_generator.cell_anchors."
    keys = sorted((key for key in state if key.startswith(name)), key=lambda key: int(key.rpartition(".")[2]))
    if not keys:
        return None
    levels = [state[key].double() for key in keys]
    if len(levels) == 1:  # one list for all levels
        levels *= len(STRIDES)
    if len(levels) != len(STRIDES) or len({level.shape for level in levels}) > 1 or levels[0].shape[-1] != 4:
        raise CheckpointError(f"its anchors ({name}*) are for {len(levels)} levels; five of one shape are supported")
    sizes: list[tuple[float, ...]] = []
    ratios: list[float] = []
    order: tuple[int, ...] = ()
    for level in levels:
        width, height = level[:, 2] - level[:, 0], level[:, 3] - level[:, 1]
        if bool((width <= 0).any()) or bool((height <= 0).any()):
            raise CheckpointError(f"its anchors ({name}*) have no area")
        rows = [(_rounded(s), _rounded(r)) for s, r in zip((width * height).sqrt(), height / width)]
        own_sizes, own_ratios = list(dict.fromkeys(s for s, _ in rows)), list(dict.fromkeys(r for _, r in rows))
        ratios = ratios or own_ratios
        wanted = [(s, r) for r in own_ratios for s in own_sizes]
        centred = bool((level[:, :2] + level[:, 2:]).abs().max() < 1e-3 * float(width.max()))
        own_order = tuple(rows.index(row) for row in wanted if row in rows)
        if not centred or own_ratios != ratios or sorted(wanted) != sorted(rows) or (order and own_order != order):
            raise CheckpointError(f"its anchors ({name}*) are no product of sizes and ratios: they cannot be made here")
        sizes.append(tuple(own_sizes))
        order = own_order
    return Anchors(tuple(sizes), tuple(ratios), order, "cell_anchors in the file")


def from_detectron(text: str) -> Anchors | None:
    """Anchors of the settings that Detectron's pickles hold as text under ``cfg``; None where they do not say."""
    start = re.search(r"\bRPN_ANCHOR_START_SIZE: *(\d+)", text)
    listed = re.search(r"\bRPN_ASPECT_RATIOS:[^\[\n]*\[([\d., ]+)\]", text)
    if start is None and listed is None:
        return None
    first = float(start[1]) if start is not None else 32.0
    ratios = tuple(float(word) for word in listed[1].split(",")) if listed is not None else (0.5, 1.0, 2.0)
    sizes = tuple((first * 2**level,) for level in range(len(STRIDES)))
    return Anchors(sizes, ratios, tuple(range(len(ratios))), "its cfg")


def _rounded(value: Tensor) -> float:
    """To five digits: the file's float32 cannot tell more."""
    return float(f"{float(value):.5g}")


def _octave(generator: Mapping[str, Any]) -> tuple[float, ...]:
    """Scales of ``octave_base_scale`` and ``scales_per_octave``; () without the first."""
    octave, per_octave = generator.get("octave_base_scale"), generator.get("scales_per_octave", 1)
    if octave is None or octave is UNREAD or per_octave is UNREAD:
        return ()
    base, count = number(octave), whole(per_octave)
    if base is None or count is None or base <= 0 or count < 1:
        raise CheckpointError(
            f"anchor_generator.octave_base_scale = {shown(octave)}, scales_per_octave = {shown(per_octave)}: numbers "
            "above 0 are supported"
        )
    return tuple(base * 2 ** (i / count) for i in range(count))


def _flat(generator: Mapping[str, Any], name: str) -> tuple[float, ...]:
    """Numbers of a list; of pairs (strides may be given as (4, 4)) the first, if both are equal; () without any."""
    value = generator.get(name)
    items = value if isinstance(value, (list, tuple)) else [value]
    if value is None or value is UNREAD or UNREAD in items:
        return ()
    flat = [item[0] if isinstance(item, (list, tuple)) and len(set(map(repr, item))) == 1 else item for item in items]
    read = tuple(found for item in flat if (found := number(item)) is not None and found > 0)
    if not isinstance(value, (list, tuple)) or len(read) != len(flat):
        raise CheckpointError(f"anchor_generator.{name} = {shown(value)}: a list of numbers above 0 is supported")
    return read


def _words(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)
