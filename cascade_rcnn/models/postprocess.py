"""From class scores and boxes to detections: thresholds and non-maximum suppression.

B images, M candidates per image (padded), K classes, D detections per image (padded).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from cascade_rcnn.models.boxes import pairwise_iou
from cascade_rcnn.models.matching import take
from cascade_rcnn.models.ops.capabilities import has_triton
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
    spread: bool = False,
    runs: Sequence[int] | None = None,
    most: int = 1 << 30,
) -> Tensor:
    """Which boxes [B, M] survive greedy NMS among the valid ones of the same image and group.

    ``boxes`` [B, M, 4], ``scores``, ``groups`` (non-negative) and ``valid`` [B, M]. ``spread`` moves each group to a
    place of its own first, as mmdetection does: it changes nothing but the rounding of the IoU, which decides ties at
    the limit. The last two save time on a GPU: ``runs``, lengths of the parts of M that are in falling order of score
    and have no group in common; ``most``, how many boxes the caller will use at most, of an image and the best first.
    """
    batch, count = scores.shape
    if spread and count:
        boxes = boxes + (groups * (boxes.flatten(1).amax(dim=1, keepdim=True) + 1)).unsqueeze(-1)
    if boxes.is_cuda and has_triton():
        from cascade_rcnn.models.ops.nms_triton import nms_mask

        return nms_mask(boxes, scores, groups, valid, iou, runs=runs, most=most)
    image = torch.arange(batch, device=boxes.device)[:, None]
    group = groups * batch + image
    # Boxes that are no candidates go into a group of their own, so that shapes stay fixed; on a CPU they are left out.
    rows = valid.flatten().nonzero().squeeze(1) if boxes.device.type == "cpu" else None
    if rows is None:
        group = torch.where(valid, group, -1 - image)
    flat = (boxes.flatten(0, 1), scores.masked_fill(~valid, -1e30).flatten(), group.flatten())
    if rows is not None:
        flat = (flat[0][rows], flat[1][rows], flat[2][rows])
    kept = batched_nms(*flat, iou)
    keep = torch.zeros(batch * count, dtype=torch.bool, device=boxes.device)
    keep[kept if rows is None else rows[kept]] = True
    return keep.view(batch, count) & valid


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
    scores = probabilities.masked_fill(~valid[..., None], 0.0).flatten(1)  # [B, N * K]
    wanted = scores > score_threshold
    limit = MAX_CANDIDATES if boxes.device.type != "cpu" else int(wanted.sum(dim=1).amax()) if batch else 0
    scores, rows = scores.topk(min(max(limit, 1), scores.shape[1]), dim=1)  # [B, M]
    wanted = scores > score_threshold
    labels = rows % classes
    if boxes.dim() == 4:
        candidates = take(boxes.flatten(1, 2), rows)  # [B, M, 4]
    else:
        candidates = take(boxes, torch.div(rows, classes, rounding_mode="floor"))
    wanted = wanted & ((candidates[..., 2:] - candidates[..., :2]).amin(dim=-1) > 0)
    groups = torch.zeros_like(labels) if nms == "agnostic" else labels
    if nms == "soft":
        softened = [
            soft_nms_scores(candidates[b], scores[b] * wanted[b], groups[b], keep=max_detections) for b in range(batch)
        ]
        scores = torch.stack(softened)
        keep = scores > score_threshold
    else:
        keep = nms_keep(candidates, scores, groups, wanted, nms_iou, runs=[scores.shape[1]], most=max_detections)
    scores = scores * keep
    best = scores.topk(min(max_detections, scores.shape[1]), dim=1)
    found = best.values > 0
    return RawDetections(
        take(candidates, best.indices) * found[..., None],
        best.values,
        take(labels, best.indices) * found,
        found,
    )
