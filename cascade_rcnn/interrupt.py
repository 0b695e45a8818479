"""SIGINT, SIGTERM and SIGHUP during training: finish the step, save, exit; or stop at once where nothing can be lost.

Exit codes are the shell's: 128 plus the number of the signal, so 130 for Ctrl-C and 143 for SIGTERM.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

_SIGNALS = tuple(number for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", None)) if number)
# torchrun passes a Ctrl-C on to its workers, which have already received it from the terminal
_IMPATIENT_AFTER = 1.0


class TrainingInterrupted(SystemExit):
    """A signal has stopped the training after its state was saved; ``code`` is 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number).name


class StopNow(BaseException):
    """Raised by the signal itself inside ``Interrupts.at_once``; no ``except Exception`` swallows it."""


class Interrupts:
    """Context in which the signals set ``pending`` instead of ending the program.

    A second Ctrl-C, a second or more after the first, ends the program without saving.
    Outside the main thread, where Python allows no signal handlers, nothing is changed and nothing becomes pending.
    """

    def __init__(self) -> None:
        self.pending = 0  # number of the signal that came, 0 for none
        self._immediate = False
        self._since = 0.0
        self._process = os.getpid()
        self._children = set(multiprocessing.active_children())
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup stays nohup
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A stretch that may be broken off anywhere (waiting for data, evaluating): a signal raises StopNow in it.

        Errors of loader workers that received the signal before us count as the signal.
        """
        if self.pending:
            raise StopNow
        self._immediate = True
        try:
            yield
        except Exception:
            if self._arrives_late():
                raise StopNow from None
            raise
        finally:
            self._immediate = False

    def end_children(self) -> None:
        """Kill the loader processes that were started in this context; they hold nothing that needs saving."""
        started = [child for child in multiprocessing.active_children() if child not in self._children]
        for child in started:
            child.kill()
        for child in started:
            child.join(timeout=2)

    def keep_worker_deaths_quiet(self) -> None:
        """Replace PyTorch's SIGCHLD handler, which raises wherever the program stands when a loader process dies.

        A cluster that stops a job signals all its processes; an error in the middle of an optimizer step would leave
        half-updated weights. The loader itself still notices a dead worker when it waits for it.
        """
        child = getattr(signal, "SIGCHLD", None)
        if child is not None and threading.current_thread() is threading.main_thread():
            before = signal.signal(child, signal.SIG_DFL)
            if before != signal.SIG_DFL:
                self._before[child] = before

    def _arrives_late(self) -> bool:
        """Whether a signal is pending, or comes within half a second (a whole process group is being stopped)."""
        self._immediate = False
        deadline = time.monotonic() + 0.5
        while not self.pending and time.monotonic() < deadline:
            time.sleep(0.02)
        return bool(self.pending)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a loader process just forked: its parent ends it
        now = time.monotonic()
        if self.pending and number == signal.SIGINT and now - self._since > _IMPATIENT_AFTER:
            self.end_children()
            os._exit(128 + number)
        if not self.pending:
            self.pending, self._since = number, now
            with suppress(OSError):
                os.write(2, f"\n{signal.Signals(number).name}: saving, then stopping; Ctrl-C stops without saving\n"
                         .encode())
        if self._immediate:
            self._immediate = False
            raise StopNow
