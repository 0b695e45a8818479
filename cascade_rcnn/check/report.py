"""What a check found, as text for people and as JSON for the cache and for scripts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from cascade_rcnn.data.problems import KINDS, Problem
from cascade_rcnn.messages import printable

_ORDER = {"error": 0, "warning": 1, "note": 2}
_COLOR = {"error": "bold red", "warning": "yellow", "note": "cyan"}
_EXAMPLES = 3


@dataclass
class Report:
    """The findings of one check."""

    root: str
    format: str
    splits: list[str] = field(default_factory=list)  # one line of description each
    problems: list[Problem] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """How many problems of each kind, the severest kinds first, then the most frequent."""
        numbers: dict[str, int] = {}
        for problem in self.problems:
            numbers[problem.kind] = numbers.get(problem.kind, 0) + 1
        return dict(sorted(numbers.items(), key=lambda item: (_ORDER[KINDS[item[0]].severity], -item[1], item[0])))

    def of(self, kind: str) -> list[Problem]:
        """The problems of one kind."""
        return [problem for problem in self.problems if problem.kind == kind]

    @property
    def refusals(self) -> list[Problem]:
        """Problems that keep a training from starting."""
        return [problem for problem in self.problems if KINDS[problem.kind].refuses]

    def has(self, severity: str) -> bool:
        """Whether a kind of that severity was found."""
        return any(KINDS[kind].severity == severity for kind in self.counts)

    def summary(self) -> str:
        """One line: how many kinds of errors, warnings and notes."""
        found = [KINDS[kind].severity for kind in self.counts]
        parts = [
            f"{found.count(word)} kind{'s' * (found.count(word) != 1)} of {word}s" for word in _ORDER if word in found
        ]
        return f"{self.root}: " + (", ".join(parts) if parts else "nothing wrong found")

    def show(self, console: Console | None = None, *, least: str = "note") -> None:
        """Prints the report; ``least`` leaves out what is less severe."""
        console = console or Console(soft_wrap=True, highlight=False)
        console.print(Text(f"{self.root}: {self.format} format", style="bold"))
        for line in self.splits:
            console.print(Text(f"  {line}"))
        for kind, number in self.counts.items():
            row = KINDS[kind]
            if _ORDER[row.severity] > _ORDER[least]:
                continue
            head = Text(f"{row.severity:<8}", style=_COLOR[row.severity])
            console.print(head.append(f"{number:>6,} x {kind}: {row.title}", style="default"))
            for problem in self.of(kind)[:_EXAMPLES]:
                console.print(Text(f"           {printable(problem.where)}: {printable(problem.message)}", style="dim"))
            if number > _EXAMPLES:
                console.print(Text(f"           and {number - _EXAMPLES:,} more", style="dim"))
            console.print(Text(f"           what to do: {row.advice}"))
        console.print(Text(self.summary(), style="bold"))

    def to_dict(self) -> dict[str, Any]:
        """For JSON: description, counts per kind with severity and advice, every problem."""
        return {
            "root": self.root,
            "format": self.format,
            "splits": self.splits,
            "counts": {
                kind: {
                    "count": number,
                    "severity": KINDS[kind].severity,
                    "title": KINDS[kind].title,
                    "advice": KINDS[kind].advice,
                }
                for kind, number in self.counts.items()
            },
            "problems": [
                {key: printable(value) for key, value in asdict(problem).items()} for problem in self.problems
            ],
        }

    @staticmethod
    def from_dict(content: dict[str, Any]) -> Report:
        """The inverse of ``to_dict``."""
        return Report(
            content["root"],
            content["format"],
            list(content["splits"]),
            [Problem(**problem) for problem in content["problems"]],
        )


def new_report(root: Path, format_name: str) -> Report:
    return Report(printable(root), format_name)
