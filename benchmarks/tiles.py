"""Tiles on large canvases with planted objects: recall on tile borders and elsewhere, AP, time, memory; beside SAHI.

    cascade-rcnn demo --out runs/demo
    python3 benchmarks/tiles.py make runs/canvas --side 30000 --objects 5000 --large 100
    python3 benchmarks/tiles.py measure runs/demo runs/canvas --only tiles
    python3 benchmarks/tiles.py make runs/small --canvases 3 --side 6000 --objects 200 --large 5
    python3 benchmarks/tiles.py measure runs/demo runs/small

``make`` writes tiled TIFF files and ``instances.json``. The shapes are the demo's, enlarged four times, on backgrounds
of its kind; ``--large`` plants so many of 300 to 3,000 pixels beside them. ``measure`` runs the demo's network with
an input of 256 pixels for a tile of 1,024, which shows the shapes as large as it has learnt them. An object is *on a
border* if its box crosses an inner border of a tile of the finest level. Larger objects cross more often and are found
more easily, hence ``elsewhere`` weighs sizes as they occur on borders. Each contender runs in a process of its own;
memory is the process's peak (VmHWM). ``make --blank`` writes an empty canvas of any side in no time, to see what
memory it takes: with --input 64 the network is quicker and finds nothing. ``--height`` makes it less high: memory
depends on the width.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cascade_rcnn.data.synthetic_shapes import CLASS_NAMES, draw_scene

SCENE = 128  # pixels of the demo's pictures
ENLARGED = 4
SMALL, LARGE = (56, 200), (300, 3000)  # longer side of the planted, pixels
BIN = 12  # pixels of size that are alike
CELL = 32  # pixels: objects keep apart by so many
BLOCK = 2048  # backgrounds change every so many pixels
TILE, OVERLAP, INPUT = 1024, 0.2, 256
FOUND = 0.5  # IoU; and score, for recall
LEAST = 0.1  # score; below it SAHI would suppress instead of merging


class Planted:
    """One object: its pixels and mask at the size of the canvas, made when asked for."""

    def __init__(self, rng: np.random.Generator, large: bool) -> None:
        limits = LARGE if large else SMALL
        while True:
            self.seed = int(rng.integers(1 << 62))
            _, mask, self.label = self._scene()
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            top, left, bottom, right = rows[0], columns[0], rows[-1] + 1, columns[-1] + 1
            inside = top > 0 and left > 0 and bottom < SCENE and right < SCENE
            longer = max(bottom - top, right - left)
            self.factor = ENLARGED * (np.exp(rng.uniform(*np.log(limits))) / (ENLARGED * longer) if large else 1)
            if inside and limits[0] <= longer * self.factor <= limits[1]:
                break
        self.crop = (int(top), int(left), int(bottom), int(right))
        self.size = (round((bottom - top) * self.factor), round((right - left) * self.factor))
        self.top = self.left = 0

    def _scene(self) -> tuple[NDArray[np.uint8], NDArray[np.bool_], int]:
        rng = np.random.default_rng(self.seed)
        while True:
            pixels, labels, masks = draw_scene(rng, size=SCENE, objects=(1, 1))
            if labels:
                return pixels, masks[0], labels[0]

    def draw(self, canvas: NDArray[np.uint8], first: int) -> None:
        """Onto rows of the canvas that begin at row ``first``."""
        pixels, mask, _ = self._scene()
        top, left, bottom, right = self.crop
        wide = self.size[::-1]
        shape = np.asarray(Image.fromarray(pixels[top:bottom, left:right]).resize(wide, Image.Resampling.BILINEAR))
        cover = Image.fromarray(mask[top:bottom, left:right].astype(np.uint8) * 255)
        inside = np.asarray(cover.resize(wide, Image.Resampling.BILINEAR)) >= 128
        low, high = max(self.top, first), min(self.top + self.size[0], first + len(canvas))
        part = canvas[low - first : high - first, self.left : self.left + self.size[1]]
        rows = slice(low - self.top, high - self.top)
        part[inside[rows]] = shape[rows][inside[rows]]


def plant(rng: np.random.Generator, side: int, count: int, large: int) -> list[Planted]:
    """Objects that do not touch, the large ones first."""
    taken = np.zeros((-(-side // CELL),) * 2, np.bool_)
    placed: list[Planted] = []
    for number in range(large + count):
        one = Planted(rng, number < large)
        for _ in range(5000):
            one.top, one.left = (int(rng.integers(0, side - length)) for length in one.size)
            first = [one.top // CELL, one.left // CELL]
            last = [(begin + length) // CELL + 1 for begin, length in zip((one.top, one.left), one.size)]
            around = taken[max(first[0] - 1, 0) : last[0] + 1, max(first[1] - 1, 0) : last[1] + 1]
            if not around.any():
                taken[first[0] : last[0], first[1] : last[1]] = True
                placed.append(one)
                break
        else:
            raise SystemExit(f"no room for {count} objects on {side} x {side} pixels")
    return placed


def make(folder: Path, *, canvases: int, side: int, objects: int, large: int, seed: int) -> None:
    """Write the canvases and their annotations."""
    import rasterio

    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number in range(1, canvases + 1):
        rng = np.random.default_rng((seed, number))
        planted = plant(rng, side, objects, large)
        name = f"canvas_{number}.tif"
        options = {"tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate", "predictor": 2}
        shape = {"height": side, "width": side, "count": 3, "dtype": "uint8"}
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(folder / name, "w", driver="GTiff", BIGTIFF="IF_SAFER", **shape, **options) as file:
            for first in range(0, side, BLOCK):
                rows = _background(rng, min(BLOCK, side - first), side)
                for one in planted:
                    if one.top < first + len(rows) and one.top + one.size[0] > first:
                        one.draw(rows, first)
                window = rasterio.windows.Window(0, first, side, len(rows))
                file.write(rows.transpose(2, 0, 1), window=window)
        images.append({"id": number, "file_name": name, "height": side, "width": side})
        for one in planted:
            height, width = one.size
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": one.label + 1,
                    "bbox": [one.left, one.top, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                }
            )
        print(f"{folder / name}: {side:,} x {side:,} pixels, {len(planted):,} objects")
    categories = [{"id": label + 1, "name": shape} for label, shape in enumerate(CLASS_NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content), encoding="utf-8")


def _background(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """Clouds, patterns and lines as behind the demo's shapes."""
    from cascade_rcnn.data.synthetic_shapes import _background as clouds

    rows = np.empty((height, width, 3), np.uint8)
    for left in range(0, width, BLOCK):
        block = Image.fromarray(clouds(rng, BLOCK // ENLARGED // 2).clip(0, 255).astype(np.uint8))
        pixels = np.asarray(block.resize((BLOCK, BLOCK), Image.Resampling.BILINEAR))
        rows[:, left : left + BLOCK] = pixels[:height, : width - left]
    return rows


def blank(folder: Path, side: int, height: int) -> None:
    """A canvas without any pixel written: TIFF says so, and it reads as black."""
    import rasterio

    folder.mkdir(parents=True, exist_ok=True)
    options = {"tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate", "SPARSE_OK": True}
    shape = {"height": height, "width": side, "count": 3, "dtype": "uint8"}
    warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
    with rasterio.open(folder / "blank.tif", "w", driver="GTiff", BIGTIFF="YES", **shape, **options):
        pass
    image = {"id": 1, "file_name": "blank.tif", "height": height, "width": side}
    categories = [{"id": label + 1, "name": shape} for label, shape in enumerate(CLASS_NAMES)]
    content = {"images": [image], "annotations": [], "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content), encoding="utf-8")


def _detector(checkpoint: str, side: int = INPUT) -> Any:
    from cascade_rcnn.inference.detector import load

    detector = load(checkpoint, device="cpu", score_threshold=LEAST)
    data = replace(detector.config.data, short_side=(side,), long_side=side, test_short_side=side)
    detector.config = replace(detector.config, data=data)
    return detector


def ours(checkpoint: str, path: Path, whole: bool, side: int) -> Iterator[tuple[str, Any]]:
    """Boxes xyxy, scores and labels; and time."""
    from cascade_rcnn.inference.tiled import open_rows
    from cascade_rcnn.inference.tiles import Pyramid, Tiling

    detector = _detector(checkpoint, side)
    start = time.perf_counter()
    rows = open_rows(path, detector.config, max_pixels=1)
    found = detector.predict_tiled(Pyramid(rows, Tiling(TILE, OVERLAP, whole)), batch_size=4)
    parts = [(found[:0].boxes.numpy(), found[:0].scores.numpy(), found[:0].labels.numpy())]
    parts += [(part.boxes.numpy(), part.scores.numpy(), part.labels.numpy()) for part in found.parts()]
    yield "seconds", time.perf_counter() - start
    yield "found", tuple(np.concatenate(column) for column in zip(*parts))


def with_sahi(checkpoint: str, path: Path, whole: bool, side: int) -> Iterator[tuple[str, Any]]:
    """The same of SAHI's sliced prediction with its defaults, GREEDYNMM by IOS 0.5, and the network's own boxes."""
    from sahi.predict import get_sliced_prediction

    from cascade_rcnn.sahi import CascadeRCNNDetectionModel

    detector = _detector(checkpoint, side)
    model = CascadeRCNNDetectionModel(model=detector, masks=False, confidence_threshold=LEAST, device="cpu")
    start = time.perf_counter()
    cut = {"slice_height": TILE, "slice_width": TILE, "overlap_height_ratio": OVERLAP, "overlap_width_ratio": OVERLAP}
    image = np.asarray(_decoded(path))
    result = get_sliced_prediction(image, model, perform_standard_pred=whole, batch_size=4, verbose=0, **cut)
    yield "seconds", time.perf_counter() - start
    objects = result.object_prediction_list
    boxes = np.array([one.bbox.to_xyxy() for one in objects], np.float32).reshape(-1, 4)
    labels = np.array([one.category.id - 1 for one in objects], np.int64)
    yield "found", (boxes, np.array([one.score.value for one in objects], np.float32), labels)


def _decoded(path: Path) -> Image.Image:
    Image.MAX_IMAGE_PIXELS = None
    return Image.open(path)


CONTENDERS = {
    "tiles": (ours, True),
    "tiles, --no-whole": (ours, False),
    "SAHI": (with_sahi, True),
    "SAHI, no standard prediction": (with_sahi, False),
}


def _run(contender: str, checkpoint: str, path: Path, side: int, pipe: Any) -> None:
    function, whole = CONTENDERS[contender]
    answer = dict(function(checkpoint, path, whole, side))
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    answer["memory"] = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1e6
    pipe.send(answer)


def measure(checkpoint: str, folder: Path, *, contenders: list[str], side: int) -> None:
    """Print the table."""
    from cascade_rcnn.evaluation.coco import evaluate_coco

    truth = json.loads((folder / "instances.json").read_text(encoding="utf-8"))
    print("| | recall on borders | elsewhere | larger than the overlap | false per true | AP | AP50 | seconds | GB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for contender in contenders:
        results: list[dict[str, Any]] = []
        seconds = memory = 0.0
        hits = Hits()
        false = true = 0
        for image in truth["images"]:
            here, there = multiprocessing.get_context("spawn").Pipe()
            path = folder / image["file_name"]
            process = multiprocessing.get_context("spawn").Process(
                target=_run, args=(contender, checkpoint, path, side, there)
            )
            process.start()
            there.close()
            answer = here.recv()
            process.join()
            seconds, memory = seconds + answer["seconds"], max(memory, answer["memory"])
            objects = [one for one in truth["annotations"] if one["image_id"] == image["id"]]
            wrong, right = _count(answer["found"], objects, image["width"], hits)
            false, true = false + wrong, true + right
            results += [
                {
                    "image_id": image["id"],
                    "category_id": int(label) + 1,
                    "bbox": [float(v) for v in (box[0], box[1], box[2] - box[0], box[3] - box[1])],
                    "score": float(score),
                }
                for box, score, label in zip(*answer["found"])
            ]
        metrics = evaluate_coco(truth, results, iou_type="bbox", max_detections=100_000)
        ap, ap50 = metrics["bbox/AP"] or 0, metrics["bbox/AP50"] or 0
        print(
            f"| {contender} | {hits} | {false / max(true, 1):.3f} | {ap:.4f} | {ap50:.4f} | {seconds:.0f} | "
            f"{memory:.2f} |",
            flush=True,
        )


class Hits:
    """Objects found and in all, by place and size."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float, bool]] = []  # place, longer side, found

    def __str__(self) -> str:
        border, elsewhere, large = (
            [(size, found) for where, size, found in self.seen if where == place]
            for place in ("border", "elsewhere", "large")
        )
        bins = np.arange(SMALL[0], SMALL[1] + BIN, BIN)
        both = [np.histogram([size for size, _ in part], bins)[0] for part in (border, elsewhere)]
        hit = np.histogram([size for size, found in elsewhere if found], bins)[0]
        usable = (both[0] > 0) & (both[1] > 0)
        alike = (hit[usable] / both[1][usable] * both[0][usable]).sum() / max(both[0][usable].sum(), 1)
        told = [
            f"{sum(f for _, f in part) / max(len(part), 1):.4f} ({len(part)})" for part in (border, elsewhere, large)
        ]
        return f"{told[0]} | {alike:.4f}; unweighted {told[1]} | {told[2]}"


def _count(found: Any, objects: list[dict[str, Any]], side: int, hits: Hits) -> tuple[int, int]:
    """Adds objects found and in all to ``hits``; gives (false, true) among the sure detections."""
    from cascade_rcnn.inference.merge_tiles import _iou
    from cascade_rcnn.inference.tiles import starts

    boxes, scores, labels = found
    sure = scores >= FOUND
    boxes, labels = boxes[sure].astype(np.float64), labels[sure]
    begins = starts(side, TILE, round(TILE * OVERLAP))
    lines = np.array([*begins[1:], *(begin + TILE for begin in begins[:-1])])
    right = np.zeros(len(boxes), np.bool_)
    for one in objects:
        x, y, w, h = one["bbox"]
        near = np.flatnonzero((labels == one["category_id"] - 1) & (np.abs(boxes[:, 0] - x) < w))
        matches = near[_iou(np.array([[x, y, x + w, y + h]], np.float64), boxes[near])[0] >= FOUND]
        if len(matches):
            right[matches[0]] = True  # any further one is a double
        crosses = ((lines > x) & (lines < x + w)).any() or ((lines > y) & (lines < y + h)).any()
        kind = "large" if max(w, h) > TILE * OVERLAP else "border" if crosses else "elsewhere"
        hits.seen.append((kind, max(w, h), bool(len(matches))))
    return int((~right).sum()), int(right.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("folder", type=Path)
    making.add_argument("--canvases", type=int, default=1)
    making.add_argument("--side", type=int, default=30_000)
    making.add_argument("--objects", type=int, default=5000)
    making.add_argument("--large", type=int, default=0)
    making.add_argument("--seed", type=int, default=0)
    making.add_argument("--blank", action="store_true")
    making.add_argument("--height", type=int, help="of a blank canvas (as its side)")
    measuring = commands.add_parser("measure")
    measuring.add_argument("checkpoint")
    measuring.add_argument("folder", type=Path)
    measuring.add_argument("--only", choices=CONTENDERS, nargs="*", default=list(CONTENDERS), help="contenders (all)")
    measuring.add_argument("--input", type=int, default=INPUT, help="side of the network's input (%(default)s)")
    args = parser.parse_args()
    if args.command == "make" and args.blank:
        blank(args.folder, args.side, args.height or args.side)
    elif args.command == "make":
        sizes = {"canvases": args.canvases, "side": args.side, "objects": args.objects, "large": args.large}
        make(args.folder, **sizes, seed=args.seed)
    else:
        measure(args.checkpoint, args.folder, contenders=args.only, side=args.input)


if __name__ == "__main__":
    main()
