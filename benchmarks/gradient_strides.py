"""A training step of two processes with and without the layout of 1x1 gradients that `distributed.wrap` sets.

    torchrun --nproc-per-node 2 benchmarks/gradient_strides.py [--size 256 352] [--rounds 10]

Both networks take their steps in turn on the same image; a ratio is the median of each round's own pair.
Without that layout torch warns, once, that gradients and DDP's buckets have different strides. On CPUs (gloo).
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cascade_rcnn import distributed
from cascade_rcnn.benchmark.contenders import CLASSES, Setting, images_of, targets_of
from cascade_rcnn.benchmark.stopwatch import seed_weights
from cascade_rcnn.config import ModelConfig
from cascade_rcnn.models.build import build_model
from cascade_rcnn.recipes import load_config
from cascade_rcnn.structures import ImageBatch, Targets
from cascade_rcnn.training.weight_gradient import matrix_products_pay, use_matrix_products

OURS, PLAIN = "gradients laid out as their buckets", "as torch gives them"


def network(config: ModelConfig, world: distributed.World, *, laid_out: bool) -> nn.Module:
    """A seeded network, so that both compute the same."""
    model = build_model(config, CLASSES)
    seed_weights(model)
    if matrix_products_pay(world.device):
        use_matrix_products(model)
    model.train()
    if laid_out:
        return distributed.wrap(model, world)
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def step(model: nn.Module, images: ImageBatch, targets: Targets) -> float:
    """Seconds of a forward and a backward pass, in which the gradients are averaged."""
    distributed.barrier()
    began = time.perf_counter()
    torch.manual_seed(0)  # the same samples
    torch.stack([*model(images, targets).values()]).sum().backward()
    seconds = time.perf_counter() - began
    for parameter in model.parameters():
        parameter.grad = None
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="cascade_rcnn_r50_fpn_1x_coco")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 352), metavar=("H", "W"))
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    with distributed.start("cpu") as world:
        torch.set_num_threads(1)
        setting = Setting(load_config(options.config), tuple(options.size), 1, world.device, train=True)
        images, targets = images_of(setting), targets_of(setting)
        models = {name: network(setting.config.model, world, laid_out=name == OURS) for name in (PLAIN, OURS)}
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for number in range(options.rounds + 1):
            for name, model in models.items():
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    taken = step(model, images, targets)
                if number:
                    seconds[name].append(taken)
                for warning in {str(one.message).partition("\n")[0] for one in caught}:
                    if world.is_main:
                        print(f"{name}: {warning}")
        if world.is_main:
            for name, times in seconds.items():
                print(f"{name}: {median(times):.3f} s a step (median of {len(times)})")
            pairs = [ours / plain for plain, ours in zip(seconds[PLAIN], seconds[OURS])]
            print(f"ratio {median(pairs):.3f} (from {min(pairs):.3f} to {max(pairs):.3f})")


if __name__ == "__main__":
    main()
