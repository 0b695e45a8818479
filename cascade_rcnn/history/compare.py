"""Runs beside each other: what differs in their settings, what came of it, and what makes them hard to compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cascade_rcnn.analysis import figures, page
from cascade_rcnn.history.read_run import RunHistory, flat, setting
from cascade_rcnn.history.summary import AP_NAMES, WITHOUT_PLOTS, curve, duration, percent, state_of
from cascade_rcnn.messages import printable

Row = tuple[str, list[str]]
_IOUS = tuple(f"{0.5 + 0.05 * number:.2f}" for number in range(10))


@dataclass(frozen=True)
class Comparison:
    """A table with a column for each run, and what to know before believing it."""

    names: list[str]
    settings: list[Row]  # those that differ
    results: list[Row]
    notes: list[str]


def compare(runs: Sequence[RunHistory]) -> Comparison:
    return Comparison(names_of(runs), _settings(runs), _results(runs), _notes(runs))


def names_of(runs: Sequence[RunHistory]) -> list[str]:
    """Their folders' names; whole paths where two have the same."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [printable(run.folder) for run in runs]


def _settings(runs: Sequence[RunHistory]) -> list[Row]:
    columns = [{key: setting(value) for key, value in flat(run.config.to_dict())} for run in runs]
    rows = [(key, [column.get(key, "–") for column in columns]) for key in columns[0] if key != "published"]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _results(runs: Sequence[RunHistory]) -> list[Row]:
    best = [run.best() or {} for run in runs]
    rows: list[Row] = [(f"best {name}", [percent(one.get(key)) for one in best]) for key, name in AP_NAMES.items()]
    rows += [(f"box AP at IoU {iou}", [percent(one.get(f"bbox/AP@{iou}")) for one in best]) for iou in _IOUS]
    rows += [(f"mask AP at IoU {iou}", [percent(one.get(f"segm/AP@{iou}")) for one in best]) for iou in _IOUS]
    rows.append(("at step", [f"{one['step']:,}" if one else "–" for one in best]))

    def of_each(value: Callable[[RunHistory], float | None], form: str) -> list[str]:
        found = [value(run) for run in runs]
        return ["–" if one is None else form.format(one) for one in found]

    rows += [
        ("last training loss", of_each(lambda run: run.last("loss"), "{:.4f}")),
        ("last validation loss", of_each(lambda run: run.last("loss", of="evaluations"), "{:.4f}")),
        ("steps", of_each(lambda run: run.step, "{:,}")),
        ("time", ["–" if run.seconds is None else duration(run.seconds) for run in runs]),
        ("images per second", of_each(lambda run: run.median("images_per_second"), "{:.3g}")),
        ("peak memory, GB", of_each(lambda run: run.last("memory_gb"), "{:.1f}")),
        ("device", [str(_last_start(run).get("device", "–")) for run in runs]),
    ]
    twice = {f"box AP at IoU {iou}" for iou in ("0.50", "0.75")}  # they stand above
    return [(name, cells) for name, cells in rows if name not in twice and any(cell != "–" for cell in cells)]


def _last_start(run: RunHistory) -> dict[str, object]:
    starts = run.about.get("starts") or [{}]
    last: dict[str, object] = starts[-1]
    return last


def _notes(runs: Sequence[RunHistory]) -> list[str]:
    """What makes them hard to compare."""
    names = names_of(runs)
    notes = [f"{name}: {_lower(state_of(run))}" for name, run in zip(names, runs) if not run.finished]
    notes += [f"{name}: was never evaluated, so it has no AP" for name, run in zip(names, runs) if not run.evaluations]
    evaluated = [_data(run, "val") for run in runs]
    if len({identity for identity, _ in evaluated}) > 1:
        where = "; ".join(f"{name}: {words}" for name, (_, words) in zip(names, evaluated))
        notes.append(f"AP and validation losses are not comparable, evaluated on different images ({where})")
    trained = [_data(run, "train") for run in runs]
    if len({identity for identity, _ in trained}) > 1:
        where = "; ".join(f"{name}: {words}" for name, (_, words) in zip(names, trained))
        notes.append(f"trained on different images ({where})")
    devices = {str(start["device"]) for run in runs if "device" in (start := _last_start(run))}
    if len(devices) > 1:
        notes.append("times, images per second and memory are not comparable: they come from different devices")
    return notes


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _data(run: RunHistory, part: str) -> tuple[object, str]:
    """What two runs must share to have seen the same images of a split, and words for it."""
    about = run.about.get(part)
    if about:
        words = f"{about['images']:,} images, {about['objects']:,} objects, split {about['split']} of {about['root']}"
        same = about.get("digest") or (about["split"], about["images"], about["objects"], tuple(about["classes"]))
        return same, words
    split = run.config.data.val if part == "val" else run.config.data.train
    return (run.config.data.root, split), f"split {split} of {run.config.data.root or 'no data set'}"


def render(runs: Sequence[RunHistory], one: Comparison) -> str:
    """The page as text."""
    settings = page.paragraph("None: the runs differ in nothing that is a setting.")
    if one.settings:
        settings = page.texts("Settings that differ", ["setting", *one.names], [(k, *v) for k, v in one.settings])
    sections = [
        ("Results", page.texts("AP in per cent, of the best evaluation", ["", *one.names], _wide(one.results))),
        ("Settings that differ", settings),
        ("Curves", _curves(runs, one.names)),
        ("Runs", _runs(runs, one.names)),
    ]
    lead = page.paragraph("Nothing speaks against comparing them.") if not one.notes else page.bullets(one.notes)
    return page.page(f"{len(runs)} runs compared", sections, lead_markup=lead)


def _wide(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    return [(name, *cells) for name, cells in rows]


def _curves(runs: Sequence[RunHistory], names: Sequence[str]) -> str:
    if not figures.has_matplotlib():
        return page.paragraph(f"This page is {WITHOUT_PLOTS}.")
    wanted = [
        ("loss", "steps", "training loss", None),
        ("loss", "evaluations", "validation loss", None),
        ("bbox/AP", "evaluations", "box AP", 1.02),
        ("segm/AP", "evaluations", "mask AP", 1.02),
        ("lr", "steps", "learning rate", None),
        ("images_per_second", "steps", "images per second of training", None),
    ]
    parts = [
        curve({name: run.series(key, of=of) for name, run in zip(names, runs)}, y=words, words=words, top=top)
        for key, of, words, top in wanted
    ]
    for kind, words in (("bbox", "box"), ("segm", "mask")):
        best = {name: run.best() or {} for name, run in zip(names, runs)}
        lines = {
            name: ([float(iou) for iou in _IOUS], [one.get(f"{kind}/AP@{iou}") for iou in _IOUS])
            for name, one in best.items()
            if one.get(f"{kind}/AP@0.50") is not None
        }
        if lines:
            alt = f"{words} AP by IoU of the best evaluation of {', '.join(lines)}; the numbers stand in the table"
            parts.append(
                figures.lines(lines, x="IoU that a detection must reach", y=f"{words} AP, best evaluation", alt=alt)
            )
    return page.plots(*[part for part in parts if part])


def _runs(runs: Sequence[RunHistory], names: Sequence[str]) -> str:
    rows = []
    for name, run in zip(names, runs):
        first = (run.about.get("starts") or [{}])[0]
        rows.append((name, printable(run.folder), state_of(run), str(first.get("command", "–"))))
    return page.texts(
        "Where they are, how far they came, how they were started", ["run", "folder", "state", "command"], rows
    )
