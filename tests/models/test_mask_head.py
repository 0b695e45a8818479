"""Mask targets from cropped masks, against torchvision's RoIAlign on whole bitmaps."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import roi_align

from cascade_rcnn.models import mask_head
from cascade_rcnn.models.mask_head import MaskHead, mask_loss, mask_targets
from mask_shapes import blobs, crops_of, rois_around


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
