"""Which image comes when: a pure function of (seed, epoch, step), the same on every rank and any number of workers.

Training deals each epoch's shuffled images into chunks of ``batch_size * world_size`` of one orientation (wide or
tall), so that little is padded; rank r takes the r-th part of each chunk. Two processes with batches of 2 therefore see
the very images, and the very random numbers, of one process with batches of 4, and a run resumes at any step by
starting there. No rank ever asks another.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class SampleKey(NamedTuple):
    """What a dataset needs to make a sample: the index of an image, and the seed of its augmentation."""

    image: int
    seed: tuple[int, ...] = ()


class TrainSampler:
    """Batches of sample keys for one rank, all ranks the same number; shuffled anew in every epoch.

    The last images of an epoch that do not fill a chunk share one (wide and tall mixed), filled up with images from the
    epoch's beginning: none is left out, no rank runs short.
    """

    def __init__(
        self, wide: NDArray[np.bool_], *, batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0,
        repeat: int = 1
    ) -> None:
        """``wide`` [I] says for each image whether its width is at least its height."""
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.seed, self.epoch, self.start_step = seed, 0, 0
        self._wide, self._repeat = wide, repeat

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose the epoch; ``start_step`` > 0 leaves out its first steps (resuming)."""
        self.epoch, self.start_step = epoch, start_step

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._wide) * self._repeat // (self.batch_size * self.world_size))

    def __len__(self) -> int:
        """Steps that are left in this epoch."""
        return max(self.steps_per_epoch - self.start_step, 0)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        chunks = self._chunks()  # [steps, batch_size * world_size]
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        for step in range(self.start_step, len(chunks)):
            positions = range(step * chunks.shape[1], (step + 1) * chunks.shape[1])[mine]
            yield [SampleKey(int(index), (self.seed, self.epoch, position))
                   for index, position in zip(chunks[step, mine], positions)]

    def _chunks(self) -> NDArray[np.int64]:
        """The epoch's image indices, one row per step."""
        rng = np.random.default_rng((self.seed, self.epoch))
        order = np.concatenate([rng.permutation(len(self._wide)) for _ in range(self._repeat)])
        chunk = self.batch_size * self.world_size
        rows, rest = [], []
        for group in (order[self._wide[order]], order[~self._wide[order]]):
            full = len(group) // chunk * chunk
            rows.append(group[:full].reshape(-1, chunk))
            rest.append(group[full:])
        left = np.concatenate(rest)
        missing = -len(left) % chunk
        left = np.concatenate([left, np.resize(order, missing)])
        chunks = np.concatenate([*rows, left.reshape(-1, chunk)])
        rng.shuffle(chunks)  # along steps: a mixed chunk comes anywhere
        return chunks


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
            yield [SampleKey(int(index)) for index in self.indices[start:start + self.batch_size]]
