"""What a training tells while it runs: to callbacks of the user's, to TensorBoard, Weights & Biases and MLflow.

    class Beep(Callback):
        def on_evaluation(self, step, metrics):
            print("\\a", metrics["bbox/AP"])

    train(config, out=Path("runs/mine"), callbacks=[Beep()])

Only the first of several processes calls them, between steps, so what a callback does delays the training. An exception
in one is reported, and that callback is left out from then on; a training never ends by it. Leave the random
generators of Python, NumPy and torch alone, or put them back: a resumed run would differ.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cascade_rcnn.atomic_files import write_json
from cascade_rcnn.config import Config
from cascade_rcnn.errors import ConfigError
from cascade_rcnn.history.read_run import flat
from cascade_rcnn.messages import one_line
from cascade_rcnn.training.random_state import undisturbed_generators


class Callback:
    """Override what you want to hear of."""

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        """After every ``train.log_every`` steps: what ``log.jsonl`` gets (losses, lr, grad_norm, images_per_second)."""

    def on_evaluation(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """After an evaluation: what ``metrics.jsonl`` gets. Metrics are in 0..1, losses not; None: undefined."""

    def on_save(self, step: int, folder: Path) -> None:
        """After the run folder got a state to resume from, and its ``last.safetensors``."""

    def on_end(self, result: Path | None) -> None:
        """The best checkpoint; None where the training was stopped or has failed."""


class Callbacks:
    """Several as one, each with its failure kept to itself."""

    def __init__(self, callbacks: Iterable[Callback], *, say: Callable[[str], None]) -> None:
        self._callbacks, self._say = list(callbacks), say

    def tell(self, event: str, *arguments: Any) -> None:
        """Call ``event`` (``on_step``, ...) of each that has it."""
        for callback in list(self._callbacks):
            try:
                method = getattr(callback, event, None)
                if method is not None:
                    method(*arguments)
            except Exception as error:  # whatever a stranger's code may raise
                self._callbacks.remove(callback)
                name = type(callback).__name__
                self._say(f"{name}.{event}: {type(error).__name__}: {one_line(error)}; goes on without {name}")


# Loggers

_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


def check_loggers(loggers: Sequence[str]) -> None:
    """ConfigError for one whose package is missing; TensorBoard, the default, is left out without a word."""
    for name in loggers:
        if name != "tensorboard" and importlib.util.find_spec(_PACKAGES[name]) is None:
            raise ConfigError(
                f"train.loggers {name}: the package is missing: pip install 'cascade-rcnn[{name}]', or leave it out"
            )


def start_loggers(config: Config, out: Path, step: int, say: Callable[[str], None]) -> list[Callback]:
    """The loggers of ``train.loggers`` for the run ``out``, which goes on after ``step``; a failure is reported."""
    makers: dict[str, Callable[[], Callback | None]] = {
        "tensorboard": lambda: TensorBoard.start(out / "tensorboard", step),
        "wandb": lambda: WeightsAndBiases(out, config),
        "mlflow": lambda: MLflow(out, config),
    }
    started = []
    for name in config.train.loggers:
        try:
            with undisturbed_generators(torch.device("cpu")):
                logger = makers[name]()
        except Exception as error:  # no login, no server, no disk
            say(f"{name} cannot be used: {type(error).__name__}: {one_line(error)[:200]}; goes on without it")
            continue
        if logger is not None:
            started.append(logger)
    return started


class TensorBoard(Callback):
    """Curves ``train/...`` and ``val/...`` in the run folder's ``tensorboard``."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    @classmethod
    def start(cls, folder: Path, step: int) -> TensorBoard | None:
        """None where the extra is not installed. Points after ``step``, of a run that was interrupted, are hidden."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return None
        writer: Any = SummaryWriter
        return cls(writer(str(folder), purge_step=step))

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"train/{name}", value, step)

    def on_evaluation(self, step: int, metrics: Mapping[str, float | None]) -> None:
        for name, value in metrics.items():
            if value is not None:
                self._writer.add_scalar(f"val/{name}", value, step)

    def on_end(self, result: Path | None) -> None:
        self._writer.close()


class WeightsAndBiases(Callback):
    """A run of the same name; ``--resume`` goes on with it. Their own variables (WANDB_MODE, WANDB_PROJECT) apply."""

    def __init__(self, out: Path, config: Config) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "cascade-rcnn"),
            name=out.resolve().name,
            id=_remembered(out, "wandb", lambda: secrets.token_hex(4)),
            resume="allow",
            dir=str(out),
            config=config.to_dict(),
            settings=wandb.Settings(silent=True),
        )
        self._run.define_metric("*", step_metric="step")  # a resumed run repeats steps, which its own counter refuses

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **{f"train/{name}": value for name, value in values.items()}})

    def on_evaluation(self, step: int, metrics: Mapping[str, float | None]) -> None:
        self._run.log({"step": step, **{f"val/{name}": value for name, value in metrics.items() if value is not None}})

    def on_end(self, result: Path | None) -> None:
        if result is not None:
            self._run.summary["result"] = str(result)
        self._run.finish(exit_code=0 if result is not None else 1)


class MLflow(Callback):
    """A run of the same name; ``--resume`` goes on with it.

    MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME apply; without the former the run folder keeps everything
    (``mlflow ui --backend-store-uri RUN/mlflow``).
    """

    def __init__(self, out: Path, config: Config) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 asks for it where a folder keeps the runs
        from mlflow import MlflowClient

        own = (out / "mlflow").resolve().as_uri()
        self._client: Any = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", own))
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "cascade-rcnn")
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known is not None else self._client.create_experiment(name)
        created = []

        def create() -> str:
            created.append(self._client.create_run(experiment, run_name=out.resolve().name))
            return str(created[0].info.run_id)

        self._id = _remembered(out, "mlflow", create)
        if created:
            for key, value in flat(config.to_dict()):
                self._client.log_param(self._id, key, str(value)[:500])
        else:
            self._client.update_run(self._id, status="RUNNING")

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        self._log("train", step, values)

    def on_evaluation(self, step: int, metrics: Mapping[str, float | None]) -> None:
        self._log("val", step, metrics)

    def on_end(self, result: Path | None) -> None:
        if result is not None:
            self._client.set_tag(self._id, "result", str(result))
        self._client.set_terminated(self._id, "FINISHED" if result is not None else "KILLED")

    def _log(self, part: str, step: int, values: Mapping[str, float | None]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        # letters, digits and a few signs are allowed in names
        named = {re.sub(r"[^\w\-. /:]", "_", name): value for name, value in values.items() if value is not None}
        metrics = [Metric(f"{part}/{name}", float(value), now, step) for name, value in named.items()]
        self._client.log_batch(self._id, metrics=metrics)


def _remembered(out: Path, logger: str, make: Callable[[], str]) -> str:
    """The id that ``logger`` knows the run ``out`` by: made once, and kept in the folder for those who resume it."""
    path = out / f"{logger}_run.json"
    if path.is_file():
        return str(json.loads(path.read_text(encoding="utf-8"))["id"])
    made = make()
    write_json(path, {"id": made})
    return made
