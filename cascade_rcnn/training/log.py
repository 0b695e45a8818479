"""The log of a training: a bar on a terminal, plain lines elsewhere, and the same numbers as files.

log.jsonl       one object per logged step: losses, learning rate, gradient norm, speed, memory, time
metrics.jsonl   one object per evaluation
images/         what the network saw and found
tensorboard/    the same curves, where tensorboard is installed (training/callbacks.py)
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cascade_rcnn import distributed
from cascade_rcnn.atomic_files import replace_file
from cascade_rcnn.config import Config, DataConfig
from cascade_rcnn.data.dataset import read_record
from cascade_rcnn.data.records import DataSplit, ImageRecord
from cascade_rcnn.drawing.annotations import draw_batch, draw_detections, draw_record, side_by_side
from cascade_rcnn.errors import UserError
from cascade_rcnn.inference.detections import Detections
from cascade_rcnn.progress import steps_bar
from cascade_rcnn.structures import ImageBatch, Targets
from cascade_rcnn.training.callbacks import Callback, Callbacks, start_loggers

_DRAWN_BATCHES = 2  # the first ones of a run
_DRAWN_SCORE = 0.3


class RunLog:
    """The log of a run; of several processes only the one with ``active`` prints and writes."""

    def __init__(self, out: Path, *, active: bool, callbacks: Sequence[Callback] = ()) -> None:
        self._out, self._active = out, active
        self._bar: Any = None
        self._given = list(callbacks)
        self._callbacks = Callbacks([], say=self.say)
        self._result: Path | None = None
        self._total = 0
        self._batches_drawn = 0
        self._clock = _Clock()
        self._began = time.perf_counter()  # of the whole run: a resumed one began earlier

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar[0].stop()
            self._bar = None
        self._callbacks.tell("on_end", self._result)

    def begin(self, step: int, total: int, *, evaluated: int, config: Config) -> None:
        """Start at ``step`` of ``total``, last evaluated at step ``evaluated``; start the loggers of ``config``.

        Lines that an interrupted run wrote beyond them are dropped: they will be written again.
        """
        self._total = total
        self._batches_drawn = _DRAWN_BATCHES if step else 0  # a run that is resumed has drawn them
        self._clock.restart()
        if not self._active:
            return
        self._out.mkdir(parents=True, exist_ok=True)
        kept = [*_drop_beyond(self._out / "log.jsonl", step), *_drop_beyond(self._out / "metrics.jsonl", evaluated)]
        self._began = time.perf_counter() - max((line.get("elapsed_s", 0) for line in kept), default=0)
        started = start_loggers(config, self._out, step, self.say)
        self._callbacks = Callbacks([*started, *self._given], say=self.say)
        if sys.stdout.isatty():
            self._bar = steps_bar(step, total)

    def say(self, text: str) -> None:
        """Print one line."""
        if not self._active:
            return
        if self._bar is not None:
            self._bar[0].console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def say_from_any_rank(self, text: str) -> None:
        """A line from any process: rank 0's log, or this process's own output with its number."""
        if self._active:
            self.say(text)
        else:
            print(f"rank {distributed.rank()}: {text}", flush=True)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent here counts as waiting for data."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._clock.waited += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent here (evaluation, saving) does not count as training; the bar makes room for another one."""
        began = time.perf_counter()
        if self._bar is not None:
            self._bar[0].stop()
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar[0].start()
            self._clock.pause(time.perf_counter() - began)

    def tick(self, step: int, images: int) -> None:
        """A step has been taken with so many images."""
        self._clock.images += images
        self._clock.steps += 1
        if self._bar is not None:
            self._bar[0].update(self._bar[1], completed=step)

    def step(self, step: int, epoch: float, values: Mapping[str, float], *, device: torch.device) -> None:
        """Log the numbers of a step."""
        speed = self._clock.read()
        seconds_left = round((self._total - step) * speed.pop("step_s"))
        record: dict[str, Any] = {
            "step": step,
            "epoch": round(epoch, 4),
            **values,
            **speed,
            "elapsed_s": self._elapsed(),
            "eta_s": seconds_left,
            "memory_gb": round(_peak_memory(device), 2),
        }
        if not self._active:
            return
        _append(self._out / "log.jsonl", record)
        self._callbacks.tell("on_step", step, {name: value for name, value in record.items() if name != "step"})
        line = _line(record)
        if self._bar is not None:
            self._bar[0].update(self._bar[1], numbers=line)
        else:
            self.say(f"step {step}/{self._total}  epoch {epoch:.2f}  {line}  ETA {_duration(record['eta_s'])}")

    def metrics(self, step: int, epoch: int, values: Mapping[str, float | None]) -> None:
        """Log the result of an evaluation."""
        if not self._active:
            return
        _append(self._out / "metrics.jsonl", {"step": step, "epoch": epoch, "elapsed_s": self._elapsed(), **values})
        self._callbacks.tell("on_evaluation", step, dict(values))

    def _elapsed(self) -> float:
        """Seconds of this run with its evaluations, without those between a stop and its resumption."""
        return round(time.perf_counter() - self._began, 1)

    def saved(self, step: int) -> None:
        """A state to resume from has been written."""
        self._callbacks.tell("on_save", step, self._out)

    def finished(self, result: Path) -> None:
        """The training has reached its end, with this checkpoint."""
        self._result = result

    def batch(self, images: ImageBatch, targets: Targets, class_names: tuple[str, ...]) -> None:
        """Draw a batch as the network sees it, if it is one of the first of the run."""
        if not self._active or self._batches_drawn >= _DRAWN_BATCHES:
            return
        self._batches_drawn += 1
        for number, drawn in enumerate(draw_batch(images, targets, class_names), start=1):
            self.picture(f"train_batch{self._batches_drawn}_{number}", drawn)

    def prediction(
        self, number: int, record: ImageRecord, found: Detections, split: DataSplit, *, data: DataConfig
    ) -> None:
        """Draw what was found in an image of the validation split beside what is annotated."""
        image = read_record(record, split.format, data)
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        drawn = draw_detections(image, found, score_threshold=_DRAWN_SCORE)
        self.picture(f"validation_{number}", side_by_side(draw_record(record, split.class_names, image=picture), drawn))

    def picture(self, name: str, image: Image.Image) -> None:
        """Save a drawing as ``images/<name>.jpg``."""
        if self._active:
            (self._out / "images").mkdir(parents=True, exist_ok=True)
            image.convert("RGB").save(self._out / "images" / f"{name}.jpg", quality=90)


class _Clock:
    """Seconds of training and of waiting since the last logged step."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._since, self._paused, self.waited = time.perf_counter(), 0.0, 0.0
        self.images = self.steps = 0

    def pause(self, seconds: float) -> None:
        self._paused += seconds

    def read(self) -> dict[str, float]:
        """Images per second of this rank, share of time waiting for data, seconds per step; then resets."""
        seconds = max(time.perf_counter() - self._since - self._paused, 1e-9)
        numbers = {
            "images_per_second": round(self.images * distributed.world_size() / seconds, 3),
            "data_share": round(min(self.waited / seconds, 1.0), 4),
            "step_s": seconds / max(self.steps, 1),
        }
        self.restart()
        return numbers


def _line(record: Mapping[str, Any]) -> str:
    """The numbers of a step, readable: losses by name, then speed."""
    speed = ("images_per_second", "data_share", "memory_gb", "elapsed_s", "eta_s")
    own = ("step", "epoch", "lr", "loss", "grad_norm", *speed)
    parts = " ".join(f"{name} {value:.3f}" for name, value in record.items() if name not in own)
    return (
        f"loss {record['loss']:.4f} ({parts})  lr {record['lr']:.3g}  gradient {record['grad_norm']:.3g}  "
        f"{record['images_per_second']:.2f} images/s  waiting for data {record['data_share']:.0%}  "
        f"{record['memory_gb']:.1f} GB"
    )


def _duration(seconds: int) -> str:
    days, rest = divmod(max(seconds, 0), 86400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}d {clock}" if days else clock


def _peak_memory(device: torch.device) -> float:
    """Peak memory so far in GB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


def _append(path: Path, record: Mapping[str, Any]) -> None:
    """Append one line; non-finite numbers become null, as JSON has none."""
    clean = {key: value if _is_json(value) else None for key, value in record.items()}
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); free some space or make the folder writable, "
            "then go on with --resume"
        ) from error


def _is_json(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _drop_beyond(path: Path, step: int) -> list[dict[str, Any]]:
    """Keep the lines up to ``step``, and return them; also drops a line that a killed process left unfinished."""
    if not path.exists():
        return []
    kept, records = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
            if record["step"] <= step:
                records.append(record)
                kept.append(line + os.linesep)
        except (ValueError, KeyError, TypeError):
            continue
    replace_file(path, lambda temporary: _write_lines(temporary, kept))
    return records


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(lines), encoding="utf-8", newline="")
