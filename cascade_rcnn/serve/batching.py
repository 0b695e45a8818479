"""Requests that come together go through the network together."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.inference.detections import Detections

Image = NDArray[np.uint8]  # [H, W, 3] RGB
Detect = Callable[[Sequence[Image], int], list[Detections]]  # images, stages (0: all)


class QueueFullError(Exception):
    """As many images wait as may; ``retry_after`` is the time in seconds that those ahead will take, about."""

    def __init__(self, retry_after: float) -> None:
        super().__init__("too many images are waiting")
        self.retry_after = retry_after


@dataclass
class _Waiting:
    image: Image
    stages: int
    done: asyncio.Future[Detections]
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """Gathers images for up to ``max_delay`` seconds or ``max_batch`` images, and runs them in one thread of its own.

    Only images that want the same number of stages share a batch. A batch that fails is repeated image by image, so
    that one image cannot spoil the answers of the others.
    """

    def __init__(self, detect: Detect, *, max_batch: int, max_delay: float, max_queue: int) -> None:
        self._detect, self._max_batch, self._max_delay, self._max_queue = detect, max_batch, max_delay, max_queue
        self._waiting: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="network")
        self._seconds_per_image = 0.5  # a guess, until batches have been timed
        self._task: asyncio.Task[None] | None = None
        self.batch_sizes: deque[int] = deque(maxlen=1000)

    def start(self) -> None:
        """Begin to work, in the running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._work())

    async def stop(self) -> None:
        """Finish what waits, then end."""
        while self._waiting:
            await asyncio.sleep(0.01)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await asyncio.to_thread(self._thread.shutdown)

    @property
    def waiting(self) -> int:
        """Images that wait."""
        return len(self._waiting)

    def full(self) -> QueueFullError:
        """What is raised when the queue is full, with the seconds until it will have been worked off."""
        return QueueFullError(max(1.0, len(self._waiting) * self._seconds_per_image))

    async def detect(self, images: Sequence[Image], stages: int = 0) -> list[Detections]:
        """What is found in each image. Raises QueueFullError; what the network raises for an image."""
        if len(self._waiting) + len(images) > self._max_queue:
            raise self.full()
        loop = asyncio.get_running_loop()
        entries = [_Waiting(image, stages, loop.create_future()) for image in images]
        self._waiting.extend(entries)
        self._arrived.set()
        try:
            return list(await asyncio.gather(*(entry.done for entry in entries)))
        finally:
            for entry in entries:  # the client has left, or another of its images has failed: nobody wants the rest
                entry.done.cancel()

    async def _work(self) -> None:
        while True:
            await self._arrived.wait()
            batch = await self._gather()
            if batch:
                await self._run(batch)

    async def _gather(self) -> list[_Waiting]:
        """The next batch: the oldest image, and those behind it that want the same."""
        while self._waiting and self._waiting[0].done.done():
            self._waiting.popleft()
        if not self._waiting:
            self._arrived.clear()
            return []
        first = self._waiting[0]
        while len(self._waiting) < self._max_batch:
            left = first.since + self._max_delay - time.monotonic()
            if left <= 0:
                break
            await asyncio.sleep(min(left, 0.002))
        same = [entry for entry in self._waiting if entry.stages == first.stages and not entry.done.done()]
        batch = same[: self._max_batch]
        for entry in batch:
            self._waiting.remove(entry)
        return batch

    async def _run(self, batch: list[_Waiting]) -> None:
        loop = asyncio.get_running_loop()
        began = time.monotonic()
        try:
            images = [entry.image for entry in batch]
            found = await loop.run_in_executor(self._thread, self._detect, images, batch[0].stages)
            for entry, detections in zip(batch, found, strict=True):
                if not entry.done.done():
                    entry.done.set_result(detections)
        except Exception as error:
            if len(batch) == 1:
                if not batch[0].done.done():
                    batch[0].done.set_exception(error)
            else:
                for entry in batch:
                    await self._run([entry])
            return
        self.batch_sizes.append(len(batch))
        self._seconds_per_image += 0.2 * ((time.monotonic() - began) / len(batch) - self._seconds_per_image)
