"""What each part of an exported network takes: trunk, RPN, RoIAlign, heads, NMS (docs/deploy_measured.md).

    python3 benchmarks/export_parts.py CHECKPOINT IMAGES ONNX [FILE ...] [--images 20]

ONNX is the float export: its nodes say which part of the network they come from, and every FILE made of it (ONNX in
integers, OpenVINO's .xml) keeps their names. Times are the runtimes' own, of each layer; layers that a runtime has
joined count for the part of the first of them, and layers that it has added (conversions of numbers and layouts) for
"conversions".
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cascade_rcnn.checkpoint import load_checkpoint
from cascade_rcnn.export.command import Calibration, calibration_inputs
from cascade_rcnn.runtime.network import ExportInfo

SCOPES = {
    "model.backbone": "backbone",
    "model.fpn": "FPN",
    "model.rpn": "RPN",
    "model.cascade.box_heads": "box heads",
    "model.cascade.mask_heads": "mask heads",
}
OPERATORS = {"RoiAlign": "RoIAlign", "ROIAlign": "RoIAlign", "NonMaxSuppression": "NMS"}
FOLLOWING = ("Relu", "Clip", "MatMul", "Reshape", "Sigmoid")  # written as functions, which are no modules
REST = "selection"  # decoding, thresholds, top k, gathering
ADDED = "conversions"
WARM = 2  # pictures that are run first, and not counted
PARTS = (*SCOPES.values(), "RoIAlign", "NMS", REST, ADDED)


def parts_of_nodes(network: Path) -> dict[str, str]:
    """The part of each node and of each value of an ONNX file, by name."""
    import onnx

    found: dict[str, str] = {}
    for node in onnx.load(network).graph.node:
        scopes = next((one.value for one in node.metadata_props if one.key == "pkg.torch.onnx.name_scopes"), "[]")
        modules = [
            part for scope in ast.literal_eval(scopes) for name, part in SCOPES.items() if scope.startswith(name)
        ]
        if node.op_type in FOLLOWING:
            modules += [found[value] for value in node.input if found.get(value, REST) != REST]
        part = OPERATORS.get(node.op_type) or next(iter(modules), REST)
        found |= dict.fromkeys((node.name, *node.output), part)
    return found


def part_of(names: Sequence[str], operator: str, parts: dict[str, str]) -> str:
    """Of a layer that a runtime has made of the nodes ``names``."""
    if operator in OPERATORS:
        return OPERATORS[operator]
    for name in names:
        if name in parts:
            return parts[name]
        begun = [known for known in parts if name.startswith((f"{known}_", f"{known}/"))]
        if begun:  # what a quantiser puts beside a node is called after it
            return parts[max(begun, key=len)]
    return ADDED


def measure_onnx(file: Path, feeds: Sequence[Any], parts: dict[str, str]) -> Counter[str]:
    """Seconds of each part, all feeds together."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 2
        options.enable_profiling, options.profile_file_prefix = True, f"{folder}/profile"
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        for feed in [*feeds[:WARM], *feeds]:
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
    seconds, runs = Counter[str](), Counter[str]()
    for event in sorted(events, key=lambda event: event.get("ts", 0)):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name, operator = event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]
            runs[name] += 1  # each node runs once a picture
            if runs[name] > len(feeds[:WARM]):
                seconds[part_of([name], operator, parts)] += event["dur"] / 1e6
    return seconds


def measure_openvino(file: Path, feeds: Sequence[Any], parts: dict[str, str]) -> Counter[str]:
    """As ``measure_onnx``."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 2, "PERF_COUNT": True}
    compiled = openvino.Core().compile_model(file, "CPU", settings)
    made_of = {}
    for layer in compiled.get_runtime_model().get_ops():
        names = layer.get_rt_info()["originalLayersNames"].astype(str)
        made_of[layer.get_friendly_name()] = [name for name in names.split(",") if name]
    request, seconds = compiled.create_infer_request(), Counter[str]()
    for number, feed in enumerate([*feeds[:WARM], *feeds]):
        request.infer(dict(feed))
        if number < len(feeds[:WARM]):
            continue
        for layer in request.profiling_info:
            names = [layer.node_name, *made_of.get(layer.node_name, [])]
            seconds[part_of(names, layer.node_type, parts)] += layer.real_time.total_seconds()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("network", type=Path, metavar="ONNX")
    parser.add_argument("others", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--images", dest="count", type=int, default=20)
    options = parser.parse_args()
    saved = load_checkpoint(options.checkpoint)
    info = ExportInfo(saved.config, saved.class_names, saved.category_ids, {}, None, None, int8=False)
    feeds = calibration_inputs(options.checkpoint, Calibration(options.images, options.count), info)
    parts = parts_of_nodes(options.network)
    print(f"| ms a picture, {len(feeds)} pictures | {' | '.join(PARTS)} | all |\n|---{'|---' * (len(PARTS) + 1)}|")
    for file in (options.network, *options.others):
        measure = measure_openvino if file.suffix == ".xml" else measure_onnx
        seconds = measure(file, feeds, parts)
        numbers = [1000 * seconds[part] / len(feeds) for part in PARTS]
        row = " | ".join(f"{number:.0f}" for number in (*numbers, sum(numbers)))
        print(f"| {file.parent.name}/{file.name} | {row} |", flush=True)


if __name__ == "__main__":
    main()
