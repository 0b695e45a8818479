"""What a run folder tells of its training: settings, logged steps, evaluations, curves, and where it ran."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade_rcnn.config import Config
from cascade_rcnn.errors import UserError
from cascade_rcnn.messages import one_line, printable
from cascade_rcnn.recipes import load_config

CONFIG, LOG, METRICS = "config.json", "log.jsonl", "metrics.jsonl"
ABOUT, CURVES = "run.json", "curves.json"
Record = dict[str, Any]


@dataclass(frozen=True)
class RunHistory:
    """A run as its folder tells it."""

    folder: Path
    config: Config
    steps: list[Record]  # log.jsonl
    evaluations: list[Record]  # metrics.jsonl
    about: Record  # run.json: data, starts, end; empty for runs of versions without it
    curves: Record | None  # curves.json: what ``analysis.measure.measure_curves`` gives, of the best evaluation

    @property
    def name(self) -> str:
        return printable(self.folder.resolve().name or self.folder)

    @property
    def step(self) -> int:
        """The last step that something is known of."""
        return max((int(one["step"]) for one in (*self.steps, *self.evaluations)), default=0)

    @property
    def seconds(self) -> float | None:
        """Training and evaluations together, without the time between a stop and its resumption."""
        return max((one["elapsed_s"] for one in (*self.steps, *self.evaluations) if "elapsed_s" in one), default=None)

    @property
    def finished(self) -> bool:
        """Whether the training came to its end. A run without run.json is asked for the time its last line had left."""
        if self.about:
            return bool(self.about.get("state") == "finished")
        return bool(self.steps) and self.steps[-1].get("eta_s") == 0

    def best(self) -> Record | None:
        """The best evaluation, by the metric that best.safetensors is chosen by."""
        for key in ("segm/AP", "bbox/AP"):
            measured = [one for one in self.evaluations if one.get(key) is not None]
            if measured:
                return max(measured, key=lambda one: one[key])  # the first of equal ones
        return None

    def series(self, key: str, *, of: str = "steps") -> tuple[list[float], list[float | None]]:
        """Epochs, and the values logged under ``key`` (of "steps" or "evaluations"), thinned to a page's resolution."""
        records = self.steps if of == "steps" else self.evaluations
        known = [one for one in records if key in one]
        return _thinned([float(one["epoch" if "epoch" in one else "step"]) for one in known], [o[key] for o in known])

    def median(self, key: str) -> float | None:
        """The middle of the values logged under ``key``."""
        values = sorted(one[key] for one in self.steps if one.get(key) is not None)
        return values[len(values) // 2] if values else None

    def last(self, key: str, *, of: str = "steps") -> float | None:
        records = self.steps if of == "steps" else self.evaluations
        return next((one[key] for one in reversed(records) if one.get(key) is not None), None)


def read_run(folder: Path) -> RunHistory:
    """What is in a run folder. Raises UserError: no folder of a run, or a file in it that cannot be read."""
    if not folder.is_dir():
        raise UserError(f"{printable(folder)}: no such folder; give the --out of a training")
    if not (folder / CONFIG).is_file():
        raise UserError(f"{printable(folder)}: is no run ({CONFIG} is missing); give the --out of a training")
    return RunHistory(
        folder=folder,
        config=load_config(folder),
        steps=read_lines(folder / LOG),
        evaluations=read_lines(folder / METRICS),
        about=read_object(folder / ABOUT) or {},
        curves=read_object(folder / CURVES),
    )


def read_lines(path: Path) -> list[Record]:
    """The objects of a file of lines; a line that a killed process left unfinished is left out."""
    if not path.is_file():
        return []
    records = []
    for line in _text(path).splitlines():
        try:
            record = json.loads(line)
            record["step"] = int(record["step"])
        except (ValueError, KeyError, TypeError):
            continue
        records.append(record)
    return records


def read_object(path: Path) -> Record | None:
    """A file of one object; None where there is none."""
    if not path.is_file():
        return None
    try:
        value = json.loads(_text(path))
    except ValueError as error:
        raise UserError(f"{printable(path)}: is no JSON ({one_line(error)}); delete it to go without") from None
    if not isinstance(value, dict):
        raise UserError(f"{printable(path)}: is not what a training writes; delete it to go without")
    return value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{printable(path)}: cannot be read ({one_line(error)}); make it readable") from None


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``("train.lr", 0.02)`` and so on of a configuration's nested dictionaries."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def changed_settings(config: Config) -> dict[str, tuple[str, str]]:
    """The settings that differ from the defaults: name to (value, default)."""
    defaults = dict(flat(Config().to_dict()))
    values = dict(flat(config.to_dict()))
    return {
        key: (setting(value), setting(defaults[key]))
        for key, value in values.items()
        if setting(value) != setting(defaults[key])
    }


def setting(value: Any) -> str:
    """A setting as the command line takes it."""
    if isinstance(value, (list, tuple)):
        return " ".join(setting(one) for one in value) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None or value == "" else str(value)


def _thinned(xs: list[float], ys: list[float | None], most: int = 300) -> tuple[list[float], list[float | None]]:
    """At most ``most`` points, each the mean of neighbours."""
    apart = -(-len(xs) // most)
    if apart <= 1:
        return xs, ys
    means: list[float | None] = []
    for start in range(0, len(ys), apart):
        known = [value for value in ys[start : start + apart] if value is not None]
        means.append(sum(known) / len(known) if known else None)
    return [sum(part) / len(part) for part in (xs[s : s + apart] for s in range(0, len(xs), apart))], means
