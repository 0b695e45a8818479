"""Quantisation of a small network in ONNX: what becomes integer, what stays, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cascade_rcnn.errors import UserError
from cascade_rcnn.export import quantise as module
from cascade_rcnn.export.quantise import Found, change, find_layers, quantise

onnx = pytest.importorskip("onnx")
SIZE = 16
GROUPS = {
    "first convolution": ["stem"],
    "backbone": ["block"],
    "FPN lateral": ["lateral"],
    "box heads": ["fc"],
    "box head outputs": ["classes", "moves"],
    "sums": ["sum"],
}


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """pixels -> stem -> block, added to its input -> lateral -> mean -> fc -> eight boxes and their scores."""
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    generator = np.random.default_rng(0)
    shapes = {
        "m.backbone.conv1.weight": (8, 3, 3, 3),
        "m.backbone.layer1.conv.weight": (8, 8, 3, 3),
        "m.fpn.lateral.0.weight": (16, 8, 1, 1),
        "m.cascade.box_heads.0.fc1.weight": (32, 16),
        "m.cascade.box_heads.0.classifier.weight": (8, 32),
        "m.cascade.box_heads.0.deltas.weight": (32, 32),
    }
    weights = {
        name: generator.normal(size=shape, scale=(2 / np.prod(shape[1:])) ** 0.5).astype(np.float32)
        for name, shape in shapes.items()
    }
    constants = {
        "scale": np.float32(1 / 64),
        "shape": np.array([1, 8, 4]),
        "corners": np.tile(np.float32([10, 10, 40, 40]), (1, 8, 1)),
        "labels": np.zeros((1, 8), np.int64),
        "valid": np.ones((1, 8), bool),
    }
    stem, block, lateral, fc, classes, moves = weights
    nodes = [
        helper.make_node("Cast", ["pixels"], ["as_float"], "cast", to=1),
        helper.make_node("Mul", ["as_float", "scale"], ["x"], "normalise"),
        helper.make_node("Conv", ["x", stem], ["x1"], "stem", pads=[1] * 4, strides=[2, 2]),
        helper.make_node("Relu", ["x1"], ["x2"], "relu"),
        helper.make_node("Conv", ["x2", block], ["x3"], "block", pads=[1] * 4),
        helper.make_node("Add", ["x2", "x3"], ["x4"], "sum"),
        helper.make_node("Conv", ["x4", lateral], ["x5"], "lateral"),
        helper.make_node("GlobalAveragePool", ["x5"], ["x6"], "pool"),
        helper.make_node("Flatten", ["x6"], ["x7"], "flat"),
        helper.make_node("Gemm", ["x7", fc], ["x8"], "fc", transB=1),
        helper.make_node("Gemm", ["x8", classes], ["logits"], "classes", transB=1),
        helper.make_node("Sigmoid", ["logits"], ["scores"], "sigmoid"),
        helper.make_node("Gemm", ["x8", moves], ["deltas"], "moves", transB=1),
        helper.make_node("Reshape", ["deltas", "shape"], ["by_box"], "reshape"),
        helper.make_node("Add", ["by_box", "corners"], ["boxes"], "decode"),
        helper.make_node("Identity", ["labels"], ["labels_out"], "label"),
        helper.make_node("Identity", ["valid"], ["valid_out"], "is_valid"),
    ]
    info = helper.make_tensor_value_info
    outputs = [
        info("boxes", 1, [1, 8, 4]),
        info("scores", 1, [1, 8]),
        info("labels_out", 7, [1, 8]),
        info("valid_out", 9, [1, 8]),
    ]
    values = [numpy_helper.from_array(np.asarray(value), name) for name, value in (weights | constants).items()]
    graph = helper.make_graph(nodes, "net", [info("pixels", 2, [1, 3, SIZE, SIZE])], outputs, values)
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


@pytest.fixture
def feeds(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    generator = np.random.default_rng(1)
    monkeypatch.setattr(module, "as_found", _as_found)
    return [{"pixels": generator.integers(0, 256, (1, 3, SIZE, SIZE), dtype=np.uint8)} for _ in range(4)]


def _as_found(outputs: dict[str, Any]) -> Found:
    return Found(outputs["boxes"][0], outputs["scores"][0], outputs["labels_out"][0])


def test_layers_are_grouped_by_their_weights_and_boxes_stay_out(network: Path) -> None:
    layers = find_layers(network)
    assert layers.groups == GROUPS
    assert layers.between == {"relu": {"first convolution"}}  # not what normalises pixels or decodes boxes
    assert layers.without(["backbone", "box heads", "box head outputs"]) == ["stem", "lateral", "sum", "relu"]


def test_a_group_alone_takes_nothing_else_with_it(network: Path) -> None:
    """Sums in integers once changed the detections of every other group's trial by 8 %."""
    layers = find_layers(network)
    alone = {group: layers.without(set(layers.groups) - {group}) for group in layers.groups}
    assert alone == GROUPS | {"first convolution": ["stem", "relu"]}


@pytest.mark.parametrize(("to", "suffix"), [("onnx", ".onnx"), ("openvino", ".xml")])
def test_the_network_in_integers_finds_the_same(
    to: module.Target,
    suffix: str,
    network: Path,
    feeds: list[dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("onnxruntime.quantization" if to == "onnx" else "nncf")
    said: list[str] = []
    done = quantise(network, tmp_path / f"int8{suffix}", feeds, to=to, say=said.append)
    assert set(done.changes) == set(GROUPS) and 0 < max(done.changes.values()) < 0.1
    assert said[-1].startswith("int8: 4 images of calibration; in float:")
    assert capsys.readouterr().out == ""  # bars are for terminals
    backend = module._backend(to, network)
    runs = zip(backend.run(network, feeds), backend.run(tmp_path / f"int8{suffix}", feeds))
    for before, after in runs:
        assert 0 < np.abs(before["scores"] - after["scores"]).max() < 0.2  # 0.12 without VNNI


def test_pictures_in_which_nothing_is_found_show_nothing(
    network: Path, feeds: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime.quantization")
    monkeypatch.setattr(module, "_CONFIDENT", 1.1)
    said: list[str] = []
    done = quantise(network, tmp_path / "int8.onnx", feeds, to="onnx", say=said.append)
    assert not done.kept and said[0].startswith("nothing with a score of 1.1 or more in 4 images")


def test_trials_run_on_images_spread_over_the_folder(network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where nothing may become integer, that is said."""
    pytest.importorskip("onnxruntime.quantization")
    seen: list[int] = []
    monkeypatch.setattr(
        module,
        "measure_changes",
        lambda _, layers, feeds, **__: seen.extend(feeds) or dict.fromkeys(layers.groups, 1.0),
    )
    monkeypatch.setattr(module._OnnxRuntime, "write", lambda *_: None)
    said: list[str] = []
    quantise(network, network.with_name("int8.onnx"), range(100), to="onnx", say=said.append)  # type: ignore[arg-type]
    assert seen == [0, 13, 26, 39, 52, 65, 78, 91]
    assert said == ["int8: 100 images of calibration; in float: all of them, for each alone changes too much"]


def test_what_is_named_stays_in_float(network: Path, feeds: list[dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime.quantization")
    done = quantise(network, tmp_path / "all.onnx", feeds, to="onnx", keep=["box head outputs"], say=lambda _: None)
    assert done.kept == ["box head outputs"] and not done.changes
    graph = onnx.load(tmp_path / "all.onnx").graph
    reads = {node.name: list(node.input) for node in graph.node}
    assert reads["classes"][1] == "m.cascade.box_heads.0.classifier.weight"
    assert reads["block"][1] == "m.backbone.layer1.conv.weight_DequantizeLinear_Output"
    assert "relu" not in reads  # the integers of its input begin at 0: they span what it leaves, not what it cuts off
    scales = {tensor.name: tensor.dims for tensor in graph.initializer}
    assert list(scales["m.backbone.layer1.conv.weight_scale"]) == [8]  # one for each output channel


def test_change_counts_scores_boxes_and_what_is_lost() -> None:
    one = Found(np.float32([[0, 0, 10, 10]]), np.float32([0.9]), np.array([1]))
    assert change(one, one) == 0
    assert change(one, one._replace(scores=np.float32([0.8]))) == pytest.approx(0.1)
    assert change(one, one._replace(boxes=np.float32([[0, 0, 10, 5]]))) == pytest.approx(0.5)
    assert change(one, one._replace(labels=np.array([2]))) == 1
    mask = np.zeros((1, 28, 28), np.float32)
    mask[:, :14] = 0.9
    masked, half = one._replace(masks=mask), one._replace(masks=np.where(np.arange(28) < 14, mask, 0.1))
    assert change(masked, masked) == 0 and change(masked, half) == pytest.approx(0.5)
    nothing = Found(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    assert change(one, nothing) == change(nothing, one) == 1
    assert change(nothing, nothing) == change(one._replace(scores=np.float32([0.1])), nothing) == 0


def test_what_cannot_be_done_is_refused_in_one_line(
    network: Path, feeds: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="no images to calibrate with"):
        quantise(network, tmp_path / "a.onnx", [], to="onnx")
    with pytest.raises(UserError, match="'neck' is no group of layers: choose of first convolution, backbone"):
        quantise(network, tmp_path / "a.onnx", feeds, to="onnx", keep=["neck"])
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="needs onnxruntime: pip install onnxruntime onnx"):
        quantise(network, tmp_path / "a.onnx", feeds, to="onnx")
