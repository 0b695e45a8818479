"""The progress bar of long work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def steps_bar(step: int, total: int) -> tuple[Any, Any]:
    """The bar of a training, at ``step`` of ``total``, and the task in it; running already."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        MofNCompleteColumn(), BarColumn(bar_width=20), TimeRemainingColumn(), TextColumn("{task.fields[numbers]}")
    )
    bar.start()
    return bar, bar.add_task("steps", total=total, completed=step, numbers="")


@contextmanager
def progress_bar(total: int, what: str = "images", *, show: bool = True) -> Iterator[Callable[[int], None]]:
    """Gives a function that moves the bar on by so many; ``total`` 0 means unknown. On stderr, gone when it is done."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:  # an exported network runs without it
        yield lambda count: None
        return
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not show or not console.is_terminal) as bar:
        task = bar.add_task(what, total=total or None)
        yield lambda count: bar.advance(task, count)
