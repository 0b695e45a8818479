"""Winograd's convolution against torch's own, in double precision as the reference."""

import pytest
import torch
from torch import nn

from cascade_rcnn.models.ops import winograd
from cascade_rcnn.models.ops.winograd import WinogradConv2d, use_winograd


def layer(inputs: int, outputs: int, *, bias: bool = True) -> nn.Conv2d:
    torch.manual_seed(0)
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)
    nn.init.normal_(conv.weight, std=(2 / (9 * inputs)) ** 0.5)
    return conv.requires_grad_(False)


@pytest.mark.parametrize("shape", [(1, 5, 8, 12), (2, 5, 13, 17), (1, 5, 1, 1), (1, 5, 3, 30), (9, 5, 14, 14)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_equals_the_direct_convolution(shape: tuple[int, ...], bias: bool, channels_last: bool) -> None:
    conv = layer(5, 7, bias=bias)
    x = torch.randn(shape)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(WinogradConv2d(conv)(x), conv(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 6])
def test_bands_of_tiles_give_the_same_as_the_whole(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    conv = WinogradConv2d(
        layer(4, 3)
    ).double()  # float32's rounding depends on the sizes of products, and on the processor
    x = torch.randn(batch, 4, 21, 10, dtype=torch.float64)
    whole = conv(x)
    monkeypatch.setattr(winograd, "_WORKING_SET", 1)
    torch.testing.assert_close(conv(x), whole, rtol=1e-10, atol=1e-12)


def test_rounding_error_is_near_that_of_float32_and_half_of_the_usual_points(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = layer(256, 256)
    x = torch.randn(1, 256, 24, 32).relu()
    assert conv.bias is not None
    exact = torch.conv2d(x.double(), conv.weight.double(), conv.bias.double(), 1, 1)

    def error() -> float:
        winograd._bases.cache_clear()
        return float((WinogradConv2d(conv)(x) - exact).square().mean().sqrt() / exact.std())

    ours = error()
    monkeypatch.setattr(winograd, "_POINTS", (0.0, 1.0, -1.0, 2.0, -2.0))
    usual = error()
    monkeypatch.undo()
    winograd._bases.cache_clear()
    assert ours < 2e-6  # 9e-7 on AMD EPYC, 1.25e-6 on Intel Xeon with AVX-512
    assert usual > 1.5 * ours


def test_only_wide_plain_convolutions_are_replaced() -> None:
    model = nn.Sequential(
        nn.Conv2d(192, 192, 3, padding=1),
        nn.Sequential(nn.Conv2d(192, 256, 3, padding=1, bias=False), nn.ReLU()),
        nn.Conv2d(256, 256, 3, padding=1, stride=2),
        nn.Conv2d(256, 256, 3),
        nn.Conv2d(256, 192, 1),
        nn.Conv2d(192, 64, 3, padding=1),
        nn.Conv2d(192, 192, 3, padding=1, groups=2),
    ).requires_grad_(False)
    x = torch.randn(1, 192, 9, 9)
    expected = model[1](model[0](x))
    assert use_winograd(model) == 2
    assert isinstance(model[0], WinogradConv2d)
    torch.testing.assert_close(model[1](model[0](x)), expected, rtol=1e-4, atol=1e-5)
