"""Greedy non-maximum suppression whose result has a fixed shape, in two Triton kernels; imported only when a GPU asks.

B images, M boxes each, in runs: the boxes of a run follow each other in falling order of score, and none of another run
can remove them. An RPN's levels are five runs, an image's detections are one.

The usual operator gives the indices of what stays: their number depends on the data, so the host has to wait for it.
Here a mask [B, M] says it. The first kernel compares blocks of 64 x 64 boxes of a run, all at once, and writes a word
of 64 bits for each box and block behind it. The second walks through each run from block to block: 64 words settle what
stays of a block, the words of what stays are removed from the blocks behind. Runs are walked side by side, each only to
its last valid box, so that the time is that of the longest run.

The numbers are those of torchvision's operator on a CPU: IoU in float32, each operation rounded for itself (no fused
multiply-add, exact division), compared with the limit in double precision; of equal scores the earlier box comes first.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: N803 - constants of a kernel are written in capitals

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_RUNS = 8
_BLOCK = 64  # boxes that one word has bits for
_ENDS = [f"end{run}" for run in range(MAX_RUNS)]


@triton.jit
def _bounds(run, end0, end1, end2, end3, end4, end5, end6, end7):
    """First box of a run and the one after its last."""
    start = tl.where(run == 1, end0, 0)
    start = tl.where(run == 2, end1, start)
    start = tl.where(run == 3, end2, start)
    start = tl.where(run == 4, end3, start)
    start = tl.where(run == 5, end4, start)
    start = tl.where(run == 6, end5, start)
    start = tl.where(run == 7, end6, start)
    end = tl.where(run == 0, end0, end7)
    end = tl.where(run == 1, end1, end)
    end = tl.where(run == 2, end2, end)
    end = tl.where(run == 3, end3, end)
    end = tl.where(run == 4, end4, end)
    end = tl.where(run == 5, end5, end)
    end = tl.where(run == 6, end6, end)
    return start, end


@triton.jit(do_not_specialize=[*_ENDS, "count", "width"])
def _compare(
    boxes,
    groups,
    valid,
    words,
    end0,
    end1,
    end2,
    end3,
    end4,
    end5,
    end6,
    end7,
    count,
    width,
    limit,
    RUNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Bit c of ``words[image, row, d]``: ``row`` removes box c of the block that lies d blocks behind its own."""
    row_block = tl.program_id(0)
    column_block = tl.program_id(1)
    start, end = _bounds(tl.program_id(2) % RUNS, end0, end1, end2, end3, end4, end5, end6, end7)
    base = (tl.program_id(2) // RUNS).to(tl.int64) * count
    if (column_block >= row_block) & (start + column_block * BLOCK < end):
        rows = start + row_block * BLOCK + tl.arange(0, BLOCK)
        columns = start + column_block * BLOCK + tl.arange(0, BLOCK)
        row_used = tl.load(valid + base + rows, mask=rows < end, other=0) != 0
        column_used = tl.load(valid + base + columns, mask=columns < end, other=0) != 0
        if (tl.max(row_used.to(tl.int32), 0) > 0) & (tl.max(column_used.to(tl.int32), 0) > 0):
            row = boxes + (base + rows) * 4
            x1, y1 = tl.load(row, mask=row_used, other=0.0), tl.load(row + 1, mask=row_used, other=0.0)
            x2, y2 = tl.load(row + 2, mask=row_used, other=0.0), tl.load(row + 3, mask=row_used, other=0.0)
            column = boxes + (base + columns) * 4
            left, top = tl.load(column, mask=column_used, other=0.0), tl.load(column + 1, mask=column_used, other=0.0)
            right = tl.load(column + 2, mask=column_used, other=0.0)
            bottom = tl.load(column + 3, mask=column_used, other=0.0)
            across = tl.minimum(x2[:, None], right[None, :]) - tl.maximum(x1[:, None], left[None, :])
            down = tl.minimum(y2[:, None], bottom[None, :]) - tl.maximum(y1[:, None], top[None, :])
            shared = tl.maximum(across, 0.0) * tl.maximum(down, 0.0)
            areas = ((x2 - x1) * (y2 - y1))[:, None] + ((right - left) * (bottom - top))[None, :]
            removes = tl.div_rn(shared, areas - shared) > limit
            same = (
                tl.load(groups + base + rows, mask=row_used, other=-1)[:, None]
                == tl.load(groups + base + columns, mask=column_used, other=-2)[None, :]
            )
            removes = removes & same & (rows[:, None] < columns[None, :])
            bits = removes.to(tl.int64) << tl.arange(0, BLOCK).to(tl.int64)[None, :]
            tl.store(words + (base + rows) * width + column_block - row_block, tl.sum(bits, axis=1), mask=row_used)


@triton.jit(do_not_specialize=[*_ENDS, "count", "width", "max_keep"])
def _walk(
    valid,
    words,
    keep,
    end0,
    end1,
    end2,
    end3,
    end4,
    end5,
    end6,
    end7,
    count,
    width,
    max_keep,
    RUNS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Sets ``keep`` for what stays of one run of one image; ends after the block in which ``max_keep`` is reached."""
    start, end = _bounds(tl.program_id(0) % RUNS, end0, end1, end2, end3, end4, end5, end6, end7)
    base = (tl.program_id(0) // RUNS).to(tl.int64) * count
    last = start
    for begin in range(start, end, 1024):
        places = begin + tl.arange(0, 1024)
        used = tl.load(valid + base + places, mask=places < end, other=0)
        last = tl.maximum(last, tl.max(tl.where(used != 0, places + 1, 0), 0))
    blocks = (last - start + BLOCK - 1) // BLOCK
    index = tl.arange(0, WIDTH)
    removed = tl.zeros((WIDTH,), tl.int64)  # one word for each block of the run
    bit = tl.arange(0, BLOCK).to(tl.int64)
    kept = 0
    block = 0
    while (block < blocks) & (kept < max_keep):
        places = start + block * BLOCK + tl.arange(0, BLOCK)
        used = tl.load(valid + base + places, mask=places < end, other=0) != 0
        alive = tl.sum(used.to(tl.int64) << bit, 0) & ~tl.sum(tl.where(index == block, removed, 0), 0)
        block_words = words + (base + start + block * BLOCK) * width
        left = end - start - block * BLOCK
        for row in tl.static_range(BLOCK):
            word = tl.load(block_words + row * width, mask=row < left, other=0)
            alive = alive & ~tl.where(((alive >> row) & 1) != 0, word, 0)
        stays = ((alive >> bit) & 1) != 0
        tl.store(keep + base + places, stays.to(tl.int8), mask=stays)
        kept += tl.sum(stays.to(tl.int32), 0)
        behind = (index > block) & (index < blocks)
        if block + 1 < blocks:
            for first in range(0, BLOCK, UNROLL):
                for step in tl.static_range(UNROLL):
                    wanted = behind & (((alive >> (first + step)) & 1) != 0)
                    place = block_words + (first + step) * width + index - block
                    removed = removed | tl.load(place, mask=wanted, other=0)
        block += 1


def _limit(iou: float) -> float:
    """The largest float32 that is not above ``iou``: an IoU in float32 is above it exactly if it is above ``iou``."""
    nearest = np.float32(iou)
    return float(nearest if float(nearest) <= iou else np.nextafter(nearest, np.float32(-1)))


def _launch(
    boxes: Tensor, groups: Tensor, valid: Tensor, lengths: Sequence[int], limit: float, max_keep: int
) -> Tensor:
    batch, count = valid.shape
    if len(lengths) > MAX_RUNS or sum(lengths) != count:
        raise ValueError(f"{len(lengths)} runs of {sum(lengths)} boxes; at most {MAX_RUNS} that make up {count}")
    keep = torch.zeros(batch, count, dtype=torch.bool, device=boxes.device)
    blocks = max(triton.cdiv(length, _BLOCK) for length in (*lengths, 0))
    if batch == 0 or blocks == 0:
        return keep
    ends = [*itertools.accumulate(lengths), *[count] * (MAX_RUNS - len(lengths))]
    flags = valid.contiguous().view(torch.uint8)
    words = torch.empty(batch, count, blocks, dtype=torch.int64, device=boxes.device)
    runs = len(lengths)
    width = triton.next_power_of_2(blocks)
    with torch.cuda.device_of(boxes):  # kernels run on the current device
        _compare[(blocks, blocks, batch * runs)](
            boxes.contiguous(),
            groups.contiguous(),
            flags,
            words,
            *ends,
            count,
            blocks,
            limit,
            RUNS=runs,
            BLOCK=_BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )
        _walk[(batch * runs,)](
            flags,
            words,
            keep.view(torch.uint8),
            *ends,
            count,
            blocks,
            max_keep,
            RUNS=runs,
            BLOCK=_BLOCK,
            WIDTH=width,
            UNROLL=32,
            num_warps=min(max(width // 32, 1), 4),
        )
    return keep


@torch.library.custom_op("cascade_rcnn::nms_of_runs", mutates_args=())
def nms_of_runs(
    boxes: Tensor, groups: Tensor, valid: Tensor, lengths: Sequence[int], limit: float, max_keep: int
) -> Tensor:
    """Which boxes stay, bool [B, M]: greedy NMS of each run, in the order in which its boxes come.

    ``boxes`` float32 [B, M, 4]; ``groups`` integers [B, M], other groups do not remove each other; ``valid`` bool
    [B, M]; ``lengths`` of the runs, together M; ``limit`` float32, IoU above it removes. ``max_keep``: a run may end
    when so many stay (the next ones are then left out).
    """
    return _launch(boxes, groups, valid, lengths, limit, max_keep)


@nms_of_runs.register_fake
def _same_shape(boxes: Tensor, groups: Tensor, valid: Tensor, *_: object) -> Tensor:
    return torch.empty_like(valid)


def nms_mask(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    valid: Tensor,
    iou: float,
    *,
    runs: Sequence[int] | None,
    max_keep: int,
) -> Tensor:
    """As :func:`cascade_rcnn.models.postprocess.nms_keep`, on a GPU and without a wait for it."""
    limit = _limit(iou)
    if runs is not None:
        keep: Tensor = nms_of_runs(boxes.float(), groups, valid, list(runs), limit, max_keep)
        return keep
    order = scores.masked_fill(~valid, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    sorted_boxes = boxes.float().gather(1, order[..., None].expand(-1, -1, 4))
    keep = nms_of_runs(sorted_boxes, groups.gather(1, order), valid.gather(1, order), [order.shape[1]], limit, max_keep)
    return torch.zeros_like(keep).scatter(1, order, keep)
