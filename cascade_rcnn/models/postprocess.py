"""From class scores and boxes to detections: thresholds and non-maximum suppression.

B images, M candidates per image (padded), K classes, D detections per image (padded).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import batched_nms, nms

from cascade_rcnn.models.boxes import pairwise_iou
from cascade_rcnn.models.matching import host_sync_is_free, take
from cascade_rcnn.models.ops.capabilities import exporting, has_triton
from cascade_rcnn.structures import RawDetections

# Candidates handed to NMS per image on a GPU, where shapes must not depend on the data. Only images with more boxes
# above the score threshold than this, and fewer than max_detections left among the best of them, could differ.
MAX_CANDIDATES = 8192


def nms_keep(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    valid: Tensor,
    iou: float,
    *,
    offset_groups: bool = False,
    runs: Sequence[int] | None = None,
    max_keep: int = 1 << 30,
) -> Tensor:
    """Which boxes [B, M] survive greedy NMS among the valid ones of the same image and group.

    ``boxes`` [B, M, 4], ``scores``, ``groups`` (non-negative) and ``valid`` [B, M]. ``offset_groups`` offsets
    each group to a region of its own first, as mmdetection does: only the rounding of the IoU changes, which decides
    ties at the limit. The last two save time on a GPU: ``runs``, lengths of the parts of M that are in falling order of
    score and have no group in common; ``max_keep``, how many boxes the caller will use at most, of an image and the
    best first.
    """
    if offset_groups and scores.shape[1]:
        boxes = boxes + (groups * (boxes.flatten(1).amax(dim=1, keepdim=True) + 1)).unsqueeze(-1)
    if exporting():
        return _nms_exported(boxes, scores, groups, valid, iou)
    if boxes.is_cuda and has_triton():
        from cascade_rcnn.models.ops.nms_triton import nms_mask

        return nms_mask(boxes, scores, groups, valid, iou, runs=runs, max_keep=max_keep)
    batch = torch.arange(len(boxes), device=boxes.device)[:, None]
    groups = groups * len(boxes) + batch  # groups of all images in one call
    if boxes.device.type == "cpu":
        return _nms_of_valid(boxes, scores, groups, valid, iou)
    # Elsewhere shapes stay fixed: boxes that are no candidates go into a group of their own.
    groups = torch.where(valid, groups, -1 - batch)
    return _nms_of_all(boxes, scores.masked_fill(~valid, -1e30), groups, iou) & valid


def _nms_of_valid(boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, iou: float) -> Tensor:
    """bool [B, M]; boxes that are not valid cost nothing."""
    rows = valid.flatten().nonzero().squeeze(1)
    keep = torch.zeros(valid.numel(), dtype=torch.bool)
    kept = batched_nms(boxes.flatten(0, 1)[rows], scores.flatten()[rows], groups.flatten()[rows], iou)
    keep[rows[kept]] = True
    return keep.view_as(valid)


def _nms_exported(boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, iou: float) -> Tensor:
    """As ``_nms_of_valid`` with one operator that exporters know: groups lie apart, in the cells of a square.

    In a row, the last of 1,203 classes and 8 images would lie where float32 has whole pixels only.
    """
    batch, count = scores.shape
    cell = groups * batch + torch.arange(batch, device=boxes.device)[:, None]  # [B, M]
    side = (cell.flatten().amax(dim=0) + 1).float().sqrt().ceil().long()
    down = torch.div(cell, side, rounding_mode="floor")
    across = cell - down * side
    apart = torch.stack((across, down, across, down), dim=-1) * (boxes.flatten().amax(dim=0) + 1)  # [B, M, 4]
    rows = valid.reshape(-1).nonzero().squeeze(1)
    # torch.export takes it that NMS keeps two boxes at least: two more, of no interest, are always kept.
    total, two = batch * count, torch.arange(2, device=boxes.device)
    beyond = -1 - 2 * two.to(boxes.dtype)  # boxes themselves begin at 0
    others = torch.stack((beyond - 1, beyond - 1, beyond, beyond), dim=1)
    kept = nms(
        torch.cat(((boxes + apart).reshape(-1, 4)[rows], others)),
        torch.cat((scores.reshape(-1)[rows], scores.new_zeros(2) - 1)),
        iou,
    )
    keep = torch.zeros(total + 2, dtype=torch.bool, device=boxes.device)
    return keep.index_fill(0, torch.cat((rows, total + two))[kept], True)[:total].view(batch, count)


def _nms_of_all(boxes: Tensor, scores: Tensor, groups: Tensor, iou: float) -> Tensor:
    """bool [B, M]; every box takes part."""
    kept = batched_nms(boxes.flatten(0, 1), scores.flatten(), groups.flatten(), iou)
    return torch.zeros(scores.numel(), dtype=torch.bool, device=boxes.device).index_fill(0, kept, True).view_as(scores)


def soft_nms_scores(boxes: Tensor, scores: Tensor, groups: Tensor, *, sigma: float = 0.5, keep: int = 100) -> Tensor:
    """Scores [M] after Gaussian soft-NMS (arXiv 1704.04503) within each group of an image, exact for the best ``keep``.

    A box's score is multiplied by exp(-IoU^2 / sigma) for every better box of its group; the others become 0.
    """
    left = scores.clone()
    result = torch.zeros_like(scores)
    for _ in range(min(keep, len(scores))):
        best = left.argmax(dim=0, keepdim=True)  # [1]: an index without dimensions would make the host wait for a GPU
        result.scatter_(0, best, left[best])
        overlap = pairwise_iou(boxes[best], boxes)[0] * (groups == groups[best])
        left = left * torch.exp(-(overlap**2) / sigma)
        left.index_fill_(0, best, -1.0)
    return result.clamp(min=0)


@torch.no_grad()
def select_detections(
    probabilities: Tensor,
    boxes: Tensor,
    valid: Tensor,
    *,
    score_threshold: float,
    nms: str,
    nms_iou: float,
    max_detections: int,
) -> RawDetections:
    """Detections from class probabilities [B, N, K], boxes [B, N, 4] or [B, N, K, 4] and validity [B, N].

    ``nms``: "class" within each class, "agnostic" over all, "soft" lowers scores instead of removing boxes.
    """
    batch, _, classes = probabilities.shape
    # the best scores of all boxes and classes: on a CPU those above the threshold, on a GPU a fixed number
    scores = probabilities.masked_fill(~valid[..., None], 0.0).flatten(1)  # [B, N * K]
    above = scores > score_threshold
    limit = MAX_CANDIDATES if not host_sync_is_free(boxes) else int(above.sum(dim=1).amax()) if batch else 0
    scores, rows = scores.topk(torch.sym_min(max(limit, 1), scores.shape[1]), dim=1)  # [B, M]
    labels = rows % classes
    if boxes.dim() == 4:
        candidates = take(boxes.flatten(1, 2), rows)  # [B, M, 4]
    else:
        candidates = take(boxes, torch.div(rows, classes, rounding_mode="floor"))
    # remove low scores and empty boxes
    candidate = (scores > score_threshold) & ((candidates[..., 2:] - candidates[..., :2]).amin(dim=-1) > 0)
    # non-maximum suppression
    groups = torch.zeros_like(labels) if nms == "agnostic" else labels
    if nms == "soft":
        softened = [
            soft_nms_scores(candidates[b], scores[b] * candidate[b], groups[b], keep=max_detections)
            for b in range(batch)
        ]
        scores = torch.stack(softened)
        keep = scores > score_threshold
    else:
        keep = nms_keep(candidates, scores, groups, candidate, nms_iou, runs=[scores.shape[1]], max_keep=max_detections)
    # the best of all classes
    scores = scores * keep
    best = scores.topk(torch.sym_min(max_detections, scores.shape[1]), dim=1)
    found = best.values > 0
    return RawDetections(
        take(candidates, best.indices) * found[..., None],
        best.values,
        take(labels, best.indices) * found,
        found,
    )
