"""``cascade-rcnn convert-data SRC DST --to coco|voc|yolo|labelme``: a data set in another layout, pictures linked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from cascade_rcnn.config import Orientation
from cascade_rcnn.data import files
from cascade_rcnn.data.formats.classes import with_same_classes
from cascade_rcnn.data.formats.open import describe_split, disjoint_splits, open_split
from cascade_rcnn.data.formats.write import write_coco, write_labelme, write_voc, write_yolo, write_yolo_index
from cascade_rcnn.data.orientation import settle
from cascade_rcnn.data.problems import READ_ANYWAY
from cascade_rcnn.data.records import DataSplit
from cascade_rcnn.errors import DataError
from cascade_rcnn.messages import printable, shown

_WRITERS = {"coco": write_coco, "voc": write_voc, "yolo": write_yolo, "labelme": write_labelme}


def convert_data(
    src: Path, dst: Path, *, to: str, orientation: Orientation = "auto"
) -> tuple[list[DataSplit], Counter[str]]:
    """Writes all splits of ``src`` into the empty folder ``dst`` in the format ``to``, with one list of classes.

    Pictures whose labels count the pixels as stored against their orientation tag are written upright, their labels
    turned along, so that the copy means the same to every program.

    Returns the splits and what was counted on the way: images linked or copied, objects that the format cannot hold.
    Raises ``DataError`` where ``dst`` is not empty, ``to`` unknown, the source broken, none of its images there, or a
    picture's orientation open.
    """
    if to not in _WRITERS:
        raise DataError(f"--to {shown(to)}: choose coco, voc, yolo or labelme")
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise DataError(f"{printable(dst)}: not an empty folder; name a new one")
    counts: Counter[str] = Counter()
    splits = with_same_classes([open_split(src, name, orientation=orientation) for name in disjoint_splits(src)])
    splits = [settle(split, orientation, sizes=to != "yolo") for split in splits]
    for split in splits:
        _refuse_empty(split)
    dst.mkdir(parents=True, exist_ok=True)
    for split in splits:
        counts.update(_WRITERS[to](split, dst))
        counts.update(f"left out: {problem.kind}" for problem in split.problems if problem.kind not in READ_ANYWAY)
    if to == "yolo":
        write_yolo_index(splits, dst)
    return splits, Counter({what: number for what, number in counts.items() if number})


def _refuse_empty(split: DataSplit) -> None:
    """A set without images would be written without a word; what was meant is found where the images are looked for."""
    where = f"{printable(split.root)}: split {split.name!r}"
    if not split.records:
        reason = next((f" ({problem.where}: {problem.message})" for problem in split.problems), "")
        raise DataError(f"{where} has no images that can be read{reason}; complete them, or take the split away")
    if not any(files.is_file(record.path) for record in split.records):
        raise DataError(
            f"{where}: none of its {len(split):,} images is there; the first is looked for at "
            f"{printable(split.records[0].path)}; put them there"
        )


def run_convert_data(
    src: Path,
    dst: Path,
    *,
    to: str,
    orientation: Orientation = "auto",
    refuse: Callable[[Path, Orientation], None] | None = None,
) -> int:
    """The command: converts, and prints what was written and how. Returns the exit code 0.

    ``refuse`` looks at the source first and raises ``DataError`` for what another format would hide.
    """
    if refuse is not None:
        refuse(src, orientation)
    splits, counts = convert_data(src, dst, to=to, orientation=orientation)
    for split in splits:
        print(describe_split(split))
        for problem in split.problems:
            if problem.kind in READ_ANYWAY:
                print(f"  {problem.kind}: {problem.where}: {problem.message}")
    for what, number in counts.items():
        print(f"  {number:,} {what}")
    print(f"written to {printable(dst)} as {to}; train with --data {printable(dst)}")
    return 0
