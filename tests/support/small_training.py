"""A training that takes seconds, and processes to run it in: used by the tests of the engine.

Processes are forked from the test process, which has imported everything already. They use one thread: a pool of
threads does not survive a fork.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import multiprocessing
import os
import shutil
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch

from cascade_rcnn.config import Config, DataConfig, ModelConfig, TrainConfig
from cascade_rcnn.data.synthetic_shapes import generate_shapes

_FORK = multiprocessing.get_context("fork")


@functools.cache
def small_data() -> Path:
    """Twelve images to train on, four to evaluate on, 64 pixels wide."""
    folder = Path(tempfile.mkdtemp(prefix="small_training_"))
    atexit.register(_remove, folder, os.getpid())
    return generate_shapes(folder / "data", train_images=12, val_images=4, size=64, objects=(1, 3))


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def small_config(*, model: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **train: Any) -> Config:
    """A Cascade R-CNN of half a million parameters, trained for two epochs of six steps."""
    network = ModelConfig(
        backbone="test_resnet",
        pretrained=False,
        frozen_stages=-1,
        fpn_channels=32,
        head_channels=32,
        mask_channels=32,
        rpn_samples=64,
        roi_samples=32,
        test_proposals=50,
        max_detections=10,
    )
    images = DataConfig(root=str(small_data()), short_side=(64,), long_side=64, workers=0)
    schedule = TrainConfig(
        epochs=2,
        milestones=(1,),
        lr=0.01,
        images_per_step=2,
        batch_size=2,
        warmup_steps=4,
        log_every=2,
        evaluate_every=0,
        deterministic=True,
        summary=False,  # drawing takes longer than such a training
    )
    return Config(
        model=dataclasses.replace(network, **(model or {})),
        data=dataclasses.replace(images, **(data or {})),
        train=dataclasses.replace(schedule, **train),
    )


def start_process(
    function: Callable[..., object], *arguments: Any, environment: dict[str, str] | None = None, own_group: bool = False
) -> tuple[ForkProcess, Connection]:
    """Fork a process that runs ``function``; the connection gives ("value", result) or ("error", text)."""
    ours, theirs = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_call, args=(function, arguments, environment or {}, theirs, own_group))
    process.start()
    theirs.close()
    return process, ours


def _call(
    function: Callable[..., object],
    arguments: tuple[Any, ...],
    environment: dict[str, str],
    answer: Connection,
    own_group: bool,
) -> None:
    if own_group:
        os.setpgid(0, 0)
    torch.set_num_threads(1)
    os.environ.update(environment)
    try:
        value = function(*arguments)
    except Exception:
        answer.send(("error", traceback.format_exc()))
        raise
    answer.send(("value", value))


def run_alone(function: Callable[..., Any], *arguments: Any, seconds: float = 240) -> Any:
    """The result of ``function`` in a process of its own."""
    return _results([start_process(function, *arguments)], seconds=seconds)[0]


def run_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The results of ``function`` in ``size`` processes that find each other as torchrun's do."""
    port = free_port()
    started = [
        start_process(function, *arguments, environment=rank_environment(rank, size, port)) for rank in range(size)
    ]
    return _results(started)


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells its processes."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _results(started: list[tuple[ForkProcess, Connection]], *, seconds: float = 240) -> list[Any]:
    deadline = time.monotonic() + seconds
    results = []
    try:
        for process, connection in started:
            assert connection.poll(max(0.0, deadline - time.monotonic())), f"no answer within {seconds} s"
            try:
                kind, value = connection.recv()
            except EOFError:
                process.join()
                raise AssertionError(f"the process ended with {process.exitcode} and no answer") from None
            assert kind == "value", value
            results.append(value)
    finally:
        for process, connection in started:
            process.join(timeout=10 if len(results) == len(started) else 0.5)
            if process.is_alive():
                process.kill()
                process.join()
            connection.close()
    return results


def wait_for(condition: Callable[[], bool], *, seconds: float = 60, what: str = "it") -> None:
    """Wait until ``condition`` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.01)


def children_of(pid: int) -> list[int]:
    """Ids of the processes that ``pid`` has started and that still run (Linux)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z" and int(fields[1]) == pid:
                found.append(int(entry.name))
    return found


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie (Linux)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
