"""Masks: a cascade with a mask head at every stage against Mask R-CNN (the paper's table of instance segmentation)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import run
from report import Results, ap_table, axes, draw_curves, draw_gains, save

ROWS = ("masks_single", "masks_cascade")
MASKS = (
    ("one stage: masks", "masks_single", "masks", ""),
    ("cascade: masks", "masks_cascade", "masks", "+0.6 to +1.7"),
)
BOXES = (("one stage: boxes", "masks_single", "final", ""), ("cascade: boxes", "masks_cascade", "final", ""))


def table(results: Results, pictures: Path) -> dict[str, Any]:
    ious = (0.5, 0.75, 0.9)
    mask_text, masks = ap_table(results, MASKS, ious=ious)
    box_text, boxes = ap_table(results, BOXES, ious=ious)
    figure, ((left, right),) = axes(2, width=3.6)
    draw_curves(left, results, [entry[:3] for entry in MASKS], "AP of masks")
    draw_gains(right, results, [entry[:3] for entry in MASKS], "gain of the cascade: masks")
    save(figure, pictures / "masks.png")
    return {"markdown": f"{mask_text}\n\n{box_text}", "rows": masks + boxes}


if __name__ == "__main__":
    run.main(["masks"])
