"""Training threads on CPU cores that others use too.

Threads that wait for each other by spinning, as OpenMP's do, lose to every other program: beside another training, two
threads on two cores came from 11.8 to 0.5 images/s (benchmarks/NOTES.md). A run therefore looks every few seconds at
what others take, and keeps to the cores that they leave, down to one thread, which never waits; and takes them back.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

SECONDS = 5.0  # between two looks
_PROC = Path("/proc")
_IDLE = (3, 4)  # columns of /proc/stat's first line: idle, waiting for a disk
_GUESTS = 8  # from here on columns that are counted elsewhere already


class SpareCores:
    """Chooses ``torch.set_num_threads`` while a run goes on; at its end the number is what it was."""

    def __init__(
        self, threads: int, *, proc: Path = _PROC, clock: Callable[[], float] = time.monotonic, cores: int | None = None
    ) -> None:
        """``threads``: as many as the run takes on a quiet machine. ``cores`` [1..]: of the machine, by default all."""
        self.threads = self.most = threads
        self._proc, self._clock, self._cores = proc, clock, cores or os.cpu_count() or 1
        self._looked, self._before = clock(), self._ticks()

    def __enter__(self) -> SpareCores:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.threads != self.most:
            torch.set_num_threads(self.most)

    def look(self) -> list[str]:
        """Call after each step; returns what to tell where the number of threads changes."""
        now = self._clock()
        if self.most == 1 or now - self._looked < SECONDS or (ticks := self._ticks()) is None:
            return []
        busy, ours = (new - old for new, old in zip(ticks, self._before or ticks))
        others = max(busy - ours, 0.0) / os.sysconf("SC_CLK_TCK") / (now - self._looked)
        self._looked, self._before = now, ticks
        threads = min(self.most, max(1, round(self._cores - others)))
        if threads == self.threads:
            return []
        self.threads = threads
        torch.set_num_threads(threads)
        return [f"other programs take {others:.1f} of {self._cores} cores: now {threads} of {self.most} threads"]

    def _ticks(self) -> tuple[float, float] | None:
        """Clock ticks that all programs have taken so far, and this process with its children; None if unknown."""
        try:
            columns = [int(word) for word in (self._proc / "stat").read_text().split("\n", 1)[0].split()[1:]]
            parents, times = {}, {}
            for folder in self._proc.iterdir():
                if folder.name.isdigit() and (fields := _fields(folder / "stat")):
                    parents[int(folder.name)] = int(fields[1])
                    times[int(folder.name)] = sum(map(int, fields[11:15]))  # own, and of children that have ended
        except (OSError, ValueError, IndexError):
            return None
        busy = sum(ticks for column, ticks in enumerate(columns[:_GUESTS]) if column not in _IDLE)
        family = {os.getpid()}
        while new := {child for child, parent in parents.items() if parent in family} - family:
            family |= new
        return busy, sum(times.get(process, 0) for process in family)


def _fields(stat: Path) -> list[str]:
    """Fields of a process's stat after its name, which may hold blanks and brackets; none where it has just ended."""
    try:
        return stat.read_text().rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return []


def spare_cores(device: torch.device, *, processes: int, deterministic: bool) -> SpareCores:
    """For one process on the CPU, unless somebody has chosen the threads or wants sums in the same order each time.

    Not where the process is bound to some of the machine's cores: what others do on the rest is no matter to it.
    """
    chosen = "OMP_NUM_THREADS" in os.environ or deterministic
    bound = hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) < (os.cpu_count() or 1)
    may = device.type == "cpu" and processes == 1 and not chosen and not bound
    return SpareCores(torch.get_num_threads() if may else 1)
