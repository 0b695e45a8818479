"""A run: all that training holds, how it is saved, and how it is taken up again.

``state/training.safetensors`` is everything of one step in one file, so that it is whole or not there: weights,
optimizer, loss scale, moving average, the random generators of every process, and how far the run has come.
``last.safetensors`` (the same weights, for use) is written after it, ``best.safetensors`` after an evaluation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cascade_rcnn import distributed
from cascade_rcnn.atomic_files import write_json
from cascade_rcnn.checkpoint import BEST, LAST, STATE, load_training, save_checkpoint, save_training
from cascade_rcnn.config import Config, finetune_schedule
from cascade_rcnn.data.dataset import DetectionDataset, read_record
from cascade_rcnn.data.formats.open import open_split
from cascade_rcnn.data.loader import Upload, train_loader
from cascade_rcnn.data.records import DataSplit, ImageRecord
from cascade_rcnn.data.split_levels import with_range
from cascade_rcnn.drawing.annotations import draw_batch, draw_detections, draw_record, side_by_side
from cascade_rcnn.errors import CheckpointError, ConfigError, DataError, UserError
from cascade_rcnn.evaluation.evaluate_model import evaluate_model, match_classes
from cascade_rcnn.inference.detections import Detections
from cascade_rcnn.models.build import build_model
from cascade_rcnn.structures import ImageBatch, Targets
from cascade_rcnn.training.init_weights import start_from
from cascade_rcnn.training.log import RunLog
from cascade_rcnn.training.optim import MovingAverage, Updater, passes_per_step, scaled_lr, warmup_steps
from cascade_rcnn.training.random_state import (
    as_tensors,
    from_tensors,
    get_generators,
    seed_generators,
    set_generators,
    undisturbed_generators,
)

_DRAWN_BATCHES, _DRAWN_PREDICTIONS, _DRAWN_SCORE = 2, 4, 0.3
_BEST_BY = ("segm/AP", "bbox/AP")


@dataclass
class Progress:
    """How far a run has come. Images are counted as well as passes, so that another number of processes can go on."""

    epoch: int = 0  # epochs completed
    passes: int = 0  # passes of each process in the epoch under way
    images: int = 0  # the same in images of all processes
    step: int = 0  # steps taken in all
    evaluated: int = 0  # step of the last evaluation
    best: float | None = None
    best_step: int = 0
    not_better: int = 0  # evaluations since the best one


class Run:
    """Model, data, optimizer and progress of one training."""

    def __init__(self, config: Config, out: Path, world: distributed.World, log: RunLog, *, resume: bool) -> None:
        self.out, self.world, self.log = out, world, log
        resuming = _claim_folder(out, world, log, resume=resume or world.restarts > 0)
        self.data, self.validation, config = _open_splits(config, log)
        self.config = config = finetune_schedule(config, len(self.data))
        settings = config.train
        self._class_map = match_classes(self.data.class_names, self.validation, out) if self.validation else None
        images = config.data
        if settings.compile and images.pad_buckets is None:
            images = replace(images, pad_buckets=True)
        dataset = DetectionDataset(
            self.data, images, training=True, masks=_wants_masks(config, self.data), semantics=config.model.semantics
        )

        self.passes_per_step = passes_per_step(settings, world.size)
        self._images_per_pass = settings.batch_size * world.size
        self.loader = train_loader(
            dataset, batch_size=settings.batch_size, rank=world.rank, world_size=world.size, seed=settings.seed
        )
        self.loader.set_epoch(0)
        self.passes_per_epoch = len(self.loader)
        self.steps_per_epoch = -(-self.passes_per_epoch // self.passes_per_step)
        self.total_steps = min(settings.epochs * self.steps_per_epoch, settings.max_steps or 2**62)

        torch.manual_seed(settings.seed)  # the same first weights in every process
        fresh = not resuming and not settings.init
        self.model = build_model(config.model, len(self.data.class_names), pretrained=fresh).to(world.device)
        if settings.init and not resuming:
            log.say(start_from(self.model, Path(settings.init), self.data.class_names))
        if config.model.norm == "sync":
            self.model = distributed.with_synchronised_norm(self.model, world)
        self.model.set_activation_checkpointing(settings.activation_checkpointing)
        rate, about_rate = scaled_lr(
            settings, self._images_per_pass * self.passes_per_step, passes=self.passes_per_step
        )
        self.updater = Updater(self.model, settings, lr=rate, device=world.device)
        self.average = MovingAverage(self.model, settings.ema) if settings.ema else None
        self.vote = distributed.Vote(world.device)
        self.progress = Progress()
        self.bad_images: set[str] = set()
        seed_generators(settings.seed, world.rank, 0)
        self._generators = get_generators(world.device)
        self._saved = Progress()
        if resuming:
            self._restore()
        self._drawn = self.progress.step and _DRAWN_BATCHES
        if settings.compile:
            from cascade_rcnn.inference.compiled import compile_for_training

            compile_for_training(self.model, fixed_sizes=bool(images.pad_buckets))
        self.upload = Upload(world.device)
        self.wrapped = distributed.wrap(self.model, world, norm=config.model.norm)
        if world.is_main:
            write_json(out / "config.json", config.to_dict())
        self._announce(about_rate, resuming)
        log.begin(self.progress.step, self.total_steps, evaluated=self.progress.evaluated)

    # Where the run stands

    def finished(self) -> bool:
        """The schedule is through, or the last evaluations were no better."""
        patience = self.config.train.patience
        return self._schedule_done() or bool(patience and self.progress.not_better >= patience)

    def evaluation_due(self) -> bool:
        """An epoch has ended at which to evaluate, or the schedule has, and it has not been evaluated yet."""
        progress, every = self.progress, self.config.train.evaluate_every
        if self.validation is None or progress.step == progress.evaluated:
            return False
        return self._schedule_done() or (progress.passes == 0 and progress.epoch % every == 0)

    def _schedule_done(self) -> bool:
        return self.progress.epoch >= self.config.train.epochs or self.progress.step >= self.total_steps

    def epochs_done(self) -> float:
        return self.progress.epoch + self.progress.passes / self.passes_per_epoch

    def rest_of_epoch(self) -> list[int]:
        """The number of passes in each step that is left in this epoch; the last step of an epoch may have fewer."""
        left = self.passes_per_epoch - self.progress.passes
        full, rest = divmod(left, self.passes_per_step)
        return ([self.passes_per_step] * full + [rest] * bool(rest))[: self.total_steps - self.progress.step]

    def batches(self) -> Iterator[tuple[ImageBatch, Targets]]:
        """The batches of this epoch from where the run stands.

        PyTorch draws a seed for its workers when they start; ours do not need it, and a resumed run, which starts them
        once more, must see the same random numbers as one that was not interrupted.
        """
        self.loader.set_epoch(self.progress.epoch, self.progress.passes)
        with undisturbed_generators(self.world.device):
            batches = iter(self.loader)
            first = next(batches)
        return itertools.chain([first], batches)

    def advance(self, passes: int) -> None:
        """A step of so many passes has been taken."""
        progress = self.progress
        progress.step += 1
        progress.passes += passes
        progress.images = progress.passes * self._images_per_pass
        if progress.passes == self.passes_per_epoch:
            progress.epoch, progress.passes, progress.images = progress.epoch + 1, 0, 0
        self._generators = get_generators(self.world.device)

    # What is said and drawn

    def say_anywhere(self, text: str) -> None:
        """A line from any process: rank 0's log, or this process's own output with its number."""
        if self.world.is_main:
            self.log.say(text)
        else:
            print(f"rank {self.world.rank}: {text}", flush=True)

    def look_at(self, images: ImageBatch, targets: Targets) -> None:
        """Draw the first batches; report images that could not be read, once each, and stop when they are too many."""
        if self._drawn < _DRAWN_BATCHES and self.world.is_main:
            for number, picture in enumerate(draw_batch(images, targets, self.data.class_names), start=1):
                self.log.picture(f"train_batch{self._drawn + 1}_{number}", picture)
            self._drawn += 1
        for path, reason in images.bad:
            if path not in self.bad_images:
                self.bad_images.add(path)
                self.say_anywhere(f"cannot be used, another image in its place: {reason}")
        limit = self.config.train.max_bad_images
        if len(self.bad_images) > limit:
            path, reason = images.bad[-1]
            raise DataError(
                f"more than {limit} images could not be used, the last one {reason}; look at the data with "
                "'cascade-rcnn check', or raise train.max_bad_images"
            )

    def _announce(self, about_rate: str, resuming: bool) -> None:
        settings, progress, log = self.config.train, self.progress, self.log
        parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        where = f"{self.world.size} processes on {self.world.device.type}" if self.world.size > 1 else self.world.device
        validation = f", {len(self.validation)} to evaluate on" if self.validation else ""
        log.say(f"{len(self.data)} images to learn from{validation}; classes: {_shortened(self.data.class_names)}")
        whole = settings.epochs * self.steps_per_epoch
        length = f"{settings.epochs} epoch{'s' * (settings.epochs != 1)}, {whole} steps"
        if settings.schedule == "multistep" and settings.milestones:
            length += f" (learning rate / 10 after epoch {' and '.join(map(str, settings.milestones))})"
        length += f", of which train.max_steps takes {self.total_steps}" if self.total_steps < whole else ""
        log.say(f"{parameters / 1e6:.1f} million trainable parameters; {length}; results in {self.out}")
        log.say(
            f"{where}: {self.updater.precision}, channels-last; "
            f"{'compiled' if settings.compile else 'not compiled (--train.compile)'}"
        )
        log.say(about_rate)
        if (warmup := warmup_steps(settings, self.steps_per_epoch)) < settings.warmup_steps:
            log.say(f"train.warmup_steps {settings.warmup_steps} is over a third of this training: cut to {warmup}")
        if self.config.model.norm.startswith("frozen") and not (self.config.model.pretrained or settings.init):
            log.say(
                "the network begins with random weights, and its norms are frozen as if it had been trained: add "
                "--model.norm batch --model.frozen-stages -1"
            )
        if resuming:
            log.say(f"goes on at step {progress.step}, epoch {self.epochs_done():.2f}")

    # Evaluation

    def evaluate(self) -> dict[str, float | None]:
        """Metrics on the validation split, with the averaged weights where there are some; draws a few predictions."""
        assert self.validation is not None
        self.model.eval()
        step = -(-max(1, len(self.validation) // _DRAWN_PREDICTIONS) // self.world.size) * self.world.size
        shown = {record.image_id: record for record in self.validation.records[::step][:_DRAWN_PREDICTIONS]}  # rank 0's

        def look(found: Detections) -> None:
            if self.world.is_main and found.image_id is not None and found.image_id in shown:
                self._draw_prediction(list(shown).index(found.image_id) + 1, shown[found.image_id], found)

        # what is compiled is compiled for training: an evaluation would wait for code of its own, for each size
        eager = torch.compiler.set_stance("force_eager") if self.config.train.compile else nullcontext()
        # the generators are put back, so that training does not depend on how often it is evaluated
        averaged = self.average.applied() if self.average else nullcontext()
        with eager, undisturbed_generators(self.world.device), averaged:
            return evaluate_model(self.model, self.config, self.validation, class_map=self._class_map, look=look)

    def _draw_prediction(self, number: int, record: ImageRecord, found: Detections) -> None:
        assert self.validation is not None
        image = read_record(record, self.validation.format, self.config.data)
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        truth = draw_record(record, self.validation.class_names, image=picture)
        drawn = draw_detections(image, found, score_threshold=_DRAWN_SCORE)
        self.log.picture(f"validation_{number}", side_by_side(truth, drawn))

    def judge(self, metrics: dict[str, float | None]) -> None:
        """Log an evaluation, keep the weights if they are the best so far, and save that it is done."""
        progress = self.progress
        progress.evaluated = progress.step
        name, value = next(((key, metrics[key]) for key in _BEST_BY if metrics.get(key) is not None), ("", None))
        better = value is not None and (progress.best is None or value > progress.best)
        progress.not_better = 0 if better else progress.not_better + 1
        self.log.metrics(progress.step, progress.epoch, metrics)
        shown = "  ".join(
            f"{key} {metrics[key]:.4f}"
            for key in ("bbox/AP", "bbox/AP50", "bbox/AP75", "segm/AP")
            if metrics.get(key) is not None
        )
        if better:
            progress.best, progress.best_step = value, progress.step
            if self.world.is_main:
                self._save_weights(BEST, metrics)
        note = f"best so far by {name}" if better else f"best was {progress.best or 0:.4f} at step {progress.best_step}"
        self.log.say(f"evaluated after step {progress.step}:  {shown or 'nothing to measure'}  ({note})")
        self.save()

    # Saving and taking up again

    def save(self) -> None:
        """Write the state and last.safetensors, unless this very state is saved; all processes call it together."""
        if self._saved == self.progress:
            return
        generators = distributed.gather(as_tensors(self._generators))
        if self.world.is_main:
            tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
            tensors |= self.updater.tensors() | (self.average.tensors() if self.average else {})
            tensors |= {
                f"rng.{rank}.{name}": value for rank, state in enumerate(generators) for name, value in state.items()
            }
            info = {
                "progress": asdict(self.progress),
                "config": self.config.to_dict(),
                "world_size": self.world.size,
                "class_names": list(self.data.class_names),
                "bad_images": sorted(self.bad_images),
                "averaged": self.average.updates if self.average else 0,
            }
            with self.log.paused():
                save_training(self.out, tensors, info)
                self._save_weights(LAST)
        self._saved = Progress(**asdict(self.progress))

    def finish(self) -> Path:
        """The run's result: the best checkpoint, or the last where nothing was evaluated."""
        if self.world.is_main and not (self._saved == self.progress and (self.out / LAST).is_file()):
            self._save_weights(LAST)
        distributed.barrier()  # the files are there for whoever is given the result
        best = self.out / BEST
        result = best if self.progress.best is not None and best.is_file() else self.out / LAST
        progress = self.progress
        reached = "" if progress.best is None else f" ({progress.best:.4f} after step {progress.best_step})"
        self.log.say(f"done: {result}{reached}; try it: cascade-rcnn predict {result} IMAGE")
        return result

    def _save_weights(self, name: str, metrics: dict[str, float | None] | None = None) -> None:
        averaged = (
            {key.removeprefix("ema."): value for key, value in self.average.tensors().items()} if self.average else {}
        )
        extra: dict[str, Any] = {"step": self.progress.step, "epoch": self.progress.epoch}
        if metrics is not None:
            extra["metrics"] = metrics
        save_checkpoint(
            self.out / name,
            {**self.model.state_dict(), **averaged},
            config=self.config,
            class_names=self.data.class_names,
            category_ids=self.data.category_ids,
            extra=extra,
        )

    def _restore(self) -> None:
        """Take up the saved state: rank 0 reads it, so that only its machine needs the folder."""
        tensors, info = distributed.broadcast(load_training(self.out) if self.world.is_main else ({}, {}))
        if list(info["class_names"]) != list(self.data.class_names):
            raise UserError(
                f"{self.out} was trained on other classes: {_shortened(info['class_names'])}; the data "
                f"have {_shortened(self.data.class_names)}; give the run's own data, or begin anew "
                "with --out"
            )
        weights = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
        try:
            self.model.load_state_dict(weights)
        except RuntimeError as error:
            raise CheckpointError(
                f"{self.out / STATE}: the weights do not fit this configuration "
                f"({' '.join(str(error).split())[:150]}); go on with the run's own: "
                f"cascade-rcnn train {self.out} --resume"
            ) from error
        self.updater.restore(tensors)
        if self.average is not None:
            self.average.restore(tensors, updates=info["averaged"])
        self.bad_images = set(info["bad_images"])
        self._place(Progress(**info["progress"]))
        same_world = info["world_size"] == self.world.size
        if same_world:
            prefix = f"rng.{self.world.rank}."
            set_generators(
                from_tensors(
                    {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
                ),
                self.world.device,
            )
        else:
            seed_generators(self.config.train.seed, self.world.rank, self.progress.step)
            self.log.say(
                f"saved by {info['world_size']} processes, goes on with {self.world.size}: the epoch goes on "
                "after the images seen so far, with other random numbers"
            )
        self._generators = get_generators(self.world.device)
        self._saved = Progress(**asdict(self.progress)) if same_world else Progress()

    def _place(self, saved: Progress) -> None:
        """Find the place of ``saved`` among this run's steps; the same place if nothing has changed."""
        whole_steps = saved.images // (self._images_per_pass * self.passes_per_step)
        passes = min(whole_steps * self.passes_per_step, self.passes_per_epoch - 1)
        step = saved.epoch * self.steps_per_epoch + passes // self.passes_per_step
        evaluated = step if saved.evaluated == saved.step else min(saved.evaluated, max(step - 1, 0))
        self.progress = Progress(
            saved.epoch,
            passes,
            passes * self._images_per_pass,
            step,
            evaluated,
            saved.best,
            saved.best_step,
            saved.not_better,
        )


def refuse_overwriting(out: Path, *, resume: bool) -> bool:
    """Whether the run folder ``out`` holds a state to go on from.

    Raises ConfigError where it holds a run and ``resume`` was not asked for, or where its state is gone.
    """
    found = (out / STATE).is_file()
    if not resume and (found or any((out / name).exists() for name in (LAST, BEST, "log.jsonl"))):
        raise ConfigError(
            f"{out}: holds a run already; go on with it with --resume, or choose another folder with --out"
        )
    if not found and (out / LAST).exists():
        raise ConfigError(f"{out}: its {STATE} is gone, so it cannot go on; begin anew in another folder with --out")
    return found


def _open_splits(config: Config, log: RunLog) -> tuple[DataSplit, DataSplit | None, Config]:
    """The splits to learn from and to evaluate on, and the configuration with the range of their deep pictures."""
    data = config.data
    training = open_split(data.root, data.train, orientation=data.orientation)
    validation = open_split(data.root, data.val, orientation=data.orientation) if config.train.evaluate_every else None
    data, line = with_range(data, training)
    if line:
        log.say(line)
    return training, validation, replace(config, data=data)


def _claim_folder(out: Path, world: distributed.World, log: RunLog, *, resume: bool) -> bool:
    """``refuse_overwriting`` by rank 0 for all, as only its machine needs the folder."""
    problem, found = "", False
    if world.is_main:
        try:
            found = refuse_overwriting(out, resume=resume)
        except ConfigError as error:
            problem = str(error)
    problem, found = distributed.broadcast((problem, found))
    if problem:
        raise ConfigError(problem)
    if resume and not found:
        log.say(f"nothing is saved in {out} yet: the run begins")
    return found


def _wants_masks(config: Config, data: DataSplit) -> bool:
    if config.model.masks != "none" and not data.has_masks:
        raise DataError(
            f"{data.root}: the recipe has mask heads, split {data.name!r} has no masks; use a box recipe "
            "such as cascade_rcnn_r50_fpn_1x_coco, or --model.masks none"
        )
    return config.model.masks != "none"


def _shortened(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names[:8]) + (f", ... ({len(names)})" if len(names) > 8 else "")
