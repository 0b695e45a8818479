"""The weight gradient of 3x3 convolutions as nine matrix products, beside torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cascade_rcnn.training import weight_gradient as module
from cascade_rcnn.training.weight_gradient import (
    MatrixGradientConv2d,
    matrix_products_pay,
    use_matrix_products,
    weight_gradient,
)


def _gradients(layer: nn.Conv2d, x: Tensor) -> list[Tensor]:
    """Of the input, the weight and the bias, for one gradient of the outputs."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    made = layer(x)
    torch.manual_seed(1)
    parameters = [x, layer.weight, *([] if layer.bias is None else [layer.bias])]
    return list(torch.autograd.grad(made, parameters, torch.randn(made.shape, dtype=x.dtype)))


@pytest.mark.parametrize("shape", [(3, 4, 5, 7), (1, 1, 1, 1), (2, 3, 1, 9), (2, 2, 9, 1)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_nine_products_are_the_convolutions_gradient(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=layout)
    weight = torch.randn(5, shape[1], 3, 3, dtype=torch.float64, requires_grad=True)
    made = torch.nn.functional.conv2d(x, weight, padding=1)
    gradient = torch.randn_like(made)
    (expected,) = torch.autograd.grad(made, weight, gradient)
    torch.testing.assert_close(weight_gradient(x, gradient), expected, rtol=1e-12, atol=1e-12)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the maps whose weight gradient was taken so."""
    seen: list[tuple[int, ...]] = []

    def watched(x: Tensor, gradient: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return weight_gradient(x, gradient)

    monkeypatch.setattr(module, "weight_gradient", watched)
    return seen


@pytest.mark.parametrize("bias", [True, False])
def test_large_maps_learn_so_and_small_ones_as_ever(bias: bool, calls: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 6, 3, padding=1, bias=bias)
    layer = nn.Conv2d(4, 6, 3, padding=1, bias=bias)
    layer.load_state_dict(plain.state_dict())
    layer.__class__ = MatrixGradientConv2d
    for side in (8, 48):
        x = torch.randn(2, 4, side, side).contiguous(memory_format=torch.channels_last)
        assert torch.equal(layer(x), plain(x))
        for mine, theirs in zip(_gradients(layer, x), _gradients(plain, x), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert calls == [(2, 4, 48, 48)]
    with torch.no_grad():
        layer(x)
    with torch.autocast("cpu", torch.bfloat16):  # its own inputs and weights would be in two precisions
        layer(x).float().sum().backward()
    layer.double()(x.double()).sum().backward()
    assert len(calls) == 1


def test_the_processor_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, device, expected in (("AVX2", "cpu", True), ("AVX512", "cpu", False), ("AVX2", "cuda", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda found=capability: found)
        assert matrix_products_pay(torch.device(device)) == expected


def test_plain_convolutions_of_three_by_three_learn_so() -> None:
    def network() -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Conv2d(4, 4, 3, padding=1, stride=2),
            nn.Conv2d(4, 4, 3, padding=1, groups=2),
            nn.Conv2d(4, 4, 1),
            nn.Conv2d(4, 4, 3, padding=2, dilation=2),
        )

    model = network()
    use_matrix_products(model)
    assert [at for at, layer in enumerate(model) if isinstance(layer, MatrixGradientConv2d)] == [0]
    assert list(model.state_dict()) == list(network().state_dict())
