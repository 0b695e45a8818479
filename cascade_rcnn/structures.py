"""The structures passed between the parts of the program, and their conventions.

B images, G objects per image (padded), D detections per image (padded), M pixels of all masks.

* Boxes are float32 ``(x1, y1, x2, y2)`` in pixels of the current image; width = x2 - x1 (no +1).
* Labels are 0..K-1 and K is the background. Sizes are (height, width).
* Images are uint8 RGB until they are on the device. Masks are bool in memory and RLE in files.
* Ragged data is padded, and a boolean mask marks the real rows: the same code then compiles, captures and exports,
  and the host never waits for the device. Padding rows hold finite values (zeros), never NaN.
* Losses are named ``rpn_cls rpn_box s0.cls s0.box s0.mask s1.cls ...``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

_Batch = TypeVar("_Batch", bound="_TensorBatch")


class _TensorBatch:
    """Moves every tensor of a dataclass to a device; what is not a tensor stays."""

    def to(self: _Batch, device: torch.device | str, *, non_blocking: bool = False) -> _Batch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self: _Batch) -> _Batch:
        return self._map(lambda tensor: tensor.pin_memory())

    def tensors(self) -> list[Tensor]:
        """All of them."""
        values = [getattr(self, field.name) for field in fields(self)]  # type: ignore[arg-type]
        inner = [tensor for value in values if isinstance(value, _TensorBatch) for tensor in value.tensors()]
        return [value for value in values if isinstance(value, Tensor)] + inner

    def _map(self: _Batch, function: Any) -> _Batch:
        changed: dict[str, Any] = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = function(value)
            elif isinstance(value, _TensorBatch):
                changed[field.name] = value._map(function)
        return replace(self, **changed)  # type: ignore[type-var]


@dataclass
class ImageBatch(_TensorBatch):
    """A batch of images as the network takes them: resized, padded right and below to a common size."""

    pixels: Tensor  # uint8 [B, 3, H, W], RGB, zero where padded (float32 at test time as in the authors' release)
    sizes: Tensor  # int64 [B, 2], (height, width) of each image within the padding
    original_sizes: Tensor  # int64 [B, 2], (height, width) before resizing
    image_ids: tuple[int | str, ...] = ()
    paths: tuple[str, ...] = ()
    bad: tuple[tuple[str, str], ...] = ()  # (path, reason) of unreadable images; see ``Loader``
    scales: Tensor | None = None  # float32 [B], Detectron's one factor for both axes; None: each side has its own

    def __len__(self) -> int:
        return int(self.pixels.shape[0])


@dataclass
class MaskCrops(_TensorBatch):
    """Binary masks of all objects of a batch, each cropped to its own extent and stored in one flat buffer.

    5,000 small objects cost their own pixels instead of 5,000 whole images. The pixel (row r, column c) of the network
    input belongs to object ``(b, g)`` if it lies inside the crop and
    ``pixels[offsets[b, g] + (r - origins[b, g, 0]) * sizes[b, g, 1] + (c - origins[b, g, 1])]`` is 1.
    An object without a mask has size (0, 0).
    """

    pixels: Tensor  # uint8 [M], 0 or 1
    offsets: Tensor  # int64 [B, G]
    origins: Tensor  # int64 [B, G, 2], (top row, left column) of the crop in pixels of the network input
    sizes: Tensor  # int64 [B, G, 2], (height, width) of the crop
    max_size: tuple[int, int] = (0, 0)  # largest crop of the batch, known on the host


@dataclass
class Targets(_TensorBatch):
    """The objects of a batch of images. Rows with neither ``valid`` nor ``ignore`` are padding."""

    boxes: Tensor  # float32 [B, G, 4], xyxy in pixels of the network input
    labels: Tensor  # int64 [B, G], 0..K-1
    valid: Tensor  # bool [B, G], objects to detect
    ignore: Tensor  # bool [B, G], regions to keep out of the negatives (crowds, DontCare); never also valid
    masks: MaskCrops | None = None

    @staticmethod
    def empty(batch: int, *, rows: int = 1) -> Targets:
        """Targets of images without objects."""
        no = torch.zeros(batch, rows, dtype=torch.bool)
        return Targets(torch.zeros(batch, rows, 4), torch.zeros(batch, rows, dtype=torch.int64), no, no.clone())


@dataclass
class Proposals(_TensorBatch):
    """Boxes that the RPN or a stage passes to the next stage."""

    boxes: Tensor  # float32 [B, N, 4], xyxy in pixels of the network input
    valid: Tensor  # bool [B, N]
    scores: Tensor | None = None  # float32 [B, N], the RPN's; -inf where not valid


@dataclass
class RawDetections(_TensorBatch):
    """What the network finds in a batch, padded, in pixels of the network input, sorted by descending score."""

    boxes: Tensor  # float32 [B, D, 4]
    scores: Tensor  # float32 [B, D], 0..1; 0 where not valid
    labels: Tensor  # int64 [B, D]
    valid: Tensor  # bool [B, D]
    masks: Tensor | None = None  # float32 [B, D, m, m], probability of the object inside its box
    scales: Tensor | None = None  # float32 [B]: boxes of whole pixels (Detectron), to be divided by this; else None
