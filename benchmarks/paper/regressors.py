"""IoU after a regressor by the IoU before it (the paper's figure 1c): a regressor is best at the IoU it is trained for.

Of the boxes of the evaluated images, with the object that they overlap most.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import run
from report import COLORS, Floats, Results, axes, markdown, save, with_range

ROWS = ("single5", "single6", "single7", "cascade")
FEWEST = 30  # boxes for a point of a curve
OWN = {"u = .5": ("single5", "round1"), "u = .6": ("single6", "round1"), "u = .7": ("single7", "round1")}
ITERATED = {"round 1": ("single5", "round1"), "round 2": ("single5", "round2"), "round 3": ("single5", "round3")}
STAGES = {f"stage {k}": ("cascade", f"stage{k}") for k in (1, 2, 3)}


Curve = dict[str, list[float]]


def pooled(each: list[Curve]) -> Curve:
    """Of the curves of some seeds: IoU before and after, and how many boxes."""
    count = np.array([one["count"] for one in each])
    total = count.sum(axis=0)
    mean = {
        key: (np.array([one[key] for one in each]) * count).sum(axis=0) / np.maximum(total, 1)
        for key in ("before", "after")
    }
    return {"count": total.tolist(), **{key: np.round(value, 4).tolist() for key, value in mean.items()}}


def points(curve: Curve, fewest: int) -> tuple[Floats, Floats]:
    """IoU before and after, where ``fewest`` boxes were seen."""
    kept = np.array(curve["count"]) >= fewest
    return np.array(curve["before"])[kept], np.array(curve["after"])[kept]


def gain(curve: Curve, iou: float, fewest: int) -> float | None:
    """Change of IoU at ``iou``, between the points around it; None beyond the last."""
    before, after = points(curve, fewest)
    return float(np.interp(iou, before, after - before)) if len(before) and before[-1] > iou - 0.03 else None


def shown(all_seeds: float | None, each: list[float | None]) -> str:
    there = [one for one in each if one is not None]
    return "–" if all_seeds is None else with_range(all_seeds, there, "+.3f")


def table(results: Results, pictures: Path) -> dict[str, Any]:
    groups = {"trained at u, own proposals": OWN, "one head, three rounds": ITERATED, "stages of a cascade": STAGES}
    figure, (row_of_axes,) = axes(3, width=3.6)
    numbers, lines = [], []
    fewest = 1 if len(results.seeds) < 2 else FEWEST
    for axis, (title, curves) in zip(row_of_axes, groups.items()):
        axis.plot((0.3, 1), (0.3, 1), color="#9aa0a8", linewidth=0.8)
        for color, (label, (row, name)) in zip(COLORS, curves.items()):
            if not results.facts(row):
                continue
            each = [facts["regressions"][name] for facts in results.facts(row)]
            found = pooled(each)
            axis.plot(*points(found, fewest), color=color, label=label, marker="o", markersize=3)
            numbers.append({"group": title, "label": label, **found})
            gains = [
                shown(gain(found, iou, fewest), [gain(one, iou, fewest) for one in each])
                for iou in (0.55, 0.65, 0.75, 0.85)
            ]
            lines.append([f"{title}: {label}", *gains, f"{sum(found['count']):,.0f}"])
        axis.set(title=title, xlabel="IoU before", ylabel="IoU after", xlim=(0.3, 1), ylim=(0.3, 1))
        axis.legend()
    save(figure, pictures / "regressors.png")
    head = ["change of IoU at", "0.55", "0.65", "0.75", "0.85", "boxes"]
    return {"markdown": markdown(head, lines), "rows": numbers}


if __name__ == "__main__":
    run.main(["regressors"])
