"""Exported networks: what PyTorch says, as any other checkpoint to the commands, refused where they cannot be right."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.ops import box_iou

pytest.importorskip("onnxscript", reason="needs pip install 'cascade-rcnn[onnx]'")
pytest.importorskip("onnxruntime", reason="needs pip install 'cascade-rcnn[onnx]'")

from cascade_rcnn.analysis.stages import stage_results
from cascade_rcnn.checkpoint import save_checkpoint
from cascade_rcnn.cli import main
from cascade_rcnn.config import Config, DataConfig
from cascade_rcnn.data.formats.open import open_split
from cascade_rcnn.data.sizes import fitted_size, fitting
from cascade_rcnn.data.synthetic_shapes import CLASS_NAMES, generate_shapes
from cascade_rcnn.errors import CheckpointError, ConfigError, UserError
from cascade_rcnn.evaluation.evaluate_model import detect_split
from cascade_rcnn.export import command, quantise
from cascade_rcnn.export.command import Calibration, run_export
from cascade_rcnn.export.quantise import Quantised, find_layers
from cascade_rcnn.export.report import match
from cascade_rcnn.inference.detections import Detections
from cascade_rcnn.inference.detector import Detector, load
from cascade_rcnn.inference.run_model import Inference
from cascade_rcnn.runtime.network import ExportInfo, exported_file
from handmade_network import handmade_network
from tiny import TINY, tiny_model

CLASSES = CLASS_NAMES


def _checkpoint(path: Path, **changes: Any) -> Path:
    model = dataclasses.replace(TINY, **changes)
    config = Config(model=model, data=DataConfig(short_side=(96,), long_side=160, workers=0))
    save_checkpoint(path, tiny_model(len(CLASSES), **changes).state_dict(), config=config, class_names=CLASSES)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A frozen batch norm: its statistics do not see padding."""
    return _checkpoint(tmp_path_factory.mktemp("export") / "tiny.safetensors", norm="frozen")


@pytest.fixture(scope="module")
def folder(checkpoint: Path) -> Path:
    """Two images of 160 x 160 at once."""
    return run_export(checkpoint, to="onnx", size=(150, 160), batch=2)


def _pictures(*sizes: tuple[int, int]) -> list[NDArray[np.uint8]]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def _same(one: Detections, other: Detections) -> float:
    assert len(one) == len(other) > 0
    return len(match(one, other)) / len(one)


def test_onnx_says_what_the_checkpoint_says(checkpoint: Path, folder: Path) -> None:
    exported, reference = load(folder), load(checkpoint, device="cpu")
    assert exported.class_names == CLASSES and exported.canvas == (160, 160)
    reference.config, reference.canvas = exported.config, exported.canvas  # the same padding
    pictures = _pictures((96, 150), (150, 96), (400, 90))
    for one, other in zip(exported.predict(pictures, batch_size=3), reference.predict(pictures)):
        assert one.size == other.size and _same(one, other) == 1
        for mine, theirs in [(one[row], other[column]) for row, column in match(one, other)][:10]:
            assert mine.masks is not None and theirs.masks is not None
            assert int((mine.masks ^ theirs.masks).sum()) <= 0.01 * int(theirs.masks.sum()) + 2


@pytest.mark.parametrize("to", ["openvino", "torch"])
def test_the_other_formats_say_it_too(to: str, checkpoint: Path, tmp_path: Path) -> None:
    if to == "openvino":
        pytest.importorskip("openvino")
    exported = load(run_export(checkpoint, to=to, size=(96, 160), out=tmp_path / to))
    reference = load(checkpoint, device="cpu")
    reference.config, reference.canvas = exported.config, exported.canvas
    for picture in _pictures((96, 150), (300, 90)):
        one, other = exported.predict(picture), reference.predict(picture)
        assert _same(one, other) == 1
        assert (one[0].masks != other[0].masks).float().mean() < 0.01  # type: ignore[union-attr]


def test_the_report_tells_equality_time_and_size(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    assert report["equality"]["matched"] / report["equality"]["detections"] > 0.95
    assert report["equality"]["mask_iou_mean"] > 0.99 and report["opset"] == 18
    assert report["time"]["ratio"] > 0 and report["megabytes"] == pytest.approx(
        (folder / "model.onnx").stat().st_size / 1e6
    )
    assert report["size"] == [160, 160] and report["batch"] == 2


def test_no_path_of_this_machine_lies_in_it(folder: Path) -> None:
    """Exporters note the line of source that each node comes from."""
    places = [str(Path(module.__file__ or "").parent).encode() for module in (command, torch)]
    assert not [place for place in places if place in (folder / "model.onnx").read_bytes()]


def test_it_has_standard_operators_alone_and_all_groups_of_layers(folder: Path) -> None:
    """Groups go by the names of weights: a part that is renamed would stay in float."""
    onnx = pytest.importorskip("onnx")
    network = onnx.load(folder / "model.onnx")
    assert {node.domain for node in network.graph.node} == {""} and not network.functions
    groups = find_layers(folder / "model.onnx").groups
    assert {"first convolution", "sums", *(name for name, _ in quantise._GROUPS)} == set(groups)


def test_mask_heads_run_on_what_is_found_alone(folder: Path) -> None:
    """A list for many objects is mostly empty, and masks cost more than all the rest."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    network = onnx.load(folder / "model.onnx")
    head = next(node for node in network.graph.node if node.op_type == "ConvTranspose")
    network.graph.output.append(onnx.helper.make_empty_tensor_value_info(head.output[0]))
    session = runtime.InferenceSession(network.SerializeToString())
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 160, 160), dtype=np.uint8)
    for sizes, least, most in (([[160, 160], [8, 8]], 3, 199), ([[0, 0], [0, 0]], 0, 0)):
        *_, valid, masks, rows = session.run(None, {"pixels": pixels, "sizes": np.int64(sizes)})
        assert least <= valid.sum() <= most
        assert len(rows) == valid.sum() and not masks[~valid].any() and masks.shape[:2] == valid.shape


def test_sides_of_the_network_have_names() -> None:
    exporters_own = ["s46", 3, "32*s30", "32*s18"]
    onnx = pytest.importorskip("onnx")
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [], "net", [info("pixels", 2, exporters_own)], [info("boxes", 1, ["s46", "Min(100, 5*s30)", 4])]
    )
    command.network._name_sides(graph)
    shapes = [
        [side.dim_param or side.dim_value for side in one.type.tensor_type.shape.dim]
        for one in (*graph.input, *graph.output)
    ]
    assert shapes == [["batch", 3, "height", "width"], ["batch", "detections", 4]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate_shapes(tmp_path_factory.mktemp("shapes") / "data", train_images=2, val_images=3, size=96)


def test_predict_and_evaluate_take_it_as_a_checkpoint(
    folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = tmp_path / "a.png"
    Image.fromarray(_pictures((100, 220))[0]).save(photo)
    for name, options in (("whole", []), ("tiles", ["--tile", "96"])):
        out = tmp_path / name
        assert main(["predict", str(folder / "model.onnx"), str(photo), "--out", str(out), *options]) == 0
        assert "ONNX Runtime" in capsys.readouterr().out
        assert "segmentation" in json.loads((out / "predictions.json").read_text())[0]
    assert main(["evaluate", str(folder), "--data", str(data), "--out", str(tmp_path / "metrics.json")]) == 0
    assert "segm/AP" in json.loads((tmp_path / "metrics.json").read_text())


def test_evaluate_sees_what_predict_sees(folder: Path, data: Path) -> None:
    """Tall pictures in a network for wide ones, too: they are made smaller."""
    detector = load(folder)
    split = open_split(data, "val")
    results, _ = detect_split(detector.model, detector.config, split, progress=False)
    found = detector.predict([record.path for record in split.records])
    assert sorted(one["score"] for one in results) == sorted(score for one in found for score in one.scores.tolist())
    settings = DataConfig(short_side=(96,), long_side=160)
    assert fitting(settings, (96, 150), (96, 160)) == settings
    tall = fitting(settings, (300, 200), (96, 160))
    assert fitted_size((300, 200), tall.test_short_side, tall.long_side) == (96, 64)


def test_serve_takes_it_without_a_choice_of_stages(folder: Path) -> None:
    pytest.importorskip("fastapi")
    from cascade_rcnn.serve.app import ServiceError, _predict, _Service, describe
    from cascade_rcnn.serve.settings import ServeSettings

    async def ask() -> None:
        service = _Service(load(folder), ServeSettings())
        await service.start()
        told = describe(service)
        assert told["stages"] == 3 and not told["choose_stages"]
        assert service.batcher is not None and len((await service.batcher.detect(_pictures((96, 96)), 0))[0])
        with pytest.raises(ServiceError, match="exported network always runs"):
            await _predict(service, cast(Any, None), 0.0, 2, True)
        await service.stop()

    asyncio.run(ask())


def test_analyze_has_one_result_and_the_others_refuse(
    folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    detector, split = load(folder), open_split(data, "val")
    found = stage_results(detector, split, class_map=list(range(5)), inference=Inference())
    assert list(found) == ["exported network"] and found["exported network"]
    assert "does not show its stages" in capsys.readouterr().out
    for words in (
        ["check", str(data), "--model", str(folder)],
        ["train", "finetune", "--data", str(data), "--train.init", str(folder)],
    ):
        assert main([*words, "--out", str(tmp_path / "run")]) == 2, words
        error = capsys.readouterr().err
        assert "give the checkpoint that it was made from" in error and error.count("\n") == 1, error


def test_thresholds_are_refused_before_the_analysis(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "onnx"
    folder.mkdir()
    (folder / "model.onnx").touch()
    for target in ([], [str(tmp_path / "mine.safetensors")]):
        words = ["analyze", str(folder), "--data", str(tmp_path / "absent"), "--out", str(tmp_path / "a")]
        assert main([*words, "--set-thresholds", *target]) == 2
        assert "is an exported network; give the checkpoint that it was made from" in capsys.readouterr().err


def test_settings_that_the_file_holds_are_refused_with_the_way_out(folder: Path) -> None:
    assert len(load(folder, max_detections=5).predict(_pictures((100, 100))[0])) <= 5
    for settings, words in (
        ({"score_threshold": 0.0}, "export the checkpoint again with --model.score-threshold 0.0"),
        ({"max_detections": 1000}, "--model.max-detections 1000"),
        ({"stop_after_stage": 1}, "--model.stop-after-stage 1"),
        ({"precision": "bf16"}, "load the checkpoint itself"),
        ({"compile": True}, "drop --compile"),
    ):
        with pytest.raises(UserError, match=words):
            load(folder, **settings)
    with pytest.raises(UserError, match="is exported already"):
        run_export(folder, to="onnx")


def test_openvino_takes_bfloat16_where_the_processor_has_it(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    from cascade_rcnn.runtime import network

    made = run_export(checkpoint, to="openvino", size=(96, 96), out=tmp_path / "openvino")
    picture = _pictures((96, 96))[0]
    exact = load(made).predict(picture)
    if network._has_bfloat16():
        assert "float32" in load(made).choices() and "--precision bf16" in load(made).choices()
        detector = load(made, precision="bf16")
        assert "bfloat16, input 96 x 96" in detector.choices() and "--precision" not in detector.choices()
        half = detector.predict(picture)
        assert not torch.equal(half.boxes, exact.boxes)
        matched = box_iou(half.boxes, exact.boxes).amax(dim=1) > 0.8
        assert len(half) and matched.float().mean() > 0.7
        with monkeypatch.context() as older:
            older.setattr(network, "EXACT", "no such output")
            with pytest.raises(UserError, match=r"model\.xml would round its boxes to bfloat16 .*; export it anew"):
                load(made, precision="bf16")
    monkeypatch.setattr(network, "_has_bfloat16", lambda: False)
    assert "--precision bf16" not in load(made).choices()
    with pytest.raises(UserError, match="precision bf16: this processor has no bfloat16 units; drop it"):
        load(made, precision="bf16")


def test_what_cannot_be_exported_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"soft: .*export with --model\.nms class"):
        run_export(checkpoint, to="onnx", settings=["--model.nms", "soft"], out=tmp_path / "a")
    with pytest.raises(ConfigError, match="the trained network is exported as it is"):
        run_export(checkpoint, to="onnx", settings=["--model.stage-ious", "0.5", "0.6"], out=tmp_path / "a")
    with pytest.raises(UserError, match="semantics paper"):
        run_export(_checkpoint(tmp_path / "p.safetensors", semantics="paper"), to="onnx", out=tmp_path / "a")
    with pytest.raises(UserError, match="--int8 goes with"):
        run_export(checkpoint, to="torch", int8=Calibration(tmp_path), out=tmp_path / "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"holds notes\.txt"):
        run_export(checkpoint, to="onnx", out=tmp_path / "full")
    assert not (tmp_path / "a").exists()


def test_integers_are_calibrated_on_the_pictures_of_a_folder(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything but the quantiser, which ``test_quantise`` has, and the tracing."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, pixels in enumerate(_pictures(*[(60, 90)] * 250)):
        Image.fromarray(pixels).save(photos / f"{number}.png")
    (photos / "0.png").write_bytes(b"none")
    given: list[Any] = []

    def write(_: Any, path: Path, info: ExportInfo) -> None:
        handmade_network(path, size=info.size, batch=info.batch)

    def quantise(plain: Path, target: Path, feeds: list[Any], *, to: str) -> Quantised:
        given.extend(feeds)
        target.write_bytes(plain.read_bytes())
        return Quantised({}, ["box heads"])

    monkeypatch.setattr(command.network, "trace", lambda *_, **__: None)
    monkeypatch.setattr(command.network, "write_onnx", write)
    monkeypatch.setattr(command, "quantise", quantise)
    monkeypatch.setattr(command.report, "IMAGES", 1)
    folder = run_export(checkpoint, to="onnx", size=(96, 160), batch=2, int8=Calibration(photos), out=tmp_path / "out")
    assert (
        len(given) == 99
        and given[0]["pixels"].shape == (2, 3, 96, 160)
        and given[0]["sizes"].tolist() == [[96, 144]] * 2
    )
    assert "left out of the calibration" in capsys.readouterr().out
    given.clear()
    run_export(checkpoint, to="onnx", size=(96, 160), int8=Calibration(photos, 3), out=tmp_path / "out")
    assert len(given) == 2, "and one that cannot be read"
    few = tmp_path / "few"
    few.mkdir()
    shutil.copy(photos / "1.png", few)
    run_export(checkpoint, to="onnx", size=(96, 160), int8=Calibration(few), out=tmp_path / "out")
    assert "int8: calibrating on 1 image; about 100 are better" in capsys.readouterr().out
    assert "8-bit integers" in load(folder).choices() and load(folder).class_names == CLASSES
    assert json.loads((folder / "report.json").read_text())["groups_in_float"] == ["box heads"]


def test_what_is_missing_is_said_before_the_work(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"--to onnx: the package onnxscript is missing: pip install .*\[onnx\]"):
        run_export(checkpoint, to="onnx")


def test_other_files_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "other.onnx").write_bytes(b"no network")
    with pytest.raises(CheckpointError, match=r"other\.onnx: cannot be loaded"):
        load(tmp_path / "other.onnx")
    with pytest.raises(CheckpointError, match="no such file"):
        load(tmp_path / "absent.pt2")
    assert exported_file(tmp_path / "absent") is None and exported_file("runs/demo") is None


def test_a_network_without_its_weights_says_so(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    (tmp_path / "model.xml").write_text("<net></net>")
    with pytest.raises(CheckpointError, match=r"model\.xml: its weights model\.bin are not beside it; copy both files"):
        load(tmp_path)


def test_what_cannot_work_is_said_before_the_tracing(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trace(*_: Any, **__: Any) -> None:
        raise AssertionError("tracing takes minutes")

    monkeypatch.setattr(command.network, "trace", trace)
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    other = shutil.copytree(data, tmp_path / "other")
    for file in (other / "annotations").glob("*.json"):
        file.write_text(file.read_text().replace(CLASSES[0], "cube"))
    for changes, words in (
        (
            {"out": tmp_path / "file" / "below"},
            r"below: cannot be written \(Not a directory\); give another folder as --out",
        ),
        ({"out": tmp_path / "file"}, "is a file; give a folder as --out"),
        ({"int8": Calibration(tmp_path / "absent")}, "absent: no such file or folder"),
        ({"int8": Calibration(tmp_path / "empty")}, "empty: no image or video found"),
        ({"data": tmp_path / "absent"}, "absent: no such folder"),
        ({"int8": Calibration(tmp_path / "file")}, "file: is a file; give a folder of about 100 images as --int8"),
        ({"data": data, "split": "third"}, "no split 'third'"),
        ({"split": "val"}, "--split val: names a part of a data set; give that with --data DIR"),
        ({"size": (10_000, 10_001)}, "--size 10016 10016: more than data.max_pixels 100000000"),
        ({"data": other}, "classes do not fit .* which does not know cube"),
    ):
        with pytest.raises(UserError, match=words):
            run_export(checkpoint, **{"to": "onnx", "out": tmp_path / "new", **changes})
    assert not (tmp_path / "new").exists()


def test_deformable_convolutions_go_to_torch_alone() -> None:
    config = Config(model=dataclasses.replace(TINY, deformable="plain"))
    for to in ("onnx", "openvino"):
        with pytest.raises(UserError, match=r"model\.deformable plain: .* export with --to torch"):
            command.network.refuse_unexportable(config, to=to)
    command.network.refuse_unexportable(config, to="torch")


def test_config_prints_what_an_export_was_made_with(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", str(folder / "model.onnx"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(load(folder).config.to_dict()))


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("onnx", {"norm": "frozen", "masks": "every"}),
    ("onnx", {"norm": "frozen", "semantics": "detectron2", "masks": "one"}),
    (
        "onnx",
        {"norm": "frozen", "stage_ious": (0.5,), "stage_stds": None, "masks": "none", "class_agnostic_boxes": False},
    ),
    ("torch", {}),
    ("openvino", {"norm": "frozen"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("to", "changes"), VARIANTS)
def test_every_kind_at_any_size_and_batch(to: str, changes: dict[str, Any], tmp_path: Path) -> None:
    if to == "openvino":
        pytest.importorskip("openvino")
    path = _checkpoint(tmp_path / "tiny.safetensors", **changes)
    exported, reference = load(run_export(path, to=to)), load(path, device="cpu")
    pictures = _pictures((96, 150), (96, 150), (300, 200), (400, 60))  # the last is 24 pixels wide in the network
    for size in (1, 2):
        for one, other in zip(
            exported.predict(pictures, batch_size=size), reference.predict(pictures, batch_size=size)
        ):
            assert _same(one, other) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_integers_find_nearly_the_same(checkpoint: Path, tmp_path: Path, to: str) -> None:
    pytest.importorskip("nncf")
    for number, pixels in enumerate(_pictures(*[(96, 128)] * 12)):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    folder = run_export(checkpoint, to=to, int8=Calibration(tmp_path), out=tmp_path / "out")
    assert json.loads((folder / "report.json").read_text())["groups_in_float"] is not None
    exported = load(folder)
    assert isinstance(exported, Detector) and "8-bit" in exported.choices()
    assert len(exported.predict(_pictures((96, 128))[0]))


def test_tracing_leaves_the_network_as_it_is() -> None:
    """Values that decide shapes are only forbidden while an exporter traces."""
    from cascade_rcnn.models.ops.capabilities import exporting

    assert not exporting() and torch.compiler.is_exporting() is False
