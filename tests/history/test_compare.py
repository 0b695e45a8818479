"""``cascade-rcnn compare``: what differs, what came of it, and what may not be compared."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from cascade_rcnn.cli import main
from cascade_rcnn.compare import run_compare
from cascade_rcnn.config import Config, DataConfig, TrainConfig
from cascade_rcnn.errors import UserError
from cascade_rcnn.history.read_run import changed_settings, read_run
from html_pages import check_page

VAL = {"root": "cells", "split": "val", "images": 40, "objects": 400, "classes": ["cell"], "digest": "a" * 16}
TRAIN = {"root": "cells", "split": "train", "images": 100, "objects": 900, "classes": ["cell"]}


def make_run(folder: Path, *, lr: float = 0.02, ap: float = 0.5, about: dict[str, Any] | None = None) -> Path:
    """A run of four logged steps and two evaluations, the first the better one."""
    folder.mkdir(parents=True)
    config = Config(data=DataConfig(root="cells"), train=TrainConfig(lr=lr, epochs=2, milestones=()))
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    steps = [
        {"step": n, "epoch": n / 10, "loss": 4.0 - n / 10, "lr": lr, "images_per_second": 5.0 + n, "memory_gb": 1.5,
         "elapsed_s": 2.0 * n, "eta_s": 20 - n}
        for n in (5, 10, 15, 20)
    ]  # fmt: skip
    (folder / "log.jsonl").write_text("".join(json.dumps(one) + "\n" for one in steps))
    evaluations = [
        {"step": n, "epoch": n // 10, "elapsed_s": 2.0 * n + 30, "loss": 3.5, "bbox/AP": ap - n / 1000,
         "bbox/AP50": ap + 0.2, "bbox/AP75": ap, **{f"bbox/AP@{0.5 + 0.05 * k:.2f}": ap - k / 50 for k in range(10)}}
        for n in (10, 20)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in evaluations))
    plain = {"total_steps": 20, "state": "finished", "train": TRAIN, "val": VAL, "starts": [{"device": "a laptop"}]}
    (folder / "run.json").write_text(json.dumps(plain | (about or {})))
    return folder


def test_settings_and_results_beside_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path / "first"), make_run(tmp_path / "second", lr=0.01, ap=0.6)]
    found = run_compare(runs, out=tmp_path / "page.html")
    assert found.names == ["first", "second"] and found.notes == []
    assert found.settings == [("train.lr", ["0.02", "0.01"])]
    results = dict(found.results)
    assert results["best box AP"] == ["49.0", "59.0"] and results["at step"] == ["10", "10"]
    assert results["box AP at IoU 0.95"] == ["32.0", "42.0"]
    assert results["last training loss"] == ["2.0000", "2.0000"] and results["last validation loss"] == ["3.5000"] * 2
    assert results["time"] == ["1 min 10 s"] * 2 and results["images per second"] == ["20", "20"]
    assert not any("mask" in name for name in results)
    said = capsys.readouterr().out
    assert "train.lr" in said and "59.0" in said and "page.html" in said and "note" not in said


def test_the_page_overlays_the_curves(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = [make_run(tmp_path / "first"), make_run(tmp_path / "second <i>", lr=0.01, ap=0.6)]
    run_compare(runs, out=tmp_path / "page.html")
    text = check_page(tmp_path / "page.html", tables=3)
    assert "second &lt;i&gt;" in text and "<i>" not in text
    for words in ("training loss over the epochs: first, second", "validation loss over", "box AP by IoU of the best"):
        assert words in text, words


def test_what_makes_runs_hard_to_compare_is_said(tmp_path: Path) -> None:
    other = VAL | {"digest": "b" * 16}
    runs = [
        make_run(tmp_path / "a" / "run"),
        make_run(tmp_path / "b" / "run", about={"val": other, "starts": [{"device": "a GPU"}], "state": "running"}),
    ]
    (tmp_path / "b" / "run" / "metrics.jsonl").unlink()
    (tmp_path / "b" / "run" / "run.json").write_text(
        json.dumps(json.loads((tmp_path / "b" / "run" / "run.json").read_text()) | {"total_steps": 200})
    )
    found = run_compare(runs, out=tmp_path / "page.html")
    assert found.names == [str(run) for run in runs], "their folders have the same name"
    unfinished, never, images, devices = found.notes
    assert unfinished == f"{runs[1]}: not finished: step 20 of 200" and never.startswith(f"{runs[1]}: was never")
    assert images.startswith("AP and validation losses are not comparable, evaluated on different images (")
    assert "different devices" in devices
    assert dict(found.results)["best box AP"] == ["49.0", "–"]


def test_runs_of_versions_without_run_json_are_compared_by_their_settings(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    for run in runs:
        (run / "run.json").unlink()
    (runs[0] / "log.jsonl").write_text((runs[0] / "log.jsonl").read_text().replace('"eta_s": 0', '"eta_s": 7'))
    config = read_run(runs[1]).config
    moved = dataclasses.replace(config, data=dataclasses.replace(config.data, root="others"))
    (runs[1] / "config.json").write_text(json.dumps(moved.to_dict()))
    notes = run_compare(runs, out=tmp_path / "page.html").notes
    assert notes[0] == "a: not finished: step 20" and "split val of others" in notes[1]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda run: (run / "config.json").unlink(),
            "is no run (config.json is missing); give the --out of a training",
        ),
        (lambda run: [(run / name).unlink() for name in ("log.jsonl", "metrics.jsonl")], "has logged no step yet"),
        (lambda run: (run / "run.json").write_text("{"), "is no JSON"),
        (lambda run: (run / "curves.json").write_text("[]"), "is not what a training writes"),
        (lambda run: (run / "config.json").write_text("{"), "config.json"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path: Path, spoil: Any, words: str) -> None:
    good, bad = make_run(tmp_path / "good"), make_run(tmp_path / "bad")
    spoil(bad)
    with pytest.raises(UserError) as caught:
        run_compare([good, bad], out=tmp_path / "page.html")
    assert words in str(caught.value) and "bad" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "page.html").exists()


def test_mistakes_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "one")
    for words, said in (
        ([str(run)], "give two runs or more"),
        ([str(run), str(run / "..") + "/one"], "named twice"),
        ([str(run), str(tmp_path / "nothing")], "no such folder"),
        ([str(run), str(run), "--out", str(tmp_path)], "is a folder; give a file as --out"),
    ):
        assert main(["compare", *words]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_a_line_that_a_killed_process_left_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 25, "lo')
    assert [one["step"] for one in read_run(run).steps] == [5, 10, 15, 20]


def test_long_curves_are_thinned_to_means(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    lines = [{"step": n, "epoch": float(n), "loss": None if n % 4 == 3 else float(n)} for n in range(600)]
    (run / "log.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    xs, ys = read_run(run).series("loss")
    assert len(xs) == len(ys) == 300
    assert (xs[0], ys[0], xs[1], ys[1]) == (0.5, 0.5, 2.5, 2.0)


def test_settings_that_differ_from_the_defaults() -> None:
    changed = changed_settings(Config(train=TrainConfig(lr=0.005, milestones=(1, 2)), data=DataConfig(flip=0.5)))
    assert changed == {"train.lr": ("0.005", "0.02"), "train.milestones": ("1 2", "8 11")}
