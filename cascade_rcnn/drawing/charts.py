"""Pictures put together: a sheet of many pictures, and AP against IoU as a chart.

The chart is drawn by hand because ``cascade-rcnn demo`` shows it with what every installation has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from PIL import Image, ImageDraw

from cascade_rcnn.drawing.annotations import INK, PAPER, Color, class_color, font

_FAINT: Color = (222, 225, 230)
_SOFT: Color = (110, 116, 126)


def contact_sheet(
    images: Sequence[Image.Image], *, columns: int | None = None, cell: int = 320, titles: Sequence[str] = ()
) -> Image.Image:
    """Many pictures in a grid, each fitted into a cell of ``cell`` pixels' width; rows are as high as their highest."""
    if not images:
        return Image.new("RGB", (cell, cell), PAPER)
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    gap, head = max(4, cell // 40), (round(cell / 14) + 6 if titles else 0)
    fitted = [_fit(image, cell) for image in images]
    rows = [fitted[start : start + columns] for start in range(0, len(fitted), columns)]
    heights = [max(picture.height for picture in row) + head for row in rows]
    sheet = Image.new("RGB", (columns * (cell + gap) + gap, sum(heights) + gap * (len(rows) + 1)), PAPER)
    pen = ImageDraw.Draw(sheet)
    top = gap
    for number, (row, height) in enumerate(zip(rows, heights)):
        for place, picture in enumerate(row):
            left = gap + place * (cell + gap)
            index = number * columns + place
            if index < len(titles):
                pen.text((left, top + head / 2), titles[index], font=font(round(cell / 20)), fill=INK, anchor="lm")
            sheet.paste(picture, (left + (cell - picture.width) // 2, top + head))
        top += height + gap
    return sheet


def _fit(image: Image.Image, cell: int) -> Image.Image:
    """Scaled to the cell's width; a picture higher than wide to its height."""
    scale = cell / max(image.width, image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def ap_by_iou_chart(
    curves: Mapping[str, Sequence[tuple[float, float | None]]],
    *,
    title: str = "AP by IoU threshold",
    size: tuple[int, int] = (960, 600),
) -> Image.Image:
    """A chart of AP (0..1) against the IoU that a detection must reach, one line per name; None leaves a gap.

    The paper's own way to look: a curve that stays high to the right means tight boxes.
    """
    many = 2  # drawn twice as large and reduced, which makes lines and text smooth
    width, height = size[0] * many, size[1] * many
    unit = height / 100
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    text = font(round(3.6 * unit))
    frame = (15.5 * unit, 12 * unit, width - 4 * unit, height - 14 * unit)  # left, top, right, bottom
    ious = [iou for points in curves.values() for iou, _ in points] or [0.5, 0.95]
    first, last = min(ious), max(max(ious), min(ious) + 1e-6)
    top_value = _nice_top(max([ap for points in curves.values() for _, ap in points if ap is not None] or [1.0]))

    def x_of(iou: float) -> float:
        return frame[0] + (iou - first) / (last - first) * (frame[2] - frame[0])

    def y_of(ap: float) -> float:
        return frame[3] - ap / top_value * (frame[3] - frame[1])

    pen.text((frame[0], 5.5 * unit), title, font=font(round(4.6 * unit)), fill=INK, anchor="lm")
    steps = round(top_value / 0.1) if top_value > 0.3 else round(top_value / 0.05)
    for step in range(steps + 1):
        value = top_value * step / steps
        pen.line((frame[0], y_of(value), frame[2], y_of(value)), fill=_FAINT, width=max(1, round(0.25 * unit)))
        pen.text((frame[0] - 1.5 * unit, y_of(value)), f"{value:.2g}", font=text, fill=_SOFT, anchor="rm")
    for iou in sorted(set(ious)):
        pen.line((x_of(iou), frame[3], x_of(iou), frame[3] + unit), fill=_SOFT, width=max(1, round(0.3 * unit)))
        pen.text((x_of(iou), frame[3] + 2 * unit), f"{iou:.2f}", font=text, fill=_SOFT, anchor="ma")
    pen.line((frame[0], frame[3], frame[2], frame[3]), fill=_SOFT, width=max(1, round(0.4 * unit)))
    middle = (frame[0] + frame[2]) / 2
    pen.text((middle, height - 2 * unit), "IoU a detection must reach", font=text, fill=INK, anchor="mb")
    _write_upright(sheet, "average precision", round(3.6 * unit), (3 * unit, (frame[1] + frame[3]) / 2))
    for index, points in enumerate(curves.values()):
        places = [None if ap is None else (x_of(iou), y_of(ap)) for iou, ap in points]
        _draw_curve(pen, places, class_color(index), unit, shape=index)
    _draw_key(sheet, list(curves), frame, unit)
    return sheet.resize(size, Image.Resampling.LANCZOS)


def _nice_top(value: float) -> float:
    """The next tenth above the largest value, so that curves fill the chart."""
    return min(1.0, max(0.1, math.ceil(value * 10 + 1e-9) / 10))


def _draw_curve(
    pen: ImageDraw.ImageDraw, places: Sequence[tuple[float, float] | None], color: Color, unit: float, *, shape: int
) -> None:
    """A line through the points with markers; their shape tells curves apart without colour."""
    for start, end in pairwise(places):
        if start is not None and end is not None:
            pen.line((*start, *end), fill=color, width=round(0.8 * unit))
    for place in places:
        if place is not None:
            _draw_marker(pen, place, color, 1.15 * unit, shape)


def _draw_marker(pen: ImageDraw.ImageDraw, place: tuple[float, float], color: Color, radius: float, shape: int) -> None:
    x, y = place
    edge = max(1, round(radius / 4))
    if shape % 4 == 0:
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color, outline=PAPER, width=edge)
    else:
        corners, turn = {1: (4, 45), 2: (3, 0), 3: (4, 0)}[shape % 4]
        pen.regular_polygon((x, y, radius * 1.25), corners, rotation=turn, fill=color, outline=PAPER)


def _draw_key(sheet: Image.Image, names: Sequence[str], frame: tuple[float, float, float, float], unit: float) -> None:
    """Names of the curves in the upper right corner, where AP curves are low."""
    if not names:
        return
    letters = font(round(3.4 * unit))
    row = 5.2 * unit
    width = max(letters.getlength(name) for name in names) + 11 * unit
    left, top = frame[2] - width, frame[1] + unit
    pen = ImageDraw.Draw(sheet)
    pen.rounded_rectangle(
        (left, top, frame[2] - unit, top + row * len(names) + 2 * unit),
        radius=unit,
        fill=PAPER,
        outline=_FAINT,
        width=max(1, round(0.25 * unit)),
    )
    for index, name in enumerate(names):
        middle = top + unit + row * (index + 0.5)
        pen.line((left + 1.5 * unit, middle, left + 7 * unit, middle), fill=class_color(index), width=round(0.8 * unit))
        _draw_marker(pen, (left + 4.25 * unit, middle), class_color(index), 1.15 * unit, index)
        pen.text((left + 8.5 * unit, middle), name, font=letters, fill=INK, anchor="lm")


def _write_upright(sheet: Image.Image, words: str, size: int, center: tuple[float, float]) -> None:
    """Text turned by 90 degrees, read from below."""
    letters = font(size)
    tile = Image.new("RGB", (round(letters.getlength(words)) + 4, round(size * 1.5)), PAPER)
    ImageDraw.Draw(tile).text((tile.width / 2, tile.height / 2), words, font=letters, fill=INK, anchor="mm")
    turned = tile.rotate(90, expand=True)
    sheet.paste(turned, (max(round(center[0] - turned.width / 2), 0), round(center[1] - turned.height / 2)))
