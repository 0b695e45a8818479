"""The length, the position and the learning rate of a training, in plain numbers.

A pass is one batch through the network; ``passes_per_step`` passes make a step, which changes the weights; an epoch is
every image once (times ``data.repeat``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cascade_rcnn.config import TrainConfig


@dataclass
class Progress:
    """How far a run has come. Images are counted as well as passes, so that another number of processes can resume."""

    epoch: int = 0  # epochs completed
    passes: int = 0  # passes of each process in the epoch under way
    images: int = 0  # the same in images of all processes
    step: int = 0  # steps taken in all
    evaluated: int = 0  # step of the last evaluation
    best: float | None = None
    best_step: int = 0
    not_better: int = 0  # evaluations since the best one


@dataclass(frozen=True)
class Schedule:
    """The length of a training.

    Six batches an epoch in steps of four passes: an epoch has two steps, ``[4, 2]``. The last step of an epoch may be
    short; no step reaches into the next epoch.
    """

    epochs: int
    passes_per_epoch: int  # batches of each process
    passes_per_step: int
    images_per_pass: int  # of all processes
    max_steps: int = 0  # 0: no limit
    evaluate_every: int = 0  # epochs; 0: never
    patience: int = 0  # evaluations without a better result; 0: no limit

    @staticmethod
    def of(train: TrainConfig, *, passes_per_epoch: int, world_size: int) -> Schedule:
        """The schedule of a configuration whose loader gives each of the processes ``passes_per_epoch`` batches."""
        return Schedule(
            epochs=train.epochs,
            passes_per_epoch=passes_per_epoch,
            passes_per_step=passes_per_step(train, world_size),
            images_per_pass=train.batch_size * world_size,
            max_steps=train.max_steps,
            evaluate_every=train.evaluate_every,
            patience=train.patience,
        )

    @property
    def images_per_step(self) -> int:
        return self.images_per_pass * self.passes_per_step

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.passes_per_epoch / self.passes_per_step)

    @property
    def all_epochs(self) -> int:
        """Steps of all epochs, without ``max_steps``."""
        return self.epochs * self.steps_per_epoch

    @property
    def total_steps(self) -> int:
        return min(self.all_epochs, self.max_steps) if self.max_steps else self.all_epochs

    def is_through(self, progress: Progress) -> bool:
        """All epochs or steps are done."""
        return progress.epoch >= self.epochs or progress.step >= self.total_steps

    def finished(self, progress: Progress) -> bool:
        """The schedule is through, or the last evaluations were no better."""
        return self.is_through(progress) or 0 < self.patience <= progress.not_better

    def evaluation_due(self, progress: Progress) -> bool:
        """An epoch at which to evaluate, or the schedule, has ended, and this step has not been evaluated yet."""
        if self.evaluate_every == 0 or progress.step == progress.evaluated:
            return False
        between_epochs = progress.passes == 0
        return self.is_through(progress) or (between_epochs and progress.epoch % self.evaluate_every == 0)

    def epochs_done(self, progress: Progress) -> float:
        return progress.epoch + progress.passes / self.passes_per_epoch

    def rest_of_epoch(self, progress: Progress) -> list[int]:
        """The number of passes in each step that is left in this epoch."""
        full_steps, rest = divmod(self.passes_per_epoch - progress.passes, self.passes_per_step)
        steps = [self.passes_per_step] * full_steps
        if rest:
            steps.append(rest)
        return steps[: self.total_steps - progress.step]

    def advance(self, progress: Progress, passes: int) -> None:
        """Count a step of so many passes."""
        progress.step += 1
        progress.passes += passes
        if progress.passes == self.passes_per_epoch:
            progress.epoch, progress.passes = progress.epoch + 1, 0
        progress.images = progress.passes * self.images_per_pass

    def resumed(self, saved: Progress) -> Progress:
        """The position in this schedule of a saved run, perhaps with other batches or more processes.

        The same place if nothing has changed; else after the last whole step whose images have all been seen.
        """
        whole_steps = saved.images // self.images_per_step
        passes = min(whole_steps * self.passes_per_step, self.passes_per_epoch - 1)
        step = saved.epoch * self.steps_per_epoch + passes // self.passes_per_step
        return Progress(
            epoch=saved.epoch,
            passes=passes,
            images=passes * self.images_per_pass,
            step=step,
            evaluated=step if saved.evaluated == saved.step else min(saved.evaluated, max(step - 1, 0)),
            best=saved.best,
            best_step=saved.best_step,
            not_better=saved.not_better,
        )


def passes_per_step(train: TrainConfig, world_size: int) -> int:
    """``accumulate``, or for 0 as many as bring the images of a step closest to ``images_per_step``."""
    images = train.batch_size * world_size
    return train.accumulate or max(1, round(train.images_per_step / images))


def scaled_lr(train: TrainConfig, images: int, *, passes: int = 1) -> tuple[float, str]:
    """The learning rate for ``images`` per step (made in ``passes`` on each process), linear in their number (Goyal et
    al. 2017), and a line about it.
    """
    rate = train.lr * images / train.images_per_step
    line = f"learning rate {train.lr:g} is for {train.images_per_step} images per step; this run has {images}"
    line += f" in {passes} passes, so " if passes > 1 else ", so "
    return rate, line + (f"{rate:g}" if images != train.images_per_step else "it stays")


def warmup_steps(train: TrainConfig, steps_per_epoch: int) -> int:
    """``train.warmup_steps``, at most a third of the schedule, so that a short training also reaches its full rate."""
    return min(train.warmup_steps, max(1, train.epochs * steps_per_epoch // 3))


def lr_factor(train: TrainConfig, step: int, *, steps_per_epoch: int) -> float:
    """Factor of the learning rate at ``step`` (0, 1, ... over the whole run).

    Warm-up is linear from ``warmup_factor`` to 1 and multiplies the schedule: multistep divides by ten at each
    milestone, cosine falls to 0 at the end of the last epoch, step by step.
    """
    warmup = 1.0
    if step < (last := warmup_steps(train, steps_per_epoch)):
        warmup = train.warmup_factor + (1 - train.warmup_factor) * step / last
    if train.schedule == "cosine":
        share = step / (train.epochs * steps_per_epoch)
        return warmup * (0.5 + 0.5 * math.cos(math.pi * min(share, 1.0)))
    passed = sum(step >= milestone * steps_per_epoch for milestone in train.milestones)
    return float(warmup * 0.1**passed)
