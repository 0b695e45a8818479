"""From samples to batches: which image comes when, in worker processes, padded to a common size.

B images, G objects per image (padded to a multiple of 8). Which image comes when is a pure function of (seed, epoch,
step), the same on every rank; every sample's random numbers come from (seed, epoch, position), not from the worker that
happens to make it: any number of workers gives the same batches, and a resumed run the batches that the interrupted one
would have seen.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from cascade_rcnn.config import DataConfig
from cascade_rcnn.data.balance import draw_repeats, repeat_factors
from cascade_rcnn.data.dataset import DetectionDataset, Item, SampleKey, Window
from cascade_rcnn.errors import DataError
from cascade_rcnn.structures import ImageBatch, MaskCrops, Targets

ROWS_MULTIPLE = 8  # G is rounded up to this, so that few distinct shapes reach a compiled model
_GRACE = 10  # seconds a worker outlives a SIGTERM


class TrainSampler:
    """Batches of sample keys for one rank, all ranks the same number; shuffled anew in every epoch.

    Each epoch's shuffled images are dealt into chunks of ``batch_size * world_size`` of one orientation (wide or tall),
    so that little is padded; rank r takes the r-th part of each chunk. Two processes with batches of 2 therefore see
    the very images, and the very random numbers, of one process with batches of 4, and a run resumes at any step by
    starting there. No rank ever asks another.

    The last images of an epoch that do not fill a chunk share one (wide and tall mixed), filled up with images from the
    epoch's beginning: none is left out, no rank runs short.
    """

    def __init__(
        self,
        wide: NDArray[np.bool_],
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        repeat: int = 1,
        factors: NDArray[np.float64] | None = None,
    ) -> None:
        """``wide`` [I] says for each image whether its width is at least its height; ``factors`` [I] how often it comes
        in a pass over the data on average, at least once (None: each once).
        """
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.seed, self.epoch, self.start_step = seed, 0, 0
        self._wide, self._repeat, self._factors = wide, repeat, factors

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose the epoch; ``start_step`` > 0 leaves out its first steps (resuming)."""
        self.epoch, self.start_step = epoch, start_step

    @property
    def steps_per_epoch(self) -> int:
        once = len(self._wide) if self._factors is None else _rounded_up(self._factors)
        return -(-once * self._repeat // (self.batch_size * self.world_size))

    def __len__(self) -> int:
        """Steps that are left in this epoch."""
        return max(self.steps_per_epoch - self.start_step, 0)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        chunks = self._chunks()  # [steps, batch_size * world_size]
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        for step in range(self.start_step, len(chunks)):
            positions = range(step * chunks.shape[1], (step + 1) * chunks.shape[1])[mine]
            yield [
                SampleKey(int(index), (self.seed, self.epoch, position))
                for index, position in zip(chunks[step, mine], positions)
            ]

    def _chunks(self) -> NDArray[np.int64]:
        """The epoch's image indices, one row per step."""
        rng = np.random.default_rng((self.seed, self.epoch))
        if self._factors is None:
            order = np.concatenate([rng.permutation(len(self._wide)) for _ in range(self._repeat)])
        else:
            order = np.concatenate([draw_repeats(self._factors, rng) for _ in range(self._repeat)])
        chunk = self.batch_size * self.world_size
        rows, rest = [], []
        for group in (order[self._wide[order]], order[~self._wide[order]]):
            full = len(group) // chunk * chunk
            rows.append(group[:full].reshape(-1, chunk))
            rest.append(group[full:])
        left = np.concatenate(rest)
        missing = self.steps_per_epoch * chunk - len(order)
        left = np.concatenate([left, np.resize(order, missing)])
        chunks = np.concatenate([*rows, left.reshape(-1, chunk)])
        rng.shuffle(chunks)  # along steps: a mixed chunk comes anywhere
        return chunks


def _rounded_up(factors: NDArray[np.float64]) -> int:
    """The most images that ``draw_repeats`` gives."""
    whole = np.floor(factors)
    return int(whole.sum() + np.ceil((factors - whole).sum()))


class EvalSampler:
    """Every image exactly once over all ranks, in batches; ranks may differ by one image.

    With more than one image per batch, images of like shape stand together, so that little is padded.
    """

    def __init__(self, shapes: NDArray[np.float64], *, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        """``shapes`` [I]: width over height of each image (1 where unknown)."""
        order = np.argsort(shapes, kind="stable") if batch_size > 1 else np.arange(len(shapes))
        self.indices: NDArray[np.int64] = order[rank::world_size]
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [SampleKey(int(index)) for index in self.indices[start : start + self.batch_size]]


def bucket_sizes(config: DataConfig) -> tuple[tuple[int, int], ...]:
    """(height, width) of the few sizes that ``config.pad_buckets`` pads to, by rising area; none without it.

    Squares of the shorter and of the longer limit (a batch of wide and tall images), and wide and tall ones of 4:3 and
    of the longer limit: an image that is scaled to those limits fits at least one of them.
    """
    if not config.pad_buckets:
        return ()
    shorter = max((*config.short_side, config.test_short_side))
    limits = (shorter, min(shorter * 4 // 3, config.long_side), config.long_side)
    short, middle, long = (-(-side // config.pad_multiple) * config.pad_multiple for side in limits)
    sizes = {(short, short), (short, middle), (middle, short), (short, long), (long, short), (long, long)}
    return tuple(sorted(sizes, key=lambda size: (size[0] * size[1], size)))


@dataclass(frozen=True)
class Collate:
    """Stacks items into a batch, padded with zeros right and below to a multiple of ``pad_multiple``.

    ``fixed_size`` > 0 pads at least to that height and width (large-scale jitter's square); with ``buckets``, the first
    of these sizes that all images of the batch fit into is taken.
    """

    pad_multiple: int = 32
    fixed_size: int = 0
    buckets: tuple[tuple[int, int], ...] = ()

    def __call__(self, items: list[Item] | DataError) -> tuple[ImageBatch, Targets] | DataError:
        if isinstance(items, DataError):
            return items
        sizes = torch.tensor([item.image.shape[1:] for item in items])
        height, width = (
            -(-max(int(side), self.fixed_size) // self.pad_multiple) * self.pad_multiple for side in sizes.amax(dim=0)
        )
        height, width = next((size for size in self.buckets if size[0] >= height and size[1] >= width), (height, width))
        pixels = torch.empty(
            len(items), 3, height, width, dtype=items[0].image.dtype, memory_format=torch.channels_last
        )  # as the images come: ten times faster to fill
        for row, item in zip(pixels, items):
            h, w = item.image.shape[1:]
            row[:, :h, :w] = item.image
            row[:, h:], row[:, :h, w:] = 0, 0
        images = ImageBatch(
            pixels=pixels,
            sizes=sizes,
            original_sizes=torch.tensor([item.original_size for item in items]),
            image_ids=tuple(item.image_id for item in items),
            paths=tuple(item.path for item in items),
            bad=tuple(entry for item in items for entry in item.bad),
            scales=_scales(items),
        )
        return images, _targets(items)


def _scales(items: list[Item]) -> torch.Tensor | None:
    scales = [item.scale for item in items if item.scale is not None]
    return torch.tensor(scales) if scales and len(scales) == len(items) else None


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

    ``ImageBatch.bad`` lists (path, reason) of unreadable images: in training others stand in for them, in evaluation
    they are black.
    """

    def __init__(self, dataset: DetectionDataset, sampler: TrainSampler | EvalSampler, *, workers: int) -> None:
        self.dataset, self.sampler, self._ends_at_exit = dataset, sampler, False
        method: str | None = None
        if workers > 0:
            # forked workers share the arrays without copying; elsewhere they must lie in shared memory
            method = "fork" if sys.platform == "linux" else "spawn"
            if method == "spawn":
                dataset.packed.share()
        workers = min(workers, os.cpu_count() or 1)  # more would be slower, and torch warns
        config = dataset.config
        square = config.long_side if dataset.training and config.large_scale_jitter is not None else 0
        collate = Collate(config.pad_multiple, square, bucket_sizes(config))
        self._loader: DataLoader[Any] | None = DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            worker_init_fn=_start_worker,
            multiprocessing_context=method,
        )

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


class Upload:
    """Brings batches to the device; to a GPU on a stream of its own, beside the step that it still computes.

    The host is ahead of the GPU, as nothing in a step waits for it, so that a batch is there before its step begins.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, images: ImageBatch, targets: Targets) -> tuple[ImageBatch, Targets]:
        if self._stream is None:
            return images.to(self._device), targets.to(self._device)
        with torch.cuda.stream(self._stream):
            images = images.to(self._device, non_blocking=True)  # from pinned memory
            targets = targets.to(self._device, non_blocking=True)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for tensor in (*images.tensors(), *targets.tensors()):
            tensor.record_stream(current)  # its memory is not given away before the step is over
        return images, targets


def _close(loader: weakref.ref[Loader]) -> None:
    """At exit: otherwise torch waits five seconds for each worker before it ends it by force."""
    if (alive := loader()) is not None:
        alive.close()


def train_loader(
    dataset: DetectionDataset,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    workers: int | None = None,
) -> Loader:
    """Shuffled batches of ``batch_size`` per rank, grouped by orientation, equally many on each rank."""
    threshold = dataset.config.repeat_threshold
    sampler = TrainSampler(
        dataset.packed.shapes() >= 1,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        seed=seed,
        repeat=dataset.config.repeat,
        factors=repeat_factors(dataset.packed, len(dataset.class_names), threshold) if threshold else None,
    )
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
