"""``summary.html`` of a run folder: how the training went, what the detector does, how to go on.

Everything comes from the folder's files, so the page can be written at any time, of a run under way too.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from cascade_rcnn.analysis import figures, page
from cascade_rcnn.analysis.pictures import example
from cascade_rcnn.analysis.report import confusion_section, curve_plots, threshold_table
from cascade_rcnn.atomic_files import clear_failure, replace_file
from cascade_rcnn.history.read_run import CURVES, RunHistory, changed_settings, read_run
from cascade_rcnn.messages import printable

SUMMARY = "summary.html"
_PICTURE_SIDE = 640  # pixels, of the longer side
_SHOWN_EVALUATIONS = 15
AP_NAMES = {
    "bbox/AP": "box AP",
    "bbox/AP50": "box AP at IoU 0.5",
    "bbox/AP75": "box AP at IoU 0.75",
    "segm/AP": "mask AP",
}
WITHOUT_PLOTS = "without curves, which matplotlib draws: pip install 'cascade-rcnn[plots]'"


def write_summary(folder: Path) -> Path:
    """Write the page of the run ``folder``, whole or not at all, and return its path.

    Without matplotlib the page has no curves and says so. Raises UserError: what cannot be read or written.
    """
    target = folder / SUMMARY
    text = render(read_run(folder))
    with clear_failure(target):
        replace_file(target, lambda temporary: _write_text(temporary, text))
    return target


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def render(run: RunHistory) -> str:
    """The page as text."""
    sections = [("How to go on", _next(run))]
    if run.steps or run.evaluations:
        sections.append(("How it went", _curves(run)))
    if run.evaluations:
        sections.append(("Evaluations", _evaluations(run)))
    if run.curves:
        sections.append(("Which threshold", _thresholds(run.curves)))
        sections.append(("Which class is taken for which", confusion_section(run.curves, file=CURVES)))
    if pictures := _pictures(run.folder):
        sections.append(("Pictures", pictures))
    sections.append(("Settings", _settings(run)))
    if run.about:
        sections.append(("Where it ran", _surroundings(run)))
    return page.page(f"Training {run.name}", sections, lead_markup=_lead(run))


def _lead(run: RunHistory) -> str:
    best = run.best() or {}
    numbers = [(name, percent(best.get(key))) for key, name in AP_NAMES.items() if best.get(key) is not None]
    numbers += [
        (name, f"{value:.3f}")
        for name, value in (
            ("last training loss", run.last("loss")),
            ("last validation loss", run.last("loss", of="evaluations")),
        )
        if value is not None
    ]
    if run.seconds is not None:
        numbers.append(("time", duration(run.seconds)))
    speed, memory = run.median("images_per_second"), run.last("memory_gb")
    if speed is not None:
        numbers.append(("images per second", f"{speed:.3g}"))
    if memory is not None:
        numbers.append(("peak memory", f"{memory:.1f} GB"))
    found = ""
    if best:
        count = len(run.evaluations)
        of = "the only evaluation" if count == 1 else f"the best of {count} evaluations"
        found = f" The metrics are those of step {best['step']:,}, {of}; AP is in per cent."
    return page.figures(numbers) + page.paragraph(f"{state_of(run)}.{found}")


def state_of(run: RunHistory) -> str:
    """``Finished after 156 steps`` and so on."""
    total = run.about.get("total_steps")
    of_all = f" of {total:,}" if total else ""
    state = str(run.about.get("state", ""))
    if run.finished:
        return f"Finished after {run.step:,}{of_all if total and run.step < total else ''} steps"
    if state.startswith("stopped"):
        return f"{state[0].upper()}{state[1:]} after {run.step:,}{of_all} steps"
    return f"Not finished: step {run.step:,}{of_all}"


def _next(run: RunHistory) -> str:
    """Commands for what people do next."""
    folder, data = shlex.quote(str(run.folder)), shlex.quote(run.config.data.root or "DATA")
    lines = [
        f"cascade-rcnn predict {folder} IMAGE --out found",
        f"cascade-rcnn analyze {folder} --data {data} --out report",
        f"cascade-rcnn export {folder} --to onnx --data {data}",
        f"cascade-rcnn compare {folder} OTHER_RUN",
    ]
    if not run.finished:
        lines.insert(0, f"cascade-rcnn train {folder} --resume")
    return page.commands("commands", lines)


def _curves(run: RunHistory) -> str:
    if not figures.has_matplotlib():
        return page.paragraph(f"This page is {WITHOUT_PLOTS}; the numbers are in log.jsonl and metrics.jsonl.")
    parts = [_losses(run), _precisions(run)]
    parts += [_by_part(run, of) for of in ("steps", "evaluations")]
    for key, name in (
        ("lr", "learning rate"),
        ("grad_norm", "norm of the gradient, unlimited"),
        ("images_per_second", "images per second of training"),
        ("memory_gb", "peak memory so far, GB"),
    ):
        parts.append(curve({name: run.series(key)}, y=name, words=name))
    return page.plots(*[part for part in parts if part])


def curve(lines: Mapping[str, Any], *, y: str, words: str, top: float | None = None) -> str:
    """A figure of lines over the epochs; empty where none has two points, which a number says as well."""
    known = {name: line for name, line in lines.items() if any(value is not None for value in line[1])}
    most = max((len(xs) for xs, _ in known.values()), default=0)
    if most < 2:
        return ""
    alt = f"{words} over the epochs" + (f": {', '.join(known)}" if len(known) > 1 else "")
    return figures.lines(known, x="epoch", y=y, alt=alt, marks=most <= 30, top=top, legend=len(known) > 1)


def _losses(run: RunHistory) -> str:
    lines = {"training": run.series("loss"), "validation": run.series("loss", of="evaluations")}
    return curve(lines, y="loss", words="losses")


def _precisions(run: RunHistory) -> str:
    lines = {name: run.series(key, of="evaluations") for key, name in AP_NAMES.items()}
    return curve(lines, y="AP", words="AP", top=1.02)


def _by_part(run: RunHistory, of: str) -> str:
    """The losses of the proposals and of each stage."""
    records = run.steps if of == "steps" else run.evaluations
    names = dict.fromkeys(key for one in records for key in one if _part_of(key))
    lines: dict[str, tuple[list[float], list[float | None]]] = {}
    for part in dict.fromkeys(_part_of(name) for name in names):
        series = [run.series(name, of=of) for name in names if _part_of(name) == part]
        sums = [None if None in column else sum(column) for column in zip(*(ys for _, ys in series))]  # type: ignore[arg-type]
        lines[part] = (series[0][0], sums)
    kind = "training" if of == "steps" else "validation"
    return curve(lines, y=f"{kind} loss", words=f"{kind} loss of each part")


def _part_of(name: str) -> str:
    """``stage 1`` of ``s0.cls``; empty for what is no part of the loss."""
    if name.startswith("rpn_"):
        return "proposals"
    stage, _, part = name.partition(".")
    return f"stage {int(stage[1:]) + 1}" if part and stage[:1] == "s" and stage[1:].isdecimal() else ""


def _evaluations(run: RunHistory) -> str:
    shown = run.evaluations[-_SHOWN_EVALUATIONS:]
    keys = [key for key in AP_NAMES if any(key in one for one in shown)]
    has_loss = any("loss" in one for one in shown)
    head = ["step", "epoch", *(AP_NAMES[key] for key in keys), *(["validation loss"] if has_loss else [])]
    rows: list[list[page.Cell]] = []
    for one in shown:
        loss = one.get("loss")
        last = ["–" if loss is None else f"{loss:.4f}"] if has_loss else []
        rows.append([f"{one['step']:,}", one.get("epoch"), *(percent(one.get(key)) for key in keys), *last])
    more = ""
    if len(shown) < len(run.evaluations):
        more = page.paragraph(f"The last {len(shown)} of {len(run.evaluations)}; all are in metrics.jsonl.", soft=True)
    return page.table("AP in per cent, and the loss of the validation split", head, rows) + more


def _thresholds(curves: dict[str, Any]) -> str:
    words = page.paragraph(f"The best evaluation, that of step {curves['step']:,}, on {curves['images']:,} images.")
    plots = curve_plots(curves) if figures.has_matplotlib() else ""
    return words + plots + threshold_table(curves, "best_f1", "best F1")


def _pictures(folder: Path) -> str:
    kinds = (
        ("validation_*.jpg", "Validation: what is annotated, beside what the latest evaluation found", 4),
        ("train_batch*.jpg", "Training: the first images as the network got them", 4),
    )
    text = ""
    for pattern, words, most in kinds:
        paths = sorted((folder / "images").glob(pattern))[:most]
        shown = [figure for path in paths if (figure := _picture(path))]
        if shown:
            text += f"<h3>{words}</h3>" + '<div class="gallery wide">' + "".join(shown) + "</div>"
    return text


def _picture(path: Path) -> str:
    try:
        with Image.open(path) as image:
            image.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
            return example(image.convert("RGB"), printable(path.name)).figure
    except OSError:  # a picture that was being written, or is gone
        return ""


def _settings(run: RunHistory) -> str:
    rows = [(key, value, default) for key, (value, default) in changed_settings(run.config).items()]
    return page.texts("What differs from the defaults; config.json has all", ["setting", "this run", "default"], rows)


def _surroundings(run: RunHistory) -> str:
    starts = run.about.get("starts") or [{}]
    rows: list[tuple[str, str]] = []
    for kind in ("train", "val"):
        if about := run.about.get(kind):
            where = f"split {about['split']} of {about['root']}"
            rows.append((f"{kind} images", f"{about['images']:,} with {about['objects']:,} objects; {where}"))
    for number, start in enumerate(starts):
        name = "started" if not number else f"resumed at step {start.get('step', 0):,}"
        rows.append((name, f"{start.get('time', '')}: {start.get('command', '')}"))
    last = starts[-1]
    rows += [(key, str(last[key])) for key in ("device", "processes", "system", "git") if last.get(key)]
    rows += list(last.get("versions", {}).items())
    return page.texts("Of several starts, device and versions are those of the last", [], rows)


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
