"""Biases and ReLUs in one pass: the same network, the kernel's numbers by Triton's interpreter and on a real device."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cascade_rcnn.benchmark.stopwatch import seed_weights
from cascade_rcnn.models.backbone import Backbone
from cascade_rcnn.models.ops.fused_bias import BiasReLU, FusedBiasConv2d, fuse_biases
from interpreting import interpreted_results

triton = pytest.importorskip("triton")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHAPES = [(2, 5, 3, 4), (1, 64, 9, 7), (2, 1500, 2, 3), (1, 16, 0, 4)]  # the third: two programs for a pixel


def case(shape: tuple[int, ...], dtype: str, *, relu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Input, bias and what is expected of them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(DTYPES[dtype]).contiguous(memory_format=torch.channels_last)
    bias = torch.randn(shape[1], generator=generator)
    if x.numel():
        x[0, 0, 0, 0] = float("nan")
    expected = x.float() + bias[:, None, None]
    return x, bias, (expected.relu() if relu else expected).to(x.dtype)


def cases() -> list[tuple[Tensor, Tensor, Tensor, bool]]:
    return [(*case(s, d, relu=relu), relu) for s in SHAPES for d in DTYPES for relu in (True, False)]


def interpret(out: Path) -> None:
    from cascade_rcnn.models.ops.bias_relu_triton import bias_relu_

    torch.save([bias_relu_(x, bias, relu=relu) for x, bias, _, relu in cases()], out)


def test_the_kernel_adds_and_cuts(tmp_path: Path) -> None:
    for found, (_, _, expected, _) in zip(interpreted_results(__file__, tmp_path), cases(), strict=True):
        assert torch.equal(found.isnan(), expected.isnan())
        half = 2**-7 if found.dtype == torch.bfloat16 else 0.0  # the interpreter cuts bfloat16 instead of rounding
        torch.testing.assert_close(found, expected, rtol=half, atol=0, equal_nan=True)


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_compiles_with_wide_accesses(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", minversion="3.4")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from cascade_rcnn.models.ops.bias_relu_triton import _bias_relu

    names = _bias_relu.arg_names
    constants = {"RELU": True, "ROWS": 16, "COLUMNS": 256}
    types = {"x": "*bf16", "bias": "*fp32"}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in ("x", "bias", "channels")}
    source = ASTSource(_bias_relu, signature, {(names.index(key),): value for key, value in constants.items()}, aligned)
    assembly = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4}).asm["ptx"]
    assert "ld.global.v4" in assembly and "st.global.v4" in assembly


@pytest.mark.parametrize("name", ["resnet10t", "resnet26t", "resnext50_32x4d", "vgg11", "convnext_atto"])
def test_a_network_gives_the_same_with_fused_biases(name: str) -> None:
    """resnet26t has bottlenecks, a stem of three convolutions and shortcuts that end with a norm."""
    images = torch.randn(1, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    backbone = Backbone(name).eval().to(memory_format=torch.channels_last).requires_grad_(False)
    seed_weights(backbone)
    backbone.fold_batch_norm()
    with torch.inference_mode():
        before = backbone(images)
        fused = fuse_biases(backbone)
        after = backbone(images)
    assert fused
    blocks = any(isinstance(part, BiasReLU) for part in backbone.modules())
    assert blocks == name.startswith("res")
    for one, other in zip(after, before):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_weights_are_cast_once_for_mixed_precision() -> None:
    conv = FusedBiasConv2d.take_over(nn.Conv2d(3, 4, 3).requires_grad_(False))
    x = torch.randn(1, 3, 8, 8)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        first, second = conv(x), conv(x)
        assert conv._weight() is conv._weight()
    assert first.dtype == torch.bfloat16 and torch.equal(first, second)
    with torch.inference_mode():
        assert conv(x).dtype == torch.float32
    torch.testing.assert_close(first.float(), conv(x), rtol=0.05, atol=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernel_on_the_device() -> None:
    from cascade_rcnn.models.ops.bias_relu_triton import bias_relu_

    for x, bias, expected, relu in cases():
        found = bias_relu_(x.cuda(), bias.cuda(), relu=relu)
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0, equal_nan=True)


if __name__ == "__main__":
    interpret(Path(sys.argv[1]))
