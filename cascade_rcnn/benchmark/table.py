"""The benchmark's numbers as a table."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table


def print_report(report: dict[str, Any]) -> None:
    """Print what :func:`cascade_rcnn.benchmark.run.run_benchmark` returns."""
    console = Console(width=None if sys.stdout.isatty() else 110, soft_wrap=True)
    rate = report["limits"]["macs_per_second"]
    console.print(_table(report, rate))
    _print_machine(console, report, rate)
    for model in report["models"]:
        if "compiled" in model["name"]:
            console.print(f"compiling took {model['warm_up_seconds']:.0f} s at the first call, less when cached")
    if memory := report.get("memory"):
        _print_memory(console, memory, report)
    _print_masks(console, report["models"][0], rate)
    if roi_align := report.get("roi_align"):
        peer = roi_align["torchvision"]
        times = (f"{name} {seconds * 1e3:.0f} ms ({seconds / peer:.2f})" for name, seconds in roi_align.items())
        console.print(f"RoIAlign of 1,000 boxes on four levels: {', '.join(times)}")
    if file := report.get("file"):
        console.print(
            f"a JPEG file: decode {file['decode_seconds'] * 1e3:.1f} ms, resize {file['resize_seconds'] * 1e3:.1f} ms"
        )
    if loading := report.get("loading"):
        _print_loading(console, loading, report)


def _table(report: dict[str, Any], rate: float) -> Table:
    """A row for each part of a model and one for the whole; ``rate`` is the machine's own in multiply-adds a second."""
    what = "a training step" if report["train"] else "prediction"
    title = f"{report['config']}: {what}, {report['batch']} x {report['size'][0]} x {report['size'][1]}"
    table = Table(title=f"{title}, median of {report['rounds']} rounds", title_justify="left")
    for heading in ("", "ms", "G multiply-adds", "of the limit", "images/s", "peak MB", "ratio to peer"):
        table.add_column(heading, justify="right" if heading else "left")
    for model in report["models"]:
        for part in model.get("parts", []):
            table.add_row("  " + part["name"], *_time_cells(part["seconds"], part["macs"], rate))
        memory = model["peak_memory_bytes"]
        table.add_row(
            model["name"],
            *_time_cells(model["seconds"], model.get("macs", 0.0), model.get("limit")),
            f"{model['images_per_second']:.2f}",
            f"{memory / 1e6:.0f}" if memory else "",
            f"{model['ratio_to_peer']:.2f}",
            end_section=True,
            style="bold",
        )
    return table


def _time_cells(seconds: float, macs: float, rate: float | None) -> tuple[str, str, str]:
    """Milliseconds, multiply-adds, and the share of the machine's limit that they reach, if it has one."""
    share = f"{macs / rate / seconds:.0%}" if rate and macs > 1e6 and seconds > 0 else ""
    return f"{seconds * 1e3:.1f}", f"{macs / 1e9:.1f}" if macs else "", share


def _print_machine(console: Console, report: dict[str, Any], rate: float) -> None:
    machine, models = report["machine"], report["models"]
    console.print(
        f"{machine['name']}, {machine['threads']} threads, torch {machine['torch']}; ours: {report['chosen']}"
    )
    console.print(
        f"limit: matrix product {rate / 1e9:.0f} G multiply-adds/s, "
        f"memory copy {report['limits']['bytes_per_second'] / 1e9:.1f} GB/s"
    )
    if machine["device"] == "cpu":
        units = {
            name: report["limits"].get(f"{name}_macs_per_second")  # G multiply-adds/s
            for name in ("bfloat16", "int8")
        }
        rates = (f"{name} {one / 1e9:.0f} G" if one else f"no {name} units" for name, one in units.items())
        console.print(f"other products of this processor: {', '.join(rates)}")
        times = (
            f"{model['name']} {model['core_seconds']:.2f} s ({model['core_ratio_to_peer']:.2f})" for model in models
        )
        console.print(f"time of all cores, which other programs disturb less: {'; '.join(times)}")


def _print_memory(console: Console, memory: dict[str, dict[str, list[int]]], report: dict[str, Any]) -> None:
    of_what = "two steps" if report["train"] else "loading weights and predicting twice"
    for name, numbers in memory.items():
        peaks = ", ".join(f"{peak / 1e6:.0f}" for peak in numbers["peak"])
        before = sorted(numbers["before"])[len(numbers["before"]) // 2]
        console.print(f"peak MB of fresh processes, {of_what}, {name}: {peaks}; {before / 1e6:.0f} before the model")


def _print_masks(console: Console, ours: dict[str, Any], rate: float) -> None:
    """What masks add to the boxes, against what their multiply-adds would take at the limit."""
    parts = [part for part in ours.get("parts", []) if part["name"].startswith("masks")]
    if parts:
        seconds, macs = (sum(part[key] for part in parts) for key in ("seconds", "macs"))
        console.print(
            f"masks: {seconds * 1e3:.0f} ms for {macs / 1e9:.1f} G multiply-adds, "
            f"which take {macs / rate * 1e3:.0f} ms at the limit"
        )


def _print_loading(console: Console, loading: dict[str, float], report: dict[str, Any]) -> None:
    best = loading.get("with_workers", loading["images_per_second"])
    line = (
        f"reading: {loading['images_per_second']:.0f} images/s in one process (the decoder alone: "
        f"{1 / loading['decode_seconds']:.0f})"
    )
    if "with_workers" in loading:
        line += f", {loading['with_workers']:.0f} with {loading['workers']:.0f} workers"
    model = report["models"][0]["images_per_second"]
    limit = "reading the data" if best < model else "the network"
    console.print(f"{line}; the network takes {model:.1f}: {limit} is the limit")
