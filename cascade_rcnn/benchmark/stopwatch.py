"""Tools of the benchmark: a stopwatch for named calls, the machine's own limits, peak memory, weights from a rule."""

from __future__ import annotations

import math
import platform
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cascade_rcnn.models.ops.capabilities import processor_name

# Gains that make random heads behave like trained ones: confident classes, boxes that move little. A model of zeros
# would have no detections, one with torch's own initialisation no confident ones: both are faster than any real one.
_GAINS = (
    ("fpn.", 0.7),
    ("objectness", 1.5),
    ("cls_logits", 1.5),
    ("rpn.deltas", 0.15),
    ("rpn.head.bbox_pred", 0.15),
    ("classifier", 3.0),
    ("cls_score", 3.0),
    ("deltas", 0.6),
    ("bbox_pred", 0.6),
    ("mask_fcn_logits", 2.0),
    ("logits", 2.0),
)


@torch.no_grad()
def seed_weights(model: nn.Module) -> None:
    """Fill a model from a rule, each tensor by a generator seeded with its own name: the same on every machine.

    Filters are normal, of zero mean (they tell inputs apart) and of He's variance times a gain by their role; norms
    scale by 0.5 to 1.5, the last of a residual block by 0.3 of that, which keeps the sum from growing.
    """
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if tensor.dim() >= 2:
            gain = next((gain for part, gain in _GAINS if part in name), 1.0)
            values = torch.randn(tensor.shape, generator=generator).flatten(1)
            if values.shape[1] > 1:
                values = values - values.mean(dim=1, keepdim=True)
            values = (values * gain * math.sqrt(2.0 / values.shape[1])).view(tensor.shape)
        elif name.endswith("running_var"):
            values = torch.rand(tensor.shape, generator=generator) + 0.5
        elif name.endswith(("bias", "running_mean")):
            values = torch.randn(tensor.shape, generator=generator) * (0.1 if name.endswith("mean") else 0.02)
        else:
            values = (torch.rand(tensor.shape, generator=generator) + 0.5) * (0.3 if "bn3" in name else 1.0)
        tensor.copy_(values)


def synthetic_image(size: tuple[int, int], *, seed: int = 0) -> Tensor:
    """Coarse and fine noise, uint8 [3, H, W]: as much to find as in a crowded photograph."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(1, 3, *size)
    for cell in (128, 32, 8):
        noise = torch.rand(1, 3, max(2, size[0] // cell), max(2, size[1] // cell), generator=generator)
        total += torch.nn.functional.interpolate(noise, size=size, mode="bilinear", align_corners=False)
    return (total[0] * 85).clamp(0, 255).to(torch.uint8)


class Stopwatch:
    """Time and multiply-adds of named calls, each without the watched calls inside it.

    On a GPU it places events and reads them in :meth:`parts`, so that watching does not make the host wait.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.counter: FlopCounterMode | None = None
        self.macs: dict[str, float] = {}
        self._marks: list[tuple[str, Any, Any, list[tuple[Any, Any]]]] = []
        self._stack: list[tuple[list[tuple[Any, Any]], list[float]]] = []  # of the open parts: marks and macs inside

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        return end - start if self.device.type != "cuda" else start.elapsed_time(end) / 1e3  # type: ignore[no-any-return]

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        flops = self.counter.get_total_flops() if self.counter else 0
        marks: list[tuple[Any, Any]] = []
        macs: list[float] = []
        self._stack.append((marks, macs))
        start = self._mark()
        try:
            yield
        finally:
            end = self._mark()
            self._stack.pop()
            self._marks.append((name, start, end, marks))
            total = (self.counter.get_total_flops() - flops) / 2 if self.counter else 0.0
            self.macs[name] = self.macs.get(name, 0.0) + total - sum(macs)
            if self._stack:
                self._stack[-1][0].append((start, end))
                self._stack[-1][1].append(total)

    def watch(self, owner: object, attribute: str, name: str | Callable[..., str]) -> Callable[[], None]:
        """Time every call of ``owner.attribute`` from now on; returns what undoes it."""
        original = getattr(owner, attribute)
        own = attribute in vars(owner)

        def timed(*arguments: Any, **keywords: Any) -> Any:
            with self.part(name if isinstance(name, str) else name(*arguments, **keywords)):
                return original(*arguments, **keywords)

        def undo() -> None:
            if own:
                setattr(owner, attribute, original)
            else:
                delattr(owner, attribute)

        setattr(owner, attribute, timed)
        return undo

    def parts(self) -> dict[str, float]:
        """Seconds of each part since the last call of this, in the order of first use."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds: dict[str, float] = {}
        for name, start, end, inner in sorted(self._marks, key=lambda m: self._between(self._marks[0][1], m[1])):
            own = self._between(start, end) - sum(self._between(*marks) for marks in inner)
            seconds[name] = seconds.get(name, 0.0) + own
        self._marks.clear()
        return seconds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(device: torch.device, dtype: torch.dtype, *, small: bool = False) -> float:
    """Multiply-adds per second of the machine's own matrix product, the best of shapes as our layers have them."""
    shapes = [(6800, 2304, 256), (1000, 12544, 1024)] if not small else [(256, 256, 256)]
    if device.type == "cuda":
        shapes = [(54400, 2304, 256), (8192, 12544, 1024), (8192, 8192, 8192)]
    best = 0.0
    for rows, inner, columns in shapes:
        a = torch.randn(rows, inner, device=device).to(dtype)
        b = torch.randn(inner, columns, device=device).to(dtype)
        product = torch._int_mm if dtype == torch.int8 else torch.mm
        for _ in range(3):
            synchronize(device)
            start = time.perf_counter()
            product(a, b)
            synchronize(device)
            best = max(best, rows * inner * columns / (time.perf_counter() - start))
    return best


def copy_rate(device: torch.device, *, megabytes: int = 128) -> float:
    """Bytes per second, read and written, of copying memory."""
    source = torch.ones(megabytes << 18, device=device)
    target = torch.zeros_like(source)
    best = 0.0
    for _ in range(3):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = max(best, 2 * source.numel() * 4 / (time.perf_counter() - start))
    return best


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (clear := Path("/proc/self/clear_refs")).exists():
        clear.write_text("5")


def peak_memory(device: torch.device) -> int | None:
    """Bytes: most that was allocated on the GPU, or most that this process had resident (Linux); else None."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if (status := Path("/proc/self/status")).exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def describe_machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return {
        "device": str(device),
        "name": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
