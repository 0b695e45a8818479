"""A sheet of samples with their annotations drawn, to see in a minute what a data set really says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cascade_rcnn.data.files import is_file, printable
from cascade_rcnn.data.records import DataSplit, ImageRecord
from cascade_rcnn.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image


def draw_samples(splits: Sequence[DataSplit], count: int, *, marked: set[str] | None = None,
                 cell: int = 480) -> Image:
    """A picture of ``count`` images with their objects, spread evenly over the splits; ignore regions are hatched.

    Up to half of them are images that ``marked`` names by their records' source. Raises ``DataError`` where no image
    file is there.
    """
    from PIL import Image as Pictures

    from cascade_rcnn.visualize import contact_sheet, draw_record

    there = [(split, record) for split in splits for record in split.records if is_file(record.path)]
    if not there:
        raise DataError("no image file of the data set is there, so nothing can be drawn; complete the images first")
    suspects = [pair for pair in there if any(place.startswith(pair[1].source) for place in marked or ())]
    chosen = _spread(suspects, count // 2)
    names = {id(record) for _, record in chosen}
    chosen += _spread([pair for pair in there if id(pair[1]) not in names], count - len(chosen))
    pictures, titles = [], []
    for split, record in chosen:
        title = f"{split.name}: {printable(record.file_name.rsplit('/', 1)[-1])}"
        try:
            pictures.append(draw_record(record, split.class_names))
        except DataError:
            pictures.append(Pictures.new("RGB", (cell, cell // 2), (90, 20, 20)))
            title += " (cannot be read)"
        titles.append(title)
    return contact_sheet(pictures, cell=cell, titles=titles)


def _spread(pairs: list[tuple[DataSplit, ImageRecord]], count: int) -> list[tuple[DataSplit, ImageRecord]]:
    if count <= 0 or not pairs:
        return []
    count = min(count, len(pairs))
    return [pairs[place * len(pairs) // count] for place in range(count)]
