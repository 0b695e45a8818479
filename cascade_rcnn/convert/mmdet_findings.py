"""What became of the settings of one of mmdetection's configs: refused, listed, noted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from cascade_rcnn.convert.config_text import leaves, same
from cascade_rcnn.messages import shown


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


def word(name: object) -> str:
    """The class in ``mmdet.FPN``, ``torch.nn.Linear``."""
    return str(name).rpartition(".")[2] if name is not None else ""


def same_settings(one: object, other: object) -> bool:
    """Whether two values are equal; numbers nearly."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same_settings(one[key], other[key]) for key in one)
    return same(one, other)
