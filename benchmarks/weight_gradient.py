"""A training step with and without the weight gradients of `training/weight_gradient.py`, and what either gives.

    python3 benchmarks/weight_gradient.py [--threads 2] [--rounds 3] [--layers]

Both networks take their steps in turn, on the same generated images; a ratio is the median of each round's own pair.
`--layers` times single convolutions instead: forward, torch's weight gradient, ours. Without AVX-512 alone, where a
training uses it; elsewhere this shows whether it should.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

from cascade_rcnn.benchmark.contenders import CLASSES, Setting, images_of, targets_of
from cascade_rcnn.benchmark.stopwatch import describe_machine, seed_weights
from cascade_rcnn.models.build import build_model
from cascade_rcnn.recipes import load_config
from cascade_rcnn.training.weight_gradient import use_matrix_products, weight_gradient

LITE0: dict[str, Any] = {"backbone": "tf_efficientnet_lite0.in1k", "frozen_stages": -1}
# recipe, images, height, width, settings
STEPS: list[tuple[str, int, int, int, dict[str, Any]]] = [
    ("finetune_small", 8, 320, 448, {}),
    ("finetune", 2, 608, 832, LITE0),
    ("finetune", 1, 608, 832, {}),
]
# images or RoIs, channels, outputs, height, width
LAYERS = [
    (2, 256, 256, 152, 208),
    (2, 256, 256, 76, 104),
    (2, 256, 256, 38, 52),
    (8, 96, 96, 80, 112),
    (8, 96, 96, 40, 56),
    (8, 96, 96, 20, 28),
    (1, 64, 64, 200, 272),
    (128, 256, 256, 14, 14),
]


def measure_step(recipe: str, images: int, height: int, width: int, settings: dict[str, Any], *, rounds: int) -> None:
    config = load_config(recipe)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **settings))
    setting = Setting(config, (height, width), images, torch.device("cpu"), train=True)
    models = []
    for by_products in (False, True):
        model = build_model(config.model, CLASSES)
        seed_weights(model)
        if by_products:
            use_matrix_products(model)
        models.append(model.train())
    batch = images_of(setting), targets_of(setting)
    seconds: list[list[float]] = [[], []]
    gradients = []
    for number in range(rounds + 1):
        for which, model in enumerate(models):
            torch.manual_seed(0)  # the same samples
            began = time.perf_counter()
            torch.stack([*model(*batch).values()]).sum().backward()
            if number:
                seconds[which].append(time.perf_counter() - began)
            else:
                gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
            model.zero_grad()
    differences = [float((one - other).norm() / one.norm().clamp(min=1e-12)) for one, other in zip(*gradients)]
    ratio = median(ours / torchs for torchs, ours in zip(*seconds))
    print(
        f"{recipe} {settings.get('backbone', '')} {images} x {height} x {width}: {median(seconds[0]):.2f} s, by matrix "
        f"products {median(seconds[1]):.2f} s, ratio {ratio:.2f}; gradients differ by {max(differences):.1e} at most",
        flush=True,
    )


def measure_layer(images: int, channels: int, outputs: int, height: int, width: int, *, rounds: int) -> None:
    x = torch.randn(images, channels, height, width).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(outputs, channels, 3, 3, requires_grad=True)
    gradient = torch.randn(images, outputs, height, width).contiguous(memory_format=torch.channels_last)
    made = F.conv2d(x, weight, padding=1)
    ways: dict[str, Callable[[], Any]] = {
        "forward": lambda: F.conv2d(x, weight.detach(), padding=1),
        "torch's gradient": lambda: torch.autograd.grad(made, weight, gradient, retain_graph=True),
        "by matrix products": lambda: weight_gradient(x, gradient),
    }
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            best[name] = min(best[name], time.perf_counter() - began)
    times = ", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in best.items())
    print(f"{images} x {channels} to {outputs} channels, {height} x {width}: {times}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(describe_machine(torch.device("cpu")), torch.backends.cpu.get_cpu_capability(), f"{options.threads} threads")
    if options.layers:
        for layer in LAYERS:
            measure_layer(*layer, rounds=options.rounds)
    else:
        for step in STEPS:
            measure_step(*step, rounds=options.rounds)


if __name__ == "__main__":
    main()
