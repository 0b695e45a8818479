"""Region proposal network (arXiv 1506.01497) on a feature pyramid.

B images, A anchors of all levels, N proposals per image (padded).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade_rcnn.models.anchors import AnchorGenerator, padded_sizes
from cascade_rcnn.models.boxes import clip_boxes, decode_boxes, encode_boxes, smooth_l1
from cascade_rcnn.models.matching import choose, match, normalizer, take
from cascade_rcnn.models.postprocess import nms_keep
from cascade_rcnn.structures import Proposals, Targets


@dataclass(frozen=True, kw_only=True)
class RPNDetails:
    """What the published implementations do differently (``models/build.py`` has the table)."""

    samples: int = 256  # anchors per image in the loss
    box_beta: float = 1 / 9  # where the box loss turns from square to absolute
    best_box_iou: float = 0.3  # an object's best anchors are positive from this IoU on
    rematch_best: bool = True
    fixed_normalizer: bool = False  # divide by samples * images instead of by the anchors really sampled
    pre_nms: tuple[int, int] = (2000, 1000)  # per level, train and test
    post_nms: tuple[int, int] = (2000, 1000)  # per image, train and test
    limit_shrinking: bool = True
    nms_iou: float = 0.7
    mask_padding: bool = True  # anchors in a batch's padding take no part
    inside_only: bool = False  # anchors that cross the image's border take no part in the loss
    spread_nms: bool = False  # mmdetection's rounding in NMS
    rank_by_probability: bool = False  # order proposals by float32 probability instead of by logit
    min_size: float = 0.0
    # Detectron
    whole_pixels: bool = False  # boxes keep a pixel when clipped, and those below one are left out
    padding_proposes: bool = False  # in training anchors in a batch's padding propose too
    clip_to_padding: bool = False  # at test time proposals may reach into the image's own padding
    post_nms_of_batch: bool = False  # in training post_nms counts for all images of a batch together
    box_mean_of_images: bool = False  # the box loss is averaged over each image's anchors, then over the images


class RPN(nn.Module):
    """Objectness and box deltas at every anchor; proposals are the best after NMS per level."""

    def __init__(self, channels: int, anchors: AnchorGenerator, *, convs: int = 1, details: RPNDetails) -> None:
        super().__init__()
        self.anchors = anchors
        self.details = details
        if convs == 1:
            self.conv: nn.Module = nn.Conv2d(channels, channels, 3, padding=1)
        else:
            layers = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(convs)]
            between = [(nn.ReLU(), conv) if i else (conv,) for i, conv in enumerate(layers)]
            self.conv = nn.Sequential(*[module for pair in between for module in pair])
        self.objectness = nn.Conv2d(channels, anchors.per_cell, 1)
        self.deltas = nn.Conv2d(channels, anchors.per_cell * 4, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        self.register_buffer("stds", torch.ones(4), persistent=False)
        self.stds: Tensor

    def forward(self, pyramid: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Logits [B, H*W*A] and deltas [B, H*W*A, 4] of each level, in the order of the anchors."""
        logits, deltas = [], []
        for feature in pyramid:
            x = F.relu(self.conv(feature), inplace=True)
            logits.append(self.objectness(x).permute(0, 2, 3, 1).flatten(1).float())
            deltas.append(self.deltas(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4).float())
        return logits, deltas

    def loss(self, pyramid: list[Tensor], sizes: Tensor, targets: Targets) -> tuple[dict[str, Tensor], Proposals]:
        """Losses ``rpn_cls`` and ``rpn_box``, and the proposals for the first stage (without gradient)."""
        shapes = [(f.shape[-2], f.shape[-1]) for f in pyramid]
        logits, deltas = self(pyramid)
        levels = self.anchors(shapes)
        proposals = self._proposals(logits, deltas, levels, shapes, sizes, training=True)
        losses = self._losses(torch.cat(logits, 1), torch.cat(deltas, 1), torch.cat(levels), shapes, sizes, targets)
        return losses, proposals

    def propose(self, pyramid: list[Tensor], sizes: Tensor) -> Proposals:
        """Proposals [B, N, 4] of images of ``sizes`` [B, 2], sorted by falling score."""
        shapes = [(f.shape[-2], f.shape[-1]) for f in pyramid]
        logits, deltas = self(pyramid)
        return self._proposals(logits, deltas, self.anchors(shapes), shapes, sizes, training=False)

    def _usable(self, shapes: list[tuple[int, int]], sizes: Tensor, *, training: bool) -> Tensor:
        inside = self.anchors.inside(shapes, sizes)
        masked = self.details.mask_padding and not (training and self.details.padding_proposes)
        return inside if masked else torch.ones_like(inside)

    def _losses(
        self,
        logits: Tensor,  # [B, A]
        deltas: Tensor,  # [B, A, 4]
        anchors: Tensor,  # [A, 4]
        shapes: list[tuple[int, int]],
        sizes: Tensor,
        targets: Targets,
    ) -> dict[str, Tensor]:
        details = self.details
        batch = logits.shape[0]
        boxes = anchors.expand(batch, -1, -1)
        usable = self._usable(shapes, sizes, training=True)
        if details.inside_only:
            limits = sizes.flip(-1)[:, None] + int(details.whole_pixels)  # [B, 1, 2] as (w, h)
            usable = usable & (boxes[..., :2] >= 0).all(-1) & (boxes[..., 2:] < limits).all(-1)
        matches = match(
            boxes,
            usable,
            targets,
            positive_iou=0.7,
            negative_iou=0.3,
            best_box_iou=details.best_box_iou,
            rematch_best=details.rematch_best,
        )
        rows, valid, positive, positives = choose(matches, details.samples, positive_share=0.5)
        cls = F.binary_cross_entropy_with_logits(take(logits, rows), positive.float(), reduction="none")
        rows, positive = rows[:, :positives], positive[:, :positives]
        wanted = encode_boxes(take(boxes, rows), take(targets.boxes, take(matches.index, rows)), self.stds)
        box = smooth_l1(take(deltas, rows), wanted, details.box_beta)  # [B, P, 4]
        if details.fixed_normalizer:
            total = torch.full((), float(details.samples * batch), device=logits.device)
        else:
            total = normalizer(valid.sum())
        box = torch.where(positive[..., None], box, 0.0)
        if details.box_mean_of_images:
            box_loss = (box.sum(dim=(1, 2)) / valid.sum(dim=1).clamp(min=1)).mean()
        else:
            box_loss = box.sum() / total
        return {"rpn_cls": torch.where(valid, cls, 0.0).sum() / total, "rpn_box": box_loss}

    @torch.no_grad()
    def _proposals(
        self,
        logits: list[Tensor],
        deltas: list[Tensor],
        levels: list[Tensor],
        shapes: list[tuple[int, int]],
        sizes: Tensor,
        *,
        training: bool,
    ) -> Proposals:
        details = self.details
        pre_nms, post_nms = (pair[0 if training else 1] for pair in (details.pre_nms, details.post_nms))
        usable = self._usable(shapes, sizes, training=training).split([len(anchors) for anchors in levels], dim=1)
        if details.clip_to_padding and not training:
            sizes = padded_sizes(sizes)
        scores, groups, best_anchors, best_deltas = [], [], [], []
        for level, anchors in enumerate(levels):
            score = logits[level].detach().masked_fill(~usable[level], -torch.inf)
            score, rows = score.topk(min(pre_nms, score.shape[1]), dim=1)
            if details.rank_by_probability:
                # Near 1 float32 probabilities of different logits are equal; then the earlier anchor comes first.
                rows = rows.sort(dim=1).values
                score = logits[level].detach().sigmoid().masked_fill(~usable[level], -torch.inf).gather(1, rows)
                score, order = score.sort(dim=1, descending=True, stable=True)
                rows = rows.gather(1, order)
            scores.append(score)
            groups.append(torch.full_like(rows, level))
            best_anchors.append(take(anchors.expand(len(score), -1, -1), rows))
            best_deltas.append(take(deltas[level].detach(), rows))
        score, group = torch.cat(scores, 1), torch.cat(groups, 1)  # [B, M]
        anchor, delta = torch.cat(best_anchors, 1), torch.cat(best_deltas, 1)  # [B, M, 4]
        box = decode_boxes(delta, anchor, self.stds, limit_shrinking=details.limit_shrinking)
        box = clip_boxes(box, sizes, whole_pixels=details.whole_pixels)
        side = (box[..., 2:] - box[..., :2]).amin(dim=-1)
        real = torch.isfinite(score) & (side >= 1 if details.whole_pixels else side > details.min_size)
        keep = nms_keep(
            box,
            score,
            group,
            real,
            details.nms_iou,
            spread=details.spread_nms,
            runs=[one.shape[1] for one in scores],
            most=post_nms,
        )
        score = score.masked_fill(~keep, -torch.inf)
        if details.post_nms_of_batch and training:
            least = score.flatten().topk(min(post_nms, score.numel())).values[-1]
            score = score.masked_fill(score < least, -torch.inf)
        score, rows = score.topk(min(post_nms, score.shape[1]), dim=1)
        valid = torch.isfinite(score)
        return Proposals(take(box, rows) * valid[..., None], score, valid)
