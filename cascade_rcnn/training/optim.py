"""From gradients to new weights: optimizer, mixed precision, clipping, moving average.

Nothing here waits for a GPU: whether a step's gradients are finite stays on the device, and the optimizer's fused
kernel leaves the weights unchanged if they are not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from cascade_rcnn.config import TrainConfig
from cascade_rcnn.errors import CheckpointError, ConfigError
from cascade_rcnn.training.layer_decay import rate_factors


def build_optimizer(model: nn.Module, train: TrainConfig, *, lr: float, fused: bool) -> torch.optim.Optimizer:
    """SGD or AdamW over the trainable parameters, in groups of one weight decay and one factor of the rate."""
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ConfigError("no parameter of the model is trainable: lower model.frozen_stages")
    factors = dict.fromkeys(trainable, 1.0)
    if train.layer_decay < 1:  # groups are counted over the whole network, so that freezing moves none
        every = rate_factors((name for name, _ in model.named_parameters()), train.layer_decay)
        factors = {name: every[name] for name in trainable}
    members: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trainable.items():
        decays = train.norm_weight_decay or not _is_norm_or_bias(name, parameter)
        key = (train.weight_decay if decays else 0.0, factors[name])
        members.setdefault(key, []).append(parameter)
    groups = [
        {"params": parameters, "weight_decay": decay, "rate_factor": factor}
        for (decay, factor), parameters in sorted(members.items(), key=lambda item: item[0], reverse=True)
    ]
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=fused)
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=train.momentum, fused=fused)
    for parameter in trainable.values() if train.momentum else ():
        # as the first step would do, but also right where the first step is skipped (the fused kernel leaves it unset)
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _is_norm_or_bias(name: str, parameter: Tensor) -> bool:
    """Norms, biases, layer scales; and tables of positions, which are biases too."""
    return parameter.ndim <= 1 or name.endswith("position_bias_table")


def precision_of(train: TrainConfig, device: torch.device) -> torch.dtype:
    """The type that matrix products run in: ``auto`` is bfloat16 on GPUs that have it, else float32."""
    if train.precision == "auto":
        usable = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if usable else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[train.precision]


class Updater:
    """Optimizer, loss scaling and clipping as one: ``with forward(): ...``, ``backward(loss)``, ``step(lr)``."""

    def __init__(self, model: nn.Module, train: TrainConfig, *, lr: float, device: torch.device) -> None:
        self.lr = lr
        self._device, self._clip = device, train.clip_grad_norm
        self._fused = device.type == "cuda"
        self.optimizer = build_optimizer(model, train, lr=lr, fused=self._fused)
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        self._dtype = precision_of(train, device)
        self._scaler = torch.amp.GradScaler(device.type, enabled=self._dtype == torch.float16)

    @property
    def precision(self) -> str:
        return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self._dtype]

    @property
    def scales_loss(self) -> bool:
        """fp16: gradients that overflow now and then are how the scale is found, not a fault."""
        return self._scaler.is_enabled()

    def forward(self) -> AbstractContextManager[object]:
        """Mixed precision for the forward pass."""
        return torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a pass. The caller divides the loss by the number of passes."""
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def step(self, factor: float) -> Tensor:
        """Change the weights with ``factor`` of the learning rate, unless a gradient is not finite.

        Returns the norm of the gradients before clipping [], on the device; not finite where the step was skipped.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * factor * group["rate_factor"]
        self._scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
        if self._clip > 0:
            clip_grads_with_norm_(parameters, self._clip, norm, foreach=True)
        if self._scaler.is_enabled():
            self._scaler.step(self.optimizer)
            self._scaler.update()
        elif self._fused:
            # what GradScaler hands to fused optimizers: their kernels return at once where found_inf is 1
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]
            self.optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif math.isfinite(norm.item()):  # a CPU: nothing to wait for
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """Everything that training changes, by name: ``optimizer.<parameter>/<what>`` and ``scaler/<what>``."""
        found = {
            f"optimizer.{self._names[parameter]}/{key}": value
            for parameter, values in self.optimizer.state.items()
            for key, value in values.items()
            if isinstance(value, Tensor)
        }
        numbers = {
            f"scaler/{key}": torch.tensor(value, dtype=torch.float64)
            for key, value in self._scaler.state_dict().items()
        }
        return found | numbers

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what ``tensors`` returned, in the memory layout of the parameters (the fused kernels rely on it)."""
        parameters = {name: parameter for parameter, name in self._names.items()}
        for key, value in tensors.items():
            kind, _, what = key.rpartition("/")
            name = kind.removeprefix("optimizer.")
            if kind == "scaler" or not kind.startswith("optimizer."):
                continue
            if name not in parameters:
                raise CheckpointError(
                    f"the saved optimizer has a state for {name}, the model has no such parameter: "
                    "resume with the configuration of the run"
                )
            parameter = parameters[name]
            if what == "step":
                restored = value.to(parameter.device if self._fused else "cpu")
            else:
                restored = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            self.optimizer.state[parameter][what] = restored
        numbers = {
            key.removeprefix("scaler/"): value.item() for key, value in tensors.items() if key.startswith("scaler/")
        }
        if numbers and self._scaler.is_enabled():
            numbers["growth_interval"] = int(numbers["growth_interval"])
            numbers["_growth_tracker"] = int(numbers["_growth_tracker"])
            self._scaler.load_state_dict(numbers)


class MovingAverage:
    """Exponential moving average of the weights; ``decay`` is approached from below in the first steps.

    Integers (batch counters) are copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay, self.updates = decay, 0
        self._model = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
        self._average = {name: value.detach().clone() for name, value in self._model.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the current weights."""
        self.updates += 1
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self._average.values()), list(self._model.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averaged weights; afterwards its own again."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, value in self._model.items():
            kept = value.clone()
            value.copy_(self._average[name])
            self._average[name].copy_(kept)

    def tensors(self) -> dict[str, Tensor]:
        """The averages by name: ``ema.<name>``."""
        return {f"ema.{name}": value for name, value in self._average.items()}

    def restore(self, tensors: Mapping[str, Tensor], *, updates: int) -> None:
        """Take back what ``tensors`` gave."""
        self.updates = updates
        for name, value in self._average.items():
            value.copy_(tensors[f"ema.{name}"])
