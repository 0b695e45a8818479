"""Cascade of box heads (arXiv 1906.09756, section 4): each stage trains on the boxes that the stage before has refined.

B images, N boxes per image (padded, ``valid`` marks real ones), S samples, K classes (K: background), xyxy pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade_rcnn.models.boxes import clip_boxes, decode_boxes, encode_boxes, pairwise_iou, scale_boxes, smooth_l1
from cascade_rcnn.models.mask_head import MaskHead, mask_loss, mask_targets
from cascade_rcnn.models.matching import Matches, Samples, choose, match, normalizer, take
from cascade_rcnn.models.ops.roi_align import roi_align, roi_align_rows
from cascade_rcnn.models.postprocess import select_detections
from cascade_rcnn.structures import OriginalFrame, Proposals, RawDetections, Targets


@dataclass(frozen=True, kw_only=True)
class CascadeDetails:
    """What the published implementations do differently (``models/build.py`` has the table)."""

    ious: tuple[float, ...]
    loss_weights: tuple[float, ...]
    samples: int = 512  # RoIs per image in a stage's loss, a quarter of them positive
    resample: bool = True  # stages 2.. sample again with ground truth added; else: all boxes of the stage before
    box_beta: float = 1.0  # where the box loss turns from square to absolute; 0: absolute everywhere
    feature_gradient: float = 1.0  # factor on the gradient from the box heads into the RoI features
    limit_shrinking: bool = True
    mean_of_logits: bool = True  # the ensemble averages logits (mmdetection) or probabilities
    judge_last_boxes: bool = False  # all classifiers judge the last stage's RoIs (the authors' code), not each its own
    sampling_ratio: int = 0
    aligned: bool = True
    masks: str = "none"  # "every", "last" or "one" (trained on stage 1's samples)
    score_threshold: float = 0.05
    nms: str = "class"
    nms_iou: float = 0.5
    max_detections: int = 100
    # Detectron
    whole_pixels: bool = False  # boxes are matched and finished in original pixels, and clipped only there
    add_truth: bool = False  # with resample off: later stages take the ground truth too
    spare_heads: bool = False  # stage weights lessen the gradient into the features, not that of the heads
    weigh_masks: bool = True  # the mask loss has its stage's weight


def _scale_gradient(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1.0 else x * factor + x.detach() * (1 - factor)


def _in_original(boxes: Tensor, original: OriginalFrame | None) -> Tensor:
    """Boxes [B, N, 4] where they are matched: in original pixels (Detectron), else as they are."""
    return boxes if original is None else scale_boxes(boxes, 1 / original.scales)


def _in_network(boxes: Tensor, original: OriginalFrame | None) -> Tensor:
    return boxes if original is None else scale_boxes(boxes, original.scales)


def _trimmed(valid: Tensor) -> int:
    """How many leading rows to compute: on a CPU those in use, on a GPU all (asking would make the host wait)."""
    if valid.device.type != "cpu" or valid.shape[1] == 0:
        return int(valid.shape[1])
    used = valid.any(dim=0).nonzero()
    return int(used[-1]) + 1 if len(used) else 1


class Cascade(nn.Module):
    """The stages' box heads and the mask heads. One stage is Faster or Mask R-CNN."""

    def __init__(
        self,
        box_heads: Sequence[nn.Module],
        mask_heads: Sequence[MaskHead],
        *,
        stds: Sequence[Sequence[float]],
        strides: Sequence[int],
        details: CascadeDetails,
    ) -> None:
        super().__init__()
        self.box_heads = nn.ModuleList(box_heads)
        self.mask_heads = nn.ModuleList(mask_heads)
        self.strides = tuple(strides)
        self.details = details
        self.stages_at_test = len(box_heads)  # fewer: stop after that stage
        self.register_buffer("stds", torch.tensor([list(s) for s in stds]), persistent=False)  # [stages, 4]
        self.stds: Tensor

    def loss(
        self,
        pyramid: list[Tensor],
        proposals: Proposals,
        sizes: Tensor,
        targets: Targets,
        original: OriginalFrame | None = None,
    ) -> dict[str, Tensor]:
        """Losses ``s0.cls``, ``s0.box``, (``s0.mask``,) ``s1.cls`` ... , already weighted.

        With ``original`` (and only then, for ``whole_pixels``) boxes are matched and deltas learnt in its pixels.
        """
        losses: dict[str, Tensor] = {}
        boxes, valid = proposals.boxes, proposals.valid
        targets = replace(targets, boxes=_in_original(targets.boxes, original))
        for k in range(len(self.box_heads)):
            if k == 0:
                samples = self._sample(boxes, valid, targets, original, stage=0)
            else:
                samples = self._samples_of_later_stage(k, boxes, valid, targets, original)
            logits, deltas = self._run_stage(k, pyramid, samples.boxes, samples.valid)  # [B, S, K+1], [B, S, 4 or 4K]
            judged = _in_original(samples.boxes, original)
            losses |= self._box_losses(k, logits, deltas, samples, judged, targets)
            if (mask_head := self._mask_head_trained_at(k)) is not None:
                losses[f"s{k}.mask"] = self._mask_loss(k, mask_head, pyramid, samples, sizes, targets, original)
            boxes, valid = self._refine(k, logits, deltas, samples, sizes, judged, targets)
        return losses

    @torch.no_grad()
    def detect(
        self, pyramid: list[Tensor], proposals: Proposals, sizes: Tensor, original: OriginalFrame | None = None
    ) -> RawDetections:
        """Detections: the mean of the stages' class scores on the boxes of the last stage.

        With ``original`` the last boxes are decoded, clipped and thinned out in its pixels.
        """
        details = self.details
        count = _trimmed(proposals.valid)
        boxes, valid = proposals.boxes[:, :count], proposals.valid[:, :count]
        total: Tensor | float = 0.0
        stages = self.stages_at_test
        for k in range(stages):
            x = self._pool_for_head(k, pyramid, boxes, valid)
            logits, deltas = self._apply_head(k, x)
            last = k + 1 == stages
            if not details.judge_last_boxes:
                judges = [logits]
            else:
                judges = [logits, *(self._apply_head(j, x)[0] for j in range(k))] if last else []
            del x  # 50 MB for 1,000 boxes: gone before the next stage's are made
            for judge in judges:
                total = total + (judge if details.mean_of_logits else judge.softmax(dim=-1))
            if last:
                boxes = self._decode_last(k, deltas, boxes, sizes, original)
            else:
                boxes = self._decode(k, deltas, boxes, logits[..., :-1].argmax(dim=-1), sizes)
        assert isinstance(total, Tensor)
        mean = total / stages
        probabilities = mean.softmax(dim=-1) if details.mean_of_logits else mean
        found = select_detections(
            probabilities[..., :-1],
            boxes,
            valid,
            score_threshold=details.score_threshold,
            nms=details.nms,
            nms_iou=details.nms_iou,
            max_detections=details.max_detections,
        )
        if original is not None:
            found.boxes = scale_boxes(found.boxes, original.scales) * found.valid[..., None]
            found.scales = original.scales
        if self.mask_heads:
            found.masks = self._masks(pyramid, found)
        return found

    # Stages

    def _run_stage(self, k: int, pyramid: list[Tensor], boxes: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits [B, N, K + 1] and deltas [B, N, 4 or 4 K] of stage ``k``, float32; garbage where not valid."""
        x = self._pool_for_head(k, pyramid, boxes, valid)
        if self.training:
            weight = self.details.loss_weights[k] if self.details.spare_heads else 1.0
            x = _scale_gradient(x, self.details.feature_gradient * weight)
        return self._apply_head(k, x)

    def _apply_head(self, k: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """What stage ``k`` says of RoI features [B, N, ...]."""
        logits, deltas = self.box_heads[k](x.flatten(0, 1))
        return logits.unflatten(0, x.shape[:2]).float(), deltas.unflatten(0, x.shape[:2]).float()

    def _pool_for_head(self, k: int, pyramid: list[Tensor], boxes: Tensor, valid: Tensor) -> Tensor:
        """RoI features [B, N, C, 7, 7], or [B, N, 49, C] for heads that read them as they lie in memory."""
        head = self.box_heads[k]
        rows = head.takes_rows or (head.reads_rows and pyramid[0].is_cuda)  # on a CPU nothing is gained
        pool = roi_align_rows if rows else roi_align
        return self._pool(pyramid, boxes, valid, size=7, pool=pool)

    def _pool(
        self,
        pyramid: list[Tensor],
        boxes: Tensor,
        valid: Tensor,
        *,
        size: int,
        pool: Callable[..., Tensor] = roi_align,
    ) -> Tensor:
        return pool(
            pyramid[: len(self.strides)],
            boxes,
            output_size=size,
            strides=self.strides,
            valid=valid,
            sampling_ratio=self.details.sampling_ratio,
            aligned=self.details.aligned,
            whole_pixels=self.details.whole_pixels,
        )

    def _decode(self, k: int, deltas: Tensor, boxes: Tensor, labels: Tensor, sizes: Tensor) -> Tensor:
        """Boxes [B, N, 4] after stage ``k``; a class-specific head moves each as its class ``labels`` [B, N] says."""
        if deltas.shape[-1] > 4:
            deltas = deltas.unflatten(-1, (-1, 4))
            deltas = deltas.gather(2, labels[..., None, None].expand(-1, -1, 1, 4)).squeeze(2)
        moved = decode_boxes(deltas, boxes, self.stds[k], limit_shrinking=self.details.limit_shrinking)
        return moved if self.details.whole_pixels else clip_boxes(moved, sizes)

    def _decode_last(
        self, k: int, deltas: Tensor, boxes: Tensor, sizes: Tensor, original: OriginalFrame | None
    ) -> Tensor:
        """Boxes [B, N, 4], or [B, N, K, 4] for a class-specific head; in original pixels if ``original`` is given."""
        boxes, sizes = _in_original(boxes, original), sizes if original is None else original.sizes
        if deltas.shape[-1] > 4:
            deltas, boxes = deltas.unflatten(-1, (-1, 4)), boxes[:, :, None]
        moved = decode_boxes(deltas, boxes, self.stds[k], limit_shrinking=self.details.limit_shrinking)
        return clip_boxes(moved.flatten(1, -2), sizes, whole_pixels=self.details.whole_pixels).view_as(moved)

    # Training

    def _with_truth(
        self, boxes: Tensor, valid: Tensor, targets: Targets, original: OriginalFrame | None, *, stage: int
    ) -> tuple[Tensor, Matches]:
        """Ground truth, then the boxes, [B, G + N, 4] in the network's pixels, and what each of them matches."""
        truth = targets.valid
        all_boxes = torch.cat([_in_network(targets.boxes, original), boxes], dim=1)
        judged = all_boxes if original is None else torch.cat([targets.boxes, _in_original(boxes, original)], dim=1)
        usable = torch.cat([truth, valid], dim=1)
        iou = self.details.ious[stage]
        matches = match(judged, usable, targets, positive_iou=iou, negative_iou=iou)
        own = torch.arange(truth.shape[1], device=truth.device).expand_as(truth)  # a truth is its own object
        matches.index = torch.cat([torch.where(truth, own, 0), matches.index[:, truth.shape[1] :]], dim=1)
        matches.positive = torch.cat([truth, matches.positive[:, truth.shape[1] :]], dim=1)
        return all_boxes, matches

    def _sample(
        self, boxes: Tensor, valid: Tensor, targets: Targets, original: OriginalFrame | None, *, stage: int
    ) -> Samples:
        """Ground truth is added to the boxes, all are matched, and ``samples`` of them drawn."""
        all_boxes, matches = self._with_truth(boxes, valid, targets, original, stage=stage)
        rows, real, positive, most = choose(matches, self.details.samples, positive_share=0.25)
        count = _trimmed(real)
        rows, real, positive = rows[:, :count], real[:, :count], positive[:, :count]
        return Samples(
            boxes=take(all_boxes, rows),
            valid=real,
            positive=positive,
            index=take(matches.index, rows),
            is_truth=real & (rows < targets.valid.shape[1]),
            max_positives=min(most, count),
        )

    def _samples_of_later_stage(
        self, k: int, boxes: Tensor, valid: Tensor, targets: Targets, original: OriginalFrame | None
    ) -> Samples:
        if self.details.resample:
            return self._sample(boxes, valid, targets, original, stage=k)
        if self.details.add_truth:
            boxes, matches = self._with_truth(boxes, valid, targets, original, stage=k)
            is_truth = F.pad(targets.valid, (0, boxes.shape[1] - targets.valid.shape[1]))
            real = matches.positive | matches.negative
            return Samples(boxes, real, matches.positive, matches.index, is_truth, boxes.shape[1])
        iou = self.details.ious[k]
        matches = match(_in_original(boxes, original), valid, targets, positive_iou=iou, negative_iou=iou)
        real = matches.positive | matches.negative
        no = torch.zeros_like(real)
        return Samples(boxes, real, matches.positive, matches.index, no, boxes.shape[1])

    @torch.no_grad()
    def _refine(
        self, k: int, logits: Tensor, deltas: Tensor, samples: Samples, sizes: Tensor, judged: Tensor, targets: Targets
    ) -> tuple[Tensor, Tensor]:
        """The boxes that stage ``k`` hands on; the samples that were ground truth stay behind if it is added again."""
        details = self.details
        labels = self._labels(samples, targets)
        guess = logits[..., :-1].argmax(dim=-1)
        boxes = self._decode(k, deltas, samples.boxes, torch.where(samples.positive, labels, guess), sizes)
        valid = samples.valid & ~samples.is_truth if details.resample or details.add_truth else samples.valid
        if details.add_truth:  # Detectron knows the ground truth by its overlap: exact copies stay behind too
            own = take(targets.boxes, samples.index)
            copies = pairwise_iou(judged[:, :, None], own[:, :, None]).flatten(1) >= 1  # [B, S]
            valid = valid & ~(samples.positive & copies)
        valid = valid & ((boxes[..., 2:] - boxes[..., :2]).amin(dim=-1) > 0)
        return boxes * valid[..., None], valid

    def _labels(self, samples: Samples, targets: Targets) -> Tensor:
        return take(targets.labels, samples.index)  # [B, S]

    def _box_losses(
        self, k: int, logits: Tensor, deltas: Tensor, samples: Samples, judged: Tensor, targets: Targets
    ) -> dict[str, Tensor]:
        """Weighted losses of samples that lie at ``judged`` [B, S, 4] in the frame of the targets' boxes."""
        background = logits.shape[-1] - 1
        total = normalizer(samples.valid.sum())
        labels = self._labels(samples, targets)
        wanted_class = torch.where(samples.positive, labels, background)
        cls = F.cross_entropy(logits.flatten(0, 1), wanted_class.flatten(), reduction="none").view_as(labels)
        most = samples.max_positives
        positive = samples.positive[:, :most]
        wanted = encode_boxes(judged, take(targets.boxes, samples.index), self.stds[k])[:, :most]
        deltas = deltas[:, :most]
        if deltas.shape[-1] > 4:
            own = labels[:, :most, None, None].expand(-1, -1, 1, 4)
            deltas = deltas.unflatten(-1, (-1, 4)).gather(2, own).squeeze(2)
        box = smooth_l1(deltas, wanted, self.details.box_beta)
        weight = self.details.loss_weights[k]
        losses = {
            f"s{k}.cls": torch.where(samples.valid, cls, 0.0).sum() / total * weight,
            f"s{k}.box": torch.where(positive[..., None], box, 0.0).sum() / total * weight,
        }
        if self.details.spare_heads and weight > 0:  # the gradient into the features is lessened where they enter
            losses = {name: _scale_gradient(loss, 1 / weight) for name, loss in losses.items()}
        return losses

    # Masks

    def _mask_head_trained_at(self, k: int) -> MaskHead | None:
        """The mask head that learns from stage ``k``'s samples."""
        trained_at = {
            "none": (),
            "every": range(len(self.box_heads)),
            "last": (len(self.box_heads) - 1,),
            "one": (0,),
        }[self.details.masks]
        if k not in trained_at:
            return None
        return self.mask_heads[k if self.details.masks == "every" else 0]  # type: ignore[return-value]

    def _mask_loss(
        self,
        k: int,
        head: MaskHead,
        pyramid: list[Tensor],
        samples: Samples,
        sizes: Tensor,
        targets: Targets,
        original: OriginalFrame | None,
    ) -> Tensor:
        most = samples.max_positives
        positive = samples.positive[:, :most]
        count = _trimmed(positive)
        positive, boxes, index = positive[:, :count], samples.boxes[:, :count], samples.index[:, :count]
        if targets.masks is not None:
            # The bitmaps that mmdetection averages are padded like the image, hence their extent.
            padded = torch.div(sizes + 31, 32, rounding_mode="floor") * 32
            has_mask = take(targets.masks.sizes.amin(dim=-1), index) > 0
            windows = boxes
            if original is not None:  # Detectron's masks reach up to the last pixel, over one original pixel at least
                far = torch.maximum(boxes[..., 2:] - 1, boxes[..., :2] + original.scales[:, None, None])
                windows = torch.cat([boxes[..., :2], far], dim=-1)
            wanted = mask_targets(targets.masks, windows, index, padded, bins=28).flatten(0, 1)
            positive = positive & has_mask
        else:
            wanted, positive = boxes.new_zeros(positive.numel(), 28, 28), torch.zeros_like(positive)
        x = self._pool(pyramid, boxes, positive, size=14).flatten(0, 1)
        logits = head.of_labels(x, take(targets.labels, index).flatten())
        weight = self.details.loss_weights[k] if self.details.weigh_masks else 1.0
        return mask_loss(logits, wanted, positive.flatten()) / normalizer(positive.sum()) * weight

    def _masks(self, pyramid: list[Tensor], found: RawDetections) -> Tensor:
        """Mask probabilities [B, D, 28, 28] of each detection's class: the mean of the heads in use."""
        count = _trimmed(found.valid)
        batch, total = found.valid.shape
        x = self._pool(pyramid, found.boxes[:, :count], found.valid[:, :count], size=14).flatten(0, 1)
        heads = self.mask_heads[: self.stages_at_test] if self.details.masks == "every" else self.mask_heads
        labels = found.labels[:, :count].flatten()
        each = (head.of_labels(x, labels).float().sigmoid() for head in heads)  # type: ignore[operator]
        mean: Tensor = sum(each) / len(heads)  # type: ignore[assignment]
        side = mean.shape[-1]
        return F.pad(mean.view(batch, count, side, side), (0, 0, 0, 0, 0, total - count))
