"""Flat metrics of all benchmarks, and how they are printed."""

from __future__ import annotations

from collections.abc import Sequence

Metrics = dict[str, float | None]


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
    """The layout of the tables: (head of the first column, other heads, row -> keys of its cells) for each."""
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
        tables.append(
            (
                "class",
                list(levels),
                {
                    f"{name} {points}": [f"kitti/{name}/{level}/{points}" for level in levels]
                    for points in ("R40", "R11")
                    for name in names
                },
            )
        )
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
