"""Cascades of one to four stages (the paper's table 4)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import run
from report import COLORS, Results, ap_table, axes, save

ROWS = ("single5", "stages2", "cascade", "stages4")
ENTRIES = (
    ("1 stage", "single5", "final", "34.9"),
    ("2 stages", "stages2", "final", "38.2"),
    ("3 stages", "cascade", "final", "38.9"),
    ("4 stages", "stages4", "final", "38.6"),
    ("4 stages, stage 3 of them", "stages4", "ensemble3", ""),
)


def table(results: Results, pictures: Path) -> dict[str, Any]:
    text, numbers = ap_table(results, ENTRIES, ious=(0.5, 0.75, 0.9))
    figure, ((axis,),) = axes()
    there = [entry for entry in ENTRIES[1:4] if results.has(*entry[1:3])]
    for number, (color, (name, iou)) in enumerate(
        zip(COLORS, (("AP", None), ("AP50", 0.5), ("AP75", 0.75), ("AP90", 0.9)))
    ):
        gains = [results.difference(entry[1:3], ENTRIES[0][1:3], iou) for entry in there]
        points = [(int(entry[0][0]) + 0.06 * number, gain) for entry, gain in zip(there, gains) if gain]
        axis.errorbar(
            [1, *(x for x, _ in points)],
            [0, *(g["value"] for _, g in points)],
            yerr=[[0, *(g["value"] - g["low"] for _, g in points)], [0, *(g["high"] - g["value"] for _, g in points)]],
            color=color,
            label=name,
            marker="o",
            markersize=4,
            capsize=2,
        )
    axis.set(title="gain over one stage", xlabel="stages", ylabel="points", xticks=(1, 2, 3, 4))
    axis.legend()
    save(figure, pictures / "depth.png")
    return {"markdown": text, "rows": numbers}


if __name__ == "__main__":
    run.main(["depth"])
