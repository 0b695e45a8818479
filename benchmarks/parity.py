"""The differences from mmdetection and detectron2, measured: the table of docs/parity.md.

python3 benchmarks/parity.py [NAME ...]      # of tests/models/test_parity.py; all of them take a quarter of an hour
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torchvision.ops import box_iou

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in (".", "tests/models", "tests/support")]
import test_parity as parity  # noqa: E402

from cascade_rcnn.inference.detector import load  # noqa: E402


def forward(case: parity.Case) -> dict[str, str]:
    """FPN, proposals, stages, detections, masks."""
    rows = {}
    model, images = parity.loaded_model(case).eval(), parity.network_input(case)
    with torch.no_grad():
        pyramid = model.pyramid(images)
        samples = [(p[0, ::16, ::7, ::7], case.reference[f"p{i}_sample"]) for i, p in enumerate(pyramid, start=2)]
        rows["p2..p6, largest relative difference"] = f"{max(parity.relative(*pair) for pair in samples):.1e}"
        proposals = model.rpn.propose(pyramid, images.sizes).boxes[0]
        overlap = box_iou(torch.from_numpy(case.reference["proposals"]), proposals)
        rows["proposals matched at IoU > 0.99"] = f"{int((overlap.amax(1) > 0.99).sum())} of {len(overlap)}"
        worst = 0.0
        for k in range(3 if "stage0_rois" in case.reference else 0):
            rois = torch.from_numpy(case.reference[f"stage{k}_rois"])[None]
            raw = model.cascade._run_stage(k, pyramid, rois, torch.ones(1, rois.shape[1], dtype=torch.bool))
            for ours, name in zip(raw, ("cls", "reg")):
                worst = max(worst, parity.relative(ours[0], case.reference[f"stage{k}_{name}"]))
        rows["raw stage outputs, largest relative difference"] = f"{worst:.1e}" if worst else "not in the reference"
    found = load(case.checkpoint, device="cpu").predict(parity.DATA / "synthetic.png")
    boxes, scores, labels = (torch.from_numpy(case.reference[key]) for key in ("boxes", "scores", "labels"))
    iou, index = (box_iou(boxes, found.boxes) * (labels[:, None] == found.labels)).max(dim=1)
    apart = (scores - found.scores[index]).abs()
    matched = (iou > 0.99) & (apart < 1e-3)
    rows["detections matched"] = f"{int(matched.sum())} of {len(boxes)}"
    rows["their scores, largest difference"] = f"{float(apart[matched].max()):.1e}"
    if "masks_packed" in case.reference and found.masks is not None:
        count, height, width = case.reference["mask_shape"].tolist()
        bits = np.unpackbits(case.reference["masks_packed"], axis=1)[:, : height * width]
        wanted = bits.reshape(count, height, width) > 0
        ours = found.masks[index].numpy()
        rows["mask pixels that differ"] = f"{(ours != wanted).sum() / (ours | wanted).sum():.2%} of the masks' area"
    return rows


def backward(case: parity.Case, folder: Path) -> dict[str, str]:
    """Losses and gradients of one training step."""
    losses, model = parity.training_step(case, folder)
    wanted = parity.reference_losses(case)
    apart = {key: abs(losses[key].item() / value - 1) for key, value in wanted.items()}
    worst = max(apart, key=lambda key: apart[key])
    norms = case.train["grad_norms"]
    gaps = [
        abs(float(p.grad.norm()) / norms[case.foreign_key[name]] - 1)
        for name, p in model.named_parameters()
        if p.grad is not None
    ]
    return {
        f"{len(wanted)} losses, largest relative difference": f"{apart[worst]:.1e} ({worst})",
        "gradient norms compared": str(len(gaps)),
        "gradient norms, largest relative difference": f"{max(gaps):.2%}",
        "gradient norms, median": f"{float(np.median(gaps)):.1e}",
    }


def main() -> None:
    torch.set_num_threads(2)
    for name in sys.argv[1:] or (*parity.NAMES, *parity.FAMILIES):
        with tempfile.TemporaryDirectory() as folder:
            with contextlib.redirect_stdout(io.StringIO()):
                case = parity.prepare(name, Path(folder))
            case = dataclasses.replace(case)
            rows = forward(case) | backward(case, Path(folder))
        print(f"\n{name}")
        for key, value in rows.items():
            print(f"    {key:55} {value}")


if __name__ == "__main__":
    main()
