"""Keys and shapes of the detectors that ConvNeXt's and Swin's authors, and mmdetection, have published."""

from __future__ import annotations

import json
import re

import locations

Shapes = dict[str, tuple[int, ...]]

CONVNEXT = {
    "t": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "s": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "b": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "l": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "xl": ((3, 3, 27, 3), (256, 512, 1024, 2048)),
}
SWIN = {"t": ((2, 2, 6, 2), 96, 3), "s": ((2, 2, 18, 2), 96, 3), "b": ((2, 2, 18, 2), 128, 4)}


def _linear(name: str, out: int, *rest: int) -> Shapes:
    return {f"{name}.weight": (out, *rest), f"{name}.bias": (out,)}


def convnext(size: str) -> Shapes:
    depths, dims = CONVNEXT[size]
    found = _linear("downsample_layers.0.0", dims[0], 3, 4, 4) | _linear("downsample_layers.0.1", dims[0])
    for i in (1, 2, 3):
        found |= _linear(f"downsample_layers.{i}.0", dims[i - 1])
        found |= _linear(f"downsample_layers.{i}.1", dims[i], dims[i - 1], 2, 2)
    for i, (depth, dim) in enumerate(zip(depths, dims)):
        found |= _linear(f"norm{i}", dim)
        for block in (f"stages.{i}.{k}" for k in range(depth)):
            found |= (
                {f"{block}.gamma": (dim,)} | _linear(f"{block}.dwconv", dim, 1, 7, 7) | _linear(f"{block}.norm", dim)
            )
            found |= _linear(f"{block}.pwconv1", 4 * dim, dim) | _linear(f"{block}.pwconv2", dim, 4 * dim)
    return found


def swin(size: str, window: int = 7) -> Shapes:
    depths, first, heads = SWIN[size]
    found = _linear("patch_embed.proj", first, 3, 4, 4) | _linear("patch_embed.norm", first)
    for i, depth in enumerate(depths):
        dim = first * 2**i
        found |= _linear(f"norm{i}", dim)
        for block in (f"layers.{i}.blocks.{k}" for k in range(depth)):
            found |= _linear(f"{block}.norm1", dim) | _linear(f"{block}.norm2", dim)
            found[f"{block}.attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, heads * 2**i)
            found[f"{block}.attn.relative_position_index"] = (window**2, window**2)
            found |= _linear(f"{block}.attn.qkv", 3 * dim, dim) | _linear(f"{block}.attn.proj", dim, dim)
            found |= _linear(f"{block}.mlp.fc1", 4 * dim, dim) | _linear(f"{block}.mlp.fc2", dim, 4 * dim)
        if i < 3:
            found |= _linear(f"layers.{i}.downsample.norm", 4 * dim)
            found[f"layers.{i}.downsample.reduction.weight"] = (2 * dim, 4 * dim)
    return found


def manifest(name: str) -> Shapes:
    """Of a parity reference."""
    path = locations.REPOSITORY / "tests/fixtures/parity" / f"{name}.manifest.json"
    return {key: tuple(shape) for key, shape, *_ in json.loads(path.read_text(encoding="utf-8"))["keys"]}


def detector(family: str, size: str, *, stages: int = 3, own_names: bool = False) -> Shapes:
    """A Cascade Mask R-CNN of the official heads, or a Mask R-CNN (``stages`` 1) of mmdetection's.

    ``own_names``: those of mmdetection's backbones instead of the official ones.
    """
    heads = manifest("convnext_cascade_mask_rcnn_tiny" if stages == 3 else "mmdet_cascade_mask_rcnn_r50_fpn")
    found = {key: shape for key, shape in heads.items() if not key.startswith(("backbone.", "neck.lateral"))}
    if stages == 1:
        found = {
            re.sub(r"_head\.0\.", "_head.", key): s for key, s in found.items() if not re.search(r"_head\.[12]\.", key)
        }
        found["roi_head.bbox_head.fc_reg.weight"] = (320, 1024)
        found["roi_head.bbox_head.fc_reg.bias"] = (320,)
    body = convnext(size) if family == "convnext" else swin(size)
    dims = [body[f"norm{i}.weight"][0] for i in range(4)]
    for i, dim in enumerate(dims):
        found |= _linear(f"neck.lateral_convs.{i}.conv", 256, dim, 1, 1)
    theirs = {
        "dwconv": "depthwise_conv",
        "pwconv": "pointwise_conv",
        "layers.": "stages.",
        "embed.proj": "embed.projection",
        "attn.": "attn.w_msa.",
        "mlp.fc1": "ffn.layers.0.0",
        "mlp.fc2": "ffn.layers.1",
    }
    for key, shape in body.items():
        for before, after in theirs.items() if own_names else ():
            if before != "layers." or key.startswith(before):
                key = key.replace(before, after)
        found[f"backbone.{key}"] = shape
    return found
