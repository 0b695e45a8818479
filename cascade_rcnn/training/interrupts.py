"""Signals during training, and a watchdog for steps that hang.

SIGINT, SIGTERM and SIGHUP during training: finish the step, save, exit; or stop immediately where nothing can be lost.
Exit codes are the shell's: 128 plus the number of the signal, so 130 for Ctrl-C and 143 for SIGTERM.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

_SIGNALS = tuple(number for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", None)) if number)


# torchrun passes a Ctrl-C on to its workers, which have already received it from the terminal
_IMPATIENT_AFTER = 1.0


class Watchdog:
    """Reports a step that takes too long: which rank, which step, which images, and where in the program.

    A rank that hangs makes all others wait for it until the process group's timeout kills the job without a reason.
    Every late rank reports what it is doing before that: the culprit is the one that is not waiting for others.
    """

    def __init__(self, minutes: float, *, rank: int = 0) -> None:
        self._limit, self._rank = minutes * 60, rank
        self._what, self._since, self._reported = "", time.monotonic(), True
        self._done = threading.Event()
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._limit > 0:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def now(self, what: str) -> None:
        """Start something that should end within the limit; costs one assignment."""
        self._what, self._since, self._reported = what, time.monotonic(), False

    def pause(self) -> None:
        """Pause the watch: an evaluation may take as long as it needs."""
        self._reported = True

    def _watch(self) -> None:
        while not self._done.wait(min(30.0, self._limit / 4)):
            seconds = time.monotonic() - self._since
            if not self._reported and seconds > self._limit:
                self._reported = True
                self._report(seconds)

    def _report(self, seconds: float) -> None:
        frame = sys._current_frames().get(self._main or 0)
        stack = traceback.extract_stack(frame)[-4:] if frame else []
        places = " < ".join(
            f"{place.name} ({os.path.basename(place.filename)}:{place.lineno})"  # noqa: PTH119
            for place in reversed(stack)
        )
        print(
            f"stalled: rank {self._rank} for {seconds / 60:.1f} minutes in {self._what}; at {places}",
            file=sys.stderr,
            flush=True,
        )


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
        """A section that may be interrupted anywhere (waiting for data, evaluating): a signal raises StopNow in it.

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
        """Kill the loader processes started in this context; they hold nothing that needs saving."""
        started = [child for child in multiprocessing.active_children() if child not in self._children]
        for child in started:
            child.kill()
        for child in started:
            child.join(timeout=2)

    def keep_worker_deaths_quiet(self) -> None:
        """Replace PyTorch's SIGCHLD handler, which raises at any point of the program when a loader process dies.

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
                name = signal.Signals(number).name
                os.write(2, f"\n{name}: stopping when all is saved; Ctrl-C again stops without saving\n".encode())
        if self._immediate:
            self._immediate = False
            raise StopNow
