"""The demo from end to end with a network and a data set made smaller, and what a second run does to the first."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cascade_rcnn import demo
from cascade_rcnn.config import Config
from cascade_rcnn.errors import UserError
from cascade_rcnn.models.build import build_model


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same demo in seconds: a tiny network, a few small images, one epoch."""
    original, generate = demo.demo_config, demo.generate_shapes

    def config(data: Path, *, quick: bool = False) -> Config:
        full = original(data, quick=quick)
        model = dataclasses.replace(
            full.model,
            backbone="test_resnet",
            fpn_channels=16,
            head_channels=16,
            mask_channels=16,
            test_proposals=20,
            max_detections=10,
        )
        return dataclasses.replace(
            full,
            model=model,
            data=dataclasses.replace(full.data, short_side=(64,), long_side=64),
            train=dataclasses.replace(full.train, epochs=2 if quick else 1),
        )

    def shapes(out: Path, **_: Any) -> Path:
        return generate(out, train_images=8, val_images=4, size=64, objects=(3, 4))

    monkeypatch.setattr(demo, "demo_config", config)
    monkeypatch.setattr(demo, "generate_shapes", shapes)


@pytest.mark.usefixtures("small")
def test_the_demo_leaves_everything_behind_that_it_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    metrics = demo.run_demo(out=out)
    assert json.loads((out / "metrics.json").read_text()) == metrics and "segm/AP" in metrics
    for name in ("best.safetensors", "data/annotations/instances_val.json", "config.json", "log.jsonl"):
        assert (out / name).exists()
    with Image.open(out / "predictions.png") as sheet, Image.open(out / "ap_by_iou.png") as chart:
        assert sheet.width > 2 * 64 * 3 and chart.size == (960, 600)
    shown = capsys.readouterr().out
    for words in ("box AP", "mask AP", str(out / "predictions.png"), "cascade-rcnn predict", "cascade-rcnn train"):
        assert words in shown


@pytest.mark.usefixtures("small")
def test_a_second_demo_leaves_the_first_alone_and_an_unfinished_one_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    demo.run_demo(out=out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert demo._choose_folder(out, quick=False) == tmp_path / "demo-2"
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    (out / "demo.json").unlink()  # as if it had been stopped just before its end
    assert demo._choose_folder(out, quick=False) == out
    assert demo._choose_folder(out, quick=True) == tmp_path / "demo-2"  # another recipe
    checkpoint = (out / "best.safetensors").read_bytes()
    demo.run_demo(out=out)
    assert (out / "best.safetensors").read_bytes() == checkpoint and not (tmp_path / "demo-2").exists()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    assert demo._choose_folder(tmp_path / "mine", quick=False) == tmp_path / "mine-2"
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        demo._choose_folder(tmp_path / "file", quick=False)


@pytest.mark.parametrize("quick", [False, True])
def test_the_demos_network_can_be_built(quick: bool) -> None:
    config = demo.demo_config(Path("data"), quick=quick)
    model = build_model(config.model, 5)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) < 20e6
