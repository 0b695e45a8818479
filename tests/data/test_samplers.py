"""Every image, every rank, every step: known from (seed, epoch, step) alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_rcnn.data.balance import about_repeats, class_factors, draw_repeats, repeat_factors
from cascade_rcnn.data.dataset import pack_records
from cascade_rcnn.data.loader import EvalSampler, TrainSampler
from cascade_rcnn.data.records import empty_record


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


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(1, 6), min_size=1, max_size=40), st.integers(1, 4), st.integers(1, 3), st.integers(1, 2))
def test_repeated_images_come_as_often_as_their_factor_rounded(
    factors: list[float], batch_size: int, world_size: int, repeat: int
) -> None:
    """Every epoch has the same number of steps, on every rank, whatever the rounding."""
    sampler = TrainSampler(
        _wide(len(factors)), batch_size=batch_size * world_size, repeat=repeat, factors=np.array(factors)
    )
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == sampler.steps_per_epoch and {len(batch) for batch in batches} == {sampler.batch_size}
        seen = np.bincount([key.image for batch in batches for key in batch], minlength=len(factors))
        assert (seen >= repeat * np.floor(factors)).all()
        beyond = np.maximum(seen - repeat * np.ceil(factors), 0).sum()
        # The last batch is filled up, and a pass that rounded down is one image short of the number that steps count.
        assert beyond < sampler.batch_size + repeat
    parts = [
        list(
            TrainSampler(
                _wide(len(factors)),
                batch_size=batch_size,
                rank=rank,
                world_size=world_size,
                repeat=repeat,
                factors=np.array(factors),
            )
        )
        for rank in range(world_size)
    ]
    sampler.set_epoch(0)
    assert [[key for batch in step for key in batch] for step in zip(*parts)] == list(sampler)


def test_repeats_have_the_right_mean() -> None:
    factors = np.array([1.0, 1.25, 1.5, 2.0, 3.75, 1.1])
    rng = np.random.default_rng(0)
    counts = np.array([np.bincount(draw_repeats(factors, rng), minlength=6) for _ in range(4000)])
    assert np.abs(counts.mean(axis=0) - factors).max() < 0.03  # four standard errors of a coin
    assert set(counts.sum(axis=1).tolist()) <= {10, 11}  # 10.6


def test_repeat_factors_are_those_of_lvis(tmp_path: Path) -> None:
    """Sixteen images show a, four of them also b, one c and twice; d is only to be ignored."""
    labels = [[0, 1]] * 4 + [[0, 2, 2]] + [[0, 3]] + [[0]] * 10 + [[]]
    records = []
    for index, classes in enumerate(labels):
        record = empty_record(tmp_path / f"{index}.png", f"{index}.png", index, (50, 50), source="", sized=True)
        record.boxes = np.tile([1.0, 1, 9, 9], (len(classes), 1))
        record.labels, record.ignore = np.array(classes, dtype=np.int64), np.array(classes, dtype=np.int64) == 3
        records.append(record)
    packed = pack_records(records, masks=False, keep_ignored=True, keep_empty=True)
    wanted = [1.0, (0.5 / (4 / 17)) ** 0.5, (0.5 / (1 / 17)) ** 0.5, 1.0]
    np.testing.assert_allclose(class_factors(packed, 4, 0.5), wanted)
    np.testing.assert_allclose(repeat_factors(packed, 4, 0.5), [wanted[1]] * 4 + [wanted[2]] + [1.0] * 12)
    line = about_repeats(packed, ("a", "b", "c", "d"), 0.5)
    assert line == "data.repeat_threshold 0.5: an epoch has 21 images of 17; images with c 2.9 times, b 1.5 times"
    assert "none is repeated" in about_repeats(packed, ("a", "b", "c", "d"), 0.01)
