"""A network small enough for tests, and images with simple objects."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from cascade_rcnn.config import ModelConfig
from cascade_rcnn.models.build import build_model
from cascade_rcnn.models.cascade_rcnn import CascadeRCNN
from cascade_rcnn.structures import ImageBatch, MaskCrops, Targets

TINY = ModelConfig(
    backbone="test_resnet.r160_in1k",
    pretrained=False,
    norm="group",
    frozen_stages=-1,
    fpn_channels=32,
    head_channels=64,
    mask_channels=32,
    masks="last",
    anchor_scales=(4.0,),
    rpn_samples=64,
    roi_samples=64,
)


def tiny_model(classes: int = 3, **changes: Any) -> CascadeRCNN:
    torch.manual_seed(0)
    return build_model(dataclasses.replace(TINY, **changes), classes)


def squares(*, images: int = 2, side: int = 128, empty: bool = False) -> tuple[ImageBatch, Targets]:
    """Images with two bright squares of different colour and class each, and their masks."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 60, (images, 3, side, side), dtype=torch.uint8, generator=generator)
    targets = Targets.empty(images, rows=4)
    crops, offset = [], 0
    shape = (images, 4, 2)
    masks = MaskCrops(
        torch.zeros(0, dtype=torch.uint8),
        torch.zeros(images, 4, dtype=torch.int64),
        torch.zeros(shape, dtype=torch.int64),
        torch.zeros(shape, dtype=torch.int64),
        (64, 64),
    )
    for b in range(images if not empty else 0):
        for g, (x, y, size) in enumerate(((10 + 5 * b, 12, 40), (70 - 7 * b, 66, 48))):
            pixels[b, g, y : y + size, x : x + size] = 230
            targets.boxes[b, g] = torch.tensor([x, y, x + size, y + size])
            targets.labels[b, g] = g
            targets.valid[b, g] = True
            masks.offsets[b, g], offset = offset, offset + size * size
            masks.origins[b, g] = torch.tensor([y, x])
            masks.sizes[b, g] = size
            crops.append(torch.ones(size * size, dtype=torch.uint8))
    if crops:
        masks.pixels = torch.cat(crops)
    targets.masks = masks
    sizes = torch.tensor([[side, side]] * images)
    return ImageBatch(pixels, sizes, sizes.clone()), targets
