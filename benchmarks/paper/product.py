"""All that the re-enactment takes from cascade_rcnn: one training, one trained network, one evaluation.

The network of a row is the product's own, with two additions that only these experiments need: detectors of one and of
several stages follow the same rules (mmdetection's differ in their box losses and in the anchors that the RPN learns
from), and there is a one-stage detector with the integral loss.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cascade_rcnn.training.log as training_log
from cascade_rcnn.checkpoint import LAST, load_checkpoint
from cascade_rcnn.config import Config, DataConfig, ModelConfig, TrainConfig
from cascade_rcnn.data.dataset import DetectionDataset
from cascade_rcnn.data.formats.open import open_split
from cascade_rcnn.data.loader import eval_loader, train_loader
from cascade_rcnn.data.records import DataSplit
from cascade_rcnn.data.synthetic_shapes import generate_shapes
from cascade_rcnn.evaluation.coco import IOUS, coco_table, coco_truth, evaluate_coco
from cascade_rcnn.inference.detections import Detections
from cascade_rcnn.inference.run_model import to_detections
from cascade_rcnn.models.box_head import BoxHead
from cascade_rcnn.models.boxes import encode_boxes, pairwise_iou
from cascade_rcnn.models.build import build_model
from cascade_rcnn.models.cascade import Stage, StageDetails, most_likely
from cascade_rcnn.models.matching import Samples, take
from cascade_rcnn.structures import ImageBatch, Proposals, Targets
from cascade_rcnn.train import train

__all__ = [
    "IOUS",
    "LAST",
    "Config",
    "DataConfig",
    "DataSplit",
    "DetectionDataset",
    "Detections",
    "ImageBatch",
    "ModelConfig",
    "Proposals",
    "Samples",
    "Targets",
    "TrainConfig",
    "build",
    "coco_table",
    "coco_truth",
    "encode_boxes",
    "eval_loader",
    "evaluate_coco",
    "generate_shapes",
    "load_network",
    "most_likely",
    "open_split",
    "pairwise_iou",
    "take",
    "to_detections",
    "train_loader",
    "train_network",
]


class IntegralHead(BoxHead):
    """One regressor and a classifier per IoU (the integral loss, arXiv 1604.02135).

    In training [R, J * (K + 1)] logits of J classifiers; at test time the logarithm of their mean probabilities.
    """

    def __init__(self, channels: int, num_classes: int, *, width: int, judges: int) -> None:
        super().__init__(channels, num_classes, width=width)
        self.judges = judges
        self.classifier = nn.Linear(width, judges * (num_classes + 1))
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, deltas = super().forward(x)
        if self.training:
            return logits, deltas
        each = logits.float().unflatten(-1, (self.judges, -1)).softmax(dim=-1)
        return each.mean(dim=-2).clamp(min=1e-12).log(), deltas


class IntegralStage(Stage):
    """A stage whose class loss is the mean over several IoUs from which a box is positive; sampled at the first."""

    def __init__(self, details: StageDetails, ious: Sequence[float]) -> None:
        super().__init__(details)
        self.ious = tuple(ious)

    def loss(self, logits: Tensor, deltas: Tensor, samples: Samples) -> dict[str, Tensor]:
        overlap = pairwise_iou(samples.boxes[:, :, None], samples.matched_boxes[:, :, None]).flatten(1)  # [B, S]
        each = []
        for iou, part in zip(self.ious, logits.chunk(len(self.ious), dim=-1)):
            stricter = dataclasses.replace(samples, positive=samples.positive & (overlap >= iou))
            each.append(super().loss(part, deltas, stricter))
        return {"cls": torch.stack([losses["cls"] for losses in each]).mean(), "box": each[0]["box"]}


def build(config: ModelConfig, num_classes: int, *, pretrained: bool = False, integral: Sequence[float] = ()) -> Any:
    """The product's network under rules that do not depend on the number of stages; perhaps with the integral loss."""
    model = build_model(config, num_classes, pretrained=pretrained)
    cascade = model.cascade
    for stage in cascade.stages:
        stage.details = dataclasses.replace(stage.details, box_beta=1.0)
    model.rpn.details = dataclasses.replace(model.rpn.details, box_beta=1 / 9, inside_only=False)
    if integral:
        cascade.stages[0] = IntegralStage(cascade.stages[0].details, integral)  # type: ignore[index]
        cascade.box_heads[0] = IntegralHead(
            config.fpn_channels, num_classes, width=config.head_channels, judges=len(integral)
        )
    return model


@contextlib.contextmanager
def _our_networks(integral: Sequence[float]) -> Iterator[None]:
    """The product's training builds its network with :func:`build`, and draws no pictures of its first batches."""
    run: Any = importlib.import_module("cascade_rcnn.train")  # the package's own `train` is the function
    before = run.build_model, training_log._DRAWN_BATCHES
    run.build_model = lambda config, classes, *, pretrained=False: build(
        config, classes, pretrained=pretrained, integral=integral
    )
    training_log._DRAWN_BATCHES = 0
    try:
        yield
    finally:
        run.build_model, training_log._DRAWN_BATCHES = before


def train_network(config: Config, out: Path, *, device: str, integral: Sequence[float] = ()) -> Path:
    """Train, or go on with a training that was interrupted; returns the checkpoint."""
    with _our_networks(integral):
        return train(config, out=out, resume=out.exists(), device=device)


def load_network(path: Path, *, device: str, integral: Sequence[float] = ()) -> tuple[Any, Config, tuple[str, ...]]:
    """A trained network in evaluation mode, its configuration and class names."""
    checkpoint = load_checkpoint(path)
    model = build(checkpoint.config.model, len(checkpoint.class_names), integral=integral)
    model.load_state_dict(checkpoint.state)
    return model.eval().to(device), checkpoint.config, checkpoint.class_names
