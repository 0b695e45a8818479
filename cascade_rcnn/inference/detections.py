"""What the detector finds in an image, in pixels of that image, and how to take it elsewhere.

D detections, m side of the mask head's output. Masks stay [D, m, m] probabilities until somebody asks for pixels, and
are then pasted object by object within their own box: 300 masks in a 12-megapixel image never lie in memory as 300
bitmaps unless ``.masks`` is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cascade_rcnn.errors import UserError
from cascade_rcnn.models.boxes import scale_boxes
from cascade_rcnn.structures import ImageBatch, RawDetections

if TYPE_CHECKING:
    from cascade_rcnn.models.cascade_rcnn import CascadeRCNN

MASK_THRESHOLD = 0.5


class MaskCrop(NamedTuple):
    """A binary mask cut to the surroundings of its object: ``pixels[0, 0]`` is the image's pixel (top, left)."""

    top: int
    left: int
    pixels: NDArray[np.bool_]  # [h, w]


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
            self.boxes[index], self.scores[index], self.labels[index], self.size, self.class_names, mask_probs=probs,
            image=self.image, image_id=self.image_id, category_ids=self.category_ids, whole_pixels=self.whole_pixels,
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
            raise UserError("no image to draw on in these detections: use visualize.draw_detections(image, detections)")
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


def _bilinear_weights(start: float, end: float, first: int, last: int, side: int) -> NDArray[np.float32]:
    """Weights [last - first, side] of a bilinear sample at each pixel's centre, on ``side`` cells from start to end.

    As ``grid_sample`` with ``align_corners=False`` and zeros outside: a tent of one cell around each cell's centre.
    """
    centres = (np.arange(first, last, dtype=np.float64) + 0.5 - start) / (end - start) * side - 0.5
    distance: NDArray[np.float64] = np.abs(centres[:, None] - np.arange(side, dtype=np.float64))
    return np.maximum(0.0, 1.0 - distance).astype(np.float32)


def paste_mask(probs: NDArray[np.float32], box: NDArray[np.float64], size: tuple[int, int],
               threshold: float = MASK_THRESHOLD) -> MaskCrop:
    """Paste the probabilities [m, m] of one object into its box xyxy and threshold them, inside the image only.

    The bilinear map is separable, so that it is two small matrix products: rows [h, m] @ probs [m, m] @ columns [m, w].
    As in mmdetection and detectron2, one pixel around the box is looked at too.
    """
    height, width = size
    x1, y1, x2, y2 = (float(v) for v in box)
    left, right = max(int(np.floor(x1)) - 1, 0), min(int(np.ceil(x2)) + 1, width)
    top, bottom = max(int(np.floor(y1)) - 1, 0), min(int(np.ceil(y2)) + 1, height)
    if x2 <= x1 or y2 <= y1 or right <= left or bottom <= top:
        return MaskCrop(0, 0, np.zeros((0, 0), dtype=np.bool_))
    rows = _bilinear_weights(y1, y2, top, bottom, probs.shape[0])
    columns = _bilinear_weights(x1, x2, left, right, probs.shape[1])
    return MaskCrop(top, left, (rows @ probs @ columns.T) >= threshold)


def paste_in_whole_pixels(probs: NDArray[np.float32], box: NDArray[np.float64], size: tuple[int, int],
                          threshold: float = MASK_THRESHOLD) -> MaskCrop:
    """As :func:`paste_mask`, in Detectron's way: its box, which ends with a pixel, is enlarged by a cell of the mask on
    each side and cut to whole pixels (towards zero), and the mask with a border of zeros is resized to those.
    """
    side = len(probs)
    far = box[2:] - 1
    middle, half = (box[:2] + far) * 0.5, (far - box[:2]) * 0.5 * ((side + 2) / side)
    (x1, y1), (x2, y2) = (middle - half).astype(int).tolist(), (middle + half).astype(int).tolist()
    left, right = max(x1, 0), min(x2 + 1, size[1])
    top, bottom = max(y1, 0), min(y2 + 1, size[0])
    if right <= left or bottom <= top:
        return MaskCrop(0, 0, np.zeros((0, 0), dtype=np.bool_))
    rows = _bilinear_weights(y1, y2 + 1, top, bottom, side + 2)[:, 1:-1]
    columns = _bilinear_weights(x1, x2 + 1, left, right, side + 2)[:, 1:-1]
    return MaskCrop(top, left, (rows @ probs @ columns.T) > threshold)


def encode_crop(crop: MaskCrop, size: tuple[int, int]) -> dict[str, Any]:
    """COCO's compressed RLE of a crop within an image of ``size``; costs the crop's pixels, not the image's."""
    from faster_coco_eval.core import mask as coco_mask

    height, width = size
    rows, columns = crop.pixels.shape
    padded = np.zeros((columns, rows + 2), dtype=np.bool_)  # RLE runs down the columns; the padding ends each run
    padded[:, 1:-1] = crop.pixels.T
    flat = padded.reshape(-1)
    column, row = np.divmod(np.flatnonzero(flat[1:] != flat[:-1]) + 1, rows + 2)
    edges = (column + crop.left) * height + row - 1 + crop.top  # start, end, start, end, ... in the image's columns
    starts, ends = edges[::2], edges[1::2]
    if len(starts) > 1:  # a run that touches the bottom goes on at the top of the next column
        apart = starts[1:] != ends[:-1]
        starts, ends = starts[np.append(True, apart)], ends[np.append(apart, True)]
    borders = np.stack([starts, ends], axis=1).reshape(-1)
    counts = np.diff(np.concatenate([[0], borders, [height * width]])).tolist()
    if counts[-1] == 0 and len(counts) > 1:
        counts.pop()
    encoded = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    text = encoded["counts"]
    return {"size": [height, width], "counts": text.decode("ascii") if isinstance(text, bytes) else text}


Precision = Literal["auto", "fp32", "tf32", "bf16"]


@dataclass(frozen=True)
class Inference:
    """How the commands run the network; None: as the checkpoint says. See ``predict.load``."""

    batch_size: int = 1
    precision: Precision = "auto"
    compile: bool = False
    stages: int | None = None  # stop after so many
    score_threshold: float | None = None
    max_detections: int | None = None


AS_SAVED = Inference()


def choose_precision(precision: Precision, device: torch.device) -> Literal["fp32", "tf32", "bf16"]:
    """``auto``: float32, and on NVIDIA GPUs that have it (from Ampere on) with products in TF32.

    Raises:
        UserError: TF32 where there is none.
    """
    has_tf32 = device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 8
    if precision == "tf32" and not has_tf32:
        raise UserError(f"precision tf32: {device} has no such units; use auto, fp32 or bf16")
    if precision == "auto":
        return "tf32" if has_tf32 else "fp32"
    return precision


@contextmanager
def _arithmetic(device: torch.device, precision: Precision) -> Iterator[None]:
    """Products in that precision inside; box arithmetic stays in float32."""
    chosen = choose_precision(precision, device)
    if device.type != "cuda":
        with torch.autocast(device.type, torch.bfloat16, enabled=chosen == "bf16"):
            yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = chosen != "fp32"
    try:
        with torch.autocast("cuda", torch.bfloat16, enabled=chosen == "bf16"):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def detect(model: CascadeRCNN, images: ImageBatch, precision: Precision = "auto") -> RawDetections:
    """Run a batch on the model's own device, in evaluation mode; the result is on the CPU."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(), _arithmetic(device, precision):
            return model.detect(images.to(device, non_blocking=True)).to("cpu")
    finally:
        model.train(training)


def to_detections(raw: RawDetections, images: ImageBatch, class_names: Sequence[str],
                  category_ids: Sequence[int] = ()) -> list[Detections]:
    """Take a padded batch apart; boxes go from the network's input to original pixels, by each side's own factor.

    Those of Detectron's semantics (``raw.scales``) by one factor, which scales their last pixel.
    """
    results = []
    factors = images.original_sizes.double() / images.sizes.double()  # [B, 2] height, width
    for index, size in enumerate(images.original_sizes.tolist()):
        valid = raw.valid[index].cpu()
        scale = factors[index].flip(0).repeat(2).cpu()  # x, y, x, y
        limit = torch.tensor([size[1], size[0]] * 2, dtype=torch.float64)
        boxes = raw.boxes[index].cpu()[valid].double()
        if raw.scales is None:
            boxes = boxes * scale
        else:
            boxes = scale_boxes(boxes[None], 1 / raw.scales[index : index + 1].cpu().double())[0]
        boxes = torch.minimum(boxes, limit).clamp(min=0).float()
        results.append(Detections(
            boxes, raw.scores[index].cpu().float()[valid], raw.labels[index].cpu()[valid], (size[0], size[1]),
            tuple(class_names), mask_probs=None if raw.masks is None else raw.masks[index].cpu()[valid],
            image_id=images.image_ids[index] if images.image_ids else None, category_ids=tuple(category_ids),
            whole_pixels=raw.scales is not None,
        ))
    return results
