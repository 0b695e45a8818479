"""Annotations of a whole split in a handful of flat arrays.

I images, N objects. 118,000 images and 860,000 objects as Python objects cost gigabytes, and every worker process that
touches their reference counts copies them; flat arrays are shared by all workers and cost their bytes once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cascade_rcnn.data.masks import pack_segmentations
from cascade_rcnn.data.records import ImageRecord


@dataclass
class PackedRecords:
    """The fields of all records that a loader needs. Tensors, because those can move to memory shared by processes."""

    boxes: Tensor  # float64 [N, 4], xyxy in original pixels, clipped to the image where its size is known
    labels: Tensor  # int32 [N]
    ignore: Tensor  # bool [N]
    offsets: Tensor  # int64 [I + 1], objects of image i: offsets[i] .. offsets[i + 1]
    sizes: Tensor  # int32 [I, 2], (height, width) by the annotation, 0 where it does not say
    paths: Tensor  # uint8, UTF-8 of all paths (surrogateescape)
    path_offsets: Tensor  # int64 [I + 1]
    ids: Tensor  # uint8, all image ids, "i" + digits or "s" + text
    id_offsets: Tensor  # int64 [I + 1]
    segmentations: Tensor  # uint8, ``masks.pack_segmentations`` of all objects
    segmentation_offsets: Tensor  # int64 [N + 1]; [1] when there are no masks
    dropped: int = 0  # degenerate boxes left out
    ignored: int = 0  # ignore regions left out, treated as background

    def __len__(self) -> int:
        return len(self.sizes)

    def share(self) -> None:
        """Move the arrays to shared memory: a spawned worker then gets a handle instead of a copy."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                value.share_memory_()  # type: ignore[no-untyped-call]

    def path(self, index: int) -> str:
        return _text(self.paths, self.path_offsets, index).decode("utf-8", "surrogateescape")

    def image_id(self, index: int) -> int | str:
        kind, value = (text := _text(self.ids, self.id_offsets, index).decode())[0], text[1:]
        return int(value) if kind == "i" else value

    def segmentation(self, row: int) -> bytes:
        """Packed mask of an object by its row, b"" when there is none."""
        if len(self.segmentation_offsets) == 1:
            return b""
        return _text(self.segmentations, self.segmentation_offsets, row)

    def shapes(self) -> NDArray[np.float64]:
        """Width over height of every image [I], 1 where the annotation does not say."""
        sizes = self.sizes.numpy().astype(np.float64)
        known = (sizes > 0).all(axis=1)
        return np.divide(sizes[:, 1], sizes[:, 0], out=np.ones(len(sizes)), where=known)


def pack_records(
    records: Iterable[ImageRecord], *, masks: bool, keep_ignored: bool, keep_empty: bool
) -> PackedRecords:
    """Flatten records, without degenerate boxes (no width or height within the image).

    Args:
        masks: keep segmentations.
        keep_ignored: keep ignore regions as such; otherwise they are left out (treated as background).
        keep_empty: keep images without any object to learn.
    """
    boxes, labels, ignore, counts, sizes = [], [], [], [], []
    paths, ids, segmentations = [], [], []
    dropped = ignored = 0
    for record in records:
        clipped = _clipped(record)
        solid = ((clipped[:, 2:] - clipped[:, :2]) > 0).all(axis=1)  # False for NaN too
        wanted = solid & (np.ones_like(solid) if keep_ignored else ~record.ignore)
        if not keep_empty and not (wanted & ~record.ignore).any():
            continue
        dropped += int((~solid).sum())
        ignored += int((solid & ~wanted).sum())
        rows = np.flatnonzero(wanted)
        boxes.append(clipped[rows])
        labels.append(record.labels[rows].astype(np.int32))
        ignore.append(record.ignore[rows])
        counts.append(len(rows))
        sizes.append((record.height, record.width))
        paths.append(str(record.path).encode("utf-8", "surrogateescape"))
        ids.append((f"i{record.image_id}" if isinstance(record.image_id, int) else f"s{record.image_id}").encode())
        if masks:
            given = record.segmentations or [None] * len(record.boxes)
            source = record.source or str(record.path)
            segmentations += pack_segmentations([None if record.ignore[row] else given[row] for row in rows],
                                                source=source)
    flat_boxes = np.concatenate(boxes) if boxes else np.zeros((0, 4))
    return PackedRecords(
        boxes=torch.from_numpy(flat_boxes),
        labels=torch.from_numpy(np.concatenate(labels) if labels else np.zeros(0, np.int32)),
        ignore=torch.from_numpy(np.concatenate(ignore) if ignore else np.zeros(0, bool)),
        offsets=_offsets(counts), sizes=torch.tensor(sizes, dtype=torch.int32).reshape(-1, 2),
        paths=_joined(paths), path_offsets=_offsets(map(len, paths)),
        ids=_joined(ids), id_offsets=_offsets(map(len, ids)),
        segmentations=_joined(segmentations), segmentation_offsets=_offsets(map(len, segmentations)),
        dropped=dropped, ignored=ignored)


def _clipped(record: ImageRecord) -> NDArray[np.float64]:
    boxes = np.asarray(record.boxes, dtype=np.float64).reshape(-1, 4)
    if record.height <= 0 or record.width <= 0:
        return boxes
    return np.clip(boxes, 0, np.array([record.width, record.height] * 2, dtype=np.float64))


def _offsets(lengths: Iterable[int]) -> Tensor:
    return torch.from_numpy(np.cumsum(np.fromiter((0, *lengths), dtype=np.int64)))


def _joined(parts: list[bytes]) -> Tensor:
    return torch.from_numpy(np.frombuffer(b"".join(parts), dtype=np.uint8).copy())


def _text(buffer: Tensor, offsets: Tensor, index: int) -> bytes:
    start, end = offsets[index:index + 2].tolist()
    return buffer[start:end].numpy().tobytes()
