"""The losses of the validation split: the same numbers from the same weights, and no trace in the training."""

from __future__ import annotations

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from cascade_rcnn import distributed
from cascade_rcnn.checkpoint import load_training
from cascade_rcnn.config import Config
from cascade_rcnn.data.formats.open import open_split
from cascade_rcnn.data.records import DataSplit
from cascade_rcnn.errors import ConfigError
from cascade_rcnn.models.build import build_model
from cascade_rcnn.train import train
from cascade_rcnn.training.validation_loss import ValidationLoss, chosen_rows
from small_training import run_alone, run_ranks, small_config, small_data

ALONE = distributed.World(0, 1, torch.device("cpu"))
CLASSES = 5


def _split() -> DataSplit:
    return open_split(small_data(), "val")


def _measure(config: Config, split: DataSplit, class_map: list[int] | None = None) -> dict[str, float]:
    torch.manual_seed(0)
    model = build_model(config.model, CLASSES, pretrained=False).eval()
    torch.rand(7)  # what has been drawn before does not matter
    return ValidationLoss(config, split, class_map or list(range(CLASSES)), ALONE).measure(model, nullcontext())


def test_equal_weights_give_equal_numbers_and_nothing_is_changed() -> None:
    config = small_config(model={"norm": "batch", "masks": "every"})
    torch.manual_seed(0)
    model = build_model(config.model, CLASSES, pretrained=False).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measured = ValidationLoss(config, _split(), list(range(CLASSES)), ALONE)
    torch.manual_seed(5)
    generator = torch.get_rng_state()
    first = measured.measure(model, nullcontext())
    assert torch.equal(torch.get_rng_state(), generator)
    torch.rand(9)
    assert measured.measure(model, nullcontext()) == first
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    names = ["rpn_cls", "rpn_box", *(f"s{k}.{part}" for k in range(3) for part in ("cls", "box", "mask"))]
    assert list(first) == ["loss", *names] and first["s0.mask"] > 0
    assert first["loss"] == pytest.approx(sum(first[name] for name in names))
    without = dataclasses.replace(_split(), has_masks=False)
    assert "s0.mask" not in ValidationLoss(config, without, list(range(CLASSES)), ALONE).measure(model, nullcontext())


def test_classes_are_matched_by_name() -> None:
    config, split = small_config(), _split()
    order = [3, 0, 4, 1, 2]  # their class of each of ours
    theirs = dataclasses.replace(
        split,
        class_names=tuple(split.class_names[order.index(label)] for label in range(CLASSES)),
        records=[
            dataclasses.replace(one, labels=torch.tensor(order).numpy()[one.labels].astype(one.labels.dtype))
            for one in split.records
        ],
    )
    assert _measure(config, theirs, order) == _measure(config, split)
    assert _measure(config, theirs) != _measure(config, split)


def test_an_image_that_cannot_be_read_any_more_does_not_count(tmp_path: Path) -> None:
    config, split = small_config(), _split()
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"x")
    records = list(split.records)
    lost = dataclasses.replace(split, records=[*records[:3], dataclasses.replace(records[3], path=broken)])
    kept = dataclasses.replace(split, records=records[:3])
    assert _measure(config, lost) == pytest.approx(_measure(config, kept))
    nothing = dataclasses.replace(split, records=[dataclasses.replace(records[0], path=broken)])
    assert _measure(config, nothing) == {}


def test_rows_are_spread_and_shared_equally() -> None:
    assert chosen_rows(100, 4, 1) == [0, 25, 50, 75]
    assert chosen_rows(3, 32, 1) == [0, 1, 2]
    assert chosen_rows(7, 32, 2) == [0, 1, 2, 3, 4, 5]
    assert len(set(chosen_rows(1000, 2, 8))) == 8
    assert chosen_rows(3, 32, 8) == [0, 1, 2, 0, 1, 2, 0, 1]


def _train_to(config: Config, out: Path) -> str:
    return str(train(config, out=out))


def test_training_is_the_same_with_and_without_looking(tmp_path: Path) -> None:
    """Neither the losses of the validation split nor the pages about the run leave a trace in what is trained."""
    states, measured = [], []
    for images in (0, 3):
        config = small_config(
            evaluate_every=1,
            val_loss_images=images,
            summary=images > 0,
            ema=0.9,
            model={"norm": "batch"},
            data={"workers": 1},
        )
        run_alone(_train_to, config, tmp_path / str(images))
        states.append(load_training(tmp_path / str(images)))
        lines = (tmp_path / str(images) / "metrics.jsonl").read_text().splitlines()
        measured.append([json.loads(line) for line in lines])
    left = [{path.name for path in (tmp_path / name).iterdir()} for name in ("0", "3")]
    assert left[1] - left[0] == {"summary.html", "curves.json", "run.json"}
    (first, about_first), (second, about_second) = states
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert about_first["progress"] == about_second["progress"]
    logged = json.loads((tmp_path / "3" / "log.jsonl").read_text().splitlines()[-1])
    names = {name for name in logged if name.startswith(("loss", "rpn_", "s0.", "s1.", "s2."))}
    without, with_losses = measured
    for a, b in zip(without, with_losses, strict=True):
        assert b.keys() - a.keys() == names and "s2.box" in names
        assert all(b[name] > 0 for name in names)
    assert with_losses[0]["loss"] != with_losses[1]["loss"]


def _losses_of_rank(config: Config) -> dict[str, float]:
    with distributed.start("cpu") as world:
        torch.manual_seed(0)
        model = build_model(config.model, CLASSES, pretrained=False).eval()
        return ValidationLoss(config, _split(), list(range(CLASSES)), world).measure(model, nullcontext())


def test_two_processes_share_the_images() -> None:
    small_data()
    config = small_config(val_loss_images=3)  # of which two are taken
    first, second = run_ranks(2, _losses_of_rank, config)
    assert first == second
    alone = run_alone(_losses_of_rank, small_config(val_loss_images=2))
    assert first.keys() == alone.keys() and first["loss"] == pytest.approx(alone["loss"], rel=0.02)
    assert first["rpn_cls"] == pytest.approx(alone["rpn_cls"], rel=1e-5)


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"val_loss_images -1: 0 \(none\) or more"):
        small_config(val_loss_images=-1)
