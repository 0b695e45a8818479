"""The losses of the validation split: rising while those of training fall, they show a training that went on too long.

The same images, unchanged, with the same random samples at each evaluation: equal weights give equal numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np
import torch

from cascade_rcnn import distributed
from cascade_rcnn.config import Config
from cascade_rcnn.data.dataset import DetectionDataset
from cascade_rcnn.data.loader import Collate
from cascade_rcnn.data.records import DataSplit
from cascade_rcnn.models.cascade_rcnn import CascadeRCNN
from cascade_rcnn.structures import Targets
from cascade_rcnn.training.random_state import seed_generators, undisturbed_generators


class ValidationLoss:
    """The losses of ``train.val_loss_images`` images of a split, spread evenly over it.

    Every process takes its part, equally many; of two processes the first looks at every second of these images. A
    process looks at one image at a time, so the memory is that of an evaluation. (As in training, a loss is divided by
    the samples of the images that the processes look at together: another number of them moves the last digits.)
    """

    def __init__(self, config: Config, split: DataSplit, class_map: Sequence[int], world: distributed.World) -> None:
        """``class_map`` [K]: the split's label of each label of the model, -1 for none."""
        self._masks = config.model.masks != "none" and split.has_masks
        rows = chosen_rows(len(split), config.train.val_loss_images, world.size)[world.rank :: world.size]
        own, semantics = replace(split, records=[split.records[row] for row in rows]), config.model.semantics
        self._dataset = DetectionDataset(own, config.data, training=False, masks=self._masks, semantics=semantics)
        self._collate = Collate(config.data.pad_multiple)
        self._seed, self._world = config.train.seed, world
        known = {theirs: ours for ours, theirs in enumerate(class_map) if theirs >= 0}
        # classes that the model does not know have no objects here but, perhaps, regions to ignore
        self._labels = torch.tensor([known.get(label, 0) for label in range(len(split.class_names))])

    @torch.no_grad()
    def measure(self, model: CascadeRCNN, precision: AbstractContextManager[object]) -> dict[str, float]:
        """Means of ``loss`` and its parts by name, as ``log.jsonl`` has them for training; call ``eval()`` first.

        All processes call it together and get the same numbers. Nothing of the training changes: neither weights, nor
        the statistics of norms, nor random generators. Empty where none of the images can be read.
        """
        device = self._world.device
        names: list[str] = []
        total, count = torch.zeros(0, device=device), torch.zeros(1, device=device)
        with undisturbed_generators(device), precision:
            for number in range(len(self._dataset)):
                own = number * self._world.size + self._world.rank  # among all images, whoever looks at it
                seed_generators(self._seed, 0, own)  # for the random RoIs of the losses
                images, targets = self._collate([self._dataset[number]])  # type: ignore[misc]
                losses = model.loss(images.to(device), self._as_model(targets).to(device))
                names = list(losses)
                values = torch.stack([loss.float() for loss in losses.values()])
                total = total if len(total) else torch.zeros_like(values)
                if not images.bad:  # a black one has only taken part because the processes wait for each other
                    total, count = total + values, count + 1
        sums = distributed.mean_over_ranks(torch.cat([total, count]))
        if not float(sums[-1]):
            return {}
        means = dict(zip(names, (sums[:-1] / sums[-1]).tolist()))
        means = {name: value for name, value in means.items() if self._masks or not name.endswith(".mask")}
        return {"loss": sum(means.values()), **means}

    def _as_model(self, targets: Targets) -> Targets:
        """With the model's labels."""
        targets.labels = self._labels[targets.labels]
        return targets


def chosen_rows(images: int, limit: int, processes: int) -> list[int]:
    """Rows spread evenly over ``images``, at most ``limit`` of them, as many for each of the processes.

    Fewer images than processes are taken more than once; a limit below the number of processes is raised to it.
    """
    each = max(min(images, limit) // processes, 1)
    if images < processes:
        return [row % images for row in range(processes)]
    rows: list[int] = np.linspace(0, images, each * processes, endpoint=False).astype(np.int64).tolist()
    return rows
