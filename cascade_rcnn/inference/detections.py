"""What the detector finds in an image, in pixels of that image, and how to take it elsewhere.

D detections, m side of the mask head's output. Masks stay [D, m, m] probabilities until somebody asks for pixels, and
are then pasted object by object within their own box: 300 masks in a 12-megapixel image never lie in memory as 300
bitmaps unless ``.masks`` is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cascade_rcnn.data.rle import MaskCrop, encode_crop
from cascade_rcnn.errors import UserError
from cascade_rcnn.inference.paste_masks import paste_in_whole_pixels, paste_mask

if TYPE_CHECKING:
    pass


@dataclass
class Detections:
    """The D objects found in one image, sorted by falling score; every tensor is on the CPU."""

    boxes: Tensor  # float32 [D, 4], xyxy in original pixels
    scores: Tensor  # float32 [D], 0..1
    labels: Tensor  # int64 [D], 0..K-1
    size: tuple[int, int]  # (height, width) of the image
    class_names: tuple[str, ...]
    mask_probs: Tensor | None = None  # float [D, m, m], probability of the object inside its box
    image: str | Path | NDArray[np.uint8] | None = None  # the file, or the pixels uint8 [H, W, 3], to draw on
    image_id: int | str | None = None
    category_ids: tuple[int, ...] = ()  # [K], the data set's own id of each class; empty: 1..K
    whole_pixels: bool = False  # masks are pasted as Detectron does

    def __len__(self) -> int:
        return int(self.boxes.shape[0])

    def __getitem__(self, index: int | slice | Tensor | NDArray[Any] | list[int] | list[bool]) -> Detections:
        """The chosen detections: by position, slice, list of positions, or boolean mask [D]."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"detection {index}: there are {len(self)}")
            index = [index]
        if not isinstance(index, slice):
            index = torch.as_tensor(index)
            index = index.long() if index.numel() == 0 and index.dtype != torch.bool else index
        probs = None if self.mask_probs is None else self.mask_probs[index]
        return Detections(
            self.boxes[index],
            self.scores[index],
            self.labels[index],
            self.size,
            self.class_names,
            mask_probs=probs,
            image=self.image,
            image_id=self.image_id,
            category_ids=self.category_ids,
            whole_pixels=self.whole_pixels,
        )

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in Counter(self.names).most_common(5))
        more = len(set(self.names)) - 5
        kinds = f" ({counts}{f', and {more} more classes' if more > 0 else ''})" if len(self) else ""
        masks = ", with masks" if self.mask_probs is not None else ""
        best = f", best score {float(self.scores.max()):.2f}" if len(self) else ""
        return f"Detections({len(self)} in {self.size[1]}x{self.size[0]} pixels{kinds}{best}{masks})"

    @property
    def names(self) -> list[str]:
        """Class name of each detection."""
        return [self.class_names[label] for label in self.labels.tolist()]

    def enlarged(self, scale: int) -> Detections:
        """The same on an image ``scale`` times as large each way."""
        height, width = self.size
        return replace(self, boxes=self.boxes * scale, size=(height * scale, width * scale))

    @property
    def masks(self) -> Tensor | None:
        """Pasted masks, bool [D, H, W]; None for a model without masks. Takes D x H x W bytes: see ``mask_crops``."""
        if self.mask_probs is None:
            return None
        masks = torch.zeros(len(self), *self.size, dtype=torch.bool)
        for row, crop in enumerate(self.mask_crops()):
            height, width = crop.pixels.shape
            masks[row, crop.top : crop.top + height, crop.left : crop.left + width] = torch.from_numpy(crop.pixels)
        return masks

    def mask_crops(self) -> Iterator[MaskCrop]:
        """Each detection's pasted mask cut to its box, one at a time."""
        if self.mask_probs is not None:
            paste = paste_in_whole_pixels if self.whole_pixels else paste_mask
            for box, probs in zip(self.boxes.double().numpy(), self.mask_probs.float().numpy()):
                yield paste(probs, box, self.size)

    def to_coco(self) -> list[dict[str, Any]]:
        """COCO results: ``image_id`` (when known), ``category_id``, ``bbox`` [x, y, w, h], ``score``, ``segmentation``.

        Numbers keep their full float precision; masks are compressed RLE, pasted one at a time.
        """
        ids = self.category_ids or tuple(range(1, len(self.class_names) + 1))
        known: dict[str, Any] = {} if self.image_id is None else {"image_id": self.image_id}
        results = []
        crops = self.mask_crops()
        for (x1, y1, x2, y2), score, label in zip(self.boxes.tolist(), self.scores.tolist(), self.labels.tolist()):
            result = {**known, "category_id": ids[label], "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
            if self.mask_probs is not None:
                result["segmentation"] = encode_crop(next(crops), self.size)
            results.append(result)
        return results

    def to_supervision(self) -> Any:
        """The same as ``supervision.Detections``, class names in ``data["class_name"]``."""
        try:
            import supervision
        except ImportError as error:
            raise UserError("the package supervision is missing: pip install 'cascade-rcnn[supervision]'") from error
        masks = self.masks
        return supervision.Detections(
            xyxy=self.boxes.numpy().astype(np.float32).reshape(-1, 4),
            confidence=self.scores.numpy().astype(np.float32),
            class_id=self.labels.numpy().astype(int),
            mask=None if masks is None else masks.numpy(),
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def draw(self, **options: Any) -> Any:
        """The image with boxes, masks, names and scores, a ``PIL.Image``; options as in ``draw_detections``."""
        from cascade_rcnn.drawing.annotations import draw_detections

        if self.image is None:
            raise UserError(
                "no image to draw on in these detections: use cascade_rcnn.visualize.draw_detections(image, detections)"
            )
        return draw_detections(self.image, self, **options)

    def save(self, path: str | Path, **options: Any) -> Path:
        """Draw and write a picture; the format follows the suffix. Refuses to write over the image it was made from."""
        path = Path(path)
        if isinstance(self.image, str | Path) and path.exists() and path.samefile(self.image):
            raise UserError(f"{path}: this is the image itself; choose another name for the drawing")
        drawing = self.draw(**options)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            drawing.save(path, **({"quality": 92} if path.suffix.lower() in (".jpg", ".jpeg", ".webp") else {}))
        except ValueError as error:
            raise UserError(f"{path}: unknown picture format {path.suffix!r}; use .jpg or .png") from error
        return path
