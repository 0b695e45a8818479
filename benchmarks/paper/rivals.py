"""A cascade against its rivals (the paper's table 1): iterative box regression and the integral loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import run
from report import Results, ap_table, draw_both

ROWS = ("single5", "integral", "cascade")
ENTRIES = (
    ("one stage", "single5", "final", "34.9; AP90 7.1"),
    ("iterative box, 2 rounds", "single5", "round2", ""),
    ("iterative box, 3 rounds", "single5", "round3", "35.4; AP90 8.1"),
    ("iterative box, 3 rounds, mean score", "single5", "rounds3_mean", ""),
    ("integral loss", "integral", "final", "35.4; AP90 6.9"),
    ("cascade", "cascade", "final", "38.9; AP50 57.8, AP80 35.8, AP90 15.8"),
)


def table(results: Results, pictures: Path) -> dict[str, Any]:
    text, numbers = ap_table(results, ENTRIES, ious=(0.5, 0.8, 0.9))
    draw_both(results, [ENTRIES[i][:3] for i in (0, 2, 4, 5)], pictures / "rivals.png")
    return {"markdown": text, "rows": numbers}


if __name__ == "__main__":
    run.main(["rivals"])
