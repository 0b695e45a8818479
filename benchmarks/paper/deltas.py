"""The deltas from the boxes that enter a stage to their objects (the paper's figure 2), in training.

Not divided by the stage's statistics: their spread is what the statistics have to follow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import run
from report import COLORS, Results, axes, legend_below, markdown, save, with_range

ROWS = ("cascade",)
KINDS = {"stage1": "stage 1", "stage2": "stage 2", "stage3": "stage 3"}
SETTING = ("0.1, 0.2", "0.05, 0.1", "0.033, 0.067")
SIDES = ("dx", "dy", "dw", "dh")


def table(results: Results, pictures: Path) -> dict[str, Any]:
    lines, numbers = [], []
    figure, ((shift, size),) = axes(2, width=3.6)
    for place, (name, words) in enumerate(KINDS.items()):
        for suffix, which in (("", "IoU ≥ .5"), ("_positive", "positive in this stage")):
            each = [
                facts["training"]["deltas"][name + suffix]
                for facts in results.facts("cascade")
                if name + suffix in facts["training"]["deltas"]
            ]
            if not each:
                continue
            std = np.mean([one["std"] for one in each], axis=0)
            quantiles = np.mean([one["quantiles"] for one in each], axis=0)  # [4, Q]
            numbers.append(
                {
                    "stage": name,
                    "which": which,
                    "std": np.round(std, 4).tolist(),
                    "quantiles": np.round(quantiles, 4).tolist(),
                    "count": [one["count"] for one in each],
                }
            )
            lines.append(
                [
                    f"{words}, {which}",
                    *(with_range(mean, own, ".3f") for mean, own in zip(std, zip(*(one["std"] for one in each)))),
                    f"{quantiles[0, 0]:+.3f} to {quantiles[0, -1]:+.3f}",
                    f"{quantiles[2, 0]:+.3f} to {quantiles[2, -1]:+.3f}",
                    SETTING[place],
                ]
            )
            for axis, side in ((shift, 0), (size, 2)):
                x = place + (0.12 if suffix else -0.12)
                color = COLORS[bool(suffix)]
                q = quantiles[side]
                axis.plot((x, x), (q[0], q[-1]), color=color, linewidth=1.2, label=which if place == 0 else None)
                axis.plot((x, x), (q[1], q[3]), color=color, linewidth=6, solid_capstyle="butt")
                axis.plot(x, q[2], "_", color="white", markersize=8)
    for axis, title in ((shift, "shift: dx (in widths)"), (size, "size: dw (log of the ratio)")):
        axis.set(title=title, xticks=range(3), xticklabels=KINDS.values())
    legend_below(figure, shift)
    save(figure, pictures / "deltas.png")
    head = ["", *(f"std of {side}" for side in SIDES), "90 % of dx", "90 % of dw", "statistics of the setting"]
    return {"markdown": markdown(head, lines), "rows": numbers}


if __name__ == "__main__":
    run.main(["deltas"])
