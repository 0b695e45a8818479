"""Which box is assigned to which object, and which boxes enter a loss.

B images, N boxes, G objects (padded), S samples. Pairwise tables are computed in chunks of bounded size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from cascade_rcnn.models.boxes import pairwise_iof, pairwise_iou
from cascade_rcnn.models.ops.capabilities import exporting
from cascade_rcnn.structures import Targets

MAX_TABLE = 1 << 24  # entries of a pairwise table held at once (64 MB in float32)
MAX_TABLE_CPU = 1 << 18  # so that it stays in the cache: 1.2 s instead of 3.9 s for 268,569 anchors and 1,000 objects
IGNORED_SHARE = 0.5  # a negative with more than this share of its area inside an ignored region is left out of the loss


@dataclass
class Matches:
    """The object and the role of each box; rows that are neither positive nor negative are left out of the loss."""

    index: Tensor  # int64 [B, N], row of the object with the largest IoU (any row where there is none)
    positive: Tensor  # bool [B, N]
    negative: Tensor  # bool [B, N]


@dataclass
class Samples:
    """Boxes chosen for a stage's loss; rows that are not ``valid`` are padding."""

    boxes: Tensor  # float32 [B, S, 4]
    valid: Tensor  # bool [B, S]
    positive: Tensor  # bool [B, S]
    index: Tensor  # int64 [B, S], row of the matched object (any row where there is none)
    matched_boxes: Tensor  # float32 [B, S, 4] of that object
    matched_labels: Tensor  # int64 [B, S] of that object
    is_truth: Tensor  # bool [B, S], rows that are ground-truth boxes added to the proposals
    max_positives: int  # number of leading rows that can be positive


def host_sync_is_free(tensor: Tensor) -> bool:
    """Whether the host may read values: on a GPU it would have to wait for them."""
    return tensor.device.type == "cpu" and not exporting()


def rows_in_use(valid: Tensor) -> int:
    """How many leading rows of ``valid`` [B, N] to compute: on a CPU those up to the last valid one, on a GPU all."""
    if not host_sync_is_free(valid) or valid.shape[1] == 0:
        return int(valid.shape[1])
    used = valid.any(dim=0).nonzero()
    return int(used[-1]) + 1 if len(used) else 1


def _rows_at_once(objects: Tensor) -> int:
    entries = MAX_TABLE_CPU if host_sync_is_free(objects) else MAX_TABLE
    return max(1, entries // max(1, objects.shape[0] * objects.shape[1]))


def _best(boxes: Tensor, valid: Tensor, objects: Tensor, object_valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Largest IoU [B, N] of each box [B, N, 4] with the valid objects [B, G, 4] of its image, that object's row
    [B, N], and each object's largest IoU [B, G] with a valid box.
    """
    chunk = _rows_at_once(objects)
    values, rows = [], []
    best = boxes.new_full(objects.shape[:2], -1.0)
    for part, part_valid in zip(boxes.split(chunk, dim=1), valid.split(chunk, dim=1)):
        table = pairwise_iou(part, objects).masked_fill_(~object_valid[:, None], -1.0)  # [B, n, G]
        value, row = table.max(dim=2)
        values.append(value)
        rows.append(row)
        best = torch.maximum(best, table.masked_fill_(~part_valid[..., None], -1.0).amax(dim=1))
    return torch.cat(values, dim=1), torch.cat(rows, dim=1), best


def _owners(boxes: Tensor, valid: Tensor, objects: Tensor, best: Tensor, iou: Tensor, *, min_iou: float) -> Tensor:
    """For each box [B, N] the last object (1-based) whose best box it is, or 0.

    An object's best boxes are all that share its largest IoU ``best`` [B, G], if that is at least ``min_iou``. ``iou``
    [B, N] is each box's own largest: a box below every object's best cannot be one (used image by image on a CPU).
    """
    chunk = _rows_at_once(objects)
    eligible = (best >= min_iou) & (best > 0)
    number = torch.arange(1, objects.shape[1] + 1, device=boxes.device)

    def owned(part: Tensor, part_valid: Tensor) -> Tensor:
        is_best = (pairwise_iou(part, objects) == best[:, None]) & eligible[:, None] & part_valid[..., None]
        return is_best.to(torch.int64).mul_(number).amax(dim=2)

    if not host_sync_is_free(boxes):
        return torch.cat([owned(*pair) for pair in zip(boxes.split(chunk, dim=1), valid.split(chunk, dim=1))], dim=1)
    lowest = best[eligible].amin() if eligible.any() else torch.inf
    owners = torch.zeros_like(iou, dtype=torch.int64)
    for rows in (valid & (iou >= lowest))[0].nonzero().squeeze(1).split(chunk):
        owners[:, rows] = owned(boxes[:, rows], valid[:, rows])
    return owners


def ignored_by_regions(boxes: Tensor, regions: Tensor, ignore: Tensor) -> Tensor:
    """Boxes [B, N] that lie mostly inside a region [B, G, 4] of their image that is marked as ignored [B, G]."""
    if host_sync_is_free(boxes) and not ignore.any():
        return torch.zeros(boxes.shape[:2], dtype=torch.bool)
    parts = [
        pairwise_iof(part, regions).masked_fill(~ignore[:, None], 0.0).amax(dim=2) > IGNORED_SHARE
        for part in boxes.split(_rows_at_once(regions), dim=1)
    ]
    return torch.cat(parts, dim=1)


@torch.no_grad()
def match(
    boxes: Tensor,
    valid: Tensor,
    targets: Targets,
    *,
    positive_iou: float,
    negative_iou: float,
    best_box_iou: float | None = None,
    rematch_best: bool = True,
) -> Matches:
    """Match boxes [B, N, 4] (those that are ``valid`` [B, N]) with the objects of their images.

    Positive: IoU >= ``positive_iou``; negative: IoU < ``negative_iou``. With ``best_box_iou`` every object's best boxes
    are positive too if their IoU reaches it (the RPN's rule); ``rematch_best`` then hands them to that object
    (mmdetection) instead of keeping the object they overlap most (detectron2, torchvision).
    """

    def of_images(images: slice) -> tuple[Tensor, Tensor, Tensor]:
        some, some_valid, objects = boxes[images], valid[images], targets.boxes[images]
        iou, index, best = _best(some, some_valid, objects, targets.valid[images])
        positive = (iou >= positive_iou) & some_valid
        negative = (iou < negative_iou) & some_valid
        if best_box_iou is not None:
            owner = _owners(some, some_valid, objects, best, iou, min_iou=best_box_iou)
            positive = positive | (owner > 0)
            if rematch_best:
                index = torch.where(owner > 0, owner - 1, index)
        negative = negative & ~positive & ~ignored_by_regions(some, objects, targets.ignore[images])
        return index, positive, negative

    # A CPU takes image by image, whose tables stay in its cache; a GPU takes all at once, in few launches.
    together = 1 if host_sync_is_free(boxes) else max(1, len(boxes))
    found = [of_images(slice(start, start + together)) for start in range(0, len(boxes), together)]
    return Matches(*(torch.cat(column) for column in zip(*found)))


def choose(matches: Matches, count: int, *, positive_share: float) -> tuple[Tensor, Tensor, Tensor, int]:
    """Choose ``count`` rows at random, at most ``positive_share`` of them positive, the rest negative.

    Returns rows [B, S], their validity [B, S], whether they are positive [B, S], and how many leading rows can be
    positive. S = min(count, N) whatever the data holds.
    """
    total = matches.positive.shape[1]
    positives = min(int(count * positive_share), total)
    count = min(count, total)
    key = torch.rand(matches.positive.shape, device=matches.positive.device)

    def first(mask: Tensor, number: int) -> tuple[Tensor, Tensor]:
        values, rows = torch.where(mask, key, -1.0).topk(number, dim=1)
        return values >= 0, rows

    taken, rows = first(matches.positive, positives)
    chosen_positive = torch.zeros_like(matches.positive).scatter(1, rows, taken)
    free = count - taken.sum(dim=1, keepdim=True)
    taken, rows = first(matches.negative, count)
    taken = taken & (torch.arange(count, device=rows.device) < free)
    chosen_negative = torch.zeros_like(matches.negative).scatter(1, rows, taken)
    order = chosen_positive * 2 + chosen_negative + key * 0.5  # positives, negatives, the rest
    rows = order.topk(count, dim=1).indices  # [B, S]
    is_positive = chosen_positive.gather(1, rows)
    return rows, is_positive | chosen_negative.gather(1, rows), is_positive, positives


def take(values: Tensor, rows: Tensor) -> Tensor:
    """Rows [B, S] of ``values`` [B, N] or [B, N, D]."""
    if values.dim() == 2:
        return values.gather(1, rows)
    return values.gather(1, rows[..., None].expand(-1, -1, values.shape[-1]))


def normalizer(count: Tensor) -> Tensor:
    """A loss's divisor: ``count`` averaged over the processes, at least 1.

    Averaging the processes' gradients then gives exactly the gradient of one process with the whole batch.
    """
    count = count.detach().float().reshape(())
    if dist.is_available() and dist.is_initialized() and (processes := dist.get_world_size()) > 1:
        count = count.clone()
        dist.all_reduce(count)
        return count.clamp(min=1.0) / processes  # not below what one process with the whole batch would divide by
    return count.clamp(min=1.0)
