"""Anchors of all levels (Ren et al., arXiv 1506.01497; Lin et al., arXiv 1612.03144)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cascade_rcnn.rounding import round_up


class AnchorGenerator(nn.Module):
    """Anchors of side ``scale * stride``, ``ratios`` (height over width) and centres at ``(column, row) * stride``.

    ``sizes``: sides in pixels for each level instead of scales, equally many per level. ``rounded`` rounds the base
    anchors to whole pixels, as torchvision does.
    """

    def __init__(
        self,
        strides: Sequence[int],
        *,
        scales: Sequence[float],
        ratios: Sequence[float],
        sizes: Sequence[Sequence[float]] | None = None,
        rounded: bool = False,
    ) -> None:
        super().__init__()
        self.strides = tuple(strides)
        per_level = [scales] * len(strides)
        if sizes is not None:
            per_level = [[side / stride for side in sides] for sides, stride in zip(sizes, strides)]
        self.per_cell = len(per_level[0]) * len(ratios)
        base = [
            self.cell_anchor(stride, scale, ratio)
            for stride, level_scales in zip(self.strides, per_level)
            for ratio in ratios
            for scale in level_scales
        ]
        table = torch.tensor(base).view(len(self.strides), self.per_cell, 4)
        self.register_buffer("base", table.round() if rounded else table, persistent=False)
        self.base: Tensor

    def cell_anchor(self, stride: int, scale: float, ratio: float) -> tuple[float, float, float, float]:
        """The anchor (x1, y1, x2, y2) of the cell at row and column 0."""
        height, width = scale * stride * math.sqrt(ratio), scale * stride / math.sqrt(ratio)
        return -width / 2, -height / 2, width / 2, height / 2

    def forward(self, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Anchors [H * W * A, 4] of each level, for feature maps of ``shapes`` (H, W): row, column, anchor."""
        levels = []
        for base, stride, (height, width) in zip(self.base, self.strides, shapes):
            y = torch.arange(height, device=base.device, dtype=torch.float32) * stride
            x = torch.arange(width, device=base.device, dtype=torch.float32) * stride
            shift = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).repeat(1, 1, 2)  # [H, W, 4] (x, y, x, y)
            levels.append((shift[:, :, None, :] + base).reshape(-1, 4))
        return levels

    def unpadded(self, shapes: Sequence[tuple[int, int]], sizes: Tensor, *, multiple: int = 32) -> Tensor:
        """Which anchors [B, sum(H * W * A)] start inside their own image, padded to ``multiple``.

        A batch is padded to its largest image; anchors in the rest of the padding belong to no image.
        """
        limits = round_up(sizes, multiple)  # [B, 2]
        masks = []
        for stride, (height, width) in zip(self.strides, shapes):
            y = torch.arange(height, device=sizes.device) * stride
            x = torch.arange(width, device=sizes.device) * stride
            mask = (y[None, :, None] < limits[:, 0, None, None]) & (x[None, None, :] < limits[:, 1, None, None])
            masks.append(mask[..., None].expand(-1, -1, -1, self.per_cell).flatten(1))
        return torch.cat(masks, dim=1)
