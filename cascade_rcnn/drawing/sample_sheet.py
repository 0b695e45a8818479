"""A sheet of samples with their annotations drawn, to see in a minute what a data set really says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.config import DataConfig
from cascade_rcnn.data.dataset import read_record
from cascade_rcnn.data.files import is_file
from cascade_rcnn.data.images import quiet_pillow, read_header, read_image, turn
from cascade_rcnn.data.orientation import OrientationError, record_view
from cascade_rcnn.data.records import DataSplit, ImageRecord, Segmentation
from cascade_rcnn.data.rle import decode_rle
from cascade_rcnn.errors import DataError
from cascade_rcnn.messages import printable

if TYPE_CHECKING:
    from PIL.Image import Image

    from cascade_rcnn.data.rle import MaskCrop

_LABELLED = 24  # pixels on the sheet: a smaller object would be hidden by its own name


def draw_samples(
    splits: Sequence[DataSplit],
    count: int,
    *,
    marked: set[str] | None = None,
    cell: int = 560,
    data: DataConfig | None = None,
) -> Image:
    """A picture of ``count`` images with their objects, spread evenly over the splits; ignore regions are hatched.

    Up to half of them are images that ``marked`` names by their records' source. ``data`` says how pictures are read,
    as in training. Raises ``DataError`` where no image file is there.
    """
    from PIL import Image as Pictures

    from cascade_rcnn.drawing.charts import contact_sheet

    there = [(split, record) for split in splits for record in split.records if is_file(record.path)]
    if not there:
        raise DataError("no image file of the data set is there, so nothing can be drawn; complete the images first")
    places = {place.split(", object ")[0].split(", annotation id ")[0].split(", face ")[0] for place in marked or ()}
    chosen = _spread([pair for pair in there if pair[1].source in places], count // 2)
    names = {id(record) for _, record in chosen}
    chosen += _spread([pair for pair in there if id(pair[1]) not in names], count - len(chosen))
    pictures, titles = [], []
    for split, record in chosen:
        name = printable(record.file_name.rsplit("/", 1)[-1])
        title = f"{split.name}: {name}"
        try:
            pictures.append(_draw(record, split, cell, data or DataConfig()))
        except (OSError, DataError) as error:  # what Pillow raises for torn files, and what training would refuse
            pictures.append(Pictures.new("RGB", (cell, cell // 2), (90, 20, 20)))
            reason = "orientation not known" if isinstance(error, OrientationError) else "cannot be read"
            title = f"{reason}: {name}" if isinstance(error, DataError) else f"{reason} ({error}): {name}"
        titles.append(title if len(title) <= 38 else title[:17] + "..." + title[-18:])
    return contact_sheet(pictures, cell=cell, titles=titles)


def _spread(pairs: list[tuple[DataSplit, ImageRecord]], count: int) -> list[tuple[DataSplit, ImageRecord]]:
    count = min(count, len(pairs))
    return [pairs[place * len(pairs) // count] for place in range(count)]


def _read(record: ImageRecord, split: DataSplit, cell: int, data: DataConfig) -> tuple[Image, float]:
    """The picture as training reads it, and the scale to a cell; large JPEG files decode straight to a smaller size."""
    from PIL import Image as Pictures

    header = read_header(record.path)
    view = record_view(record, split.format, header, data.orientation)
    if view == "differs" and record.width:  # drawn as it is: the boxes show what is wrong
        view = "upright"
    side = max(header.stored)
    with quiet_pillow(), Pictures.open(record.path) as image:
        if image.format == "JPEG" and side > 2 * cell and view != "undecided":
            image.draft("RGB", (cell, cell))
            pixels = np.asarray(image.convert("RGB"))
            pixels = turn(pixels, header.orientation) if view == "upright" else pixels
            return Pictures.fromarray(np.ascontiguousarray(pixels)), cell / side
    if view in ("stored", "upright"):
        tensor = read_image(record.path, max_pixels=data.max_pixels, frame=view, range=data.range)
    else:
        tensor = read_record(record, split.format, data)
    return Pictures.fromarray(tensor.permute(1, 2, 0).numpy()), cell / max(side, 1)


def _draw(record: ImageRecord, split: DataSplit, cell: int, data: DataConfig) -> Image:
    """The image scaled to a cell first, so that lines stay as thick as they are drawn."""
    from cascade_rcnn.drawing.annotations import Mark, class_color, draw_marks

    picture, scale = _read(record, split, cell, data)
    class_names = split.class_names
    original = (record.width, record.height) if record.width else picture.size
    picture = picture.resize((max(1, round(original[0] * scale)), max(1, round(original[1] * scale))))
    marks = []
    for row, (box, label, ignore) in enumerate(
        zip((record.boxes * scale).tolist(), record.labels.tolist(), record.ignore.tolist())
    ):
        mask = record.segmentations[row] if record.segmentations is not None else None
        name = "ignored" if ignore else class_names[label]
        mark = Mark(tuple(box), class_color(label), text=name, name=name, ignore=ignore)
        marks.append(replace(mark, crop=_crop(mask, picture.size, scale) if mask else None))
    legible = [min(mark.box[2] - mark.box[0], mark.box[3] - mark.box[1]) >= _LABELLED for mark in marks]
    return draw_marks(picture, marks, labels=sum(legible) > 0.5 * len(legible))


def _crop(mask: Segmentation, size: tuple[int, int], scale: float) -> MaskCrop | None:
    """The mask's pixels on the sheet, cut to their extent."""
    from PIL import Image as Pictures
    from PIL import ImageDraw

    from cascade_rcnn.data.rle import MaskCrop

    if isinstance(mask, dict):
        full = Pictures.fromarray(decode_rle(mask).astype(np.uint8) * 255)
        if 0 in full.size:
            return None
        picture = full.resize(size, Pictures.Resampling.NEAREST)
    else:
        picture = Pictures.new("L", size)
        pen = ImageDraw.Draw(picture)
        for polygon in mask:
            pen.polygon([value * scale for value in polygon], fill=255)
    extent = picture.getbbox()
    if extent is None:
        return None
    pixels: NDArray[np.bool_] = np.asarray(picture.crop(extent)) > 0
    return MaskCrop(extent[1], extent[0], pixels)
