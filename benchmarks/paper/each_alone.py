"""What rising IoU and rising precision of the statistics each bring (the paper's table 3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import run
from report import Results, ap_table, draw_both

ROWS = ("none", "iou", "statistics", "cascade")
ENTRIES = (
    ("three stages, neither", "none", "final", "36.8"),
    ("rising IoU", "iou", "final", "38.5"),
    ("statistics", "statistics", "final", "37.5"),
    ("both", "cascade", "final", "38.9"),
)


def table(results: Results, pictures: Path) -> dict[str, Any]:
    text, numbers = ap_table(results, ENTRIES, ious=(0.5, 0.75, 0.9))
    draw_both(results, [entry[:3] for entry in ENTRIES], pictures / "each_alone.png")
    return {"markdown": text, "rows": numbers}


if __name__ == "__main__":
    run.main(["each_alone"])
