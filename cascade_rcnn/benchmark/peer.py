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


def freeze_peer(model: nn.Module) -> None:
    """Train what torchvision trains from ImageNet's weights, and we do: all but the stem, layer 1 and the statistics.

    Its own frozen norms would be slower than these: several operations for each, in float32.
    """
    from torch.nn import BatchNorm2d

    for name, module in model.named_modules():
        if isinstance(module, BatchNorm2d):
            module.eval()
        if name.removeprefix("backbone.body.") in ("conv1", "bn1", "layer1"):
            module.requires_grad_(False)
