"""Batch norm whose statistics stay as they are, with a gradient that keeps channels-last memory on GPUs.

torch gives the gradient of such a norm in the usual layout, whatever the input's: its kernel writes in strides, and the
convolution before it copies the result back. On an H200 that was a fifth of a training step of ResNet-50. The gradient
is itself such a norm, of mean 0 and without a shift, and torch's forward keeps the layout.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _FrozenNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float
    ) -> Tensor:
        ctx.eps = eps
        learns = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(x if learns else None, weight, mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = F.batch_norm(gradient, torch.zeros_like(mean), variance, weight, training=False, eps=ctx.eps)
        if x is not None:
            wanted = [False, ctx.needs_input_grad[1], ctx.needs_input_grad[2]]
            none = mean.new_empty(0)  # of a batch's own statistics
            _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
                gradient, x, weight, mean, variance, none, none, False, ctx.eps, wanted
            )
        return of_x, of_weight, of_bias, None, None, None


class FrozenStatisticsNorm(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that is always in evaluation mode; its weight and bias may be trained."""

    def forward(self, x: Tensor) -> Tensor:
        by_hand = x.is_cuda and torch.is_grad_enabled() and not self.training and not torch.compiler.is_compiling()
        if not by_hand:
            return super().forward(x)
        found: Tensor = _FrozenNorm.apply(x, self.weight, self.bias, self.running_mean, self.running_var, self.eps)
        return found


def freeze_statistics(module: nn.Module) -> None:
    """Make every plain batch norm of ``module`` one whose statistics stay; parameters and their names are kept."""
    for child in module.modules():
        if type(child) is nn.BatchNorm2d and child.affine and child.track_running_stats:
            child.__class__ = FrozenStatisticsNorm


def make_norm(kind: str, channels: int) -> nn.Module:
    """``kind``: group (of 32 groups) or batch."""
    return nn.GroupNorm(32, channels) if kind == "group" else nn.BatchNorm2d(channels)


def without_batch_norms(convs: nn.ModuleList, norms: nn.ModuleList) -> nn.ModuleList:
    """The norms behind ``convs`` that remain when batch norms are folded into them: all, or none."""
    if not norms or isinstance(norms[0], nn.GroupNorm):
        return norms
    for conv, norm in zip(convs, norms):
        fold_batch_norm(conv, norm)  # type: ignore[arg-type]
    return nn.ModuleList()


@torch.no_grad()
def fold_batch_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Put a norm with fixed statistics into the convolution before it.

    In place: new weights beside old ones would leave holes in memory.
    """
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    bias = conv.bias if conv.bias is not None else torch.zeros_like(norm.running_mean)
    conv.weight.mul_(scale[:, None, None, None])
    conv.bias = nn.Parameter((bias - norm.running_mean) * scale + norm.bias, requires_grad=False)
