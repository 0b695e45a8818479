"""What every table script shares: its numbers with intervals, its json, its pictures, its command line."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
IOUS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
COLORS = ("#4053d3", "#ddb310", "#b51d14", "#00beff", "#fb49b0", "#00b25d", "#7a7a7a")
Floats = NDArray[np.float64]


class Results:
    """The scores of the jobs that are done, by row and way; seeds are averaged."""

    def __init__(self, work: Path, seeds: Sequence[int]) -> None:
        self.work, self.seeds = work, list(seeds)
        self._scores: dict[str, dict[str, Floats]] = {}
        self._larger: dict[tuple[str, str], dict[str, Any]] = {}

    def has(self, row: str, way: str = "final") -> bool:
        return bool(self._of(row, way))

    def seeds_of(self, row: str, way: str = "final") -> list[int]:
        return [seed for seed in self.seeds if f"{way}/ap" in self._load(f"{row}-s{seed}")]

    def ap_by_iou(self, row: str, way: str = "final") -> Floats:
        """[T], mean over the seeds."""
        return np.asarray(np.mean([scores[f"{way}/ap"] for scores in self._of(row, way)], axis=0))

    def shared_seeds(self, entries: Sequence[tuple[str, str]]) -> list[int]:
        """The seeds that all (row, way) have."""
        return [seed for seed in self.seeds if all(seed in self.seeds_of(*entry) for entry in entries)]

    def value(
        self, row: str, way: str = "final", iou: float | None = None, *, seeds: Sequence[int] = ()
    ) -> dict[str, Any]:
        """AP (at one IoU) in per cent: its mean over the seeds, 95 % interval over images, and each seed's."""
        scores = [self._load(f"{row}-s{seed}") for seed in seeds or self.seeds_of(row, way)]
        each = [_at(one[f"{way}/ap"], iou) for one in scores]
        drawn = _at(np.mean([one[f"{way}/samples"] for one in scores], axis=0), iou)
        return _with_interval(float(np.mean(each)), drawn) | {"seeds": [round(100 * float(one), 2) for one in each]}

    def difference(
        self, ours: tuple[str, str], base: tuple[str, str], iou: float | None = None
    ) -> dict[str, Any] | None:
        """AP of one (row, way) minus that of another, over the seeds that both have; paired by image and seed."""
        shared = [seed for seed in self.seeds_of(*ours) if seed in self.seeds_of(*base)]
        if not shared:
            return None
        each, drawn = [], []
        for seed in shared:
            a, b = (self._load(f"{row}-s{seed}") for row, _ in (ours, base))
            each.append(float(_at(a[f"{ours[1]}/ap"], iou) - _at(b[f"{base[1]}/ap"], iou)))
            drawn.append(_at(a[f"{ours[1]}/samples"], iou) - _at(b[f"{base[1]}/samples"], iou))
        result = _with_interval(float(np.mean(each)), np.mean(drawn, axis=0))
        return result | {"seeds": [round(100 * one, 2) for one in each]}

    def beside(self, path: Path) -> Results:
        """The same, which also knows the rows of the larger run's table in ``path``, if that is there."""
        both = copy.copy(self)
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
        both._larger = {(one["row"], one["way"]): one for one in rows if "way" in one}
        return both

    def of_larger_run(self, row: str, way: str) -> str:
        """AP (and gain over the same base) of the larger run; empty where that has no such row."""
        there = self._larger.get((row, way))
        if there is None:
            return ""
        gain = f" ({there['gain']['value']:+.1f})" if there["gain"] else ""
        return f"{there['AP']['value']:.1f}{gain}"

    def facts(self, row: str) -> list[dict[str, Any]]:
        """The json of each seed's job."""
        paths = [self.work / "raw" / f"{row}-s{seed}.json" for seed in self.seeds]
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]

    def cost(self, names: Sequence[str]) -> dict[str, Any]:
        """Where and how long some jobs took, of those that are done."""
        paths = [self.work / "raw" / f"{name}.json" for name in names]
        facts = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
        return {
            "jobs": len(facts),
            "minutes": round(sum(f["train_seconds"] + f["look_seconds"] for f in facts) / 60, 1),
            "device": sorted({fact["device"] for fact in facts}),
            "steps": sorted({fact["steps"] for fact in facts}),
            "evaluated_images": sorted({fact["evaluated_images"] for fact in facts}),
        }

    def _of(self, row: str, way: str) -> list[dict[str, Floats]]:
        return [self._load(f"{row}-s{seed}") for seed in self.seeds_of(row, way)]

    def _load(self, name: str) -> dict[str, Floats]:
        if name not in self._scores:
            path = self.work / "scores" / f"{name}.npz"
            self._scores[name] = {}
            if path.is_file():
                with np.load(path) as arrays:
                    self._scores[name] = {key: arrays[key] for key in arrays.files}
        return self._scores[name]


def _at(values: Floats, iou: float | None) -> Any:
    """Of AP [..., T]: the mean, or one threshold's."""
    return values.mean(axis=-1) if iou is None else values[..., IOUS.index(iou)]


def _with_interval(value: float, drawn: Any) -> dict[str, Any]:
    low, high = np.percentile(drawn, (2.5, 97.5)).tolist()
    return {"value": round(100 * value, 2), "low": round(100 * low, 2), "high": round(100 * high, 2)}


def shown(number: dict[str, Any] | None, *, sign: bool = False) -> str:
    """``38.9 [37.2, 40.1]``."""
    if number is None:
        return "–"
    form = "+.1f" if sign else ".1f"
    return f"{number['value']:{form}} [{number['low']:{form}}, {number['high']:{form}}]"


def with_range(value: float, each: Sequence[float], form: str) -> str:
    """``0.126 (0.125 to 0.127)``: the range over the seeds, if there are several."""
    return f"{value:{form}}" + (f" ({min(each):{form}} to {max(each):{form}})" if len(each) > 1 else "")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ap_table(
    results: Results, entries: Sequence[tuple[str, str, str, str]], *, base: int = 0, ious: Sequence[float] = ()
) -> tuple[str, list[dict[str, Any]]]:
    """A table of AP, of AP at ``ious``, and of the difference to the entry ``base``.

    ``entries``: (label, row, way, what the paper has). Those that are not there are left out. The values are means over
    the seeds that all of them have; the column of seeds has every seed's AP.
    """
    there = [entry for entry in entries if results.has(entry[1], entry[2])]
    larger = [results.of_larger_run(row, way) for _, row, way, _ in there]
    beside = ["larger run", "paper"] if any(larger) else ["paper"]
    head = ["", "AP", f"gain over {entries[base][0]}", *beside, *(f"AP{round(100 * iou)}" for iou in ious), "seeds"]
    shared = results.shared_seeds([(row, way) for _, row, way, _ in there])
    lines, numbers = [], []
    for (label, row, way, paper), again in zip(there, larger):
        values = {"AP": results.value(row, way, seeds=shared)}
        values |= {f"AP{round(100 * iou)}": results.value(row, way, iou, seeds=shared) for iou in ious}
        first = (row, way) == entries[base][1:3]
        gain = None if first else results.difference((row, way), entries[base][1:3])
        every = results.value(row, way)["seeds"]
        seeds = " ".join(f"{one:.1f}" for one in every)
        ap, *at_ious = map(shown, values.values())
        lines.append([label, ap, shown(gain, sign=True), *([again] if any(larger) else []), paper, *at_ious, seeds])
        numbers.append(
            {"label": label, "row": row, "way": way, "paper": paper, **values, "gain": gain, "every_seed": every}
        )
    return markdown(head, lines), numbers


def axes(columns: int = 1, *, height: float = 3.2, width: float = 4.2) -> tuple[Any, Any]:
    """A figure and its axes, in the style of all pictures."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise SystemExit("the pictures need matplotlib: pip install 'cascade-rcnn[plots]'") from None
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    mpl.rcParams.update(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#e4e6ea",
            "axes.axisbelow": True,
            "legend.frameon": False,
        }
    )
    return plt.subplots(1, columns, figsize=(width * columns, height), layout="constrained", squeeze=False)


def legend_below(figure: Any, axis: Any) -> None:
    """What ``axis`` shows, under the figure, where it covers nothing."""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)


def save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_curves(axis: Any, results: Results, entries: Sequence[tuple[str, str, str]], title: str = "AP") -> None:
    """AP by IoU: (label, row, way). Intervals are in the tables: those of one row hide what rows differ by."""
    for color, (label, row, way) in zip(COLORS, entries):
        if results.has(row, way):
            axis.plot(
                IOUS, 100 * results.ap_by_iou(row, way), color=color, label=label, marker="o", markersize=3, linewidth=1
            )
    axis.set(title=title, xlabel="IoU from which a detection counts", ylabel="AP (%)")
    axis.legend()


def draw_gains(axis: Any, results: Results, entries: Sequence[tuple[str, str, str]], title: str = "") -> None:
    """AP by IoU minus that of the first entry, with the paired 95 % interval."""
    axis.axhline(0, color=COLORS[0], linewidth=1)
    for color, (label, row, way) in zip(COLORS[1:], entries[1:]):
        gains = [results.difference((row, way), entries[0][1:], iou) for iou in IOUS]
        if all(gains):
            axis.plot(IOUS, [g["value"] for g in gains if g], color=color, label=label, marker="o", markersize=3)
            axis.fill_between(
                IOUS, [g["low"] for g in gains if g], [g["high"] for g in gains if g], color=color, alpha=0.12
            )
    axis.set(title=title or f"gain over {entries[0][0]}", xlabel="IoU from which a detection counts", ylabel="points")
    axis.legend()


def draw_both(results: Results, entries: Sequence[tuple[str, str, str]], path: Path) -> None:
    """AP by IoU, and beside it what the others gain over the first."""
    figure, ((left, right),) = axes(2)
    draw_curves(left, results, entries)
    draw_gains(right, results, entries)
    save(figure, path)


Table = Callable[[Results, Path], dict[str, Any]]


def write(name: str, table: Table, jobs: Sequence[str], results: Results, out: Path, pictures: Path) -> str:
    """Make one table: its json into ``out``, its pictures into ``pictures``; returns its text.

    ``jobs``: all that it needs. The larger run's table is looked for in ``out``/larger.
    """
    found = table(results.beside(out / "larger" / f"{name}.json"), pictures)
    content = {"table": name, "cost": results.cost(jobs), **found}
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return f"## {name}\n\n{found['markdown']}\n"


def write_costs(tables: Sequence[str], jobs: Sequence[str], results: Results, out: Path) -> str:
    """What the trainings of each table in ``out`` took, and all ``jobs``; its json, and its text."""
    there = {name: json.loads((out / f"{name}.json").read_text(encoding="utf-8"))["cost"] for name in tables}
    lines = [[f"`{name}.py`", str(cost["jobs"]), f"{cost['minutes']:.0f}"] for name, cost in there.items()]
    everything = results.cost(jobs)
    lines.append(["`run.py`, each once", str(everything["jobs"]), f"{everything['minutes']:.0f}"])
    text = markdown(["script", "trainings", "minutes of one process"], lines)
    (out / "costs.json").write_text(
        json.dumps({"cost": everything, "markdown": text}, indent=1) + "\n", encoding="utf-8"
    )
    return f"## costs\n\n{text}\n"


def _steps(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word}: a whole number of at least 1")
    return int(word)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that run.py and the table scripts share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", default=[], metavar="NAME=FOLDER", help="nuclei=... bccd=...")
    parser.add_argument("--work", type=Path, default=Path("runs/paper"), help="trainings and detections")
    parser.add_argument("--weights", type=Path, default=Path(), help="folder of lite0.safetensors, lite2.safetensors")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="all rows in miniature, on generated shapes")
    size.add_argument("--larger", action="store_true", help="whole pictures, steps of 16, a wider pyramid: for a GPU")
    size.add_argument("--steps", type=_steps, help="instead of those of config.yaml")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=1, help="trainings at once")
    parser.add_argument("--loaders", type=int, default=0, help="reading processes for each training")
    parser.add_argument("--scorers", type=int, default=1, help="scoring processes beside several trainings at once")
    parser.add_argument(
        "--results",
        type=Path,
        help="default: benchmarks/paper/results, with --larger and --steps in a folder there, with --quick in WORK",
    )
    parser.add_argument("--pictures", type=Path, help="default: docs/images/paper; else in WORK")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: those of config.yaml")
    return parser
