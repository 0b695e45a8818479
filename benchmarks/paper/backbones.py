"""One stage against a cascade on other backbones and on another data set: whether the gain depends on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import run
from report import COLORS, IOUS, Results, ap_table, axes, save

ROWS = (
    "single5",
    "cascade",
    "lite2_single",
    "lite2_cascade",
    "resnet_single",
    "resnet_cascade",
    "bccd_single",
    "bccd_cascade",
)
PAIRS = (
    ("nuclei, EfficientNet-Lite0", "single5", "cascade"),
    ("nuclei, EfficientNet-Lite2", "lite2_single", "lite2_cascade"),
    ("nuclei, ResNet-10t from nothing", "resnet_single", "resnet_cascade"),
    ("blood cells, EfficientNet-Lite0", "bccd_single", "bccd_cascade"),
)


def table(results: Results, pictures: Path) -> dict[str, Any]:
    texts, numbers = [], []
    figure, ((axis,),) = axes(width=5)
    for color, (words, single, cascade) in zip(COLORS, PAIRS):
        entries = ((f"{words}: one stage", single, "final", ""), (f"{words}: cascade", cascade, "final", ""))
        if not (results.has(single) and results.has(cascade)):
            continue
        text, found = ap_table(results, entries, ious=(0.5, 0.75, 0.9))
        texts.append(text.replace(f"gain over {words}: one stage", "gain over one stage"))
        numbers += found
        gains = [gain for iou in IOUS if (gain := results.difference((cascade, "final"), (single, "final"), iou))]
        axis.plot(IOUS, [one["value"] for one in gains], color=color, label=words, marker="o", markersize=3)
        axis.fill_between(IOUS, [g["low"] for g in gains], [g["high"] for g in gains], color=color, alpha=0.1)
    axis.axhline(0, color="#9aa0a8", linewidth=0.8)
    axis.set(title="what a cascade adds", xlabel="IoU from which a detection counts", ylabel="gain in AP (points)")
    axis.legend()
    save(figure, pictures / "backbones.png")
    lines = texts[0].splitlines()[:2] if texts else []
    return {"markdown": "\n".join(lines + [line for text in texts for line in text.splitlines()[2:]]), "rows": numbers}


if __name__ == "__main__":
    run.main(["backbones"])
