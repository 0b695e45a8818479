"""Kernels run by Triton's interpreter, in a process of its own: Triton decides to interpret when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import locations


def interpreted_results(script: str, folder: Path) -> Any:
    """What ``script``, run with Triton's interpreter, saves into the file that it is given."""
    out = folder / "results.pt"
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": f"{locations.REPOSITORY}{os.pathsep}{locations.TESTS / 'support'}",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, script, str(out)], env=environment, capture_output=True, text=True, timeout=300
    )
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("this Triton's interpreter does not know NumPy 2.4's rules: upgrade triton, or numpy<2.4")
    assert done.returncode == 0, done.stderr
    return torch.load(out)
