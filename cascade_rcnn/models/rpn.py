"""Region proposal network (arXiv 1506.01497) on a feature pyramid.

B images, L levels, A anchors of all levels (A_l of one), M candidates for NMS, N proposals per image (padded).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade_rcnn.models.anchors import AnchorGenerator
from cascade_rcnn.models.boxes import clip_boxes, decode_boxes, encode_boxes, smooth_l1
from cascade_rcnn.models.matching import choose, match, normalizer, take
from cascade_rcnn.models.postprocess import nms_keep
from cascade_rcnn.structures import Proposals, Targets

RPNOutputs = tuple[list[Tensor], list[Tensor]]  # logits [B, A_l] and deltas [B, A_l, 4] of each level


@dataclass(frozen=True, kw_only=True)
class RPNDetails:
    """What the published implementations do differently (``models/build.py`` has the table)."""

    samples: int = 256  # anchors per image in the loss
    box_beta: float = 1 / 9  # where the box loss changes from quadratic to linear
    best_box_iou: float = 0.3  # an object's best anchors are positive at this IoU or more
    rematch_best: bool = True
    fixed_normalizer: bool = False  # divide by samples * images instead of by the number of sampled anchors
    pre_nms: tuple[int, int] = (2000, 1000)  # per level, train and test
    post_nms: tuple[int, int] = (2000, 1000)  # per image, train and test
    limit_shrinking: bool = True
    nms_iou: float = 0.7
    mask_padding: bool = True  # anchors in a batch's padding are ignored
    inside_only: bool = False  # anchors that cross the image's border are left out of the loss
    offset_levels: bool = False  # mmdetection's rounding in NMS
    rank_by_probability: bool = False  # order proposals by float32 probability instead of by logit


@dataclass
class AnchorPredictions:
    """The network's outputs for every anchor, level by level."""

    logits: list[Tensor]  # [B, A_l]
    deltas: list[Tensor]  # [B, A_l, 4]
    anchors: list[Tensor]  # [A_l, 4]
    valid: Tensor  # bool [B, A]; False in the part of the padding that is not the image's own


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

    def forward(self, pyramid: list[Tensor]) -> RPNOutputs:
        """Logits [B, H*W*A] and deltas [B, H*W*A, 4] of each level, in the order of the anchors."""
        logits, deltas = [], []
        for feature in pyramid:
            x = F.relu(self.conv(feature), inplace=True)
            logits.append(self.objectness(x).permute(0, 2, 3, 1).flatten(1).float())
            deltas.append(self.deltas(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4).float())
        return logits, deltas

    def loss(self, pyramid: list[Tensor], sizes: Tensor, targets: Targets) -> tuple[dict[str, Tensor], Proposals]:
        """Losses ``rpn_cls`` and ``rpn_box``, and the proposals for the first stage (without gradient)."""
        predictions = self._predictions(pyramid, self(pyramid), sizes, training=True)
        proposals = self._proposals(predictions, sizes, training=True)
        return self._losses(predictions, sizes, targets), proposals

    def propose(self, pyramid: list[Tensor], sizes: Tensor, outputs: RPNOutputs | None = None) -> Proposals:
        """Proposals [B, N, 4] of images of ``sizes`` [B, 2], sorted by descending score.

        ``outputs``: the result of :meth:`forward` for this pyramid, if it has already run (compiled with the backbone).
        """
        predictions = self._predictions(pyramid, outputs or self(pyramid), sizes, training=False)
        return self._proposals(predictions, sizes, training=False)

    def _predictions(
        self, pyramid: list[Tensor], outputs: RPNOutputs, sizes: Tensor, *, training: bool
    ) -> AnchorPredictions:
        shapes = [(feature.shape[-2], feature.shape[-1]) for feature in pyramid]
        valid = self.anchors.unpadded(shapes, sizes)
        if not self._leaves_padding_out(training):
            valid = torch.ones_like(valid)
        return AnchorPredictions(*outputs, self.anchors(shapes), valid)

    # Training

    def _losses(self, predictions: AnchorPredictions, sizes: Tensor, targets: Targets) -> dict[str, Tensor]:
        details = self.details
        logits, deltas = torch.cat(predictions.logits, 1), torch.cat(predictions.deltas, 1)  # [B, A], [B, A, 4]
        batch = logits.shape[0]
        anchors = torch.cat(predictions.anchors).expand(batch, -1, -1)  # [B, A, 4]
        valid = predictions.valid
        if details.inside_only:
            valid = valid & self._inside_image(anchors, sizes)
        # match anchors with objects
        matches = match(
            anchors,
            valid,
            targets,
            positive_iou=0.7,
            negative_iou=0.3,
            best_box_iou=details.best_box_iou,
            rematch_best=details.rematch_best,
        )
        # sample anchors, half of them positive if there are enough
        rows, drawn, positive, max_positives = choose(matches, details.samples, positive_share=0.5)
        if details.fixed_normalizer:
            total = torch.full((), float(details.samples * batch), device=logits.device)
        else:
            total = normalizer(drawn.sum())
        # objectness of the whole sample
        cls = F.binary_cross_entropy_with_logits(take(logits, rows), positive.float(), reduction="none")
        # boxes of the positives, which come first
        rows, positive = rows[:, :max_positives], positive[:, :max_positives]
        wanted = encode_boxes(take(anchors, rows), take(targets.boxes, take(matches.index, rows)), self.stds)
        box = smooth_l1(take(deltas, rows), wanted, details.box_beta)  # [B, P, 4]
        box = torch.where(positive[..., None], box, 0.0)
        return {
            "rpn_cls": torch.where(drawn, cls, 0.0).sum() / total,
            "rpn_box": self._mean_box_loss(box, drawn, total),
        }

    # Proposals

    @torch.no_grad()
    def _proposals(self, predictions: AnchorPredictions, sizes: Tensor, *, training: bool) -> Proposals:
        details = self.details
        pre_nms, post_nms = (pair[0 if training else 1] for pair in (details.pre_nms, details.post_nms))
        # the best of each level by objectness, before NMS
        valid = predictions.valid.split([anchors.shape[0] for anchors in predictions.anchors], dim=1)
        scores, levels, anchors, deltas = [], [], [], []
        for level, (logits, level_valid) in enumerate(zip(predictions.logits, valid)):
            score, rows = self._best_of_level(logits.detach(), level_valid, pre_nms)
            scores.append(score)
            levels.append(torch.full_like(rows, level))
            anchors.append(take(predictions.anchors[level].expand(score.shape[0], -1, -1), rows))
            deltas.append(take(predictions.deltas[level].detach(), rows))
        score, level_of = torch.cat(scores, 1), torch.cat(levels, 1)  # [B, M]
        # their boxes, clipped to the image
        boxes = decode_boxes(
            torch.cat(deltas, 1), torch.cat(anchors, 1), self.stds, limit_shrinking=details.limit_shrinking
        )
        boxes = self._clip(boxes, sizes, training=training)  # [B, M, 4]
        # remove empty boxes
        candidate = torch.isfinite(score) & self._has_extent(boxes)
        # non-maximum suppression within each level
        keep = nms_keep(
            boxes,
            score,
            level_of,
            candidate,
            details.nms_iou,
            offset_groups=details.offset_levels,
            runs=[one.shape[1] for one in scores],
            max_keep=post_nms,
        )
        score = score.masked_fill(~keep, -torch.inf)
        # the best of all levels
        if training:
            score = self._limit_per_batch(score, post_nms)
        score, rows = score.topk(torch.sym_min(post_nms, score.shape[1]), dim=1)
        found = torch.isfinite(score)
        return Proposals(take(boxes, rows) * found[..., None], found, score)

    def _best_of_level(self, logits: Tensor, valid: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The best ``count`` valid anchors of a level by ``logits`` [B, A_l]: scores [B, n], falling, and their rows.

        Scores are -inf where fewer anchors are valid.
        """
        score, rows = logits.masked_fill(~valid, -torch.inf).topk(torch.sym_min(count, logits.shape[1]), dim=1)
        if not self.details.rank_by_probability:
            return score, rows
        # Near 1 float32 probabilities of different logits are equal; then the earlier anchor comes first.
        rows = rows.sort(dim=1).values
        score = logits.sigmoid().masked_fill(~valid, -torch.inf).gather(1, rows)
        score, order = score.sort(dim=1, descending=True, stable=True)
        return score, rows.gather(1, order)

    # What Detectron does differently (detectron_rules.py)

    def _leaves_padding_out(self, training: bool) -> bool:
        """Whether anchors in a batch's padding are ignored."""
        return self.details.mask_padding

    def _inside_image(self, anchors: Tensor, sizes: Tensor) -> Tensor:
        """Anchors [B, A, 4] that do not cross their image's border, bool [B, A]."""
        limits = sizes.flip(-1)[:, None]  # [B, 1, 2] as (w, h)
        return (anchors[..., :2] >= 0).all(-1) & (anchors[..., 2:] < limits).all(-1)

    def _mean_box_loss(self, box: Tensor, drawn: Tensor, total: Tensor) -> Tensor:
        """One number from the box loss [B, P, 4] (0 where not positive); ``drawn`` [B, S] marks the sample."""
        return box.sum() / total

    def _clip(self, boxes: Tensor, sizes: Tensor, *, training: bool) -> Tensor:
        return clip_boxes(boxes, sizes)

    def _has_extent(self, boxes: Tensor) -> Tensor:
        return (boxes[..., 2:] - boxes[..., :2]).amin(dim=-1) > 0

    def _limit_per_batch(self, score: Tensor, count: int) -> Tensor:
        """In training: scores [B, M], -inf beyond the batch's number of proposals."""
        return score
