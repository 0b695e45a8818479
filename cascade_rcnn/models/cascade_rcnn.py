"""The whole network: images in, losses or detections out.

pixels -> normalise -> backbone -> FPN -> RPN -> cascade -> masks -> detections
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cascade_rcnn.models.backbone import Backbone
from cascade_rcnn.models.box_head import BoxHead
from cascade_rcnn.models.cascade import Cascade
from cascade_rcnn.models.fpn import FeaturePyramid
from cascade_rcnn.models.ops.capabilities import followed, has_triton
from cascade_rcnn.models.ops.winograd import use_winograd
from cascade_rcnn.models.rpn import RPN
from cascade_rcnn.structures import ImageBatch, RawDetections, Targets

if TYPE_CHECKING:
    from cascade_rcnn.models.ops.cuda_graphs import Recorder


class CascadeRCNN(nn.Module):
    """Cascade (Mask) R-CNN; with one stage Faster (Mask) R-CNN.

    ``mean`` and ``std`` are in grey levels, in the order RGB, or BGR with ``bgr`` (the networks trained in Caffe).
    """

    def __init__(
        self,
        backbone: Backbone,
        fpn: FeaturePyramid,
        rpn: RPN,
        cascade: Cascade,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        bgr: bool = False,
    ) -> None:
        super().__init__()
        self.recorder: Recorder | None = None  # on a GPU, replays predictions from recorded CUDA graphs
        self.backbone = backbone
        self.fpn = fpn
        self.rpn = rpn
        self.cascade = cascade
        self.bgr = bgr
        self.register_buffer("mean", torch.tensor(list(mean)).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(list(std)).view(3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def loss(self, images: ImageBatch, targets: Targets) -> dict[str, Tensor]:
        """Weighted losses by name (``rpn_cls``, ``rpn_box``, ``s0.cls``, ...); their sum is what training minimises."""
        pyramid = self.pyramid(images)
        losses, proposals = self.rpn.loss(pyramid, images.sizes, targets)
        return losses | self.cascade.loss(pyramid, proposals, images, targets)

    @torch.no_grad()
    def detect(self, images: ImageBatch) -> RawDetections:
        """Detections in pixels of the network input, sorted by descending score. Call ``eval()`` first."""
        if self.recorder is None or not images.pixels.is_cuda or followed():
            return self._detect(images)
        settings = (self.cascade.stages_at_test, self.cascade.details, self.rpn.details)
        return self.recorder(self._detect, images, settings)

    def _detect(self, images: ImageBatch) -> RawDetections:
        pyramid = self.pyramid(images)
        proposals = self.rpn.propose(pyramid, images.sizes)
        return self.cascade.detect(pyramid, proposals, images)

    def forward(self, images: ImageBatch, targets: Targets) -> dict[str, Tensor]:
        """As :meth:`loss`: what a data-parallel wrapper calls."""
        return self.loss(images, targets)

    def pyramid(self, images: ImageBatch) -> list[Tensor]:
        """Feature maps p2..p6 of a batch."""
        return self.fpn(self.backbone(self.normalize(images)))  # type: ignore[no-any-return]

    def normalize(self, images: ImageBatch) -> Tensor:
        """Normalised input [B, 3, H, W] in channels-last memory, exactly zero where an image is padded."""
        pixels = images.pixels.flip(1) if self.bgr else images.pixels
        height, width = pixels.shape[-2:]
        row, column = torch.arange(height, device=pixels.device), torch.arange(width, device=pixels.device)
        inside = (row[:, None] < images.sizes[:, 0, None, None]) & (column < images.sizes[:, 1, None, None])
        x = (pixels.float() - self.mean) / self.std * inside[:, None]
        return x.contiguous(memory_format=torch.channels_last)

    def set_activation_checkpointing(self, on: bool) -> None:
        """Recompute the backbone's activations in the backward pass: less memory, more time."""
        self.backbone.recompute = on

    def optimize_for_inference(self, *, bfloat16: bool = False) -> CascadeRCNN:
        """Prepare for inference on the weights' device: the same detections to float tolerance, but no more training.

        Batch norms are folded; box heads read RoI features in memory order; on a CPU wide convolutions take a
        quarter of the multiplications; on a GPU biases and ReLUs are applied in one pass, and predictions of a shape
        seen before are replayed as CUDA graphs. Weights may not change afterwards.

        ``bfloat16``: the network will run under autocast to it. On a CPU the weights of convolutions and linear layers
        are then kept in it, not converted in each call, and no convolution is Winograd's, whose transforms need more
        digits.
        """
        self.eval().requires_grad_(False)
        for part in (self.backbone, self.fpn, *self.cascade.mask_heads):
            part.fold_batch_norm()  # type: ignore[operator]
        for head in self.cascade.box_heads:
            assert isinstance(head, BoxHead)
            head.take_rows()
        if self.mean.device.type == "cpu":
            if bfloat16:
                _keep_in_bfloat16(self)
            else:
                for module in (self.fpn, self.rpn, self.cascade.mask_heads):
                    use_winograd(module)
        elif self.mean.device.type == "cuda" and has_triton():
            self._use_the_gpu()
        for parameter in self.parameters():
            _lay_channels_last(parameter)
        return self

    def _use_the_gpu(self) -> None:
        from cascade_rcnn.models.ops.cuda_graphs import Recorder
        from cascade_rcnn.models.ops.fused_bias import fuse_biases

        for module in (self.backbone, self.fpn, self.rpn, self.cascade.box_heads, self.cascade.mask_heads):
            fuse_biases(module)
        self.recorder = Recorder()

    def _apply(self, fn: Any, recurse: bool = True) -> CascadeRCNN:
        if self.recorder is not None:
            self.recorder.clear()  # recordings hold the weights' addresses
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


class NoInitialValues(TorchFunctionMode):
    """For building a network whose weights are loaded next: skip the random initial values.

    Saves half a second, and memory that is never written is never allocated.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("normal_", "uniform_"):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _keep_in_bfloat16(module: nn.Module) -> None:
    """Weights and biases of the layers that autocast runs in bfloat16."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            layer.to(torch.bfloat16)


def _lay_channels_last(weight: nn.Parameter) -> None:
    """Like ``to(memory_format=channels_last)``, but in place: copies would fragment the memory."""
    if weight.dim() != 4 or weight.is_contiguous(memory_format=torch.channels_last):
        return
    turned = weight.detach().permute(0, 2, 3, 1).contiguous()  # [O, H, W, I]
    weight.data = weight.detach().view(turned.shape).copy_(turned).permute(0, 3, 1, 2)
