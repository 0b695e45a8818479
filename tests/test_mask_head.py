"""Mask targets from cropped masks, against torchvision's RoIAlign on whole bitmaps."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import roi_align

from cascade_rcnn.models import mask_head
from cascade_rcnn.models.mask_head import MaskHead, mask_loss, mask_targets
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


@pytest.mark.parametrize("chunked", [False, True])
def test_targets_equal_roi_align_of_whole_bitmaps(chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    height, width = 96, 128
    masks = blobs(6, height, width)
    rois, index = rois_around(60, height, width), torch.randint(0, 6, (60,))
    rois[0] = torch.tensor([0.0, 0, width, height])
    if chunked:
        monkeypatch.setattr(mask_head, "MAX_TABLE", 20_000)
    ours = mask_targets(crops_of(masks), rois[None], index[None], torch.tensor([[height, width]]))
    pooled = roi_align(masks[:, None].float(), torch.cat([index[:, None].float(), rois], dim=1), 28, 1.0, 0, True)
    clear = (pooled[:, 0] - 0.5).abs() > 1e-4  # where rounding decides, either answer is right
    assert clear.float().mean() > 0.95
    assert torch.equal(ours[0][clear], (pooled[:, 0] >= 0.5)[clear].float())
    assert 0.05 < ours.mean() < 0.95


def test_logits_of_one_class_are_those_of_all_classes() -> None:
    head = MaskHead(16, 7, width=16).eval()
    x, labels = torch.randn(5, 16, 14, 14), torch.tensor([0, 6, 3, 3, 1])
    torch.testing.assert_close(head.of_labels(x, labels), head(x)[torch.arange(5), labels], rtol=1e-4, atol=1e-5)


def test_loss_counts_positives_only() -> None:
    logits, targets = torch.randn(4, 28, 28), torch.rand(4, 28, 28).round()
    positive = torch.tensor([True, False, True, False])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits[positive], targets[positive]) * 2
    torch.testing.assert_close(mask_loss(logits, targets, positive), expected)


def test_boxes_of_a_diverged_training_give_targets_and_leave_the_error_to_the_losses() -> None:
    masks = torch.ones(1, 16, 16, dtype=torch.bool)
    rois = torch.tensor([[[float("nan"), 0.0, float("inf"), 8.0]]])
    found = mask_targets(crops_of(masks), rois, torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[16, 16]]))
    assert found.shape == (1, 1, 28, 28) and bool(torch.isfinite(found).all())
