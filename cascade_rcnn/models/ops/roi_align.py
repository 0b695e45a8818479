"""RoIAlign over a feature pyramid: each box is read from the level that fits its size, all levels in one call.

B images, N boxes per image (padded, ``valid`` marks real ones), L levels, C channels, S bins per side, T taps of a bin.
Boxes are xyxy in pixels of the network input. Sources: He et al., arXiv 1703.06870 (RoIAlign); Lin et al.,
arXiv 1612.03144, equation 1 (level by size).

Three ways compute the same numbers:

* **plain** (any device, the default on CPUs): the mean over a bin's bilinear samples is separable, so each bin is a
  weighted sum of T = (samples + 1)^2 pixels, about 13, instead of 4 x samples^2. In channels-last memory each pixel is
  one contiguous vector of C numbers, and ``embedding_bag`` sums such vectors at the speed of the memory. The gradient
  is the same sum with the roles exchanged (for each pixel, the bins that read it): no atomics, bit-equal runs.
* **fused** (CUDA, ``roi_align_triton.py``): one Triton kernel; used unless deterministic algorithms are asked for.
* **portable** (export, devices without either): torchvision's operator on every level, with static shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align as torchvision_roi_align

from cascade_rcnn.models.ops.capabilities import has_triton

CANONICAL_SIDE = 56.0  # a box of twice this side (in pixels) is the smallest that leaves the first level
_MAX_TAPS = 4096  # per bin and side: boxes of 28,000 pixels of a level; keeps a diverged model from eating the memory
_ALIGNED, _WHOLE_PIXELS = 1, 2  # how a box lies on the grid of pixels; 0: not aligned
_CHUNK = 1 << 19  # entries of the index built at a time: 6 MB of index and weights, and results that stay in the cache


def assign_levels(boxes: Tensor, levels: int) -> Tensor:
    """Level 0..levels-1 of each box ``[..., 4]``: floor(log2(sqrt(area) / 56)), clamped; int64 ``[...]``."""
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    side = (width * height).clamp(min=0).sqrt()
    return torch.floor(torch.log2(side / CANONICAL_SIDE + 1e-6)).clamp(0, levels - 1).to(torch.int64)


def roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    *,
    output_size: int,
    strides: Sequence[int],
    valid: Tensor | None = None,
    sampling_ratio: int = 0,
    aligned: bool = True,
    whole_pixels: bool = False,
) -> Tensor:
    """Features of each box, ``[B, N, C, S, S]`` (channels last in memory); zero where ``valid`` is False.

    Arguments as in :func:`roi_align_rows`, which a head should prefer: it needs no copy to be flattened.
    """
    rows = roi_align_rows(
        features,
        boxes,
        output_size=output_size,
        strides=strides,
        valid=valid,
        sampling_ratio=sampling_ratio,
        aligned=aligned,
        whole_pixels=whole_pixels,
    )
    grid = rows.view(*boxes.shape[:2], output_size, output_size, features[0].shape[1])
    return grid.permute(0, 1, 4, 2, 3)  # [B, N, C, S, S]


def roi_align_rows(
    features: Sequence[Tensor],
    boxes: Tensor,
    *,
    output_size: int,
    strides: Sequence[int],
    valid: Tensor | None = None,
    sampling_ratio: int = 0,
    aligned: bool = True,
    whole_pixels: bool = False,
) -> Tensor:
    """Features of each box as contiguous rows ``[B, N, S * S, C]``; zero where not ``valid`` or not finite.

    ``features`` are L maps ``[B, C, H_l, W_l]`` with ``strides`` in pixels (channels-last memory is read as it lies,
    other memory is copied first), ``boxes`` is ``[B, N, 4]`` with x2 >= x1 and y2 >= y1, ``valid`` bool ``[B, N]``.
    ``sampling_ratio`` points per bin and side are averaged; 0 takes ceil(box side / S), measured on the level.
    ``aligned`` shifts the grid by half a pixel. ``whole_pixels`` is Detectron's reading, not aligned either: the level
    follows the box's area, but the grid ends at its last pixel, x2 - 1 and y2 - 1.
    Gradients flow into the features, not into the boxes. ``.flatten(2)`` is a view with the columns ordered
    (bin, channel); :func:`rows_weight` reorders the weight of a layer that expects (channel, bin).
    """
    if len(features) != len(strides):
        raise ValueError(f"{len(features)} feature maps for {len(strides)} strides")
    boxes = boxes.detach().to(torch.float32)
    frame = _WHOLE_PIXELS if whole_pixels else int(aligned)
    if _portable(features[0]):
        return _portable_rows(features, boxes, valid, output_size, strides, sampling_ratio, frame)
    rows: Tensor = _rows(list(features), boxes, valid, output_size, list(strides), sampling_ratio, frame)
    return rows


def rows_weight(weight: Tensor, bins: int) -> Tensor:
    """``[O, C * bins]`` with columns (channel, bin), as checkpoints have it, to columns (bin, channel) of rows."""
    return weight.view(len(weight), -1, bins).transpose(1, 2).flatten(1)


def _portable(feature: Tensor) -> bool:
    """Whether only torchvision's operator will do: it is what exporters know, and what other devices have."""
    if torch._C._get_tracing_state() is not None or torch.compiler.is_exporting():
        return True
    return feature.device.type != "cpu" and not (feature.is_cuda and has_triton())


def _portable_rows(
    features: Sequence[Tensor],
    boxes: Tensor,
    valid: Tensor | None,
    size: int,
    strides: Sequence[int],
    ratio: int,
    frame: int,
) -> Tensor:
    """Every box on every level, emptied where it belongs elsewhere: no samples, no cost, static shapes."""
    batch, count = boxes.shape[:2]
    image = torch.arange(batch, device=boxes.device, dtype=boxes.dtype)[:, None, None].expand(batch, count, 1)
    wanted = boxes.isfinite().all(dim=2)
    if valid is not None:
        wanted = wanted & valid
    boxes = torch.where(wanted[..., None], boxes, 0)
    levels = torch.where(wanted, assign_levels(boxes, len(features)), -1)
    if frame == _WHOLE_PIXELS:
        boxes = torch.cat((boxes[..., :2], boxes[..., 2:] - 1), dim=-1)
    total: Tensor | None = None
    for level, (feature, stride) in enumerate(zip(features, strides)):
        here = (levels == level)[..., None]
        rois = torch.cat((image, boxes * here), dim=2).flatten(0, 1)  # [B*N, 5]
        pooled = torchvision_roi_align(feature.float(), rois, size, 1.0 / stride, ratio, frame == _ALIGNED)
        pooled = torch.where(here.flatten()[:, None, None, None], pooled, 0)
        total = pooled if total is None else total + pooled
    assert total is not None
    return total.to(features[0].dtype).flatten(2).transpose(1, 2).reshape(batch, count, size * size, -1)


@dataclass
class _Bags:
    """Boxes whose bins have equally many taps on one level."""

    level: int
    boxes: Tensor  # int64 [m], which of the B * N boxes
    pixels: Tensor  # int64 [m * S * S, T], rows of the level's features as [B * H * W, C]
    weights: Tensor  # float32 [m * S * S, T]


def _taps(start: Tensor, extent: Tensor, samples: Tensor, taps: Tensor, limit: Tensor, size: int) -> tuple[Tensor, ...]:
    """One axis of bilinear sampling as weights of pixels, for n boxes with unequal numbers of samples.

    ``start`` and ``extent`` float ``[n]`` in pixels of the level, ``samples`` and ``taps`` int ``[n]`` per bin,
    ``limit`` int ``[n]`` pixels of the level. Returns the first pixel of each bin ``[n, S]`` and the weights, box by
    box ``[S, taps]``, flat. Same arithmetic, in the same order, as torchvision's operator, whose border rule it keeps:
    points further than one pixel outside count nothing, nearer ones read the border.
    """
    amount = samples * size
    box = torch.repeat_interleave(torch.arange(len(start)), amount)
    point = torch.arange(len(box)) - (amount.cumsum(0) - amount)[box]  # 0 .. S * samples - 1 within its box
    each = samples[box]
    bin_ = point // each
    within = point - bin_ * each
    side = (extent / size)[box]
    position = start[box] + bin_ * side + (within + 0.5) * side / each
    inside = (position >= -1) & (position <= limit[box])
    position = torch.minimum(position.clamp(min=0), limit[box] - 1)
    low = position.floor()
    upper = position - low
    pixel = low.long()
    first = pixel[within == 0]  # [n * S]
    slots = taps * size
    slot = (slots.cumsum(0) - slots)[box] + bin_ * taps[box] + pixel - first[box * size + bin_]
    weights = torch.zeros(int(slots.sum()) + 1)  # the last point may name one slot more, with weight 0
    share = inside / each
    weights.index_add_(0, slot, (1 - upper) * share)
    weights.index_add_(0, slot + 1, upper * share)
    return first.view(len(start), size), weights


def _bags(
    boxes: Tensor,
    valid: Tensor | None,
    shapes: Sequence[Sequence[int]],
    size: int,
    strides: Sequence[int],
    ratio: int,
    frame: int,
) -> Iterator[_Bags]:
    """Boxes sorted into groups of equal shape, then cut into chunks; all of it on the CPU, whatever the device."""
    count = boxes.shape[1]
    boxes = boxes.flatten(0, 1).cpu()
    finite = boxes.isfinite().all(dim=1)
    boxes = torch.where(finite[:, None], boxes, 0)
    levels = assign_levels(boxes, len(shapes))
    if frame == _WHOLE_PIXELS:
        boxes = torch.cat((boxes[:, :2], boxes[:, 2:] - 1), dim=1)
    limits = torch.tensor([shape[-2:] for shape in shapes])  # [L, 2], (height, width)
    shift = 0.5 if frame == _ALIGNED else 0.0
    scaled = boxes * (1.0 / torch.tensor(strides, dtype=torch.float32))[levels, None] - shift
    start = scaled[:, [1, 0]]  # [B*N, 2], (y, x)
    extent = (scaled[:, [3, 2]] - start).clamp(min=0.0 if frame == _ALIGNED else 1.0)
    samples = torch.full_like(extent, ratio) if ratio > 0 else (extent / size).ceil().clamp(1, _MAX_TAPS - 2)
    # Samples of an adaptive grid lie at most a pixel apart; those of a fixed one may leave pixels out (weight 0).
    spread = samples - 1 if ratio <= 0 else (extent / size * (samples - 1) / samples).ceil()
    taps = (spread + 2).clamp(max=_MAX_TAPS - 1).long()
    key = (levels * _MAX_TAPS + taps[:, 0]) * _MAX_TAPS + taps[:, 1]
    wanted = finite & (extent.amin(dim=1) > 0) if ratio <= 0 else finite
    if valid is not None:
        wanted = wanted & valid.flatten().cpu()
    order = torch.nonzero(wanted).squeeze(1)
    key, sorted_ = key[order].sort(stable=True)
    order = order[sorted_]
    axes = [
        _taps(
            start[order, a], extent[order, a], samples[order, a].long(), taps[order, a], limits[levels[order], a], size
        )
        for a in (0, 1)
    ]
    (top, down), (left, across) = axes
    done, used_down, used_across = 0, 0, 0
    keys, amounts = torch.unique_consecutive(key, return_counts=True)
    for code, amount in zip(keys.tolist(), amounts.tolist()):
        level, rows, columns = code // _MAX_TAPS**2, code // _MAX_TAPS % _MAX_TAPS, code % _MAX_TAPS
        height, width = shapes[level][-2:]
        step = max(1, _CHUNK // (size * size * rows * columns))
        for begin in range(0, amount, step):
            many = min(step, amount - begin)
            part = slice(done, done + many)
            y = (top[part, :, None] + torch.arange(rows)).clamp(max=height - 1) * width  # [m, S, rows]
            y += (order[part] // count * (height * width))[:, None, None]
            x = (left[part, :, None] + torch.arange(columns)).clamp(max=width - 1)  # [m, S, columns]
            ends = used_down + many * size * rows, used_across + many * size * columns
            v = down[used_down : ends[0]].view(many, size, rows)
            h = across[used_across : ends[1]].view(many, size, columns)
            pixels = y[:, :, None, :, None] + x[:, None, :, None, :]  # [m, S, S, rows, columns]
            weights = v[:, :, None, :, None] * h[:, None, :, None, :]
            yield _Bags(level, order[part], pixels.view(-1, rows * columns), weights.view(-1, rows * columns))
            done, used_down, used_across = done + many, *ends


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Half precision is summed in float32."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def _plain_forward(
    features: Sequence[Tensor],
    boxes: Tensor,
    valid: Tensor | None,
    size: int,
    strides: Sequence[int],
    ratio: int,
    frame: int,
) -> Tensor:
    channels, dtype = features[0].shape[1], _wide(features[0].dtype)
    device = features[0].device
    levels = [feature.permute(0, 2, 3, 1).reshape(-1, channels).to(dtype) for feature in features]  # [B * H * W, C]
    result = torch.empty(boxes.shape[0] * boxes.shape[1], size * size, channels, dtype=dtype, device=device)
    missing = torch.ones(len(result), dtype=torch.bool)
    for bags in _bags(boxes, valid, [feature.shape for feature in features], size, strides, ratio, frame):
        rows = F.embedding_bag(
            bags.pixels.to(device), levels[bags.level], mode="sum", per_sample_weights=bags.weights.to(device, dtype)
        )
        result.index_copy_(0, bags.boxes.to(device), rows.view(len(bags.boxes), size * size, channels))
        missing[bags.boxes] = False
    result[missing.to(device)] = 0
    return result.view(*boxes.shape[:2], size * size, channels).to(features[0].dtype)


def _plain_backward(
    gradient: Tensor,
    boxes: Tensor,
    valid: Tensor | None,
    shapes: Sequence[Sequence[int]],
    size: int,
    strides: Sequence[int],
    ratio: int,
    frame: int,
) -> list[Tensor]:
    """For each pixel the weighted sum of the bins that read it: the forward's table, sorted by pixel."""
    device, dtype = gradient.device, _wide(gradient.dtype)
    rows = gradient.reshape(-1, gradient.shape[-1]).to(dtype)  # [B * N * S * S, C]
    tables: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in shapes]
    for bags in _bags(boxes, valid, shapes, size, strides, ratio, frame):
        bins = (bags.boxes[:, None] * (size * size) + torch.arange(size * size)).view(-1, 1).expand_as(bags.pixels)
        used = bags.weights.flatten() != 0
        tables[bags.level].append((bags.pixels.flatten()[used], bins.flatten()[used], bags.weights.flatten()[used]))
    gradients = []
    for (batch, channels, height, width), table in zip(shapes, tables):
        if not table:
            gradients.append(gradient.new_zeros(batch, channels, height, width))
            continue
        pixels, bins, weights = (torch.cat(column) for column in zip(*table))
        pixels, order = pixels.sort(stable=True)
        begin = torch.searchsorted(pixels, torch.arange(batch * height * width))
        summed = F.embedding_bag(
            bins[order].to(device),
            rows,
            begin.to(device),
            mode="sum",
            per_sample_weights=weights[order].to(device, dtype),
        )
        summed = summed.to(gradient.dtype).view(batch, height, width, channels)
        gradients.append(summed.permute(0, 3, 1, 2))
    return gradients


def _fused(tensor: Tensor) -> bool:
    return tensor.is_cuda and not torch.are_deterministic_algorithms_enabled()


@torch.library.custom_op("cascade_rcnn::roi_align_rows", mutates_args=())
def _rows(
    features: Sequence[Tensor],
    boxes: Tensor,
    valid: Tensor | None,
    size: int,
    strides: Sequence[int],
    ratio: int,
    frame: int,
) -> Tensor:
    """An operator, so that torch.compile takes it whole and autograd keeps the boxes only."""
    if _fused(boxes):
        from cascade_rcnn.models.ops.roi_align_triton import fused_forward

        return fused_forward(features, boxes, valid, size, strides, ratio, frame)
    return _plain_forward(features, boxes, valid, size, strides, ratio, frame)


@_rows.register_fake
def _rows_shape(features: Sequence[Tensor], boxes: Tensor, valid: Any, size: int, *_: Any) -> Tensor:
    return features[0].new_empty(boxes.shape[0], boxes.shape[1], size * size, features[0].shape[1])


@torch.library.custom_op("cascade_rcnn::roi_align_rows_backward", mutates_args=())
def _rows_backward(
    gradient: Tensor,
    boxes: Tensor,
    valid: Tensor | None,
    heights: Sequence[int],
    widths: Sequence[int],
    size: int,
    strides: Sequence[int],
    ratio: int,
    frame: int,
) -> list[Tensor]:
    shapes = [(boxes.shape[0], gradient.shape[-1], height, width) for height, width in zip(heights, widths)]
    if _fused(boxes):
        from cascade_rcnn.models.ops.roi_align_triton import fused_backward

        return fused_backward(gradient, boxes, valid, shapes, size, strides, ratio, frame)
    return _plain_backward(gradient, boxes, valid, shapes, size, strides, ratio, frame)


@_rows_backward.register_fake
def _rows_backward_shapes(
    gradient: Tensor, boxes: Tensor, valid: Any, heights: Sequence[int], widths: Sequence[int], *_: Any
) -> list[Tensor]:
    batch, channels = boxes.shape[0], gradient.shape[-1]
    return [
        gradient.new_empty(batch, height, width, channels).permute(0, 3, 1, 2) for height, width in zip(heights, widths)
    ]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, boxes, valid, *ctx.options = inputs
    ctx.heights, ctx.widths = [f.shape[2] for f in features], [f.shape[3] for f in features]
    ctx.save_for_backward(boxes, valid)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    boxes, valid = ctx.saved_tensors
    gradients = _rows_backward(gradient.contiguous(), boxes, valid, ctx.heights, ctx.widths, *ctx.options)
    return gradients, None, None, None, None, None, None


_rows.register_autograd(_differentiate, setup_context=_remember)
