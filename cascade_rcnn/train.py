"""Training: one loop, read from top to bottom.

    cascade-rcnn train CONFIG --data DIR --out RUN [--resume]
    torchrun --nproc-per-node 8 -m cascade_rcnn train CONFIG ...

A pass is one batch through the network; ``accumulate`` passes make a step; an epoch is every image once (times
``data.repeat``). What a run holds and how it is saved is in ``run.py``; docs/train.md tells it from outside.
"""

from __future__ import annotations

import os
import signal
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from cascade_rcnn import distributed
from cascade_rcnn.check.dataset import check_before_training
from cascade_rcnn.config import Config
from cascade_rcnn.errors import UserError
from cascade_rcnn.models.build import check_backbone
from cascade_rcnn.training.interrupts import Interrupts, StopNow, TrainingInterrupted, Watchdog
from cascade_rcnn.training.log import LossWindow, RunLog
from cascade_rcnn.training.optim import lr_factor
from cascade_rcnn.training.random_state import reproducible
from cascade_rcnn.training.run import Run, refuse_overwriting


def train(config: Config, *, out: Path, resume: bool = False, device: str | torch.device | None = None) -> Path:
    """Train ``config`` into the run folder ``out`` and return its best checkpoint (the last, without evaluation).

    With ``resume`` a run that was interrupted goes on where it was saved, and an empty folder begins; without, a folder
    that holds a run is refused. Started by torchrun, all processes train together.

    Raises:
        UserError: settings, data or files that cannot be used; losses that stay not finite; GPU memory that runs out.
        TrainingInterrupted: after SIGINT, SIGTERM or SIGHUP, when everything is saved (a SystemExit).
    """
    settings = config.train
    with (
        distributed.start(device) as world,
        Interrupts() as interrupts,
        RunLog(out, active=world.is_main) as log,
        Watchdog(settings.stall_minutes, rank=world.rank) as watchdog,
        reproducible(settings.deterministic),
    ):
        run: Run | None = None
        try:
            with interrupts.at_once():
                run = Run(config, out, world, log, resume=resume)
            while True:
                if run.evaluation_due():
                    watchdog.rest()  # an evaluation takes as long as it takes
                    with interrupts.at_once(), log.paused():  # all is saved: a signal may break this off anywhere
                        metrics = run.evaluate()
                    run.judge(metrics)
                if run.finished():
                    return run.finish()
                train_epoch(run, interrupts, watchdog)
        except StopNow:
            if run is not None and world.size == 1:
                run.save()
            stopped = TrainingInterrupted(interrupts.pending or signal.SIGTERM)  # or another process was told to stop
            log.say(_farewell(stopped, run))
            raise stopped from None
        except torch.OutOfMemoryError as error:
            raise UserError(_out_of_memory(config, error)) from error
        finally:
            if interrupts.pending:
                interrupts.end_children()  # before close(), which waits for them politely
            if run is not None:
                run.loader.close()


def train_epoch(run: Run, interrupts: Interrupts, watchdog: Watchdog) -> None:
    """What is left of an epoch; saves at its end, every ``save_every`` steps, and when a signal asks to stop."""
    settings, world, log, progress = run.config.train, run.world, run.log, run.progress
    window = LossWindow(max_bad=settings.max_bad_losses, scaled=run.updater.scales_loss)
    # one of several processes may not leave by itself while it waits for data: they agree after the step
    breakable = interrupts.at_once if world.size == 1 else nullcontext
    with breakable(), log.waiting():
        watchdog.now(f"step {progress.step}, starting to load data")
        batches = run.batches()
        interrupts.keep_worker_deaths_quiet()
    run.model.train()
    for passes in run.rest_of_epoch():
        for number in range(passes):
            watchdog.now(f"step {progress.step}, waiting for data")
            with breakable(), log.waiting():
                images, targets = next(batches)
            watchdog.now(f"step {progress.step}, images {', '.join(images.paths)}")
            run.look_at(images, targets)
            with distributed.without_sync(run.wrapped, active=number + 1 < passes):
                with run.updater.forward():
                    losses: dict[str, Tensor] = run.wrapped(*run.upload(images, targets))
                run.updater.backward(torch.stack(list(losses.values())).sum() / passes)
            window.add_pass(losses, images.paths)

        factor = lr_factor(settings, progress.step, steps_per_epoch=run.steps_per_epoch)
        norm = run.updater.step(factor)
        if run.average is not None:
            run.average.update()
        messages = window.end_step(progress.step, norm)
        run.advance(passes)
        log.tick(progress.step, passes * settings.batch_size)

        ended = progress.passes == 0 or run.finished()
        if ended or progress.step % settings.log_every == 0:
            values, more = window.read()
            messages += more
            log.step(progress.step, run.epochs_done(), {**values, "lr": run.updater.lr * factor}, device=world.device)
        for message in messages:
            run.say_anywhere(message)
        stop = run.vote.cast(bool(interrupts.pending))
        if stop or ended or (settings.save_every and progress.step % settings.save_every == 0):
            watchdog.now(f"step {progress.step}, saving")
            run.save()
        if stop:
            raise StopNow


def run_train(config: Config, *, out: Path, resume: bool = False, check: bool = True) -> None:
    """The command: look at the data first, unless told not to, then train."""
    if int(os.environ.get("RANK", 0)) == 0:  # the other processes wait for it in ``train``
        refuse_overwriting(out, resume=resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0)
        check_backbone(config.model)
        if check:
            check_before_training(config)
    train(config, out=out, resume=resume)


def _farewell(stopped: TrainingInterrupted, run: Run | None) -> str:
    if run is None or not run.progress.step:
        return f"stopped by {stopped.signal} before the first step"
    return f"stopped by {stopped.signal}; saved at step {run.progress.step}: go on with --resume"


def _out_of_memory(config: Config, error: Exception) -> str:
    settings = config.train
    ways = [f"lower train.batch_size (now {settings.batch_size}; --train.accumulate 0 keeps the images per step)"]
    if not settings.activation_checkpointing:
        ways.append("--train.activation-checkpointing")
    if settings.precision == "fp32":
        ways.append("--train.precision bf16")
    ways += [
        f"lower data.long_side (now {config.data.long_side}) and data.short_side",
        f"lower model.roi_samples (now {config.model.roi_samples})",
    ]
    return f"out of GPU memory ({' '.join(str(error).split())[:120]}): {'; '.join(ways)}"
