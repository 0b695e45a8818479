"""From records to batches: decode, transform, pad, in worker processes that share the annotations.

B images, G objects per image (padded to a multiple of 8). Every sample's random numbers come from (seed, epoch,
position), not from the worker that happens to make it: any number of workers gives the same batches, and a resumed run
the batches that the interrupted one would have seen.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cascade_rcnn.config import DataConfig, Semantics
from cascade_rcnn.data.images import read_image
from cascade_rcnn.data.masks import decode_window, transform_window
from cascade_rcnn.data.packed import pack_records
from cascade_rcnn.data.records import DataSplit
from cascade_rcnn.data.samplers import EvalSampler, SampleKey, TrainSampler
from cascade_rcnn.data.transforms import Sample, test_transform, train_transform
from cascade_rcnn.errors import DataError
from cascade_rcnn.structures import ImageBatch, MaskCrops, Targets

ROWS_MULTIPLE = 8  # G is rounded up to this, so that few distinct shapes reach a compiled model
_REPLACEMENTS = 20  # images tried in place of an unreadable one before giving up
_GRACE = 10  # seconds a worker outlives a SIGTERM
Window = tuple[NDArray[np.uint8], int, int]  # pixels, top, left


@dataclass
class Item:
    """One image, transformed, with its objects."""

    image: Tensor  # uint8 [3, H, W]
    original_size: tuple[int, int]
    image_id: int | str
    path: str
    boxes: NDArray[np.float32]  # [G, 4]
    labels: NDArray[np.int64]  # [G]
    ignore: NDArray[np.bool_]  # [G]
    masks: list[Window | None] | None  # [G]
    bad: list[tuple[str, str]] = field(default_factory=list)  # unreadable images met on the way: path, reason


class DetectionDataset(Dataset[Item]):
    """Images of a split as the network sees them.

    Only flat arrays are kept, not the split's records, so that worker processes share them. Boxes without width or
    height are dropped (``degenerate`` counts them). Ignore regions become ``Targets.ignore`` with
    ``config.ignore_regions``, else they are left out, i.e. background, as mmdetection treats COCO's crowds.
    """

    def __init__(
        self, split: DataSplit, config: DataConfig, *, training: bool, masks: bool = False,
        semantics: Semantics = "mmdetection"
    ) -> None:
        """``masks``: give instance masks too, where the split has them.

        Raises:
            DataError: no images, or no image with objects where ``config.keep_empty`` is False.
        """
        self.config, self.training, self.semantics = config, training, semantics
        self.class_names = split.class_names
        self.masks = masks and split.has_masks
        self.packed = pack_records(split.records, masks=self.masks, keep_ignored=config.ignore_regions,
                                   keep_empty=config.keep_empty or not training)
        if not len(self.packed):
            what = "images" if not split.records else "images with objects to learn (and data.keep_empty is False)"
            raise DataError(f"{split.root}: split {split.name!r} has no {what}")

    def __len__(self) -> int:
        return len(self.packed)

    @property
    def degenerate(self) -> int:
        """Boxes that were dropped for having no width or height within their image."""
        return self.packed.dropped

    def __getitem__(self, key: SampleKey | int) -> Item:
        """One image by its index, or in training by index and seed.

        Raises:
            DataError: the image cannot be read (in training: neither can the ones tried in its place).
        """
        key = SampleKey(key) if isinstance(key, int) else key
        if not self.training:
            return self._load(key.image, None)
        index, bad = key.image, []
        for attempt in range(_REPLACEMENTS):
            rng = np.random.default_rng((*key.seed, attempt))
            try:
                item = self._load(index, rng)
            except DataError as error:
                bad.append((self.packed.path(index), str(error)))
                index = int(rng.integers(len(self)))  # another image, so that the batch keeps its size
                continue
            item.bad = bad
            return item
        raise DataError(f"{bad[0][1]} ({_REPLACEMENTS} images in a row could not be used)")

    def __getitems__(self, keys: Sequence[SampleKey | int]) -> list[Item] | DataError:
        """A batch of items for the loader; an error travels as a value, so that its one line stays one line."""
        try:
            return [self[key] for key in keys]
        except DataError as error:
            return DataError(str(error))

    def _load(self, index: int, rng: np.random.Generator | None) -> Item:
        """Decode an image and transform it: at random with a generator, as for the test without."""
        path = self.packed.path(index)
        image = read_image(path, max_pixels=self.config.max_pixels)
        size = (int(image.shape[1]), int(image.shape[2]))
        self._check_size(index, size)
        start, end = self.packed.offsets[index:index + 2].tolist()
        # mmdetection scales boxes in float32, detectron2 in float64: where overlaps tie, the last bit decides.
        precision = np.float64 if self.semantics == "detectron2" else np.float32
        sample = Sample.of(image, self.packed.boxes[start:end].numpy().astype(precision))
        if rng is None:
            sample = test_transform(sample, self.config, semantics=self.semantics)
        else:
            sample = train_transform(sample, self.config, rng, semantics=self.semantics)
        kept = np.flatnonzero(sample.keep & (sample.boxes[:, 2:] > sample.boxes[:, :2]).all(axis=1))
        return Item(
            image=sample.image, original_size=size, image_id=self.packed.image_id(index), path=path,
            boxes=sample.boxes[kept].astype(np.float32),
            labels=self.packed.labels[start:end].numpy()[kept].astype(np.int64),
            ignore=self.packed.ignore[start:end].numpy()[kept],
            masks=[self._mask(index, start + int(row), size, sample) for row in kept] if self.masks else None)

    def _check_size(self, index: int, size: tuple[int, int]) -> None:
        """The annotation counts pixels of an image of its own size; another size means boxes in the wrong place."""
        height, width = self.packed.sizes[index].tolist()
        if height > 0 and width > 0 and (height, width) != size:
            raise DataError(f"{self.packed.path(index)}: is {size[1]}x{size[0]} (EXIF orientation not applied), the "
                            f"annotation says {width}x{height}; run cascade-rcnn check on the data")

    def _mask(self, index: int, row: int, size: tuple[int, int], sample: Sample) -> Window | None:
        try:
            window = decode_window(self.packed.segmentation(row), size, sample.canvas)
        except DataError as error:
            raise DataError(f"{self.packed.path(index)}: {error}") from None
        return None if window is None else transform_window(*window, sample.rows, sample.cols)


@dataclass(frozen=True)
class Collate:
    """Stacks items into a batch, padded with zeros right and below to a multiple of ``pad_multiple``.

    ``fixed_size`` > 0 pads at least to that height and width (large-scale jitter's square).
    """

    pad_multiple: int = 32
    fixed_size: int = 0

    def __call__(self, items: list[Item] | DataError) -> tuple[ImageBatch, Targets] | DataError:
        if isinstance(items, DataError):
            return items
        sizes = torch.tensor([item.image.shape[1:] for item in items])
        height, width = (-(-max(int(side), self.fixed_size) // self.pad_multiple) * self.pad_multiple
                         for side in sizes.amax(dim=0))
        pixels = torch.empty(len(items), 3, height, width, dtype=torch.uint8,
                             memory_format=torch.channels_last)  # as the images come: ten times faster to fill
        for row, item in zip(pixels, items):
            h, w = item.image.shape[1:]
            row[:, :h, :w] = item.image
            row[:, h:], row[:, :h, w:] = 0, 0
        images = ImageBatch(
            pixels=pixels, sizes=sizes, original_sizes=torch.tensor([item.original_size for item in items]),
            image_ids=tuple(item.image_id for item in items), paths=tuple(item.path for item in items),
            bad=tuple(entry for item in items for entry in item.bad))
        return images, _targets(items)


def _targets(items: list[Item]) -> Targets:
    """Pad the objects of all items to a common number of rows G."""
    most = max(len(item.boxes) for item in items)
    rows = max(-(-most // ROWS_MULTIPLE), 1) * ROWS_MULTIPLE
    targets = Targets.empty(len(items), rows=rows)
    for b, item in enumerate(items):
        n = len(item.boxes)
        targets.boxes[b, :n] = torch.from_numpy(item.boxes)
        targets.labels[b, :n] = torch.from_numpy(item.labels)
        targets.ignore[b, :n] = torch.from_numpy(item.ignore)
        targets.valid[b, :n] = torch.from_numpy(~item.ignore)
    if items[0].masks is not None:
        targets.masks = _mask_crops([item.masks or [] for item in items], rows)
    return targets


def _mask_crops(masks: list[list[Window | None]], rows: int) -> MaskCrops:
    """Lay all windows of a batch one after another."""
    origins = torch.zeros(len(masks), rows, 2, dtype=torch.int64)
    sizes, offsets = torch.zeros_like(origins), torch.zeros(len(masks), rows, dtype=torch.int64)
    pieces: list[NDArray[np.uint8]] = []
    total = 0
    for b, windows in enumerate(masks):
        for g, window in enumerate(windows):
            offsets[b, g] = total
            if window is None:
                continue
            pixels, top, left = window
            origins[b, g] = torch.tensor((top, left))
            sizes[b, g] = torch.tensor(pixels.shape)
            pieces.append(pixels.reshape(-1))
            total += pixels.size
    flat = torch.from_numpy(np.concatenate(pieces) if pieces else np.zeros(0, np.uint8))
    height, width = sizes.reshape(-1, 2).amax(dim=0).tolist()
    return MaskCrops(flat, offsets, origins, sizes, max_size=(height, width))


class Loader:
    """Batches (ImageBatch, Targets) of one rank; iterate once per epoch.

    In training ``ImageBatch.bad`` lists (path, reason) of unreadable images that others stand in for; in evaluation
    an unreadable image raises DataError.
    """

    def __init__(self, dataset: DetectionDataset, sampler: TrainSampler | EvalSampler, *, workers: int) -> None:
        self.dataset, self.sampler, self._ends_at_exit = dataset, sampler, False
        method: str | None = None
        if workers > 0:
            # forked workers share the arrays without copying; elsewhere they must lie in shared memory
            method = "fork" if sys.platform == "linux" else "spawn"
            if method == "spawn":
                dataset.packed.share()
        config = dataset.config
        square = config.long_side if dataset.training and config.large_scale_jitter is not None else 0
        self._loader: DataLoader[Any] | None = DataLoader(
            dataset, batch_sampler=sampler, num_workers=workers, collate_fn=Collate(config.pad_multiple, square),
            pin_memory=torch.cuda.is_available(), persistent_workers=workers > 0, worker_init_fn=_start_worker,
            multiprocessing_context=method)

    def __len__(self) -> int:
        """Batches that the next iteration gives."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[ImageBatch, Targets]]:
        assert self._loader is not None, "this loader is closed"
        batches = iter(self._loader)
        if not self._ends_at_exit:  # after torch's own handler is registered, so that this one comes before it
            atexit.register(_close, weakref.ref(self))
            self._ends_at_exit = True
        for batch in batches:
            if isinstance(batch, DataError):
                raise batch
            yield batch

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose the training epoch (each is shuffled and augmented anew) and the step to start at (resuming)."""
        assert isinstance(self.sampler, TrainSampler), "an evaluation loader has no epochs"
        self.sampler.set_epoch(epoch, start_step)

    def processes(self) -> list[BaseProcess]:
        """The worker processes that are running."""
        return list(getattr(getattr(self._loader, "_iterator", None), "_workers", ()))

    def close(self) -> None:
        """End the worker processes now rather than when this object is collected."""
        workers, self._loader = getattr(self._loader, "_iterator", None), None
        if workers is not None:
            workers._shutdown_workers()  # at once, even while somebody still holds the iterator


def _close(loader: weakref.ref[Loader]) -> None:
    """At exit: otherwise torch waits five seconds for each worker before it ends it by force."""
    if (alive := loader()) is not None:
        alive.close()


def train_loader(
    dataset: DetectionDataset, *, batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0,
    workers: int | None = None
) -> Loader:
    """Shuffled batches of ``batch_size`` per rank, grouped by orientation, equally many on each rank."""
    sampler = TrainSampler(dataset.packed.shapes() >= 1, batch_size=batch_size, rank=rank, world_size=world_size,
                           seed=seed, repeat=dataset.config.repeat)
    return Loader(dataset, sampler, workers=dataset.config.workers if workers is None else workers)


def eval_loader(
    dataset: DetectionDataset, *, batch_size: int = 1, rank: int = 0, world_size: int = 1, workers: int | None = None
) -> Loader:
    """Every image once over all ranks."""
    sampler = EvalSampler(dataset.packed.shapes(), batch_size=batch_size, rank=rank, world_size=world_size)
    return Loader(dataset, sampler, workers=dataset.config.workers if workers is None else workers)


def _start_worker(worker: int) -> None:
    """One thread each; Ctrl-C and a cluster's SIGTERM are the main process's to handle.

    Both reach the whole process group. The main process still finishes a step and saves, and must not find its workers
    dead; a worker that it does not stop by itself ends ``_GRACE`` seconds after SIGTERM. When the main process is
    killed, torch's own watchdog ends the workers within five seconds.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE) and None)


def measure_loading(dataset: DetectionDataset, *, workers: int, seconds: float = 5.0, batch_size: int = 2) -> float:
    """Images per second that a training loader gives with so many workers (0: the calling process), after a start-up.

    The device is not involved: compare with what training reaches to see which of the two is the limit.
    """
    loader = train_loader(dataset, batch_size=batch_size, workers=workers)
    images, epoch, started = 0, 0, 0.0
    try:
        while True:
            loader.set_epoch(epoch)
            for count, (batch, _) in enumerate(loader):
                if started:
                    images += len(batch)
                elif count + 1 >= min(max(2 * workers, 1), len(loader)):  # workers have started, their queues are full
                    started = time.perf_counter()
                if started and time.perf_counter() - started >= seconds:
                    return images / (time.perf_counter() - started)
            epoch += 1
    finally:
        loader.close()
