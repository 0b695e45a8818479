"""Detectors of one stage trained from u = .5, .6 and .7 (the paper's figure 5): the starvation that a cascade cures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import run
from report import Results, ap_table, axes, draw_gains, save

ROWS = ("single5", "single6", "single7", "cascade")
PAPER = {
    ("single5", "final"): "34.9",
    ("single6", "final"): "35.4",
    ("single7", "final"): "31.9",
    ("single6", "cascade_boxes2"): "36.7",
    ("single7", "cascade_boxes3"): "35.2",
    ("single5", "truth_added"): "39.4",
    ("single6", "truth_added"): "45.7",
    ("single7", "truth_added"): "49.5",
}
WAYS = (
    ("final", "own proposals"),
    ("cascade_boxes2", "the cascade's boxes of stage 2"),
    ("cascade_boxes3", "the cascade's boxes of stage 3"),
    ("truth_added", "ground truth added"),
)
TITLES = ("own proposals", "a cascade's boxes", "truth added")


def table(results: Results, pictures: Path) -> dict[str, Any]:
    entries = [
        (f"u = .{row[-1]}, {words}", row, way, PAPER.get((row, way), "")) for way, words in WAYS for row in ROWS[:3]
    ]
    text, numbers = ap_table(results, entries, ious=(0.5, 0.75, 0.9))
    figure, (panels,) = axes(3, width=3.4)
    for axis, way, title in zip(panels, ("final", "cascade_boxes3", "truth_added"), TITLES):
        draw_gains(axis, results, [(f"u = .{row[-1]}", row, way) for row in ROWS[:3]], f"gain over u = .5: {title}")
    save(figure, pictures / "single.png")
    return {"markdown": text, "rows": numbers}


if __name__ == "__main__":
    run.main(["single"])
