"""Each head of a cascade on each stage's boxes (the paper's figure 6): heads are made for the boxes they are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import run
from report import Results, axes, markdown, save, shown

ROWS = ("cascade",)
PAPER = (("35.5", "35.2", "25.6"), ("36.5", "38.3", "35.5"), ("36.8", "38.4", "38.3"))


def table(results: Results, pictures: Path) -> dict[str, Any]:
    lines, numbers = [], []
    for boxes in (1, 2, 3):
        cells = [results.value("cascade", f"head{head}_on_boxes{boxes}") for head in (1, 2, 3)]
        numbers.append({"boxes": boxes, "heads": cells, "paper": PAPER[boxes - 1]})
        lines.append([f"boxes that enter stage {boxes}", *map(shown, cells), ", ".join(PAPER[boxes - 1])])
    values = np.array([[cell["value"] for cell in row["heads"]] for row in numbers])
    figure, ((axis,),) = axes(height=3, width=3.6)
    axis.imshow(values, cmap="Blues", vmin=values.min() - 2, vmax=values.max() + 2)
    axis.grid(False)
    for row in range(3):
        for column in range(3):
            dark = values[row, column] > values.mean() - 0.3 * np.ptp(values)
            axis.text(
                column, row, f"{values[row, column]:.1f}", ha="center", va="center", color="white" if dark else "black"
            )
    axis.set(
        title="AP (%) of each head on each stage's boxes",
        xticks=range(3),
        yticks=range(3),
        xticklabels=[f"head {k}" for k in (1, 2, 3)],
        yticklabels=[f"boxes {k}" for k in (1, 2, 3)],
    )
    save(figure, pictures / "heads.png")
    return {"markdown": markdown(["", "head 1", "head 2", "head 3", "paper"], lines), "rows": numbers}


if __name__ == "__main__":
    run.main(["heads"])
