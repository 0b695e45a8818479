"""What a trained network does: its detections in every way that a table asks for, and what its stages do to boxes.

B images, N boxes, S stages. A *way* is a list of detections of the whole evaluation split, e.g. ``final`` (as the
product detects), ``stage2`` (stage 2 alone), ``ensemble2`` (the product's ``--stages 2``), ``head3_on_boxes1``.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from product import (
    Config,
    DataSplit,
    DetectionDataset,
    Detections,
    ImageBatch,
    Proposals,
    Samples,
    Targets,
    encode_boxes,
    eval_loader,
    most_likely,
    pairwise_iou,
    take,
    to_detections,
    train_loader,
)
from torch import Tensor

ROUNDS = 3  # of one head, applied to its own output (iterative box)
HYPOTHESIS_IOUS = (0.5, 0.6, 0.7, 0.8, 0.9)
IOU_BINS = np.round(np.arange(0.3, 1.0001, 0.05), 2)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
Ways = dict[str, list[Detections]]


class Network:
    """A trained network in parts: features, proposals, and any head on any boxes."""

    def __init__(self, model: Any) -> None:
        self.model, self.cascade = model, model.cascade
        self.stages = len(self.cascade.box_heads)

    def begin(self, images: ImageBatch) -> tuple[list[Tensor], Tensor, Tensor]:
        """Feature maps, and the proposals [B, N, 4] with their validity [B, N]."""
        pyramid = self.model.pyramid(images)
        proposals = self.model.rpn.propose(pyramid, images.sizes)
        return pyramid, proposals.boxes, proposals.valid

    def head(self, k: int, pyramid: list[Tensor], boxes: Tensor, valid: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits [B, N, K + 1] of head ``k`` (0, 1, ...) and the boxes [B, N, 4] that it makes of ``boxes``."""
        logits, deltas = self.cascade._run_stage(k, pyramid, boxes, valid)
        return logits, self.cascade.stages[k].move(deltas, boxes, most_likely(logits), sizes)

    def select(self, logits: list[Tensor], boxes: Tensor, valid: Tensor) -> Any:
        """Detections: the mean of the logits, then thresholds and non-maximum suppression."""
        return self.cascade._select(self.cascade._ensemble(logits), boxes, valid)


def nearest(boxes: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """IoU [B, N] of each box with the object that it overlaps most (-1 where an image has none), and which that is."""
    best, index = pairwise_iou(boxes, targets.boxes).masked_fill(~targets.valid[:, None], -1).max(dim=2)
    return best, index


class Regression:
    """Mean IoU after a head by the IoU before it (the paper's figure 1c)."""

    def __init__(self) -> None:
        self.count = np.zeros(len(IOU_BINS) - 1)
        self.before, self.after = np.zeros_like(self.count), np.zeros_like(self.count)

    def add(self, boxes: Tensor, moved: Tensor, valid: Tensor, targets: Targets) -> None:
        before, index = nearest(boxes, targets)
        own = take(targets.boxes, index)
        after = pairwise_iou(moved[:, :, None], own[:, :, None]).flatten(1)
        before_, after_ = before[valid].cpu().numpy(), after[valid].cpu().numpy()
        place = np.digitize(before_, IOU_BINS) - 1
        inside = (place >= 0) & (place < len(self.count))
        for total, values in ((self.count, np.ones_like(before_)), (self.before, before_), (self.after, after_)):
            np.add.at(total, place[inside], values[inside])

    def summary(self) -> dict[str, list[float]]:
        many = np.maximum(self.count, 1)
        return {
            "count": self.count.tolist(),
            "before": (self.before / many).tolist(),
            "after": (self.after / many).tolist(),
        }


class Look:
    """Collects detections by way, and regressions by head, over a split."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.ways: Ways = defaultdict(list)
        self.regressions: dict[str, Regression] = defaultdict(Regression)
        self._names = names

    def keep(self, way: str, raw: Any, images: ImageBatch) -> None:
        self.ways[way] += to_detections(raw.to("cpu"), images, self._names)


@torch.inference_mode()
def look_at_split(
    model: Any,
    config: Config,
    names: tuple[str, ...],
    split: DataSplit,
    *,
    everything: bool,
    other: Any | None = None,
    device: str,
    batch_size: int = 8,
) -> Look:
    """Detections of a network on a split.

    ``everything``: in all ways, not only the product's own. ``other``: a cascade whose boxes a one-stage network is
    given as well.
    """
    network, cascade = Network(model), Network(other) if other is not None else None
    look = Look(names)
    for images, targets in eval_batches(split, config, batch_size):
        on_device, truth = images.to(device), targets.to(device)
        if not everything:
            look.keep("final", model.detect(on_device), images)
        elif network.stages > 1:
            _look_at_cascade(network, look, images, on_device, truth)
        else:
            _look_at_single(network, cascade, look, images, on_device, truth)
    return look


def eval_batches(split: DataSplit, config: Config, batch_size: int) -> Iterator[tuple[ImageBatch, Targets]]:
    loader = eval_loader(DetectionDataset(split, config.data, training=False), batch_size=batch_size, workers=0)
    yield from loader
    loader.close()


def _look_at_cascade(network: Network, look: Look, images: ImageBatch, given: ImageBatch, truth: Targets) -> None:
    pyramid, boxes, valid = network.begin(given)
    entering, own = [boxes], []  # what enters each stage, and each stage's own logits
    for k in range(network.stages):
        logits, moved = network.head(k, pyramid, entering[k], valid, given.sizes)
        look.regressions[f"stage{k + 1}"].add(entering[k], moved, valid, truth)
        own.append(logits)
        entering.append(moved)
        look.keep(f"stage{k + 1}", network.select([logits], moved, valid), images)
        look.keep(f"ensemble{k + 1}", network.select(own, moved, valid), images)
    look.ways["final"] = look.ways[f"ensemble{network.stages}"]
    if network.stages != 3:
        return
    for b in range(network.stages):
        for k in range(network.stages):
            logits, moved = network.head(k, pyramid, entering[b], valid, given.sizes)
            look.keep(f"head{k + 1}_on_boxes{b + 1}", network.select([logits], moved, valid), images)
            if b == 0:
                look.regressions[f"head{k + 1}_on_proposals"].add(entering[0], moved, valid, truth)
    last = network.stages - 1
    judges = [network.head(k, pyramid, entering[last], valid, given.sizes)[0] for k in range(network.stages)]
    look.keep("all_judge_last", network.select(judges, entering[-1], valid), images)


def _look_at_single(
    network: Network, cascade: Network | None, look: Look, images: ImageBatch, given: ImageBatch, truth: Targets
) -> None:
    pyramid, boxes, valid = network.begin(given)
    each, moved = [], boxes
    for number in range(ROUNDS):
        before = moved
        logits, moved = network.head(0, pyramid, before, valid, given.sizes)
        look.regressions[f"round{number + 1}"].add(before, moved, valid, truth)
        each.append(logits)
        look.keep(f"round{number + 1}", network.select([logits], moved, valid), images)
        look.keep(f"rounds{number + 1}_mean", network.select(each, moved, valid), images)
    look.ways["final"] = look.ways["round1"]
    with_truth, real = torch.cat([truth.boxes, boxes], dim=1), torch.cat([truth.valid, valid], dim=1)
    logits, moved = network.head(0, pyramid, with_truth, real, given.sizes)
    look.keep("truth_added", network.select([logits], moved, real), images)
    if cascade is not None:
        maps, boxes, valid = cascade.begin(given)
        for k in range(cascade.stages - 1):
            boxes = cascade.head(k, maps, boxes, valid, given.sizes)[1]
            logits, moved = network.head(0, pyramid, boxes, valid, given.sizes)
            look.keep(f"cascade_boxes{k + 2}", network.select([logits], moved, valid), images)


class Hypotheses:
    """What enters each stage in training: how well it overlaps with objects, and the deltas that lead to them.

    ``proposals``: the RPN's; ``stage1``: those that are sampled from them; ``stage2``, ...: these as the stages before
    have refined them. Ground truth that is added in each stage is left out.
    """

    def __init__(self, cascade: Any) -> None:
        self.overlaps: dict[str, list[Tensor]] = defaultdict(list)
        self.deltas: dict[str, list[Tensor]] = defaultdict(list)
        for number, stage in enumerate(cascade.stages, start=1):
            stage.sample = functools.partial(self._look_and_sample, stage.sample, number, stage.details.iou)

    def _look_and_sample(
        self, sample: Callable[..., Samples], number: int, iou: float, proposals: Proposals, targets: Targets
    ) -> Samples:
        samples = sample(proposals, targets)
        if number == 1:
            self._add("proposals", proposals.boxes, proposals.valid, targets, 0.5)
            self._add("stage1", samples.boxes, samples.valid & ~samples.is_truth, targets, iou)
        else:
            self._add(f"stage{number}", proposals.boxes, proposals.valid, targets, iou)
        return samples

    def _add(self, name: str, boxes: Tensor, valid: Tensor, targets: Targets, iou: float) -> None:
        best, index = nearest(boxes, targets)
        deltas = encode_boxes(boxes, take(targets.boxes, index), torch.ones(4, device=boxes.device))
        self.overlaps[name].append(best[valid].cpu())
        for limit, suffix in ((0.5, ""), (iou, "_positive")):
            self.deltas[name + suffix].append(deltas[valid & (best >= limit)].cpu())

    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = {"share": {}, "deltas": {}}
        for name, parts in self.overlaps.items():
            best = torch.cat(parts)
            found["share"][name] = {f"{iou}": float((best >= iou).float().mean()) for iou in HYPOTHESIS_IOUS}
        for name, parts in self.deltas.items():
            values = torch.cat(parts).numpy().reshape(-1, 4)
            if len(values) > 1:
                found["deltas"][name] = {
                    "count": len(values),
                    "std": values.std(axis=0).tolist(),
                    "mean": values.mean(axis=0).tolist(),
                    "quantiles": np.quantile(values, QUANTILES, axis=0).T.tolist(),  # [4, Q]
                }
        return found


@torch.no_grad()
def look_at_training(model: Any, config: Config, split: DataSplit, *, device: str, images: int = 128) -> dict[str, Any]:
    """Statistics of the hypotheses that the stages of a trained network see in training."""
    dataset = DetectionDataset(split, config.data, training=True)
    batch = config.train.batch_size
    loader = train_loader(dataset, batch_size=batch, workers=0, seed=10_000)
    hypotheses = Hypotheses(model.cascade)
    torch.manual_seed(0)
    model.train()
    for number, (pictures, targets) in enumerate(loader):
        if number * batch >= images:
            break
        model.loss(pictures.to(device), targets.to(device))
    model.eval()
    loader.close()
    for stage in model.cascade.stages:
        del stage.sample  # the wrapper, an attribute of this one object
    return hypotheses.summary()


def save_ways(ways: Ways, path: Path, image_rows: dict[Any, int]) -> None:
    """All ways in one compressed file: per detection the image's row, label, score, and the box in 1/64 pixels."""
    arrays: dict[str, NDArray[Any]] = {}
    for way, found in ways.items():
        rows = [np.full(len(one), image_rows[one.image_id], np.int16) for one in found]
        boxes = torch.cat([one.boxes for one in found]).numpy()
        arrays[f"{way}/image"] = np.concatenate(rows)
        arrays[f"{way}/label"] = torch.cat([one.labels for one in found]).numpy().astype(np.uint8)
        arrays[f"{way}/score"] = torch.cat([one.scores for one in found]).numpy().astype(np.float32)
        arrays[f"{way}/box"] = np.clip(np.round(boxes * 64), 0, 65535).astype(np.uint16)
    temporary = path.with_suffix(".tmp.npz")
    np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]
    temporary.replace(path)


def read_ways(path: Path) -> dict[str, dict[str, NDArray[Any]]]:
    """What ``save_ways`` wrote, boxes in pixels [N, 4] xyxy."""
    ways: dict[str, dict[str, NDArray[Any]]] = defaultdict(dict)
    with np.load(path) as arrays:
        for key in arrays.files:
            way, what = key.rsplit("/", 1)
            ways[way][what] = arrays[key] / 64 if what == "box" else arrays[key]
    return dict(ways)
