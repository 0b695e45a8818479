"""A contact sheet of suspects: crops with the annotated box and the proposed one, a row of them for each kind."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from cascade_rcnn.config import DataConfig
from cascade_rcnn.data.dataset import read_record
from cascade_rcnn.data.records import DataSplit
from cascade_rcnn.drawing.annotations import INK, PAPER, Color, Mark, Style, draw_marks, font
from cascade_rcnn.drawing.charts import contact_sheet
from cascade_rcnn.labels.rank import KINDS, Box, Suspect
from cascade_rcnn.labels.report import TITLES, describe
from cascade_rcnn.messages import printable

ANNOTATED: Color = (230, 159, 0)  # orange and blue: told apart with every kind of colour blindness
PROPOSED: Color = (86, 180, 233)
OTHERS: Color = (120, 120, 120)
_AROUND = 0.6  # of the boxes' extent, shown on each side of them


def draw_sheet(
    split: DataSplit, suspects: Sequence[Suspect], *, data: DataConfig, columns: int = 6, rows: int = 1, cell: int = 260
) -> Image.Image:
    """The first ``rows`` x ``columns`` suspects of each kind; its annotation orange, what is proposed blue.

    Raises:
        DataError: an image that cannot be read.
    """
    parts: list[tuple[str, Image.Image]] = []
    for kind in KINDS:
        found = [suspect for suspect in suspects if suspect.kind == kind]
        if shown := found[: rows * columns]:
            crops = [_crop(split, suspect, data, cell) for suspect in shown]
            titles = [_shortened(f"{one.score:.2f} {describe(one, split.class_names)}") for one in shown]
            sheet = contact_sheet(crops, columns=columns, cell=cell, titles=titles)
            parts.append((f"{kind}: {TITLES[kind]} ({len(found):,})", sheet))
    return _stacked(parts, cell)


def _shortened(title: str, most: int = 34) -> str:
    title = printable(title)
    return title if len(title) <= most else title[: most - 3] + "..."


def _stacked(parts: Sequence[tuple[str, Image.Image]], cell: int) -> Image.Image:
    """Each picture below a line of its own, and a key above all."""
    head = round(cell / 7)
    width = max((picture.width for _, picture in parts), default=2 * cell)
    whole = Image.new("RGB", (width, head + sum(picture.height + head for _, picture in parts)), PAPER)
    pen = ImageDraw.Draw(whole)
    size, left = round(cell / 16), round(cell / 40)
    for text, color in (("annotated", ANNOTATED), ("proposed", PROPOSED), ("other annotations", OTHERS)):
        pen.rectangle((left, head * 0.3, left + size, head * 0.3 + size), outline=color, width=max(2, size // 5))
        pen.text((left + 1.5 * size, head * 0.3 + size / 2), text, font=font(size), fill=INK, anchor="lm")
        left += round(7 * size)
    top = head
    for title, picture in parts:
        pen.text((round(cell / 40), top + head / 2), title, font=font(round(cell / 13)), fill=INK, anchor="lm")
        whole.paste(picture, (0, top + head))
        top += head + picture.height
    return whole


def _crop(split: DataSplit, suspect: Suspect, data: DataConfig, cell: int) -> Image.Image:
    record = split.records[suspect.image]
    pixels = read_record(record, split.format, data).permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels)
    boxes = [box for box in (suspect.box, suspect.proposed_box) if box is not None]
    x1, y1, x2, y2 = _window(boxes, picture.size)
    scale = cell / max(x2 - x1, y2 - y1)
    size = (max(1, round((x2 - x1) * scale)), max(1, round((y2 - y1) * scale)))
    part = picture.crop((x1, y1, x2, y2)).resize(size, Image.Resampling.BICUBIC)
    corner = (x1, y1, x1, y1)
    others = [box for row, box in enumerate(record.boxes.tolist()) if row != suspect.row]
    marks = [Mark(_inside(box, corner, scale), OTHERS) for box in others]
    marked = draw_marks(part, marks, style=Style(line=1, font=10), labels=False)
    pair = [(suspect.proposed_box, PROPOSED), (suspect.box, ANNOTATED)]
    if suspect.kind == "class":
        pair = pair[1:]  # both boxes are the same
    marks = [Mark(_inside(box, corner, scale), color) for box, color in pair if box is not None]
    return draw_marks(marked, marks, style=Style(line=max(2, cell // 90), font=10), labels=False)


def _inside(box: Sequence[float], corner: Sequence[float], scale: float) -> Box:
    """A box in pixels of an enlarged crop that begins at ``corner``."""
    x1, y1, x2, y2 = ((value - low) * scale for value, low in zip(box, corner))
    return x1, y1, x2, y2


def _window(boxes: Sequence[Box], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A square around the boxes, with some of what is beside them, inside a picture of (width, height)."""
    low = [min(box[axis] for box in boxes) for axis in (0, 1)]
    high = [max(box[axis] for box in boxes) for axis in (2, 3)]
    side = max(24.0, (1 + 2 * _AROUND) * max(end - start for start, end in zip(low, high)))
    ends = []
    for start, end, limit in zip(low, high, size):
        half = min(side, limit) / 2
        middle = min(max((start + end) / 2, half), limit - half)
        ends.append((int(middle - half), max(int(middle - half) + 1, round(middle + half))))
    (x1, x2), (y1, y2) = ends
    return x1, y1, x2, y2
