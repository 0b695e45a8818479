"""Reads weights out of other libraries' pickled checkpoints without running anything that the file asks for.

A pickle is a program for a small stack machine. Its dangerous instructions name a function and call it. Here a name
becomes an inert ``Name``; a call is looked up in ``_MAKERS``, a table of our own few functions that rebuild tensors,
arrays and containers; a class of a training library becomes a ``Placeholder`` that remembers its name and nothing else;
a name of Python itself, torch or numpy that is not in the table is an error. No name is ever imported, nothing that
comes from the file is ever called, and every size is checked against the file's own before memory is asked for.

``torch.load(weights_only=True)`` is not used: it stops at mmengine's history buffers and detectron2's arrays, and it
trusts the storage sizes that the pickle states.
"""

from __future__ import annotations

import math
import pickle
import re
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from cascade_rcnn.errors import CheckpointError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of torch.save's format before 1.6
_MAX_PROGRAM = 256 << 20  # bytes of pickle in a zip, the tensors' data not counted
_MAX_ENTRIES = 200_000

_STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
# Standard-library data classes that harmlessly occur in checkpoints; they become placeholders.
_INERT_STDLIB = ("argparse.Namespace", "datetime.", "pathlib.", "uuid.", "decimal.", "fractions.", "numpy.random.",
                 "collections.defaultdict", "collections.deque", "collections.Counter", "torch.Generator")
_REFUSED_ROOTS = frozenset(sys.stdlib_module_names) | {
    "torch", "numpy", "torchvision", "cascade_rcnn", "__builtin__", "__builtins__", "copy_reg", "commands",
    "exceptions", "pip", "setuptools", "pkg_resources", "cloudpickle", "dill", "joblib",
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
class _Dtype:
    code: str
    order: str = "<"

    def resolve(self) -> np.dtype[Any]:
        if re.fullmatch(r"[<>=|]?(?:[biufcSU]\d{1,4}|\?|b1|[BHIQbhiqefd])", self.code) is None:
            raise CheckpointError(f"holds an array of type {self.code!r}")
        dtype = np.dtype(self.code)
        return dtype.newbyteorder(">") if self.order == ">" else dtype


@dataclass(eq=False)
class _Storage:
    values: Tensor  # 1-D


def as_tensor(value: object) -> Tensor | None:
    """A tensor from what a checkpoint holds under a key, or None for anything that is not an array of numbers."""
    if isinstance(value, Tensor):
        return value.detach().contiguous()
    if isinstance(value, Array) and value.values is not None and value.values.dtype.kind in "fiub":
        native = value.values.astype(value.values.dtype.newbyteorder("="))  # also a writable copy
        return torch.from_numpy(np.ascontiguousarray(native)).reshape(native.shape)
    return None


def read_pickled(path: Path) -> object:
    """What a ``.pth`` (zip or older form) or ``.pkl`` file holds: containers, tensors, ``Array``, ``Placeholder``.

    Raises CheckpointError, in one line with the file's name, for whatever cannot be read or is not weights.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(4)
            file.seek(0)
            if start == b"PK\x03\x04":
                return _read_zip(file, size)
            if start[:1] == b"\x80" or start[:1] in (b"(", b"}", b"]", b"c"):
                return _read_stream(file, size)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}: give an existing checkpoint file") from None
    except Exception as error:  # a damaged program may fail in any way; whichever, the file cannot be used
        reason = " ".join(f"{type(error).__name__} {error}".split())[:120]
        raise CheckpointError(f"{path}: damaged or not a checkpoint ({reason}): fetch the file again") from error
    raise CheckpointError(f"{path}: neither a torch checkpoint nor a pickle (starts with {start!r}): if a web page was "
                          "saved instead of the file, fetch it again")


def _read_zip(file: IO[bytes], size: int) -> object:
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) > _MAX_ENTRIES or sum(entry.file_size for entry in entries.values()) > size:
            raise CheckpointError("its entries claim more bytes than the file has: refused")
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries.values()):
            raise CheckpointError("a compressed or encrypted zip, which torch never writes: unpack it first")
        programs = [name for name in entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(programs) != 1:
            raise CheckpointError("a zip without a torch checkpoint in it (no data.pkl): unpack it first")
        root = programs[0].removesuffix("data.pkl")
        if any(name.startswith(root + "code/") for name in entries):
            raise CheckpointError("a TorchScript program, not a checkpoint: give the .pth that it was made from")
        if entries[programs[0]].file_size > _MAX_PROGRAM:
            raise CheckpointError("its pickle is larger than 256 MiB: refused")
        if root + "byteorder" in entries and archive.read(root + "byteorder") != b"little":
            raise CheckpointError("written on a big-endian machine: save it again on another")
        storages: dict[str, _Storage] = {}

        def load(dtype: torch.dtype, key: str, numel: int) -> _Storage:
            if key not in storages:
                data = archive.read(f"{root}data/{key}")
                if len(data) != numel * dtype.itemsize:
                    raise CheckpointError(f"storage {key} has {len(data)} bytes, its tensors claim {numel} x {dtype}")
                flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0).byte()
                storages[key] = _Storage(flat.view(dtype))
            return storages[key]

        with archive.open(programs[0]) as program:
            return _Machine(_Checked(program, entries[programs[0]].file_size), load).load()


def _read_stream(file: IO[bytes], size: int) -> object:
    """A plain pickle, or torch's older form: magic, version, system, objects, storage keys, then each storage."""
    storages: dict[str, _Storage] = {}
    claimed = 0

    def reserve(dtype: torch.dtype, key: str, numel: int) -> _Storage:
        nonlocal claimed
        if key not in storages:
            claimed += numel * dtype.itemsize
            if claimed > size:
                raise CheckpointError("its storages claim more bytes than the file has: refused")
            storages[key] = _Storage(torch.zeros(numel, dtype=dtype))
        return storages[key]

    source = _Checked(file, size)
    first = _Machine(source, None).load()
    if first != _LEGACY_MAGIC:
        return first
    for _ in range(2):  # version; sizes of C types, little endian on every machine in use
        _Machine(source, None).load()
    content = _Machine(source, reserve).load()
    keys = _Machine(source, None).load()
    if not isinstance(keys, list) or {str(key) for key in keys} != set(storages):
        raise CheckpointError("its storages do not belong to its tensors: fetch the file again")
    for key in keys:
        values = storages[str(key)].values
        if int.from_bytes(source.read(8), "little") != values.numel():
            raise CheckpointError(f"storage {key} is not as long as its tensors claim: fetch the file again")
        if values.numel():
            data = bytearray(source.read(values.numel() * values.element_size()))
            values.view(torch.uint8).copy_(torch.frombuffer(data, dtype=torch.uint8))
    return content


class _Checked:
    """A file that refuses to read past its end, so that a false length costs no memory."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._left = size

    def read(self, count: int = -1) -> bytes:
        if not 0 <= count <= self._left:
            raise EOFError("truncated")
        self._left -= count
        return self._file.read(count)

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[:] = data
        return len(data)

    def readline(self) -> bytes:
        line = self._file.readline(self._left)
        self._left -= len(line)
        return line


_LoadStorage = Callable[[torch.dtype, str, int], _Storage]


class _Machine(pickle._Unpickler):  # the one written in Python: its instructions can be replaced
    """The stack machine, with every instruction that calls something replaced."""

    stack: list[Any]
    append: Callable[[object], None]
    pop_mark: Callable[[], list[Any]]
    readline: Callable[[], bytes]

    def __init__(self, file: _Checked, storage: _LoadStorage | None) -> None:
        super().__init__(file, encoding="latin1")  # pickles of Python 2 hold their arrays' bytes in strings
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        return Name(str(module), str(name))

    def get_extension(self, code: int) -> None:
        raise CheckpointError(f"uses the pickle extension {code}: refused")

    def persistent_load(self, pid: Any) -> _Storage:
        if self._storage is None or not isinstance(pid, tuple) or not 5 <= len(pid) <= 6 or pid[0] != "storage":
            raise CheckpointError("refers to data outside of the file: refused")
        kind, key, numel = pid[1], pid[2], pid[4]
        if not (isinstance(kind, Name) and kind.module in ("torch", "torch.storage", "torch.cuda")):
            raise CheckpointError(f"a storage of kind {str(kind)[:60]}: refused")
        dtype = _STORAGES.get(kind.name)
        if dtype is None or not isinstance(numel, int) or numel < 0 or (len(pid) == 6 and pid[5] is not None):
            raise CheckpointError(f"a storage of kind {kind} is not read here")
        return self._storage(dtype, str(key), numel)

    def _call(self, target: object, args: object) -> object:
        if not isinstance(target, Name) or not isinstance(args, tuple):
            raise CheckpointError(f"calls something that is not a class ({type(target).__name__}): refused")
        return _make(target, args)

    def _op_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], args)

    def _op_newobj_ex(self) -> None:
        self.stack.pop()  # keyword arguments only ever belong to classes that become placeholders
        self._op_reduce()

    def _op_inst(self) -> None:
        module = self.readline()[:-1].decode("ascii")
        name = self.readline()[:-1].decode("ascii")
        args = tuple(self.pop_mark())
        self.append(self._call(Name(module, name), args))

    def _op_obj(self) -> None:
        target, *args = self.pop_mark()
        self.append(self._call(target, tuple(args)))

    def _op_build(self) -> None:
        state = self.stack.pop()
        made = self.stack[-1]
        if isinstance(made, Placeholder):
            made.state.append(state)
        elif isinstance(made, Array):
            _fill_array(made, state)
        elif isinstance(made, _Dtype):
            made.order = str(state[1])
        elif not isinstance(made, (OrderedDict, Tensor)):  # whose _metadata and hooks are not needed
            raise CheckpointError(f"sets the state of a {type(made).__name__}: refused")

    def _fill(self, kind: type, values: list[Any]) -> None:
        """Put items into a plain container; a placeholder only keeps them."""
        into = self.stack[-1]
        if isinstance(into, Placeholder):
            into.state.extend(values)
        elif not isinstance(into, kind):
            raise CheckpointError(f"puts items into a {type(into).__name__}: refused")
        elif isinstance(into, list):
            into.extend(values)
        elif isinstance(into, (dict, set)):
            into.update(values if kind is set else zip(values[::2], values[1::2]))


_OPCODES: dict[int, Callable[[_Machine], None]] = {
    pickle.REDUCE[0]: _Machine._op_reduce,
    pickle.NEWOBJ[0]: _Machine._op_reduce,
    pickle.NEWOBJ_EX[0]: _Machine._op_newobj_ex,
    pickle.INST[0]: _Machine._op_inst,
    pickle.OBJ[0]: _Machine._op_obj,
    pickle.BUILD[0]: _Machine._op_build,
    pickle.APPEND[0]: lambda machine: machine._fill(list, [machine.stack.pop()]),
    pickle.APPENDS[0]: lambda machine: machine._fill(list, machine.pop_mark()),
    pickle.SETITEM[0]: lambda machine: machine._fill(dict, [machine.stack.pop(-2), machine.stack.pop()]),
    pickle.SETITEMS[0]: lambda machine: machine._fill(dict, machine.pop_mark()),
    pickle.ADDITEMS[0]: lambda machine: machine._fill(set, machine.pop_mark()),
}
_Machine.dispatch = {**pickle._Unpickler.dispatch, **_OPCODES}  # type: ignore[dict-item,unused-ignore]


def _make(kind: Name, args: tuple[Any, ...]) -> object:
    """The object that a call of ``kind`` stands for: through the table, or a placeholder."""
    maker = _MAKERS.get(str(kind))
    if maker is not None:
        return maker(*args)
    if kind.module.split(".")[0] in _REFUSED_ROOTS and not str(kind).startswith(_INERT_STDLIB):
        raise CheckpointError(f"wants to call {str(kind)[:80]}, which weights never need: refused (nothing was run); "
                              "if you trust the file, save its state_dict alone where it was made")
    return Placeholder(kind)


def _tensor(storage: object, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    if not isinstance(storage, _Storage):
        raise CheckpointError("a tensor without a storage: refused")
    if math.prod(size) > storage.values.numel():
        raise CheckpointError(f"a tensor of shape {tuple(size)} over {storage.values.numel()} stored values: refused")
    return torch.as_strided(storage.values, tuple(size), tuple(stride), offset)  # torch checks the bounds


def _fill_array(array: Array, state: Any) -> None:
    _, shape, dtype, fortran, data = state
    if isinstance(data, list):  # an array of objects: never weights
        return
    array.values = _values(data, dtype, shape, "F" if fortran else "C")


def _values(data: Any, dtype: object, shape: tuple[int, ...], order: str) -> np.ndarray[Any, Any]:
    raw = data.encode("latin1") if isinstance(data, str) else bytes(memoryview(data))
    if not isinstance(dtype, _Dtype):
        raise CheckpointError("an array without a type: refused")
    kind = dtype.resolve()
    if math.prod(shape) * kind.itemsize != len(raw):
        raise CheckpointError(f"an array of shape {tuple(shape)} with {len(raw)} bytes: refused")
    flat = np.frombuffer(raw, dtype=kind)
    return flat.reshape(tuple(shape), order="F" if order == "F" else "C")


def _scalar(dtype: object, data: object = b"") -> object:
    return _values(data, dtype, (), "C").item()


def _bytes(text: str = "", encoding: str = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise CheckpointError("bytes in an unexpected encoding: refused")
    return text.encode("latin1")


def _from_type(maker: object, kind: object, args: tuple[Any, ...], state: object = None) -> object:
    if not isinstance(maker, Name) or str(maker) not in _TENSOR_MAKERS:
        raise CheckpointError(f"a tensor made by {str(maker)[:60]}: refused")
    return _TENSOR_MAKERS[str(maker)](*args)


def _listed(kind: Callable[[Any], object]) -> Callable[..., object]:
    """A container from a list in the pickle; anything else (a number asks for memory) is refused."""
    def make(items: object = ()) -> object:
        if not isinstance(items, (list, tuple, set, frozenset, dict)):
            raise CheckpointError(f"a container made from a {type(items).__name__}: refused")
        return kind(items)

    return make


_TENSOR_MAKERS: dict[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": _tensor, "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
}
# Every call that a file may make, and what is done instead of it.
_MAKERS: dict[str, Callable[..., object]] = {
    **_TENSOR_MAKERS,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.nn.parameter.Parameter": lambda data=None, *_: data,
    "torch.device": lambda *args: ":".join(str(part) for part in args),
    "torch.Size": _listed(tuple),
    "collections.OrderedDict": _listed(OrderedDict),
    **{f"{module}.{kind.__name__}": _listed(kind) for module in ("builtins", "__builtin__")
       for kind in (set, frozenset, list, dict, tuple)},
    "builtins.slice": lambda *_: None, "builtins.complex": lambda *_: None,
    "_codecs.encode": _bytes, "builtins.bytes": _bytes,
    **{f"{module}._reconstructor": lambda kind, *_: _make(kind, ()) for module in ("copyreg", "copy_reg")},
    "numpy.dtype": lambda code, *_: _Dtype(str(code)),
    **{f"numpy.{core}.{name}": maker for core in ("core", "_core") for name, maker in (
        ("multiarray._reconstruct", lambda *_: Array()), ("multiarray.scalar", _scalar),
        ("numeric._frombuffer", lambda *args: Array(_values(*args))))},
}
