"""Where the time goes: ``cascade-rcnn benchmark`` measures our model, torchvision's and the machine in one run.

Every round measures the machine's matrix product, our model and the peer one after the other, so that all meet the same
temperature and neighbours; times are medians over the rounds, ratios medians of each round's own ratio.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import torch

from cascade_rcnn.atomic_files import write_json
from cascade_rcnn.benchmark import parts, stopwatch
from cascade_rcnn.benchmark.contenders import (
    BACKWARD,
    Contender,
    Setting,
    our_contenders,
    peer_contender,
    runtime_contenders,
    watched,
)
from cascade_rcnn.benchmark.memory import measure_memory
from cascade_rcnn.benchmark.table import print_report
from cascade_rcnn.distributed import choose_device
from cascade_rcnn.errors import UserError
from cascade_rcnn.models.ops.capabilities import has_bfloat16_units, has_int8_units
from cascade_rcnn.recipes import load_config

Also = Literal["compiled", "runtimes"]


def run_benchmark(
    *,
    config: str = "cascade_rcnn_r50_fpn_1x_coco",
    size: tuple[int, int] = (800, 1088),
    batch: int = 1,
    device: str = "auto",
    train: bool = False,
    also: Collection[Also] = (),
    rounds: int = 0,
    data: Path | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure ``config`` on synthetic images of ``size`` (height, width); print a table, return (and write) numbers.

    ``also``: our network compiled too, or in ONNX Runtime and OpenVINO, those that are installed, in float, bfloat16
    and int8. ``rounds`` 0 takes 5 on a CPU and 20 on a GPU. ``data`` also measures how fast that data set can be read.
    Both models' weights are made from a rule (:func:`cascade_rcnn.benchmark.stopwatch.seed_weights`).

    Raises :class:`UserError` for a size or device that cannot be used.
    """
    if min(size) < 64:
        raise UserError(f"--size {size[0]} {size[1]}: at least 64 pixels a side")
    setting = Setting(load_config(config), (size[0], size[1]), batch, choose_device(device), train)
    rounds = rounds or (20 if setting.device.type == "cuda" else 5)
    runtimes, compiled = "runtimes" in also, "compiled" in also
    if runtimes and (train or setting.device.type != "cpu"):
        raise UserError("--runtimes: ONNX Runtime and OpenVINO are measured in predicting, on a CPU: add --device cpu")
    contenders = our_contenders(setting, compile=compiled)
    with tempfile.TemporaryDirectory() as folder:
        if runtimes:
            print("exporting the network and making it integer, which takes some minutes ...")
            contenders += runtime_contenders(setting, Path(folder))
        contenders.append(peer_contender(setting))
        limits = _measure(setting, contenders, rounds)
    ours, peer = contenders[0], contenders[-1]
    memory = measure_memory(setting, config, repeats=rounds) if setting.device.type == "cpu" else {}
    for name, numbers in memory.items():
        (ours if name == "ours" else peer).peak_memory = round(statistics.median(numbers["peak"]))
    report = _report(setting, contenders, limits, rounds, config) | {"memory": memory}
    if not train:
        report["roi_align"] = parts.measure_roi_align(setting, rounds=rounds, compiled=compiled)
        report["file"] = parts.measure_file(setting)
    if data is not None:
        report["loading"] = parts.measure_reading(setting, data)
    print_report(report)
    if out is not None:
        write_json(out, report)
    return report


# Measuring


def _measure(setting: Setting, contenders: list[Contender], rounds: int) -> dict[str, float]:
    device = setting.device
    small = setting.size[0] * setting.size[1] < 200_000
    for contender in contenders:
        start = time.perf_counter()
        contender.run()
        stopwatch.synchronize(device)
        contender.warm_up = time.perf_counter() - start
        if device.type == "cuda":
            contender.run()
            stopwatch.reset_peak_memory(device)
            contender.run()
            contender.peak_memory = stopwatch.peak_memory(device)
    units = {torch.bfloat16: has_bfloat16_units(), torch.int8: has_int8_units()} if device.type == "cpu" else {}
    limits: dict[torch.dtype, list[float]] = {
        dtype: [] for dtype in (setting.dtype, *(dtype for dtype, there in units.items() if there))
    }
    for _ in range(rounds):
        for dtype, rates in limits.items():
            rates.append(stopwatch.matmul_rate(device, dtype, small=small))
        for contender in contenders:
            watch, model = contender.stopwatch, contender.model
            with watched(model, watch) if model and watch else contextlib.nullcontext():
                start, cores = time.perf_counter(), time.process_time()
                contender.run()
                stopwatch.synchronize(device)
                contender.seconds.append(time.perf_counter() - start)
                contender.core_seconds.append(time.process_time() - cores)
            for name, seconds in (watch.parts() if watch else {}).items():
                contender.parts.setdefault(name, []).append(seconds)
    rate = statistics.median(limits.pop(setting.dtype))
    found = {"macs_per_second": rate, "bytes_per_second": stopwatch.copy_rate(device)}
    for dtype, rates in limits.items():
        found[f"{dtype}_macs_per_second".removeprefix("torch.")] = statistics.median(rates)
    return found


# The report


def _report(
    setting: Setting, contenders: list[Contender], limits: dict[str, float], rounds: int, config: str
) -> dict[str, Any]:
    peer = contenders[-1]
    rate = limits["macs_per_second"]
    macs = sum(contenders[0].macs.values())
    models = []
    for contender in contenders:
        seconds = statistics.median(contender.seconds)
        entry: dict[str, Any] = {
            "name": contender.name,
            "seconds": seconds,
            "fastest": min(contender.seconds),
            "images_per_second": contender.images / seconds,
            "warm_up_seconds": contender.warm_up,
            "ratio_to_peer": statistics.median(a / b for a, b in zip(contender.seconds, peer.seconds)),
            "core_seconds": statistics.median(contender.core_seconds),
            "core_ratio_to_peer": statistics.median(a / b for a, b in zip(contender.core_seconds, peer.core_seconds)),
            "peak_memory_bytes": contender.peak_memory,
        }
        if contender is not peer:
            units = contender.dtype and f"{contender.dtype}_macs_per_second".removeprefix("torch.")
            entry["macs"] = macs
            if (own := limits.get(units) if units else rate) is not None:  # no share where a product has no units
                entry |= {"share_of_limit": macs / own / seconds, "limit": own}
        if contender.parts:
            parts = {name: statistics.median(values) for name, values in contender.parts.items()}
            parts[BACKWARD if setting.train else "the rest"] = seconds - sum(parts.values())
            entry["parts"] = [
                {"name": name, "seconds": value, "macs": contender.macs.get(name, 0.0)} for name, value in parts.items()
            ]
        models.append(entry)
    chosen = (
        f"{setting.dtype}".removeprefix("torch.")
        + ", channels-last"
        + ("" if setting.train else ", batch norms folded")
    )
    return {
        "config": config,
        "size": list(setting.size),
        "batch": setting.batch,
        "train": setting.train,
        "rounds": rounds,
        "chosen": chosen,
        "machine": stopwatch.describe_machine(setting.device),
        "limits": limits,
        "models": models,
    }
