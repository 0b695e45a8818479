"""Calls recorded as CUDA graphs: one launch replaces the thousand of a prediction, which cost more than the work.

A recording holds addresses, so inputs are copied to where it reads and results from where it writes. It is made when a
call comes for the third time with inputs of the same shapes: the first compiles kernels, and torch's own compiler may
settle in the second. All recordings share their memory, which no two of them use at a time.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from cascade_rcnn.structures import ImageBatch, RawDetections

RECORD_AT = 3  # which call of the same kind is recorded
MOST = 32  # recordings that are kept, the last used ones

_Detect = Callable[[ImageBatch], RawDetections]


@dataclass
class _Recording:
    graph: Any
    inputs: ImageBatch
    outputs: RawDetections

    def replay(self, images: ImageBatch) -> RawDetections:
        for place, value in zip(self.inputs.tensors(), images.tensors()):
            place.copy_(value, non_blocking=True)
        self.graph.replay()
        return self.outputs._map(torch.clone)


class Recorder:
    """Runs a function of an image batch on a GPU; from the third call with the same shapes, replays a recording.

    ``settings`` is whatever else the function's course depends on. A call that cannot be recorded (memory, an operation
    that waits) is reported in one line on stderr and runs as before. Threads take turns.
    """

    def __init__(self) -> None:
        self._calls: Counter[Hashable] = Counter()
        self._recordings: OrderedDict[Hashable, _Recording | None] = OrderedDict()
        self._lock = threading.Lock()
        self._pool: Any = None
        self._done: Any = None  # an event behind the last use of the recordings' memory

    def __reduce__(self) -> tuple[type[Recorder], tuple[()]]:
        return Recorder, ()  # a copy, or another process, records for itself

    def clear(self) -> None:
        """Drop all recordings: the weights have moved."""
        with self._lock:
            self._calls.clear()
            self._recordings.clear()
            self._pool = self._done = None

    def __call__(self, function: _Detect, images: ImageBatch, settings: Hashable) -> RawDetections:
        shapes = tuple((tensor.shape, tensor.dtype, tensor.stride()) for tensor in images.tensors())
        key = (shapes, settings, _modes())
        with self._lock, torch.cuda.device(images.pixels.device):
            if self._is_due(key):
                self._recordings[key] = self._record(function, images)
                if len(self._recordings) > MOST:
                    self._recordings.popitem(last=False)
            recording = self._recordings.get(key)
            if recording is not None:
                self._recordings.move_to_end(key)
                return self._replay(recording, images)
        return function(images)

    def _is_due(self, key: Hashable) -> bool:
        self._calls[key] += 1
        return self._calls[key] >= RECORD_AT and key not in self._recordings

    def _replay(self, recording: _Recording, images: ImageBatch) -> RawDetections:
        stream = torch.cuda.current_stream()
        if self._done is not None:
            stream.wait_event(self._done)  # another thread's stream may still use the memory
        found = recording.replay(images)
        self._done = stream.record_event()
        return found

    def _record(self, function: _Detect, images: ImageBatch) -> _Recording | None:
        with torch.inference_mode(False), torch.no_grad():  # or they could only be filled in inference mode
            inputs = images._map(torch.clone)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may go on with their own work, such as laying out the next batch.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = function(inputs)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:150]
            print(f"no CUDA graph of this prediction, it goes on without: {reason}", file=sys.stderr)
            _leave_recording()
            return None
        return _Recording(graph, inputs, outputs)


def _leave_recording() -> None:
    """After a failed recording, torch's random generator still waits for its end: a small recording ends it."""
    with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
        torch.zeros(1, device="cuda")


def _modes() -> Hashable:
    """What torch's operations depend on besides their inputs."""
    autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    return autocast, tf32, torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled()
