"""What the detector finds in an image, as torch's tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cascade_rcnn.runtime.detections import AnyDetections


@dataclass(repr=False)
class Detections(AnyDetections[Tensor]):
    """The D objects found in one image, sorted by descending score; every tensor is on the CPU."""

    @property
    def masks(self) -> Tensor | None:
        """Pasted masks, bool [D, H, W]; None for a model without masks. Takes D x H x W bytes: see ``mask_crops``."""
        return None if self.mask_probs is None else torch.from_numpy(self._pasted())
