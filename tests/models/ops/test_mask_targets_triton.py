"""The kernel of mask targets: its numbers through Triton's interpreter, its compilation for GPUs, and on a device."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.ops import roi_align

from cascade_rcnn.models.mask_head import mask_targets
from cascade_rcnn.structures import MaskCrops
from interpreting import interpreted_results
from mask_shapes import blobs, crops_of, rois_around

triton = pytest.importorskip("triton")

HEIGHT, WIDTH, BINS = 64, 96, 28


def inputs(rois_per_image: int) -> tuple[Tensor, MaskCrops, Tensor, Tensor, Tensor]:
    """Whole masks [B, G, H, W]; crops, RoIs, their objects and the sizes of two images. Object 3 has no mask."""
    torch.manual_seed(0)
    masks = torch.stack([blobs(4, HEIGHT, WIDTH), blobs(4, HEIGHT, WIDTH).flip(-1)])
    first, second = (crops_of(one) for one in masks)
    crops = MaskCrops(
        torch.cat([first.pixels, second.pixels]),
        torch.cat([first.offsets, second.offsets + len(first.pixels)]),
        *(torch.cat([getattr(first, name), getattr(second, name)]) for name in ("origins", "sizes")),
        max_size=(HEIGHT, WIDTH),
    )
    crops.sizes[:, 3] = 0
    masks[:, 3] = False
    rois = torch.stack([rois_around(rois_per_image, HEIGHT, WIDTH) for _ in range(2)])
    rois[0, 0] = torch.tensor([0.0, 0, WIDTH, HEIGHT])
    rois[1, 0] = 0.0  # padding
    rois[1, 1, 2:] += 300  # far over the border
    index = torch.randint(0, 4, (2, rois_per_image))
    return masks, crops, rois, index, torch.tensor([[HEIGHT, WIDTH], [HEIGHT - 3, WIDTH]])


def interpret(out: Path) -> None:
    """Run by a process of its own: Triton decides to interpret when it is imported."""
    from cascade_rcnn.models.ops.mask_targets_triton import _operator, fused_mask_targets

    _, crops, rois, index, sizes = inputs(12)
    tensors = (crops.pixels, crops.offsets, crops.origins, crops.sizes, rois[:, :1], index[:, :1], sizes, BINS)
    torch.library.opcheck(_operator, tensors, test_utils=("test_schema", "test_faketensor"))
    results = [fused_mask_targets(crops, rois, index, sizes, bins=BINS)]
    results.append(fused_mask_targets(crops, rois[:, :0], index[:, :0], sizes, bins=BINS))
    empty = replace(crops, pixels=crops.pixels[:0], sizes=crops.sizes * 0)
    results.append(fused_mask_targets(empty, rois[:, :2], index[:, :2], sizes, bins=BINS))
    nan = rois[:, :1] * float("nan")
    results.append(fused_mask_targets(crops, nan, index[:, :1], sizes, bins=BINS))
    torch.save(results, out)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> list[Tensor]:
    return interpreted_results(__file__, tmp_path_factory.mktemp("triton"))  # type: ignore[no-any-return]


def check(found: Tensor, count: int) -> None:
    """Against the plain way everywhere but where rounding decides, and against torchvision on the whole masks."""
    masks, crops, rois, index, sizes = inputs(count)
    expected = mask_targets(crops, rois, index, sizes)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found != expected).float().mean() < 2e-3 and 0.02 < expected.mean() < 0.98
    whole = torch.stack([masks[0, g] for g in index[0]]).float()  # the second image is lower than its padding
    pooled = roi_align(whole[:, None], list(rois[0][:, None]), BINS, 1.0, 0, True)[:, 0]
    clear = (pooled - 0.5).abs() > 1e-4
    assert clear.float().mean() > 0.95
    assert torch.equal(found[0][clear], (pooled >= 0.5).float()[clear])


def test_kernel_equals_the_plain_way_and_roi_align(interpreted: list[Tensor]) -> None:
    check(interpreted[0], 12)


def test_nothing_to_learn_is_zero(interpreted: list[Tensor]) -> None:
    assert interpreted[1].shape == (2, 0, BINS, BINS)
    assert not interpreted[2].any() and not interpreted[3].any()
    objects = inputs(12)[3]
    assert (objects == 3).any() and not interpreted[0][objects == 3].any()


@pytest.mark.parametrize("capability", [80, 90])
def test_kernel_compiles_for_gpus(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Needs no device: Triton brings its assembler."""
    pytest.importorskip("triton", minversion="3.4")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from cascade_rcnn.models.ops.mask_targets_triton import _mask_targets

    names = _mask_targets.arg_names
    constants = {"BINS": 28, "LANES": 32}
    types = {"pixels": "*u8", "rois": "*fp32", "targets": "*fp32", "count": "i32", "objects": "i32"}
    signature = {name: "constexpr" if name in constants else types.get(name, "*i64") for name in names}
    source = ASTSource(_mask_targets, signature, {(names.index(key),): value for key, value in constants.items()}, {})
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4, "enable_fp_fusion": False}
    )
    assert "st.global" in compiled.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_device_without_a_wait() -> None:
    _, crops, rois, index, sizes = inputs(500)
    arguments = (crops.to("cuda"), rois.cuda(), index.cuda(), sizes.cuda())
    mask_targets(*arguments)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = mask_targets(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check(found.cpu(), 500)


if __name__ == "__main__":
    interpret(Path(sys.argv[1]))
