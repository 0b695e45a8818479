"""What a run leaves for whoever looks back on it: ``run.json``, ``curves.json``, ``summary.html``.

None of it is needed to go on, so a failure is reported once and never ends a training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cascade_rcnn.analysis.figures import has_matplotlib
from cascade_rcnn.analysis.measure import measure_curves
from cascade_rcnn.analysis.scenes import read_found, read_truth
from cascade_rcnn.atomic_files import write_json
from cascade_rcnn.config import Config
from cascade_rcnn.data.records import DataSplit
from cascade_rcnn.distributed import World
from cascade_rcnn.evaluation.coco import coco_truth
from cascade_rcnn.history.read_run import ABOUT, CURVES, Record, read_object
from cascade_rcnn.history.summary import WITHOUT_PLOTS, write_summary
from cascade_rcnn.history.surroundings import describe_split, describe_start
from cascade_rcnn.messages import one_line, printable
from cascade_rcnn.training.random_state import undisturbed_generators

_APART = 20  # pages of a run under way, in times that one takes; the first after so many seconds


class LookBack:
    """Writes those files for the run folder ``out``; nothing unless ``active``, as one process of a run is."""

    def __init__(self, out: Path, *, active: bool, say: Callable[[str], None]) -> None:
        self._out, self._active, self._say = out, active, say
        self._about: Record = {}
        self._not_before = time.monotonic() + _APART  # the next page

    def begin(self, step: int, total: int, *, world: World, train: DataSplit, validation: DataSplit | None) -> None:
        """A start, or a resumption after ``step``."""
        with self._reported(ABOUT) as active:
            if not active:
                return
            before = (read_object(self._out / ABOUT) or {}) if step else {}
            start = describe_start(step, device=world.device, processes=world.size)
            self._about = {
                "total_steps": total,
                "state": "running",
                "train": describe_split(train, exactly=False),
                "val": describe_split(validation, exactly=True) if validation else None,
                "starts": [*before.get("starts", []), start],
            }
            write_json(self._out / ABOUT, self._about)

    def curves(self, results: list[dict[str, Any]], split: DataSplit, config: Config) -> Record | None:
        """Curves and confusions of an evaluation, for ``keep_curves`` if it is the best; None without objects."""
        if not self._active or not any((~record.ignore).any() for record in split.records):
            return None
        curves: Record = {}
        with self._reported(CURVES):
            truth = read_truth(coco_truth(split))
            limit = max(100, config.model.max_detections)
            curves |= measure_curves(truth, read_found(results, truth, limit=limit, may_be_empty=True))
        return curves or None

    def keep_curves(self, step: int, curves: Record) -> None:
        with self._reported(CURVES) as active:
            if active:
                write_json(self._out / CURVES, {"step": step, **curves})

    def write(self, state: str = "") -> None:
        """Write the page; with a ``state`` the run has ended in ("finished", "stopped by SIGTERM"), say where.

        Of a run that goes on, only as often as that takes a twentieth of its time.
        """
        began = time.monotonic()
        with self._reported("summary.html") as active:
            if not active or (not state and began < self._not_before):
                return
            if state and self._about:
                self._about["state"] = state
                write_json(self._out / ABOUT, self._about)
            with undisturbed_generators(torch.device("cpu")):
                path = write_summary(self._out)
            self._not_before = time.monotonic() + _APART * (time.monotonic() - began)
            if state:
                self._say(f"summary: {printable(path)}" + ("" if has_matplotlib() else f" ({WITHOUT_PLOTS})"))

    @contextmanager
    def _reported(self, name: str) -> Iterator[bool]:
        """Whether to do the work; an error in it becomes a line, and is the end of all such work."""
        try:
            yield self._active
        except Exception as error:  # a full disk, a file changed by others, a drawing package that fails
            self._active = False
            reason = f"{type(error).__name__}: {one_line(error)}"
            self._say(f"{name} cannot be written: {reason}; the training goes on without it")
