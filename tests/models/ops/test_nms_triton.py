"""The NMS kernels: equal to torchvision's operator through Triton's interpreter, compiled for GPUs, on a device."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import nms

from interpreting import interpreted_results

triton = pytest.importorskip("triton")


@dataclass
class Case:
    """What goes into one call; ``runs`` None: scores in any order."""

    name: str
    boxes: Tensor
    scores: Tensor
    groups: Tensor
    valid: Tensor
    iou: float = 0.5
    runs: tuple[int, ...] | None = None
    max_keep: int = 10**6


def crowded(batch: int, count: int, *, seed: int, whole: bool = False) -> tuple[Tensor, Tensor]:
    """Boxes that overlap much; ``whole`` pixels, which hit an IoU of exactly one half often, and equal scores."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(batch, count, 2, generator=generator) * 60
    side = torch.rand(batch, count, 2, generator=generator) * 30 + 1
    scores = torch.randn(batch, count, generator=generator)
    if whole:
        corner, side, scores = (corner / 10).floor(), (side / 6).floor() + 1, (scores * 2).round()
    return torch.cat((corner, corner + side), dim=2), scores


def in_runs(case: Case, lengths: tuple[int, ...]) -> Case:
    """The same boxes as runs: each run is a group, in falling order of score."""
    group = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).expand_as(case.scores)
    order = case.scores.sort(dim=1, descending=True, stable=True).indices
    order = order.gather(1, group.gather(1, order).sort(dim=1, stable=True).indices)
    boxes = case.boxes.gather(1, order[..., None].expand(-1, -1, 4))
    return Case(
        case.name,
        boxes,
        case.scores.gather(1, order),
        group.contiguous(),
        case.valid.gather(1, order),
        case.iou,
        lengths,
    )


def cases(*, more: int = 1) -> list[Case]:
    """``more`` multiplies the sizes (for a real device)."""
    found = []
    for seed, (count, iou) in enumerate([(1, 0.5), (63, 0.3), (65, 0.7), (150, 0.5), (200, 0.55)]):
        generator = torch.Generator().manual_seed(seed)
        for whole in (False, True):
            boxes, scores = crowded(2, count * more, seed=seed, whole=whole)
            groups = torch.randint(0, 3, scores.shape, generator=generator)
            valid = torch.rand(scores.shape, generator=generator) < 0.85
            name = f"{count}{' whole' * whole}"
            found.append(Case(name, boxes, scores, groups, valid, iou))
    big = found[-2]
    boxes, scores, groups, valid = big.boxes, big.scores, big.groups, big.valid
    count = scores.shape[1]
    lengths = (count // 2, 3, 0, count // 4 + 1)
    lengths = (*lengths, count - sum(lengths))
    found += [
        Case("equal scores", boxes, torch.zeros_like(scores), groups, valid),
        Case("all the same box", torch.ones_like(boxes).cumsum(2), scores, groups, torch.ones_like(valid)),
        Case("nothing valid", boxes, scores, groups, torch.zeros_like(valid)),
        Case("one valid", boxes, scores, groups, torch.zeros_like(valid).index_fill(1, torch.tensor([70]), True)),
        Case(
            "valid first",
            boxes,
            scores.sort(dim=1, descending=True).values,
            groups,
            torch.arange(count).expand_as(valid) < 100,
            0.5,
            (count,),
        ),
        Case("empty boxes", boxes * torch.tensor([1.0, 1, 0, 0]), scores, groups, valid),
        Case("no boxes", boxes[:, :0], scores[:, :0], groups[:, :0], valid[:, :0]),
        Case("no images", boxes[:0], scores[:0], groups[:0], valid[:0]),
        Case("far", boxes + 16000, scores, groups, valid),
        in_runs(big, lengths),
        in_runs(found[-1], lengths),
        in_runs(big, (count // 8,) * 7 + (count - count // 8 * 7,)),
    ]
    return found


def expected_of(case: Case) -> Tensor:
    """torchvision's operator, image by image and group by group."""
    keep = torch.zeros_like(case.valid)
    for b in range(len(keep)):
        for group in case.groups[b].unique():
            rows = (case.valid[b] & (case.groups[b] == group)).nonzero().squeeze(1)
            keep[b, rows[nms(case.boxes[b][rows], case.scores[b][rows], case.iou)]] = True
    return keep


def run_case(case: Case, device: str = "cpu") -> Tensor:
    from cascade_rcnn.models.ops.nms_triton import nms_mask

    tensors = [value.to(device) for value in (case.boxes, case.scores, case.groups, case.valid)]
    return nms_mask(*tensors, case.iou, runs=case.runs, max_keep=case.max_keep)


def ends_early() -> Case:
    """Four blocks of boxes in order, of which the fifth one that stays lies in the first."""
    boxes, scores = crowded(1, 256, seed=9)
    everything = torch.ones(1, 256, dtype=torch.bool)
    return Case(
        "ends early", boxes, scores.sort(dim=1, descending=True).values, everything.long(), everything, 0.5, (256,), 5
    )


def interpret(out: Path) -> None:
    """Run by a process of its own: Triton decides to interpret when it is imported."""
    from cascade_rcnn.models.ops.nms_triton import nms_of_runs

    case = in_runs(cases()[4], (40, 25))
    arguments = (case.boxes, case.groups, case.valid, [40, 25], 0.5, 100)
    torch.library.opcheck(nms_of_runs, arguments, test_utils=("test_schema", "test_faketensor"))
    torch.save([run_case(case) for case in [*cases(), ends_early()]], out)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> list[Tensor]:
    return interpreted_results(__file__, tmp_path_factory.mktemp("triton"))  # type: ignore[no-any-return]


@pytest.mark.parametrize("number", range(len(cases())), ids=[case.name for case in cases()])
def test_kernels_keep_what_torchvision_keeps(interpreted: list[Tensor], number: int) -> None:
    case = cases()[number]
    expected = expected_of(case)
    assert interpreted[number].dtype == torch.bool
    assert torch.equal(interpreted[number], expected)


def test_the_cases_decide_something() -> None:
    kept = [(int(expected_of(case).sum()), int(case.valid.sum())) for case in cases()]
    assert sum(stay < valid for stay, valid in kept) > 12 and max(stay for stay, _ in kept) > 100


def test_a_run_ends_once_enough_stay(interpreted: list[Tensor]) -> None:
    case = ends_early()
    expected = expected_of(case)
    assert expected[0, :64].sum() >= 5 and expected[0, 64:].any()
    assert torch.equal(interpreted[-1][0, :64], expected[0, :64]) and not interpreted[-1][0, 64:].any()


@pytest.mark.parametrize("iou", [0.3, 0.5, 0.55, 0.6, 0.7, 0.8, 1 / 3])
def test_the_limit_in_float32_decides_as_in_double_precision(iou: float) -> None:
    from cascade_rcnn.models.ops.nms_triton import _limit

    limit = torch.tensor(_limit(iou))
    assert limit.item() == _limit(iou) <= iou < limit.nextafter(torch.tensor(1.0)).item()


def test_too_many_runs_are_refused() -> None:
    from cascade_rcnn.models.ops.nms_triton import nms_of_runs

    boxes, valid = torch.zeros(1, 9, 4), torch.ones(1, 9, dtype=torch.bool)
    for lengths in ([1] * 9, [4, 4]):
        with pytest.raises(ValueError, match="runs of"):
            nms_of_runs(boxes, valid.long(), valid, lengths, 0.5, 9)


@pytest.mark.parametrize("kernel", ["_compare", "_walk"])
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus(
    kernel: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Needs no device: Triton brings its assembler. Multiply and add must stay two roundings in the machine code."""
    pytest.importorskip("triton", minversion="3.4")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from cascade_rcnn.models.ops import nms_triton

    function: Any = getattr(nms_triton, kernel)
    names = function.arg_names
    constants = {
        name: value for name, value in {"RUNS": 5, "BLOCK": 64, "WIDTH": 32, "UNROLL": 32}.items() if name in names
    }
    types = {"boxes": "*fp32", "groups": "*i64", "valid": "*u8", "words": "*i64", "keep": "*u8", "limit": "fp32"}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(function, signature, {(names.index(key),): value for key, value in constants.items()}, aligned)
    warps = {"_compare": 4, "_walk": 1}[kernel]
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "enable_fp_fusion": False}
    )
    assert "ld.global" in compiled.asm["ptx"] and "st.global" in compiled.asm["ptx"]
    if kernel == "_compare":
        assert re.search(r"\bdiv\.rn\.f32", compiled.asm["ptx"])
        assert not re.search(r"\bfma\.\S*f32", compiled.asm["ptx"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("number", range(len(cases())), ids=[case.name for case in cases()])
def test_on_the_device_without_a_wait(number: int) -> None:
    case = cases(more=20)[number]
    expected = expected_of(case)
    run_case(case, "cuda")  # compiles
    tensors = [value.cuda() for value in (case.boxes, case.scores, case.groups, case.valid)]
    from cascade_rcnn.models.ops.nms_triton import nms_mask

    torch.cuda.set_sync_debug_mode("error")
    try:
        keep = nms_mask(*tensors, case.iou, runs=case.runs, max_keep=case.max_keep)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(keep.cpu(), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sixteen_images_of_nine_thousand_boxes_need_little_memory() -> None:
    boxes, scores = crowded(16, 9000, seed=0)
    lengths = (2000,) * 4 + (1000,)
    case = in_runs(Case("many", boxes * 4, scores, scores.long(), torch.ones_like(scores, dtype=torch.bool)), lengths)
    tensors = [value.cuda() for value in (case.boxes, case.scores, case.groups, case.valid)]
    from cascade_rcnn.models.ops.nms_triton import nms_mask

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    keep = nms_mask(*tensors, case.iou, runs=lengths, max_keep=9000)
    assert torch.cuda.max_memory_allocated() - before < 64e6
    assert torch.equal(keep.cpu(), expected_of(case))


if __name__ == "__main__":
    interpret(Path(sys.argv[1]))
