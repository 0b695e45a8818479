"""Division that rounds up, of numbers and of integer tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

_Whole = TypeVar("_Whole", int, "Tensor")


def ceil_div(value: _Whole, divisor: int) -> _Whole:
    """``value / divisor``, rounded up."""
    return (value + divisor - 1) // divisor


def round_up(value: _Whole, multiple: int) -> _Whole:
    """The smallest multiple of ``multiple`` that is not below ``value``."""
    return ceil_div(value, multiple) * multiple
