"""Everything in a few minutes on a laptop's processor: make data, train, evaluate, predict, draw.

cascade-rcnn demo [--out runs/demo] [--quick]
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

from cascade_rcnn.atomic_files import write_json
from cascade_rcnn.checkpoint import STATE, load_checkpoint
from cascade_rcnn.config import Config, DataConfig, ModelConfig, TrainConfig
from cascade_rcnn.data.formats.open import open_split
from cascade_rcnn.data.records import DataSplit
from cascade_rcnn.data.synthetic_shapes import generate_shapes
from cascade_rcnn.drawing.annotations import draw_detections, draw_record, side_by_side
from cascade_rcnn.drawing.charts import ap_by_iou_chart, contact_sheet
from cascade_rcnn.errors import UserError
from cascade_rcnn.evaluation.coco import curve
from cascade_rcnn.evaluation.evaluate_model import evaluate_model
from cascade_rcnn.evaluation.metrics import Metrics, print_metrics
from cascade_rcnn.inference.detector import load
from cascade_rcnn.messages import printable
from cascade_rcnn.train import train

_SIDE = 128  # pixels of the generated images
_SHOWN = 6  # held-out images drawn
_ENLARGED = 3  # the generated images are small
_DONE = "demo.json"  # written last: what the demo was run with


def demo_config(data: Path, *, quick: bool = False) -> Config:
    """A Cascade Mask R-CNN small enough for two processor cores, trained from nothing."""
    return Config(
        model=ModelConfig(
            backbone="resnet10t",
            pretrained=False,
            norm="batch",
            frozen_stages=-1,
            fpn_channels=64,
            head_channels=256,
            mask_channels=64,
            masks="last",
            anchor_scales=(4.0,),
            rpn_samples=128,
            roi_samples=64,
            train_proposals=400,
            test_proposals=200,
        ),
        data=DataConfig(root=str(data), short_side=(_SIDE,), long_side=_SIDE, flip=0.5, vertical_flip=0.5, workers=0),
        train=TrainConfig(
            epochs=3 if quick else 7,
            schedule="cosine",
            milestones=(),
            optimizer="adamw",
            lr=2e-3,
            images_per_step=4,
            batch_size=4,
            weight_decay=0.05,
            norm_weight_decay=False,
            warmup_steps=50,
            clip_grad_norm=10.0,
            precision="fp32",
            evaluate_every=100,
            log_every=20,
        ),
    )


def run_demo(*, out: Path, quick: bool = False) -> Metrics:
    """The command ``demo``; returns the metrics on held-out images.

    A demo that was interrupted goes on where it stopped; a folder with anything else in it is left alone, and the demo
    goes to the next free name beside it.
    """
    started = time.monotonic()
    out = _choose_folder(Path(out), quick=quick)
    print(f"1/4  generating pictures of shapes in {printable(out / 'data')}")
    data = generate_shapes(
        out / "data", train_images=120 if quick else 410, val_images=16 if quick else 64, size=_SIDE, objects=(2, 5)
    )
    print(f"2/4  training a small Cascade Mask R-CNN from nothing ({'about a minute' if quick else 'a few minutes'})")
    best = train(demo_config(data, quick=quick), out=out, resume=(out / STATE).exists(), device="cpu")
    print("3/4  evaluating on pictures it has not seen, after each stage of the cascade")
    split = open_split(data, "val")
    metrics: Metrics = load_checkpoint(best).metadata["metrics"]
    curves = {f"after stage {stage}": curve(_boxes_after(best, stage, split)) for stage in (1, 2)}
    curves["after stage 3"] = curve(metrics)
    write_json(out / "metrics.json", metrics)
    print("4/4  drawing")
    ap_by_iou_chart(curves, title="Box AP by IoU threshold, after each stage").save(out / "ap_by_iou.png")
    draw_examples(best, split, out / "predictions.png")
    write_json(out / _DONE, {"quick": quick, "minutes": (time.monotonic() - started) / 60})
    print_metrics(metrics, title="held-out pictures")
    _say_where(out, metrics, minutes=(time.monotonic() - started) / 60, quick=quick)
    return metrics


def _choose_folder(out: Path, *, quick: bool) -> Path:
    """``out`` if it is free or holds this demo unfinished, else the next free name: ``demo-2``, ``demo-3``, ..."""
    for number in range(1, 1000):
        folder = out if number == 1 else out.with_name(f"{out.name}-{number}")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{printable(folder)}: is a file; give a folder as --out")
        begun = folder / "config.json"
        if not folder.exists() or not any(folder.iterdir()):
            return folder
        only_data = {child.name for child in folder.iterdir()} == {"data"}
        same = begun.exists() and _is_config(begun, demo_config(folder / "data", quick=quick))
        if (only_data or same) and not (folder / _DONE).exists():
            print(f"{printable(folder)}: going on with the demo that was begun there")
            return folder
        if number == 1:
            print(f"{printable(folder)} is not empty and stays as it is; this demo goes to a new folder beside it")
    raise UserError(f"{printable(out)}: demo-1 to demo-999 exist already; name another folder with --out")


def _is_config(path: Path, config: Config) -> bool:
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(config.to_dict())))
    except ValueError:
        return False


def _boxes_after(checkpoint: Path, stage: int, split: DataSplit) -> Metrics:
    """Box metrics of the first stages alone; masks are left out, which saves their time."""
    detector = load(checkpoint, device="cpu", stop_after_stage=stage)
    detector.model.cascade.mask_heads = detector.model.cascade.mask_heads[:0]
    return evaluate_model(detector.model, detector.config, replace(split, has_masks=False))


def draw_examples(checkpoint: Path, split: DataSplit, path: Path) -> None:
    """Ground truth beside prediction for a few images, on one sheet."""
    detector = load(checkpoint, device="cpu")
    busy = [record for record in split.records if 3 <= len(record.boxes) <= 6] or split.records
    pairs = []
    for record in busy[:_SHOWN]:
        found = detector.predict(record.path)
        best = float(found.scores.max()) if len(found) else 0.0
        found = found[found.scores >= (0.5 if best >= 0.5 else best / 2)]  # little learnt, sure of nothing
        truth = draw_record(record, split.class_names, scale=_ENLARGED)
        pairs.append(side_by_side(truth, draw_detections(record.path, found, scale=_ENLARGED)))
    contact_sheet(pairs, columns=2, cell=pairs[0].width).save(path)


def _say_where(out: Path, metrics: Metrics, *, minutes: float, quick: bool) -> None:
    box, mask = metrics.get("bbox/AP"), metrics.get("segm/AP")
    if quick:
        print("\nthe quick form shows that everything runs; it trains too little to find much")
    print(f"""
done in {minutes:.1f} minutes: box AP {box or 0:.3f}, mask AP {mask or 0:.3f} on pictures it has not seen

  {printable(out / "predictions.png")}   ground truth beside prediction
  {printable(out / "ap_by_iou.png")}   what each stage of the cascade adds
  {printable(out / "metrics.json")}   all metrics
  {printable(out / "best.safetensors")}   the model, with its settings and class names

next:
  cascade-rcnn predict {printable(out)} {printable(out / "data" / "val")} --out found
  cascade-rcnn train finetune --data YOUR_FOLDER""")
