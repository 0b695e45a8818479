"""RoIAlign over a feature pyramid: each box is read from the level that fits its size, all levels in one call.

B images, N boxes per image (padded, ``valid`` marks the boxes), L levels, C channels, S bins per side, T taps of a bin.
Boxes are xyxy in pixels of the network input. Sources: He et al., arXiv 1703.06870 (RoIAlign); Lin et al.,
arXiv 1612.03144, equation 1 (level by size).

Four ways compute the same numbers:

* **plain** (any device, the default on CPUs): the mean over a bin's bilinear samples is separable, so each bin is a
  weighted sum of T = (samples + 1)^2 pixels, about 13, instead of 4 x samples^2. In channels-last memory each pixel is
  one contiguous vector of C numbers, and ``embedding_bag`` sums such vectors at the speed of the memory. The gradient
  is the same sum with the roles exchanged (for each pixel, the bins that read it): no atomics, bit-equal runs.
* **fused** (CUDA, ``roi_align_triton.py``): one Triton kernel; used unless deterministic algorithms are asked for.
* **portable** (devices without either): torchvision's operator on every level, with static shapes;
* **exported**: that operator once, on all levels side by side in one map; unaligned, as in the portable way.

One bin, worked out (plain path, aligned): the box (10, 20, 66, 76) is 56 pixels wide, its level is the first, of
stride 4. There it begins at x = 10 / 4 - 0.5 = 2.0 and is 56 / 4 = 14 pixels wide: with S = 7 a bin has 2 pixels and
ceil(14 / 7) = 2 samples. The first bin's lie at 2.5 and 3.5. Bilinear interpolation reads 2.5 as half of pixel 2 and
half of pixel 3, and 3.5 as half of 3 and half of 4; their mean is 1/4, 1/2, 1/4 of the pixels 2, 3, 4: samples + 1
taps per axis. Rows likewise (from 20 / 4 - 0.5 = 4.5, samples at 5.0 and 6.0): 1/2, 1/2, 0 of the rows 5, 6, 7. The bin
is the sum of its 3 x 3 pixels, each weighted by the product of its row's and its column's weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, List  # noqa: UP035

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align as torchvision_roi_align

from cascade_rcnn.models.ops.capabilities import exporting, has_triton
from cascade_rcnn.models.ops.roi_sampling import Frame, Sampling

CANONICAL_SIDE = 56.0  # a box of twice this side (in pixels) is the smallest that leaves the first level
_MAX_TAPS = 4096  # per bin and side: boxes of 28,000 pixels of a level; bounds the memory of a diverged model
_OUTSIDE = (-9.0, -9.0, -2.0, -2.0)  # a box in pixels of a map, where it reads zeros
_CHUNK = 1 << 19  # entries of the index built at a time: 6 MB of index and weights, and results that stay in the cache


def assign_levels(boxes: Tensor, levels: int) -> Tensor:
    """Level 0..levels-1 of each box ``[..., 4]``: floor(log2(sqrt(area) / 56)), clamped; int64 ``[...]``."""
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    side = (width * height).clamp(min=0).sqrt()
    return torch.floor(torch.log2(side / CANONICAL_SIDE + 1e-6)).clamp(0, levels - 1).to(torch.int64)


def roi_align(features: Sequence[Tensor], boxes: Tensor, sampling: Sampling, valid: Tensor | None = None) -> Tensor:
    """Features of each box, ``[B, N, C, S, S]`` (channels last in memory); zero where ``valid`` is False.

    Arguments as in :func:`roi_align_rows`, which a head should prefer: it needs no copy to be flattened.
    """
    if _exported() and sampling.frame is Frame.ALIGNED:
        return _portable(features, boxes.detach().to(torch.float32), valid, sampling)
    rows = roi_align_rows(features, boxes, sampling, valid)
    grid = rows.view(*boxes.shape[:2], sampling.size, sampling.size, features[0].shape[1])
    return grid.permute(0, 1, 4, 2, 3)  # [B, N, C, S, S]


def roi_align_rows(
    features: Sequence[Tensor], boxes: Tensor, sampling: Sampling, valid: Tensor | None = None
) -> Tensor:
    """Features of each box as contiguous rows ``[B, N, S * S, C]``; zero where not ``valid`` or not finite.

    ``features`` are L maps ``[B, C, H_l, W_l]`` (channels-last memory is read as it lies, other memory is copied
    first), ``boxes`` is ``[B, N, 4]`` with x2 >= x1 and y2 >= y1, ``valid`` bool ``[B, N]``. A box's level follows its
    area in every frame. Gradients flow into the features, not into the boxes. ``.flatten(2)`` is a view with the
    columns ordered (bin, channel); :func:`rows_weight` reorders the weight of a layer that expects (channel, bin).
    """
    if len(features) != len(sampling.strides):
        raise ValueError(f"{len(features)} feature maps for {len(sampling.strides)} strides")
    boxes = boxes.detach().to(torch.float32)
    if _exported() or _needs_portable(features[0]):
        return _portable(features, boxes, valid, sampling).flatten(3).transpose(2, 3)
    rows: Tensor = _rows(list(features), boxes, valid, *_plain_numbers(sampling))
    return rows


def rows_weight(weight: Tensor, bins: int) -> Tensor:
    """``[O, C * bins]`` with columns (channel, bin), as checkpoints have it, to columns (bin, channel) of rows."""
    return weight.view(len(weight), -1, bins).transpose(1, 2).flatten(1)


# Portable


def _needs_portable(feature: Tensor) -> bool:
    """Whether to use torchvision's operator, which other devices have."""
    return feature.device.type != "cpu" and not (feature.is_cuda and has_triton())


def _portable(features: Sequence[Tensor], boxes: Tensor, valid: Tensor | None, sampling: Sampling) -> Tensor:
    """``[B, N, C, S, S]``."""
    batch, count = boxes.shape[:2]
    image = torch.arange(batch, device=boxes.device)[:, None].expand(batch, count)
    listed = roi_align_listed(
        features, boxes.flatten(0, 1), image.flatten(), sampling, None if valid is None else valid.flatten()
    )
    return listed.view(batch, count, -1, sampling.size, sampling.size)


def roi_align_listed(
    features: Sequence[Tensor], boxes: Tensor, image: Tensor, sampling: Sampling, valid: Tensor | None = None
) -> Tensor:
    """Features ``[R, C, S, S]`` of boxes [R, 4], each of the image whose number stands in ``image`` int64 [R], by
    torchvision's operator; R may be a number that an exporter does not know. Otherwise as :func:`roi_align_rows`.
    """
    wanted = boxes.isfinite().all(dim=1)
    if valid is not None:
        wanted = wanted & valid
    boxes = torch.where(wanted[:, None], boxes, 0)
    one_map = _exported() and sampling.frame is Frame.ALIGNED
    pool = _pool_one_map if one_map else _pool_every_level
    return pool(features, boxes, image.to(boxes.dtype)[:, None], wanted, sampling)


def _pool_every_level(
    features: Sequence[Tensor], boxes: Tensor, image: Tensor, wanted: Tensor, sampling: Sampling
) -> Tensor:
    """Every box on every level, made empty on all but its own: no samples, no cost, static shapes."""
    levels = torch.where(wanted, assign_levels(boxes, len(features)), -1)
    if sampling.frame is Frame.PLUS_ONE:
        boxes = torch.cat((boxes[:, :2], boxes[:, 2:] - 1), dim=1)
    total: Tensor | None = None
    for level, (feature, stride) in enumerate(zip(features, sampling.strides)):
        here = (levels == level)[:, None]
        rois = torch.cat((image, boxes * here), dim=1)  # [R, 5]
        aligned = sampling.frame is Frame.ALIGNED
        pooled = torchvision_roi_align(feature.float(), rois, sampling.size, 1.0 / stride, sampling.ratio, aligned)
        pooled = torch.where(here[..., None, None], pooled, 0)
        total = pooled if total is None else total + pooled
    assert total is not None
    return total.to(features[0].dtype)


# Exported


def _exported() -> bool:
    """Whether an exporter is tracing, which knows torchvision's operator."""
    return torch._C._get_tracing_state() is not None or exporting()


def _pool_one_map(
    features: Sequence[Tensor], boxes: Tensor, image: Tensor, wanted: Tensor, sampling: Sampling
) -> Tensor:
    """Each box is read once, where its level lies in a map that holds all of them.

    The boxes must lie within their images: behind a level's border there is one more pixel, and then the next level.
    For aligned boxes alone: the operator makes others at least a pixel wide, beyond the border too.
    """
    joined, tops = _side_by_side(features)
    levels = assign_levels(boxes, len(features))
    scale, top = torch.zeros_like(boxes[:, :1]), torch.zeros_like(boxes[:, :1])
    for level, stride in enumerate(sampling.strides):
        here = (levels == level)[:, None]
        scale, top = torch.where(here, 1.0 / stride, scale), torch.where(here, tops[level] + 1.0, top)
    across, down = torch.ones_like(top), top
    boxes = boxes * scale + torch.cat((across, down, across, down), dim=1)
    boxes = torch.where(wanted[:, None], boxes, boxes.new_tensor(_OUTSIDE))
    rois = torch.cat((image, boxes), dim=1)  # [R, 5]
    pooled: Tensor = torchvision_roi_align(joined, rois, sampling.size, 1.0, sampling.ratio, aligned=True)
    return pooled


def _side_by_side(features: Sequence[Tensor]) -> tuple[Tensor, list[Any]]:
    """All levels in one map [B, C, H, W], one below the other, and the row in which each begins.

    Each has its outermost pixels repeated once around it, which is how RoIAlign reads beyond a border.
    """
    width = features[0].shape[3]
    parts, tops, below = [], [], 0
    for feature in features:
        part = F.pad(feature.float(), (1, 1, 1, 1), mode="replicate")
        parts.append(F.pad(part, (0, width - feature.shape[3])))
        tops.append(below)
        below = below + feature.shape[2] + 2
    return torch.cat(parts, dim=2), tops


# Plain


@dataclass
class _TapGroup:
    """Boxes whose bins have equally many taps on one level."""

    level: int
    boxes: Tensor  # int64 [m], which of the B * N boxes
    pixels: Tensor  # int64 [m * S * S, T], rows of the level's features as [B * H * W, C]
    weights: Tensor  # float32 [m * S * S, T]


@dataclass
class _Axis:
    """One axis of n boxes, in pixels of their levels."""

    start: Tensor  # float [n]
    extent: Tensor  # float [n]
    samples: Tensor  # int64 [n], per bin
    taps: Tensor  # int64 [n], per bin
    limit: Tensor  # int64 [n], pixels of the level

    def of(self, boxes: Tensor) -> _Axis:
        """The same for a subset of boxes, in order."""
        return _Axis(*(values[boxes] for values in vars(self).values()))


def _taps(axis: _Axis, size: int) -> tuple[Tensor, Tensor]:
    """One axis of bilinear sampling as weights of pixels, for n boxes with unequal numbers of samples.

    Returns the first pixel of each bin ``[n, S]`` and the weights, box by box ``[S, taps]``, flat. Same arithmetic, in
    the same order, as torchvision's operator, whose border rule it keeps: points more than one pixel outside contribute
    nothing, nearer ones read the border.
    """
    # every sample of every box, in one row
    amount = axis.samples * size
    box = torch.repeat_interleave(torch.arange(len(amount)), amount)
    point = torch.arange(len(box)) - (amount.cumsum(0) - amount)[box]  # 0 .. S * samples - 1 within its box
    samples = axis.samples[box]
    bin_ = point // samples
    within = point - bin_ * samples
    # where it lies, and the two pixels that it is interpolated from
    side = (axis.extent / size)[box]
    position = axis.start[box] + bin_ * side + (within + 0.5) * side / samples
    inside = (position >= -1) & (position <= axis.limit[box])
    position = torch.minimum(position.clamp(min=0), axis.limit[box] - 1)
    low = position.floor()
    upper = position - low
    pixel = low.long()
    # its share of the weights of its bin
    first = pixel[within == 0]  # [n * S]
    slots = axis.taps * size
    slot = (slots.cumsum(0) - slots)[box] + bin_ * axis.taps[box] + pixel - first[box * size + bin_]
    weights = torch.zeros(int(slots.sum()) + 1)  # the last point may name one slot more, with weight 0
    share = inside / samples
    weights.index_add_(0, slot, (1 - upper) * share)
    weights.index_add_(0, slot + 1, upper * share)
    return first.view(-1, size), weights[:-1]


def _axes(boxes: Tensor, levels: Tensor, shapes: Sequence[Sequence[int]], sampling: Sampling) -> tuple[_Axis, _Axis]:
    """Rows and columns of boxes [n, 4] on their levels [n]."""
    aligned = sampling.frame is Frame.ALIGNED
    if sampling.frame is Frame.PLUS_ONE:
        boxes = torch.cat((boxes[:, :2], boxes[:, 2:] - 1), dim=1)
    limits = torch.tensor([shape[-2:] for shape in shapes])[levels]  # [n, 2], (height, width)
    shift = 0.5 if aligned else 0.0
    scaled = boxes * (1.0 / torch.tensor(sampling.strides, dtype=torch.float32))[levels, None] - shift
    start = scaled[:, [1, 0]]  # [n, 2], (y, x)
    extent = (scaled[:, [3, 2]] - start).clamp(min=0.0 if aligned else 1.0)
    size, ratio = sampling.size, sampling.ratio
    samples = torch.full_like(extent, ratio) if ratio > 0 else (extent / size).ceil().clamp(1, _MAX_TAPS - 2)
    # Samples of an adaptive grid lie at most a pixel apart; those of a fixed one may leave pixels out (weight 0).
    reach = samples - 1 if ratio <= 0 else (extent / size * (samples - 1) / samples).ceil()
    taps = (reach + 2).clamp(max=_MAX_TAPS - 1).long()
    rows, columns = (
        _Axis(*(values[:, axis] for values in (start, extent, samples.long(), taps, limits))) for axis in (0, 1)
    )
    return rows, columns


def _sorted_by_taps(keys: Tensor) -> tuple[Tensor, list[list[int]]]:
    """The order [n] that puts equal rows of ``keys`` [n, 3] (level, taps down, taps across) side by side, each keeping
    its boxes in their order; and the groups as [level, taps down, taps across, number of boxes].
    """
    order = torch.arange(len(keys))
    for column in reversed(
        keys.unbind(dim=1)
    ):  # stable sorts, the first column last; torch.unique takes 4 times as long
        order = order[column[order].argsort(stable=True)]
    keys = keys[order]
    is_first = torch.ones(len(keys), dtype=torch.bool)
    is_first[1:] = (keys[1:] != keys[:-1]).any(dim=1)
    begin = is_first.nonzero().squeeze(1)
    amount = begin.diff(append=torch.tensor([len(keys)]))
    return order, torch.cat((keys[begin], amount[:, None]), dim=1).tolist()


def _tap_groups(
    boxes: Tensor, valid: Tensor | None, shapes: Sequence[Sequence[int]], sampling: Sampling
) -> Iterator[_TapGroup]:
    """Boxes sorted into groups of equal shape, then cut into chunks; all of it on the CPU, whatever the device."""
    count, size = boxes.shape[1], sampling.size
    boxes = boxes.flatten(0, 1).cpu()
    wanted = boxes.isfinite().all(dim=1)
    boxes = torch.where(wanted[:, None], boxes, 0)
    levels = assign_levels(boxes, len(shapes))
    rows, columns = _axes(boxes, levels, shapes, sampling)
    if sampling.ratio <= 0:  # empty boxes have no samples
        wanted = wanted & (rows.extent > 0) & (columns.extent > 0)
    if valid is not None:
        wanted = wanted & valid.flatten().cpu()
    box = torch.nonzero(wanted).squeeze(1)
    order, groups = _sorted_by_taps(torch.stack((levels, rows.taps, columns.taps), dim=1)[box])
    box = box[order]
    top, weights_down = _taps(rows.of(box), size)
    left, weights_across = _taps(columns.of(box), size)
    chunks = []  # (level, taps down, taps across, boxes)
    for level, down, across, amount in groups:
        at_once = max(1, _CHUNK // (size * size * down * across))
        chunks += [(level, down, across, min(at_once, amount - begin)) for begin in range(0, amount, at_once)]
    counts = [m for *_, m in chunks]
    parts = zip(
        chunks,
        box.split(counts),
        top.split(counts),
        left.split(counts),
        weights_down.split([m * size * down for _, down, _, m in chunks]),
        weights_across.split([m * size * across for _, _, across, m in chunks]),
    )
    for (level, down, across, m), b, y, x, v, h in parts:
        height, width = shapes[level][-2:]
        y = (y[..., None] + torch.arange(down)).clamp(max=height - 1) * width  # [m, S, down]
        y += (b // count * (height * width))[:, None, None]  # of its own image
        x = (x[..., None] + torch.arange(across)).clamp(max=width - 1)  # [m, S, across]
        pixels = y[:, :, None, :, None] + x[:, None, :, None, :]  # [m, S, S, down, across]
        weights = v.view(m, size, 1, down, 1) * h.view(m, 1, size, 1, across)
        yield _TapGroup(level, b, pixels.view(-1, down * across), weights.view(-1, down * across))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Half precision is summed in float32."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def _summed_in(feature: Tensor) -> torch.dtype:
    """Type of the rows that the forward pass reads.

    On CPUs ``embedding_bag`` reads bfloat16 and sums in float32: half of the memory traffic and no copy of the maps, so
    a third of the time. The weights are rounded too: 2.2e-3 instead of 1.4e-3 of error, which is bfloat16's own.
    """
    is_bfloat16 = feature.dtype == torch.bfloat16 and feature.device.type == "cpu"
    return torch.bfloat16 if is_bfloat16 else _wide(feature.dtype)


def _plain_forward(features: Sequence[Tensor], boxes: Tensor, valid: Tensor | None, sampling: Sampling) -> Tensor:
    channels, device = features[0].shape[1], features[0].device
    dtype = _summed_in(features[0])
    levels = [feature.permute(0, 2, 3, 1).reshape(-1, channels).to(dtype) for feature in features]  # [B * H * W, C]
    bins = sampling.size**2
    result = torch.empty(boxes.shape[0] * boxes.shape[1], bins, channels, dtype=dtype, device=device)
    missing = torch.ones(len(result), dtype=torch.bool)
    for group in _tap_groups(boxes, valid, [feature.shape for feature in features], sampling):
        rows = F.embedding_bag(
            group.pixels.to(device), levels[group.level], mode="sum", per_sample_weights=group.weights.to(device, dtype)
        )
        result.index_copy_(0, group.boxes.to(device), rows.view(len(group.boxes), bins, channels))
        missing[group.boxes] = False
    result[missing.to(device)] = 0
    return result.view(*boxes.shape[:2], bins, channels).to(features[0].dtype)


def _plain_backward(
    gradient: Tensor, boxes: Tensor, valid: Tensor | None, shapes: Sequence[Sequence[int]], sampling: Sampling
) -> list[Tensor]:
    """For each pixel the weighted sum of the bins that read it: the forward's table, sorted by pixel."""
    device, dtype = gradient.device, _wide(gradient.dtype)
    rows = gradient.reshape(-1, gradient.shape[-1]).to(dtype)  # [B * N * S * S, C]
    bins = sampling.size**2
    tables: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in shapes]
    for group in _tap_groups(boxes, valid, shapes, sampling):
        readers = (group.boxes[:, None] * bins + torch.arange(bins)).view(-1, 1).expand_as(group.pixels)
        used = group.weights.flatten() != 0
        tables[group.level].append(
            (group.pixels.flatten()[used], readers.flatten()[used], group.weights.flatten()[used])
        )
    gradients = []
    for (batch, channels, height, width), table in zip(shapes, tables):
        if not table:
            gradients.append(gradient.new_zeros(batch, channels, height, width))
            continue
        pixels, readers, weights = (torch.cat(column) for column in zip(*table))
        pixels, order = pixels.sort(stable=True)
        begin = torch.searchsorted(pixels, torch.arange(batch * height * width))
        summed = F.embedding_bag(
            readers[order].to(device),
            rows,
            begin.to(device),
            mode="sum",
            per_sample_weights=weights[order].to(device, dtype),
        )
        summed = summed.to(gradient.dtype).view(batch, height, width, channels)
        gradients.append(summed.permute(0, 3, 1, 2))
    return gradients


# The operator: torch.compile takes it whole, and autograd keeps the boxes only. It may have plain numbers as arguments.


def _plain_numbers(sampling: Sampling) -> tuple[int, list[int], int, int]:
    return sampling.size, list(sampling.strides), sampling.ratio, int(sampling.frame)


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
    sampling = Sampling(size, tuple(strides), ratio, Frame(frame))
    if _fused(boxes):
        from cascade_rcnn.models.ops.roi_align_triton import fused_forward

        return fused_forward(features, boxes, valid, sampling)
    return _plain_forward(features, boxes, valid, sampling)


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
) -> List[Tensor]:  # noqa: UP006  # torch 2.6 knows no other word for it
    sampling = Sampling(size, tuple(strides), ratio, Frame(frame))
    shapes = [(boxes.shape[0], gradient.shape[-1], height, width) for height, width in zip(heights, widths)]
    if _fused(boxes):
        from cascade_rcnn.models.ops.roi_align_triton import fused_backward

        return fused_backward(gradient, boxes, valid, shapes, sampling)
    return _plain_backward(gradient, boxes, valid, shapes, sampling)


@_rows_backward.register_fake
def _rows_backward_shapes(
    gradient: Tensor, boxes: Tensor, valid: Any, heights: Sequence[int], widths: Sequence[int], *_: Any
) -> list[Tensor]:
    batch, channels = boxes.shape[0], gradient.shape[-1]
    return [
        gradient.new_empty(batch, height, width, channels).permute(0, 3, 1, 2) for height, width in zip(heights, widths)
    ]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, boxes, valid, *ctx.sampling = inputs
    ctx.heights, ctx.widths = [f.shape[2] for f in features], [f.shape[3] for f in features]
    ctx.save_for_backward(boxes, valid)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    boxes, valid = ctx.saved_tensors
    gradients = _rows_backward(gradient.contiguous(), boxes, valid, ctx.heights, ctx.widths, *ctx.sampling)
    return gradients, None, None, None, None, None, None


_rows.register_autograd(_differentiate, setup_context=_remember)
