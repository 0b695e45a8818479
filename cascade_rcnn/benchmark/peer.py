"""torchvision's network, which ours is measured beside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def build_peer(*, masks: bool, options: dict[str, Any]) -> nn.Module:
    """torchvision's Faster or Mask R-CNN of ResNet-50 without weights, for images that keep their size."""
    from torchvision.models import detection

    make = detection.maskrcnn_resnet50_fpn if masks else detection.fasterrcnn_resnet50_fpn
    return make(weights=None, weights_backbone=None, _skip_resize=True, **options)  # type: ignore[no-any-return]
