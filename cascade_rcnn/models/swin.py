"""Swin's blocks as its detectors run them: maps of any size are padded to whole windows before they are shifted.

timm shifts first and pads then, which gives other values wherever a map is no multiple of the window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse
from torch import Tensor, nn

from cascade_rcnn.rounding import round_up


class DetectionSwinBlock(SwinTransformerBlock):
    """timm's block, and its weights, with the order of the official detectors (arXiv 2103.14030)."""

    def _attn(self, x: Tensor) -> Tensor:
        """[B, H, W, C], normed, to the attention's output of the same shape."""
        height, width = x.shape[1:3]
        rows, columns = self.window_size
        # as whole windows, not by remainders, of which an exporter for any size makes expressions that take minutes
        padded_height, padded_width = round_up(height, rows), round_up(width, columns)
        x = F.pad(x, (0, 0, 0, padded_width - width, 0, padded_height - height))
        down, right = self.shift_size
        mask = None
        if down or right:
            x = torch.roll(x, (-down, -right), dims=(1, 2))
            mask = self.get_attn_mask(x)
        windows = window_partition(x, self.window_size).flatten(1, 2)  # [B * windows, rows * columns, C]
        windows = self.attn(windows, mask=mask).unflatten(1, self.window_size)
        x = window_reverse(windows, self.window_size, padded_height, padded_width)
        if down or right:
            x = torch.roll(x, (down, right), dims=(1, 2))
        return x[:, :height, :width].contiguous()


def pad_before_shifting(body: nn.Module) -> None:
    """Turn timm's Swin blocks in ``body`` into the detectors'."""
    for block in body.modules():
        if type(block) is SwinTransformerBlock:
            block.__class__ = DetectionSwinBlock
