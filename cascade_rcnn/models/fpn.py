"""Feature pyramid network (arXiv 1612.03144): maps of one width at strides 4, 8, 16, 32 and 64."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class FeaturePyramid(nn.Module):
    """Lateral 1x1 convolutions, a nearest-neighbour path from coarse to fine, 3x3 convolutions, and p6 by subsampling.

    ``group_norm`` puts a group norm behind every convolution (training from scratch, arXiv 1811.08883).
    """

    def __init__(self, in_channels: Sequence[int], channels: int = 256, *, group_norm: bool = False) -> None:
        super().__init__()
        self.channels = channels
        bias = not group_norm
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1, bias=bias) for c in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=bias) for _ in in_channels)
        levels = len(in_channels) if group_norm else 0
        self.lateral_norm = nn.ModuleList(nn.GroupNorm(32, channels) for _ in range(levels))
        self.output_norm = nn.ModuleList(nn.GroupNorm(32, channels) for _ in range(levels))
        for conv in [*self.lateral, *self.output]:
            nn.init.xavier_uniform_(conv.weight)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Features [B, C_l, H/s, W/s] of strides 4..32 become maps [B, channels, ...] of strides 4..64."""
        merged = [conv(feature) for conv, feature in zip(self.lateral, features)]
        if self.lateral_norm:
            merged = [norm(x) for norm, x in zip(self.lateral_norm, merged)]
        for level in range(len(merged) - 1, 0, -1):
            height, width = merged[level - 1].shape[-2:]
            # In place: nothing needs the map without the coarser one, and it is the largest thing in memory.
            merged[level - 1].add_(F.interpolate(merged[level], size=(height, width), mode="nearest"))
        pyramid = [self.output[level](merged.pop()) for level in range(len(merged) - 1, -1, -1)][::-1]
        if self.output_norm:
            pyramid = [norm(x) for norm, x in zip(self.output_norm, pyramid)]
        pyramid.append(pyramid[-1][..., ::2, ::2])
        return pyramid
