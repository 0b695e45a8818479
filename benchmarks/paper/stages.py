"""Each stage of a cascade alone, and the ensembles of the first stages (the paper's table 2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import run
from report import Results, ap_table, draw_both

ROWS = ("cascade", "single5")
ENTRIES = (
    ("stage 1", "cascade", "stage1", "35.5"),
    ("stage 2", "cascade", "stage2", "38.3"),
    ("stage 3", "cascade", "stage3", "38.3"),
    ("stages 1 to 2", "cascade", "ensemble2", "38.5"),
    ("stages 1 to 3", "cascade", "ensemble3", "38.9"),
    ("stages 1 to 3, all judging stage 3's boxes", "cascade", "all_judge_last", ""),
)


def table(results: Results, pictures: Path) -> dict[str, Any]:
    text, numbers = ap_table(results, ENTRIES, ious=(0.5, 0.75, 0.9))
    draw_both(results, [ENTRIES[i][:3] for i in (0, 1, 2, 4)], pictures / "stages.png")
    return {"markdown": text, "rows": numbers}


if __name__ == "__main__":
    run.main(["stages"])
