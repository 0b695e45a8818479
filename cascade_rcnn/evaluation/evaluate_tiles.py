"""COCO results of a model on a split whose pictures are cut into tiles."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cascade_rcnn import distributed
from cascade_rcnn.config import Config
from cascade_rcnn.data.dataset import read_record
from cascade_rcnn.data.orientation import FORMATS_WITHOUT_SIZES, annotated_size, view_decider
from cascade_rcnn.data.records import DataSplit, ImageRecord
from cascade_rcnn.data.rle import MOST_RLE_PIXELS
from cascade_rcnn.data.windows import WindowRows, is_too_large
from cascade_rcnn.errors import DataError
from cascade_rcnn.evaluation.evaluate_model import NOT_IN_SPLIT, as_split, without_unread
from cascade_rcnn.inference.detector import Detector
from cascade_rcnn.inference.tiles import ArrayRows, Pyramid, Rows, Tiling
from cascade_rcnn.progress import progress_bar


def detect_in_tiles(
    detector: Detector,
    split: DataSplit,
    tiling: Tiling,
    *,
    class_map: Sequence[int] | None = None,
    batch_size: int = 1,
    progress: bool = True,
) -> tuple[list[dict[str, Any]], DataSplit]:
    """As ``detect_split``: on rank 0 the results of all processes, elsewhere none; and the split that was looked at.

    Pictures above ``data.max_pixels`` are read by windows. Each is seen as its labels count it. One that cannot be
    read, or not to its end, is left out and named.

    Raises:
        DataError: no image can be read.
    """
    rank, size = distributed.rank(), distributed.world_size()
    names, ids, _ = as_split(split, class_map)
    mapped = Detector(detector.model, detector.config, names, ids, precision=detector.precision)
    results: list[dict[str, Any]] = []
    bad: dict[str, str] = {}
    full = tiles = 0
    with progress_bar(len(split.records), show=progress and rank == 0) as advance:
        for record in split.records[rank::size]:
            try:
                rows = _rows(record, split, detector.config)
                found = mapped.predict_tiled(Pyramid(rows, tiling), batch_size=batch_size)
            except DataError as error:
                bad[str(record.path)] = str(error)
                advance(size)
                continue
            full, tiles = full + found.full_tiles, tiles + found.tiles
            for part in found.parts():
                part.image_id = record.image_id
                results.extend(one for one in part.to_coco() if one["category_id"] != NOT_IN_SPLIT)
            advance(size)
    if full:
        print(
            f"{full} of {tiles} tiles hold as many objects as the network may give: raise --max-detections, or take "
            "smaller tiles",
            file=sys.stderr,
        )
    parts = distributed.gather((results, bad))
    if not parts:
        return [], split
    read = without_unread(split, {path: reason for _, some in parts for path, reason in some.items()})
    return [one for part, _ in parts for one in part], read


def _rows(record: ImageRecord, split: DataSplit, config: Config) -> Rows:
    data = config.data
    if not is_too_large(record.path, data.max_pixels):
        return ArrayRows(read_record(record, split.format, data).permute(1, 2, 0).numpy())
    view = view_decider(
        annotated_size(record, split.format),
        data.orientation,
        path=str(record.path),
        sizeless=split.format in FORMATS_WITHOUT_SIZES,
    )
    return WindowRows(record.path, frame=view, range=data.range)


def merged_limits(
    results: list[dict[str, Any]], config: Config, split: DataSplit, notes: list[str]
) -> tuple[Config, DataSplit]:
    """What merged results are measured with: as many objects of a picture as were found, boxes alone where masks would
    need pictures of more pixels than COCO's tools count.
    """
    most = max(Counter(one["image_id"] for one in results).values(), default=1)
    config = replace(config, model=replace(config.model, max_detections=max(most, config.model.max_detections)))
    largest = max((record.height * record.width for record in split.records), default=0)
    if split.has_masks and largest > MOST_RLE_PIXELS:
        notes.append(f"masks are left out: a picture of {largest:,} pixels is more than COCO's tools count in a mask")
        split = replace(split, has_masks=False)
    return config, split
