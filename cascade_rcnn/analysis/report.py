"""``report.html`` from the numbers of ``report.json`` and the pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cascade_rcnn.analysis import figures, page
from cascade_rcnn.analysis.measure import Report
from cascade_rcnn.analysis.pictures import Example

_DRAWN = 8  # classes in a figure; tables have all
_WORDS = {
    "classification": "right place, wrong class",
    "localisation": "right class, box too far off (IoU 0.1 to 0.5)",
    "both": "wrong class and box too far off",
    "duplicate": "an object that a better-scored detection has found",
    "background": "nothing is there",
    "missed": "an object that no detection comes near",
}


def render(report: Report, galleries: Mapping[str, Sequence[Example]], *, title: str) -> str:
    """The page as text."""
    sections = [
        ("AP by IoU", _ap_by_iou(report)),
        ("Each class", _classes(report)),
        ("Which threshold", _thresholds(report)),
        ("Which class is taken for which", confusion_section(report)),
        ("Why AP is lost", _errors(report)),
        ("Sizes, shapes, crowds, borders", _slices(report)),
        ("Can the scores be believed?", _calibration(report)),
    ]
    if "compare" in report:
        sections.insert(1, ("Compared with the second", _compare(report["compare"])))
    if any(galleries.values()):
        sections.append(("Pictures", _pictures(galleries)))
    sections.append(("How this was made", _made(report)))
    return page.page(title, sections, lead_markup=_lead(report))


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _range(around: Sequence[float] | None) -> str:
    return "–" if around is None else f"{100 * around[0]:.1f} to {100 * around[1]:.1f}"


def _final(report: Report) -> Report:
    one: Report = report["outputs"][report["final"]]
    return one


def _lead(report: Report) -> str:
    final = _final(report)
    numbers = [
        ("box AP", _percent(final["AP"])),
        ("95 % interval of AP", _range(report["interval"])),
        ("AP at IoU 0.5", _percent(final["AP_by_iou"][0])),
        ("AP at IoU 0.75", _percent(final["AP_by_iou"][5])),
        ("images", f"{report['images']:,}"),
        ("objects", f"{report['objects']:,}"),
    ]
    lost = final["tide"]["lost"]
    worst = max(lost, key=lost.get)
    text = (
        f"Most AP is lost to {worst} errors ({_WORDS[worst]}): {lost[worst]:.1f} points of AP at IoU 0.5 "
        "would be gained without them. AP, precision and recall are in per cent."
    )
    return page.figures(numbers) + page.paragraph(text)


def _ap_by_iou(report: Report) -> str:
    ious, outputs = report["iou_thresholds"], report["outputs"]
    ends = f"from {_percent(_final(report)['AP_by_iou'][0])} at IoU 0.5 to {_percent(_final(report)['AP_by_iou'][-1])}"
    plot = figures.lines(
        {name: (ious, one["AP_by_iou"]) for name, one in outputs.items()},
        x="IoU that a detection must reach",
        y="AP",
        alt=f"AP against IoU for {', '.join(outputs)}; {report['final']} falls {ends} at 0.95. Numbers: the table.",
    )
    rows = [[name, _percent(one["AP"]), *map(_percent, one["AP_by_iou"])] for name, one in outputs.items()]
    words = "Each stage by its own scores on the boxes it has moved; the last row is what the detector says."
    several = page.paragraph(words) if len(outputs) > 1 else ""
    return several + page.plots(plot) + page.table("AP by IoU, in per cent", ["", "AP", *map(str, ious)], rows)


def _drawn(report: Report) -> dict[str, Report]:
    """The classes with the most objects."""
    known = {name: one for name, one in report["classes"].items() if one["objects"]}
    return dict(sorted(known.items(), key=lambda item: -item[1]["objects"])[:_DRAWN])


def _classes(report: Report) -> str:
    classes = report["classes"]
    rows = [
        [name, one["objects"], one["detections"], _percent(one["AP"]), _range(one["interval"]), _percent(one["AP50"])]
        for name, one in classes.items()
    ]
    words = (
        "The intervals say how far AP would vary with other images of the same kind: they come from drawing these "
        "images with replacement. Few objects, wide interval."
    )
    shown = {name: (100 * one["AP"], _scaled(one["interval"])) for name, one in _drawn(report).items()}
    plot = figures.intervals(shown, x="AP, %", alt="AP of each class with its interval; the table has the numbers.")
    head = ["class", "objects", "detections", "AP", "95 % interval", "AP at 0.5"]
    return page.paragraph(words) + page.plots(plot) + page.table("AP of each class", head, rows)


def _scaled(around: Sequence[float] | None) -> tuple[float, float] | None:
    return None if around is None else (100 * around[0], 100 * around[1])


def _thresholds(report: Report) -> str:
    wanted = report["wanted"]
    kinds = (("best_f1", "best F1"), ("at_precision", f"precision {100 * wanted['precision']:g} %"),
             ("at_recall", f"recall {100 * wanted['recall']:g} %"))  # fmt: skip
    tables = [threshold_table(report, key, name) for key, name in kinds]
    return curve_plots(report) + "".join(tables)


def curve_plots(report: Report) -> str:
    """F1 over the score threshold, and precision over recall, of the classes with the most objects."""
    drawn = _drawn(report)
    f1 = figures.lines(
        {name: (one["curve"]["thresholds"], one["curve"]["f1"]) for name, one in drawn.items()},
        x="score threshold", y="F1", marks=False,
        alt=f"F1 over the score threshold for {', '.join(drawn)}; the table has the best of each.",
    )  # fmt: skip
    pr = figures.lines(
        {name: (one["curve"]["recall"], one["curve"]["precision"]) for name, one in drawn.items()},
        x="recall", y="precision", marks=False,
        alt=f"Precision over recall for {', '.join(drawn)}.",
    )  # fmt: skip
    words = "At IoU 0.5: what each class gives when detections below a score are dropped."
    more = ""
    if len(report["classes"]) > len(drawn):
        more = page.paragraph(f"The figures show the {len(drawn)} classes with the most objects.", soft=True)
    return page.paragraph(words) + page.plots(f1, pr) + more


def threshold_table(report: Report, key: str, name: str) -> str:
    """The threshold of each class that ``key`` ("best_f1", "at_precision", "at_recall") asks for."""
    rows = [[label, *_operating(one, key)] for label, one in report["classes"].items()]
    return page.table(f"Threshold for {name}", ["class", "score from", "precision", "recall", "F1"], rows)


def _operating(one: Report, key: str) -> list[page.Cell]:
    """Threshold, precision, recall and F1 of a class."""
    at = one[key]
    if at is None:
        return ["never reached" if one["objects"] else "no objects", None, None, None]
    return [f"{at['threshold']:.3f}", *(_percent(at[name]) for name in ("precision", "recall", "f1"))]


def confusion_section(report: Report, *, file: str = "report.json") -> str:
    """Which class is taken for which; ``file`` has the numbers that are too many for a page."""
    one = report["confusion"]
    words = (
        "At each class's threshold of best F1 and IoU 0.5. Rows: what is there. Columns: what was said. "
        "The last row are detections of nothing, the last column missed objects."
    )
    labels = one["labels"]
    if len(labels) > 41:
        return page.paragraph(words + f" {len(labels) - 1} classes are too many for a table here: see {file}.")
    return page.paragraph(words) + page.heat_table(
        "Confusion matrix, counts; the deeper the colour, the larger the share of its row",
        ["truth \\ said", *labels],
        labels,
        one["matrix"],
    )


def _errors(report: Report) -> str:
    outputs = report["outputs"]
    lost = {name: one["tide"]["lost"] for name, one in outputs.items()}
    plot = figures.bars(
        lost,
        y="points of AP at IoU 0.5",
        alt="AP lost to each kind of error; the table has the numbers.",
    )
    kinds = list(_WORDS)
    rows = [
        [
            kind,
            *(f"{one['tide']['lost'][kind]:.2f}" for one in outputs.values()),
            _final(report)["tide"]["counts"][kind],
        ]
        for kind in kinds
    ]
    for key, name in (("false_positives", "all false positives"), ("false_negatives", "all missed objects")):
        rows.append([name, *(f"{one['tide'][key]:.2f}" for one in outputs.values()), None])
    words = [f"{kind}: {meaning}" for kind, meaning in _WORDS.items()]
    text = (
        "The kinds of TIDE (arXiv 2008.08115): how many points AP at IoU 0.5 would rise if errors of that kind were "
        "repaired. The kinds do not add up to all that is lost."
    )
    said = ""
    if len(outputs) > 1:
        first, final = next(iter(lost.values()))["localisation"], lost[report["final"]]["localisation"]
        verb = "fewer" if final < first else "not fewer"
        text_of = f"The cascade leaves {verb} localisation errors: {first:.2f} points after the first stage"
        said = page.paragraph(f"{text_of}, {final:.2f} in the end.")
    head = ["error", *outputs, "errors in the end"]
    return page.paragraph(text) + page.bullets(words) + said + page.plots(plot) + page.table("AP lost", head, rows)


def _slices(report: Report) -> str:
    rows: list[list[page.Cell]] = []
    for kind, parts in report["slices"].items():
        for name, one in parts.items():
            values = [_percent(one[key]) for key in ("AP", "AP50", "AP75")]
            rows.append([f"{kind}: {name}", one["objects"], *values])
    words = "AP of a part of the objects; the others, and detections that would belong to them, count neither way."
    return page.paragraph(words) + page.table("AP of parts", ["part", "objects", "AP", "AP at 0.5", "AP at 0.75"], rows)


def _calibration(report: Report) -> str:
    outputs = report["outputs"]
    plot = figures.lines(
        {name: (one["calibration"]["mean_scores"], one["calibration"]["precision"]) for name, one in outputs.items()},
        x="score", y="precision of detections with that score", diagonal=True,
        alt="Reliability: precision against score. Below the dotted line the detector is too sure of itself.",
    )  # fmt: skip
    rows: list[list[page.Cell]] = [[name, *_corrected(one["calibration"])] for name, one in outputs.items()]
    final = _final(report)["calibration"]["classes"]
    classes: list[list[page.Cell]] = [[name, *_corrected(one)] for name, one in final.items()]
    head = ["", "D-ECE", "other half, as it is", "isotonic", "temperature", "fitted temperature"]
    words = (
        "D-ECE is the mean distance between score and precision (IoU 0.5), in per cent: 0 is a score that can be read "
        "as a probability. The corrections are fitted on every other image and measured on the rest; none where a half "
        "has too few detections. AP does not change by them, or hardly."
    )
    return (
        page.paragraph(words)
        + page.plots(plot)
        + page.table("D-ECE of each stage", head, rows)
        + page.table(f"D-ECE of each class, {report['final']}", head, classes)
    )


def _corrected(one: Report) -> list[page.Cell]:
    fitted: dict[str, Any] | None = one["correction"]
    if fitted is None:
        return [_percent(one["D-ECE"]), "–", "–", "–", "–"]
    errors = [_percent(fitted[key]) for key in ("before", "isotonic", "temperature")]
    return [_percent(one["D-ECE"]), *errors, f"{fitted['fitted_temperature']:.2f}"]


def _compare(one: Report) -> str:
    rows: list[list[page.Cell]] = []
    for name, row in {"mean of the classes": one["all"], **one["classes"]}.items():
        first, second = zip(map(_percent, row["AP"]), map(_range, row["intervals"]))
        rows.append([name, *first, *second, f"{100 * row['difference']:+.1f}", _range(row["interval"])])
    words = (
        f"First: {one['first']}. Second: {one['second']}. Both see the same drawn images, so the interval of the "
        "difference is narrower than the two would suggest; where it holds 0, these images do not tell them apart."
    )
    head = ["class", "first", "95 % interval", "second", "95 % interval", "second less first", "95 % interval"]
    return page.paragraph(words) + page.table("AP of two detectors", head, rows)


def _pictures(galleries: Mapping[str, Sequence[Example]]) -> str:
    text = page.paragraph("Left the truth (green), right what was said (red); errors of the highest score come first.")
    for name, examples in galleries.items():
        if examples:
            head = name if name not in _WORDS else f"{name}: {_WORDS[name]}"
            text += f"<h3>{head}</h3>" + '<div class="gallery">' + "".join(one.figure for one in examples) + "</div>"
    return text


def _made(report: Report) -> str:
    return page.bullets([f"{key}: {value}" for key, value in report["source"].items()] + report["notes"])
