"""The processes of a run: how they start and how they agree.

A thin layer over torch.distributed: torchrun starts the processes, this joins them.

Everything also works in a single process: without torchrun there is one rank, nothing is communicated, and the
functions below return what they were given. Collectives run at fixed places of the loop, never depending on the data.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from cascade_rcnn.errors import ConfigError, UserError
from cascade_rcnn.messages import shown

# renamed in newer versions of torch; both broadcast rank 0's buffers before each forward
_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


_Value = TypeVar("_Value")
_Model = TypeVar("_Model", bound=nn.Module)


@dataclass(frozen=True)
class World:
    """This process's place among those of a run."""

    rank: int
    size: int
    device: torch.device
    restarts: int = 0  # how often torchrun has restarted this group after a failure

    @property
    def is_main(self) -> bool:
        """Rank 0 writes files and prints."""
        return self.rank == 0


def rank() -> int:
    """This process's number, 0 when alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 when alone."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def start(device: str | torch.device | None = None, *, timeout_minutes: float = 30.0) -> Iterator[World]:
    """Join the other processes of a torchrun (if any) and leave them at the end.

    ``device`` is as in ``choose_device``, with its errors. GPUs talk over NCCL; host tensors and objects, and
    everything on CPUs, over gloo.
    """
    chosen = choose_device(device)
    joined = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized()
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if joined:
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        timeout = datetime.timedelta(minutes=timeout_minutes)
        # torchrun's store outlives a restart: without a prefix it still holds the addresses of dead processes
        store, number, size = next(rendezvous("env://", timeout=timeout))
        dist.init_process_group(
            backend, timeout=timeout, rank=number, world_size=size, store=PrefixStore(f"restart_{restarts}", store)
        )
    try:
        yield World(rank(), world_size(), chosen, restarts)
    finally:
        if joined and dist.is_initialized():
            dist.destroy_process_group()


def choose_device(device: str | torch.device | None = "auto", *, share_gpus: bool = False) -> torch.device:
    """The device of that name; ``auto`` (or None) is a GPU where there is one, else the CPU.

    Of several GPUs, a process of torchrun takes the one of its own number, any other process the current one. With
    ``share_gpus`` more processes than GPUs share them.

    Raises:
        UserError: a device that torch does not know or this machine does not have; more processes than GPUs.
    """
    if not isinstance(device, str | torch.device | None):
        raise UserError(f"device {shown(device)}: give a name, e.g. 'cpu', 'cuda' or 'auto'")
    name = "auto" if device is None else str(device)
    if torch.cuda.is_available() and name in ("auto", "cuda"):
        # not probed like other devices: that would allocate memory on the first GPU in every process
        return torch.device("cuda", _own_gpu(share_gpus))
    try:
        chosen = torch.device("cpu" if name == "auto" else name)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} cannot be used ({reason}); use cpu, cuda or auto") from error
    if chosen.type == "meta":
        raise UserError("device 'meta' holds no numbers; use cpu, cuda or auto")
    return chosen


def _own_gpu(share: bool) -> int:
    if "LOCAL_RANK" not in os.environ:
        return torch.cuda.current_device()
    local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local_rank >= gpus and not share:
        raise UserError(
            f"process {local_rank + 1} on this machine finds only {gpus} GPUs: start at most {gpus} "
            "processes per machine, or name another --device"
        )
    return local_rank % gpus


def barrier() -> None:
    """Wait until every rank has reached this point."""
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

    On a GPU the result of a vote is read at the next vote, while the step runs; on CPUs, where steps are long,
    immediately.
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

    Every parameter takes part in every step (an image without objects gives zero losses, not missing ones), so DDP
    need not search for unused parameters. ``norm`` is ``config.model.norm``: only trained batch norm has buffers that
    change and must be kept equal.
    """
    if world.size == 1:
        return model
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dim() == 4 and parameter.shape[2:] == (1, 1):
            parameter.register_hook(partial(_laid_out, strides=parameter.stride()))
    options: dict[str, Any] = {_SYNC_BUFFERS: norm == "batch"}
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **options)


def _laid_out(gradient: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The gradient of a 1x1 convolution's weight with the weight's own strides; no value moves.

    In channels-last networks some algorithms give it the strides (C, 1, C, C) and others (C, 1, 1, 1): the same memory.
    DDP compares strides, warns where they differ, and takes the slower way into its buckets.
    """
    if gradient.stride() == strides or not gradient[:, :, 0, 0].is_contiguous():
        return gradient
    return gradient.as_strided(gradient.shape, strides)


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
