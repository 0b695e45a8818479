"""A run: the parts of one training, and how it advances, is evaluated, saved and resumed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cascade_rcnn import distributed
from cascade_rcnn.checkpoint import BEST, LAST, STATE, save_checkpoint
from cascade_rcnn.config import Config
from cascade_rcnn.data.balance import about_repeats
from cascade_rcnn.data.loader import Loader, Upload
from cascade_rcnn.data.records import DataSplit
from cascade_rcnn.errors import CheckpointError, DataError, UserError
from cascade_rcnn.evaluation.evaluate_model import detect_split, evaluate_results
from cascade_rcnn.evaluation.metrics import Metrics
from cascade_rcnn.inference.detections import Detections
from cascade_rcnn.messages import few_names, one_line
from cascade_rcnn.models.cascade_rcnn import CascadeRCNN
from cascade_rcnn.structures import ImageBatch, Targets
from cascade_rcnn.training.log import RunLog
from cascade_rcnn.training.look_back import LookBack
from cascade_rcnn.training.losses import LossWindow
from cascade_rcnn.training.optim import MovingAverage, Updater
from cascade_rcnn.training.random_state import (
    as_tensors,
    from_tensors,
    get_generators,
    seed_generators,
    set_generators,
    undisturbed_generators,
)
from cascade_rcnn.training.run_folder import SavedState
from cascade_rcnn.training.schedule import Progress, Schedule, warmup_steps
from cascade_rcnn.training.validation_loss import ValidationLoss

_DRAWN_PREDICTIONS = 4
_BEST_BY = ("segm/AP", "bbox/AP")


@dataclass(frozen=True)
class Evaluation:
    """What the validation split says of the weights."""

    metrics: Metrics
    losses: Metrics  # as log.jsonl names those of training; empty with train.val_loss_images 0
    curves: dict[str, Any] | None  # of the first process: what curves.json gets


@dataclass
class Run:
    """The parts of one training; ``train.set_up`` puts them together."""

    config: Config
    out: Path
    world: distributed.World
    log: RunLog
    data: DataSplit
    validation: DataSplit | None
    class_map: list[int] | None  # the validation split's label of each label of the model
    loader: Loader
    schedule: Schedule
    model: CascadeRCNN
    updater: Updater
    average: MovingAverage | None
    losses: LossWindow
    upload: Upload
    vote: distributed.Vote
    look_back: LookBack
    progress: Progress = field(default_factory=Progress)
    bad_images: set[str] = field(default_factory=set)
    validation_loss: ValidationLoss | None = None
    generators: dict[str, Any] = field(default_factory=dict)  # their states after the last step
    saved: Progress = field(default_factory=Progress)  # the newest state on disk, or the beginning
    wrapped: nn.Module = field(init=False)  # the model; of several processes, so that its backward averages gradients

    def description(self, about_rate: str, *, resumed: bool) -> Iterator[str]:
        """Lines about the run for the person who starts it."""
        settings, schedule, world = self.config.train, self.schedule, self.world
        validation = f", {len(self.validation)} to evaluate on" if self.validation else ""
        yield f"{len(self.data)} images to learn from{validation}; classes: {few_names(self.data.class_names)}"
        if threshold := self.config.data.repeat_threshold:
            yield about_repeats(self.loader.dataset.packed, self.data.class_names, threshold)
        parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        epochs = "1 epoch" if settings.epochs == 1 else f"{settings.epochs} epochs"
        length = f"{epochs}, {schedule.all_epochs} steps"
        if settings.schedule == "multistep" and settings.milestones:
            length += f" (learning rate / 10 after epoch {' and '.join(map(str, settings.milestones))})"
        if schedule.total_steps < schedule.all_epochs:
            length += f", of which train.max_steps takes {schedule.total_steps}"
        yield f"{parameters / 1e6:.1f} million trainable parameters; {length}; results in {self.out}"
        where = f"{world.size} processes on {world.device.type}" if world.size > 1 else world.device
        compiled = "compiled" if settings.compile else "not compiled (--train.compile)"
        yield f"{where}: {self.updater.precision}, channels-last; {compiled}"
        yield about_rate
        if (warmup := warmup_steps(settings, schedule.steps_per_epoch)) < settings.warmup_steps:
            yield f"train.warmup_steps {settings.warmup_steps} is over a third of this training: cut to {warmup}"
        if self.config.model.norm.startswith("frozen") and not (self.config.model.pretrained or settings.init):
            yield (
                "the network begins with random weights, and its norms are frozen as if it had been trained: add "
                "--model.norm batch --model.frozen-stages -1"
            )
        if resumed:
            yield f"goes on at step {self.progress.step}, epoch {schedule.epochs_done(self.progress):.2f}"

    def batches(self) -> Iterator[tuple[ImageBatch, Targets]]:
        """The remaining batches of this epoch.

        PyTorch draws a seed for its workers when they start; ours do not need it, and a resumed run, which starts them
        once more, must see the same random numbers as one that was not interrupted.
        """
        self.loader.set_epoch(self.progress.epoch, self.progress.passes)
        with undisturbed_generators(self.world.device):
            batches = iter(self.loader)
            first = next(batches)
        return itertools.chain([first], batches)

    def advance(self, passes: int) -> None:
        """Count a step of so many passes."""
        self.schedule.advance(self.progress, passes)
        self.generators = get_generators(self.world.device)

    def report_bad_images(self, images: ImageBatch) -> None:
        """Name the images of a batch that could not be read, once each; DataError when they are too many."""
        for path, reason in images.bad:
            if path not in self.bad_images:
                self.bad_images.add(path)
                self.log.say_from_any_rank(f"cannot be used, another image in its place: {reason}")
        limit = self.config.train.max_bad_images
        if len(self.bad_images) > limit:
            path, reason = images.bad[-1]
            raise DataError(
                f"more than {limit} images could not be used, the last one {reason}; look at the data with "
                "'cascade-rcnn check', or raise train.max_bad_images"
            )

    # Evaluation

    def evaluate(self) -> Evaluation:
        """What the validation split says of the averaged weights, where there are some; draws a few predictions."""
        assert self.validation is not None
        self.model.eval()
        split = self.validation
        records = split.records
        apart = max(1, len(records) // _DRAWN_PREDICTIONS)
        apart = math.ceil(apart / self.world.size) * self.world.size  # all of them rank 0's
        shown = {record.image_id: record for record in records[::apart][:_DRAWN_PREDICTIONS]}

        def look(found: Detections) -> None:
            if self.world.is_main and found.image_id is not None and found.image_id in shown:
                number = list(shown).index(found.image_id) + 1
                self.log.prediction(number, shown[found.image_id], found, split, data=self.config.data)

        # what is compiled is compiled for training: an evaluation would wait for code of its own, for each size
        eager = torch.compiler.set_stance("force_eager") if self.config.train.compile else nullcontext()
        # the generators are put back, so that training does not depend on how often it is evaluated
        averaged = self.average.applied() if self.average else nullcontext()
        with eager, undisturbed_generators(self.world.device), averaged:
            results, seen = detect_split(self.model, self.config, split, class_map=self.class_map, look=look)
            metrics = evaluate_results(results, self.config, seen) if self.world.is_main else {}
            curves = self.look_back.curves(results, seen, self.config)
            metrics = distributed.broadcast(metrics)
            losses = self.validation_loss.measure(self.model, self.updater.forward()) if self.validation_loss else {}
        finite = {name: value if math.isfinite(value) else None for name, value in losses.items()}
        return Evaluation(metrics, finite, curves)

    def record_evaluation(self, evaluation: Evaluation) -> None:
        """Log an evaluation, keep the weights if they are the best so far, and save that it is done."""
        progress, metrics, loss = self.progress, evaluation.metrics, evaluation.losses.get("loss")
        progress.evaluated = progress.step
        name, value = next(((key, metrics[key]) for key in _BEST_BY if metrics.get(key) is not None), ("", None))
        better = value is not None and (progress.best is None or value > progress.best)
        progress.not_better = 0 if better else progress.not_better + 1
        self.log.metrics(progress.step, progress.epoch, metrics | evaluation.losses)
        shown = "  ".join(
            f"{key} {metrics[key]:.4f}"
            for key in ("bbox/AP", "bbox/AP50", "bbox/AP75", "segm/AP")
            if metrics.get(key) is not None
        )
        shown = (shown or "nothing to measure") + ("" if loss is None else f"  loss {loss:.4f}")
        if better:
            progress.best, progress.best_step = value, progress.step
            if self.world.is_main:
                self._save_weights(BEST, metrics)
                if evaluation.curves is not None:
                    self.look_back.keep_curves(progress.step, evaluation.curves)
        note = f"best so far by {name}" if better else f"best was {progress.best or 0:.4f} at step {progress.best_step}"
        self.log.say(f"evaluated after step {progress.step}:  {shown}  ({note})")
        self.save()
        if not self.schedule.finished(progress):
            with self.log.paused():
                self.look_back.write()

    # Saving and resuming

    def save(self) -> None:
        """Write the state and last.safetensors, unless this very state is saved; all processes call it together."""
        if self.saved == self.progress:
            return
        generators = distributed.gather(as_tensors(self.generators))
        bad_losses = self.losses.bad_in_a_row()
        if self.world.is_main:
            state = SavedState(
                weights=self.model.state_dict(),
                optimizer=self.updater.tensors(),
                average=self.average.tensors() if self.average else {},
                averaged=self.average.updates if self.average else 0,
                generators=generators,
                progress=self.progress,
                config=self.config.to_dict(),
                class_names=list(self.data.class_names),
                bad_images=sorted(self.bad_images),
                bad_losses=bad_losses,
            )
            with self.log.paused():
                state.write(self.out)
                self._save_weights(LAST)
            self.log.saved(self.progress.step)
        self.saved = replace(self.progress)

    def restore(self, state: SavedState) -> None:
        """Continue from a saved state. Raises UserError where it belongs to other classes or another network."""
        if state.class_names != list(self.data.class_names):
            raise UserError(
                f"{self.out} was trained on other classes: {few_names(state.class_names)}; the data "
                f"have {few_names(self.data.class_names)}; give the run's own data, or start again "
                "with --out"
            )
        try:
            self.model.load_state_dict(state.weights)
        except RuntimeError as error:
            raise CheckpointError(
                f"{self.out / STATE}: the weights do not fit this configuration "
                f"({one_line(error)[:150]}); go on with the run's own: "
                f"cascade-rcnn train {self.out} --resume"
            ) from error
        self.updater.restore(state.optimizer)
        if self.average is not None:
            self.average.restore(state.average, updates=state.averaged)
        self.bad_images = set(state.bad_images)
        self.losses.restore(state.bad_losses, steps=state.progress.step)
        self.progress = self.schedule.resumed(state.progress)
        device, ranks = self.world.device, len(state.generators)
        if ranks == self.world.size:
            set_generators(from_tensors(state.generators[self.world.rank]), device)
            self.saved = replace(self.progress)
        else:
            seed_generators(self.config.train.seed, self.world.rank, self.progress.step)
            self.log.say(
                f"saved by {ranks} processes, resumed with {self.world.size}: the epoch continues "
                "after the images seen so far, with other random numbers"
            )
        self.generators = get_generators(device)

    def finish(self) -> Path:
        """The run's result: the best checkpoint, or the last where nothing was evaluated.

        Raises UserError where every step was skipped.
        """
        self.losses.refuse_if_all_were_skipped()
        progress = self.progress
        if self.world.is_main and not (self.saved == progress and (self.out / LAST).is_file()):
            self._save_weights(LAST)
        distributed.barrier()  # the files exist before any process returns the result
        best = self.out / BEST
        result = best if progress.best is not None and best.is_file() else self.out / LAST
        reached = "" if progress.best is None else f" ({progress.best:.4f} after step {progress.best_step})"
        self.log.finished(result)
        self.look_back.write("finished")
        self.log.say(f"done: {result}{reached}; try it: cascade-rcnn predict {result} IMAGE")
        return result

    def _save_weights(self, name: str, metrics: Metrics | None = None) -> None:
        weights = self.model.state_dict()
        if self.average is not None:
            weights |= {key.removeprefix("ema."): value for key, value in self.average.tensors().items()}
        extra: dict[str, Any] = {"step": self.progress.step, "epoch": self.progress.epoch}
        if metrics is not None:
            extra["metrics"] = metrics
        save_checkpoint(
            self.out / name,
            weights,
            config=self.config,
            class_names=self.data.class_names,
            category_ids=self.data.category_ids,
            extra=extra,
        )
