"""Scores results that lie in a benchmark's own submission format; needs neither a model nor images.

    cascade-rcnn score --format coco --truth instances_val2017.json --results results.json --out metrics.json
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cascade_rcnn.errors import DataError

FORMATS = ("coco", "voc", "kitti", "citypersons", "widerface")
Metrics = Mapping[str, float | None]


def run_score(
    *, format: str, truth: Path, results: Path, split: str = "test", iou: float = 0.5, out: Path | None = None
) -> dict[str, float | None]:
    """Scores ``results`` against ``truth`` as the benchmark ``format`` does, prints a table, writes ``metrics.json``.

    ``truth`` and ``results`` are in the benchmark's own layouts (docs/metrics.md). ``split`` and ``iou`` matter for VOC
    only. ``out`` is the JSON file to write, or a folder. Returns flat metrics with values in 0..1, None where the
    official code leaves them undefined (the reasons are printed). Raises ``DataError`` for input that cannot be scored.
    """
    notes: list[str] = []
    metrics = score(format=format, truth=truth, results=results, split=split, iou=iou, notes=notes)
    overlap = f", overlap {iou:g}" if format == "voc" else ""
    print_metrics(metrics, notes=notes, title=f"{results} against {truth}{overlap}")
    if out is not None:
        from cascade_rcnn.evaluation.submission import write_json

        path = write_json(out / "metrics.json" if out.is_dir() else out, metrics)
        print(f"Written to {path} (values in 0..1)")
    return metrics


def score(
    *, format: str, truth: Path, results: Path, split: str = "test", iou: float = 0.5, notes: list[str] | None = None
) -> dict[str, float | None]:
    """``run_score`` without printing or writing; reasons for None are appended to ``notes``."""
    if not 0 < iou <= 1:
        raise DataError(f"iou {iou}: above 0 and at most 1")
    if format in ("coco", "citypersons") and (results / "results.json").is_file():
        results = results / "results.json"  # the folder that --submission wrote
    if format == "coco":
        from cascade_rcnn.evaluation.coco import evaluate_coco_files

        return evaluate_coco_files(truth, results, notes=notes)
    if format == "voc":
        from cascade_rcnn.evaluation.voc import evaluate_voc

        return evaluate_voc(truth, results, split=split, iou=iou, notes=notes)
    if format == "kitti":
        from cascade_rcnn.evaluation.kitti import evaluate_kitti

        return evaluate_kitti(truth, results, notes=notes)
    if format == "citypersons":
        from cascade_rcnn.evaluation.citypersons import evaluate_citypersons

        return evaluate_citypersons(truth, results, notes=notes)
    if format == "widerface":
        from cascade_rcnn.evaluation.widerface import evaluate_widerface

        return evaluate_widerface(truth, results, notes=notes)
    raise DataError(f"format {format!r}: choose one of {', '.join(FORMATS)}")


def print_metrics(metrics: Metrics, *, notes: Sequence[str] = (), title: str = "") -> None:
    """Prints flat metrics of any of the benchmarks as tables in percent, and below them the notes."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if title:
        console.print(f"[bold]{escape(title)}[/bold]  (%)", soft_wrap=True)
    for head, columns, rows in _tables(metrics):
        table = Table(head, *(escape(column) for column in columns), box=None, header_style="bold")
        for number in range(1, len(columns) + 1):
            table.columns[number].justify = "right"
        for name, keys in rows.items():
            table.add_row(escape(name), *(_cell(metrics, key) for key in keys))
        console.print(table)
    for note in notes:
        console.print(f"[yellow]note:[/yellow] {escape(note)}", soft_wrap=True)


def _cell(metrics: Metrics, key: str) -> str:
    if key not in metrics:
        return ""
    value = metrics[key]
    return "n/a" if value is None else f"{100 * value:.2f}"


_Table = tuple[str, list[str], dict[str, list[str]]]


def _tables(metrics: Metrics) -> list[_Table]:
    """The keys laid out: (head of the first column, other heads, row -> keys of its cells) for each table."""
    kinds = list(dict.fromkeys(key.split("/", 1)[0] for key in metrics))
    tables: list[_Table] = []
    coco = [kind for kind in kinds if kind in ("bbox", "segm")]
    if coco:
        tables += _coco_tables(metrics, coco)
    if "voc" in kinds:
        names = [key.removeprefix("voc/AP/") for key in metrics if key.startswith("voc/AP/")]
        rows = {name: [f"voc/AP07/{name}", f"voc/AP/{name}"] for name in names}
        tables.append(("class", ["AP 11-point", "AP area"], rows | {"mean": ["voc/mAP07", "voc/mAP"]}))
    if "kitti" in kinds:
        names = list(dict.fromkeys(key.split("/")[1] for key in metrics if key.startswith("kitti/")))
        levels = ("easy", "moderate", "hard")
        tables.append(("class", list(levels), {
            f"{name} {points}": [f"kitti/{name}/{level}/{points}" for level in levels]
            for points in ("R40", "R11") for name in names
        }))
    for kind, head in (("citypersons", "miss rate (lower is better)"), ("widerface", "AP")):
        if kind in kinds:
            tables.append((head, [kind], {key.split("/")[-1]: [key] for key in metrics if key.startswith(f"{kind}/")}))
    return tables


def _coco_tables(metrics: Metrics, kinds: list[str]) -> list[_Table]:
    """AP, AR and AP by IoU with a row for boxes and one for masks; then the classes that have objects."""
    names = list(dict.fromkeys(key.split("/", 1)[1] for key in metrics if key.split("/", 1)[0] in kinds))
    plain = [name for name in names if "/" not in name and "@" not in name]
    tables: list[_Table] = []
    for head, chosen in (
        ("", [name for name in plain if name.startswith("AP")]),
        ("", [name for name in plain if name.startswith("AR")]),
        ("IoU", [name for name in names if name.startswith("AP@")]),
    ):
        columns = [name.removeprefix("AP@") for name in chosen]
        tables.append((head, columns, {kind: [f"{kind}/{name}" for name in chosen] for kind in kinds}))
    classes = {}
    for name in names:
        keys = [f"{kind}/{name}" for kind in kinds]
        if name.startswith("AP/") and any(metrics.get(key) is not None for key in keys):  # a note names the others
            classes[name.removeprefix("AP/")] = keys
    return [*tables, ("class", [f"{kind} AP" for kind in kinds], classes)] if classes else tables
