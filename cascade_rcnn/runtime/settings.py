"""Numbers that ``load`` and ``predict`` take, with torch and without."""

from __future__ import annotations

import math
import numbers
import os
from typing import Any

from cascade_rcnn.errors import UserError
from cascade_rcnn.messages import shown


def checked_number(name: str, value: object, *, low: float, high: float = math.inf, whole: bool = False) -> None:
    """Refuse what is no number, or none from ``low`` to ``high``; None stands for "as it is".

    Raises:
        UserError: in one line, with the value.
    """
    kinds: tuple[Any, ...] = (numbers.Integral,) if whole else (numbers.Real,)
    number: Any = value
    if value is None or (type(value) is not bool and isinstance(number, kinds) and low <= number <= high):
        return
    limits = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
    per_cent = high == 1 and type(value) in (int, float) and 1 < number <= 100
    hint = f"; for {value} per cent write {number / 100:g}" if per_cent else ""
    raise UserError(f"{name} {shown(value)}: give a {'whole ' if whole else ''}number {limits}{hint}")


def check_path(path: object) -> None:
    """The first argument of ``load``. Raises UserError: neither a path nor a name."""
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"path {shown(path)}: give the path of a checkpoint or an export, or a name")


def check_model_settings(model: dict[str, Any], max_pixels: int | None) -> None:
    """``score_threshold``, ``max_detections`` and ``stop_after_stage`` of ``load``. Raises UserError."""
    checked_number("score_threshold", model["score_threshold"], low=0, high=1)
    checked_number("max_detections", model["max_detections"], low=1, whole=True)
    checked_number("stop_after_stage", model["stop_after_stage"], low=0, whole=True)
    checked_number("max_pixels", max_pixels, low=1, whole=True)
