"""Pictures of detections, of annotations, and of what the network really saw, with Pillow alone.

    draw_detections("street.jpg", detections).save("out.jpg")

Sizes suit the picture from 320 pixels to 4K. The order is: masks (large ones first, so that small ones stay visible),
boxes (best score last), labels. A label goes where it covers no other label; when labels would bury the picture they
give way to a legend of class counts.
"""

from __future__ import annotations

import colorsys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from cascade_rcnn.data.images import read_image, to_array
from cascade_rcnn.data.masks import decode_window, pack_segmentation
from cascade_rcnn.data.orientation import view_decider
from cascade_rcnn.data.records import ImageRecord, Segmentation
from cascade_rcnn.data.rle import MaskCrop

if TYPE_CHECKING:  # detections of an exported network are drawn without torch
    from torch import Tensor

    from cascade_rcnn.structures import ImageBatch, MaskCrops, Targets

Color = tuple[int, int, int]
PAPER: Color = (255, 255, 255)
INK: Color = (40, 44, 52)
IGNORED: Color = (150, 150, 150)
_DENSE = 0.22  # share of the picture that labels may cover before the legend replaces them

# Told apart with the common kinds of colour blindness: Okabe and Ito's set, then the clearest of Paul Tol's "muted".
_PALETTE: tuple[Color, ...] = (
    (230, 159, 0),
    (0, 114, 178),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
    (213, 94, 0),
    (240, 228, 66),
    (136, 34, 85),
    (153, 153, 51),
    (51, 34, 136),
    (68, 170, 153),
    (204, 102, 119),
    (17, 119, 51),
    (170, 68, 153),
)


@dataclass
class Mark:
    """One object to draw, in pixels of the picture."""

    box: tuple[float, float, float, float]  # xyxy
    color: Color
    text: str = ""
    name: str = ""  # counted in the legend
    crop: MaskCrop | None = None
    ignore: bool = False  # hatched in grey


def class_color(label: int) -> Color:
    """The colour of a class: always the same for the same position in the list of classes."""
    if label < len(_PALETTE):
        return _PALETTE[label]
    hue = (label * 0.6180339887) % 1.0  # the golden ratio spreads hues as far apart as they can be
    rgb = colorsys.hls_to_rgb(hue, (0.45, 0.62, 0.75)[label % 3], 0.75)
    return round(255 * rgb[0]), round(255 * rgb[1]), round(255 * rgb[2])


@lru_cache(maxsize=64)
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own scalable font."""
    return ImageFont.load_default(size)


@dataclass(frozen=True)
class Style:
    """Sizes in pixels that grow slower than the picture, so that 4K is not all outlines and 320 px stays legible."""

    line: int
    font: int

    @staticmethod
    def of(size: tuple[int, int], count: int = 0) -> Style:
        """For a picture of (height, width) with ``count`` objects."""
        unit = max(size[0] * size[1], 1) ** 0.5
        line = max(1, round(0.05 * unit**0.6))
        return Style(max(1, round(line * 0.6)) if count > 60 else line, max(10, round(0.46 * unit**0.55)))


class Drawable(Protocol):
    """What is drawn of detections; ``Detections`` has it."""

    boxes: Any  # tensor or array [D, 4], xyxy in pixels of the image
    scores: Any  # [D]
    labels: Any  # [D]
    size: tuple[int, int]  # (height, width)
    class_names: tuple[str, ...]
    mask_probs: Any  # None: no masks

    def __getitem__(self, index: NDArray[Any], /) -> Drawable: ...

    def __len__(self) -> int: ...

    def enlarged(self, scale: int) -> Drawable: ...

    def mask_crops(self) -> Iterator[MaskCrop]: ...


def draw_detections(
    image: str | Path | Image.Image | NDArray[np.uint8] | Tensor,
    detections: Drawable,
    *,
    score_threshold: float = 0.0,
    show_scores: bool = True,
    labels: bool = True,
    mask_alpha: float = 0.4,
    scale: int = 1,
) -> Image.Image:
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
    kept = detections[np.asarray(detections.scores) >= score_threshold]
    kept = kept[np.argsort(-np.asarray(kept.scores), kind="stable")]
    picture = _enlarged(picture, scale)
    kept = kept.enlarged(scale)
    crops = kept.mask_crops() if kept.mask_probs is not None else iter([None] * len(kept))
    marks = []
    for box, score, label, crop in zip(kept.boxes.tolist(), kept.scores.tolist(), kept.labels.tolist(), crops):
        name = kept.class_names[label]
        text = f"{name} {score:.2f}" if show_scores else name
        marks.append(Mark(tuple(box), class_color(label), text=text, name=name, crop=crop))
    return draw_marks(picture, marks, mask_alpha=mask_alpha, labels=labels)


def draw_record(
    record: ImageRecord,
    class_names: tuple[str, ...],
    *,
    image: Image.Image | None = None,
    mask_alpha: float = 0.4,
    scale: int = 1,
) -> Image.Image:
    """A picture (``scale`` times the image's size) of its annotations; regions to ignore are hatched in grey."""
    picture = image if image is not None else _picture_of(record)
    marks = []
    rows = zip((record.boxes * scale).tolist(), record.labels.tolist(), record.ignore.tolist())
    for row, (box, label, ignore) in enumerate(rows):
        name = "ignored" if ignore else class_names[label]
        segmentation = record.segmentations[row] if record.segmentations is not None else None
        crop = None if segmentation is None else _crop_of(segmentation, picture, record.source, scale)
        marks.append(Mark(tuple(box), class_color(label), text=name, name=name, crop=crop, ignore=ignore))
    return draw_marks(_enlarged(picture, scale), marks, mask_alpha=mask_alpha)


def _picture_of(record: ImageRecord) -> Image.Image:
    annotated = (record.height, record.width) if record.sized and record.height and record.width else None
    view = view_decider(annotated, "auto", path=str(record.path), sizeless=True)
    return Image.fromarray(read_image(record.path, frame=view).permute(1, 2, 0).numpy())


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


def side_by_side(
    truth: Image.Image, prediction: Image.Image, *, titles: tuple[str, str] = ("ground truth", "prediction")
) -> Image.Image:
    """Two pictures beside each other under a line of title each; the second is scaled to the first one's height."""
    if prediction.height != truth.height:
        width = max(1, round(prediction.width * truth.height / prediction.height))
        prediction = prediction.resize((width, truth.height), Image.Resampling.LANCZOS)
    size = max(11, round(0.5 * (truth.width * truth.height) ** 0.26 * 2))
    gap, head = max(4, size // 3), round(size * 1.7)
    sheet = Image.new("RGB", (truth.width + prediction.width + 3 * gap, truth.height + head + gap), PAPER)
    pen = ImageDraw.Draw(sheet)
    for left, picture, title in ((gap, truth, titles[0]), (truth.width + 2 * gap, prediction, titles[1])):
        sheet.paste(picture, (left, head))
        pen.text((left + picture.width / 2, head / 2), title, font=font(size), fill=INK, anchor="mm")
    return sheet


def _enlarged(picture: Image.Image, scale: int) -> Image.Image:
    if scale == 1:
        return picture
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.LANCZOS)


def _to_picture(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
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


def draw_marks(
    picture: Image.Image,
    marks: Sequence[Mark],
    *,
    style: Style | None = None,
    mask_alpha: float = 0.4,
    labels: bool = True,
) -> Image.Image:
    """Draw the objects, most important first in ``marks``; gives a new picture of the same size."""
    style = style or Style.of((picture.height, picture.width), len(marks))
    pixels = np.array(picture.convert("RGB"))  # a copy
    for mark in sorted(marks, key=_area, reverse=True):
        if mark.ignore:
            _hatch(pixels, mark, style)
        elif mark.crop is not None:
            _blend_mask(pixels, mark.crop, mark.color, style, mask_alpha)
    drawn = Image.fromarray(pixels)
    pen = ImageDraw.Draw(drawn, "RGBA")
    for mark in reversed(marks):
        _draw_box(pen, mark, style)
    if labels:
        _draw_labels(drawn, marks, style)
    return drawn


def _area(mark: Mark) -> float:
    return (mark.box[2] - mark.box[0]) * (mark.box[3] - mark.box[1])


def _clip(box: Sequence[float], width: int, height: int) -> tuple[int, int, int, int]:
    """Whole pixels of a box within the picture, at least one pixel each way."""
    x1 = min(max(round(box[0]), 0), width - 1)
    y1 = min(max(round(box[1]), 0), height - 1)
    return x1, y1, min(max(round(box[2]) - 1, x1), width - 1), min(max(round(box[3]) - 1, y1), height - 1)


def _draw_box(pen: ImageDraw.ImageDraw, mark: Mark, style: Style) -> None:
    width, height = pen.im.size
    x1, y1, x2, y2 = _clip(mark.box, width, height)
    line = min(style.line, max(1, min(x2 - x1, y2 - y1) // 4))  # a tiny object is not buried under its own box
    halo = max(1, line // 3)
    outer = (max(x1 - halo, 0), max(y1 - halo, 0), min(x2 + halo, width - 1), min(y2 + halo, height - 1))
    pen.rectangle(outer, outline=(0, 0, 0, 70), width=halo)
    pen.rectangle((x1, y1, x2, y2), outline=(*(IGNORED if mark.ignore else mark.color), 255), width=line)


def _blend(pixels: NDArray[np.uint8], top: int, left: int, alpha: NDArray[np.float32], color: Color) -> None:
    """Lay a colour over the picture with opacity [h, w], in place."""
    part = pixels[top : top + alpha.shape[0], left : left + alpha.shape[1]]
    weight = alpha[..., None]
    part[:] = np.rint(part * (1 - weight) + np.array(color, dtype=np.float32) * weight).astype(np.uint8)


def _blend_mask(pixels: NDArray[np.uint8], crop: MaskCrop, color: Color, style: Style, mask_alpha: float) -> None:
    """A translucent fill with a smooth, nearly opaque outline."""
    if not crop.pixels.any():
        return
    radius = max(0.6, 0.55 * style.line)
    border = int(np.ceil(2 * radius)) + 1
    padded = np.pad(crop.pixels.astype(np.uint8) * 255, border, mode="constant")
    height, width = pixels.shape[:2]
    top, left = crop.top - border, crop.left - border
    rows, columns = crop.pixels.shape
    # beyond the picture's edge the object goes on: no outline there
    if crop.top == 0:
        padded[:border] = padded[border]
    if crop.left == 0:
        padded[:, :border] = padded[:, border : border + 1]
    if crop.top + rows == height:
        padded[-border:] = padded[-border - 1]
    if crop.left + columns == width:
        padded[:, -border:] = padded[:, -border - 1 : -border]
    smooth = np.asarray(Image.fromarray(padded).filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32) / 255
    outline = np.clip(1.5 * (1 - np.abs(2 * smooth - 1)), 0, 1) * 0.9
    alpha = np.maximum(mask_alpha * smooth, outline)
    y1, x1 = max(-top, 0), max(-left, 0)
    alpha = alpha[y1 : height - top, x1 : width - left]
    _blend(pixels, top + y1, left + x1, alpha, color)


def _hatch(pixels: NDArray[np.uint8], mark: Mark, style: Style) -> None:
    """Grey diagonal stripes over an ignored region: its mask, or its whole box."""
    height, width = pixels.shape[:2]
    if mark.crop is not None and mark.crop.pixels.any():
        top, left, inside = mark.crop
    else:
        x1, y1, x2, y2 = _clip(mark.box, width, height)
        top, left, inside = y1, x1, np.ones((y2 - y1 + 1, x2 - x1 + 1), dtype=np.bool_)
    rows = np.arange(inside.shape[0], dtype=np.float32)[:, None] + top
    columns = np.arange(inside.shape[1], dtype=np.float32)[None] + left
    period = 6.0 * style.line + 4
    stripe = np.abs((rows + columns) % period / period - 0.5) * 2  # 0..1..0, smooth at the edges
    alpha = np.clip((stripe - 0.5) * period / 2 + 0.5, 0, 1) * 0.45 + 0.25
    _blend(pixels, top, left, (alpha * inside).astype(np.float32), IGNORED)


def _draw_labels(picture: Image.Image, marks: Sequence[Mark], style: Style) -> None:
    """Labels, best first, each where it covers least; a legend when they would cover too much of the picture."""
    texts = [mark for mark in marks if mark.text]
    pad = max(2, round(style.font * 0.25))
    shown = texts[:400]  # enough to know that there are too many
    widths = [int(font(style.font).getlength(mark.text)) + 2 * pad + 1 for mark in shown]
    height = style.font + 2 * max(1, pad - 1)
    if sum(widths) * height > _DENSE * picture.width * picture.height:
        _draw_legend(picture, marks, style)
        return
    placed = np.zeros((0, 4))
    for mark, width in zip(shown, widths):
        spot = _place(mark.box, width, height, picture.size, placed, style.line)
        if spot is None:
            continue
        placed = np.concatenate([placed, [[spot[0], spot[1], spot[0] + width, spot[1] + height]]])
        _draw_tag(picture, spot, (width, height), mark, style)


def _place(
    box: Sequence[float], width: int, height: int, size: tuple[int, int], placed: NDArray[np.float64], line: int
) -> tuple[int, int] | None:
    """Top left corner of a label near its box; None when every place is covered by better labels."""
    x1, y1, x2, y2 = _clip(box, *size)
    right = x2 - width + 1
    spots = [
        (x1, y1 - height),
        (x1, y1),
        (right, y1 - height),
        (x1, y2 + 1),
        (right, y1),
        (right, y2 + 1),
        (x2 + 1 + line, y1),
        (x1 - width - line, y1),
        (x1, y2 - height + 1),
    ]
    if y2 - y1 < 2 * height or x2 - x1 < width:  # inside a small box the label would hide the object itself
        spots = [spot for spot in spots if not (y1 <= spot[1] < y2 and x1 <= spot[0] <= x2)]
    best, best_cost = None, np.inf
    for rank, (x, y) in enumerate(spots):
        left, top = min(max(x, 0), max(size[0] - width, 0)), min(max(y, 0), max(size[1] - height, 0))
        moved = abs(left - x) + abs(top - y)
        covered = 0.0
        if len(placed):
            across = np.minimum(placed[:, 2], left + width) - np.maximum(placed[:, 0], left)
            down = np.minimum(placed[:, 3], top + height) - np.maximum(placed[:, 1], top)
            covered = float((np.maximum(across, 0) * np.maximum(down, 0)).sum()) / (width * height)
        cost = 4 * covered + 0.05 * rank + moved / height
        if covered <= 0.3 and cost < best_cost:
            best, best_cost = (int(left), int(top)), cost
    return best


def text_color(background: Color) -> Color:
    """Black or white, whichever is easier to read on the background (WCAG's relative luminance)."""
    linear = [(c / 255) ** 2.2 for c in background]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (0, 0, 0) if luminance > 0.25 else (255, 255, 255)


def _draw_tag(picture: Image.Image, spot: tuple[int, int], size: tuple[int, int], mark: Mark, style: Style) -> None:
    color = IGNORED if mark.ignore else mark.color
    rounded_panel(picture, (*spot, spot[0] + size[0], spot[1] + size[1]), color, alpha=0.92, radius=style.font / 6)
    middle = (spot[0] + size[0] / 2, spot[1] + size[1] / 2)
    pen = ImageDraw.Draw(picture)
    pen.text(middle, mark.text, font=font(style.font), fill=text_color(color), anchor="mm")


def rounded_panel(
    picture: Image.Image, box: tuple[int, int, int, int], color: Color, *, alpha: float, radius: float
) -> None:
    """A filled rectangle with antialiased round corners, in place."""
    many = 4  # supersampling
    width, height = box[2] - box[0], box[3] - box[1]
    shape = Image.new("L", (width * many, height * many), 0)
    ImageDraw.Draw(shape).rounded_rectangle(
        (0, 0, width * many - 1, height * many - 1), radius=radius * many, fill=round(255 * alpha)
    )
    smooth = shape.resize((width, height), Image.Resampling.BOX)
    picture.paste(Image.new("RGB", (width, height), color), box[:2], smooth)


def _draw_legend(picture: Image.Image, marks: Sequence[Mark], style: Style) -> None:
    """Class names with their counts in the upper left corner, the most frequent first, as many as fit."""
    counts = Counter((mark.name or "object", IGNORED if mark.ignore else mark.color) for mark in marks)
    size = style.font
    row, pad = round(size * 1.35), round(size * 0.5)
    fit = max(1, (picture.height // 2 - 2 * pad) // row)
    lines: list[tuple[str, Color | None]] = []
    lines.extend((f"{name}  {count}", color) for (name, color), count in counts.most_common(fit))
    if len(counts) > fit:
        rest = sum(count for _, count in counts.most_common()[fit - 1 :])
        lines[-1] = (f"{len(counts) - fit + 1} more classes  {rest}", None)
    text_width = max(int(font(size).getlength(text)) for text, _ in lines)
    width = min(text_width + size + 3 * pad, picture.width)
    height = min(len(lines) * row + 2 * pad, picture.height)
    panel = (pad // 2, pad // 2, pad // 2 + width, pad // 2 + height)
    rounded_panel(picture, panel, (20, 20, 20), alpha=0.75, radius=size / 4)
    pen: Any = ImageDraw.Draw(picture)
    for index, (text, color) in enumerate(lines):
        top = pad // 2 + pad + index * row
        middle = top + row / 2
        if color is not None:
            side = round(size * 0.7)
            corner = (round(1.5 * pad), round(middle - side / 2))
            rounded_panel(picture, (*corner, corner[0] + side, corner[1] + side), color, alpha=1.0, radius=side / 5)
        pen.text((2 * pad + size, middle), text, font=font(size), fill=(255, 255, 255), anchor="lm")
