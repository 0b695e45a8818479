"""Lengths, places and learning rates of a training, in plain numbers."""

from __future__ import annotations

import itertools

import pytest

from cascade_rcnn.config import TrainConfig
from cascade_rcnn.training.schedule import Progress, Schedule, lr_factor, passes_per_step, scaled_lr


def _schedule(**changes: int) -> Schedule:
    """Ten batches an epoch in steps of four, of two images each."""
    numbers = {"epochs": 3, "passes_per_epoch": 10, "passes_per_step": 4, "images_per_pass": 2} | changes
    return Schedule(**numbers)


def _walk(schedule: Schedule) -> list[Progress]:
    """Where a run stands after each step, evaluated whenever that is due."""
    progress, places = Progress(), []
    while not schedule.finished(progress):
        for passes in schedule.rest_of_epoch(progress):
            schedule.advance(progress, passes)
            places.append(Progress(**vars(progress)))
        if schedule.evaluation_due(progress):
            progress.evaluated = progress.step
            progress.not_better += 1
    return places


def test_steps_end_with_their_epoch() -> None:
    schedule = _schedule()
    assert (schedule.steps_per_epoch, schedule.total_steps, schedule.images_per_step) == (3, 9, 8)
    assert schedule.rest_of_epoch(Progress()) == [4, 4, 2]
    assert schedule.rest_of_epoch(Progress(passes=4, step=1)) == [4, 2]
    assert _schedule(passes_per_epoch=8).rest_of_epoch(Progress()) == [4, 4]
    places = [(one.epoch, one.passes, one.images, one.step) for one in _walk(schedule)]
    assert places[:4] == [(0, 4, 8, 1), (0, 8, 16, 2), (1, 0, 0, 3), (1, 4, 8, 4)] and len(places) == 9
    assert schedule.epochs_done(Progress(epoch=1, passes=4)) == 1.4


def test_max_steps_ends_the_schedule_within_an_epoch() -> None:
    schedule = _schedule(max_steps=4)
    assert (schedule.total_steps, schedule.all_epochs) == (4, 9)
    assert schedule.rest_of_epoch(Progress(epoch=1, step=3)) == [4]
    assert schedule.finished(Progress(epoch=1, passes=4, step=4))
    assert _schedule(max_steps=99).total_steps == 9


def test_evaluations_come_between_epochs_and_at_the_end_once() -> None:
    due = _schedule(evaluate_every=2).evaluation_due
    assert not due(Progress()) and not due(Progress(epoch=1, step=3)) and due(Progress(epoch=2, step=6))
    assert not due(Progress(epoch=2, step=6, evaluated=6)) and not due(Progress(epoch=2, passes=4, step=7))
    assert due(Progress(epoch=3, step=9, evaluated=6)) and not due(Progress(epoch=3, step=9, evaluated=9))
    assert not _schedule().evaluation_due(Progress(epoch=3, step=9))
    assert _schedule(evaluate_every=2, max_steps=4).evaluation_due(Progress(epoch=1, passes=4, step=4))


def test_patience_counts_evaluations_without_a_better_result() -> None:
    assert len(_walk(_schedule(evaluate_every=1, patience=2))) == 6
    assert len(_walk(_schedule(evaluate_every=1))) == 9


def test_a_run_resumes_where_it_was() -> None:
    schedule = _schedule(evaluate_every=1)
    for place in _walk(schedule):
        assert schedule.resumed(place) == place


def test_another_number_of_processes_resumes_after_the_images_seen() -> None:
    saved = Progress(epoch=1, passes=8, images=16, step=5, evaluated=3, best=0.5, best_step=3, not_better=1)
    twice_as_many = _schedule(passes_per_epoch=5, images_per_pass=4)  # steps of 16 images
    assert twice_as_many.resumed(saved) == Progress(1, 4, 16, 3, 2, 0.5, 3, 1)
    evaluated_now = Progress(epoch=1, step=3, evaluated=3)
    assert twice_as_many.resumed(evaluated_now) == Progress(epoch=1, step=2, evaluated=2)  # not once more
    larger_steps = _schedule(passes_per_step=9)
    assert larger_steps.resumed(saved).passes == 0  # 18 images a step: the 16 seen are no whole step
    fewer_batches = _schedule(passes_per_epoch=6)
    assert fewer_batches.resumed(saved).passes == 5  # at least one batch is left


def test_the_multistep_schedule_of_1x() -> None:
    """Warm-up over 500 steps from 0.001, a tenth after epochs 8 and 11 of 12: 7,330 steps each for COCO on 8 GPUs."""
    train = TrainConfig(epochs=12, milestones=(8, 11), warmup_steps=500, warmup_factor=0.001)
    factors = {
        step: lr_factor(train, step, steps_per_epoch=7330)
        for step in (0, 250, 500, 8 * 7330 - 1, 8 * 7330, 11 * 7330 - 1, 11 * 7330, 12 * 7330 - 1)
    }
    expected = [0.001, 0.5005, 1, 1, 0.1, 0.1, 0.01, 0.01]
    assert list(factors.values()) == pytest.approx(expected)


def test_the_cosine_schedule_falls_step_by_step_to_zero() -> None:
    train = TrainConfig(epochs=2, milestones=(), schedule="cosine", warmup_steps=0)
    factors = [lr_factor(train, step, steps_per_epoch=50) for step in range(101)]
    assert factors[0] == 1 and factors[50] == pytest.approx(0.5) and factors[100] == pytest.approx(0)
    assert all(a > b for a, b in itertools.pairwise(factors))


def test_without_warm_up_the_first_step_has_the_whole_rate() -> None:
    assert lr_factor(TrainConfig(warmup_steps=0), 0, steps_per_epoch=10) == 1


def test_the_rate_is_linear_in_the_images_of_a_step() -> None:
    train = TrainConfig(lr=0.02, images_per_step=16)
    assert scaled_lr(train, 4) == (0.005, "learning rate 0.02 is for 16 images per step; this run has 4, so 0.005")
    assert scaled_lr(train, 16) == (0.02, "learning rate 0.02 is for 16 images per step; this run has 16, so it stays")
    assert scaled_lr(train, 64)[0] == pytest.approx(0.08)
    assert "this run has 16 in 8 passes, so it stays" in scaled_lr(train, 16, passes=8)[1]


@pytest.mark.parametrize(
    ("accumulate", "batch", "world", "passes"),
    [
        (1, 2, 1, 1),
        (3, 2, 1, 3),
        (0, 2, 1, 8),
        (0, 2, 8, 1),
        (0, 2, 3, 3),
        (0, 4, 16, 1),
        (0, 1, 1, 16),
    ],
)
def test_accumulation_brings_the_step_to_its_images(accumulate: int, batch: int, world: int, passes: int) -> None:
    train = TrainConfig(accumulate=accumulate, batch_size=batch, images_per_step=16)
    assert passes_per_step(train, world) == passes


def test_a_short_training_warms_up_for_a_third_of_it_at_most() -> None:
    train = TrainConfig(epochs=2, milestones=(), warmup_steps=500, warmup_factor=0.0)
    factors = [lr_factor(train, step, steps_per_epoch=15) for step in range(12)]
    assert factors == pytest.approx([step / 10 for step in range(10)] + [1.0, 1.0])
    assert lr_factor(train, 250, steps_per_epoch=10_000) == pytest.approx(0.5)
