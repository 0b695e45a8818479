"""Every test: no network, caches of its own, two threads, the same random numbers."""

from __future__ import annotations

import atexit
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

# Before torch, timm and the hub client are imported: they read these once. Subprocesses inherit them.
_caches = tempfile.mkdtemp(prefix="cascade-rcnn-tests-")
atexit.register(shutil.rmtree, _caches, ignore_errors=True)
for _name in ("HF_HOME", "TORCH_HOME", "XDG_CACHE_HOME"):
    os.environ[_name] = _caches
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin make tests 8 times slower on a busy machine
for _name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
    os.environ.pop(_name, None)
# A shell that starts the tests in the background has them ignore these, and their processes too.
for _signal, _usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_signal) is signal.SIG_IGN:
        signal.signal(_signal, _usual)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import cascade_rcnn  # noqa: E402

torch.set_num_threads(min(2, torch.get_num_threads()))
# The first backward decides how many devices autograd keeps threads for; after a test with stand-ins for GPU tensors it
# would count one, and processes forked from this one could not train.
torch.zeros(1, requires_grad=True).sum().backward()

RunCommand = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def run_command(tmp_path: Path) -> RunCommand:
    """Run ``cascade-rcnn WORDS`` as a process of its own in an empty folder, with the package under test."""
    package = str(Path(cascade_rcnn.__file__).resolve().parents[1])

    def run(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])
        return subprocess.run(
            [sys.executable, "-m", "cascade_rcnn", *map(str, words)],
            cwd=tmp_path,
            text=True,
            capture_output=True,
            timeout=300,
            env={**os.environ, "PYTHONPATH": path, **environment},
        )

    return run
