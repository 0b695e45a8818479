"""What each augmentation shows the network, and what it costs the loader.

    python3 benchmarks/augment.py picture docs/images/augmentations.jpg      # generated shapes, no download
    python3 benchmarks/augment.py speed --data data/nuclei --size 512        # images per second, one process

Speed: each setting is measured in turn, ``--rounds`` times over, so that a busy machine slows all of them alike; the
best round counts.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from cascade_rcnn.config import DataConfig
from cascade_rcnn.data.dataset import DetectionDataset, SampleKey
from cascade_rcnn.data.formats.open import open_split
from cascade_rcnn.data.loader import Collate, measure_loading
from cascade_rcnn.data.synthetic_shapes import generate_shapes
from cascade_rcnn.drawing.annotations import draw_batch
from cascade_rcnn.drawing.charts import contact_sheet

_COLUMNS = 4


def settings(size: int) -> dict[str, DataConfig]:
    """The augmentations by name, at a size."""
    plain = DataConfig(short_side=(size,), long_side=size * 5 // 3, flip=0, workers=0)
    jitter = replace(plain, long_side=size, large_scale_jitter=(0.1, 2.0))
    crop = replace(plain, crop=1.0, crop_short_side=(size // 2, size * 5 // 8, size * 3 // 4))
    return {
        "none": plain,
        "crop": replace(crop, crop_range=(size * 12 // 25, size * 3 // 4)),
        "large_scale_jitter": jitter,
        "mosaic": replace(plain, mosaic=1.0),
        "copy_paste": replace(plain, copy_paste=1.0),
        "large_scale_jitter and copy_paste": replace(jitter, copy_paste=1.0),
    }


def picture(out: Path) -> None:
    """One row for each augmentation, the same images in each."""
    pictures, titles = [], []
    with tempfile.TemporaryDirectory() as folder:
        shapes = generate_shapes(Path(folder) / "shapes", train_images=_COLUMNS, val_images=1, size=240, seed=7)
        split = open_split(str(shapes), "train")
        for name, config in settings(240).items():
            dataset = DetectionDataset(split, config, training=True, masks=True)
            items = [dataset[SampleKey(index, (5, index))] for index in range(_COLUMNS)]
            for item in items:
                square = config.long_side if config.large_scale_jitter else 0
                batch, targets = Collate(1, square)([item])  # type: ignore[misc]
                pictures += draw_batch(batch, targets, split.class_names)
                titles.append(name)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet: Image.Image = contact_sheet(pictures, columns=_COLUMNS, cell=240, titles=titles)
    sheet.convert("RGB").save(out, quality=85)
    print(out, sheet.size)


def speed(data: str, size: int, rounds: int, seconds: float) -> None:
    """A line for each augmentation: images per second and the share of what the plain resize reaches."""
    torch.set_num_threads(1)
    split = open_split(data, "train")
    best = dict.fromkeys(settings(size), 0.0)
    for _ in range(rounds):
        for name, config in settings(size).items():
            dataset = DetectionDataset(split, config, training=True, masks=True)
            best[name] = max(best[name], measure_loading(dataset, workers=0, seconds=seconds))
    for name, rate in best.items():
        print(f"{name:36} {rate:7.1f} images/s  {rate / best['none']:5.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("picture").add_argument("out", type=Path)
    measured = commands.add_parser("speed")
    measured.add_argument("--data", required=True, help="a data set with masks")
    measured.add_argument("--size", type=int, default=512, help="shorter side")
    measured.add_argument("--rounds", type=int, default=3)
    measured.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    arguments = parser.parse_args()
    if arguments.command == "picture":
        picture(arguments.out)
    else:
        speed(arguments.data, arguments.size, arguments.rounds, arguments.seconds)


if __name__ == "__main__":
    main()
