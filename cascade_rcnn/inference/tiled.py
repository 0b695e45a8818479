"""The network on all tiles of a picture, and what it finds as one list, within bounded memory.

Boxes and scores of the candidates stay in memory, 60 bytes each; the masks' probabilities go to a temporary file and
come back for the objects that are kept, as many at a time as somebody asks for.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from cascade_rcnn.config import Config
from cascade_rcnn.data.images import Size, to_array
from cascade_rcnn.data.windows import SUFFIXES, WindowRows, can_open, is_too_large
from cascade_rcnn.errors import DataError, UserError
from cascade_rcnn.inference.detections import Detections
from cascade_rcnn.inference.merge_tiles import Candidates, Merged, merge
from cascade_rcnn.inference.tiles import ArrayRows, Pyramid, Rows, Tile, View
from cascade_rcnn.messages import printable
from cascade_rcnn.runtime.paste_masks import bilinear_weights

Look = Callable[[Sequence[NDArray[np.uint8]]], list[Detections]]
_ODD_KINDS = frozenset({".tif", ".tiff", ".jp2", ".j2k", ".jpx"})
_PART = 256  # objects whose masks are in memory at a time


def open_rows(image: Any, config: Config, *, max_pixels: int) -> Rows:
    """The rows of whatever ``predict`` takes; files above ``max_pixels`` are read by windows.

    So are TIFF and JPEG 2000 files of a kind that cannot be read whole, e.g. of many bands.

    Raises:
        UserError: what ``to_array`` refuses, or a large file that cannot be read by windows.
    """
    path = Path(image) if isinstance(image, str | Path) else None
    if path is not None and is_too_large(path, max_pixels):
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(
                f"{printable(path)}: more than max_pixels {max_pixels}, and {path.suffix} files are not read by "
                "windows; convert it to a tiled TIFF, or raise --max-pixels"
            )
        return WindowRows(path, range=config.data.range)
    try:
        return ArrayRows(to_array(image, max_pixels=max_pixels, range=config.data.range))
    except DataError:
        if path is None or not path.is_file() or path.suffix.lower() not in _ODD_KINDS:
            raise
        try:
            return WindowRows(path, range=config.data.range)
        except UserError as closer:
            if can_open(path):  # Pillow does not know this kind of file; what is wrong with it is said here
                raise closer from None
        raise


class TiledDetections:
    """The merged objects of a picture, best first."""

    def __init__(
        self, merged: Merged, candidates: Candidates, spool: MaskSpool, *, like: Detections, pyramid: Pyramid
    ) -> None:
        self._merged, self._boxes, self._spool = merged, candidates.boxes, spool
        self._like, self._pyramid = like, pyramid
        self.size = pyramid.size
        self.scores = merged.scores
        self.tiles = pyramid.count
        self.full_tiles = 0  # where the network gave as many as it may

    def __len__(self) -> int:
        return len(self._merged.scores)

    def __getitem__(self, part: slice) -> Detections:
        """Some of them, with their masks."""
        merged = self._merged
        probs = None
        if self._spool.side:
            joined = [self._spool.mask(rows, self._boxes[rows]) for rows in merged.members[part]]
            side = self._spool.side
            probs = torch.from_numpy(np.stack(joined)) if joined else torch.zeros(0, side, side)
        return Detections(
            torch.from_numpy(merged.boxes[part].astype(np.float32)),
            torch.from_numpy(merged.scores[part].astype(np.float32)),
            torch.from_numpy(merged.labels[part]),
            self.size,
            self._like.class_names,
            mask_probs=probs,
            category_ids=self._like.category_ids,
            whole_pixels=self._like.whole_pixels,
        )

    def parts(self) -> Iterator[Detections]:
        """All of them, some at a time."""
        return (self[start : start + _PART] for start in range(0, len(self), _PART))

    def overview(self) -> tuple[NDArray[np.uint8], int]:
        """The picture to draw on, and how many times it is smaller."""
        return self._pyramid.overview(), self._pyramid.overview_factor

    def told(self, score: float) -> list[str]:
        """What the user should know of the objects from a score on."""
        lines = []
        if self.full_tiles:
            lines.append(
                f"{self.full_tiles} of {self.tiles} tiles hold as many objects as the network may give: raise "
                "--max-detections (load(max_detections=N)), or take smaller tiles"
            )
        partial = int(self._merged.partial[self.scores >= score].sum())
        if partial:
            lines.append(f"{partial} objects no tile shows whole: their boxes may end at a tile's border")
        return lines


class MaskSpool:
    """Probabilities [m, m] of the candidates in a temporary file, float32."""

    def __init__(self, folder: Path | None) -> None:
        self.side = 0  # m; 0 for a network without masks
        self._folder = folder
        self._file: IO[bytes] | None = None

    def add(self, probs: torch.Tensor) -> None:
        """Those of one tile, [n, m, m]."""
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
            weakref.finalize(self, self._file.close)
        self.side = int(probs.shape[-1])
        self._file.seek(0, 2)
        self._file.write(np.ascontiguousarray(probs.float().numpy()).tobytes())

    def mask(self, rows: NDArray[np.int64], boxes: NDArray[np.float64]) -> NDArray[np.float32]:
        """Of one candidate, or of several, with their boxes [n, 4], as one within the box around them."""
        if len(rows) == 1:
            return self._read(int(rows[0]))
        box = np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])
        x1, y1, x2, y2 = box.tolist()
        wide, high = (x2 - x1) / self.side, (y2 - y1) / self.side  # of a cell
        whole = np.zeros((self.side, self.side), np.float32)
        for row, (left, top, right, bottom) in zip(rows.tolist(), boxes.tolist()):
            lines = bilinear_weights((top - y1) / high, (bottom - y1) / high, 0, self.side, self.side)
            columns = bilinear_weights((left - x1) / wide, (right - x1) / wide, 0, self.side, self.side)
            whole = np.maximum(whole, lines @ self._read(row) @ columns.T)
        return whole

    def _read(self, row: int) -> NDArray[np.float32]:
        assert self._file is not None
        size = self.side * self.side * 4
        self._file.seek(row * size)
        return np.frombuffer(self._file.read(size), np.float32).reshape(self.side, self.side)


def predict_tiles(
    look: Look,
    pyramid: Pyramid,
    config: Config,
    *,
    batch_size: int = 1,
    advance: Callable[[int], None] | None = None,
    folder: Path | None = None,
) -> TiledDetections:
    """Objects of a picture of any size.

    Args:
        look: gives the detections of some pictures.
        advance: called with the number of tiles done.
        folder: where the temporary file goes; None: the system's.
    """
    tiling = pyramid.tiling
    collected, spool = _Collected(pyramid.size), MaskSpool(folder)
    limit, full = config.model.max_detections, 0
    tiles = iter(pyramid)
    like: Detections | None = None
    while batch := list(islice(tiles, batch_size)):
        for tile, detections in zip(batch, look([tile.pixels for tile in batch])):
            like = detections if like is None else like
            full += len(detections) >= limit
            collected.add(tile, detections, spool)
        if advance is not None:
            advance(len(batch))
    assert like is not None, "a picture has at least one tile"
    candidates, views = collected.table()
    model = config.model
    merged = merge(candidates, views, common=tiling.common, nms_iou=model.nms_iou, agnostic=model.nms == "agnostic")
    found = TiledDetections(merged.best(tiling.max_merged), candidates, spool, like=like, pyramid=pyramid)
    found.full_tiles = full
    return found


class _Collected:
    """The candidates of all tiles, in pixels of the picture."""

    def __init__(self, size: Size) -> None:
        self._limit = np.array([size[1], size[0]] * 2, dtype=np.float64)
        self._views: list[View] = []
        self._columns: list[tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]] = []

    def add(self, tile: Tile, detections: Detections, spool: MaskSpool) -> None:
        """What one tile shows."""
        view = tile.view
        boxes = detections.boxes.double().numpy() * view.factor + (view.x, view.y, view.x, view.y)
        boxes = np.clip(boxes, 0, self._limit)
        self._views.append(view)
        self._columns.append((boxes, detections.scores.double().numpy(), detections.labels.numpy()))
        if detections.mask_probs is not None:
            spool.add(detections.mask_probs)

    def table(self) -> tuple[Candidates, list[View]]:
        """All of them, and the views that their ``tiles`` count."""
        boxes, scores, labels = (np.concatenate(column) for column in zip(*self._columns))
        counts = [len(part[1]) for part in self._columns]
        return Candidates(boxes, scores, labels, np.repeat(np.arange(len(counts)), counts)), self._views
