"""Small data: AP by the number of images, one stage and cascade, from ImageNet and from a detector of another set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import run
from report import COLORS, Results, axes, legend_below, markdown, save, shown

BASE = "single_imagenet"
KINDS = (
    ("one stage, ImageNet", "single_imagenet"),
    ("cascade, ImageNet", "cascade_imagenet"),
    ("one stage, blood-cell detector", "single_bccd"),
    ("cascade, blood-cell detector", "cascade_bccd"),
)


def table(results: Results, pictures: Path) -> dict[str, Any]:
    sizes = sorted({facts["images"] for facts in _all_facts(results)})
    shared = {size: results.shared_seeds([(f"small{size}_{kind}", "final") for _, kind in KINDS]) for size in sizes}
    lines, numbers = [], []
    figure, (panels,) = axes(2, width=3.8)
    for color, (words, kind) in zip(COLORS, KINDS):
        there = [size for size in sizes if results.has(f"small{size}_{kind}")]
        values = [results.value(f"small{size}_{kind}", seeds=shared[size]) for size in there]
        panels[0].plot(there, [one["value"] for one in values], color=color, label=words, marker="o", markersize=4)
        for size, one in zip(there, values):
            panels[0].plot([size] * len(one["seeds"]), one["seeds"], ".", color=color, markersize=4, alpha=0.5)
        if kind != BASE:
            ours, base = (lambda size, kind=kind: f"small{size}_{kind}"), (lambda size: f"small{size}_{BASE}")
            gains = [
                gain for size in there if (gain := results.difference((ours(size), "final"), (base(size), "final")))
            ]
            errors = [[g["value"] - g["low"] for g in gains], [g["high"] - g["value"] for g in gains]]
            panels[1].errorbar(
                there, [g["value"] for g in gains], yerr=errors, color=color, marker="o", markersize=4, capsize=2
            )
        for size in there:
            row, base = f"small{size}_{kind}", f"small{size}_{BASE}"
            value = {
                name: results.value(row, iou=iou, seeds=shared[size])
                for name, iou in (("AP", None), ("AP50", 0.5), ("AP75", 0.75))
            }
            gain = None if row == base else results.difference((row, "final"), (base, "final"))
            numbers.append({"images": size, "kind": kind, **value, "gain": gain})
            seeds = " ".join(f"{one:.1f}" for one in value["AP"]["seeds"])
            ap, *at_ious = map(shown, value.values())
            lines.append([str(size), words, ap, shown(gain, sign=True), *at_ious, seeds])
    titles = ("AP (small points: each seed)", "gain over one stage from ImageNet")
    for axis, title, unit in zip(panels, titles, ("AP (%)", "points")):
        axis.set(title=title, xlabel="images to learn from", ylabel=unit, xscale="log")
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
    panels[1].axhline(0, color=COLORS[0], linewidth=1)
    legend_below(figure, panels[0])
    save(figure, pictures / "small_data.png")
    lines.sort(key=lambda line: int(line[0]))
    head = ["images", "", "AP", "gain over one stage from ImageNet", "AP50", "AP75", "seeds"]
    return {"markdown": markdown(head, lines), "rows": numbers}


def _all_facts(results: Results) -> list[dict[str, Any]]:
    rows = {path.name.rsplit("-s", 1)[0] for path in (results.work / "raw").glob("small*_*.json")}
    return [facts for row in rows for facts in results.facts(row)]


if __name__ == "__main__":
    run.main(["small_data"])
