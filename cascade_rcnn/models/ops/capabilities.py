"""What can run now: Triton kernels on this machine, or only torch operations while a compiler or exporter traces."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil

import torch


@functools.cache
def triton_problem() -> str:
    """Why the kernels of ``*_triton.py`` cannot run on this machine's GPU; empty where they can.

    Triton builds the code that starts a kernel with the machine's C compiler, found as here.
    """
    if importlib.util.find_spec("triton") is None:
        return "the package triton is missing"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton finds no C compiler: install gcc"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (7, 0):
        return "Triton needs a GPU of compute capability 7.0"
    return ""


def has_triton() -> bool:
    """Whether the kernels of ``*_triton.py`` can be used on a GPU."""
    return not triton_problem()


def exporting() -> bool:
    """Whether an exporter is tracing: no value may decide a shape, except through operators it knows."""
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()


def followed() -> bool:
    """Whether torch's compiler or an exporter is tracing: it would not see a kernel or a recorded graph."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
