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
    for color, name in zip(COLORS, ("AP", "AP50", "AP75", "AP90")):
        there = [one for one in numbers if one["way"] == "final"]
        places = [int(one["label"][0]) for one in there]
        values = [one[name] for one in there]
        errors = [[v["value"] - v["low"] for v in values], [v["high"] - v["value"] for v in values]]
        axis.errorbar(places, [v["value"] for v in values], yerr=errors, color=color, label=name, marker="o",
                      markersize=4, capsize=2)
    axis.set(title="number of stages", xlabel="stages", ylabel="%", xticks=(1, 2, 3, 4))
    axis.legend(ncols=2)
    save(figure, pictures / "depth.png")
    return {"markdown": text, "rows": numbers}


if __name__ == "__main__":
    run.main(["depth"])
