"""Training: one set-up and one loop, read from top to bottom.

    cascade-rcnn train CONFIG --data DIR --out RUN [--resume]
    torchrun --nproc-per-node 8 -m cascade_rcnn train CONFIG ...

A pass is one batch through the network; ``accumulate`` passes make a step; an epoch is every image once (times
``data.repeat``). How long a run is stands in ``training/schedule.py``, what it saves in ``training/run_folder.py``.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cascade_rcnn import distributed
from cascade_rcnn.atomic_files import write_json
from cascade_rcnn.check.choices import Choice, advice, choose, keep_choices, measured
from cascade_rcnn.check.dataset import check_before_training
from cascade_rcnn.check.memory import Machine
from cascade_rcnn.config import Config, finetune_schedule
from cascade_rcnn.data.augment import Augmentation
from cascade_rcnn.data.dataset import DetectionDataset
from cascade_rcnn.data.formats.open import open_split
from cascade_rcnn.data.loader import Upload, train_loader
from cascade_rcnn.data.records import DataSplit
from cascade_rcnn.data.split_levels import with_range
from cascade_rcnn.errors import UserError
from cascade_rcnn.evaluation.evaluate_model import match_classes
from cascade_rcnn.messages import one_line
from cascade_rcnn.models.backbone import about_weights
from cascade_rcnn.models.build import build_model, check_backbone
from cascade_rcnn.models.cascade_rcnn import CascadeRCNN
from cascade_rcnn.models.ops.capabilities import has_bfloat16_units
from cascade_rcnn.recipes import load_config
from cascade_rcnn.training.callbacks import Callback, check_loggers
from cascade_rcnn.training.data import open_validation, training_dataset
from cascade_rcnn.training.init_weights import check_init, start_from
from cascade_rcnn.training.interrupts import Interrupts, StopNow, TrainingInterrupted, Watchdog
from cascade_rcnn.training.log import RunLog
from cascade_rcnn.training.look_back import LookBack
from cascade_rcnn.training.losses import LossWindow
from cascade_rcnn.training.machine_memory import machine_memory
from cascade_rcnn.training.optim import MovingAverage, Updater
from cascade_rcnn.training.random_state import get_generators, reproducible, seed_generators
from cascade_rcnn.training.run import Run
from cascade_rcnn.training.run_folder import claim_folder, find_resumable_state, read_state
from cascade_rcnn.training.schedule import Schedule, lr_factor, scaled_lr
from cascade_rcnn.training.spare_cores import SpareCores, spare_cores
from cascade_rcnn.training.validation_loss import ValidationLoss
from cascade_rcnn.training.weight_gradient import matrix_products_pay, use_matrix_products


def train(
    config: Config,
    *,
    out: Path,
    resume: bool = False,
    device: str | torch.device | None = None,
    callbacks: Sequence[Callback] = (),
) -> Path:
    """Train ``config`` into the run folder ``out`` and return its best checkpoint (the last, without evaluation).

    With ``resume`` a run that was interrupted goes on where it was saved, and an empty folder begins; without, a folder
    that holds a run is refused. Started by torchrun, all processes train together. ``callbacks`` hear of steps,
    evaluations and saves (:class:`cascade_rcnn.training.callbacks.Callback`).

    Raises:
        UserError: settings, data or files that cannot be used; losses that stay not finite; GPU memory that runs out.
        TrainingInterrupted: after SIGINT, SIGTERM or SIGHUP, when everything is saved (a SystemExit).
    """
    settings = config.train
    check_loggers(settings.loggers)
    with (
        distributed.start(device) as world,
        Interrupts() as interrupts,
        RunLog(out, active=world.is_main, callbacks=callbacks) as log,
        Watchdog(settings.stall_minutes, rank=world.rank) as watchdog,
        reproducible(settings.deterministic),
        spare_cores(world.device, processes=world.size, deterministic=settings.deterministic) as cores,
    ):
        run: Run | None = None
        try:
            with interrupts.at_once():
                run = set_up(config, out, world, log, resume=resume)
            while True:
                if run.schedule.evaluation_due(run.progress):
                    watchdog.pause()  # an evaluation takes as long as it takes
                    with interrupts.at_once(), log.paused():  # all is saved: a signal may break this off anywhere
                        evaluation = run.evaluate()
                    run.record_evaluation(evaluation)
                if run.schedule.finished(run.progress):
                    return run.finish()
                train_epoch(run, interrupts, watchdog, cores)
        except StopNow:
            if run is not None and world.size == 1:
                run.save()
            stopped = TrainingInterrupted(interrupts.pending or signal.SIGTERM)  # or another process was told to stop
            if run is not None:
                run.look_back.write(f"stopped by {stopped.signal}")
            log.say(_farewell(stopped, run))
            raise stopped from None
        except torch.OutOfMemoryError as error:
            raise UserError(_out_of_memory(config, error)) from error
        finally:
            if interrupts.pending:
                interrupts.end_children()  # before close(), which waits for them politely
            if run is not None:
                run.loader.close()


def set_up(config: Config, out: Path, world: distributed.World, log: RunLog, *, resume: bool) -> Run:
    """The data, the network, its optimizer; on top of them what an interrupted run has saved."""
    resuming = claim_folder(out, world, log, resume=resume or world.restarts > 0)

    data = open_split(config.data.root, config.data.train, orientation=config.data.orientation)
    images, line = with_range(config.data, data)
    if line:
        log.say(line)
    config = replace(config, data=images)
    config = _choose(config, data, world, log, begun=out / "config.json" if resuming else None)
    config = finetune_schedule(config, len(data))
    settings = config.train
    validation = open_validation(config, log) if settings.evaluate_every else None
    class_map = match_classes(data.class_names, validation, out) if validation else None
    dataset = training_dataset(config, data)
    loader = train_loader(
        dataset, batch_size=settings.batch_size, rank=world.rank, world_size=world.size, seed=settings.seed
    )
    loader.set_epoch(0)
    schedule = Schedule.of(settings, passes_per_epoch=len(loader), world_size=world.size)

    model = build_network(config, data.class_names, world, log, resuming=resuming)
    rate, about_rate = scaled_lr(settings, schedule.images_per_step, passes=schedule.passes_per_step)
    updater = Updater(model, settings, lr=rate, device=world.device)
    seed_generators(settings.seed, world.rank, 0)
    run = Run(
        config=config,
        out=out,
        world=world,
        log=log,
        data=data,
        validation=validation,
        class_map=class_map,
        loader=loader,
        schedule=schedule,
        model=model,
        updater=updater,
        average=MovingAverage(model, settings.ema) if settings.ema else None,
        losses=LossWindow(max_bad=settings.max_bad_losses, scaled=updater.scales_loss),
        upload=Upload(world.device),
        vote=distributed.Vote(world.device),
        look_back=LookBack(out, active=world.is_main and settings.summary, say=log.say),
        validation_loss=_validation_loss(config, validation, class_map, world),
        generators=get_generators(world.device),
    )
    saved = read_state(out) if resuming and world.is_main else None  # only rank 0 needs the folder
    if (state := distributed.broadcast(saved)) is not None:
        run.restore(state)

    if settings.compile:
        _compile(model, dataset)
    run.wrapped = distributed.wrap(model, world, norm=config.model.norm)
    if world.is_main:
        write_json(out / "config.json", config.to_dict())
    for line in run.description(about_rate, resumed=resuming):
        log.say(line)
    log.begin(run.progress.step, schedule.total_steps, evaluated=run.progress.evaluated, config=config)
    run.look_back.begin(run.progress.step, schedule.total_steps, world=world, train=data, validation=validation)
    return run


def _compile(model: CascadeRCNN, dataset: DetectionDataset) -> None:
    from cascade_rcnn.inference.compiled import compile_for_training

    compile_for_training(model, fixed_sizes=bool(dataset.config.pad_buckets))


def explain(config: Config) -> list[str]:
    """What a training with ``config`` chooses from its data on this machine and why, a line each. Trains nothing."""
    config, choices, data = _chosen(config)
    if choices:
        lines = [*measured(data), *(choice.line() for choice in choices)]
    else:
        lines = ["nothing is chosen: --automatic none, or a recipe other than finetune, finetune_masks, finetune_small"]
    if not config.train.epochs:
        epochs = finetune_schedule(config, len(data)).train.epochs
        lines.append(Choice("train.epochs", epochs, f"from the {len(data):,} training images").line())
    return [*lines, *advice(config, _this_machine())]


def _choose(config: Config, data: DataSplit, world: distributed.World, log: RunLog, *, begun: Path | None) -> Config:
    """Chooses what is left to the data; a resumed run keeps what stands in the settings that it began with."""
    if begun is not None and begun.is_file():
        config = keep_choices(config, load_config(begun))
    machine = _machine(world.device)
    config, choices = choose(config, data, machine=machine)
    for line in [*(choice.line() for choice in choices), *(advice(config, machine) if choices else [])]:
        log.say(line)
    return distributed.broadcast(config)  # one choice, also where one GPU has less memory


def _chosen(config: Config) -> tuple[Config, list[Choice], DataSplit]:
    data = open_split(config.data.root, config.data.train, orientation=config.data.orientation)
    return *choose(config, data, machine=_this_machine()), data


def _this_machine() -> Machine:
    return _machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _machine(device: torch.device) -> Machine:
    if device.type != "cuda":
        return Machine(memory=machine_memory(), bfloat16=device.type == "cpu" and has_bfloat16_units())
    return Machine(gpu_memory=torch.cuda.get_device_properties(device).total_memory / 1e9)


def _validation_loss(
    config: Config, split: DataSplit | None, class_map: list[int] | None, world: distributed.World
) -> ValidationLoss | None:
    if split is None or class_map is None or not config.train.val_loss_images:
        return None
    return ValidationLoss(config, split, class_map, world)


def build_network(
    config: Config, class_names: Sequence[str], world: distributed.World, log: RunLog, *, resuming: bool
) -> CascadeRCNN:
    """The network on its device, with the weights that a new run starts from."""
    settings = config.train
    torch.manual_seed(settings.seed)  # the same first weights in every process
    fresh = not resuming and not settings.init
    model = build_model(config.model, len(class_names), pretrained=fresh).to(world.device)
    if fresh and config.model.pretrained and not config.model.backbone_weights:
        log.say(about_weights(config.model.backbone))
    if settings.init and not resuming:
        log.say(start_from(model, Path(settings.init), class_names, config.model))
    if config.model.norm == "sync":
        model = distributed.with_synchronised_norm(model, world)
    model.set_activation_checkpointing(settings.activation_checkpointing)
    if matrix_products_pay(world.device):
        use_matrix_products(model)
    return model


def train_epoch(run: Run, interrupts: Interrupts, watchdog: Watchdog, cores: SpareCores) -> None:
    """What is left of an epoch; saves at its end, every ``save_every`` steps, and when a signal asks to stop."""
    settings, world, log, progress = run.config.train, run.world, run.log, run.progress
    # one of several processes may not leave by itself while it waits for data: they agree after the step
    breakable = interrupts.at_once if world.size == 1 else nullcontext
    with breakable(), log.waiting():
        watchdog.now(f"step {progress.step}, starting to load data")
        batches = run.batches()
        interrupts.keep_worker_deaths_quiet()
    run.model.train()
    for passes in run.schedule.rest_of_epoch(progress):
        for number in range(passes):
            watchdog.now(f"step {progress.step}, waiting for data")
            with breakable(), log.waiting():
                images, targets = next(batches)
            watchdog.now(f"step {progress.step}, images {', '.join(images.paths)}")
            log.batch(images, targets, run.data.class_names)
            run.report_bad_images(images)
            with distributed.without_sync(run.wrapped, active=number + 1 < passes):
                with run.updater.forward():
                    losses: dict[str, Tensor] = run.wrapped(*run.upload(images, targets))
                run.updater.backward(torch.stack(list(losses.values())).sum() / passes)
            run.losses.add_pass(losses, images.paths)

        factor = lr_factor(settings, progress.step, steps_per_epoch=run.schedule.steps_per_epoch)
        norm = run.updater.step(factor)
        if run.average is not None:
            run.average.update()
        messages = run.losses.end_step(progress.step, norm) + cores.look()
        run.advance(passes)
        log.tick(progress.step, passes * settings.batch_size)

        ended = progress.passes == 0 or run.schedule.finished(progress)
        if ended or progress.step % settings.log_every == 0:
            values, more = run.losses.read()
            messages += more
            epochs, rate = run.schedule.epochs_done(progress), run.updater.lr * factor
            log.step(progress.step, epochs, {**values, "lr": rate}, device=world.device)
        for message in messages:
            log.say_from_any_rank(message)
        stop = run.vote.cast(bool(interrupts.pending))
        if stop or ended or (settings.save_every and progress.step % settings.save_every == 0):
            watchdog.now(f"step {progress.step}, saving")
            run.save()
        if stop:
            raise StopNow


def run_train(
    config: Config, *, out: Path, resume: bool = False, check: bool = True, only_explain: bool = False
) -> None:
    """The command: look at the data first, unless told not to, then train; or only print what it would choose."""
    if only_explain:
        print("\n".join(explain(config)))
        return
    if int(os.environ.get("RANK", 0)) == 0:  # the other processes wait for it in ``train``
        resume_here = resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        resuming = find_resumable_state(out, resume=resume_here)
        if config.data.augment:
            Augmentation(config.data.augment)  # a mistake in the file is told before the data are looked at
        check_backbone(config.model)
        if config.train.init and not resuming:
            check_init(config.train.init)
        if check:
            check_before_training(config if config.automatic is None else _chosen(config)[0])
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
    return f"out of GPU memory ({one_line(error)[:120]}): {'; '.join(ways)}"
