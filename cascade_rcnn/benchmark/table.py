"""The benchmark's numbers as a table."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table


def print_report(report: dict[str, Any]) -> None:
    """Print what :func:`cascade_rcnn.benchmark.run.run_benchmark` returns."""
    console = Console(width=None if sys.stdout.isatty() else 110, soft_wrap=True)
    machine, limits = report["machine"], report["limits"]
    what = "a training step" if report["train"] else "prediction"
    title = f"{report['config']}: {what}, {report['batch']} x {report['size'][0]} x {report['size'][1]}"
    table = Table(title=f"{title}, median of {report['rounds']} rounds", title_justify="left")
    for heading in ("", "ms", "G multiply-adds", "of the limit", "images/s", "peak MB", "ratio to peer"):
        table.add_column(heading, justify="left" if not heading else "right")
    rate = limits["macs_per_second"]

    def share(macs: float, seconds: float) -> str:
        return f"{macs / rate / seconds:.0%}" if macs > 1e6 and seconds > 0 else ""

    for model in report["models"]:
        for part in model.get("parts", []):
            macs = part["macs"]
            table.add_row(
                "  " + part["name"],
                f"{part['seconds'] * 1e3:.1f}",
                f"{macs / 1e9:.1f}" if macs else "",
                share(macs, part["seconds"]),
            )
        macs, memory = model.get("macs", 0.0), model["peak_memory_bytes"]
        table.add_row(
            model["name"],
            f"{model['seconds'] * 1e3:.1f}",
            f"{macs / 1e9:.1f}" if macs else "",
            share(macs, model["seconds"]),
            f"{model['images_per_second']:.2f}",
            f"{memory / 1e6:.0f}" if memory else "",
            f"{model['ratio_to_peer']:.2f}",
            end_section=True,
            style="bold",
        )
    console.print(table)
    console.print(
        f"{machine['name']}, {machine['threads']} threads, torch {machine['torch']}; ours: {report['chosen']}"
    )
    console.print(
        f"limit: matrix product {rate / 1e9:.0f} G multiply-adds/s, "
        f"memory copy {limits['bytes_per_second'] / 1e9:.1f} GB/s"
    )
    if machine["device"] == "cpu":
        times = (
            f"{model['name']} {model['core_seconds']:.2f} s ({model['core_ratio_to_peer']:.2f})"
            for model in report["models"]
        )
        console.print(f"time of all cores, which other programs disturb less: {'; '.join(times)}")
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


def _print_memory(console: Any, memory: dict[str, dict[str, list[int]]], report: dict[str, Any]) -> None:
    of_what = "two steps" if report["train"] else "loading weights and predicting twice"
    for name, numbers in memory.items():
        peaks = ", ".join(f"{peak / 1e6:.0f}" for peak in numbers["peak"])
        before = sorted(numbers["before"])[len(numbers["before"]) // 2]
        console.print(f"peak MB of fresh processes, {of_what}, {name}: {peaks}; {before / 1e6:.0f} before the model")


def _print_masks(console: Any, ours: dict[str, Any], rate: float) -> None:
    """What masks add to the boxes, against what their multiply-adds would take at the limit."""
    parts = [part for part in ours.get("parts", []) if part["name"].startswith("masks")]
    if parts:
        seconds, macs = (sum(part[key] for part in parts) for key in ("seconds", "macs"))
        console.print(
            f"masks: {seconds * 1e3:.0f} ms for {macs / 1e9:.1f} G multiply-adds, "
            f"which take {macs / rate * 1e3:.0f} ms at the limit"
        )


def _print_loading(console: Any, loading: dict[str, float], report: dict[str, Any]) -> None:
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
