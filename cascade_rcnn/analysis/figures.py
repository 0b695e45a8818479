"""Figures of the report: matplotlib's SVG, put into the page so that it takes the page's colours, light or dark."""

from __future__ import annotations

import html
import importlib.util
import io
import re
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from cascade_rcnn.errors import UserError

# Stand-ins in the drawing, replaced by the page's own variables (report.css).
_INK = "#010203"
_SERIES = tuple(f"#a1b2{number:02x}" for number in range(8))
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")  # lines differ by more than colour

Line = tuple[Sequence[float], Sequence[float | None]]


def require_matplotlib() -> None:
    """Raises ``UserError`` that names the extra where it is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(
            "the package matplotlib draws the report and is missing: pip install 'cascade-rcnn[plots]'"
        ) from error


def has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def lines(
    curves: Mapping[str, Line],
    *,
    x: str,
    y: str,
    alt: str,
    diagonal: bool = False,
    marks: bool = True,
    top: float | None = 1.02,
    legend: bool = True,
) -> str:
    """Curves from 0 to ``top`` (None: to their highest point), as inline SVG; None leaves a gap."""
    with _axes((5.2, 3.4)) as (figure, axes, done):
        if diagonal:
            axes.plot([0, 1], [0, 1], color=_INK, linewidth=0.8, linestyle=":", label="as it should be")
        for number, (name, (xs, ys)) in enumerate(curves.items()):
            values = [float("nan") if value is None else value for value in ys]
            mark = _MARKS[number % 8] if marks else None
            style = ("-", "--", "-.", ":")[number // 8 % 4]
            axes.plot(xs, values, style, color=_SERIES[number % 8], marker=mark, markersize=4, label=_label(name))
        axes.set(xlabel=x, ylabel=y, ylim=(0, top))
        if legend:
            axes.legend(frameon=False, fontsize=8, loc="best")
        done.append(_svg(figure, alt))
    return done[0]


def bars(groups: Mapping[str, Mapping[str, float]], *, y: str, alt: str) -> str:
    """Grouped bars: for each outer name one colour, for each inner name one group."""
    with _axes((5.6, 3.4)) as (figure, axes, done):
        names = list(next(iter(groups.values())))
        width = 0.8 / len(groups)
        for number, (group, values) in enumerate(groups.items()):
            places = [place + (number - (len(groups) - 1) / 2) * width for place in range(len(names))]
            axes.bar(
                places, [values[name] for name in names], width * 0.9, color=_SERIES[number % 8], label=_label(group)
            )
        axes.set_xticks(range(len(names)), names, fontsize=7)
        axes.set(ylabel=y)
        axes.legend(frameon=False, fontsize=8)
        done.append(_svg(figure, alt))
    return done[0]


def intervals(rows: Mapping[str, tuple[float, tuple[float, float] | None]], *, x: str, alt: str) -> str:
    """A point and its interval for each name, one below another."""
    with _axes((5.2, 0.9 + 0.28 * len(rows))) as (figure, axes, done):
        for place, (value, around) in enumerate(reversed(list(rows.values()))):
            low, high = around or (value, value)
            axes.plot([low, high], [place, place], color=_SERIES[0], linewidth=2)
            axes.plot([value], [place], "o", color=_SERIES[0], markersize=5)
        axes.set_yticks(range(len(rows)), list(reversed(list(rows))), fontsize=8)
        axes.set(xlabel=x, ylim=(-0.6, len(rows) - 0.4))
        done.append(_svg(figure, alt))
    return done[0]


def _label(name: str) -> str:
    """A legend leaves out what begins with an underscore."""
    return f" {name}" if name.startswith("_") else name


@contextmanager
def _axes(size: tuple[float, float]) -> Iterator[tuple[Any, Any, list[str]]]:
    """A figure without a window, in the page's ink."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": "cascade-rcnn", "font.size": 9, "text.color": _INK,
        "axes.labelcolor": _INK, "axes.edgecolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
        "text.parse_math": False,
        "axes.spines.top": False, "axes.spines.right": False, "font.family": "sans-serif",
    }  # fmt: skip
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the page's own font has it
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.grid(axis="y", color=_INK, alpha=0.12, linewidth=0.6)
        axes.set_axisbelow(True)
        done: list[str] = []
        yield figure, axes, done


def _svg(figure: Any, alt: str) -> str:
    """The figure as ``<svg>`` with a label, names of its own, and the page's colours."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    own = f"f{zlib.crc32(alt.encode())}"  # several figures share a page
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'id="([^"]+)"', rf'id="{own}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{own}-\1)", text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{own}-\1"', text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]+"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]+"', r"\1", text, count=1)
    text = text.replace("<svg", f'<svg role="img" aria-label="{html.escape(alt, quote=True)}"', 1)
    text = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font: \1 system-ui, sans-serif", text)
    for number, color in enumerate(_SERIES):
        text = text.replace(color, f"var(--c{number})")
    return text.replace(_INK, "currentColor")
