"""What every page that we write must be: one file, without scripts, that says in words what it shows."""

from __future__ import annotations

import html.parser
import re
from pathlib import Path


class Page(html.parser.HTMLParser):
    """What a page asks for, and what it lacks."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.ids: list[str] = []
        self.headings: list[int] = []
        self.without_words = 0
        self.tables = self.captions = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.outside += [v for k, v in attrs if k in ("src", "href") and v and not v.startswith(("#", "data:"))]
        self.ids += [values["id"] or ""] if "id" in values else []
        self.without_words += tag == "img" and not values.get("alt")
        self.without_words += tag == "svg" and not values.get("aria-label")
        self.tables += tag == "table"
        self.captions += tag == "caption"
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))


def check_page(path: Path, *, tables: int = 6) -> str:
    """The page's text, when it stands alone and speaks to a screen reader, and has so many tables."""
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.outside == [] and "<script" not in text and "@import" not in text
    assert len(page.ids) == len(set(page.ids))
    assert page.without_words == 0
    assert page.tables == page.captions >= tables
    assert page.headings[0] == 1 and all(b - a <= 1 for a, b in zip(page.headings, page.headings[1:]))
    return text
