"""Values of mmdetection's configs as what they are meant to be: dictionaries, lists, numbers, True and False."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cascade_rcnn.convert.config_syntax import UNREAD

SYNCED = ("SyncBN", "MMSyncBN", "NaiveSyncBN")


def leaves(value: object, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every setting; the stages of a list share their path."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
        for item in value:
            yield from leaves(item, path)
    else:
        yield path, value


def same(value: object, expected: object) -> bool:
    if isinstance(value, (list, tuple)) and isinstance(expected, list):
        return len(value) == len(expected) and all(same(a, b) for a, b in zip(value, expected))
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(value, (int, float)) and isinstance(expected, (int, float)):
        return abs(value - expected) <= 1e-6 * max(1e-3, abs(expected))
    return value == expected


def as_dict(value: object) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def as_list(value: object) -> list[Any]:
    if value is None or value is UNREAD:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def word(name: object) -> str:
    """The class in ``mmdet.FPN``, ``torch.nn.Linear``."""
    return str(name).rpartition(".")[2] if name is not None else ""


def whole(value: object) -> int | None:
    """A whole number, also one that is written as 2.0; None for anything else."""
    is_whole = type(value) is int or (isinstance(value, float) and value.is_integer())
    return int(value) if is_whole else None  # type: ignore[call-overload, no-any-return]


def number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def flag(value: object) -> bool | None:
    """True and False, also as 1 and 0; None for anything else."""
    return bool(value) if isinstance(value, (int, float)) and value in (0, 1) else None


def numbers(value: object) -> tuple[float, ...]:
    items = value if isinstance(value, (list, tuple)) else ()
    if not all(isinstance(item, (int, float)) and not isinstance(item, bool) for item in items):
        return ()
    return tuple(float(item) for item in items)
