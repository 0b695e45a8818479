"""Cascade of box heads (arXiv 1906.09756, section 4): each stage trains on the boxes refined by the stage before.

B images, N boxes per image (padded, ``valid`` marks the boxes), S samples, G objects, K classes (K: background),
xyxy pixels of the network input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade_rcnn.models.boxes import clip_boxes, decode_boxes, encode_boxes, iou_loss, smooth_l1
from cascade_rcnn.models.class_losses import Seesaw
from cascade_rcnn.models.mask_head import MaskHead, MaskSamples, mask_loss, mask_targets
from cascade_rcnn.models.matching import (
    Matches,
    Samples,
    choose,
    host_sync_is_free,
    match,
    normalizer,
    rows_in_use,
    take,
)
from cascade_rcnn.models.ops.capabilities import exporting
from cascade_rcnn.models.ops.roi_align import roi_align, roi_align_listed, roi_align_rows
from cascade_rcnn.models.ops.roi_sampling import Sampling
from cascade_rcnn.models.postprocess import select_detections
from cascade_rcnn.rounding import round_up
from cascade_rcnn.structures import ImageBatch, Proposals, RawDetections, Targets


@dataclass(frozen=True, kw_only=True)
class StageDetails:
    """The numbers of one stage (``models/build.py`` has the table of what the published implementations do)."""

    iou: float  # a box is positive at this IoU with an object or more, else negative
    stds: tuple[float, ...]  # of the four deltas
    loss_weight: float
    mask_weight: float
    samples: int | None = 512  # RoIs per image in the loss, a quarter of them positive; None: all boxes
    add_truth: bool = True  # ground-truth boxes take part
    keep_truth: bool = False  # and are handed on to the next stage
    box_beta: float = 1.0  # where the box loss changes from quadratic to linear; 0: L1
    box_loss: str = "smooth_l1"  # of the deltas; "giou", "diou", "ciou": of the boxes that they give
    box_loss_weight: float = 1.0
    feature_gradient: float = 1.0  # factor on the gradient from the box head into the RoI features
    limit_shrinking: bool = True


@dataclass(frozen=True, kw_only=True)
class CascadeDetails:
    """Settings of all stages together."""

    mean_of_logits: bool = True  # the ensemble averages logits (mmdetection) or probabilities
    masks: str = "none"  # "every", "last" or "one" (trained on stage 1's samples)
    score_threshold: float = 0.05
    nms: str = "class"
    nms_iou: float = 0.5
    max_detections: int = 100


# Of the score threshold: a proposal whose score so far is below this share is not taken further (``--stages auto``).
# Later stages have not lifted one from there over the threshold in what docs/speed.md measures; at 1 they have.
HOPELESS = 0.2


@dataclass(frozen=True)
class Followed:
    """Given boxes on their way through S stages, each entry one stage's."""

    unmoved: Tensor  # [S, B, N, K + 1] class probabilities at the boxes as they were given
    probs: Tensor  # [S, B, N, K + 1] at the boxes as the stage before has moved them
    boxes: Tensor  # [S, B, N, 4] as this stage moves them


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """``x`` itself, whose gradient is multiplied by ``factor`` on its way back."""
    return x if factor == 1.0 else x * factor + x.detach() * (1 - factor)


class Stage(nn.Module):
    """One stage: which boxes it learns from, what it learns from them, and where it moves them.

    Its network is ``Cascade.box_heads[k]``, as checkpoints name it.
    """

    def __init__(self, details: StageDetails, class_loss: nn.Module | None = None) -> None:
        super().__init__()
        self.details = details
        self.class_loss = class_loss  # None: cross entropy
        self.register_buffer("stds", torch.tensor(list(details.stds)), persistent=False)  # [4]
        self.stds: Tensor

    def sample(self, proposals: Proposals, targets: Targets) -> Samples:
        """The RoIs of the loss: boxes, with ground truth among them, matched with the objects and sampled at random."""
        boxes, valid = proposals.boxes, proposals.valid
        if self.details.add_truth:  # at first no other box overlaps its object enough
            boxes, valid = torch.cat([targets.boxes, boxes], 1), torch.cat([targets.valid, valid], 1)  # [B, G + N, ..]
        return self.draw(boxes, self.match(boxes, valid, targets), targets)

    def match(self, boxes: Tensor, valid: Tensor, targets: Targets) -> Matches:
        """The object of each box [B, N, 4]; with ``add_truth`` the first G boxes are the objects themselves."""
        matches = match(boxes, valid, targets, positive_iou=self.details.iou, negative_iou=self.details.iou)
        if self.details.add_truth:  # each matches itself, even when two are identical or one is empty
            truth, count = targets.valid, targets.valid.shape[1]
            itself = torch.arange(count, device=truth.device).expand_as(truth)
            matches.index = torch.cat([torch.where(truth, itself, 0), matches.index[:, count:]], dim=1)
            matches.positive = torch.cat([truth, matches.positive[:, count:]], dim=1)
        return matches

    def draw(self, boxes: Tensor, matches: Matches, targets: Targets) -> Samples:
        """``samples`` of the boxes [B, N, 4], or all of them in their order."""
        if self.details.samples is None:
            valid, positive = matches.positive | matches.negative, matches.positive
            rows = torch.arange(boxes.shape[1], device=boxes.device).expand_as(valid)
            max_positives = boxes.shape[1]
        else:
            rows, valid, positive, max_positives = choose(matches, self.details.samples, positive_share=0.25)
            count = rows_in_use(valid)
            rows, valid, positive = rows[:, :count], valid[:, :count], positive[:, :count]
        index = take(matches.index, rows)
        truths = targets.valid.shape[1] if self.details.add_truth else 0
        return Samples(
            boxes=take(boxes, rows),
            valid=valid,
            positive=positive,
            index=index,
            matched_boxes=take(targets.boxes, index),
            matched_labels=take(targets.labels, index),
            is_truth=valid & (rows < truths),
            max_positives=min(max_positives, rows.shape[1]),
        )

    def loss(self, logits: Tensor, deltas: Tensor, samples: Samples) -> dict[str, Tensor]:
        """Weighted losses ``cls`` and ``box`` of the head's outputs for the samples.

        ``logits`` [B, S, K + 1], ``deltas`` [B, S, 4], or [B, S, 4 K] of a class-specific head.
        """
        total = normalizer(samples.valid.sum())
        # class of every sample
        background = logits.shape[-1] - 1
        wanted_class = torch.where(samples.positive, samples.matched_labels, background)
        cls = self._class_loss(logits.flatten(0, 1), wanted_class.flatten(), samples.valid.flatten())
        cls = cls.view_as(wanted_class)
        # deltas of the positives, which come first
        front = samples.max_positives
        deltas = deltas_of_labels(deltas[:, :front], samples.matched_labels[:, :front])
        box = self._box_loss(deltas, samples.boxes[:, :front], samples.matched_boxes[:, :front])
        box_weight = self.details.loss_weight * self.details.box_loss_weight
        return {
            "cls": torch.where(samples.valid, cls, 0.0).sum() / total * self.details.loss_weight,
            "box": torch.where(samples.positive[:, :front, None], box, 0.0).sum() / total * box_weight,
        }

    def _class_loss(self, logits: Tensor, wanted: Tensor, valid: Tensor) -> Tensor:
        """Loss [M] of logits [M, K + 1] whose right classes are ``wanted`` [M], padding where not ``valid``."""
        if self.class_loss is None:
            return F.cross_entropy(logits, wanted, reduction="none")
        if isinstance(self.class_loss, Seesaw) and self.training and torch.is_grad_enabled():
            self.class_loss.count(wanted, valid)
        loss: Tensor = self.class_loss(logits, wanted)
        return loss

    def _box_loss(self, deltas: Tensor, boxes: Tensor, wanted: Tensor) -> Tensor:
        """Loss [B, P, 4], or [B, P, 1] of whole boxes, where ``deltas`` [B, P, 4] move ``boxes`` beside ``wanted``."""
        if self.details.box_loss == "smooth_l1":
            return smooth_l1(deltas, encode_boxes(boxes, wanted, self.stds), self.details.box_beta)
        return iou_loss(self.decode(deltas, boxes), wanted, kind=self.details.box_loss)[..., None]

    @torch.no_grad()
    def refine(self, logits: Tensor, deltas: Tensor, samples: Samples, sizes: Tensor) -> Proposals:
        """The samples after the head has moved them: what the next stage learns from (no gradient flows through)."""
        # a class-specific head moves positives by their object's class, other boxes by their predicted class
        labels = torch.where(samples.positive, samples.matched_labels, most_likely(logits))
        boxes = self.move(deltas, samples.boxes, labels, sizes)
        # drop ground truth: a trained cascade has none
        valid = samples.valid if self.details.keep_truth else samples.valid & ~samples.is_truth
        # remove empty boxes
        valid = valid & ((boxes[..., 2:] - boxes[..., :2]).amin(dim=-1) > 0)
        return Proposals(boxes * valid[..., None], valid)

    def move(self, deltas: Tensor, boxes: Tensor, labels: Tensor, sizes: Tensor) -> Tensor:
        """Boxes [B, N, 4] where ``deltas`` (of each box's class ``labels`` [B, N]) move them, clipped to the images."""
        return clip_boxes(self.decode(deltas_of_labels(deltas, labels), boxes), sizes)

    def move_every_class(self, deltas: Tensor, boxes: Tensor, sizes: Tensor) -> Tensor:
        """Boxes [B, N, 4], or [B, N, K, 4] from a class-specific head, clipped to the images."""
        return clip_boxes(self.decode_every_class(deltas, boxes), sizes)

    def decode(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        return decode_boxes(deltas, boxes, self.stds, limit_shrinking=self.details.limit_shrinking)

    def decode_every_class(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        if deltas.shape[-1] > 4:
            deltas, boxes = deltas.unflatten(-1, (-1, 4)), boxes[:, :, None]  # [B, N, K, 4], [B, N, 1, 4]
        return self.decode(deltas, boxes)


def most_likely(logits: Tensor) -> Tensor:
    """The best class [B, N] of each box by its logits [B, N, K + 1], leaving the background out."""
    return logits[..., :-1].argmax(dim=-1)


def deltas_of_labels(deltas: Tensor, labels: Tensor) -> Tensor:
    """Deltas [B, N, 4] for the classes ``labels`` [B, N] from those of a class-specific head [B, N, 4 K]."""
    if deltas.shape[-1] == 4:  # one box for all classes
        return deltas
    rows = labels[..., None, None].expand(-1, -1, 1, 4)  # [B, N, 1, 4]
    chosen: Tensor = deltas.unflatten(-1, (-1, 4)).gather(2, rows).squeeze(2)
    return chosen


class Cascade(nn.Module):
    """The stages' box heads and the mask heads. One stage is Faster or Mask R-CNN."""

    def __init__(
        self,
        stages: Sequence[Stage],
        box_heads: Sequence[nn.Module],
        mask_heads: Sequence[MaskHead],
        *,
        sampling: Sampling,
        details: CascadeDetails,
    ) -> None:
        super().__init__()
        self.stages: Sequence[Stage] = nn.ModuleList(stages)  # type: ignore[assignment]
        self.box_heads = nn.ModuleList(box_heads)
        self.mask_heads = nn.ModuleList(mask_heads)
        self.sampling = sampling  # of the box heads; mask heads read twice as many bins
        self.details = details
        self.stages_at_test = len(box_heads)  # fewer: stop after that stage
        self.drops_hopeless = False  # at test time on a CPU: see ``HOPELESS``

    def loss(
        self, pyramid: list[Tensor], proposals: Proposals, images: ImageBatch, targets: Targets
    ) -> dict[str, Tensor]:
        """Losses ``s0.cls``, ``s0.box``, (``s0.mask``,) ``s1.cls`` ... , already weighted."""
        losses: dict[str, Tensor] = {}
        for k, stage in enumerate(self.stages):
            samples = stage.sample(proposals, targets)
            logits, deltas = self._run_stage(k, pyramid, samples.boxes, samples.valid)  # [B, S, K+1], [B, S, 4 or 4K]
            losses |= {f"s{k}.{name}": loss for name, loss in stage.loss(logits, deltas, samples).items()}
            if (mask_head := self._mask_head_trained_at(k)) is not None:
                mask_samples = self._mask_samples(samples, images, targets)
                losses[f"s{k}.mask"] = self._mask_loss(mask_head, pyramid, mask_samples) * stage.details.mask_weight
            proposals = stage.refine(logits, deltas, samples, images.sizes)
        return losses

    @torch.no_grad()
    def detect(self, pyramid: list[Tensor], proposals: Proposals, images: ImageBatch) -> RawDetections:
        """Detections: the mean of the stages' class scores on the boxes of the last stage."""
        count = rows_in_use(proposals.valid)
        boxes, valid = proposals.boxes[:, :count], proposals.valid[:, :count]
        scores = []
        for k, stage in enumerate(self.stages[: self.stages_at_test]):
            logits, deltas = self._run_stage(k, pyramid, boxes, valid)
            scores.append(logits)
            if k + 1 < self.stages_at_test:
                boxes = stage.move(deltas, boxes, most_likely(logits), images.sizes)
                if self.drops_hopeless and host_sync_is_free(valid):
                    boxes, valid, scores = self._hopeful(boxes, valid, scores)
            else:
                boxes = stage.move_every_class(deltas, boxes, images.sizes)
        found = self._select(self._ensemble(scores), boxes, valid)
        if self.mask_heads:
            found.masks = self._masks(pyramid, found)
        return found

    def _hopeful(self, boxes: Tensor, valid: Tensor, logits: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The boxes [B, M, 4] that may still be detections, with validity [B, M] and logits, each [B, M, K + 1]."""
        best = self._ensemble(logits)[..., :-1].amax(dim=-1)
        alive = valid & (best >= HOPELESS * self.details.score_threshold)
        count = max(int(alive.sum(dim=1).amax()), 1)
        rows = alive.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]  # in their order
        return take(boxes, rows), take(alive, rows), [take(one, rows) for one in logits]

    @torch.no_grad()
    def follow(self, pyramid: list[Tensor], proposals: Proposals, images: ImageBatch) -> Followed:
        """What the stages say of given boxes (annotated ones, say) and where they move them; padding gets garbage."""
        boxes, steps = proposals.boxes, []
        for k, stage in enumerate(self.stages[: self.stages_at_test]):
            unmoved, deltas = self._run_stage(k, pyramid, proposals.boxes, proposals.valid)
            logits = unmoved
            if k:
                logits, deltas = self._run_stage(k, pyramid, boxes, proposals.valid)
            boxes = stage.move(deltas, boxes, most_likely(logits), images.sizes)
            steps.append((unmoved.softmax(dim=-1), logits.softmax(dim=-1), boxes))
        return Followed(*(torch.stack(part) for part in zip(*steps)))

    @torch.no_grad()
    def detect_each_stage(self, pyramid: list[Tensor], proposals: Proposals, images: ImageBatch) -> list[RawDetections]:
        """What each stage would say alone, by its own scores on the boxes it has moved; last, what ``detect`` says.

        Without masks.
        """
        count = rows_in_use(proposals.valid)
        boxes, valid = proposals.boxes[:, :count], proposals.valid[:, :count]
        scores, found = [], []
        for k, stage in enumerate(self.stages[: self.stages_at_test]):
            logits, deltas = self._run_stage(k, pyramid, boxes, valid)
            scores.append(logits)
            moved = stage.move_every_class(deltas, boxes, images.sizes)
            found.append(self._select(logits.softmax(dim=-1), moved, valid))
            boxes = stage.move(deltas, boxes, most_likely(logits), images.sizes)
        return [*found, self._select(self._ensemble(scores), moved, valid)]

    # Box heads

    def _run_stage(self, k: int, pyramid: list[Tensor], boxes: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits [B, N, K + 1] and deltas [B, N, 4 or 4 K] of stage ``k``, float32; garbage where not valid."""
        x = self._pool_for_head(k, pyramid, boxes, valid)
        if self.training:
            x = scale_gradient(x, self.stages[k].details.feature_gradient)
        return self._apply_head(k, x, valid)

    def _apply_head(self, k: int, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs of stage ``k`` for RoI features [B, N, ...]; zeros where not ``valid`` if its norms learn."""
        head, rows = self.box_heads[k], x.flatten(0, 1)
        if valid is not None and head.training and bool(head.counts_rows) and bool(valid.any()):
            chosen = valid.flatten().nonzero()[:, 0]  # padding would shift the statistics
            found = head(rows[chosen])
            logits, deltas = (f.new_zeros(len(rows), f.shape[1]).index_copy(0, chosen, f) for f in found)
        else:
            logits, deltas = head(rows)
        return logits.unflatten(0, x.shape[:2]).float(), deltas.unflatten(0, x.shape[:2]).float()

    def _pool_for_head(self, k: int, pyramid: list[Tensor], boxes: Tensor, valid: Tensor) -> Tensor:
        """RoI features [B, N, C, 7, 7], or [B, N, 49, C] for heads that read them in memory order."""
        head = self.box_heads[k]
        rows = bool(head.takes_rows) or (bool(head.reads_rows) and pyramid[0].is_cuda)  # on a CPU nothing is gained
        return self._pool(pyramid, boxes, valid, rows=rows)

    def _pool(
        self, pyramid: list[Tensor], boxes: Tensor, valid: Tensor, *, size: int = 7, rows: bool = False
    ) -> Tensor:
        pool = roi_align_rows if rows else roi_align
        levels = pyramid[: len(self.sampling.strides)]
        return pool(levels, boxes, replace(self.sampling, size=size), valid)

    def _ensemble(self, logits: list[Tensor]) -> Tensor:
        """Class probabilities [B, N, K + 1]: the mean over the stages, each [B, N, K + 1]."""
        if self.details.mean_of_logits:
            return _mean(logits).softmax(dim=-1)
        return _mean([one.softmax(dim=-1) for one in logits])

    def _select(self, probabilities: Tensor, boxes: Tensor, valid: Tensor) -> RawDetections:
        details = self.details
        return select_detections(
            probabilities[..., :-1],  # without background
            boxes,
            valid,
            score_threshold=details.score_threshold,
            nms=details.nms,
            nms_iou=details.nms_iou,
            max_detections=details.max_detections,
        )

    # Mask heads

    def _mask_head_trained_at(self, k: int) -> MaskHead | None:
        """The mask head that learns from stage ``k``'s samples."""
        masks, last = self.details.masks, len(self.box_heads) - 1
        if masks == "every":
            return self.mask_heads[k]  # type: ignore[return-value]
        learns = (masks == "last" and k == last) or (masks == "one" and k == 0)
        return self.mask_heads[0] if learns else None  # type: ignore[return-value]

    def _mask_samples(self, samples: Samples, images: ImageBatch, targets: Targets) -> MaskSamples:
        """The positive samples and their objects' masks."""
        positive = samples.positive[:, : samples.max_positives]
        count = rows_in_use(positive)
        positive, boxes, index = positive[:, :count], samples.boxes[:, :count], samples.index[:, :count]
        labels = samples.matched_labels[:, :count]
        if targets.masks is None:
            return MaskSamples(boxes, labels, torch.zeros_like(positive), boxes.new_zeros(*positive.shape, 28, 28))
        has_mask = take(targets.masks.sizes.amin(dim=-1), index) > 0
        # mmdetection averages bitmaps that are padded like the image, hence their extent.
        extent = round_up(images.sizes, 32)
        wanted = mask_targets(targets.masks, self._mask_windows(boxes, images), index, extent, bins=28)
        return MaskSamples(boxes, labels, positive & has_mask, wanted)

    def _mask_windows(self, boxes: Tensor, images: ImageBatch) -> Tensor:
        """The part of the image [B, P, 4] that each RoI's mask covers."""
        return boxes

    def _mask_loss(self, head: MaskHead, pyramid: list[Tensor], samples: MaskSamples) -> Tensor:
        x = self._pool(pyramid, samples.boxes, samples.valid, size=14).flatten(0, 1)
        labels, targets, valid = samples.labels.flatten(), samples.targets.flatten(0, 1), samples.valid.flatten()
        if head.training and head.counts_rows:
            chosen = valid.nonzero()[:, 0]  # padding would shift the statistics; a GPU is waited for here
            x, labels, targets, valid = (rows[chosen] for rows in (x, labels, targets, valid))
        loss = mask_loss(head.of_labels(x, labels), targets, valid)
        return loss / normalizer(samples.valid.sum())

    def _masks(self, pyramid: list[Tensor], found: RawDetections) -> Tensor:
        """Mask probabilities [B, D, 28, 28] of each detection's class: the mean of the heads in use."""
        if exporting():
            return self._masks_exported(pyramid, found)
        count, total = rows_in_use(found.valid), found.valid.shape[1]
        x = self._pool(pyramid, found.boxes[:, :count], found.valid[:, :count], size=14)
        masks = self._mask_probabilities(x.flatten(0, 1), found.labels[:, :count].flatten())
        return F.pad(masks.view(len(found.valid), count, *masks.shape[1:]), (0, 0, 0, 0, 0, total - count))

    def _masks_exported(self, pyramid: list[Tensor], found: RawDetections) -> Tensor:
        """As ``_masks``, by operators that exporters know.

        Lists are as long as the fullest picture asks for; the heads run on what is found alone.
        """
        batch, total = found.valid.shape
        rows = found.valid.flatten().nonzero().squeeze(1)  # [R]
        boxes, image = found.boxes.flatten(0, 1)[rows], torch.div(rows, total, rounding_mode="floor")
        levels = pyramid[: len(self.sampling.strides)]
        x = roi_align_listed(levels, boxes, image, replace(self.sampling, size=14))
        masks = self._mask_probabilities(x, found.labels.flatten()[rows])
        empty = masks.new_zeros(batch * total, *masks.shape[1:])
        return empty.index_copy(0, rows, masks).view(batch, total, *masks.shape[1:])

    def _mask_probabilities(self, x: Tensor, labels: Tensor) -> Tensor:
        """Of RoI features [R, C, 14, 14] and the box's class [R] each: [R, 28, 28]; garbage for padding."""
        heads = self.mask_heads[: self.stages_at_test] if self.details.masks == "every" else self.mask_heads
        return _mean([head.of_labels(x, labels).float().sigmoid() for head in heads])  # type: ignore[operator]


def _mean(values: list[Tensor]) -> Tensor:
    """Summed one after another, in order."""
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total / len(values)
