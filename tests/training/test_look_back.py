"""What a training leaves for whoever looks back on it: whole pages, at any end, and never at its cost."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from cascade_rcnn import distributed
from cascade_rcnn.data.formats.open import open_split
from cascade_rcnn.history.summary import write_summary
from cascade_rcnn.train import train
from cascade_rcnn.training.callbacks import Callback
from cascade_rcnn.training.interrupts import TrainingInterrupted
from cascade_rcnn.training.look_back import LookBack
from html_pages import check_page
from small_training import small_config, small_data

ALONE = distributed.World(0, 1, torch.device("cpu"))


def _object(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("look_back") / "a <b> & run"
    config = small_config(summary=True, evaluate_every=1, model={"masks": "last", "score_threshold": 0.0})
    train(config, out=run, device="cpu")
    return run


def test_a_finished_run_has_its_page(finished: Path) -> None:
    pytest.importorskip("matplotlib")
    text = check_page(finished / "summary.html", tables=5)
    assert "a &lt;b&gt; &amp; run" in text and "<b>" not in text
    for words in (
        "Finished after 12 steps",
        "losses over the epochs: training, validation",
        "AP over the epochs",
        "learning rate over the epochs",
        "peak memory so far, GB over the epochs",
        "training loss of each part over the epochs: proposals, stage 1, stage 2, stage 3",
        "Precision over recall for",
        "validation_1.jpg",
        "train_batch1_1.jpg",
        "model.backbone",
        "cascade-rcnn predict",
        "torchvision",
        "Confusion matrix",
    ):
        assert words in text, words
    assert "--resume" not in text and "train.epochs" in text
    assert "data.flip" not in text, "this setting is the default"


def test_curves_are_those_of_the_best_evaluation(finished: Path) -> None:
    curves = _object(finished / "curves.json")
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    best = max(lines, key=lambda line: line["segm/AP"])
    assert curves["step"] == best["step"] and curves["images"] == 4
    for name, one in curves["classes"].items():
        if one["objects"]:
            assert one["AP"] == pytest.approx(best[f"bbox/AP/{name}"], abs=1e-9)
    assert len(curves["confusion"]["matrix"]) == 6
    counted = sum(sum(row[:5]) + row[5] for row in curves["confusion"]["matrix"][:5])
    assert counted == curves["objects"]


def test_what_is_known_of_where_it_ran(finished: Path) -> None:
    about = _object(finished / "run.json")
    assert about["state"] == "finished" and about["total_steps"] == 12
    assert about["train"]["images"] == 12 and about["val"]["images"] == 4 and len(about["val"]["digest"]) == 16
    (start,) = about["starts"]
    assert start["step"] == 0 and start["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert start["processes"] == 1 and start["command"] and "thread" in start["device"]


class _StopAt(Callback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        if step == self._step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_that_is_stopped_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config(summary=True, evaluate_every=1)
    with pytest.raises(TrainingInterrupted):
        train(config, out=tmp_path, device="cpu", callbacks=[_StopAt(4)])
    text = check_page(tmp_path / "summary.html", tables=2)
    assert "Stopped by SIGTERM after 4 of 12 steps" in text and "--resume" in text
    assert "summary.html" in capsys.readouterr().out
    train(config, out=tmp_path, device="cpu", resume=True)
    about = _object(tmp_path / "run.json")
    assert [start["step"] for start in about["starts"]] == [0, 4]
    text = check_page(tmp_path / "summary.html", tables=3)
    assert "Finished after 12 steps" in text and "resumed at step 4" in text
    elapsed = [json.loads(line)["elapsed_s"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert elapsed == sorted(elapsed) and len(elapsed) == 6


def test_without_matplotlib_the_page_has_no_curves_and_one_line_says_so(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_figure(*_: object, **__: object) -> str:
        raise ImportError("matplotlib")

    monkeypatch.setattr("cascade_rcnn.analysis.figures.has_matplotlib", lambda: False)
    monkeypatch.setattr("cascade_rcnn.training.look_back.has_matplotlib", lambda: False)
    monkeypatch.setattr("cascade_rcnn.analysis.figures.lines", no_figure)
    for name in ("config.json", "log.jsonl", "metrics.jsonl", "curves.json", "run.json"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    text = check_page(write_summary(tmp_path), tables=5)
    assert "without curves" in text and "cascade-rcnn[plots]" in text and "<svg" not in text
    LookBack(tmp_path, active=True, say=print).write("finished")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("(without curves, which matplotlib draws: pip install 'cascade-rcnn[plots]')")


def test_a_page_that_cannot_be_written_ends_no_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "summary.html").mkdir()
    result = train(small_config(summary=True, evaluate_every=1, epochs=1, milestones=()), out=tmp_path, device="cpu")
    assert result.is_file()
    assert capsys.readouterr().out.count("summary.html cannot be written") == 1


def test_a_page_of_a_run_under_way_takes_a_small_share_of_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, written = [0.0], []

    def write(folder: Path) -> Path:
        written.append(now[0])
        now[0] += 3.0
        return folder / "summary.html"

    monkeypatch.setattr("cascade_rcnn.training.look_back.time.monotonic", lambda: now[0])
    monkeypatch.setattr("cascade_rcnn.training.look_back.write_summary", write)
    look_back = LookBack(tmp_path, active=True, say=print)
    for second in (1, 19, 21, 40, 80, 85):
        now[0] = max(float(second), now[0])
        look_back.write()
    assert written == [21, 85]
    look_back.write("finished")
    assert len(written) == 3, "the last one is always written"


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    quiet = LookBack(tmp_path, active=False, say=print)
    split = open_split(small_data(), "val")
    quiet.begin(0, 10, world=ALONE, train=split, validation=split)
    assert quiet.curves([], split, small_config()) is None
    quiet.keep_curves(3, {})
    quiet.write("finished")
    assert list(tmp_path.iterdir()) == []
