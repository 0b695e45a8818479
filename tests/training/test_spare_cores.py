"""Training keeps to the cores that others leave, tells so, and puts the number of threads back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cascade_rcnn.training.spare_cores import SECONDS, SpareCores, spare_cores

TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class Machine:
    """/proc and a clock of a machine of two cores, this process with a child, and others."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.now, self.ours, self.others = folder, 0.0, 0.0, 0.0
        self.write()

    def write(self) -> None:
        own = round(self.ours * TICKS)
        idle = 10**9
        (self.proc / "stat").write_text(
            f"cpu  {own} {round(self.others * TICKS)} 0 {idle} {idle} 0 0 0 {idle} 0\ncpu0 1\n"
        )
        for process, parent, ticks in ((os.getpid(), 1, own - own // 4), (99999999, os.getpid(), own // 4), (1, 0, 7)):
            (self.proc / str(process)).mkdir(exist_ok=True)
            text = f"{process} (a ) b) S {parent} {'0 ' * 9}{ticks} 0 0 0 20 0\n"
            (self.proc / str(process) / "stat").write_text(text)

    def run(self, seconds: float, *, ours: float, others: float) -> None:
        """Time in which the process takes ``ours`` cores and the rest of the machine ``others``."""
        self.now += seconds
        self.ours += seconds * ours
        self.others += seconds * others
        self.write()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What torch is told."""
    told: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    return told


def test_a_busy_machine_gets_a_thread_back_and_a_quiet_one_takes_it_again(machine: Machine, threads: list[int]) -> None:
    with SpareCores(2, proc=machine.proc, clock=lambda: machine.now, cores=2) as cores:
        machine.run(SECONDS / 2, ours=1.0, others=1.0)
        assert cores.look() == []  # too early to tell
        machine.run(SECONDS, ours=1.0, others=1.0)
        assert cores.look() == ["other programs take 1.0 of 2 cores: now 1 of 2 threads"]
        machine.run(SECONDS, ours=1.0, others=1.0)
        assert cores.look() == []  # said once
        machine.run(SECONDS, ours=1.0, others=0.1)
        assert cores.look() == ["other programs take 0.1 of 2 cores: now 2 of 2 threads"]
        machine.run(SECONDS, ours=0.2, others=1.8)
        cores.look()
    assert threads == [1, 2, 1, 2]  # the last when the run ends


def test_own_work_and_that_of_loaders_is_not_others(machine: Machine, threads: list[int]) -> None:
    cores = SpareCores(2, proc=machine.proc, clock=lambda: machine.now, cores=2)
    machine.run(SECONDS, ours=2.0, others=0.0)
    assert cores.look() == [] and threads == []


@pytest.mark.parametrize("told", ["", "cpu", "cpu  1 two"])
def test_where_the_system_does_not_tell_nothing_changes(machine: Machine, threads: list[int], told: str) -> None:
    (machine.proc / "stat").write_text(told)
    cores = SpareCores(2, proc=machine.proc, clock=lambda: machine.now, cores=2)
    machine.now += 10 * SECONDS
    assert cores.look() == [] and threads == []


def test_who_has_chosen_the_threads_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert spare_cores(cpu, processes=1, deterministic=False).most == 1  # tests fix OMP_NUM_THREADS
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(os.cpu_count() or 1)), raising=False)
    assert spare_cores(cpu, processes=1, deterministic=False).most == 8
    assert spare_cores(cpu, processes=1, deterministic=True).most == 1
    assert spare_cores(cpu, processes=2, deterministic=False).most == 1
    assert spare_cores(torch.device("cuda"), processes=1, deterministic=False).most == 1


@pytest.mark.skipif(not Path("/proc/stat").is_file(), reason="Linux tells this in /proc")
def test_what_this_machine_tells_is_read() -> None:
    """The ticks of a child that works are the process's own, and all of them are the machine's."""
    cores = SpareCores(2)
    before = cores._ticks()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.3: pass"], check=True)
    after = cores._ticks()
    assert before is not None and after is not None
    busy, ours = (new - old for new, old in zip(after, before))
    assert 0.25 * TICKS < ours <= busy + 0.1 * TICKS


def test_a_process_bound_to_some_cores_keeps_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert spare_cores(torch.device("cpu"), processes=1, deterministic=False).most == 1
