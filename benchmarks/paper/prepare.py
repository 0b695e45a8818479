"""The data as the trainings read it: resized once, as uncompressed pictures, and the small subsets.

``WORK/data/NAME`` becomes a COCO data set of its own: ``images/*.bmp`` and ``instances_SPLIT.json``.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as coco_mask
from PIL import Image
from product import DataConfig, DataSplit, DetectionDataset, coco_truth, generate_shapes, open_split


def prepare(settings: dict[str, Any], sources: dict[str, Path], work: Path, *, processes: int = 1) -> None:
    """Make every data set of the settings below ``work``/data, unless it is there."""
    for name, own in settings["data"].items():
        out = work / "data" / name
        if (out / "ready").exists():
            continue
        (out / "images").mkdir(parents=True, exist_ok=True)
        source = sources.get(name)
        if settings["quick"] and source is None:
            shapes = settings["shapes"]
            source = generate_shapes(
                work / f"shapes_{name}",
                train_images=shapes["train"],
                val_images=shapes["val"],
                size=shapes["size"],
                objects=(1, 4),
                seed=len(name),
            )
        assert source is not None, f"no folder for {name}: give --data {name}=FOLDER"
        for split in (own["train"], own["val"]):
            _write_split(open_split(source, split), out, split.replace("+", "_"), own, processes)
        if name == settings["small"]["data"]:
            for seed in settings["seeds"]:
                _write_subsets(out, own["train"], settings["small"]["sizes"], seed)
        (out / "ready").touch()


def _write_split(split: DataSplit, out: Path, name: str, own: dict[str, Any], processes: int) -> None:
    truth = coco_truth(split)
    config = DataConfig(short_side=(own["short_side"],), long_side=own["long_side"], keep_empty=True)
    by_image: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in truth["images"]}
    for one in truth["annotations"]:
        by_image[one["image_id"]].append(one)
    dataset = DetectionDataset(split, config, training=False)
    ids = [dataset.packed.image_id(row) for row in range(len(dataset))]
    tasks = [(dataset, row, by_image[image], out / "images" / f"{name}_{row:05d}.bmp") for row, image in enumerate(ids)]
    if processes > 1:
        with ProcessPoolExecutor(processes, mp_context=get_context("fork")) as pool:
            done = list(pool.map(_write_image, *zip(*tasks), chunksize=8))
    else:
        done = [_write_image(*task) for task in tasks]
    images, annotations = [], []
    for number, (image, objects) in enumerate(done, start=1):
        images.append({"id": number, **image})
        annotations += [
            {**one, "image_id": number, "id": len(annotations) + k} for k, one in enumerate(objects, start=1)
        ]
    content = {"images": images, "annotations": annotations, "categories": truth["categories"]}
    (out / f"instances_{name}.json").write_text(json.dumps(content), encoding="utf-8")


def _write_image(
    dataset: DetectionDataset, row: int, objects: list[dict[str, Any]], path: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    item = dataset[row]
    height, width = item.image.shape[1:]
    Image.fromarray(item.image.permute(1, 2, 0).numpy()).save(path)
    old_height, old_width = item.original_size
    factor = np.array([width / old_width, height / old_height] * 2)
    changed = []
    for one in objects:
        box = (np.array(one["bbox"]) * factor).tolist()
        if min(box[2:]) <= 0:
            continue
        new = {**one, "bbox": box, "area": box[2] * box[3]}
        if "segmentation" in one:
            new["segmentation"] = _resized(one["segmentation"], item.original_size, (height, width))
        changed.append(new)
    return {"file_name": path.name, "height": height, "width": width}, changed


def _resized(segmentation: Any, old: tuple[int, int], size: tuple[int, int]) -> dict[str, Any]:
    if isinstance(segmentation, list):
        segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, *old))
    elif isinstance(segmentation["counts"], list):
        segmentation = coco_mask.frPyObjects(segmentation, *old)
    rows = ((np.arange(size[0]) + 0.5) * old[0] / size[0]).astype(int)
    columns = ((np.arange(size[1]) + 0.5) * old[1] / size[1]).astype(int)
    encoded = coco_mask.encode(np.asfortranarray(coco_mask.decode(segmentation)[rows][:, columns]))
    counts = encoded["counts"]
    return {"size": list(size), "counts": counts.decode() if isinstance(counts, bytes) else counts}


def _write_subsets(out: Path, split: str, sizes: list[int], seed: int) -> None:
    """Nested subsets: the 25 images are among the 50. An image without objects is as good as any other."""
    content = json.loads((out / f"instances_{split}.json").read_text(encoding="utf-8"))
    order = np.random.default_rng(seed).permutation(len(content["images"]))
    for size in sizes:
        images = [content["images"][row] for row in sorted(order[:size])]
        ids = {image["id"] for image in images}
        part = {
            "images": images,
            "categories": content["categories"],
            "annotations": [one for one in content["annotations"] if one["image_id"] in ids],
        }
        (out / f"instances_{split}{size}_{seed}.json").write_text(json.dumps(part), encoding="utf-8")
