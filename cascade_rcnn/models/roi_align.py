"""RoIAlign over a feature pyramid: each box is read from the level that fits its size.

B images, N boxes per image (padded, ``valid`` marks real ones), L levels, C channels, S output bins per side.
Boxes are xyxy in pixels of the network input. Sources: He et al., arXiv 1703.06870 (RoIAlign); Lin et al.,
arXiv 1612.03144, equation 1 (level by size).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align as torchvision_roi_align

CANONICAL_SIDE = 56.0  # a box of this side (in pixels) is the smallest that leaves the first level for the second


def assign_levels(boxes: Tensor, levels: int) -> Tensor:
    """Level 0..levels-1 of each box ``[..., 4]``: floor(log2(sqrt(area) / 56)), clamped; int64 ``[...]``."""
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    side = (width * height).clamp(min=0).sqrt()
    return torch.floor(torch.log2(side / CANONICAL_SIDE + 1e-6)).clamp(0, levels - 1).to(torch.int64)


def roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    *,
    output_size: int,
    strides: Sequence[int],
    valid: Tensor | None = None,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """Features of each box, ``[B, N, C, S, S]``; zero where ``valid`` is False.

    ``features`` are L maps ``[B, C, H_l, W_l]`` with ``strides`` in pixels, ``boxes`` is ``[B, N, 4]``, ``valid``
    bool ``[B, N]``. ``sampling_ratio`` points per bin and side are averaged; 0 takes ceil(box side / S), measured
    on the level. Gradients flow into the features, not into the boxes.
    """
    batch, count = boxes.shape[:2]
    channels = features[0].shape[1]
    boxes = boxes.detach().to(torch.float32)
    levels = assign_levels(boxes, len(features))
    if valid is not None:
        levels = torch.where(valid, levels, -1)
    image = torch.arange(batch, device=boxes.device, dtype=boxes.dtype)[:, None, None].expand(batch, count, 1)
    rois = torch.cat((image, boxes), dim=2).flatten(0, 1)  # [B*N, 5]
    levels = levels.flatten()
    result = features[0].new_zeros(batch * count, channels, output_size, output_size)
    for level, (feature, stride) in enumerate(zip(features, strides, strict=True)):
        rows = torch.nonzero(levels == level).squeeze(1)
        pooled = torchvision_roi_align(
            feature, rois[rows].to(feature.dtype), output_size, 1.0 / stride, sampling_ratio, aligned
        )
        result = result.index_copy(0, rows, pooled)
    return result.view(batch, count, channels, output_size, output_size)
