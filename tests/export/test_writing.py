"""Exports written whole or not at all, and the limits that a fixed size sets; tracing is left out."""

from __future__ import annotations

import dataclasses
import json
import operator
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("onnx", reason="needs pip install 'cascade-rcnn[onnx]'")
pytest.importorskip("onnxruntime", reason="needs pip install 'cascade-rcnn[onnx]'")

import cascade_rcnn
from brought import write_json
from cascade_rcnn.checkpoint import save_checkpoint
from cascade_rcnn.config import Config, DataConfig
from cascade_rcnn.data.sizes import fitted_size, fitting
from cascade_rcnn.errors import CheckpointError, UserError
from cascade_rcnn.export import command
from cascade_rcnn.export.command import run_export
from cascade_rcnn.inference.detector import load
from cascade_rcnn.models.swin import DetectionSwinBlock
from cascade_rcnn.runtime.detector import load as load_without_torch
from cascade_rcnn.runtime.network import ExportInfo
from handmade_network import CLASSES, handmade_network
from tiny import TINY, tiny_model


def _checkpoint(path: Path, *, extra: dict[str, Any] | None = None, **data: Any) -> Path:
    settings = DataConfig(**{"short_side": (96,), "long_side": 160, "workers": 0, **data})
    config = Config(model=dataclasses.replace(TINY, norm="frozen", masks="none"), data=settings)
    state = tiny_model(len(CLASSES), norm="frozen", masks="none").state_dict()
    save_checkpoint(path, state, config=config, class_names=CLASSES, extra=extra)
    return path


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[ExportInfo]:
    """Networks made by hand instead of traced ones; what they were told of themselves."""
    told: list[ExportInfo] = []

    def write(_: Any, path: Path, info: ExportInfo) -> None:
        told.append(info)
        handmade_network(path, size=info.size, batch=info.batch)
        command.network.mark_onnx(path, info)

    monkeypatch.setattr(command.network, "trace", lambda *_, **__: None)
    monkeypatch.setattr(command.network, "write_onnx", write)
    monkeypatch.setattr(command.report, "IMAGES", 1)
    return told


def test_an_interrupted_export_leaves_the_one_before(
    written: list[ExportInfo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = _checkpoint(tmp_path / "tiny.safetensors")
    folder = run_export(checkpoint, to="onnx")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert sorted(before) == ["model.onnx", "report.json"]

    def stop(_: Any, path: Path, info: ExportInfo) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    def fill(_: Any, path: Path, info: ExportInfo) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command.network, "write_onnx", stop)
    with pytest.raises(KeyboardInterrupt):
        run_export(checkpoint, to="onnx")
    monkeypatch.setattr(command.network, "write_onnx", fill)
    monkeypatch.setattr(command, "_check_packages", lambda to, *, int8: None)
    for to in ("onnx", "openvino"):
        with pytest.raises(UserError, match=r"model\..* cannot be written \(No space left on device\); free"):
            run_export(checkpoint, to=to, out=folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


_FULL = """
import resource, signal, sys
from pathlib import Path
import openvino, torch
from cascade_rcnn.export import network
from cascade_rcnn.runtime.network import RuntimeNetwork
folder = Path(sys.argv[1])
info = RuntimeNetwork(folder / "model.onnx").info
program = torch.export.export(torch.nn.Linear(100, 100), (torch.zeros(2, 100),))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # as a full disk
for write in (
    lambda: network.write_torch(program, folder / "model.pt2", info),
    lambda: network.write_openvino(folder / "model.onnx", folder / "model.xml", info),
):
    try:
        write()
    except OSError as error:
        print("OSError", error)
"""


def test_an_export_does_not_tell_where_the_training_lay(written: list[ExportInfo], tmp_path: Path) -> None:
    """What is given away holds no path of the machine it was trained on."""
    checkpoint = _checkpoint(
        tmp_path / "tiny.safetensors", root="/home/someone/patients", augment="/home/someone/ours.py"
    )
    assert b"/home/someone" in checkpoint.read_bytes()
    folder = run_export(checkpoint, to="onnx")
    assert not [file for file in folder.iterdir() if b"someone" in file.read_bytes()]


def test_the_ap_of_both_stands_in_the_report(written: list[ExportInfo], tmp_path: Path) -> None:
    """The truth is what the exported network finds, which is not the checkpoint's."""
    checkpoint = _checkpoint(tmp_path / "tiny.safetensors")
    found = load_without_torch(run_export(checkpoint, to="onnx")).predict(np.zeros((96, 128, 3), np.uint8))
    annotations = [
        {"id": row + 1, "image_id": 1, "category_id": label + 1, "bbox": [x, y, x2 - x, y2 - y], "iscrowd": 0}
        | {"area": (x2 - x) * (y2 - y)}
        for row, ((x, y, x2, y2), label) in enumerate(zip(found.boxes.tolist(), found.labels.tolist()))
    ]
    data = tmp_path / "data"
    (data / "val").mkdir(parents=True)
    Image.new("RGB", (128, 96)).save(data / "val" / "a.png")
    images = [{"id": 1, "file_name": "a.png", "width": 128, "height": 96}]
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_json(data / "annotations" / "instances_val.json", content)
    folder = run_export(checkpoint, to="onnx", data=data)
    both = json.loads((folder / "report.json").read_text())["metrics"]
    assert both["exported"]["bbox/AP"] > 0.5 > both["pytorch"]["bbox/AP"]


def test_integers_are_compared_on_the_pictures_they_are_calibrated_with(tmp_path: Path) -> None:
    for level in range(20):
        Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(tmp_path / f"{level:02}.png")
    (tmp_path / "02.png").write_bytes(b"broken")
    pictures, told = command.report.pictures(None, "", folder=tmp_path)
    assert [int(one[0, 0, 0]) for one in pictures] == [0, 4, 6, 8, 10, 12, 14, 16]
    assert told == f"8 pictures of {tmp_path.name}"


def test_what_a_converter_refuses_is_one_line(
    written: list[ExportInfo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = _checkpoint(tmp_path / "tiny.safetensors")
    Image.new("RGB", (96, 96)).save(tmp_path / "a.png")

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such\noperator")

    monkeypatch.setattr(command, "quantise", refuse)
    with pytest.raises(UserError, match=r"model\.onnx: .*RuntimeError: no such operator\); export without --int8, or"):
        run_export(checkpoint, to="onnx", int8=command.Calibration(tmp_path), out=tmp_path / "out")
    monkeypatch.setattr(command.network, "write_onnx", refuse)
    with pytest.raises(UserError, match=r"operator\); update the packages, or choose another format"):
        run_export(checkpoint, to="onnx", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_that_is_told_to_end_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = _checkpoint(tmp_path / "tiny.safetensors")
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(command.network, "trace", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as end:
        run_export(checkpoint, to="onnx", out=tmp_path / "out")
    assert end.value.code == 143 and not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(SystemExit):
        run_export(checkpoint, to="onnx", out=tmp_path / "mine")
    assert (tmp_path / "mine").is_dir() and signal.getsignal(signal.SIGTERM) == before


def test_integers_are_checked(tmp_path: Path) -> None:
    import onnx

    network = onnx.load(handmade_network(tmp_path / "model.onnx"))
    info = ExportInfo(Config(), CLASSES, (), {}, None, None, int8=True)
    network.graph.node[0].input[0] = "nothing"
    onnx.save(network, tmp_path / "model.onnx")
    with pytest.raises(onnx.checker.ValidationError, match="nothing"):
        command.network.mark_onnx(tmp_path / "model.onnx", info)


def test_masks_that_differ_are_told(
    written: list[ExportInfo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = _checkpoint(tmp_path / "tiny.safetensors")
    for alike, told in ((0.9, True), (0.999, False)):
        equality = {"detections": 10, "matched": 10, "mask_iou_mean": alike}
        monkeypatch.setattr(command.report, "compare", lambda *_, found=equality: found)
        run_export(checkpoint, to="onnx", out=tmp_path / "out")
        assert ("masks have an IoU of 0.900 on average: measure" in capsys.readouterr().out) == told


@pytest.mark.skipif(sys.platform != "linux", reason="sets a limit of Unix")
def test_a_full_disk_is_an_error_of_the_file(tmp_path: Path) -> None:
    """Torch's writer would end the process, OpenVINO's raises what a fault of the program raises."""
    pytest.importorskip("openvino")
    handmade_network(tmp_path / "model.onnx")
    package = str(Path(cascade_rcnn.__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-c", _FULL, str(tmp_path)], text=True, capture_output=True, env={"PYTHONPATH": package}
    )
    assert done.returncode == 0 and done.stdout.count("OSError") == 2, done.stdout + done.stderr


def test_what_a_killed_export_left_is_no_obstacle(written: list[ExportInfo], tmp_path: Path) -> None:
    left = tmp_path / "out" / ".unfinished"
    left.mkdir(parents=True)
    (left / "model.onnx").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="neither best"):
        load(tmp_path / "out")
    run_export(_checkpoint(tmp_path / "tiny.safetensors"), to="onnx", out=tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["model.onnx", "report.json"]


def test_the_folder_may_be_called_like_a_file(written: list[ExportInfo], tmp_path: Path) -> None:
    folder = run_export(_checkpoint(tmp_path / "tiny.safetensors"), to="onnx", out=tmp_path / "street.onnx")
    assert load(folder).class_names == CLASSES


def test_where_the_folder_lies(
    written: list[ExportInfo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run.v1"
    run.mkdir()
    best = _checkpoint(run / "best.safetensors")
    for given in (run, best):
        assert run_export(given, to="onnx") == run / "onnx"
        assert "% are the same: measure the AP of both" in capsys.readouterr().out  # made by hand: another network
    cached = best.rename(tmp_path / "cascade-r50.safetensors")
    assert run_export(cached, to="onnx") == tmp_path / "cascade-r50_onnx"
    monkeypatch.chdir(run)
    monkeypatch.setattr(command, "resolve", lambda _: cached)
    assert run_export("cascade-r50", to="onnx").resolve() == run / "cascade-r50_onnx"


def test_openvino_replaces_onnx(written: list[ExportInfo], tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    checkpoint = _checkpoint(tmp_path / "tiny.safetensors")
    run_export(checkpoint, to="onnx", out=tmp_path / "out")
    folder = run_export(checkpoint, to="openvino", out=tmp_path / "out")
    assert sorted(file.name for file in folder.iterdir()) == ["model.bin", "model.xml", "report.json"]
    assert load(folder).class_names == CLASSES
    assert json.loads((folder / "report.json").read_text())["runtime"].startswith("OpenVINO")


def test_a_size_below_that_of_the_training(written: list[ExportInfo], tmp_path: Path) -> None:
    checkpoint = _checkpoint(tmp_path / "tiny.safetensors", short_side=(96, 128), test_short_side=112)
    for asked, size, short, long in (((30, 60), (32, 64), 32, 64), ((96, 160), (96, 160), 96, 160)):
        folder = run_export(checkpoint, to="onnx", size=asked, out=tmp_path / "out")
        data = written[-1].config.data
        assert (written[-1].size, data.test_short_side, data.long_side) == (size, short, long)
        for detector in (load(folder), load_without_torch(folder)):
            for shape in ((1, 1, 3), (20, 900, 3), (900, 20, 3), (223, 319, 3)):
                assert detector.predict(np.zeros(shape, np.uint8)).size == shape[:2]


def test_padding_fits_the_network(written: list[ExportInfo], tmp_path: Path) -> None:
    """Whatever the training padded to: sides are multiples of 32, and no larger than a fixed size."""
    picture = np.zeros((96, 150, 3), np.uint8)
    for trained, size, multiple in ((64, (96, 160), 32), (1, (96, 160), 32), (16, None, 32), (64, None, 64)):
        checkpoint = _checkpoint(tmp_path / "tiny.safetensors", pad_multiple=trained, pad_buckets=True)
        folder = run_export(checkpoint, to="onnx", size=size, out=tmp_path / "out")
        assert written[-1].config.data.pad_multiple == multiple and not written[-1].config.data.pad_buckets
        pixels, _ = load_without_torch(folder).prepare([picture])
        assert load(folder).prepare([picture]).pixels.shape[-2:] == (size or pixels.shape[-2:])
        assert len(load_without_torch(folder).predict(picture)) == len(load(folder).predict(picture)) > 0


def test_thresholds_of_the_checkpoint_are_checked_before(written: list[ExportInfo], tmp_path: Path) -> None:
    checkpoint = _checkpoint(tmp_path / "tiny.safetensors", extra={"thresholds": {"cat": "high"}})
    with pytest.raises(CheckpointError, match=r"tiny\.safetensors: its thresholds .* write them anew"):
        run_export(checkpoint, to="onnx")
    assert not written


def test_swin_pads_to_whole_windows_at_any_size() -> None:
    """With remainders of the sides, block after block, an export had not ended after 20 minutes on a busy machine."""
    window: dict[str, Any] = {"window_size": 7, "shift_size": 3, "always_partition": True, "dynamic_mask": True}
    block = DetectionSwinBlock(dim=8, input_resolution=(56, 56), num_heads=2, **window).eval()
    sides = {0: torch.export.Dim("batch"), 1: 8 * torch.export.Dim("rows"), 2: 8 * torch.export.Dim("columns")}
    program = torch.export.export(block, (torch.zeros(2, 48, 64, 8),), dynamic_shapes=(sides,), strict=False)
    assert operator.mod not in {node.target for node in program.graph.nodes}
    pixels = torch.rand(1, 40, 24, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(pixels), block(pixels))


def test_every_picture_fits_into_a_fixed_size() -> None:
    dice = random.Random(0)
    for _ in range(3000):
        canvas = 32 * dice.randint(1, 42), 32 * dice.randint(1, 42)
        data = DataConfig(short_side=(min(canvas),), long_side=max(canvas))
        size = dice.randint(1, 5000), dice.randint(1, 5000)
        limits = fitting(data, size, canvas)
        height, width = fitted_size(size, limits.test_short_side or max(limits.short_side), limits.long_side)
        assert 1 <= height <= canvas[0] and 1 <= width <= canvas[1]
