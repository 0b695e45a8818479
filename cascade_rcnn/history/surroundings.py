"""Where a run took place: versions, device, command line, commit; and which data it saw."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

from cascade_rcnn import __version__
from cascade_rcnn.data.records import DataSplit
from cascade_rcnn.history.read_run import Record
from cascade_rcnn.models.ops.capabilities import processor_name

_PACKAGES = ("torch", "torchvision", "timm", "numpy", "faster-coco-eval")


def describe_start(step: int, *, device: torch.device, processes: int) -> Record:
    """What is to be remembered of a start, or a resumption at ``step``."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "step": step,
        "command": command_line(sys.argv),
        "git": git_commit(Path.cwd()),
        "device": describe_device(device),
        "processes": processes,
        "system": platform.platform(),
        "versions": {
            "cascade-rcnn": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def command_line(words: list[str]) -> str:
    """As it would be typed; a module or script by its short name."""
    program = Path(words[0] if words else "python").name
    program = "cascade-rcnn" if program in ("__main__.py", "cascade-rcnn", "cascade-rcnn.exe") else program
    return shlex.join([program, *words[1:]])


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        return f"{about.name}, {about.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"
    threads = torch.get_num_threads()
    return f"{processor_name()}, {threads} {'thread' if threads == 1 else 'threads'}"


def git_commit(folder: Path) -> str | None:
    """The commit of the folder's checkout, and whether tracked files differ from it; None where there is none."""
    try:
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):  # no git, no checkout, or one so large that it takes too long
        return None
    return f"{commit} with changes" if changed else commit


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-c", "core.fsmonitor=false", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=3, check=True).stdout.strip()


def describe_split(split: DataSplit, *, exactly: bool) -> Record:
    """Which images and objects; ``exactly`` with a digest that two equal splits share, wherever they lie."""
    about: Record = {
        "root": str(split.root),
        "split": split.name,
        "images": len(split),
        "objects": sum(len(record.boxes) for record in split.records),
        "classes": list(split.class_names),
    }
    if exactly:
        digest = hashlib.sha256("\n".join(split.class_names).encode())
        for record in sorted(split.records, key=lambda one: one.file_name):
            digest.update(record.file_name.encode("utf-8", "surrogateescape"))
            digest.update(record.boxes.tobytes() + record.labels.tobytes() + record.ignore.tobytes())
        about["digest"] = digest.hexdigest()[:16]
    return about
