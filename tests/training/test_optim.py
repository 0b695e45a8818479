"""Schedules, learning rates, the optimizer's step, and the moving average."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from cascade_rcnn.config import TrainConfig
from cascade_rcnn.errors import CheckpointError, ConfigError
from cascade_rcnn.training.optim import (
    MovingAverage,
    Updater,
    build_optimizer,
    precision_of,
)

CPU = torch.device("cpu")


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def test_norms_and_biases_can_go_without_decay() -> None:
    model = _model()
    model[0].requires_grad_(False)
    train = TrainConfig(weight_decay=0.1)
    assert [group["weight_decay"] for group in build_optimizer(model, train, lr=1, fused=False).param_groups] == [0.1]
    optimizer = build_optimizer(model, TrainConfig(weight_decay=0.1, norm_weight_decay=False), lr=1, fused=False)
    decayed, free = optimizer.param_groups
    assert decayed["weight_decay"] == 0.1 and [p.ndim for p in decayed["params"]] == [2]
    assert free["weight_decay"] == 0 and [p.ndim for p in free["params"]] == [1, 1, 1]


def test_a_model_that_is_frozen_whole_is_refused() -> None:
    with pytest.raises(ConfigError, match="frozen_stages"):
        build_optimizer(_model().requires_grad_(False), TrainConfig(), lr=1, fused=False)


def _step(model: nn.Module, updater: Updater, value: float, *, passes: int = 1) -> torch.Tensor:
    for _ in range(passes):
        with updater.forward():
            loss = model(torch.full((3, 4), value)).square().mean()
        updater.backward(loss / passes)
    return updater.step(1.0)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "as on a GPU"])
def test_a_step_without_finite_gradients_changes_nothing(optimizer: str, fused: bool) -> None:
    """Also the very first one, when there is no momentum yet. The fused kernels decide on the device."""
    model = _model()
    updater = _updater(model, fused=fused, optimizer=optimizer)
    before = copy.deepcopy(model.state_dict())
    assert not _step(model, updater, float("nan")).isfinite()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert _step(model, updater, 1.0).isfinite()
    assert not any(torch.equal(value, before[name]) for name, value in model.named_parameters())

    clean = _model()
    _step(clean, _updater(clean, fused=fused, optimizer=optimizer), 1.0)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in clean.state_dict().items())


def _updater(model: nn.Module, *, fused: bool = False, lr: float = 0.1, **settings: Any) -> Updater:
    train = TrainConfig(**settings)
    updater = Updater(model, train, lr=lr, device=CPU)
    if fused:
        updater.optimizer, updater._fused = build_optimizer(model, train, lr=lr, fused=True), True
    return updater


def test_passes_of_a_step_add_up_to_their_mean() -> None:
    one, many = _model(), _model()
    norms = [_step(one, _updater(one), 2.0), _step(many, _updater(many), 2.0, passes=4)]
    assert norms[0] == pytest.approx(norms[1])
    for a, b in zip(one.parameters(), many.parameters()):
        torch.testing.assert_close(a, b)


def test_clipping_limits_the_change_but_reports_the_whole_norm() -> None:
    free, clipped = _model(), _model()
    start = [parameter.detach().clone() for parameter in free.parameters()]
    settings: dict[str, Any] = {"momentum": 0.0, "weight_decay": 0.0}
    norm = _step(free, _updater(free, **settings), 9.0)
    assert norm == _step(clipped, _updater(clipped, clip_grad_norm=0.01, **settings), 9.0)
    change = math.sqrt(sum((a.detach() - b).square().sum().item() for a, b in zip(clipped.parameters(), start)))
    assert norm > 0.01 and change == pytest.approx(0.1 * 0.01, rel=1e-3)


@pytest.mark.parametrize(
    "settings", [{"optimizer": "sgd"}, {"optimizer": "adamw"}, {"optimizer": "adamw", "precision": "fp16"}]
)
def test_a_restored_optimizer_goes_on_exactly(settings: dict[str, Any]) -> None:
    whole = _model()
    updater = _updater(whole, **settings)
    for value in (1.0, 2.0, 3.0):
        _step(whole, updater, value)
    halfway = _model()
    first = _updater(halfway, **settings)
    for value in (1.0, 2.0):
        _step(halfway, first, value)
    saved = {name: value.clone() for name, value in first.tensors().items()}
    resumed = _updater(halfway, **settings)
    resumed.restore(saved)
    _step(halfway, resumed, 3.0)
    assert resumed.tensors().keys() == updater.tensors().keys() == saved.keys()
    assert all(torch.equal(value, resumed.tensors()[name]) for name, value in updater.tensors().items())
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), halfway.parameters()))


def test_restored_momentum_lies_in_memory_as_its_weight_does() -> None:
    """Fused kernels walk over both by address."""
    model = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    updater = _updater(model)
    updater.restore({name: value.contiguous() for name, value in updater.tensors().items()})
    assert updater.optimizer.state[model.weight]["momentum_buffer"].stride() == model.weight.stride()


def test_a_state_of_another_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"a state for 0\.weight"):
        _updater(nn.Linear(4, 2)).restore(_updater(_model()).tensors())


def test_fp16_scales_the_loss_and_skips_overflow() -> None:
    model = _model()
    updater = _updater(model, precision="fp16")
    assert updater.scales_loss and updater.precision == "fp16"
    before = copy.deepcopy(model.state_dict())
    scale = updater.tensors()["scaler/scale"]
    assert not _step(model, updater, 3e4).isfinite()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert updater.tensors()["scaler/scale"] == scale / 2


def test_precision_auto_is_float32_on_a_cpu() -> None:
    assert precision_of(TrainConfig(), CPU) == torch.float32
    assert precision_of(TrainConfig(precision="bf16"), CPU) == torch.bfloat16


def test_bf16_runs_the_forward_pass_in_bf16() -> None:
    model = _model()
    with _updater(model, precision="bf16").forward():
        assert model(torch.ones(3, 4)).dtype == torch.bfloat16


def test_the_moving_average_follows_and_is_put_back() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    average = MovingAverage(model, 0.5)
    nn.init.constant_(model.weight, 3.0)
    average.update()  # decay min(0.5, 2 / 11) in the first update
    expected = 1 + (3 - 1) * (1 - 2 / 11)
    assert average.tensors()["ema.weight"].item() == pytest.approx(expected)
    with pytest.raises(KeyError), average.applied():
        assert model.weight.item() == pytest.approx(expected)
        raise KeyError
    assert model.weight.item() == 3.0 and average.tensors()["ema.weight"].item() == pytest.approx(expected)
    other = MovingAverage(model, 0.5)
    other.restore(average.tensors(), updates=average.updates)
    assert other.updates == 1 and other.tensors()["ema.weight"].item() == pytest.approx(expected)


def test_the_moving_average_leaves_counters_alone() -> None:
    model = nn.BatchNorm1d(2)
    assert "ema.running_mean" in MovingAverage(model, 0.9).tensors()
    assert "ema.num_batches_tracked" not in MovingAverage(model, 0.9).tensors()
