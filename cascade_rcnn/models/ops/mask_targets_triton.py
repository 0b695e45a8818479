"""Targets of the mask head in one Triton kernel; imported only when a GPU asks.

B images, G objects and P RoIs per image, m bins per side (28). The plain way weighs whole crops, as large as the
batch's largest object: on a GPU thousands of launches per step. Here one program computes one RoI, all bins side by
side: it takes the bilinear samples that RoIAlign takes, straight from the crop of the RoI's own object, as many as the
RoI's size asks for. Nothing waits for the device and every shape is static.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: N803 - constants of a kernel are written in capitals

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cascade_rcnn.structures import MaskCrops


@triton.jit
def _axis(begin, end, BINS: tl.constexpr):
    """Start, side of a bin and samples per bin along one axis, in pixels whose centres are whole numbers."""
    start = begin - 0.5
    side = tl.div_rn(end - 0.5 - start, begin * 0.0 + BINS)
    samples = tl.minimum(tl.maximum(tl.ceil(side), 1.0), 4096.0)
    return start, side, samples


@triton.jit
def _place(position, limit):
    """Pixel below a sample, share of the pixel above it, 1 if it counts else 0: torchvision's rule at the border."""
    counts = tl.where((position >= -1.0) & (position <= limit), 1.0, 0.0)
    position = tl.minimum(tl.maximum(position, 0.0), limit - 1.0)
    low = tl.floor(position)
    return low.to(tl.int32), position - low, counts


@triton.jit
def _pixel(pixels, row, column, height, width):
    """The mask's value; nothing outside the crop."""
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return tl.load(pixels + row.to(tl.int64) * width + column, mask=inside, other=0).to(tl.float32)


@triton.jit(do_not_specialize=["count", "objects"])
def _mask_targets(
    pixels,
    offsets,
    origins,
    extents,
    rois,
    index,
    images,
    targets,
    count,
    objects,
    BINS: tl.constexpr,
    LANES: tl.constexpr,
):
    roi = tl.program_id(0)
    image = roi // count
    entry = image * objects + tl.load(index + roi).to(tl.int32)
    top, left = tl.load(origins + entry * 2).to(tl.int32), tl.load(origins + entry * 2 + 1).to(tl.int32)
    height, width = tl.load(extents + entry * 2).to(tl.int32), tl.load(extents + entry * 2 + 1).to(tl.int32)
    bottom, right = tl.load(images + image * 2).to(tl.float32), tl.load(images + image * 2 + 1).to(tl.float32)
    x1, y1 = tl.load(rois + roi * 4), tl.load(rois + roi * 4 + 1)
    x2, y2 = tl.load(rois + roi * 4 + 2), tl.load(rois + roi * 4 + 3)
    down, across = tl.arange(0, LANES)[:, None], tl.arange(0, LANES)[None, :]
    total = tl.zeros((LANES, LANES), tl.float32)
    crop = pixels + tl.load(offsets + entry)
    if (height > 0) & (tl.abs(x1) + tl.abs(y1) + tl.abs(x2) + tl.abs(y2) < 1e30):
        start_y, side_y, many_y = _axis(y1, y2, BINS)
        start_x, side_x, many_x = _axis(x1, x2, BINS)
        apart_y, apart_x = tl.div_rn(side_y, many_y), tl.div_rn(side_x, many_x)
        for sample_y in range(many_y.to(tl.int32)):
            row, share_y, counts_y = _place(start_y + down * side_y + (sample_y + 0.5) * apart_y, bottom)
            row -= top
            for sample_x in range(many_x.to(tl.int32)):
                column, share_x, counts_x = _place(start_x + across * side_x + (sample_x + 0.5) * apart_x, right)
                column -= left
                above = (1.0 - share_x) * _pixel(crop, row, column, height, width) + share_x * _pixel(
                    crop, row, column + 1, height, width
                )
                below = (1.0 - share_x) * _pixel(crop, row + 1, column, height, width) + share_x * _pixel(
                    crop, row + 1, column + 1, height, width
                )
                total += ((1.0 - share_y) * above + share_y * below) * (counts_y * counts_x)
        total = total / (many_y * many_x)
    place = (roi.to(tl.int64) * BINS + down) * BINS + across
    tl.store(targets + place, (total >= 0.5).to(tl.float32), mask=(down < BINS) & (across < BINS))


def _launch(
    pixels: Tensor,
    offsets: Tensor,
    origins: Tensor,
    extents: Tensor,
    rois: Tensor,
    index: Tensor,
    sizes: Tensor,
    bins: int,
) -> Tensor:
    batch, count = index.shape
    targets = torch.empty(batch, count, bins, bins, device=rois.device)
    if targets.numel() == 0:
        return targets
    tensors = (pixels, offsets, origins, extents, rois.float(), index, sizes)
    with torch.cuda.device_of(rois):  # kernels run on the current device
        _mask_targets[(batch * count,)](
            *(tensor.contiguous() for tensor in tensors),
            targets,
            count,
            offsets.shape[1],
            BINS=bins,
            LANES=triton.next_power_of_2(bins),
            num_warps=4,
            enable_fp_fusion=False,
        )
    return targets


@torch.library.custom_op("cascade_rcnn::mask_targets", mutates_args=())
def _operator(
    pixels: Tensor,
    offsets: Tensor,
    origins: Tensor,
    extents: Tensor,
    rois: Tensor,
    index: Tensor,
    sizes: Tensor,
    bins: int,
) -> Tensor:
    return _launch(pixels, offsets, origins, extents, rois, index, sizes, bins)


@_operator.register_fake
def _shape(
    pixels: Tensor,
    offsets: Tensor,
    origins: Tensor,
    extents: Tensor,
    rois: Tensor,
    index: Tensor,
    sizes: Tensor,
    bins: int,
) -> Tensor:
    return rois.new_empty(*index.shape, bins, bins, dtype=torch.float32)


def fused_mask_targets(masks: MaskCrops, rois: Tensor, index: Tensor, sizes: Tensor, *, bins: int) -> Tensor:
    """Arguments and result as of :func:`cascade_rcnn.models.mask_head.mask_targets`."""
    targets: Tensor = _operator(masks.pixels, masks.offsets, masks.origins, masks.sizes, rois, index, sizes, bins)
    return targets
