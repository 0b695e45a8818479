"""What a training says: a bar on a terminal, plain lines elsewhere, and the same numbers as files.

log.jsonl       one object per logged step: losses, learning rate, gradient norm, speed, memory
metrics.jsonl   one object per evaluation
images/         what the network saw and found
tensorboard/    the same curves, where tensorboard is installed
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cascade_rcnn import distributed
from cascade_rcnn.atomic_files import replace_file
from cascade_rcnn.errors import UserError
from cascade_rcnn.progress import steps_bar

if TYPE_CHECKING:
    from PIL import Image


class LossWindow:
    """The losses of the steps since they were last read, kept on the device so that no step waits for them.

    A step is bad when its gradients (with fp16's loss scaling: its losses) are not finite; the optimizer has then
    skipped it. On a CPU this is seen at once, on a GPU when the window is read, up to ``log_every`` steps later.
    """

    def __init__(self, *, max_bad: int, scaled: bool = False) -> None:
        self._max_bad, self._scaled = max_bad, scaled
        self._names: tuple[str, ...] = ()
        self._passes: list[tuple[Tensor, tuple[str, ...]]] = []  # of the step that is under way
        self._steps: list[tuple[int, Tensor, tuple[str, ...]]] = []  # step, [losses..., norm, bad, bad here], paths
        self.bad_in_a_row = 0
        self._last_bad = ""

    def add_pass(self, losses: Mapping[str, Tensor], paths: tuple[str, ...]) -> None:
        """Note the losses of one pass."""
        self._names = tuple(losses)
        self._passes.append((torch.stack([loss.detach().float() for loss in losses.values()]), paths))

    def end_step(self, step: int, norm: Tensor) -> list[str]:
        """Close the step of the passes so far; on a CPU returns what is to be said about it (see ``read``)."""
        values = torch.stack([values for values, _ in self._passes]).mean(dim=0)
        paths = tuple(path for _, names in self._passes for path in names)
        self._passes.clear()
        here = ~torch.isfinite(values).all()
        bad = here if self._scaled else ~torch.isfinite(norm)
        row = torch.cat([values, norm.detach().float().view(1), bad.float().view(1), here.float().view(1)])
        self._steps.append((step, row, paths))
        if row.device.type == "cpu" and not self._scaled:  # nothing to wait for, and every rank sees the same norm
            return self._judge([(step, row, paths)])
        return []

    def read(self) -> tuple[dict[str, float], list[str]]:
        """Means over the window's good steps and over the ranks, and messages about its bad steps.

        The one place where the host waits for the device. Every rank calls it at the same step.
        Raises UserError after ``max_bad`` bad steps in a row.
        """
        if not self._steps:
            return {}, []
        rows = torch.stack([row for _, row, _ in self._steps])  # [steps, losses + 3]
        shared = rows[:, :-1].clone()
        shared[~torch.isfinite(shared)] = 0
        shared = distributed.mean_over_ranks(shared)  # "bad" becomes the share of ranks: above 0 where any is
        messages = []
        if rows.device.type != "cpu" or self._scaled:
            judged = torch.cat([rows[:, :-2], (shared[:, -1:] > 0).float(), rows[:, -1:]], dim=1).cpu()
            messages = self._judge([(step, row, paths) for (step, _, paths), row in zip(self._steps, judged)])
        good = shared[:, -1] == 0
        means = (shared[good] if bool(good.any()) else shared * float("nan")).mean(dim=0).tolist()
        self._steps.clear()
        values = dict(zip(self._names, means))
        return {"loss": sum(values.values()), **values, "grad_norm": means[-2]}, messages

    def _judge(self, steps: Sequence[tuple[int, Tensor, tuple[str, ...]]]) -> list[str]:
        messages = []
        for step, row, paths in steps:
            *values, norm, bad, here = row.tolist()
            if not bad:
                self.bad_in_a_row = 0
                continue
            self.bad_in_a_row += 1
            names = (
                ", ".join(f"{name} {value:g}" for name, value in zip(self._names, values) if value - value != 0)
                or f"gradient norm {norm:g}"
            )  # inf - inf and nan - nan are nan
            if here or distributed.world_size() == 1:
                self._last_bad = f"step {step}: {names}; images {', '.join(paths)}"
                messages.append(f"not finite, skipped: {self._last_bad}")
            if self.bad_in_a_row >= self._max_bad:
                raise UserError(
                    f"the losses of {self.bad_in_a_row} steps in a row were not finite ({self._last_bad or names}); "
                    "look at these images with 'cascade-rcnn check', or lower train.lr, raise train.warmup_steps, set "
                    "train.clip_grad_norm to 10, or train.precision to fp32; --resume goes on from the last save"
                )
        return messages


class RunLog:
    """The voice of a run; of several processes only the one with ``active`` speaks and writes."""

    def __init__(self, out: Path, *, active: bool) -> None:
        self._out, self._active = out, active
        self._bar: Any = None
        self._board: Any = None
        self._total = 0
        self._clock = _Clock()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar[0].stop()
        if self._board is not None:
            self._board.close()

    def begin(self, step: int, total: int, *, evaluated: int) -> None:
        """Start at ``step`` of ``total``, last evaluated at step ``evaluated``.

        Lines that an interrupted run wrote beyond them are dropped: they will be written again.
        """
        self._total = total
        self._clock.restart()
        if not self._active:
            return
        self._out.mkdir(parents=True, exist_ok=True)
        _drop_beyond(self._out / "log.jsonl", step)
        _drop_beyond(self._out / "metrics.jsonl", evaluated)
        self._board = _tensorboard(self._out / "tensorboard", step)
        if sys.stdout.isatty():
            self._bar = steps_bar(step, total)

    def say(self, text: str) -> None:
        """One line for the person who watches."""
        if not self._active:
            return
        if self._bar is not None:
            self._bar[0].console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)

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
            "eta_s": seconds_left,
            "memory_gb": round(_peak_memory(device), 2),
        }
        if not self._active:
            return
        _append(self._out / "log.jsonl", record)
        if self._board is not None:
            for name, value in record.items():
                self._board.add_scalar(f"train/{name}", value, step)
        line = _line(record)
        if self._bar is not None:
            self._bar[0].update(self._bar[1], numbers=line)
        else:
            self.say(f"step {step}/{self._total}  epoch {epoch:.2f}  {line}  ETA {_duration(record['eta_s'])}")

    def metrics(self, step: int, epoch: int, values: Mapping[str, float | None]) -> None:
        """Log the result of an evaluation."""
        if not self._active:
            return
        _append(self._out / "metrics.jsonl", {"step": step, "epoch": epoch, **values})
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"val/{name}", value, step)

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
        """Images per second of this rank, share of time waiting for data, seconds per step; starts anew."""
        seconds = max(time.perf_counter() - self._since - self._paused, 1e-9)
        numbers = {
            "images_per_second": round(self.images * distributed.world_size() / seconds, 3),
            "data_share": round(min(self.waited / seconds, 1.0), 4),
            "step_s": seconds / max(self.steps, 1),
        }
        self.restart()
        return numbers


def _line(record: Mapping[str, Any]) -> str:
    """The numbers of a step for a person: losses by name, then speed."""
    own = ("step", "epoch", "lr", "loss", "grad_norm", "images_per_second", "data_share", "eta_s", "memory_gb")
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
    """Most memory used so far in GB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


def _append(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line; not finite numbers become null, as JSON has none."""
    clean = {key: None if isinstance(value, float) and value - value != 0 else value for key, value in record.items()}
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); free some space or make the folder writable, "
            "then go on with --resume"
        ) from error


def _drop_beyond(path: Path, step: int) -> None:
    """Keep the lines up to ``step``; a line that a killed process left unfinished goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + os.linesep)
        except (ValueError, KeyError, TypeError):
            continue
    replace_file(path, lambda temporary: _write_lines(temporary, kept))


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(lines), encoding="utf-8", newline="")


def _tensorboard(folder: Path, step: int) -> Any:
    """A SummaryWriter where the extra is installed (pip install 'cascade-rcnn[tensorboard]'), else None."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    writer: Any = SummaryWriter
    return writer(str(folder), purge_step=step)
