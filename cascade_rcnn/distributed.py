"""The processes of a run: how they start, agree and stop.

A thin layer over torch.distributed: torchrun starts the processes, this joins them.

Everything works alone as well: without torchrun there is one rank, nothing is communicated, and the functions below
give back what they were given. Collectives run at fixed places of the loop, never depending on the data.

SIGINT, SIGTERM and SIGHUP during training: finish the step, save, exit; or stop at once where nothing can be lost.
Exit codes are the shell's: 128 plus the number of the signal, so 130 for Ctrl-C and 143 for SIGTERM.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from inspect import signature
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from cascade_rcnn.errors import ConfigError, UserError

# newer versions of torch call it so; both bring the buffers of rank 0 to the others before each forward
_SYNC_BUFFERS = ("forward_sync_buffers" if "forward_sync_buffers" in signature(DistributedDataParallel).parameters
                 else "broadcast_buffers")

_SIGNALS = tuple(number for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", None)) if number)
# torchrun passes a Ctrl-C on to its workers, which have already received it from the terminal
_IMPATIENT_AFTER = 1.0

_Value = TypeVar("_Value")
_Model = TypeVar("_Model", bound=nn.Module)


@dataclass(frozen=True)
class World:
    """Where this process stands among those of a run."""

    rank: int
    size: int
    device: torch.device
    restarts: int = 0  # how often torchrun has started this group anew after a failure

    @property
    def is_main(self) -> bool:
        """Rank 0 writes files and speaks."""
        return self.rank == 0


def rank() -> int:
    """This process's number, 0 when alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 when alone."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def start(device: str | torch.device | None = None, *, timeout_minutes: float = 30.0) -> Iterator[World]:
    """Join the other processes of a torchrun, or be alone; leave them at the end.

    ``device`` None takes this process's GPU where there is one, else the CPU. GPUs talk over NCCL; host tensors and
    objects, and everything on CPUs, over gloo. Raises UserError with more processes than GPUs on this machine, and for
    a device that is not there.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    chosen = _choose_device(device, local_rank)
    joined = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized()
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if joined:
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        timeout = datetime.timedelta(minutes=timeout_minutes)
        # torchrun's store outlives a restart: without a prefix, addresses of processes that have died are found in it
        store, number, size = next(rendezvous("env://", timeout=timeout))
        dist.init_process_group(backend, timeout=timeout, rank=number, world_size=size,
                                store=PrefixStore(f"restart_{restarts}", store))
    try:
        yield World(rank(), world_size(), chosen, restarts)
    finally:
        if joined and dist.is_initialized():
            dist.destroy_process_group()


def usable_device(device: str | torch.device) -> torch.device:
    """The device of that name. Raises UserError where torch does not know it or this machine does not have it."""
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {str(device)!r} cannot be used ({reason}); use cpu, cuda or auto") from error
    return chosen


def _choose_device(device: str | torch.device | None, local_rank: int) -> torch.device:
    if device is None:
        chosen = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    elif str(device) == "cuda" and torch.cuda.is_available():
        chosen = torch.device("cuda")  # which one, is said below; trying it out would take memory of the first
    else:
        chosen = usable_device(device)
    if str(chosen) != "cuda":  # a CPU, or a numbered GPU
        return chosen
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        raise UserError(f"process {local_rank + 1} on this machine finds only {gpus} GPUs: start at most {gpus} "
                        "processes per machine, or name another --device")
    return torch.device("cuda", local_rank)


def barrier() -> None:
    """Wait until every rank has come here."""
    if world_size() > 1:
        dist.all_reduce(torch.zeros(1))  # over gloo: needs no GPU, unlike dist.barrier() with NCCL


def gather(value: _Value) -> list[_Value]:
    """Every rank's value on rank 0 in the order of the ranks, an empty list elsewhere; pickled on the way."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size() if rank() == 0 else []
    dist.gather_object(value, values if rank() == 0 else None)
    return values


def broadcast(value: _Value) -> _Value:
    """Rank 0's value on every rank."""
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box)
    result: _Value = box[0]
    return result


def mean_over_ranks(values: Tensor) -> Tensor:
    """Element-wise mean of a tensor over the ranks, on its device."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
        values /= world_size()
    return values


class Vote:
    """Whether any rank wants to stop. Every rank votes once per step; nobody waits for the answer on a GPU.

    On a GPU the answer to a vote is collected at the next one, while the step runs; on CPUs, where steps are long, at
    once.
    """

    def __init__(self, device: torch.device) -> None:
        self._at_once = device.type == "cpu"
        self._pending: tuple[Any, Tensor] | None = None

    def cast(self, stop: bool) -> bool:
        """Give this rank's vote and return whether all ranks stop now."""
        if world_size() == 1:
            return stop
        answer = self._collect()
        mine = torch.tensor([float(stop)])
        self._pending = (dist.all_reduce(mine, op=dist.ReduceOp.MAX, async_op=True), mine)
        return self._collect() if self._at_once else answer

    def _collect(self) -> bool:
        if self._pending is None:
            return False
        work, votes = self._pending
        work.wait()
        self._pending = None
        return bool(votes.item() > 0)  # a host tensor: no wait for the GPU


def wrap(model: nn.Module, world: World, *, norm: str = "") -> nn.Module:
    """The model, whose forward gives the losses, so that its backward averages gradients over the ranks.

    Every parameter takes part in every step (an image without objects gives zero losses, not missing ones), so unused
    parameters need not be searched for. ``norm`` is ``config.model.norm``: only trained batch norm has buffers that
    change and must be kept alike.
    """
    if world.size == 1:
        return model
    options: dict[str, Any] = {_SYNC_BUFFERS: norm == "batch"}
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **options)


def with_synchronised_norm(model: _Model, world: World) -> _Model:
    """Batch norm over the images of all GPUs (``model.norm = "sync"``); on one process plain batch norm is the same."""
    if world.size == 1:
        return model
    if world.device.type != "cuda":
        raise ConfigError("model.norm sync: synchronised batch norm needs GPUs; use --model.norm group on CPUs")
    converted: _Model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    return converted


def without_sync(module: nn.Module, active: bool) -> AbstractContextManager[None]:
    """Keep gradients to this rank for the passes before the last of an accumulated step."""
    if active and isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return nullcontext()


class Watchdog:
    """Reports a step that takes too long: which rank, which step, which images, and where the program stands.

    A rank that hangs makes all others wait for it until the process group's timeout kills the job without a reason.
    Every rank that is late says what it is doing before that: the culprit is the one that is not waiting for others.
    """

    def __init__(self, minutes: float, *, rank: int = 0) -> None:
        self._limit, self._rank = minutes * 60, rank
        self._what, self._since, self._reported = "", time.monotonic(), True
        self._done = threading.Event()
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._limit > 0:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def now(self, what: str) -> None:
        """Begin something that should end within the limit; costs an assignment."""
        self._what, self._since, self._reported = what, time.monotonic(), False

    def rest(self) -> None:
        """Nothing to watch for a while: an evaluation may take as long as it needs."""
        self._reported = True

    def _watch(self) -> None:
        while not self._done.wait(min(30.0, self._limit / 4)):
            seconds = time.monotonic() - self._since
            if not self._reported and seconds > self._limit:
                self._reported = True
                self._report(seconds)

    def _report(self, seconds: float) -> None:
        frame = sys._current_frames().get(self._main or 0)
        stack = traceback.extract_stack(frame)[-4:] if frame else []
        places = " < ".join(f"{place.name} ({os.path.basename(place.filename)}:{place.lineno})"  # noqa: PTH119
                            for place in reversed(stack))
        print(f"stalled: rank {self._rank} for {seconds / 60:.1f} minutes in {self._what}; at {places}",
              file=sys.stderr, flush=True)


class TrainingInterrupted(SystemExit):
    """A signal has stopped the training after its state was saved; ``code`` is 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number).name


class StopNow(BaseException):
    """Raised by the signal itself inside ``Interrupts.at_once``; no ``except Exception`` swallows it."""


class Interrupts:
    """Context in which the signals set ``pending`` instead of ending the program.

    A second Ctrl-C, a second or more after the first, ends the program without saving.
    Outside the main thread, where Python allows no signal handlers, nothing is changed and nothing becomes pending.
    """

    def __init__(self) -> None:
        self.pending = 0  # number of the signal that came, 0 for none
        self._immediate = False
        self._since = 0.0
        self._process = os.getpid()
        self._children = set(multiprocessing.active_children())
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup stays nohup
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A stretch that may be broken off anywhere (waiting for data, evaluating): a signal raises StopNow in it.

        Errors of loader workers that received the signal before us count as the signal.
        """
        if self.pending:
            raise StopNow
        self._immediate = True
        try:
            yield
        except Exception:
            if self._arrives_late():
                raise StopNow from None
            raise
        finally:
            self._immediate = False

    def end_children(self) -> None:
        """Kill the loader processes that were started in this context; they hold nothing that needs saving."""
        started = [child for child in multiprocessing.active_children() if child not in self._children]
        for child in started:
            child.kill()
        for child in started:
            child.join(timeout=2)

    def keep_worker_deaths_quiet(self) -> None:
        """Replace PyTorch's SIGCHLD handler, which raises wherever the program stands when a loader process dies.

        A cluster that stops a job signals all its processes; an error in the middle of an optimizer step would leave
        half-updated weights. The loader itself still notices a dead worker when it waits for it.
        """
        child = getattr(signal, "SIGCHLD", None)
        if child is not None and threading.current_thread() is threading.main_thread():
            before = signal.signal(child, signal.SIG_DFL)
            if before != signal.SIG_DFL:
                self._before[child] = before

    def _arrives_late(self) -> bool:
        """Whether a signal is pending, or comes within half a second (a whole process group is being stopped)."""
        self._immediate = False
        deadline = time.monotonic() + 0.5
        while not self.pending and time.monotonic() < deadline:
            time.sleep(0.02)
        return bool(self.pending)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a loader process just forked: its parent ends it
        now = time.monotonic()
        if self.pending and number == signal.SIGINT and now - self._since > _IMPATIENT_AFTER:
            self.end_children()
            os._exit(128 + number)
        if not self.pending:
            self.pending, self._since = number, now
            with suppress(OSError):
                name = signal.Signals(number).name
                os.write(2, f"\n{name}: stopping when all is saved; Ctrl-C again stops without saving\n".encode())
        if self._immediate:
            self._immediate = False
            raise StopNow
