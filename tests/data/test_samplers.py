"""Every image, every rank, every step: known from (seed, epoch, step) alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_rcnn.data.loader import EvalSampler, TrainSampler


def _wide(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(count) < 0.7


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
def test_all_ranks_have_equally_many_full_batches_and_lose_no_image(
    count: int, batch_size: int, world_size: int, repeat: int
) -> None:
    ranks = [
        list(TrainSampler(_wide(count), batch_size=batch_size, rank=rank, world_size=world_size, repeat=repeat))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(len(batch) == batch_size for batches in ranks for batch in batches)
    seen = np.bincount([key.image for batches in ranks for batch in batches for key in batch], minlength=count)
    padding = len(ranks[0]) * batch_size * world_size - count * repeat
    assert seen.min() >= repeat and seen.sum() == count * repeat + padding
    assert padding < batch_size * world_size
    assert (
        len(ranks[0])
        == TrainSampler(_wide(count), batch_size=batch_size, world_size=world_size, repeat=repeat).steps_per_epoch
    )


def test_batches_hold_one_orientation_but_for_the_last_images() -> None:
    wide = _wide(103)
    batches = list(TrainSampler(wide, batch_size=4, seed=3))
    mixed = sum(len({bool(wide[key.image]) for key in batch}) == 2 for batch in batches)
    assert mixed <= 2 < len(batches)


def test_two_ranks_see_what_one_with_the_double_batch_sees() -> None:
    """Same images, same random numbers: gradients can then be compared."""
    one = list(TrainSampler(_wide(50), batch_size=4, seed=1))
    two = [list(TrainSampler(_wide(50), batch_size=2, rank=rank, world_size=2, seed=1)) for rank in (0, 1)]
    assert [first + second for first, second in zip(*two)] == one


def test_resuming_gives_the_steps_that_were_left() -> None:
    sampler = TrainSampler(_wide(41), batch_size=2, rank=1, world_size=2, seed=5)
    sampler.set_epoch(3)
    whole = list(sampler)
    sampler.set_epoch(3, start_step=4)
    assert len(sampler) == len(whole) - 4
    assert list(sampler) == whole[4:]
    sampler.set_epoch(3, start_step=len(whole))
    assert len(sampler) == 0 and list(sampler) == []


def test_epochs_and_seeds_differ_and_positions_give_each_sample_its_own_seed() -> None:
    sampler = TrainSampler(_wide(40), batch_size=2, seed=0)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    other = list(TrainSampler(_wide(40), batch_size=2, seed=1))
    images = [[key.image for batch in batches for key in batch] for batches in (first, second, other)]
    assert images[0] != images[1] and images[0] != images[2]
    seeds = [key.seed for batches in (first, second, other) for batch in batches for key in batch]
    assert len(set(seeds)) == len(seeds) == 120


@pytest.mark.parametrize("count, batch_size, world_size", [(10, 1, 1), (11, 4, 3), (2, 4, 3), (0, 2, 2)])
def test_evaluation_sees_every_image_once(count: int, batch_size: int, world_size: int) -> None:
    shapes = np.random.default_rng(0).uniform(0.5, 2, count)
    samplers = [
        EvalSampler(shapes, batch_size=batch_size, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    batches = [list(sampler) for sampler in samplers]
    seen = [key.image for rank in batches for batch in rank for key in batch]
    assert sorted(seen) == list(range(count))
    assert [len(sampler) for sampler in samplers] == [len(rank) for rank in batches]
    sizes = [len(sampler.indices) for sampler in samplers]
    assert max(sizes) - min(sizes) <= 1


def test_evaluation_one_by_one_keeps_the_order_and_batches_go_by_shape() -> None:
    shapes = np.array([2.0, 0.5, 1.9, 0.6])
    assert [batch[0].image for batch in EvalSampler(shapes, batch_size=1)] == [0, 1, 2, 3]
    assert [{key.image for key in batch} for batch in EvalSampler(shapes, batch_size=2)] == [{1, 3}, {0, 2}]
