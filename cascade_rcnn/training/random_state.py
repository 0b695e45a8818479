"""States of the random generators: seeding, saving, restoring, and leaving them undisturbed."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_generators(seed: int, rank: int, step: int) -> None:
    """Seed all generators with numbers that differ between processes."""
    number = int(np.random.SeedSequence((seed, rank, step)).generate_state(1)[0])
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def get_generators(device: torch.device) -> dict[str, Any]:
    """The generators' states; cheap enough for every step, and without waiting for the GPU."""
    state = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": np.random.get_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_generators(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def undisturbed_generators(device: torch.device) -> Iterator[None]:
    state = get_generators(device)
    try:
        yield
    finally:
        set_generators(state, device)


def as_tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """The generators' states as bytes."""
    kind, words, *rest = state["numpy"]
    texts = {"python": json.dumps(state["python"]), "numpy": json.dumps([kind, words.tolist(), *rest])}
    coded = {name: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) for name, text in texts.items()}
    return coded | {name: state[name] for name in ("torch", "cuda") if name in state}


def from_tensors(tensors: dict[str, Tensor]) -> dict[str, Any]:
    version, words, gauss = json.loads(tensors["python"].numpy().tobytes())
    kind, numbers, *rest = json.loads(tensors["numpy"].numpy().tobytes())
    return {
        **tensors,
        "python": (version, tuple(words), gauss),
        "numpy": (kind, np.array(numbers, dtype=np.uint32), *rest),
    }


@contextmanager
def reproducible(on: bool) -> Iterator[None]:
    """Deterministic algorithms inside; an operator without one raises an error that names it."""
    if not on:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
