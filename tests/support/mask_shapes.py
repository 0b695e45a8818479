"""Masks with ragged outlines, their crops, and boxes around them."""

from __future__ import annotations

import torch

from cascade_rcnn.structures import MaskCrops


def blobs(count: int, height: int, width: int) -> torch.Tensor:
    """Masks [count, H, W] with ragged outlines, some at the border."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    masks = []
    for _ in range(count):
        cy, cx = (torch.rand(2, generator=generator) * torch.tensor([height, width])).tolist()
        ry, rx = (torch.rand(2, generator=generator) * torch.tensor([height, width]) / 3 + 3).tolist()
        noise = torch.rand(height, width, generator=generator) < 0.9
        masks.append((((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1) & noise)
    return torch.stack(masks)


def crops_of(masks: torch.Tensor) -> MaskCrops:
    """The masks [G, H, W] of one image as crops."""
    pixels, offsets, origins, sizes, offset = [], [], [], [], 0
    for mask in masks:
        rows, columns = mask.any(dim=1).nonzero().squeeze(1), mask.any(dim=0).nonzero().squeeze(1)
        crop = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        pixels.append(crop.flatten().to(torch.uint8))
        offsets.append(offset)
        origins.append([int(rows[0]), int(columns[0])])
        sizes.append(list(crop.shape))
        offset += crop.numel()
    largest = (max(s[0] for s in sizes), max(s[1] for s in sizes))
    table = (torch.tensor([values]) for values in (offsets, origins, sizes))
    return MaskCrops(torch.cat(pixels), *table, largest)


def rois_around(count: int, height: int, width: int) -> torch.Tensor:
    corner = torch.rand(count, 2) * torch.tensor([width - 20.0, height - 20.0])
    end = torch.minimum(corner + 5 + torch.rand(count, 2) * 90, torch.tensor([float(width), float(height)]))
    return torch.cat([corner, end], dim=1)
