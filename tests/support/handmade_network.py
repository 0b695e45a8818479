"""An ONNX file with the inputs and outputs of an exported network, made by hand: what it says depends on its pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cascade_rcnn.config import Config, DataConfig, ModelConfig
from cascade_rcnn.runtime.network import METADATA, ExportInfo

CLASSES = ("cat", "dog", "eel")


def handmade_network(
    path: Path,
    *,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    model: ModelConfig | None = None,
    thresholds: dict[str, float] | None = None,
) -> Path:
    """Six objects at fixed places of the image; their scores and masks grow a little with its mean."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    corner, side = random.uniform(0, 0.6, (1, 6, 2)), random.uniform(0.1, 0.6, (1, 6, 2))
    constants: dict[str, Any] = {
        "where": np.concatenate([corner, corner + side], axis=2).astype(np.float32),  # some end outside
        "score": np.float32([[0.9, 0.7, 0.5, 0.3, 0.2, 0.02]]),
        "label": np.int64([[0, 1, 2, 1, 0, 2]]),
        "mask": random.uniform(0, 1, (1, 6, 14, 14)).astype(np.float32),
        "small": np.float32(1e-4),
        "zero": np.float32(0),
        "least": np.float32(0.05),
        "xyxy": np.int64([1, 0, 1, 0]),
        "one": np.int64([1]),
        "two": np.int64([1, 2]),
        "axes": np.int64([1, 2, 3]),
    }
    node = helper.make_node
    nodes = [
        node("Cast", ["pixels"], ["light"], to=TensorProto.FLOAT),
        node("ReduceMean", ["light", "axes"], ["mean4"]),  # [B, 1, 1, 1]
        node("Squeeze", ["mean4", "two"], ["mean"]),  # [B, 1]
        node("Mul", ["mean", "small"], ["lift"]),
        node("Add", ["score", "lift"], ["scores"]),
        node("Mul", ["mean", "zero"], ["nothing"]),
        node("Cast", ["nothing"], ["none"], to=TensorProto.INT64),
        node("Add", ["label", "none"], ["labels"]),
        node("Greater", ["scores", "least"], ["valid"]),
        node("Mul", ["mean4", "small"], ["mask_lift"]),
        node("Add", ["mask", "mask_lift"], ["masks"]),
        node("Gather", ["sizes", "xyxy"], ["far"], axis=1),
        node("Cast", ["far"], ["far_float"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["far_float", "one"], ["frame"]),  # [B, 1, 4]
        node("Mul", ["where", "frame"], ["boxes"]),
    ]
    of_batch, (height, width) = batch or "B", size or ("H", "W")
    info = helper.make_tensor_value_info
    inputs = [
        info("pixels", TensorProto.UINT8, [of_batch, 3, height, width]),
        info("sizes", TensorProto.INT64, [of_batch, 2]),
    ]
    outputs = [
        info("boxes", TensorProto.FLOAT, [of_batch, 6, 4]),
        info("scores", TensorProto.FLOAT, [of_batch, 6]),
        info("labels", TensorProto.INT64, [of_batch, 6]),
        info("valid", TensorProto.BOOL, [of_batch, 6]),
        info("masks", TensorProto.FLOAT, [of_batch, 6, 14, 14]),
    ]
    values = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "net", inputs, outputs, values)
    network = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    config = Config(model=model or ModelConfig(), data=DataConfig(short_side=(96,), long_side=160))
    said = ExportInfo(config, CLASSES, (3, 5, 9), thresholds or {}, size, batch, int8=False)
    helper.set_model_props(network, {METADATA: said.to_json()})
    onnx.checker.check_model(network, full_check=True)
    onnx.save(network, path)
    return path
