"""Convolutions for inference on GPUs that apply bias and ReLU in one pass over the result (``bias_relu_triton.py``)."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from cascade_rcnn.models.ops.capabilities import followed


def _bias_relu(x: Tensor, bias: Tensor, *, relu: bool) -> Tensor:
    if x.is_cuda and x.is_contiguous(memory_format=torch.channels_last) and not followed():
        from cascade_rcnn.models.ops.bias_relu_triton import bias_relu_

        return bias_relu_(x, bias, relu=relu)
    x = x + bias.to(x.dtype)[:, None, None]
    return F.relu(x) if relu else x


class FusedBiasConv2d(nn.Conv2d):
    """A convolution that no longer trains; with ``relu`` its result is cut at zero."""

    relu: bool
    _cast: tuple[object, Tensor] | None

    @staticmethod
    def fits(module: nn.Module) -> bool:
        return type(module) is nn.Conv2d and module.bias is not None and module.padding_mode == "zeros"

    @classmethod
    def take_over(cls, conv: nn.Conv2d) -> FusedBiasConv2d:
        """``conv`` itself, changed: parameters stay where they are."""
        conv.__class__ = cls
        fused = cast(FusedBiasConv2d, conv)
        fused.relu, fused._cast = False, None
        return fused

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            x = super().forward(x)
            return F.relu(x) if self.relu else x
        x = F.conv2d(x, self._weight(), None, self.stride, self.padding, self.dilation, self.groups)
        return x if self.bias is None else _bias_relu(x, self.bias, relu=self.relu)

    def _weight(self) -> Tensor:
        """In the type of the products: autocast would convert it again in every call."""
        kind = self.weight.device.type
        if not torch.is_autocast_enabled(kind):
            return self.weight
        dtype = torch.get_autocast_dtype(kind)
        key = (dtype, self.weight.device, self.weight.data_ptr())
        if self._cast is None or self._cast[0] != key:
            self._cast = (key, self.weight.detach().to(dtype))
        return self._cast[1]


class BiasReLU(nn.Module):
    """ReLU of ``x + bias``: the end of a residual block, for the biases of both its branches."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("bias", bias, persistent=False)
        self.bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return _bias_relu(x, self.bias, relu=True)


def fuse_biases(module: nn.Module) -> int:
    """Make the convolutions with a bias in ``module`` fused ones; returns how many. Batch norms are folded before."""
    convs = [child for child in module.modules() if FusedBiasConv2d.fits(child)]
    for conv in convs:
        FusedBiasConv2d.take_over(cast(nn.Conv2d, conv))
    for block in module.modules():
        if isinstance(block, (BasicBlock, Bottleneck)):
            _fuse_block(block)
    return len(convs)


def _fuse_block(block: BasicBlock | Bottleneck) -> None:
    """A residual block of timm: ReLUs into the convolutions before them, the last biases into the last ReLU."""
    count = 3 if isinstance(block, Bottleneck) else 2
    between = ("drop_block", "aa")  # what may lie between a convolution and its ReLU, or behind
    plain = all(isinstance(getattr(block, name, None), (nn.Identity, type(None))) for name in between)
    for number in range(1, count):
        conv, act = getattr(block, f"conv{number}"), getattr(block, f"act{number}")
        if plain and isinstance(conv, FusedBiasConv2d) and type(act) is nn.ReLU:
            conv.relu = True
            setattr(block, f"act{number}", nn.Identity())
    last, act = getattr(block, f"conv{count}"), getattr(block, f"act{count}")
    untouched = block.se is None and block.drop_path is None
    if not (untouched and isinstance(last, FusedBiasConv2d) and type(act) is nn.ReLU):
        return
    bias = _without_bias(last)
    shortcut = block.downsample
    if isinstance(shortcut, nn.Sequential) and isinstance(conv := _last_conv(shortcut), FusedBiasConv2d):
        bias = bias + _without_bias(conv)
    setattr(block, f"act{count}", BiasReLU(bias))


def _last_conv(branch: nn.Sequential) -> nn.Module:
    """The last module of a branch, skipping norms that were folded away."""
    return [part for part in branch if not isinstance(part, nn.Identity)][-1]


def _without_bias(conv: FusedBiasConv2d) -> Tensor:
    assert conv.bias is not None
    bias = conv.bias.detach()
    conv.bias = None
    return bias
