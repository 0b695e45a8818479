"""Where a thread handles its signals: OpenVINO moves it, for AMX, and takes the memory away when a network goes.

Its CPU plugin gives the thread that makes a network an alternate stack, and frees that stack with the plugin, in
whatever thread and order networks go. The first thread then handles its next signal (Ctrl-C, a child that ended) in
memory that is no longer there, and the process dies of a segmentation fault.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_ON_IT = 1  # SS_ONSTACK: told of a stack in use, not taken as a setting


class _Stack(ctypes.Structure):
    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))  # Linux's stack_t


@contextmanager
def signal_stack_kept() -> Iterator[None]:
    """Give this thread its own back at the end."""
    before = current()
    try:
        yield
    finally:
        if before:
            before.flags &= ~_ON_IT
            ctypes.CDLL(None).sigaltstack(ctypes.byref(before), None)


def current() -> _Stack | None:
    """This thread's alternate stack; None where OpenVINO does not touch it."""
    if sys.platform != "linux":
        return None
    stack = _Stack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack))
    return stack
