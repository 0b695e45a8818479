"""The fused kernel: its numbers through Triton's interpreter, its compilation for GPUs, and on a real device."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cascade_rcnn.models.ops.roi_align import _plain_backward, _plain_forward, roi_align_rows
from cascade_rcnn.models.ops.roi_sampling import Frame, Sampling
from interpreting import interpreted_results

triton = pytest.importorskip("triton")

STRIDES = (4, 16, 32)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CASES = [
    ("float32", Sampling(2, STRIDES)),
    ("bfloat16", Sampling(2, STRIDES)),
    ("float32", Sampling(2, STRIDES, 2)),
    ("float32", Sampling(2, STRIDES, 0, Frame.UNALIGNED)),
    ("float32", Sampling(2, STRIDES, 2, Frame.PLUS_ONE)),
]


def inputs(dtype: str, *, channels: int = 6) -> tuple[list[Tensor], Tensor, Tensor]:
    """Two images with boxes of all three levels; some over the border, outside, empty, not finite, or padding."""
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(2, channels, 64 // s, 96 // s, generator=generator).to(DTYPES[dtype]) for s in STRIDES]
    nan = float("nan")
    boxes = torch.tensor(
        [
            [[3.3, 5.1, 20.7, 17.9], [-9, -7, 9, 13], [80, 50, 100, 70], [-20, -10, 96, 104], [20, 20, 20, 40]],
            [[-90, -90, -70, -70], [nan, 0, 9, 9], [60, 10, 61, 12], [8, 8, 26, 26], [-120, -120, 106, 106]],
        ]
    )
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[1, 3] = False
    return features, boxes, valid


def gradient_for(rows: Tensor) -> Tensor:
    return torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)).to(rows.dtype)


def interpret(out: Path) -> None:
    """Run by a process of its own: Triton decides to interpret when it is imported."""
    from cascade_rcnn.models.ops.roi_align_triton import fused_backward, fused_forward

    results = []
    for dtype, sampling in CASES:
        features, boxes, valid = inputs(dtype)
        rows = fused_forward(features, boxes, valid, sampling)
        shapes = [feature.shape for feature in features]
        results.append((rows, fused_backward(gradient_for(rows), boxes, valid, shapes, sampling)))
    features, boxes, _ = inputs("float32")
    results.append((fused_forward(features, boxes, None, Sampling(2, STRIDES)), []))
    results.append((fused_forward(features, boxes[:, :0], None, Sampling(2, STRIDES)), []))
    torch.save(results, out)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Tensor, list[Tensor]]]:
    return interpreted_results(__file__, tmp_path_factory.mktemp("triton"))  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{d}-ratio{s.ratio}-{s.frame.name}" for d, s in CASES])
def test_kernel_equals_the_plain_path_forward_and_backward(
    interpreted: list[tuple[Tensor, list[Tensor]]], case: int
) -> None:
    dtype, sampling = CASES[case]
    features, boxes, valid = inputs(dtype)
    rows, gradients = interpreted[case]
    assert rows.any()
    tolerance = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}[dtype]
    expected = _plain_forward(features, boxes, valid, sampling)
    assert rows.dtype == expected.dtype
    torch.testing.assert_close(rows, expected, rtol=tolerance, atol=tolerance)
    shapes = [feature.shape for feature in features]
    for ours, plain in zip(gradients, _plain_backward(gradient_for(rows), boxes, valid, shapes, sampling)):
        assert ours.any()
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)


def test_kernel_without_a_mask_and_without_boxes(interpreted: list[tuple[Tensor, list[Tensor]]]) -> None:
    features, boxes, _ = inputs("float32")
    expected = _plain_forward(features, boxes, None, Sampling(2, STRIDES))
    torch.testing.assert_close(interpreted[-2][0], expected, rtol=1e-5, atol=1e-5)
    assert interpreted[-1][0].shape == (2, 0, 4, 6)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("capability", [80, 90])
def test_kernel_compiles_for_gpus_with_vector_accesses(
    dtype: str, backward: bool, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Needs no device: Triton brings its assembler."""
    pytest.importorskip("triton", minversion="3.4")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from cascade_rcnn.models.ops.roi_align_triton import _roi_align

    constants = {
        "LEVELS": 4,
        "SIZE": 7,
        "RATIO": 0,
        "ALIGNED": True,
        "PLUS_ONE": False,
        "HAS_VALID": True,
        "BACKWARD": backward,
        "BLOCK": 256,
    }
    names = _roi_align.arg_names
    types = {
        "map": "*fp32" if backward else f"*{dtype}",
        "scale": "fp32",
        "boxes": "*fp32",
        "valid": "*u8",
        "rows": f"*{dtype}",
    }
    signature = {name: "constexpr" if name in constants else types.get(name.rstrip("01234"), "i32") for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name == "channels"
    }
    source = ASTSource(_roi_align, signature, {(names.index(key),): value for key, value in constants.items()}, aligned)
    assembly = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 1}).asm["ptx"]
    assert "ld.global.v4" in assembly
    assert ("atom.global.gpu.relaxed.add" in assembly or "red.global" in assembly) == backward


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_the_device_at_full_size(dtype: str) -> None:
    """1,000 boxes over an 800 x 1088 image's pyramid, against the plain path; no synchronisation on the way."""
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(2, 256, 800 // s, 1088 // s, generator=generator) for s in (4, 8, 16, 32)]
    centre = torch.rand(2, 1000, 2, generator=generator) * torch.tensor([1088.0, 800])
    size = torch.exp(torch.rand(2, 1000, 2, generator=generator) * 4 + 2.5)
    boxes = torch.cat((centre - size / 2, centre + size / 2), dim=2).clamp(min=0)
    upstream = torch.randn(2, 1000, 49, 256, generator=generator)
    found = []
    for device in ("cpu", "cuda"):
        maps = [
            f.to(device, DTYPES[dtype]).contiguous(memory_format=torch.channels_last).requires_grad_() for f in features
        ]
        arguments = (boxes.to(device), upstream.to(device, DTYPES[dtype]))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
        rows = roi_align_rows(maps, arguments[0], Sampling(7, (4, 8, 16, 32)))
        rows.backward(arguments[1])
        torch.cuda.set_sync_debug_mode("default")
        found.append([rows.detach().cpu(), *(m.grad.cpu() for m in maps if m.grad is not None)])
    tolerance = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 4e-3}[dtype]
    for ours, plain in zip(*found):
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_deterministic_algorithms_take_the_plain_path_on_the_device() -> None:
    features, boxes, valid = inputs("float32", channels=64)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            maps = [feature.cuda().requires_grad_() for feature in features]
            rows = roi_align_rows(maps, boxes.cuda(), Sampling(7, STRIDES), valid.cuda())
            rows.square().sum().backward()
            runs.append([m.grad for m in maps])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(*pair) for pair in zip(*runs))


if __name__ == "__main__":
    interpret(Path(sys.argv[1]))
