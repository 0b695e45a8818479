"""The service as a process of its own, for serve_load.py and serve_hostile.py."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path


class Service:
    """``cascade-rcnn serve`` on a free port of this machine, ended with the ``with``."""

    def __init__(self, checkpoint: str, *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self._log = tempfile.NamedTemporaryFile(prefix="serve", suffix=".log")  # noqa: SIM115  (closed by __exit__)
        self._command = [sys.executable, "-m", "cascade_rcnn", "serve", checkpoint, "--port", str(self.port), *options]

    def start(self) -> float:
        """Seconds until ``/ready`` answers 200."""
        root = str(Path(__file__).resolve().parents[1])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
        began = time.perf_counter()
        self.process = subprocess.Popen(self._command, env=environment, stdout=self._log, stderr=self._log)
        while self.process.poll() is None and time.perf_counter() - began < 120:
            try:
                with urllib.request.urlopen(f"{self.address}/ready", timeout=5):
                    return time.perf_counter() - began
            except (urllib.error.URLError, OSError):
                time.sleep(0.05)
        raise SystemExit(f"the service does not start: {self.log().decode(errors='replace')[-2000:]}")

    def end(self, by: signal.Signals) -> float:
        """Seconds until the process has ended after a signal."""
        began = time.perf_counter()
        self.process.send_signal(by)
        self.process.wait(60)
        return time.perf_counter() - began

    def memory(self, line: str = "VmRSS") -> float:
        """Resident memory in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return next(int(row.split()[1]) for row in status.splitlines() if row.startswith(line)) / 1e3

    def peak(self) -> float:
        """The most memory it has had, in MB."""
        return self.memory("VmHWM")

    def log(self) -> bytes:
        """What it has printed."""
        return Path(self._log.name).read_bytes()

    def __enter__(self) -> Service:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._log.close()
