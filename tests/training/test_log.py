"""What a training writes and says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from cascade_rcnn.config import Config
from cascade_rcnn.errors import UserError
from cascade_rcnn.training.log import RunLog
from cascade_rcnn.training.losses import LossWindow

CPU = torch.device("cpu")
NAN = float("nan")


def _step(window: LossWindow, step: int, cls: float, box: float, norm: float = 1.0) -> list[str]:
    window.add_pass({"s0.cls": torch.tensor(cls), "s0.box": torch.tensor(box)}, (f"{step}.jpg",))
    return window.end_step(step, torch.tensor(norm))


def test_a_window_gives_means_over_steps_and_passes() -> None:
    window = LossWindow(max_bad=5)
    window.add_pass({"s0.cls": torch.tensor(1.0), "s0.box": torch.tensor(0.0)}, ("a.jpg",))
    window.add_pass({"s0.cls": torch.tensor(2.0), "s0.box": torch.tensor(1.0)}, ("b.jpg",))
    assert window.end_step(0, torch.tensor(4.0)) == []
    _step(window, 1, 2.5, 0.5, norm=2.0)
    values, messages = window.read()
    assert values == {"loss": 2.5, "s0.cls": 2.0, "s0.box": 0.5, "grad_norm": 3.0} and messages == []
    assert window.read() == ({}, [])


def test_bad_steps_are_named_at_once_and_kept_out_of_the_means() -> None:
    window = LossWindow(max_bad=5)
    assert _step(window, 0, 1.0, 1.0) == []
    assert _step(window, 1, 1.0, float("inf"), norm=NAN) == ["not finite, skipped: step 1: s0.box inf; images 1.jpg"]
    assert _step(window, 2, 9.0, 9.0, norm=float("inf")) == [
        "not finite, skipped: step 2: gradient norm inf; images 2.jpg"
    ]
    assert window.bad_in_a_row() == 2
    assert _step(window, 3, 3.0, 1.0) == [] and window.bad_in_a_row() == 0
    assert window.read() == ({"loss": 3.0, "s0.cls": 2.0, "s0.box": 1.0, "grad_norm": 1.0}, [])


def test_bad_steps_in_a_row_end_the_run_across_windows() -> None:
    window = LossWindow(max_bad=3)
    for step in (0, 1):
        _step(window, step, NAN, 1.0, norm=NAN)
        window.read()
    with pytest.raises(UserError, match=r"3 steps in a row .*step 2: s0.cls nan; images 2.jpg.*train.lr"):
        _step(window, 2, NAN, 1.0, norm=NAN)


def test_a_scaled_loss_may_overflow_in_its_gradients() -> None:
    """As on a GPU, where the window is judged when it is read; with fp16 only the losses count."""
    window = LossWindow(max_bad=2, scaled=True)
    for step in range(4):
        assert _step(window, step, 1.0, 1.0, norm=float("inf")) == []
    assert window.read()[1] == []
    assert [_step(window, 4, NAN, 1.0, norm=NAN), _step(window, 5, 1.0, 1.0)] == [[], []]
    values, messages = window.read()
    assert messages == ["not finite, skipped: step 4: s0.cls nan; images 4.jpg"] and values["s0.cls"] == 1.0
    for step in (6, 7):
        _step(window, step, NAN, 1.0, norm=NAN)
    with pytest.raises(UserError, match="2 steps in a row"):
        window.read()


def test_bad_steps_that_nobody_has_read_are_counted_when_the_run_is_saved() -> None:
    window = LossWindow(max_bad=9, scaled=True)  # judged when it is read, as on a GPU
    window.restore(2)
    _step(window, 0, NAN, 1.0)
    assert window.bad_in_a_row() == 3
    window.read()
    assert window.bad_in_a_row() == 3
    for step, loss in enumerate((NAN, 1.0, NAN), start=1):
        _step(window, step, loss, 1.0)
    assert window.bad_in_a_row() == 1


def test_numbers_go_to_files_and_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path / "run", active=True) as log:
        log.begin(0, 100_000, evaluated=0, config=Config())
        with log.waiting():
            pass
        for step in (1, 2):
            log.tick(step, 4)
        log.step(2, 0.5, {"loss": 1.5, "s0.cls": 1.25, "grad_norm": NAN, "lr": 0.02}, device=CPU)
        log.metrics(2, 1, {"bbox/AP": 0.5, "segm/AP": None})
        log.picture("seen", Image.new("RGB", (8, 8)))
    (record,) = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert record["step"] == 2 and record["grad_norm"] is None and record["s0.cls"] == 1.25
    assert record["images_per_second"] > 0 and 0 <= record["data_share"] <= 1 and record["memory_gb"] > 0
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert 0 <= record["elapsed_s"] <= metrics.pop("elapsed_s") < 60
    assert metrics == {"step": 2, "epoch": 1, "bbox/AP": 0.5, "segm/AP": None}
    with Image.open(tmp_path / "run" / "images" / "seen.jpg") as picture:
        assert picture.size == (8, 8)
    line = capsys.readouterr().out
    for part in ("step 2/100000", "epoch 0.50", "loss 1.5000 (s0.cls 1.250)", "images/s", "waiting for data", "ETA"):
        assert part in line


def test_a_silent_process_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path / "run", active=False) as log:
        log.begin(0, 10, evaluated=0, config=Config())
        log.tick(1, 1)
        log.step(1, 0.1, {"loss": 1.0, "grad_norm": 1.0, "lr": 1.0}, device=CPU)
        log.metrics(1, 1, {"bbox/AP": 0.5})
        log.picture("seen", Image.new("RGB", (8, 8)))
        log.say("hello")
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_lines_beyond_the_step_to_go_on_from_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"ste')
    (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n{"step": 4}\n')
    with RunLog(tmp_path, active=True) as log:
        log.begin(4, 10, evaluated=2, config=Config())
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 2}\n{"step": 4}\n'
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 2}\n'


def test_a_terminal_gets_a_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    with RunLog(tmp_path, active=True) as log:
        log.begin(3, 10, evaluated=0, config=Config())
        log.tick(4, 1)
        log.step(4, 0.4, {"loss": 1.0, "s0.cls": 1.0, "grad_norm": 1.0, "lr": 1.0}, device=CPU)
        with log.paused():
            log.say("evaluated [bold] as it is")
    said = capsys.readouterr().out
    assert "4/10" in said and "loss 1.0000" in said and "evaluated [bold] as it is" in said


def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with RunLog(tmp_path, active=True) as log:
        log.begin(0, 10, evaluated=0, config=Config())
        (tmp_path / "metrics.jsonl").mkdir()
        with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written \(Is a directory\)"):
            log.metrics(1, 1, {"bbox/AP": 0.5})


def test_a_training_whose_steps_were_all_skipped_is_no_success() -> None:
    window = LossWindow(max_bad=5)
    window.refuse_if_all_were_skipped()  # nothing to do: a run that was resumed at its end
    for step in range(2):
        window.add_pass({"a": torch.tensor(math.nan)}, ("x.png",))
        window.end_step(step, torch.tensor(math.nan))
    with pytest.raises(
        UserError, match=r"all 2 steps were skipped \(step 1: a nan; images x\.png\): nothing was learnt; "
    ):
        window.refuse_if_all_were_skipped()
    window.add_pass({"a": torch.tensor(1.0)}, ("x.png",))
    window.end_step(2, torch.tensor(1.0))
    window.refuse_if_all_were_skipped()


def test_steps_from_before_a_resume_count_as_learnt() -> None:
    for steps, learnt in ((3, True), (1, False)):
        window = LossWindow(max_bad=5)
        window.restore(1, steps=steps)  # the last of them was skipped
        window.add_pass({"a": torch.tensor(math.nan)}, ("x.png",))
        window.end_step(steps, torch.tensor(math.nan))
        if learnt:
            window.refuse_if_all_were_skipped()
        else:
            with pytest.raises(UserError, match="all 2 steps were skipped"):
                window.refuse_if_all_were_skipped()
