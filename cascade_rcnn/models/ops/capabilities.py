"""What can run now: Triton kernels, bfloat16 on the processor, or torch operations alone while a compiler traces."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import shutil
from pathlib import Path

import torch

_BFLOAT16_UNITS = ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16")  # torch's names, x86 and ARM
_INT8_UNITS = ("avx512_vnni", "avx_vnni", "amx_int8", "dot", "i8mm")


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
    if not hasattr(torch.compiler, "is_exporting"):  # before torch 2.7
        return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()


@functools.cache
def has_bfloat16_units() -> bool:
    """Whether this machine's processor multiplies bfloat16 itself. Without, float32 is faster than bfloat16."""
    if hasattr(torch.cpu, "get_capabilities"):
        known = torch.cpu.get_capabilities()
        return any(known.get(name) is True for name in _BFLOAT16_UNITS)
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # older than torch 2.11
    return any(getattr(torch.cpu, name, lambda: False)() for name in asked)


@functools.cache
def has_int8_units() -> bool:
    """Whether the processor multiplies 8-bit integers four at a time (VNNI, AMX, ARM's dot products)."""
    if hasattr(torch.cpu, "get_capabilities"):
        known = torch.cpu.get_capabilities()
        return any(known.get(name) is True for name in _INT8_UNITS)
    return bool(getattr(torch.cpu, "_is_vnni_supported", lambda: False)())


def processor_name() -> str:
    """The processor as its maker calls it, or at least its architecture."""
    known = Path("/proc/cpuinfo")
    if known.is_file():
        for line in known.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def followed() -> bool:
    """Whether torch's compiler or an exporter is tracing: it would not see a kernel or a recorded graph."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
