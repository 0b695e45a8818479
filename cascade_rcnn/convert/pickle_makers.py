"""What a pickle may make: our own few functions for the calls it may ask for, and inert stand-ins for all else.

Every argument comes from the file: lengths are compared with the data at hand, numbers must be numbers, and what could
be nested without end is neither hashed nor printed.
"""

from __future__ import annotations

import math
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cascade_rcnn.errors import CheckpointError

# Standard-library data classes that harmlessly occur in checkpoints; they become placeholders.
_INERT_STDLIB = (
    "argparse.Namespace",
    "datetime.",
    "pathlib.",
    "uuid.",
    "decimal.",
    "fractions.",
    "numpy.random.",
    "collections.defaultdict",
    "collections.deque",
    "collections.Counter",
    "torch.Generator",
)
_REFUSED_ROOTS = frozenset(sys.stdlib_module_names) | {
    "torch",
    "numpy",
    "torchvision",
    "cascade_rcnn",
    "__builtin__",
    "__builtins__",
    "copy_reg",
    "commands",
    "exceptions",
    "pip",
    "setuptools",
    "pkg_resources",
    "cloudpickle",
    "dill",
    "joblib",
} - {"__main__"}


@dataclass(frozen=True)
class Name:
    """A global that the file names: text, never the object itself."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Placeholder:
    """Stands for an object of a class that is not known here."""

    kind: Name
    state: list[object] = field(default_factory=list)


@dataclass(eq=False)
class Array:
    """A numpy array in the making: pickle first creates it empty, then gives it its values."""

    values: np.ndarray[Any, Any] | None = None


@dataclass(eq=False)
class Dtype:
    code: str
    order: str = "<"

    def resolve(self) -> np.dtype[Any]:
        if re.fullmatch(r"[<>=|]?(?:[biufcSU]\d{1,4}|\?|b1|[BHIQbhiqefd])", self.code) is None:
            raise CheckpointError(f"holds an array of type {self.code!r}")
        dtype = np.dtype(self.code)
        return dtype.newbyteorder(">") if self.order == ">" else dtype


@dataclass(eq=False)
class Storage:
    values: Tensor  # 1-D


def make(kind: Name, args: tuple[Any, ...]) -> object:
    """The object that a call of ``kind`` stands for: through the table, or a placeholder."""
    maker = _MAKERS.get(str(kind))
    if maker is not None:
        return maker(*args)
    if kind.module.split(".")[0] in _REFUSED_ROOTS and not str(kind).startswith(_INERT_STDLIB):
        raise CheckpointError(
            f"wants to call {str(kind)[:80]}, which weights never need: refused (nothing was run); "
            "if you trust the file, save its state_dict alone where it was made"
        )
    return Placeholder(kind)


def _tensor(storage: object, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    if not isinstance(storage, Storage):
        raise CheckpointError("a tensor without a storage: refused")
    if math.prod(_integers(size)) > storage.values.numel():
        raise CheckpointError(f"a tensor of shape {tuple(size)} over {storage.values.numel()} stored values: refused")
    return torch.as_strided(storage.values, _integers(size), _integers(stride), offset)  # torch checks the bounds


def _integers(values: object) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)) or len(values) > 64 or any(type(value) is not int for value in values):
        raise CheckpointError("a shape that is not made of whole numbers: refused")
    return tuple(values)


def fill_array(array: Array, state: Any) -> None:
    _, shape, dtype, fortran, data = state
    if isinstance(data, list):  # an array of objects: never weights
        return
    array.values = _values(data, dtype, shape, "F" if fortran else "C")


def _values(data: Any, dtype: object, shape: tuple[int, ...], order: str) -> np.ndarray[Any, Any]:
    raw = data.encode("latin1") if isinstance(data, str) else memoryview(data)
    if not isinstance(dtype, Dtype):
        raise CheckpointError("an array without a type: refused")
    kind = dtype.resolve()
    if math.prod(_integers(shape)) * kind.itemsize != len(raw):
        raise CheckpointError(f"an array of shape {tuple(shape)} with {len(raw)} bytes: refused")
    flat = np.frombuffer(raw, dtype=kind)
    return flat.reshape(tuple(shape), order="F" if order == "F" else "C")


def _scalar(dtype: object, data: object = b"") -> object:
    return _values(data, dtype, (), "C").item()


def _bytes(text: str = "", encoding: str = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise CheckpointError("bytes in an unexpected encoding: refused")
    return text.encode("latin1")


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise CheckpointError(f"a {type(value).__name__} where a word belongs: refused")
    return value


def check_keys(keys: Iterable[object]) -> None:
    """Refuse keys whose hash could take for ever: tuples of the same tuples of the same tuples ..."""
    for key in keys:
        if isinstance(key, (tuple, frozenset)) and any(isinstance(part, (tuple, frozenset)) for part in key):
            raise CheckpointError("a nested key: refused")


def _from_type(maker: object, kind: object, args: tuple[Any, ...], state: object = None) -> object:
    if not isinstance(maker, Name) or str(maker) not in _TENSOR_MAKERS:
        raise CheckpointError("a tensor of an unknown kind: refused")
    return _TENSOR_MAKERS[str(maker)](*args)


def _listed(kind: Callable[[Any], object]) -> Callable[..., object]:
    """A container from a list in the pickle; anything else (a number asks for memory) is refused."""

    def make(items: object = ()) -> object:
        if not isinstance(items, (list, tuple, set, frozenset, dict)):
            raise CheckpointError(f"a container made from a {type(items).__name__}: refused")
        if kind in (set, frozenset):
            check_keys(items)
        elif kind in (dict, OrderedDict) and not isinstance(items, dict):
            check_keys(pair[0] for pair in items if isinstance(pair, (list, tuple)) and pair)
        return kind(items)

    return make


_TENSOR_MAKERS: dict[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
}
# Every call that a file may make, and what is done instead of it.
_MAKERS: dict[str, Callable[..., object]] = {
    **_TENSOR_MAKERS,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.nn.parameter.Parameter": lambda data=None, *_: data,
    "torch.device": lambda *_: None,
    "torch.Size": _listed(tuple),
    "collections.OrderedDict": _listed(OrderedDict),
    **{
        f"{module}.{kind.__name__}": _listed(kind)
        for module in ("builtins", "__builtin__")
        for kind in (set, frozenset, list, dict, tuple)
    },
    "builtins.slice": lambda *_: None,
    "builtins.complex": lambda *_: None,
    "_codecs.encode": _bytes,
    "builtins.bytes": _bytes,
    **{f"{module}._reconstructor": lambda kind, *_: make(kind, ()) for module in ("copyreg", "copy_reg")},
    "numpy.dtype": lambda code, *_: Dtype(_text(code)),
    **{
        f"numpy.{core}.{name}": maker
        for core in ("core", "_core")
        for name, maker in (
            ("multiarray._reconstruct", lambda *_: Array()),
            ("multiarray.scalar", _scalar),
            ("numeric._frombuffer", lambda *args: Array(_values(*args))),
        )
    },
}
