"""A checkpoint and all its exports in one run: AP on a data set, time per picture, size (docs/deploy_measured.md).

    python3 benchmarks/exports.py CHECKPOINT DATA [--split val] [--int8 IMAGES] [--bf16] [--out DIR] [--only ap|time]

Exports that DIR holds already are taken as they are. Times: each picture goes through all in turn, from its pixels to
its detections; a ratio is the median of each picture's own pair with our default path.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from cascade_rcnn.atomic_files import write_json
from cascade_rcnn.benchmark.stopwatch import describe_machine
from cascade_rcnn.checkpoint import load_checkpoint
from cascade_rcnn.export import network, report
from cascade_rcnn.export.command import Calibration, calibration_inputs
from cascade_rcnn.export.quantise import quantise
from cascade_rcnn.inference.detector import Detector, load
from cascade_rcnn.models.ops.capabilities import has_bfloat16_units, has_int8_units
from cascade_rcnn.runtime.network import NAMES, ExportInfo

OURS = "our default path"
FORMATS = {"ONNX Runtime": "onnx", "OpenVINO": "openvino", "torch.export": "torch"}
DIGITS = {"bbox/AP": "AP", "bbox/AP50": "AP50", "bbox/AP75": "AP75", "segm/AP": "mask AP"}


def exports(checkpoint: Path, out: Path, *, calibration: Path | None) -> dict[str, Path]:
    """Files of all exports by name, of any input size; those that are not there yet are made, of one trace."""
    files = {name: out / to / NAMES[to] for name, to in FORMATS.items()}
    if calibration is not None:
        files |= {f"{name}, int8": out / f"{to}_int8" / NAMES[to] for name, to in FORMATS.items() if to != "torch"}
    if all(file.is_file() for file in files.values()):
        return files
    saved = load_checkpoint(checkpoint)
    info = ExportInfo(
        saved.config,
        saved.class_names,
        saved.category_ids,
        saved.metadata.get("thresholds", {}),
        None,
        None,
        int8=False,
    )
    program = None
    for name, file in files.items():
        if file.is_file():
            continue
        began = time.perf_counter()
        file.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("int8"):
            assert calibration is not None
            to: Any = FORMATS[name.removesuffix(", int8")]
            quantise(files["ONNX Runtime"], file, calibration_inputs(checkpoint, Calibration(calibration), info), to=to)
            (network.mark_onnx if to == "onnx" else network.mark_openvino)(file, replace(info, int8=True))
        elif name == "OpenVINO":
            network.write_openvino(files["ONNX Runtime"], file, info)
        else:
            program = program or network.trace(
                network.network_of(checkpoint, info.config, to="onnx"), size=None, batch=None
            )
            (network.write_onnx if name == "ONNX Runtime" else network.write_torch)(program, file, info)
        print(f"{name}: written in {time.perf_counter() - began:.0f} s", flush=True)
    return files


def times(detectors: dict[str, Detector], pictures: list[report.Pixels], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds, medians: by the clock, and of all cores, which other programs disturb less; ratios to our path."""
    clock: dict[str, list[float]] = {name: [] for name in detectors}
    cores: dict[str, list[float]] = {name: [] for name in detectors}
    for number in range(rounds + 1):
        for picture in pictures:
            for name, detector in detectors.items():
                began, used = time.perf_counter(), time.process_time()
                detector.predict(picture)
                if number:  # the first round warms up
                    clock[name].append(time.perf_counter() - began)
                    cores[name].append(time.process_time() - used)
    return {
        name: {
            "ms": 1000 * median(clock[name]),
            "ratio": median(one / ours for one, ours in zip(clock[name], clock[OURS])),
            "core_ms": 1000 * median(cores[name]),
            "core_ratio": median(one / ours for one, ours in zip(cores[name], cores[OURS])),
        }
        for name in detectors
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--split", default="val")
    parser.add_argument("--int8", type=Path, metavar="IMAGES")
    parser.add_argument(
        "--bf16", action="store_true", help="our path (slow without units) and OpenVINO in bfloat16 too"
    )
    parser.add_argument("--out", type=Path, default=Path("exports"))
    parser.add_argument("--only", choices=("ap", "time"))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    paths = {OURS: options.checkpoint, **exports(options.checkpoint, options.out, calibration=options.int8)}
    file = options.out / "table.json"
    table: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    rows: dict[str, Any] = table.setdefault("rows", {})
    for name, path in paths.items():
        both = (path, path.with_suffix(".bin"))
        rows.setdefault(name, {})["megabytes"] = sum(one.stat().st_size for one in both if one.exists()) / 1e6
    wanted: dict[str, tuple[Path, Any]] = {name: (path, "auto") for name, path in paths.items()}
    if options.bf16:
        wanted["our path, bfloat16"] = (options.checkpoint, "bf16")
        also = [name for name in paths if name.startswith("OpenVINO")]
        wanted |= {f"{name}, bfloat16": (paths[name], "bf16") for name in also}
    if options.only != "time":
        for name, (path, precision) in wanted.items():
            metrics = report.metrics(path, options.data, options.split, precision=precision)
            rows.setdefault(name, {})["metrics"] = {key: metrics[key] for key in DIGITS if key in metrics}
            print(name, rows[name]["metrics"], flush=True)
            write_json(file, table)
    if options.only != "ap":
        pictures, _ = report.pictures(options.data, options.split)
        detectors = {name: load(path, device="cpu", precision=precision) for name, (path, precision) in wanted.items()}
        for name, numbers in times(detectors, pictures, options.rounds).items():
            rows.setdefault(name, {}).update(numbers)
        for name, detector in detectors.items():
            rows[name]["equality"] = report.compare(detectors[OURS], detector, pictures)
        table["units"] = {"bfloat16": has_bfloat16_units(), "int8": has_int8_units()}
        table["machine"] = describe_machine(torch.device("cpu"))
        write_json(file, table)
    print_rows(table)


def print_rows(table: dict[str, Any]) -> None:
    """The table in Markdown."""
    headings = [*DIGITS.values(), "ms", "ratio", "core ms", "core ratio", "MB", "same"]
    print(f"| | {' | '.join(headings)} |\n|---{'|---' * len(headings)}|")
    for name, row in table["rows"].items():
        points = [f"{100 * row.get('metrics', {}).get(key, float('nan')):.2f}" for key in DIGITS]
        numbers = [
            f"{row.get(key, 0):{form}}"
            for key, form in (("ms", ".0f"), ("ratio", ".2f"), ("core_ms", ".0f"), ("core_ratio", ".2f"))
        ]
        equal = row.get("equality", {})
        same = f"{equal['matched']} of {equal['detections']}" if equal else ""
        print(
            f"| {name} | {' | '.join([*points, *numbers])} | {row.get('megabytes', 0):.1f} | {same} |".replace(
                "nan", ""
            )
        )
    print(table.get("machine", ""), table.get("units", ""))


if __name__ == "__main__":
    main()
