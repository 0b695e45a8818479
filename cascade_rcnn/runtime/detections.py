"""What the detector finds in an image, in pixels of that image, and how to take it elsewhere.

D detections, m side of the mask head's output. Masks stay [D, m, m] probabilities until somebody asks for pixels, and
are then pasted object by object within their own box: 300 masks in a 12-megapixel image never lie in memory as 300
bitmaps unless ``.masks`` is read.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, SupportsIndex, TypeVar

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.data.contours import EXACT, Outline, Ring, outlines, with_slits
from cascade_rcnn.data.rle import MOST_RLE_PIXELS, MaskCrop, encode_crop
from cascade_rcnn.errors import UserError
from cascade_rcnn.runtime.paste_masks import paste_in_whole_pixels, paste_mask

if TYPE_CHECKING:
    from typing_extensions import Self

A = TypeVar("A", bound=Any)  # torch's tensors, or NumPy's arrays where torch is not installed


@dataclass
class AnyDetections(ABC, Generic[A]):
    """The D objects found in one image, sorted by descending score; ``A`` is the kind of the tensors or arrays."""

    boxes: A  # float32 [D, 4], xyxy in original pixels
    scores: A  # float32 [D], 0..1
    labels: A  # int64 [D], 0..K-1
    size: tuple[int, int]  # (height, width) of the image
    class_names: tuple[str, ...]
    mask_probs: A | None = None  # float [D, m, m], probability of the object inside its box
    image: str | Path | NDArray[np.uint8] | None = None  # the file, or the pixels uint8 [H, W, 3], to draw on
    image_id: int | str | None = None
    category_ids: tuple[int, ...] = ()  # [K], the data set's own id of each class; empty: 1..K
    whole_pixels: bool = False  # masks are pasted as Detectron does

    def __len__(self) -> int:
        return int(self.boxes.shape[0])

    def __getitem__(self, index: SupportsIndex | slice | A | NDArray[Any] | list[int] | list[bool]) -> Self:
        """The chosen detections: by position, slice, list of positions, or boolean mask [D].

        A position is any whole number: ``int``, ``np.int64``, a tensor without dimensions as ``argmax()`` gives it.

        Raises:
            IndexError: no such position, a mask of another length, or an index that is none of these.
        """
        rows = self._rows(index)
        probs = None if self.mask_probs is None else self.mask_probs[rows]
        return replace(
            self, boxes=self.boxes[rows], scores=self.scores[rows], labels=self.labels[rows], mask_probs=probs
        )

    def __iter__(self) -> Iterator[Self]:
        """Each detection as ``Detections`` of length 1."""
        return (self[row] for row in range(len(self)))

    def _rows(self, index: Any) -> NDArray[Any]:
        """Positions int64 [N] or mask bool [D]."""
        if isinstance(index, slice):
            return np.array(range(len(self))[index], dtype=np.int64)
        single = _whole_number(index)
        if single is not None:
            if not -len(self) <= single < len(self):
                raise IndexError(f"detection {single}: there are {len(self)}")
            return np.array([single])
        try:
            rows = np.asarray(index)
        except (TypeError, ValueError, RuntimeError) as error:
            raise IndexError(f"detections[{index!r}]: give a position, slice, positions or a mask") from error
        if rows.dtype.kind not in "biufc":
            raise IndexError(f"detections[{index!r}]: give a position, slice, positions or a mask")
        rows = rows.astype(np.int64) if rows.size == 0 and rows.dtype != np.bool_ else rows
        if rows.ndim != 1 or rows.dtype.kind in "fc":
            raise IndexError(
                f"an index of {rows.dtype} {list(rows.shape)}: give whole numbers [N] or a mask [{len(self)}]"
            )
        if rows.dtype == np.bool_:
            if len(rows) != len(self):
                raise IndexError(f"a mask of {len(rows)} for {len(self)} detections")
            return rows
        if rows.dtype == np.uint8 and len(rows):  # NumPy takes these for positions, torch for a mask
            raise IndexError("an index of uint8 may be positions or a mask: make it int64 or bool")
        rows = rows.astype(np.int64)
        if len(rows) and not (-len(self) <= int(rows.min()) and int(rows.max()) < len(self)):
            raise IndexError(f"detections {rows.tolist()}: there are {len(self)}")
        return rows

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

    def enlarged(self, scale: int) -> Self:
        """The same on an image ``scale`` times as large each way."""
        height, width = self.size
        return replace(self, boxes=self.boxes * scale, size=(height * scale, width * scale))

    @property
    @abstractmethod
    def masks(self) -> A | None:
        """Pasted masks, bool [D, H, W]; None for a model without masks. Takes D x H x W bytes: see ``mask_crops``."""

    def _pasted(self) -> NDArray[np.bool_]:
        masks = np.zeros((len(self), *self.size), dtype=np.bool_)
        for row, crop in enumerate(self.mask_crops()):
            height, width = crop.pixels.shape
            masks[row, crop.top : crop.top + height, crop.left : crop.left + width] = crop.pixels
        return masks

    def mask_crops(self) -> Iterator[MaskCrop]:
        """Each detection's pasted mask cut to its box, one at a time."""
        if self.mask_probs is not None:
            paste = paste_in_whole_pixels if self.whole_pixels else paste_mask
            for box, probs in zip(np.asarray(self.boxes, dtype=np.float64), _floats(self.mask_probs)):
                yield paste(probs, box, self.size)

    def outlines(self, *, tolerance: float = EXACT) -> list[list[Outline]]:
        """The outline of each detection's mask: its parts, largest first, each with ``outer`` and ``holes`` [V, 2].

        See ``polygons``, which has the holes in the ring itself.
        """
        if self.mask_probs is None and len(self):
            raise UserError("no masks in these detections, so there are no outlines: use a model with masks")
        return [outlines(crop, tolerance=tolerance) for crop in self.mask_crops()]

    def polygons(self, *, tolerance: float = EXACT) -> list[list[Ring]]:
        """The polygons of each detection's mask: one ring float64 [V, 2] of x, y per part, largest first.

        Drawn again, they give exactly the mask's pixels. Coordinates are pixels of the image, the first one reaching
        from 0 to 1. A hole is cut into its ring by a slit without width, so that formats and tools without holes show
        it; ``outlines`` gives holes apart. An empty mask has no ring.

        Args:
            tolerance: pixels that a ring may lie off to have fewer points; above 0.2 pixels at the border may change.

        Raises:
            UserError: detections of a model without masks.
        """
        return [[with_slits(part) for part in parts] for parts in self.outlines(tolerance=tolerance)]

    def to_coco(self, *, polygons: bool = False) -> list[dict[str, Any]]:
        """COCO results: ``image_id`` (when known), ``category_id``, ``bbox`` [x, y, w, h], ``score``, ``segmentation``.

        Numbers keep their full float precision; masks are compressed RLE, pasted one at a time, or ``polygons`` as
        those of :meth:`polygons` (an empty mask stays RLE: COCO has no list without a polygon). A picture of 2^32
        pixels or more always has polygons: the runs of COCO's tools end there.
        """
        polygons = polygons or self.size[0] * self.size[1] > MOST_RLE_PIXELS
        ids = self.category_ids or tuple(range(1, len(self.class_names) + 1))
        known: dict[str, Any] = {} if self.image_id is None else {"image_id": self.image_id}
        results = []
        crops = self.mask_crops()
        for (x1, y1, x2, y2), score, label in zip(self.boxes.tolist(), self.scores.tolist(), self.labels.tolist()):
            result = {**known, "category_id": ids[label], "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
            if self.mask_probs is not None:
                crop = next(crops)
                rings = [with_slits(part) for part in outlines(crop)] if polygons else []
                flat = [ring.reshape(-1).tolist() for ring in rings]
                result["segmentation"] = flat or encode_crop(crop, self.size)
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
            xyxy=np.asarray(self.boxes, dtype=np.float32).reshape(-1, 4),
            confidence=np.asarray(self.scores, dtype=np.float32),
            class_id=np.asarray(self.labels).astype(int),
            mask=None if masks is None else np.asarray(masks),
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


class ArrayDetections(AnyDetections[NDArray[Any]]):
    """What an exported network finds where torch is not installed: NumPy's arrays."""

    @property
    def masks(self) -> NDArray[np.bool_] | None:
        """Pasted masks, bool [D, H, W]; None for a model without masks. Takes D x H x W bytes: see ``mask_crops``."""
        return None if self.mask_probs is None else self._pasted()


def _floats(values: Any) -> NDArray[np.float32]:
    """A tensor of any precision, or an array, as float32."""
    floats: NDArray[np.float32] = np.asarray(values.float() if hasattr(values, "float") else values, dtype=np.float32)
    return floats


def _whole_number(index: Any) -> int | None:
    """The number itself if it is one: of Python, NumPy or torch (also an array or tensor without dimensions)."""
    if isinstance(index, (bool, np.bool_)) or getattr(index, "ndim", 0) != 0:
        return None
    if str(getattr(index, "dtype", None)) in ("torch.bool", "bool"):
        return None
    try:
        return operator.index(index)
    except TypeError:
        return None
