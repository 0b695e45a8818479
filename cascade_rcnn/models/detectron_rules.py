"""``semantics="paper"``: what the authors' Caffe2 release (Detectron-Cascade-RCNN) does differently.

Detectron's boxes include their last pixel: (x1, y1, x2, y2) is x2 - x1 + 1 wide. Adding 1 to x2 and y2 gives our boxes,
with the same overlaps, areas and deltas. What differs is where the last pixel matters (clipping, scaling, anchors), and
that boxes are matched, learnt and post-processed in pixels of the original image, not of the network's input.
docs/parity.md has the rules one by one, and what is not followed.

B images, N boxes per image, S samples, G objects, K classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from cascade_rcnn.models.anchors import AnchorGenerator
from cascade_rcnn.models.boxes import pairwise_iou
from cascade_rcnn.models.cascade import Cascade, Stage, deltas_of_labels, most_likely, scale_gradient
from cascade_rcnn.models.matching import Samples, rows_in_use
from cascade_rcnn.models.rpn import RPN
from cascade_rcnn.rounding import round_up
from cascade_rcnn.structures import ImageBatch, Proposals, RawDetections, Targets

# Boxes


def scale_boxes(boxes: Tensor, factors: Tensor) -> Tensor:
    """Boxes [B, N, 4] in an image ``factors`` [B] times as large: first and last pixel are scaled."""
    one = _beyond_last_pixel(boxes)
    return (boxes - one) * factors.to(boxes.dtype)[:, None, None] + one


def clip_to_last_pixel(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes [B, N, 4] or [B, N, K, 4] clipped to images of ``sizes`` [B, 2] (height, width): each keeps a pixel."""
    limits = sizes.flip(-1).to(boxes.dtype).repeat(1, 2)  # [B, 4] as (w, h, w, h)
    one = _beyond_last_pixel(boxes)
    return torch.minimum((boxes - one).clamp(min=0), limits.view(-1, *[1] * (boxes.dim() - 2), 4) - 1) + one


def _beyond_last_pixel(boxes: Tensor) -> Tensor:
    """(0, 0, 1, 1): how far a box reaches beyond its first and its last pixel's coordinates."""
    return (torch.arange(4, device=boxes.device) >= 2).to(boxes.dtype)  # copying a literal would make the host wait


def inclusive_nms_limit(iou: float) -> float:
    """The limit that turns "above" into "at or above ``iou``": Detectron's NMS removes a box at the limit too."""
    return float(np.nextafter(np.float32(iou), np.float32(0)))


@dataclass
class OriginalFrame:
    """The images of a batch before resizing."""

    scales: Tensor  # float32 [B], from original pixels to the network's, both axes alike
    sizes: Tensor  # int64 [B, 2], (height, width)

    @staticmethod
    def of(images: ImageBatch) -> OriginalFrame:
        """Uses the batch's own scales if present, else the ratio of the longer sides."""
        scales = images.scales
        if scales is None:
            scales = images.sizes.amax(dim=1).float() / images.original_sizes.amax(dim=1)
        return OriginalFrame(scales, images.original_sizes)

    def from_network(self, boxes: Tensor) -> Tensor:
        return scale_boxes(boxes, 1 / self.scales)

    def to_network(self, boxes: Tensor) -> Tensor:
        return scale_boxes(boxes, self.scales)


# RPN


class DetectronAnchorGenerator(AnchorGenerator):
    """Anchors around the centres of their cells; sides are rounded for a square of one stride, then scaled."""

    def cell_anchor(self, stride: int, scale: float, ratio: float) -> tuple[float, float, float, float]:
        width = round(stride / math.sqrt(ratio))
        half_width, half_height = scale * width / 2, scale * round(width * ratio) / 2
        centre = stride / 2
        return centre - half_width, centre - half_height, centre + half_width, centre + half_height


class DetectronRPN(RPN):
    """Proposals keep at least a pixel; in training the number of proposals is shared by the batch."""

    def _leaves_padding_out(self, training: bool) -> bool:
        """In training, anchors in a batch's padding also propose (only those inside the image enter the loss)."""
        return not training

    def _inside_image(self, anchors: Tensor, sizes: Tensor) -> Tensor:
        return super()._inside_image(anchors, sizes + 1)  # their last pixel, x2 - 1, is inside

    def _mean_box_loss(self, box: Tensor, drawn: Tensor, total: Tensor) -> Tensor:
        """Averaged over each image's anchors, then over the images."""
        return (box.sum(dim=(1, 2)) / drawn.sum(dim=1).clamp(min=1)).mean()

    def _clip(self, boxes: Tensor, sizes: Tensor, *, training: bool) -> Tensor:
        """At test time proposals may reach into the image's own padding."""
        return clip_to_last_pixel(boxes, sizes if training else round_up(sizes, 32))

    def _has_extent(self, boxes: Tensor) -> Tensor:
        return (boxes[..., 2:] - boxes[..., :2]).amin(dim=-1) >= 1

    def _limit_per_batch(self, score: Tensor, count: int) -> Tensor:
        """The best ``count`` of all images of the batch together."""
        least = score.flatten().topk(min(count, score.numel())).values[-1]
        return score.masked_fill(score < least, -torch.inf)


# Cascade


class DetectronStage(Stage):
    """A stage that samples in original pixels and clips nothing."""

    def sample_in_original(self, proposals: Proposals, targets: Targets, frame: OriginalFrame) -> Samples:
        """As :meth:`Stage.sample`, ``targets`` in original pixels; the boxes of the samples are in the network's."""
        valid = torch.cat([targets.valid, proposals.valid], dim=1)
        boxes_original = torch.cat([targets.boxes, frame.from_network(proposals.boxes)], dim=1)  # [B, G + N, 4]
        boxes = torch.cat([frame.to_network(targets.boxes), proposals.boxes], dim=1)
        samples = self.draw(boxes, self.match(boxes_original, valid, targets), targets)
        # Ground truth is recognised by its overlap of 1 and dropped; so are exact copies of an object.
        overlap = pairwise_iou(
            frame.from_network(samples.boxes)[:, :, None], samples.matched_boxes[:, :, None]
        ).flatten(1)  # [B, S], of each with its object
        samples.is_truth = samples.is_truth | (samples.positive & (overlap >= 1))
        return samples

    def loss(self, logits: Tensor, deltas: Tensor, samples: Samples) -> dict[str, Tensor]:
        """The loss weight scales only the gradient into the features (``feature_gradient``), not the head's own: the
        authors' optimizer divides the head's by the weight.
        """
        losses, weight = super().loss(logits, deltas, samples), self.details.loss_weight
        return {name: scale_gradient(loss, 1 / weight) if weight > 0 else loss for name, loss in losses.items()}

    def move(self, deltas: Tensor, boxes: Tensor, labels: Tensor, sizes: Tensor) -> Tensor:
        return self.decode(deltas_of_labels(deltas, labels), boxes)

    def move_every_class(self, deltas: Tensor, boxes: Tensor, sizes: Tensor) -> Tensor:
        return clip_to_last_pixel(self.decode_every_class(deltas, boxes), sizes)


class DetectronCascade(Cascade):
    """Boxes are matched, learnt and post-processed in original pixels; RoIs are read in the network's."""

    def loss(
        self, pyramid: list[Tensor], proposals: Proposals, images: ImageBatch, targets: Targets
    ) -> dict[str, Tensor]:
        frame = OriginalFrame.of(images)
        targets = replace(targets, boxes=frame.from_network(targets.boxes))
        losses: dict[str, Tensor] = {}
        for k, stage in enumerate(self.stages):
            assert isinstance(stage, DetectronStage)
            samples = stage.sample_in_original(proposals, targets, frame)
            logits, deltas = self._run_stage(k, pyramid, samples.boxes, samples.valid)
            samples_original = replace(samples, boxes=frame.from_network(samples.boxes))
            losses |= {f"s{k}.{name}": loss for name, loss in stage.loss(logits, deltas, samples_original).items()}
            if (mask_head := self._mask_head_trained_at(k)) is not None:
                mask_samples = self._mask_samples(samples, images, targets)
                losses[f"s{k}.mask"] = self._mask_loss(mask_head, pyramid, mask_samples) * stage.details.mask_weight
            proposals = stage.refine(logits, deltas, samples, images.sizes)
        return losses

    @torch.no_grad()
    def detect(self, pyramid: list[Tensor], proposals: Proposals, images: ImageBatch) -> RawDetections:
        """The classifiers of all stages see the last stage's RoIs, not their own stage's."""
        frame = OriginalFrame.of(images)
        count = rows_in_use(proposals.valid)
        boxes, valid = proposals.boxes[:, :count], proposals.valid[:, :count]
        *earlier, last = range(self.stages_at_test)
        for k in earlier:
            logits, deltas = self._run_stage(k, pyramid, boxes, valid)
            boxes = self.stages[k].move(deltas, boxes, most_likely(logits), images.sizes)
        x = self._pool_for_head(last, pyramid, boxes, valid)
        logits, deltas = self._apply_head(last, x)
        scores = [logits, *(self._apply_head(k, x)[0] for k in earlier)]
        boxes = self.stages[last].move_every_class(deltas, frame.from_network(boxes), frame.sizes)
        found = self._select(self._ensemble(scores), boxes, valid)
        found.boxes, found.scales = frame.to_network(found.boxes) * found.valid[..., None], frame.scales
        if self.mask_heads:
            found.masks = self._masks(pyramid, found)
        return found

    def _mask_windows(self, boxes: Tensor, images: ImageBatch) -> Tensor:
        """Masks extend to the RoI's last pixel and cover at least one original pixel."""
        scales = OriginalFrame.of(images).scales
        far = torch.maximum(boxes[..., 2:] - 1, boxes[..., :2] + scales[:, None, None])
        return torch.cat([boxes[..., :2], far], dim=-1)
