"""Words of messages: names and values from outside, made safe and short to print."""

from __future__ import annotations

import pytest

from cascade_rcnn.messages import few_names, one_line


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], ""),
        (["cat"], "cat"),
        (["cow", "ant", "bee"], "cow, ant, bee"),
        (["cow", "ant", "bee", "dog"], "cow, ant, bee and 1 more"),
        (range(10), "0, 1, 2 and 7 more"),
        (["a\nb", "\x1b[31m"], "a\\nb, \\x1b[31m"),
    ],
)
def test_a_list_of_names_is_cut_after_a_few(names: list[object], expected: str) -> None:
    assert few_names(names, most=3) == expected


def test_an_exception_is_one_line_without_colours() -> None:
    assert one_line(RuntimeError("This is \x1b[96mstep 3/3\x1b[0m\nof exporting")) == "This is step 3/3 of exporting"
    assert one_line(KeyError()) == "KeyError"
