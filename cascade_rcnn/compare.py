"""Runs beside each other, as a table and as a page with their curves.

cascade-rcnn compare runs/a runs/b --out compare.html
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cascade_rcnn.analysis.figures import has_matplotlib
from cascade_rcnn.atomic_files import clear_failure, replace_file
from cascade_rcnn.errors import UserError
from cascade_rcnn.history.compare import Comparison, compare, render
from cascade_rcnn.history.read_run import RunHistory, read_run
from cascade_rcnn.history.summary import WITHOUT_PLOTS
from cascade_rcnn.messages import printable


def run_compare(folders: Sequence[Path], *, out: Path = Path("compare.html")) -> Comparison:
    """The command ``compare``: prints the table, and writes the page ``out``.

    Raises:
        UserError: a folder that is no run or has logged nothing yet, one named twice; a page that cannot be written.
    """
    if out.is_dir():
        raise UserError(f"{printable(out)}: is a folder; give a file as --out")
    runs = [_read(folder) for folder in folders]
    places = [run.folder.resolve() for run in runs]
    twice = next((run for row, run in enumerate(runs) if places[row] in places[:row]), None)
    if twice is not None:
        raise UserError(f"{printable(twice.folder)}: named twice; give different runs")
    found = compare(runs)
    _print(found)
    text = render(runs, found)
    with clear_failure(out):
        replace_file(out, lambda temporary: _write_text(temporary, text))
    print(f"curves: {printable(out)}" + ("" if has_matplotlib() else f" ({WITHOUT_PLOTS})"))
    return found


def _read(folder: Path) -> RunHistory:
    run = read_run(folder)
    if not run.steps and not run.evaluations:
        raise UserError(f"{printable(folder)}: has logged no step yet; wait for its first line, or leave it out")
    return run


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _print(found: Comparison) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    for title, rows in (("settings that differ", found.settings), ("results, AP in %", found.results)):
        if not rows:
            console.print("no setting differs")
            continue
        table = Table(title, *map(escape, found.names), box=None, header_style="bold")
        for column in table.columns[1:]:
            column.justify = "right"
            column.overflow = "fold"
        for name, cells in rows:
            table.add_row(escape(name), *map(escape, cells))
        console.print(table)
    for note in found.notes:
        console.print(f"[yellow]note:[/yellow] {escape(note)}", soft_wrap=True)
