"""A page of its own: HTML with its style inside, no script, nothing fetched; light and dark, narrow and wide, on paper.

Text given to these functions is escaped, except what is called ``markup``.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

Cell = str | int | float | None

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2128; --soft: #59636e; --line: #d5dae0; --shade: #f3f5f7;
  --heat: 31, 111, 180; --c0: #1f6fb4; --c1: #c8501e; --c2: #2b8a3e; --c3: #8e44ad; --c4: #b5179e; --c5: #5f6b1a;
  --c6: #0b7285; --c7: #8d5524; }
@media (prefers-color-scheme: dark) { :root { --paper: #15191e; --ink: #e4e8ec; --soft: #9aa5b1; --line: #39424c;
  --shade: #1e242b; --heat: 88, 166, 235; --c0: #58a6eb; --c1: #ff8d5c; --c2: #5fcf7a; --c3: #cf94ee; --c4: #ff7fe0;
  --c5: #c3d15a; --c6: #4fd1e0; --c7: #d8a06a; } }
* { box-sizing: border-box; }
html { scroll-padding-top: 1rem; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1.25rem; font-size: 1.3rem; }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .5rem; }
p, li { max-width: 46rem; }
a { color: var(--c0); }
nav ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .25rem 1rem; max-width: none; }
.skip { position: absolute; left: -99rem; }
.skip:focus { position: static; }
.soft, figcaption, caption { color: var(--soft); font-size: .88rem; }
.big { display: flex; flex-wrap: wrap; gap: .5rem 2.5rem; margin: 1rem 0; padding: 0; }
.big div { display: flex; flex-direction: column-reverse; }
.big dt { color: var(--soft); font-size: .88rem; }
.big dd { margin: 0; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 1rem; }
.plot svg { width: 100%; max-width: 35rem; height: auto; display: block; }
.scroll { overflow-x: auto; margin: .75rem 0; }
.scroll:focus-visible, pre:focus-visible { outline: 2px solid var(--c0); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
caption { text-align: left; padding: .25rem 0; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { background: var(--shade); }
tbody th { white-space: normal; min-width: 8.5rem; }
.heat td { min-width: 3rem; }
.facts th { text-align: left; }
.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 5rem; }
pre { overflow-x: auto; background: var(--shade); padding: .6rem .8rem; font-size: .88rem; line-height: 1.6; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: .75rem; }
.gallery.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); align-items: start; }
figure { margin: 0; }
.gallery img { width: 100%; height: auto; display: block; background: var(--shade); }
.gallery figcaption { overflow-wrap: anywhere; }
@media print { :root { color-scheme: light; --paper: #fff; --ink: #000; --soft: #444; --line: #bbb; --shade: #f3f5f7; }
  nav, .skip { display: none; } body { max-width: none; font-size: 11pt; } .scroll { overflow: visible; }
  pre { white-space: pre-wrap; }
  figure, table, .plot { break-inside: avoid; } h2, h3 { break-after: avoid; } }
"""


def page(title: str, sections: Sequence[tuple[str, str]], *, lead_markup: str) -> str:
    """The whole file: a title, what comes first, and sections (heading, markup) with links to them."""
    names = [f"s{number}" for number in range(len(sections))]
    links = "".join(f'<li><a href="#{name}">{html.escape(head)}</a></li>' for name, (head, _) in zip(names, sections))
    body = "".join(
        f'<section aria-labelledby="{name}"><h2 id="{name}">{html.escape(head)}</h2>{markup}</section>\n'
        for name, (head, markup) in zip(names, sections)
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<a class="skip" href="#main">Skip to the content</a>\n<header><h1>{html.escape(title)}</h1></header>\n'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n<main id="main">\n{lead_markup}\n{body}</main>\n'
        "</body>\n</html>\n"
    )


def paragraph(text: str, *, soft: bool = False) -> str:
    kind = ' class="soft"' if soft else ""
    return f"<p{kind}>{html.escape(text)}</p>"


def bullets(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def figures(values: Sequence[tuple[str, str]]) -> str:
    """A few large numbers: (what it is, the number)."""
    rows = "".join(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in values)
    return f'<dl class="big">{rows}</dl>'


def plots(*markup: str) -> str:
    """Figures side by side where there is room."""
    return '<div class="pair">' + "".join(f'<div class="plot">{one}</div>' for one in markup) + "</div>"


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A table with a caption; the first cell of each row is its heading."""
    top = "".join(f'<th scope="col">{html.escape(word)}</th>' for word in head)
    body = "".join(
        f'<tr><th scope="row">{_cell(row[0])}</th>' + "".join(f"<td>{_cell(one)}</td>" for one in row[1:]) + "</tr>"
        for row in rows
    )
    return _scrolling(caption, f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody>")


def texts(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts, which may be long; the first cell of each row is its heading. ``head`` may be empty."""
    top = "".join(f'<th scope="col">{html.escape(word)}</th>' for word in head)
    body = "".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>'
        + "".join(f"<td>{html.escape(one)}</td>" for one in row[1:])
        + "</tr>"
        for row in rows
    )
    top = f"<thead><tr>{top}</tr></thead>" if head else ""
    return _scrolling(caption, f"{top}<tbody>{body}</tbody>", kind=' class="facts"')


def commands(label: str, lines: Sequence[str]) -> str:
    """Lines to type."""
    text = html.escape("\n".join(lines))
    return f'<pre tabindex="0" role="region" aria-label="{html.escape(label)}"><code>{text}</code></pre>'


def heat_table(caption: str, head: Sequence[str], names: Sequence[str], values: Sequence[Sequence[int]]) -> str:
    """Counts whose background says their share of the row; the number is always written too."""
    top = "".join(f'<th scope="col">{html.escape(word)}</th>' for word in head)
    body = ""
    for name, row in zip(names, values):
        total = max(sum(row), 1)
        cells = "".join(
            f'<td style="background: rgba(var(--heat), {0.6 * value / total:.2f})">{value:,}</td>' for value in row
        )
        body += f'<tr><th scope="row">{html.escape(name)}</th>{cells}</tr>'
    return _scrolling(caption, f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody>", kind=' class="heat"')


def _scrolling(caption: str, inner: str, *, kind: str = "") -> str:
    words = html.escape(caption)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{words}">'
        f"<table{kind}><caption>{words}</caption>{inner}</table></div>"
    )


def _cell(value: Cell) -> str:
    if value is None:
        return '<span title="undefined">–</span>'
    return f"{value:,}" if isinstance(value, int) else html.escape(value if isinstance(value, str) else f"{value:.3f}")
