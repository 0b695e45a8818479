"""Arithmetic of boxes: always float32, (x1, y1, x2, y2), width = x2 - x1.

N, M boxes; leading dimensions broadcast.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# A box grows at most 1000/16 times in one step; larger deltas are clamped before exp (all published implementations).
MAX_LOG_RATIO = math.log(1000.0 / 16.0)


def box_area(boxes: Tensor) -> Tensor:
    """Areas [...] of boxes [..., 4]."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def clip_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes [B, N, 4] or [B, N, K, 4] clipped to images of ``sizes`` [B, 2] (height, width)."""
    limits = sizes.flip(-1).to(boxes.dtype).repeat(1, 2)  # [B, 4] as (w, h, w, h)
    return torch.minimum(boxes.clamp(min=0), limits.view(-1, *[1] * (boxes.dim() - 2), 4))


def _intersection(a: Tensor, b: Tensor) -> Tensor:
    # Axis by axis and in place: working on (x, y) pairs would hold five tables in memory instead of two.
    sides = []
    for low in (0, 1):
        start = torch.maximum(a[..., :, None, low], b[..., None, :, low])
        sides.append(torch.minimum(a[..., :, None, low + 2], b[..., None, :, low + 2]).sub_(start).clamp_(min=0))
    return sides[0].mul_(sides[1])  # [..., N, M]


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union [..., N, M] of boxes [..., N, 4] and [..., M, 4]; 0 for two empty boxes."""
    intersection = _intersection(a, b)
    union = (box_area(a)[..., :, None] + box_area(b)[..., None, :]).sub_(intersection).clamp_(min=1e-6)
    return intersection.div_(union)


def pairwise_iof(a: Tensor, b: Tensor) -> Tensor:
    """Share [..., N, M] of each box of ``a`` that lies inside each box of ``b``."""
    return _intersection(a, b).div_(box_area(a)[..., :, None].clamp(min=1e-6))


def encode_boxes(boxes: Tensor, targets: Tensor, stds: Tensor) -> Tensor:
    """Deltas [..., 4] from ``boxes`` to ``targets`` (R-CNN, eq. 6-9), divided by ``stds`` [4].

    Empty boxes and targets (padding) give finite values.
    """
    size = (boxes[..., 2:] - boxes[..., :2]).clamp(min=1e-6)
    target_size = (targets[..., 2:] - targets[..., :2]).clamp(min=1e-6)
    shift = (targets[..., :2] + targets[..., 2:] - boxes[..., :2] - boxes[..., 2:]) * 0.5 / size
    return torch.cat([shift, (target_size / size).log()], dim=-1) / stds


def decode_boxes(deltas: Tensor, boxes: Tensor, stds: Tensor, *, limit_shrinking: bool = True) -> Tensor:
    """Apply ``deltas`` [..., 4] (in units of ``stds`` [4]) to ``boxes`` [..., 4].

    ``limit_shrinking`` clamps the log ratio on both sides (mmdetection), else only growth is limited (detectron2).
    """
    deltas = deltas.float() * stds
    size = boxes[..., 2:] - boxes[..., :2]
    center = (boxes[..., :2] + boxes[..., 2:]) * 0.5 + deltas[..., :2] * size
    ratio = deltas[..., 2:].clamp(min=-MAX_LOG_RATIO if limit_shrinking else None, max=MAX_LOG_RATIO)
    half = size * ratio.exp() * 0.5
    return torch.cat([center - half, center + half], dim=-1)


def smooth_l1(prediction: Tensor, target: Tensor, beta: float) -> Tensor:
    """Huber loss divided by ``beta``, per element; ``beta`` 0 is the plain absolute difference."""
    if beta == 0.0:
        return (prediction - target).abs()
    return F.smooth_l1_loss(prediction, target, reduction="none", beta=beta)


def iou_loss(boxes: Tensor, targets: Tensor, *, kind: str) -> Tensor:
    """1 - IoU with a penalty [...] for boxes [..., 4] beside their targets [..., 4]; empty boxes give finite values.

    "giou" (arXiv 1902.09630): share of the hull that neither covers. "diou" (1911.08287): squared distance of the
    centres in units of the hull's diagonal; "ciou": and what aspect ratios differ by.
    """
    eps = 1e-7
    corner = torch.maximum(boxes[..., :2], targets[..., :2])
    overlap = (torch.minimum(boxes[..., 2:], targets[..., 2:]) - corner).clamp(min=0).prod(dim=-1)
    union = (box_area(boxes) + box_area(targets) - overlap).clamp(min=eps)
    iou = overlap / union
    hull = torch.maximum(boxes[..., 2:], targets[..., 2:]) - torch.minimum(boxes[..., :2], targets[..., :2])
    if kind == "giou":
        area = hull.prod(dim=-1).clamp(min=eps)
        return 1 - iou + (area - union) / area
    apart = (boxes[..., :2] + boxes[..., 2:] - targets[..., :2] - targets[..., 2:]).square().sum(dim=-1) / 4
    loss = 1 - iou + apart / hull.square().sum(dim=-1).clamp(min=eps)
    if kind == "diou":
        return loss
    angles = [torch.atan2(*((b[..., 2:] - b[..., :2]).clamp(min=eps).unbind(dim=-1))) for b in (boxes, targets)]
    aspect = 4 / math.pi**2 * (angles[0] - angles[1]).square()
    with torch.no_grad():  # the published loss holds its weight fixed
        weight = torch.where(iou > 0.5, aspect / (1 - iou + aspect).clamp(min=eps), 0.0)
    return loss + weight * aspect
