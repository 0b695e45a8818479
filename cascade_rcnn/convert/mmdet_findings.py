"""What became of the settings of one of mmdetection's configs: refused, listed, noted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from cascade_rcnn.convert.config_values import flag, leaves, number, same, whole
from cascade_rcnn.messages import shown

ANY: tuple[Any, ...] = ()  # among the settings of a step or part: no value is refused


@dataclass
class Findings:
    """``refused``: changes what a training gives; ``left_out``: not taken over; ``notes``: what to look at."""

    refused: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def refuse(self, path: str, value: object, here: str = "") -> None:
        said = f"{path} = {shown(value)}" + (f" (here {here})" if here else "")
        if said not in self.refused:
            self.refused.append(said)

    def expect(self, value: object, path: str, *expected: object) -> None:
        """Refuse a value that is none of ``expected``."""
        if not any(same(value, item) for item in expected):
            self.refuse(path, value, shown(expected[0]))

    def whole(self, value: object, path: str, *, least: int) -> int:
        """A whole number; refuses others, and gives ``least`` beside a refusal."""
        read = whole(value)
        if read is None or read < least:
            self.refuse(path, value, f"a whole number of at least {least}")
            return least
        return read

    def number(self, value: object, path: str) -> float:
        """A number of at least 0; refuses others, and gives 0 beside a refusal."""
        read = number(value)
        if read is None or read < 0:
            self.refuse(path, value, "a number of at least 0")
            return 0.0
        return read

    def flag(self, value: object, path: str) -> bool:
        """True or False; refuses what is neither (nor 1 nor 0), and gives False beside a refusal."""
        read = flag(value)
        if read is None:
            self.refuse(path, value, "True or False")
        return bool(read)

    def check(self, part: Mapping[str, Any], path: str, known: Mapping[str, tuple[Any, ...]]) -> None:
        """Refuse settings of ``part`` that are not known, or have a value that is not listed (``()``: any)."""
        for key, value in part.items():
            if key == "type":
                continue
            if key not in known:
                self.refuse(f"{path}.{key}", value)
            elif known[key] and not any(same(value, item) for item in known[key]):
                self.refuse(f"{path}.{key}", value, shown(known[key][0]))

    @staticmethod
    def leaves(value: object) -> Iterator[tuple[str, Any]]:
        """(path, value) of every setting."""
        return leaves(value)


def same_settings(one: object, other: object) -> bool:
    """Whether two values are equal; numbers nearly."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same_settings(one[key], other[key]) for key in one)
    return same(one, other)
