"""The JSON reports in a folder as Markdown tables: python3 benchmarks/table.py FOLDER [COMMAND]."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any


def table(folder: Path, command: str) -> str:
    """Date, device and command, then one row for each model of each report in ``folder``."""
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    today = datetime.date.today().isoformat()
    if not reports:
        return f"{today}: nothing was measured; the .txt files in {folder} say why.\n"
    machine = reports[0]["machine"]
    lines = [
        f"{today}, {machine['name']}, torch {machine['torch']}, ours: {reports[0]['chosen']}.",
        "",
        f"    {command}",
        "",
        "| what | model | ms | images/s | share of the limit | peak memory | ratio to the peer | first call |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        height, width = report["size"]
        what = f"{'training step' if report['train'] else 'prediction'}, {report['batch']} x {height} x {width}"
        lines += [_row(what if model is report["models"][0] else "", model) for model in report["models"]]
    return "\n".join(lines) + "\n"


def _row(what: str, model: dict[str, Any]) -> str:
    memory, share = model["peak_memory_bytes"], model.get("share_of_limit")
    cells = [
        what,
        model["name"],
        f"{model['seconds'] * 1e3:,.1f}",
        f"{model['images_per_second']:,.1f}",
        f"{share:.0%}" if share else "",
        f"{memory / 1e6:,.0f} MB" if memory else "",
        f"{model['ratio_to_peer']:.2f}",
        f"{model['warm_up_seconds']:,.1f} s",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(table(Path(sys.argv[1]), " ".join(sys.argv[2:]) or "bash benchmarks/gpu.sh"), end="")
