"""Mask head (arXiv 1703.06870) and its targets.

R RoIs, C channels, K classes, m mask bins per side (28), P positives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade_rcnn.models.matching import host_sync_is_free
from cascade_rcnn.models.ops.capabilities import has_triton
from cascade_rcnn.models.ops.frozen_norm import make_norm, without_batch_norms
from cascade_rcnn.rounding import ceil_div
from cascade_rcnn.structures import MaskCrops

MAX_TABLE = 1 << 24  # pixels of object masks gathered at once


@dataclass
class MaskSamples:
    """RoIs of a mask head's loss."""

    boxes: Tensor  # float32 [B, P, 4]
    labels: Tensor  # int64 [B, P], class of the object
    valid: Tensor  # bool [B, P], positives whose object has a mask
    targets: Tensor  # float32 [B, P, m, m], 0 or 1


class MaskHead(nn.Module):
    """RoI features [R, C, 14, 14] to one mask per class: logits [R, K, 28, 28].

    ``norm``: none, group or batch, behind each convolution but the last two.
    """

    def __init__(self, channels: int, num_classes: int, *, width: int, convs: int = 4, norm: str = "none") -> None:
        super().__init__()
        inputs = [channels] + [width] * (convs - 1)
        self.convs = nn.ModuleList(nn.Conv2d(c, width, 3, padding=1, bias=norm == "none") for c in inputs)
        self.norms = nn.ModuleList(make_norm(norm, width) for _ in range(0 if norm == "none" else convs))
        self.counts_rows = norm == "batch"  # in training, one RoI's masks depend on which others there are
        self.upsample = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.logits = nn.Conv2d(width, num_classes, 1)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.logits.weight, std=0.001)  # first masks near one half, whatever the features' scale

    def fold_batch_norm(self) -> None:
        self.norms = without_batch_norms(self.convs, self.norms)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.logits(self.features(x))
        return logits

    def features(self, x: Tensor) -> Tensor:
        """All layers before the last 1x1 convolution: [R, C, 14, 14] to [R, width, 28, 28]."""
        for i, conv in enumerate(self.convs):
            x = conv(x)
            x = F.relu(self.norms[i](x) if self.norms else x, inplace=True)
        return F.relu(self.upsample(x), inplace=True)

    def of_labels(self, x: Tensor, labels: Tensor) -> Tensor:
        """Logits [R, 28, 28] of each RoI's own class ``labels`` [R] only: 1/K of the last layer's work."""
        x = self.features(x)
        weight = self.logits.weight[labels].flatten(2).mT.to(x.dtype)  # [R, 1, width]
        assert self.logits.bias is not None
        # OpenVINO would make a broadcast, products and sums of an einsum
        logits = torch.bmm(weight, x.flatten(2)).view(x.shape[0], *x.shape[2:])
        return logits + self.logits.bias[labels].to(x.dtype)[:, None, None]


def _axis_weights(start: Tensor, length: Tensor, bins: int, *, image: Tensor, origin: Tensor, size: int) -> Tensor:
    """RoIAlign's averaging weights [P, bins, size] along one axis, over the ``size`` pixels that begin at ``origin``.

    ``start``, ``length`` [P]: the RoI's extent (shifted by half a pixel); ``image`` [P]: the image's extent, beyond
    which there is nothing and at whose border samples are clamped; ceil(length / bins) samples per bin. Separable,
    because bilinear interpolation and averaging over a grid are.
    """
    count = (length / bins).ceil().clamp(min=1)  # samples per bin [P]
    # A RoI longer than the crop needs more samples than the crop has pixels: those outside weigh nothing.
    limit = max(1, ceil_div(size, bins)) + 1
    limit = max(limit, int(count.max())) if host_sync_is_free(start) and len(count) else max(limit, 64)
    count = count.clamp(max=limit)
    sample = torch.arange(limit, device=start.device)
    step = length / bins
    bin_start = start[:, None] + torch.arange(bins, device=start.device) * step[:, None]  # [P, bins]
    position = bin_start[..., None] + (sample + 0.5) * (step / count)[:, None, None]  # [P, bins, samples]
    inside = (position >= -1) & (position <= image[:, None, None]) & (sample < count[:, None, None])
    position = position.clamp(min=0).minimum(image[:, None, None] - 1)
    low = position.floor()
    weights = start.new_zeros(len(start), bins, size + 1)  # the last column takes what lies outside the crop
    share = inside / count[:, None, None]
    for pixel, weight in ((low, 1 - (position - low)), (low + 1, position - low)):
        column = pixel - origin[:, None, None]
        column = torch.where((column >= 0) & (column < size), column, float(size)).to(torch.int64)
        weights.scatter_add_(2, column, weight * share)
    return weights[..., :size]


@torch.no_grad()
def mask_targets(masks: MaskCrops, rois: Tensor, index: Tensor, sizes: Tensor, *, bins: int = 28) -> Tensor:
    """The mask head's target for each RoI: float [B, P, bins, bins] of 0 and 1.

    ``rois`` [B, P, 4], ``index`` [B, P] (each RoI's object), ``sizes`` [B, 2]. An object's mask is averaged over each
    bin as RoIAlign does (aligned, adaptive sampling) and cut at one half (mmdetection's and detectron2's bitmap rule).
    """
    if rois.is_cuda and has_triton():
        from cascade_rcnn.models.ops.mask_targets_triton import fused_mask_targets

        return fused_mask_targets(masks, rois, index, sizes, bins=bins)
    rois = rois.nan_to_num(0.0, 0.0, 0.0)  # a diverged training: its losses report it a step later
    batch, count = index.shape
    flat = index.flatten()
    image = torch.arange(batch, device=index.device)[:, None].expand(batch, count).flatten()
    offset = masks.offsets[image, flat]
    origin, size = masks.origins[image, flat].float(), masks.sizes[image, flat]  # [B*P, 2]
    roi = rois.flatten(0, 1) - 0.5
    limit = sizes[image].float()
    height, width = (max(1, side) for side in masks.max_size)
    chunk = max(1, MAX_TABLE // (height * width))
    row, column = torch.arange(height, device=roi.device), torch.arange(width, device=roi.device)
    result = []
    for part in torch.arange(batch * count, device=roi.device).split(chunk):
        r, o, s = roi[part], origin[part], size[part]
        weights_y = _axis_weights(r[:, 1], r[:, 3] - r[:, 1], bins, image=limit[part, 0], origin=o[:, 0], size=height)
        weights_x = _axis_weights(r[:, 0], r[:, 2] - r[:, 0], bins, image=limit[part, 1], origin=o[:, 1], size=width)
        inside = (row[:, None] < s[:, 0, None, None]) & (column < s[:, 1, None, None])  # [p, h, w]
        address = offset[part, None, None] + row[:, None] * s[:, 1, None, None] + column
        if masks.pixels.numel():
            crop = masks.pixels[torch.where(inside, address, 0)] * inside
        else:
            crop = inside * 0
        with torch.autocast(roi.device.type, enabled=False):  # the last bits decide a target
            result.append(weights_y @ crop.float() @ weights_x.transpose(1, 2) >= 0.5)
    if not result:
        return rois.new_zeros(batch, count, bins, bins)
    return torch.cat(result).view(batch, count, bins, bins).float()


def mask_loss(logits: Tensor, targets: Tensor, positive: Tensor) -> Tensor:
    """Binary cross-entropy averaged over the pixels of the positive RoIs of this process.

    ``logits`` and ``targets`` [R, m, m] (of each RoI's own class), ``positive`` [R].
    """
    loss = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none").mean(dim=(1, 2))
    return torch.where(positive, loss, 0.0).sum()
