"""Deformable 3x3 convolutions (arXiv 1703.06211; modulated: 1811.11168), computed by torchvision's operator."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.ops import deform_conv2d


class DeformableConv2d(nn.Conv2d):
    """A convolution whose taps are moved by offsets that a plain convolution of the same input gives.

    ``offset``'s channels: (dy, dx) in pixels for each tap, taps row by row, for each group of channels; then, where it
    is modulated, a logit for each tap, whose sigmoid scales what the tap reads. Begins as the plain convolution
    (offsets of 0), modulated with each tap at half strength.
    """

    offset: nn.Conv2d
    modulated: bool

    @classmethod
    def of(cls, conv: nn.Conv2d, *, modulated: bool = False, groups: int = 1) -> DeformableConv2d:
        """``conv`` itself, changed in place: its weight and the names of its parameters stay."""
        made = cast(DeformableConv2d, conv)
        made.__class__ = cls
        height, width = conv.kernel_size
        shape: dict[str, Any] = {name: getattr(conv, name) for name in ("kernel_size", "stride", "padding", "dilation")}
        channels = groups * (3 if modulated else 2) * height * width
        made.offset = nn.Conv2d(conv.in_channels, channels, **shape, device=conv.weight.device)
        nn.init.zeros_(made.offset.weight)
        nn.init.zeros_(cast(Tensor, made.offset.bias))
        made.modulated = modulated
        return made

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C', H', W']; in float32, which the operator needs on CPUs."""
        offset, mask = self.offset(x), None
        if self.modulated:
            moved = offset.shape[1] // 3 * 2
            offset, mask = offset[:, :moved], offset[:, moved:].float().sigmoid()
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast(x.device.type, enabled=False):
            found: Tensor = deform_conv2d(
                x.float(),
                offset.float(),
                self.weight.float(),
                bias,
                stride=self.stride,
                padding=self.padding,
                dilation=self.dilation,
                mask=mask,
            )
        return found.to(x.dtype)
