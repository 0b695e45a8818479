"""The network's evidence about a split: every annotated box is fed to the stages as if the RPN had proposed it.

B images, N boxes per image (padded), S stages, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cascade_rcnn.config import Config
from cascade_rcnn.data.dataset import DetectionDataset
from cascade_rcnn.data.loader import eval_loader
from cascade_rcnn.data.records import DataSplit, ImageRecord
from cascade_rcnn.errors import UserError
from cascade_rcnn.evaluation.evaluate_model import match_classes
from cascade_rcnn.inference.detector import Detector
from cascade_rcnn.inference.run_model import inference_mode
from cascade_rcnn.labels.evidence import Evidence, Followed
from cascade_rcnn.models.cascade import Followed as Steps
from cascade_rcnn.models.cascade_rcnn import CascadeRCNN
from cascade_rcnn.structures import ImageBatch, Proposals, RawDetections


def judge_split(detector: Detector, split: DataSplit) -> Iterator[Evidence]:
    """Evidence on each image of a split, in its order.

    Raises:
        DataError: an image that cannot be read, or classes that the detector does not know.
        UserError: a detector that works in Detectron's whole pixels.
    """
    config = detector.config
    refuse_whole_pixels(config)
    class_map = match_classes(detector.class_names, split, "the checkpoint")
    columns = torch.tensor([class_map.index(k) if k in class_map else -1 for k in range(len(split.class_names))])
    dataset = DetectionDataset(split, config.data, training=False, semantics=config.model.semantics)
    loader = eval_loader(dataset, batch_size=1, workers=config.data.workers)
    try:
        for record, (images, _) in zip(split.records, loader):
            yield _judge_image(detector, images, record, columns, class_map)
    finally:
        loader.close()


def refuse_whole_pixels(config: Config) -> None:
    """Raises UserError for a network that works in Detectron's whole pixels, in the frame of the original image."""
    if config.model.semantics == "paper":
        raise UserError(
            "model.semantics paper counts in whole pixels and cannot be asked about given boxes; use a checkpoint, or "
            "with --folds a --config, of other semantics"
        )


def _judge_image(
    detector: Detector, images: ImageBatch, record: ImageRecord, columns: Tensor, class_map: Sequence[int]
) -> Evidence:
    factors = (images.sizes[0].double() / images.original_sizes[0].double()).flip(0).repeat(2)  # [4] x, y, x, y
    given = torch.from_numpy(record.boxes) * factors  # [G, 4]
    with inference_mode(detector.model, detector.precision) as device:
        raw, followed = _look(detector.model, images.to(device), given.float().to(device))
    labels = torch.tensor(class_map)[raw.labels[0].cpu()]
    known = raw.valid[0].cpu() & (labels >= 0)  # detections of the data's classes
    found = raw.boxes[0].cpu().double() / factors
    count = len(given)

    def part(rows: Tensor, boxes: Tensor) -> Followed:
        return Followed(
            boxes.numpy(),
            (followed.boxes[:, 0, rows].cpu().double() / factors).numpy(),
            _of_classes(followed.probs[:, 0, rows].cpu(), columns),
            _of_classes(followed.unmoved[:, 0, rows].cpu(), columns),
        )

    return Evidence(
        labels=record.labels.astype(np.int64),
        ignore=record.ignore,
        annotated=part(torch.arange(count), torch.from_numpy(record.boxes.astype(np.float64))),
        found_labels=labels[known].numpy(),
        scores=raw.scores[0].cpu()[known].double().numpy(),
        found=part(count + known.nonzero().flatten(), found[known]),
    )


def _of_classes(probs: Tensor, columns: Tensor) -> NDArray[np.float64]:
    """Probabilities [S, N, K] of the data's classes from the model's [S, N, K' + 1]; zeros of what it does not know."""
    chosen = probs[..., columns.clamp(min=0)].double() * (columns >= 0)
    return chosen.numpy()


def _look(model: CascadeRCNN, images: ImageBatch, given: Tensor) -> tuple[RawDetections, Steps]:
    """Detections, and what the stages say of ``given`` boxes [G, 4] followed by the detections."""
    pyramid = model.pyramid(images)
    raw = model.cascade.detect(pyramid, model.rpn.propose(pyramid, images.sizes), images)
    boxes = torch.cat([given[None], raw.boxes], dim=1)
    valid = torch.cat([torch.ones_like(given[None, :, 0], dtype=torch.bool), raw.valid], dim=1)
    return raw, model.cascade.follow(pyramid, Proposals(boxes, valid), images)
