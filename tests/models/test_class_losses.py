"""Focal and seesaw loss against their formulas, written out one sample at a time; what seesaw counts and keeps."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cascade_rcnn.checkpoint import save_checkpoint
from cascade_rcnn.config import Config
from cascade_rcnn.inference.detector import load
from cascade_rcnn.models.cascade_rcnn import CascadeRCNN
from cascade_rcnn.models.class_losses import Focal, Seesaw
from cascade_rcnn.training.init_weights import start_from
from tiny import TINY, squares, tiny_model

CLASSES = 3


@pytest.fixture
def samples() -> tuple[Tensor, Tensor]:
    """Logits [M, K + 1] and classes [M], background among them, one of them all but certainly wrong."""
    logits = 3 * torch.randn(12, CLASSES + 1, generator=torch.Generator().manual_seed(5))
    wanted = torch.arange(12) % (CLASSES + 1)
    logits[0, 0] = -20.0
    return logits, wanted


def probabilities(row: Tensor) -> list[float]:
    exp = np.exp(row.double().numpy() - float(row.max()))
    return [float(value) for value in exp / exp.sum()]


def test_focal_is_cross_entropy_times_the_square_of_what_is_missing(samples: tuple[Tensor, Tensor]) -> None:
    logits, wanted = samples
    for row, right, loss in zip(logits, wanted.tolist(), Focal()(logits, wanted)):
        p = probabilities(row)[right]
        assert loss.item() == pytest.approx(-((1 - p) ** 2) * np.log(p), rel=1e-4)


def test_focal_gradients_are_finite_where_a_sample_is_certain() -> None:
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    Focal()(logits, torch.tensor([0, 0])).sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_seesaw_equals_its_formula(samples: tuple[Tensor, Tensor]) -> None:
    logits, wanted = samples
    seesaw = Seesaw(CLASSES)
    seesaw.counts = torch.tensor([1000, 50, 0])
    counts = [1000, 50, 1]
    for row, right, loss in zip(logits, wanted.tolist(), seesaw(logits, wanted)):
        p, exp = probabilities(row), np.exp(row.double().numpy())
        total = exp[right]
        for other in set(range(CLASSES + 1)) - {right}:
            factor = 1.0
            if right < CLASSES and other < CLASSES:
                factor *= min(1.0, counts[other] / counts[right]) ** 0.8
                factor *= max(1.0, p[other] / max(p[right], 0.01)) ** 2
            total += factor * exp[other]
        assert loss.item() == pytest.approx(-np.log(exp[right] / total), rel=1e-3, abs=1e-6)


def test_a_rare_class_is_pushed_down_less_by_samples_of_a_frequent_one() -> None:
    """The gradient on the logits of a sample of the frequent class."""
    logits = torch.zeros(1, CLASSES + 1, requires_grad=True)
    seesaw = Seesaw(CLASSES)
    seesaw.counts = torch.tensor([1000, 1000, 1])
    (push,) = torch.autograd.grad(seesaw(logits, torch.tensor([0])).sum(), logits)
    (plain,) = torch.autograd.grad(F.cross_entropy(logits, torch.tensor([0])), logits)
    assert push[0, 2] < 0.02 * plain[0, 2]
    assert push[0, 1] > plain[0, 1]  # a class as frequent takes its share


def counts_of(model: CascadeRCNN) -> list[list[int]]:
    return [value.tolist() for name, value in model.state_dict().items() if name.endswith("class_loss.counts")]


def test_seesaw_counts_the_positives_of_training_steps_alone() -> None:
    model = tiny_model(class_loss="seesaw").train()
    images, targets = squares()
    with torch.no_grad():
        model.loss(images, targets)
    assert counts_of(model) == [[0, 0, 0]] * 3
    losses = model.loss(images, targets)
    once = counts_of(model)
    assert all(stage[0] >= 2 and stage[1] >= 2 and stage[2] == 0 for stage in once)  # an object of each in both images
    assert all(loss.isfinite() for loss in losses.values())
    model.eval()
    model.loss(images, targets)
    assert counts_of(model) == once


@pytest.mark.parametrize("kind", ["focal", "seesaw"])
def test_a_network_learns_is_saved_and_goes_on_elsewhere(kind: Any, tmp_path: Path) -> None:
    model = tiny_model(class_loss=kind).train()
    images, targets = squares()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    totals = []
    for _ in range(8):
        losses = model.loss(images, targets)
        total = torch.stack([loss for name, loss in losses.items() if name.endswith("cls")]).sum()
        optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.7 * totals[0]

    config = Config(model=dataclasses.replace(TINY, class_loss=kind))
    path = tmp_path / "saved.safetensors"
    names = ("a", "b", "c")
    save_checkpoint(path, model.state_dict(), config=config, class_names=names, category_ids=(1, 2, 3))
    assert counts_of(load(path, device="cpu").model) == counts_of(model)
    assert start_from(tiny_model(classes=2, class_loss="seesaw"), path, ("c", "d"), TINY).endswith("knows already: c")
    assert start_from(tiny_model(), path, names, TINY).endswith("a, b, c")
