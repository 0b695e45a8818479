"""RoIAlign over all levels of a pyramid in one Triton kernel, forward and backward; imported only when a GPU asks.

R = B * N boxes, S bins per side, C channels. One program computes one bin of one box for a block of channels: it picks
the level, counts the samples and adds up the pixels that they touch, each a contiguous vector in channels-last memory.
A bilinear mean is separable, so a pixel's weight is the product of a row and a column weight, and each of the
(samples + 1)^2 pixels is touched once instead of the 4 x samples^2 of the usual loop.

Nothing here waits for the device and every shape is static: it can be captured in a CUDA graph. The gradient is summed
in float32 with atomic additions, whose order varies: runs differ in the last bits. ``roi_align.py`` takes the plain
path instead when ``torch.use_deterministic_algorithms`` is on.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: N803, SIM102 - constants of a kernel are written in capitals; compile-time and run-time conditions nest

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cascade_rcnn.models.ops.roi_sampling import Frame, Sampling

MAX_LEVELS = 5
# One code for all sizes of images: Triton would otherwise make one for each pattern of sides that 16 divides.
_SIDES = [f"{side}{level}" for side in ("height", "width") for level in range(MAX_LEVELS)]
_BLOCK = 256  # channels of a program: 16 bytes of bfloat16 per lane of one warp


@triton.jit
def _weight(pixel, start, offset, side, samples, limit):
    """Sum over one axis' samples of their bilinear weight at ``pixel``; torchvision's rule at the border."""
    total = 0.0
    for sample in range(samples):
        position = start + offset + (sample + 0.5) * side / samples
        inside = (position >= -1.0) & (position <= limit)
        position = tl.minimum(tl.maximum(position, 0.0), limit - 1.0)
        total += tl.where(inside, tl.maximum(1.0 - tl.abs(position - pixel), 0.0), 0.0)
    return total


@triton.jit
def _span(start, offset, side, samples, limit):
    """First pixel that an axis' samples touch and the one after the last."""
    first = start + offset + 0.5 * side / samples
    last = start + offset + (samples - 0.5) * side / samples
    low = tl.floor(tl.minimum(tl.maximum(first, 0.0), limit - 1.0)).to(tl.int32)
    high = tl.floor(tl.minimum(tl.maximum(last, 0.0), limit - 1.0)).to(tl.int32) + 2
    return low, tl.minimum(high, limit)


@triton.jit
def _axis(begin, end, scale, SIZE: tl.constexpr, RATIO: tl.constexpr, ALIGNED: tl.constexpr):
    """Start, side of a bin and samples per bin of a box along one axis, in pixels of its level."""
    shift = 0.5 if ALIGNED else 0.0
    start = begin * scale - shift
    extent = end * scale - shift - start
    extent = tl.where(extent > (0.0 if ALIGNED else 1.0), extent, 0.0 if ALIGNED else 1.0)
    # Exact division: an approximate 2.0000002 would be rounded up to three samples.
    side = tl.div_rn(extent, extent * 0.0 + SIZE)
    if RATIO > 0:
        samples = (side * 0.0).to(tl.int32) + RATIO
    else:
        samples = tl.minimum(tl.ceil(side), 4096.0).to(tl.int32)
    return start, side, samples


@triton.jit(do_not_specialize=[*_SIDES, "count"])
def _roi_align(
    map0,
    map1,
    map2,
    map3,
    map4,
    height0,
    height1,
    height2,
    height3,
    height4,
    width0,
    width1,
    width2,
    width3,
    width4,
    scale0,
    scale1,
    scale2,
    scale3,
    scale4,
    boxes,
    valid,
    rows,
    count,
    channels,
    LEVELS: tl.constexpr,
    SIZE: tl.constexpr,
    RATIO: tl.constexpr,
    ALIGNED: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    HAS_VALID: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Forward: maps -> rows ``[R, S * S, C]``. Backward: rows hold the gradient, the maps (float32) receive theirs."""
    bin_ = tl.program_id(0)
    box = bin_ // (SIZE * SIZE)
    down = (bin_ // SIZE) % SIZE
    across = bin_ % SIZE
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = channel < channels
    x1, y1 = tl.load(boxes + box * 4), tl.load(boxes + box * 4 + 1)
    x2, y2 = tl.load(boxes + box * 4 + 2), tl.load(boxes + box * 4 + 3)

    # floor(log2(sqrt(area) / 56 + 1e-6)) by comparison, which needs no logarithm exact to the last bit.
    area = tl.maximum(x2 - x1, 0.0) * tl.maximum(y2 - y1, 0.0)
    reach = tl.div_rn(tl.sqrt_rn(area), area * 0.0 + 56.0) + 1e-6
    if PLUS_ONE:
        x2 -= 1.0
        y2 -= 1.0
    maps, height, width, scale = map0, height0, width0, scale0
    if LEVELS > 1:
        if reach >= 2.0:
            maps, height, width, scale = map1, height1, width1, scale1
    if LEVELS > 2:
        if reach >= 4.0:
            maps, height, width, scale = map2, height2, width2, scale2
    if LEVELS > 3:
        if reach >= 8.0:
            maps, height, width, scale = map3, height3, width3, scale3
    if LEVELS > 4:
        if reach >= 16.0:
            maps, height, width, scale = map4, height4, width4, scale4

    top, bin_height, samples_y = _axis(y1, y2, scale, SIZE, RATIO, ALIGNED)
    left, bin_width, samples_x = _axis(x1, x2, scale, SIZE, RATIO, ALIGNED)
    wanted = (samples_y > 0) & (samples_x > 0) & (tl.abs(x1) + tl.abs(y1) + tl.abs(x2) + tl.abs(y2) < 1e30)
    if HAS_VALID:
        wanted = wanted & (tl.load(valid + box) != 0)
    place = rows + bin_.to(tl.int64) * channels + channel
    total = tl.full((BLOCK,), 0.0, tl.float32)
    if BACKWARD:
        total = tl.load(place, mask=within, other=0.0).to(tl.float32)
    if wanted:
        image = (box // count).to(tl.int64) * height * width
        first_row, end_row = _span(top, down * bin_height, bin_height, samples_y, height)
        first_column, end_column = _span(left, across * bin_width, bin_width, samples_x, width)
        for row in range(first_row, end_row):
            by_row = _weight(row, top, down * bin_height, bin_height, samples_y, height) / (samples_y * samples_x)
            for column in range(first_column, end_column):
                weight = by_row * _weight(column, left, across * bin_width, bin_width, samples_x, width)
                pixel = maps + (image + row * width + column) * channels + channel
                if BACKWARD:
                    tl.atomic_add(pixel, total * weight, mask=within, sem="relaxed")
                else:
                    total += weight * tl.load(pixel, mask=within, other=0.0).to(tl.float32)
    if not BACKWARD:
        tl.store(place, total.to(rows.dtype.element_ty), mask=within)


def _launch(
    maps: Sequence[Tensor], boxes: Tensor, valid: Tensor | None, rows: Tensor, sampling: Sampling, *, backward: bool
) -> None:
    """``maps`` are L contiguous ``[B, H_l, W_l, C]``, ``rows`` is contiguous ``[B, N, S * S, C]``."""
    levels, channels, size = len(maps), maps[0].shape[3], sampling.size
    if levels > MAX_LEVELS:
        raise ValueError(f"{levels} feature levels; the kernel takes at most {MAX_LEVELS}")
    if rows.numel() == 0:
        return
    pad = [0] * (MAX_LEVELS - levels)
    padded = [*maps, *(maps[0] for _ in pad)]
    heights, widths = [m.shape[1] for m in padded], [m.shape[2] for m in padded]
    scales = [1.0 / stride for stride in sampling.strides] + [1.0 for _ in pad]
    boxes = boxes.contiguous()
    flags = boxes if valid is None else valid.contiguous().view(torch.uint8)
    block = min(_BLOCK, triton.next_power_of_2(channels))
    grid = (boxes.shape[0] * boxes.shape[1] * size * size, triton.cdiv(channels, block))
    with torch.cuda.device_of(boxes):  # kernels run on the current device
        _roi_align[grid](
            *padded,
            *heights,
            *widths,
            *scales,
            boxes,
            flags,
            rows,
            boxes.shape[1],
            channels,
            LEVELS=levels,
            SIZE=size,
            RATIO=max(sampling.ratio, 0),
            ALIGNED=sampling.frame is Frame.ALIGNED,
            PLUS_ONE=sampling.frame is Frame.PLUS_ONE,
            HAS_VALID=valid is not None,
            BACKWARD=backward,
            BLOCK=block,
            num_warps=1 if block <= 256 and rows.element_size() == 2 else 2,
        )


def fused_forward(features: Sequence[Tensor], boxes: Tensor, valid: Tensor | None, sampling: Sampling) -> Tensor:
    """``[B, N, S * S, C]`` of the features' type; arguments as ``roi_align.roi_align_rows``."""
    maps = [feature.permute(0, 2, 3, 1).contiguous() for feature in features]  # no copy where channels-last
    rows = maps[0].new_empty(*boxes.shape[:2], sampling.size**2, maps[0].shape[3])
    _launch(maps, boxes, valid, rows, sampling, backward=False)
    return rows


def fused_backward(
    gradient: Tensor, boxes: Tensor, valid: Tensor | None, shapes: Sequence[Sequence[int]], sampling: Sampling
) -> list[Tensor]:
    """Gradients of the features, of the type of ``gradient [B, N, S * S, C]``, summed in float32."""
    maps = [torch.zeros(b, h, w, c, dtype=torch.float32, device=gradient.device) for b, c, h, w in shapes]
    _launch(maps, boxes, valid, gradient.contiguous(), sampling, backward=True)
    return [m.to(gradient.dtype).permute(0, 3, 1, 2) for m in maps]
