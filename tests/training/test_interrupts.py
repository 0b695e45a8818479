"""Signals and sudden death: whatever happens, the run goes on from its last save, bit for bit, and nothing is left."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from cascade_rcnn import checkpoint
from cascade_rcnn.checkpoint import LAST, STATE, load_checkpoint, load_training
from cascade_rcnn.config import Config
from cascade_rcnn.errors import CheckpointError
from cascade_rcnn.train import train
from cascade_rcnn.training.interrupts import Interrupts, StopNow, TrainingInterrupted
from small_training import (
    children_of,
    free_port,
    is_running,
    rank_environment,
    run_alone,
    run_ranks,
    small_config,
    start_process,
    wait_for,
)

SECONDS_TO_EXIT = 10


def _train(config: Config, out: Path) -> str:
    return str(train(config, out=out, resume=True))


def _steps(out: Path) -> int:
    """The step of the newest state, 0 before the first one."""
    if not (out / STATE).exists():
        return 0
    return int(load_training(out)[1]["progress"]["step"])


def _same(a: Path, b: Path) -> bool:
    first, second = load_training(a)[0], load_training(b)[0]
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def _stop(process: ForkProcess, number: int = signal.SIGTERM) -> tuple[int | None, float]:
    """Signal a process; its exit code and the seconds it took."""
    assert process.pid is not None
    began = time.monotonic()
    os.kill(process.pid, number)
    process.join(timeout=60)
    return process.exitcode, time.monotonic() - began


def _wait_then_stop(config: Config, out: Path, ready: Path, number: int = signal.SIGTERM) -> tuple[int | None, float]:
    """Start a training, wait until it has made ``ready`` or has died, and stop it; also: no process is left."""
    process, connection = start_process(_train, config, out)
    wait_for(lambda: ready.exists() or not process.is_alive(), seconds=120, what=f"{ready.name}")
    assert process.pid is not None
    children = children_of(process.pid)
    result = _stop(process, number)
    connection.close()
    wait_for(lambda: not any(is_running(child) for child in children), seconds=2, what="the end of all processes")
    return result


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_saves_and_exits_with_its_code(
    tmp_path: Path, number: int, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    config = small_config(epochs=200, milestones=(150,), data={"workers": 1}, log_every=1)
    assert _wait_then_stop(config, tmp_path, tmp_path / "log.jsonl", number)[0] == code
    said = capfd.readouterr()
    name = signal.Signals(number).name
    assert f"{name}: stopping when all is saved" in said.err and "StopNow" not in said.err
    assert f"stopped by {name}; saved at step {_steps(tmp_path)}: go on with --resume" in said.out
    assert load_checkpoint(tmp_path / LAST).metadata["step"] == _steps(tmp_path) > 0


def _touch_and_sleep(ready: Path, seconds: float = 60.0) -> None:
    ready.touch()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_signal_while_waiting_for_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third batch takes a minute to load; the two steps before it are saved."""
    from cascade_rcnn.data.dataset import DetectionDataset

    load, calls = DetectionDataset._load, iter(range(1000))

    def slow(self: DetectionDataset, index: int, *arguments: Any) -> Any:
        if next(calls) == 4:
            _touch_and_sleep(tmp_path / "ready")
        return load(self, index, *arguments)

    monkeypatch.setattr(DetectionDataset, "_load", slow)
    code, seconds = _wait_then_stop(small_config(), tmp_path / "run", tmp_path / "ready")
    assert code == 143 and seconds < SECONDS_TO_EXIT and _steps(tmp_path / "run") == 2
    monkeypatch.undo()
    _goes_on_as_if_nothing_had_happened(small_config(), tmp_path)


def test_a_signal_while_loader_processes_are_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cascade_rcnn.data.dataset import DetectionDataset

    load, calls = DetectionDataset._load, iter(range(1000))

    def slow(self: DetectionDataset, index: int, *arguments: Any) -> Any:
        if next(calls) == 4:
            _touch_and_sleep(tmp_path / "ready")
        return load(self, index, *arguments)

    monkeypatch.setattr(DetectionDataset, "_load", slow)
    config = small_config(data={"workers": 2})
    code, seconds = _wait_then_stop(config, tmp_path / "run", tmp_path / "ready")
    assert code == 143 and seconds < SECONDS_TO_EXIT
    monkeypatch.undo()
    _goes_on_as_if_nothing_had_happened(config, tmp_path)


def test_a_signal_during_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(evaluate_every=1, ema=0.9)
    monkeypatch.setattr(
        "cascade_rcnn.training.run.detect_split", lambda *arguments, **keywords: _touch_and_sleep(tmp_path / "ready")
    )
    code, seconds = _wait_then_stop(config, tmp_path / "run", tmp_path / "ready")
    assert code == 143 and seconds < SECONDS_TO_EXIT and _steps(tmp_path / "run") == 6
    monkeypatch.undo()
    _goes_on_as_if_nothing_had_happened(config, tmp_path)


def test_a_signal_in_the_middle_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cascade_rcnn.models.cascade_rcnn import CascadeRCNN

    loss, calls = CascadeRCNN.loss, iter(range(1000))

    def slow(self: CascadeRCNN, *arguments: Any) -> Any:
        if next(calls) == 2:
            _touch_and_sleep(tmp_path / "ready", seconds=1.0)
        return loss(self, *arguments)

    monkeypatch.setattr(CascadeRCNN, "loss", slow)
    code, seconds = _wait_then_stop(small_config(), tmp_path / "run", tmp_path / "ready")
    assert code == 143 and seconds < SECONDS_TO_EXIT and _steps(tmp_path / "run") == 3
    monkeypatch.undo()
    _goes_on_as_if_nothing_had_happened(small_config(), tmp_path)


def test_a_signal_in_the_middle_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, calls = checkpoint.save_file, iter(range(1000))

    def slow(*arguments: Any, **keywords: Any) -> None:
        if next(calls) == 2:
            _touch_and_sleep(tmp_path / "ready", seconds=1.0)
        save(*arguments, **keywords)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    code, seconds = _wait_then_stop(small_config(save_every=2), tmp_path / "run", tmp_path / "ready")
    assert code == 143 and seconds < SECONDS_TO_EXIT
    assert _steps(tmp_path / "run") == load_checkpoint(tmp_path / "run" / LAST).metadata["step"] == 4
    monkeypatch.undo()
    _goes_on_as_if_nothing_had_happened(small_config(save_every=2), tmp_path)


def _goes_on_as_if_nothing_had_happened(config: Config, folder: Path) -> None:
    run_alone(_train, config, folder / "run")
    run_alone(_train, config, folder / "whole")
    assert _same(folder / "run", folder / "whole")


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "save_file", lambda *arguments, **keywords: _touch_and_sleep(tmp_path / "ready"))
    process, connection = start_process(_train, small_config(save_every=1, data={"workers": 1}), tmp_path / "run")
    wait_for((tmp_path / "ready").exists, what="a save")
    assert process.pid is not None
    children = children_of(process.pid)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)  # torchrun repeats the signal of the terminal: not meant as impatience
    time.sleep(1.2)
    assert process.is_alive()
    code, seconds = _stop(process, signal.SIGINT)
    assert code == 130 and seconds < 2 and children
    wait_for(lambda: not any(is_running(child) for child in children), seconds=2, what="the end of the loader")
    connection.close()


def test_one_process_of_two_is_told_to_stop_and_both_save(tmp_path: Path) -> None:
    config = small_config(batch_size=1, epochs=200, milestones=(150,), log_every=1)
    port = free_port()
    started: list[tuple[ForkProcess, Connection]] = [
        start_process(_train, config, tmp_path / "run", environment=rank_environment(rank, 2, port)) for rank in (0, 1)
    ]
    wait_for((tmp_path / "run" / "log.jsonl").exists, seconds=120, what="a step")
    code, seconds = _stop(started[1][0])
    started[0][0].join(timeout=SECONDS_TO_EXIT)
    assert [code, started[0][0].exitcode] == [143, 143] and seconds < SECONDS_TO_EXIT
    reached = _steps(tmp_path / "run")
    assert reached > 0
    run_ranks(
        2, _train, small_config(batch_size=1, epochs=200, milestones=(150,), max_steps=reached + 2), tmp_path / "run"
    )
    run_ranks(
        2, _train, small_config(batch_size=1, epochs=200, milestones=(150,), max_steps=reached + 2), tmp_path / "whole"
    )
    assert _same(tmp_path / "run", tmp_path / "whole")


def test_kill_9_at_any_moment_loses_at_most_one_save(tmp_path: Path) -> None:
    """The short form of benchmarks/kill_test.py: saves every step, four deaths, and the same bits at the end."""
    out, moments = tmp_path / "run", random.Random(4)
    for death in range(4):
        before = _steps(out)
        workers = 1 if death == 0 else 0  # loader processes notice the death of their parent within five seconds
        config = small_config(save_every=1, log_every=1, data={"workers": workers})
        process, connection = start_process(_train, config, out)
        _wait_for_save(process, out, beyond=before)
        time.sleep(moments.uniform(0, 0.3))
        assert process.pid is not None
        children = children_of(process.pid)
        process.kill()
        process.join()
        connection.close()
        saved = _steps(out)  # loads, whatever was being written
        logged = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines() if line[-1] == "}"]
        assert before < saved and logged[-1] - saved <= 1
        assert saved - load_checkpoint(out / LAST).metadata["step"] <= 1
        assert len(children) == workers
        if children:
            wait_for(lambda child=children[0]: not is_running(child), seconds=20)  # type: ignore[misc]
    run_alone(_train, config, out)
    run_alone(_train, config, tmp_path / "whole")
    assert _same(out, tmp_path / "whole") and not list(out.rglob("*.tmp"))


def _wait_for_save(process: ForkProcess, out: Path, *, beyond: int) -> None:
    def is_saved() -> bool:
        try:
            return _steps(out) > beyond or not process.is_alive()
        except CheckpointError:  # replaced between the first look at the file and the second
            return False

    wait_for(is_saved, what="a save")


def _train_with_limit(config: Config, out: Path, size: int) -> str:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        return str(train(config, out=out, resume=True))
    except CheckpointError as error:
        return f"refused: {error}"


def test_a_disk_that_fills_up_during_training_keeps_the_last_save(tmp_path: Path) -> None:
    """Files may grow to 3 MB: the weights fit, the state with the optimizer does not."""
    config = small_config(save_every=2)
    run_alone(_train, small_config(max_steps=2), tmp_path)
    said = run_alone(_train_with_limit, config, tmp_path, 3_000_000)
    assert "training.safetensors: cannot be written" in said and "--resume" in said and "\n" not in said
    assert _steps(tmp_path) == load_checkpoint(tmp_path).metadata["step"] == 2
    assert not list(tmp_path.rglob("*.tmp"))
    run_alone(_train, config, tmp_path)
    assert _steps(tmp_path) == 12


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    import threading

    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def work() -> None:
        with Interrupts() as interrupts, interrupts.at_once():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_handlers_are_put_back_and_errors_keep_their_type() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interrupts() as interrupts:
        assert signal.getsignal(signal.SIGTERM) != before
        with pytest.raises(KeyError), interrupts.at_once():
            raise KeyError("an error of its own")
        with pytest.raises(StopNow), interrupts.at_once():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        with pytest.raises(StopNow), interrupts.at_once():
            raise AssertionError("not reached: a signal is pending")
    assert signal.getsignal(signal.SIGTERM) == before
    assert TrainingInterrupted(signal.SIGTERM).code == 143
