"""Feature pyramid network (Lin et al., arXiv 1612.03144)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade_rcnn.models.ops.capabilities import exporting, followed
from cascade_rcnn.models.ops.frozen_norm import make_norm, without_batch_norms


class FeaturePyramid(nn.Module):
    """Feature pyramid network (arXiv 1612.03144): maps of one width at strides 4, 8, 16, 32 and 64.

    Lateral 1x1 convolutions, a nearest-neighbour path from coarse to fine, 3x3 convolutions, and p6 by subsampling.

    ``norm``: none, or a group or batch norm after every convolution (training from scratch, arXiv 1811.08883).
    """

    def __init__(self, in_channels: Sequence[int], channels: int = 256, *, norm: str = "none") -> None:
        super().__init__()
        self.channels = channels
        bias = norm == "none"
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1, bias=bias) for c in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=bias) for _ in in_channels)
        levels = 0 if norm == "none" else len(in_channels)
        self.lateral_norm = nn.ModuleList(make_norm(norm, channels) for _ in range(levels))
        self.output_norm = nn.ModuleList(make_norm(norm, channels) for _ in range(levels))
        for conv in [*self.lateral, *self.output]:
            nn.init.xavier_uniform_(conv.weight)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    def fold_batch_norm(self) -> None:
        self.lateral_norm = without_batch_norms(self.lateral, self.lateral_norm)
        self.output_norm = without_batch_norms(self.output, self.output_norm)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Features [B, C_l, H/s, W/s] of strides 4..32 become maps [B, channels, ...] of strides 4..64.

        Empties the list ``features``: in prediction each map, which is large, is freed after its use.
        """
        pyramid: list[Tensor] = []
        merged: Tensor | None = None
        for level in range(len(self.lateral) - 1, -1, -1):
            x = self.lateral[level](features.pop())
            if self.lateral_norm:
                x = self.lateral_norm[level](x)
            merged = x if merged is None else _add_coarser(x, merged)
            del x
            x = self.output[level](merged)
            pyramid.append(self.output_norm[level](x) if self.output_norm else x)
        pyramid.reverse()
        last = pyramid[-1]
        pyramid.append(F.max_pool2d(last, 1, stride=2) if exporting() else last[..., ::2, ::2])  # the same values
        return pyramid


def _add_coarser(fine: Tensor, coarse: Tensor) -> Tensor:
    """``fine`` [B, C, H, W], changed in place, plus the nearest-neighbour enlargement of ``coarse``."""
    height, width = fine.shape[-2:]
    plain = not followed() and not exporting() and not torch.is_grad_enabled()
    if plain and (height, width) == (2 * coarse.shape[-2], 2 * coarse.shape[-1]):
        # Without the enlarged map: 6 instead of 35 ms at stride 4 of 800 x 1088, and 56 MB less.
        fine.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).add_(coarse[:, :, :, None, :, None])
        return fine
    with torch.autocast(fine.device.type, enabled=False):  # autocast would upsample in float32, with the same result
        return fine.add_(F.interpolate(coarse, size=(height, width), mode="nearest"))
