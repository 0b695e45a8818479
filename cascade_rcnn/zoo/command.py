"""The command ``models``: the list of published weights, and the cache of those that were fetched."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Collection, Sequence

from cascade_rcnn.errors import UserError
from cascade_rcnn.messages import printable
from cascade_rcnn.zoo.catalog import Published, find, nearest_words, normalised, published
from cascade_rcnn.zoo.store import cached, clear, models_folder, unfinished

_HEADINGS = ("name", "box AP", "mask AP", "size", "whose", "licence", "")


def run_models(words: Sequence[str] = (), *, as_json: bool = False, cache: str = "") -> None:
    """Print the weights whose names have all ``words``; ``cache``: "show" or "clear" those of them that are here.

    Raises UserError: no name has them.
    """
    entries = [entry for entry in published() if all(normalised(word) in _searched(entry) for word in words)]
    if cache and (entries or not words):
        exact = find(words[0]) if len(words) == 1 else None  # a name that is a part of others means itself
        names = {entry.name for entry in ([exact] if exact else entries)}
        _show_cache(cache, names if words else None)
        return
    have = cached()
    if as_json:
        print(json.dumps([_facts(entry, have) for entry in entries], indent=2))
        return
    if not entries:
        near = nearest_words(words)
        hint = f"did you mean {' or '.join(near)}?" if near else "'cascade-rcnn models' lists all of them"
        raise UserError(f"no published weights have {' '.join(map(repr, words))} in their name; {hint}")
    _print_table(entries, have)


def _searched(entry: Published) -> str:
    return normalised(" ".join((entry.name, *entry.also, entry.library, entry.backbone, entry.dataset)))


def _facts(entry: Published, have: dict[str, int]) -> dict[str, object]:
    facts = {key: value for key, value in dataclasses.asdict(entry).items() if value not in ("", (), None)}
    if not entry.parameters:
        facts.pop("parameters")
    if entry.name in have:
        facts["cached_bytes"] = have[entry.name]
    return facts | {"loads": not entry.missing, "cached": entry.name in have}


def _size(entry: Published, have: dict[str, int]) -> str:
    """Megabytes of the file that is here; before it was fetched, millions of parameters."""
    if entry.name in have:
        return f"{have[entry.name] / 1e6:.0f} MB"
    return f"{entry.parameters / 1e6:.1f} M" if entry.parameters else ""


def _print_table(entries: Sequence[Published], have: dict[str, int]) -> None:
    """A line for each entry, or two where the terminal is narrower; a pipe or a file always gets one."""
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    rows = [_HEADINGS, *(_cells(entry, have) for entry in entries)]
    widths = [max(map(len, column)) for column in zip(*rows)][:-1]
    if sum(widths) + 2 * len(widths) <= columns:
        lines = [_line(row, widths, columns) for row in rows]
    else:
        lines = [_paragraph(row, columns) for row in rows[1:]]
    loads = sum(not entry.missing for entry in entries)
    about = (
        f"{len(entries)} checkpoint{'s' * (len(entries) != 1)}, {loads} load{'s' * (loads == 1)} by name: "
        "cascade_rcnn.load(NAME), cascade-rcnn predict NAME street.jpg. AP in per cent, as published by their authors. "
        "Size: MB of a file that is here, else millions of parameters."
    )
    print("\n".join(lines))
    print(textwrap.fill(about, min(columns, 100)))


def _cells(entry: Published, have: dict[str, int]) -> tuple[str, ...]:
    data = "" if entry.dataset == "COCO" else f" ({re.sub('[()]', '', entry.dataset)})"
    return (
        entry.name + data,
        _percent(entry.box_ap),
        _percent(entry.mask_ap),
        _size(entry, have),
        entry.library.partition(" (")[0],
        re.split(r" \(|;", entry.license)[0],
        f"no: {entry.missing}" if entry.missing else "here" if entry.name in have else "",
    )


def _line(cells: Sequence[str], widths: Sequence[int], columns: int) -> str:
    """The entry in the table; a note that has no room beside it stands below."""
    numbers = range(1, 4)
    line = "  ".join(
        cell.rjust(width) if k in numbers else cell.ljust(width) for k, (cell, width) in enumerate(zip(cells, widths))
    )
    note = cells[-1]
    return f"{line}  {note}".rstrip() if len(line) + 2 + len(note) <= columns else f"{line.rstrip()}\n    {note}"


def _paragraph(cells: Sequence[str], columns: int) -> str:
    name, box, mask, *others = cells
    facts = [box and f"{box} box AP", mask and f"{mask} mask AP", *others]
    indent = "    "
    below = textwrap.fill(", ".join(filter(None, facts)), columns, initial_indent=indent, subsequent_indent=indent)
    return f"{name}\n{below}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _show_cache(what: str, names: Collection[str] | None) -> None:
    if what == "clear":
        freed, busy = clear(names)
        print(f"{printable(models_folder())}: {freed / 1e6:.0f} MB deleted")
        if busy:
            print(f"  kept, because another process is fetching them: {', '.join(map(printable, busy))}")
        return
    have = {name: size for name, size in cached().items() if names is None or name in names}
    print(printable(models_folder()))
    for name, size in have.items():
        print(f"  {name}  {size / 1e6:.0f} MB")
    if names is None and (rest := unfinished()):
        print(f"  other files (parts of interrupted downloads, files that were not converted): {rest / 1e6:.0f} MB")
    total = sum(have.values()) / 1e6
    count = f"{len(have)} checkpoint{'s' * (len(have) != 1)}"
    print(f"  {count}, {total:.0f} MB; 'cascade-rcnn models --cache clear [WORD]' deletes them")
