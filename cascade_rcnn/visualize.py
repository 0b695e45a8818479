"""Pictures of detections, of annotations, and of what the network really saw.

    draw_detections("street.jpg", detections).save("out.jpg")
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cascade_rcnn.charts import ap_by_iou_chart, contact_sheet, side_by_side
from cascade_rcnn.detections import Detections, MaskCrop
from cascade_rcnn.drawing import Mark, class_color, draw_marks

if TYPE_CHECKING:
    from torch import Tensor

    from cascade_rcnn.data.records import ImageRecord, Segmentation
    from cascade_rcnn.structures import ImageBatch, MaskCrops, Targets

__all__ = [
    "ap_by_iou_chart", "contact_sheet", "draw_batch", "draw_detections", "draw_record", "draw_targets", "side_by_side",
]


def draw_detections(image: str | Path | Image.Image | NDArray[np.uint8] | Tensor, detections: Detections, *,
                    score_threshold: float = 0.0, show_scores: bool = True, labels: bool = True,
                    mask_alpha: float = 0.4, scale: int = 1) -> Image.Image:
    """A new picture of the image's size (times ``scale``) with boxes, masks, names and scores.

    ``image`` is a file, a picture, uint8 [H, W, 3] RGB or a uint8 tensor [3, H, W], of the size of the detections.
    Many detections hide their labels behind a legend of class counts.
    """
    picture = _to_picture(image)
    if (picture.height, picture.width) != tuple(detections.size):
        raise ValueError(
            f"image of {picture.width}x{picture.height} pixels for detections made in "
            f"{detections.size[1]}x{detections.size[0]}: give the same image"
        )
    kept = detections[detections.scores >= score_threshold]
    kept = kept[kept.scores.argsort(descending=True, stable=True)]
    picture = _enlarged(picture, scale)
    kept = replace(kept, boxes=kept.boxes * scale, size=(picture.height, picture.width))
    crops = kept.mask_crops() if kept.mask_probs is not None else iter([None] * len(kept))
    marks = []
    for box, score, label, crop in zip(kept.boxes.tolist(), kept.scores.tolist(), kept.labels.tolist(), crops):
        name = kept.class_names[label]
        text = f"{name} {score:.2f}" if show_scores else name
        marks.append(Mark(tuple(box), class_color(label), text=text, name=name, crop=crop))
    return draw_marks(picture, marks, mask_alpha=mask_alpha, labels=labels)


def draw_record(record: ImageRecord, class_names: tuple[str, ...], *, image: Image.Image | None = None,
                mask_alpha: float = 0.4, scale: int = 1) -> Image.Image:
    """A picture (``scale`` times the image's size) of its annotations; regions to ignore are hatched in grey."""
    picture = image if image is not None else _to_picture(record.path)
    marks = []
    rows = zip((record.boxes * scale).tolist(), record.labels.tolist(), record.ignore.tolist())
    for row, (box, label, ignore) in enumerate(rows):
        name = "ignored" if ignore else class_names[label]
        segmentation = record.segmentations[row] if record.segmentations is not None else None
        crop = None if segmentation is None else _crop_of(segmentation, picture, record.source, scale)
        marks.append(Mark(tuple(box), class_color(label), text=name, name=name, crop=crop, ignore=ignore))
    return draw_marks(_enlarged(picture, scale), marks, mask_alpha=mask_alpha)


def draw_batch(images: ImageBatch, targets: Targets, class_names: tuple[str, ...]) -> list[Image.Image]:
    """What the network is shown: each padded image with its objects; ignored regions and padding are hatched."""
    pictures = []
    for index in range(len(images)):
        pixels = images.pixels[index].permute(1, 2, 0).cpu().numpy().copy()
        height, width = images.sizes[index].tolist()
        _mark_padding(pixels, height, width)
        pictures.append(draw_targets(Image.fromarray(pixels), targets, index, class_names))
    return pictures


def draw_targets(picture: Image.Image, targets: Targets, index: int, class_names: tuple[str, ...]) -> Image.Image:
    """The objects of image ``index`` of a batch on a picture of the network's input."""
    marks = []
    for row in (targets.valid[index] | targets.ignore[index]).nonzero().flatten().tolist():
        label, ignore = int(targets.labels[index, row]), bool(targets.ignore[index, row])
        name = "ignored" if ignore else class_names[label]
        crop = None if targets.masks is None else _crop_from(targets.masks, index, row)
        box = tuple(targets.boxes[index, row].tolist())
        marks.append(Mark(box, class_color(label), text=name, name=name, crop=crop, ignore=ignore))
    return draw_marks(picture, marks)


def _enlarged(picture: Image.Image, scale: int) -> Image.Image:
    if scale == 1:
        return picture
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.LANCZOS)


def _to_picture(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    from cascade_rcnn.inputs import to_array

    return Image.fromarray(to_array(image))


def _crop_from(masks: MaskCrops, index: int, row: int) -> MaskCrop | None:
    height, width = masks.sizes[index, row].tolist()
    if height * width == 0:
        return None
    top, left = masks.origins[index, row].tolist()
    start = int(masks.offsets[index, row])
    pixels = masks.pixels[start : start + height * width].cpu().numpy().reshape(height, width).astype(np.bool_)
    # a crop may reach over the image's edge by rounding; drawing starts at the first pixel inside
    return MaskCrop(max(top, 0), max(left, 0), pixels[max(-top, 0) :, max(-left, 0) :])


def _crop_of(segmentation: Segmentation, picture: Image.Image, source: str, scale: int) -> MaskCrop | None:
    """The pixels of polygons or RLE, decoded in a window around the object."""
    from cascade_rcnn.data.masks import decode_window, pack_segmentation

    window = decode_window(pack_segmentation(segmentation, source=source), (picture.height, picture.width))
    if window is None:
        return None
    pixels, top, left = window
    inside = pixels.astype(np.bool_).repeat(scale, axis=0).repeat(scale, axis=1)
    return MaskCrop(top * scale, left * scale, inside)


def _mark_padding(pixels: NDArray[np.uint8], height: int, width: int) -> None:
    """Dark diagonal stripes where the batch is padded, in place."""
    rows, columns = np.ogrid[: pixels.shape[0], : pixels.shape[1]]
    stripes = np.where((rows + columns) // 8 % 2 == 0, 48, 72).astype(np.uint8)
    outside = (rows >= height) | (columns >= width)
    pixels[outside] = stripes[outside][:, None]
