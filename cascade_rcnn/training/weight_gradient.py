"""The weight gradient of 3x3 convolutions on large maps, as nine matrix products: for processors without AVX-512.

What torch takes there (oneDNN's weight gradient for AVX2, of maps that lie channels-last) is 2 to 10 times as slow as
the forward pass, which multiplies as often: more than half of a training step (benchmarks/NOTES.md). Each of the nine
taps is one product of all pixels of the gradient with all pixels of the input, moved by the tap's offset. Both lie
on one grid with a column of zeros behind each row and a row of zeros below each map, so that a move is an offset in
memory and what leaves the map meets zeros.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEAST_PIXELS = 1500  # of a map: on smaller ones, and on RoIs, torch's own way is as fast


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=1)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            settings = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, ..., groups
            of_x, *_ = torch.ops.aten.convolution_backward(gradient, x, weight, None, *settings, [True, False, False])
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum((0, 2, 3))
        return of_x, weight_gradient(x, gradient), of_bias


def weight_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """Of a 3x3 convolution with padding 1 of ``x`` [B, C, H, W], from its outputs' ``gradient`` [B, O, H, W].

    Returns [O, C, 3, 3].
    """
    batch, channels, height, width = x.shape
    outputs, row = gradient.shape[1], width + 1
    pixels, margin = batch * (height + 1) * row, row + 1
    grid = (batch, height + 1, row)
    inputs = x.new_zeros(pixels + 2 * margin, channels)
    inputs[margin : margin + pixels].view(*grid, channels)[:, :height, :width] = x.permute(0, 2, 3, 1)
    gradients = gradient.new_zeros(pixels, outputs)
    gradients.view(*grid, outputs)[:, :height, :width] = gradient.permute(0, 2, 3, 1)
    found = x.new_empty(3, 3, outputs, channels)
    for down in range(3):
        for across in range(3):
            first = down * row + across
            torch.mm(gradients.t(), inputs[first : first + pixels], out=found[down, across])
    return found.permute(2, 3, 0, 1)


class MatrixGradientConv2d(nn.Conv2d):
    """``nn.Conv2d`` that learns so where its maps are large."""

    @staticmethod
    def fits(conv: nn.Module) -> bool:
        """Whether a layer is such a convolution."""
        return (
            type(conv) is nn.Conv2d
            and (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
            and conv.groups == 1
            and conv.padding_mode == "zeros"
        )

    def forward(self, x: Tensor) -> Tensor:
        large = x.shape[2] * x.shape[3] >= _LEAST_PIXELS
        plain = x.dtype == self.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        learns = torch.is_grad_enabled() and self.weight.requires_grad and not torch.compiler.is_compiling()
        if not (large and plain and learns):
            return super().forward(x)
        return cast(Tensor, _Convolution.apply(x, self.weight, self.bias))  # type: ignore[no-untyped-call]


def matrix_products_pay(device: torch.device) -> bool:
    """Whether torch's own way is the slow one."""
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"


def use_matrix_products(model: nn.Module) -> None:
    """Let the convolutions of a network in training learn so; parameters keep their names."""
    for layer in model.modules():
        if MatrixGradientConv2d.fits(layer):
            layer.__class__ = MatrixGradientConv2d
