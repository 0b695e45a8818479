"""A run's folder: whether a run can start or resume in it, and the saved state.

``state/training.safetensors`` holds everything of one step in one file, so it is whole or absent: weights,
optimizer, loss scale, moving average, the random generators of every process, and how far the run has come.
``last.safetensors`` (the same weights, for use) is written after it, ``best.safetensors`` after an evaluation.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cascade_rcnn import distributed
from cascade_rcnn.checkpoint import BEST, LAST, STATE, load_training, save_training
from cascade_rcnn.errors import ConfigError
from cascade_rcnn.training.log import RunLog
from cascade_rcnn.training.schedule import Progress

_Tensors = dict[str, Tensor]


@dataclass
class SavedState:
    """Everything of one step of a training."""

    weights: _Tensors  # the model's
    optimizer: _Tensors  # what ``Updater.tensors`` gives
    average: _Tensors  # what ``MovingAverage.tensors`` gives; empty without one
    averaged: int  # updates of the moving average
    generators: list[_Tensors]  # of each process: what ``random_state.as_tensors`` gives
    progress: Progress
    config: dict[str, Any]
    class_names: list[str]
    bad_images: list[str]
    bad_losses: int  # steps in a row whose losses were not finite

    def write(self, folder: Path) -> None:
        """Save into a run's folder. Raises CheckpointError when it cannot be written; the state before then stays."""
        tensors = {f"model.{name}": value for name, value in self.weights.items()} | self.optimizer | self.average
        for rank, generators in enumerate(self.generators):
            tensors |= {f"rng.{rank}.{name}": value for name, value in generators.items()}
        info = {
            "progress": asdict(self.progress),
            "config": self.config,
            "world_size": len(self.generators),
            "class_names": self.class_names,
            "bad_images": self.bad_images,
            "bad_losses": self.bad_losses,
            "averaged": self.averaged,
        }
        save_training(folder, tensors, info)


def read_state(folder: Path) -> SavedState:
    """The saved state of a run. Raises CheckpointError: damaged, or of a newer version."""
    tensors, info = load_training(folder)
    ranks = range(info["world_size"])
    return SavedState(
        weights=_below("model.", tensors),
        optimizer={name: value for name, value in tensors.items() if name.startswith(("optimizer.", "scaler/"))},
        average={name: value for name, value in tensors.items() if name.startswith("ema.")},
        averaged=info["averaged"],
        generators=[_below(f"rng.{rank}.", tensors) for rank in ranks],
        progress=Progress(**info["progress"]),
        config=info["config"],
        class_names=info["class_names"],
        bad_images=info["bad_images"],
        bad_losses=info.get("bad_losses", 0),  # absent in states of version 0.1.0
    )


def _below(prefix: str, tensors: _Tensors) -> _Tensors:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def find_resumable_state(out: Path, *, resume: bool) -> bool:
    """Whether the folder ``out`` holds a state to resume from.

    Raises ConfigError where it holds a run and ``resume`` was not asked for, or where its state is gone.
    """
    found = (out / STATE).is_file()
    if not resume and (found or any((out / name).exists() for name in (LAST, BEST, "log.jsonl"))):
        raise ConfigError(f"{out}: already holds a run; resume it with --resume, or choose another folder with --out")
    if not found and (out / LAST).exists():
        raise ConfigError(
            f"{out}: its {STATE} is missing, so it cannot be resumed; start again in another folder with --out"
        )
    return found


def claim_folder(out: Path, world: distributed.World, log: RunLog, *, resume: bool) -> bool:
    """``find_resumable_state`` by rank 0 for all, as only its machine needs the folder."""
    problem, found = "", False
    if world.is_main:
        try:
            found = find_resumable_state(out, resume=resume)
        except ConfigError as error:
            problem = str(error)
    problem, found = distributed.broadcast((problem, found))
    if problem:
        raise ConfigError(problem)
    if resume and not found:
        log.say(f"nothing is saved in {out} yet: starting a new run")
    return found
