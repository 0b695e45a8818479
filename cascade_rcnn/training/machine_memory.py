"""How much memory this machine, or the container that a process runs in, has for it."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path


def machine_memory(root: Path = Path("/")) -> float | None:
    """GB for each of the processes that torchrun started here; None where the system does not say.

    The machine's, or the least limit of the control groups that this process is in: a container's, a batch job's.
    ``root`` is where ``proc`` and ``sys`` are mounted.
    """
    found = [_physical(), *_control_group_limits(root)]
    known = [size for size in found if size is not None and size > 0]
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return min(known) / 1e9 / (int(processes) if processes.isdecimal() else 1) if known else None


def _physical() -> int | None:
    if sys.platform == "win32":  # pragma: no cover
        return _physical_of_windows()
    with suppress(ValueError, OSError, AttributeError):  # Linux and macOS have both names
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _physical_of_windows() -> int | None:  # pragma: no cover
    class MemoryStatus(ctypes.Structure):  # MEMORYSTATUSEX
        _fields_ = (
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *(
                (name, ctypes.c_ulonglong)
                for name in ("total", "free", "pages", "pages_free", "virtual", "virtual_free")
            ),
            ("extended", ctypes.c_ulonglong),
        )

    status = MemoryStatus(length=ctypes.sizeof(MemoryStatus))
    done = ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined,unused-ignore]
    return int(status.total) if done else None


def _control_group_limits(root: Path) -> list[int]:
    """Limits in bytes of this process's control groups and those above them, of version 2 and of version 1."""
    files = []
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            base, name = (
                ("sys/fs/cgroup/memory", "memory.limit_in_bytes") if controllers else ("sys/fs/cgroup", "memory.max")
            )
            within = Path(group.lstrip("/"))
            files += [root / base / part / name for part in (within, *within.parents)]
    limits = []
    for file in files:
        with suppress(OSError, ValueError):  # "max": none
            limits.append(int(file.read_text()))
    return limits
