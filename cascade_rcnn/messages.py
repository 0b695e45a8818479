"""Parts of messages: names and values from outside, made safe and short to print."""

from __future__ import annotations

import re
from collections.abc import Iterable


def shown(value: object) -> str:
    """A value from a file for a one-line message: quoted, printable, short."""
    text = ascii(value) if not isinstance(value, str) or not value.isprintable() else f"'{value}'"
    return text if len(text) <= 120 else text[:100] + "..."


def printable(path: object) -> str:
    """A path or text for a one-line message: control characters and bytes that are not UTF-8 become escapes."""
    text = str(path)
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(error: BaseException) -> str:
    """An exception's message on one line; for an operating system error, only its reason."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = re.sub(r"\x1b\[[\d;]*m", "", text)  # colours, which torch's exporter writes
    return " ".join(text.split()) or type(error).__name__


def few_names(names: Iterable[object], *, most: int = 8) -> str:
    """``cat, dog, cow and 5 more``: the first ``most`` names, in the order given, for a one-line message."""
    words = [printable(name) for name in names]
    more = [f"and {len(words) - most} more"] if len(words) > most else []
    return " ".join([", ".join(words[:most]), *more])
