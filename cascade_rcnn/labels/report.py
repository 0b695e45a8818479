"""Suspects as a table: printed (the first of each kind), ``labels.csv`` and ``labels.json``."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cascade_rcnn.data.records import DataSplit
from cascade_rcnn.labels.rank import KINDS, Box, Suspect
from cascade_rcnn.messages import printable

TITLES = {
    "missed": "objects that nobody annotated",
    "shifted": "boxes that lie badly",
    "class": "wrong classes",
    "doubled": "objects annotated twice",
    "nothing": "boxes around nothing",
}


def describe(suspect: Suspect, class_names: Sequence[str]) -> str:
    """What is suspected and what is proposed, in a few words."""
    now = class_names[suspect.label] if suspect.label >= 0 else ""
    proposed = class_names[suspect.proposed_label]
    return {
        "missed": f"missed: {proposed}",
        "shifted": f"{now}: box lies badly",
        "class": f"{now}: rather {proposed}",
        "doubled": f"{now}: annotated twice",
        "nothing": f"{now}: nothing there",
    }[suspect.kind]


def show(split: DataSplit, suspects: Sequence[Suspect], *, most: int = 5) -> None:
    """Print how many there are of each kind, and the first ones."""
    console = Console(soft_wrap=True, highlight=False)
    for kind in KINDS:
        found = [suspect for suspect in suspects if suspect.kind == kind]
        if not found:
            continue
        table = Table(title=f"{len(found):,} x {kind}: {TITLES[kind]}", title_justify="left", box=None, min_width=60)
        for heading in ("score", "image", "object", "annotated", "proposed"):
            table.add_column(heading)
        for suspect in found[:most]:
            row = _cells(split, suspect)
            table.add_row(f"{suspect.score:.2f}", row["image"], row["object"], row["annotated"], row["proposed"])
        console.print(table)


def _cells(split: DataSplit, suspect: Suspect) -> dict[str, str]:
    record = split.records[suspect.image]
    names = split.class_names
    annotated = f"{names[suspect.label]} {_corners(suspect.box)}" if suspect.box else "-"
    proposed = f"{names[suspect.proposed_label]} {_corners(suspect.proposed_box)}" if suspect.proposed_box else "remove"
    return {
        "image": printable(record.file_name),
        "object": object_name(split, suspect),
        "annotated": printable(annotated),
        "proposed": printable(proposed),
    }


def object_name(split: DataSplit, suspect: Suspect) -> str:
    """The annotation's own id where the format has one, else its place in the image's file, from 1."""
    if suspect.row < 0:
        return ""
    ids = split.records[suspect.image].attributes.get("ids")
    return f"id {ids[suspect.row]}" if ids is not None else f"{suspect.row + 1}"


def _corners(box: Box | None) -> str:
    return "" if box is None else " ".join(f"{value:.0f}" for value in box)


def as_dict(split: DataSplit, suspect: Suspect) -> dict[str, Any]:
    """One suspect as it is written: boxes are xyxy in pixels of the image, None of what is not there."""
    record, names = split.records[suspect.image], split.class_names
    return {
        "kind": suspect.kind,
        "score": round(suspect.score, 4),
        "image": record.file_name,
        "image_id": record.image_id,
        "annotation": object_name(split, suspect),
        "label": names[suspect.label] if suspect.label >= 0 else None,
        "box": _rounded(suspect.box),
        "proposed_label": names[suspect.proposed_label] if suspect.proposed_box else None,
        "proposed_box": _rounded(suspect.proposed_box),
        "source": record.source,
    }


def _rounded(box: Box | None) -> list[float] | None:
    return None if box is None else [round(value, 2) for value in box]


def write_tables(split: DataSplit, suspects: Sequence[Suspect], out: Path) -> None:
    """``labels.csv`` and ``labels.json``: every suspect, the most suspicious of its kind first."""
    rows = [as_dict(split, suspect) for suspect in suspects]
    (out / "labels.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    with (out / "labels.csv").open("w", encoding="utf-8", newline="", errors="backslashreplace") as file:
        writer = csv.writer(file)
        names = ("kind", "score", "image", "annotation", "label", "proposed_label", "source")
        corners = [f"{which}{corner}" for which in ("", "proposed_") for corner in ("x1", "y1", "x2", "y2")]
        writer.writerow([*names, *corners])
        for row in rows:
            boxes = [value for key in ("box", "proposed_box") for value in row[key] or [""] * 4]
            writer.writerow([*("" if row[name] is None else row[name] for name in names), *boxes])
