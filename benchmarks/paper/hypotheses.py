"""Share of the hypotheses that overlap an object, stage by stage, in training (the paper's figure 4)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import run
from report import COLORS, Results, axes, legend_below, markdown, save, with_range

ROWS = ("cascade",)
PAPER = {"stage1": "16.7, 8.0, 2.9", "stage2": "25.6, 21.7, 17.3", "stage3": "28.0, 25.1, 21.7"}
NAMES = {
    "proposals": "proposals of the RPN",
    "stage1": "sampled from them: stage 1",
    "stage2": "stage 2",
    "stage3": "stage 3",
}
SHOWN = ("0.5", "0.6", "0.7", "0.8", "0.9")


def table(results: Results, pictures: Path) -> dict[str, Any]:
    shares = [facts["training"]["share"] for facts in results.facts("cascade")]
    lines, numbers = [], []
    for name, words in NAMES.items():
        each = {iou: [100 * one[name][iou] for one in shares] for iou in SHOWN}
        numbers.append(
            {
                "stage": name,
                "share": {iou: round(float(np.mean(v)), 2) for iou, v in each.items()},
                "seeds": {iou: [round(one, 2) for one in v] for iou, v in each.items()},
                "paper": PAPER.get(name, ""),
            }
        )
        cells = [with_range(float(np.mean(v)), v, ".1f") for v in each.values()]
        lines.append([words, *cells, PAPER.get(name, "")])
    figure, ((axis,),) = axes()
    width = 0.2
    for k, (color, one) in enumerate(zip(COLORS, numbers)):
        places = np.arange(len(SHOWN)) + (k - 1.5) * width
        axis.bar(places, [one["share"][iou] for iou in SHOWN], width, color=color, label=NAMES[one["stage"]])
    axis.set(
        title="hypotheses in training",
        ylabel="share (%)",
        xticks=range(len(SHOWN)),
        xticklabels=[f"IoU ≥ {iou}" for iou in SHOWN],
    )
    legend_below(figure, axis)
    save(figure, pictures / "hypotheses.png")
    head = ["", *(f"IoU ≥ {iou}" for iou in SHOWN), "paper (.5, .6, .7)"]
    return {"markdown": markdown(head, lines), "rows": numbers}


if __name__ == "__main__":
    run.main(["hypotheses"])
