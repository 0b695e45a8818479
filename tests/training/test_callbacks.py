"""Callbacks hear of a training and cannot end it; loggers get its curves, also across a resume."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from cascade_rcnn.config import Config, TrainConfig
from cascade_rcnn.errors import ConfigError
from cascade_rcnn.train import train
from cascade_rcnn.training.callbacks import Callback, check_loggers
from cascade_rcnn.training.log import RunLog
from small_training import small_config

CPU = torch.device("cpu")


class Notebook(Callback):
    """Writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        self.heard.append(("step", step, values["loss"]))

    def on_evaluation(self, step: int, metrics: Mapping[str, float | None]) -> None:
        self.heard.append(("evaluation", step, metrics["bbox/AP"]))

    def on_save(self, step: int, folder: Path) -> None:
        assert (folder / "last.safetensors").is_file()
        self.heard.append(("save", step))

    def on_end(self, result: Path | None) -> None:
        self.heard.append(("end", result))


class Broken(Callback):
    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        raise RuntimeError("no\nnetwork")


class Stranger:
    """Not derived from Callback, with one of its methods."""

    def __init__(self) -> None:
        self.ended = False

    def on_end(self, result: Path | None) -> None:
        self.ended = True


def test_callbacks_hear_of_a_training_and_cannot_end_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config(max_steps=2, log_every=1, loggers=(), evaluate_every=1)
    notebook, stranger = Notebook(), Stranger()
    result = train(config, out=tmp_path / "run", device="cpu", callbacks=[Broken(), notebook, stranger])  # type: ignore[list-item]
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [entry[1:] for entry in notebook.heard if entry[0] == "step"]
    assert steps == [(line["step"], line["loss"]) for line in logged] and len(steps) == 2
    measured = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert ("evaluation", measured["step"], measured["bbox/AP"]) in notebook.heard
    assert ("save", 2) in notebook.heard and notebook.heard[-1] == ("end", result) and stranger.ended
    said = capsys.readouterr().out
    assert said.count("Broken.on_step: RuntimeError: no network; goes on without Broken") == 1


def _log(out: Path, *, loggers: tuple[str, ...], begin: int, steps: range, finished: bool = False) -> None:
    config = dataclasses.replace(Config(), train=TrainConfig(loggers=loggers))  # type: ignore[arg-type]
    with RunLog(out, active=True) as log:
        log.begin(begin, 10, evaluated=begin, config=config)
        for step in steps:
            log.tick(step, 1)
            log.step(step, step / 10, {"loss": 10.0 - step, "grad_norm": 1.0, "lr": 0.1}, device=CPU)
        log.metrics(steps[-1], 1, {"bbox/AP": 0.5, "bbox/AP@0.50": 0.75, "segm/AP": None})
        if finished:
            log.finished(out / "best.safetensors")


def test_mlflow_goes_on_with_a_resumed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    _log(tmp_path / "run", loggers=("mlflow",), begin=0, steps=range(1, 3))
    client = mlflow.MlflowClient((tmp_path / "run" / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("cascade-rcnn").experiment_id
    assert client.search_runs([experiment])[0].info.status == "KILLED"
    _log(tmp_path / "run", loggers=("mlflow",), begin=2, steps=range(3, 5), finished=True)
    (run,) = client.search_runs([experiment])
    assert run.info.status == "FINISHED" and run.info.run_name == "run" and run.data.params["train.lr"] == "0.02"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((point.step, point.value) for point in history) == [(1, 9.0), (2, 8.0), (3, 7.0), (4, 6.0)]
    assert run.data.metrics["val/bbox/AP"] == 0.5 and run.data.metrics["val/bbox/AP_0.50"] == 0.75
    assert run.data.tags["result"].endswith("best.safetensors")


def test_weights_and_biases_works_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    logged: list[dict[str, Any]] = []
    plain = wandb.init

    def init(**options: Any) -> Any:
        run = plain(**options)
        log = run.log
        monkeypatch.setattr(run, "log", lambda values: (logged.append(values), log(values)))
        return run

    monkeypatch.setattr(wandb, "init", init)
    _log(tmp_path / "run", loggers=("wandb",), begin=0, steps=range(1, 3))
    made = json.loads((tmp_path / "run" / "wandb_run.json").read_text())["id"]
    _log(tmp_path / "run", loggers=("wandb",), begin=2, steps=range(3, 4), finished=True)
    assert json.loads((tmp_path / "run" / "wandb_run.json").read_text())["id"] == made
    assert [values["step"] for values in logged] == [1, 2, 2, 3, 3]
    assert logged[0]["train/loss"] == 9.0 and logged[2]["val/bbox/AP"] == 0.5 and "val/segm/AP" not in logged[2]
    assert any(made in folder.name for folder in (tmp_path / "run" / "wandb").iterdir())


def test_a_logger_that_fails_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no login")

    monkeypatch.setattr("cascade_rcnn.training.callbacks.MLflow", fail)
    _log(tmp_path / "run", loggers=("mlflow",), begin=0, steps=range(1, 3))
    assert "mlflow cannot be used: OSError: no login; goes on without it" in capsys.readouterr().out
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 2


def test_a_logger_without_its_package_is_refused_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    check_loggers(("tensorboard",))
    with pytest.raises(ConfigError, match=r"pip install 'cascade-rcnn\[wandb\]'"):
        check_loggers(("tensorboard", "wandb"))
