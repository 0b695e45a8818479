"""What the weights of a converted checkpoint show of its network: depth, stages, classes, masks, widths."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cascade_rcnn.convert.key_tables import BOX, MASK, Format
from cascade_rcnn.errors import CheckpointError
from cascade_rcnn.models.cascade_rcnn import NoInitialValues

_BLOCKS: dict[tuple[str, tuple[int, ...]], int] = {
    ("basic", (2, 2, 2, 2)): 18,
    ("basic", (3, 4, 6, 3)): 34,
    ("bottleneck", (3, 4, 6, 3)): 50,
    ("bottleneck", (3, 4, 23, 3)): 101,
    ("bottleneck", (3, 8, 36, 3)): 152,
}
# (depth, groups, channels per group in the first stage's 3x3) to timm's name, with weights of the kind that was used.
TIMM = {
    (18, 1, 64): "resnet18.tv_in1k",
    (34, 1, 64): "resnet34.tv_in1k",
    (50, 1, 64): "resnet50.tv_in1k",
    (101, 1, 64): "resnet101.tv_in1k",
    (152, 1, 64): "resnet152.tv_in1k",
    (50, 32, 4): "resnext50_32x4d.tv_in1k",
    (101, 32, 4): "resnext101_32x4d.gluon_in1k",
    (101, 32, 8): "resnext101_32x8d.tv_in1k",
    (101, 64, 4): "resnext101_64x4d.tv_in1k",
    (50, 1, 128): "wide_resnet50_2.tv_in1k",
    (101, 1, 128): "wide_resnet101_2.tv_in1k",
}
# The same for a stem of three convolutions: plain (ResNetV1c), or with pooled shortcuts (ResNetV1d).
TIMM_DEEP_STEM = {
    (50, False): "resnet50c.gluon_in1k",
    (101, False): "resnet101c.gluon_in1k",
    (152, False): "resnet152c.gluon_in1k",
    (18, True): "resnet18d.ra2_in1k",
    (34, True): "resnet34d.ra2_in1k",
    (50, True): "resnet50d.ra2_in1k",
    (101, True): "resnet101d.ra2_in1k",
    (152, True): "resnet152d.ra2_in1k",
}


@dataclass(frozen=True)
class Structure:
    """What the weights show."""

    backbone: str
    depth: int
    groups: int
    group_width: int
    stages: int
    classes: int
    model: dict[str, Any]  # fields of ModelConfig


# Networks that are told by the shapes of all their weights, by the first of these. Of two of one width the deeper comes
# first, and a RegNetY before a RegNetX: it has all weights of the other.
_BY_SHAPES = {
    "stem.conv.weight": (
        *(f"regnety_{size}.pycls_in1k" for size in ("004", "008", "016", "032", "040", "064", "080", "120")),
        *(f"regnetx_{size}.pycls_in1k" for size in ("004", "008", "016", "032", "040", "064", "080", "120")),
    ),
    "stem_0.weight": (
        *("convnext_small.fb_in1k", "convnext_tiny.fb_in1k", "convnext_base.fb_in1k", "convnext_large.fb_in22k"),
        "convnext_xlarge.fb_in22k",
    ),
    "patch_embed.proj.weight": (
        *("swin_small_patch4_window7_224.ms_in1k", "swin_tiny_patch4_window7_224.ms_in1k"),
        *("swin_base_patch4_window7_224.ms_in1k", "swin_base_patch4_window12_384.ms_in22k"),
        *("swin_large_patch4_window7_224.ms_in22k", "swin_large_patch4_window12_384.ms_in22k"),
    ),
}


def _by_shapes(keys: Mapping[str, Tensor]) -> str | None:
    """timm's name of a RegNet, ConvNeXt or Swin; None for other networks."""
    names = next((names for first, names in _BY_SHAPES.items() if first in keys), None)
    if names is None:
        return None
    shapes = {key: tuple(value.shape) for key, value in keys.items()}
    for name in names:
        wanted = _shapes_of(name).items()
        if all(shapes.get(key) == shape or key.endswith("num_batches_tracked") for key, shape in wanted):
            return name
    raise CheckpointError(
        f"its backbone looks like {names[-1].partition('_')[0]}, but its shapes are those of none of "
        f"{', '.join(name.partition('.')[0] for name in names)}"
    )


@functools.cache
def _shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    """Of all weights of timm's network ``name``; half a second at the first call."""
    import timm

    with torch.device("meta"), NoInitialValues():
        network = timm.create_model(name, pretrained=False, features_only=True)
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


def backbone_of(state: Mapping[str, Tensor]) -> tuple[str, int, int, int]:
    """timm's name, depth, groups and channels per group from our keys (with or without ``backbone.body.``)."""
    keys = {key.removeprefix("backbone.body."): value for key, value in state.items()}
    if (named := _by_shapes(keys)) is not None:
        return named, 0, 1, 0
    counts = []
    for stage in range(1, 5):
        blocks = {int(match[1]) for key in keys if (match := re.match(rf"layer{stage}\.(\d+)\.", key))}
        counts.append(len(blocks))
    kind = "bottleneck" if "layer1.0.conv3.weight" in keys else "basic"
    depth = _BLOCKS.get((kind, tuple(counts)))
    conv = keys.get("layer1.0.conv2.weight")
    if depth is None or conv is None:
        raise CheckpointError(
            f"its backbone has {counts} {kind} blocks, which is no ResNet or ResNeXt known here; "
            "only those can be converted"
        )
    if conv.dim() != 4:
        raise CheckpointError(f"its layer1.0.conv2.weight has the shape {tuple(conv.shape)}, as no convolution has")
    per_group = int(conv.shape[1])
    groups = int(conv.shape[0]) // per_group
    is_deep, is_pooled = "conv1.0.weight" in keys, "layer2.0.downsample.2.weight" in keys
    name = TIMM.get((depth, groups, per_group))
    if is_deep or is_pooled:
        is_plain = (groups, per_group) == (1, 64)
        name = TIMM_DEEP_STEM.get((depth, is_pooled)) if is_deep and is_plain else None
        if name is None:
            stem, shortcut = "a deep stem" if is_deep else "a plain stem", "pooled" if is_pooled else "plain"
            raise CheckpointError(
                f"its backbone is a ResNet-{depth} ({groups} groups of {per_group}) with {stem} and {shortcut} "
                "shortcuts, which timm does not have"
            )
    if name is None:
        raise CheckpointError(
            f"its backbone is a ResNet-{depth} with {groups} groups of {per_group} channels, which timm does not have"
        )
    return name, depth, groups, per_group


def structure_of(state: Mapping[str, Tensor], source: Format) -> Structure:
    """Depth, stages, classes, masks and widths from our keys. Raises CheckpointError for parts without counterpart."""
    name, depth, groups, per_group = backbone_of(state)
    stages, mask_heads = _heads(state, BOX), _heads(state, MASK)
    required = [
        "fpn.lateral.0.weight",
        "rpn.objectness.weight",
        "rpn.deltas.weight",
        "cascade.box_heads.0.classifier.weight",
        "cascade.box_heads.0.fc1.weight",
        "cascade.box_heads.0.deltas.weight",
        *(["cascade.mask_heads.0.convs.0.weight"] if mask_heads else []),
    ]
    for key in required:
        if key not in state:
            raise CheckpointError(
                f"it has nothing for {key}: not a two-stage detector with an FPN and linear heads, or not all of one"
            )
    _check_class_rows(state, stages)
    _check_anchor_rows(state)
    classes = int(state["cascade.box_heads.0.classifier.weight"].shape[0]) - 1
    masks = "none"
    if mask_heads:
        masks = "every" if mask_heads == stages else {"detectron2": "one", "detectron": "last"}.get(source, "one")
    delta_rows = int(state["cascade.box_heads.0.deltas.weight"].shape[0])
    model: dict[str, Any] = {
        "backbone": name,
        "fpn_channels": int(state["fpn.lateral.0.weight"].shape[0]),
        "head_channels": int(state["cascade.box_heads.0.fc1.weight"].shape[0]),
        "class_agnostic_boxes": delta_rows == 4 and (classes > 1 or stages > 1),  # one class: both are the same
        "rpn_convs": max(1, _count_keys(state, r"rpn\.conv\.(\d)\.weight")),
        "box_head": _box_head(state),
        "stage_ious": tuple(round(min(0.5 + 0.1 * k, 0.9), 1) for k in range(stages)),
        "masks": masks,
    }
    model |= _deformable(state)
    if "backbone.output_norms.0.weight" in state:
        model |= {"output_norms": True, "frozen_stages": -1}
    if "fpn.lateral_norm.0.weight" in state:
        model["norm"] = "group"
    if mask_heads:
        model["mask_channels"] = int(state["cascade.mask_heads.0.convs.0.weight"].shape[0])
    return Structure(name, depth, groups, per_group, stages, classes, model)


def _check_anchor_rows(state: Mapping[str, Tensor]) -> None:
    objectness, deltas = (int(state[f"rpn.{name}.weight"].shape[0]) for name in ("objectness", "deltas"))
    if objectness * 2 == deltas:
        raise CheckpointError("no counterpart here for an RPN with two outputs for each anchor (softmax, not sigmoid)")
    if objectness * 4 != deltas:
        raise CheckpointError(
            f"its RPN has {objectness} scores and {deltas} deltas: no counterpart here for such a one"
        )


def _check_class_rows(state: Mapping[str, Tensor], stages: int) -> None:
    """Outputs beyond one for each class and one for background belong to heads with another meaning."""
    weights = [state.get(f"{BOX}{k}.classifier.weight") for k in range(stages)]  # one that is missing is told later
    rows = [int(weight.shape[0]) for weight in weights if weight is not None]
    if len(set(rows)) > 1:
        raise CheckpointError(f"its stages have {rows} class outputs: all stages must know the same classes")
    if rows[0] < 2:
        raise CheckpointError("it has 1 class output, for background only: no class to detect")
    masks = state.get(f"{MASK}0.logits.weight")
    deltas = int(state[f"{BOX}0.deltas.weight"].shape[0])
    by_masks = int(masks.shape[0]) if masks is not None else rows[0] - 1
    for what, classes in (("its masks", by_masks), ("its boxes", deltas // 4 if deltas > 4 else rows[0] - 1)):
        if rows[0] == classes + 2:
            raise CheckpointError(
                f"it has {rows[0]} class outputs where {what} know {classes} classes: no counterpart here for such "
                "heads (the seesaw loss's have an output for objectness)"
            )
        if what == "its masks" and classes == 1 and rows[0] > 2:
            raise CheckpointError("it has one mask for all classes (class_agnostic), which has no counterpart here")


def _deformable(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Which stages have deformable convolutions, and of which kind: 18 offsets a group, with modulation 27.

    Multiples of 54 could be both and are taken for modulated ones, as published ones are.
    """
    sign = re.compile(r"backbone\.body\.layer(\d)\.\d+\.conv2\.offset\.weight")
    rows = {(int(match[1]), int(value.shape[0])) for key, value in state.items() if (match := sign.fullmatch(key))}
    if not rows:
        return {}
    widths = {width for _, width in rows}
    if len(widths) > 1 or min(widths) % 9:
        raise CheckpointError(f"its deformable convolutions have {sorted(widths)} offsets: no counterpart here")
    width = widths.pop()
    modulated = width % 27 == 0
    return {
        "deformable": "modulated" if modulated else "plain",
        "deformable_stages": tuple(sorted(stage for stage, _ in rows)),
        "deformable_groups": width // (27 if modulated else 18),
    }


def _box_head(state: Mapping[str, Tensor]) -> str:
    if "cascade.box_heads.0.convs.0.0.weight" not in state:
        return "2fc"
    if "cascade.box_heads.0.convs.0.1.running_var" in state:
        return "4conv1fc_bn"
    return "4conv1fc_gn" if "cascade.box_heads.0.convs.0.1.weight" in state else "4conv1fc"


def anchors_per_cell(state: Mapping[str, Tensor]) -> int:
    """Anchors at each position of a level."""
    return int(state["rpn.objectness.weight"].shape[0])


def _heads(state: Mapping[str, Tensor], prefix: str) -> int:
    """The number of heads, by the last one of which there is anything."""
    found = [int(match[1]) for key in state if (match := re.match(rf"{re.escape(prefix)}(\d)\.", key))]
    return max(found, default=-1) + 1


def _count_keys(state: Mapping[str, Tensor], pattern: str) -> int:
    return len({match[1] for key in state if (match := re.fullmatch(pattern, key))})
