"""Reads weights out of other libraries' pickled checkpoints without running anything that the file asks for.

A pickle is a program for a small stack machine. Its dangerous instructions name a function and call it. Here
``find_class`` imports nothing: a name becomes a ``_Global``, whose call looks for our own function of that name in a
short table (tensors, arrays, containers); a class of a training library becomes a ``Placeholder`` that remembers its
name and items; any other name of Python, torch or numpy is an error. Every argument comes from the file: lengths are
compared with the data at hand before memory is asked for, numbers must be numbers, nested keys are not hashed.

``torch.load(weights_only=True)`` stops at mmengine's history buffers and detectron2's arrays, and the unpickler in C
believes the sizes that a file claims. So one reader, on the unpickler in Python, reads all files alike.
"""

from __future__ import annotations

import math
import pickle
import re
import struct
import sys
import zipfile
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
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
# Calls that are refused: everything of Python and of these, but for data classes that harmlessly occur in checkpoints.
_REFUSED = (frozenset(sys.stdlib_module_names) - {"__main__"}).union(
    ("torch", "numpy", "torchvision", "cascade_rcnn", "__builtin__", "__builtins__", "copy_reg", "commands"),
    ("exceptions", "pip", "setuptools", "pkg_resources", "cloudpickle", "dill", "joblib"),
)
_INERT = (
    *("argparse.Namespace", "datetime.", "pathlib.", "uuid.", "decimal.", "fractions.", "numpy.random."),
    *("collections.defaultdict", "collections.deque", "collections.Counter", "torch.Generator"),
)


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
    raise CheckpointError(
        f"{path}: neither a torch checkpoint nor a pickle (starts with {start!r}): if a web page was "
        "saved instead of the file, fetch it again"
    )


def _read_zip(file: IO[bytes], size: int) -> object:
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) > _MAX_ENTRIES or sum(entry.file_size for entry in entries.values()) > size:
            raise CheckpointError("its entries claim more bytes than the file has: refused")
        if any(re.match(r"[^/]+/code/", name) for name in entries):
            raise CheckpointError("a TorchScript program, not a checkpoint: give the .pth that it was made from")
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries.values()):
            raise CheckpointError("a compressed or encrypted zip, which torch never writes: unpack it first")
        programs = [name for name in entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(programs) != 1:
            raise CheckpointError("a zip without a torch checkpoint in it (no data.pkl): unpack it first")
        root = programs[0].removesuffix("data.pkl")
        if entries[programs[0]].file_size > _MAX_PROGRAM:
            raise CheckpointError("its pickle is larger than 256 MiB: refused")
        if root + "byteorder" in entries and archive.read(root + "byteorder") != b"little":
            raise CheckpointError("written on a big-endian machine: save it again on another")
        storages: dict[str, Storage] = {}

        def load(dtype: torch.dtype, key: str, numel: int) -> Storage:
            if key not in storages:
                data = archive.read(f"{root}data/{key}")
                if len(data) != numel * dtype.itemsize:
                    raise CheckpointError(f"storage {key} has {len(data)} bytes, its tensors claim {numel} x {dtype}")
                flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0).byte()
                storages[key] = Storage(flat.view(dtype))
            return storages[key]

        with archive.open(programs[0]) as program:
            return _Unpickler(_Checked(program, entries[programs[0]].file_size), load).load()


def _read_stream(file: IO[bytes], size: int) -> object:
    """A plain pickle, or torch's older form: magic, version, system, objects, storage keys, then each storage."""
    storages: dict[str, Storage] = {}
    claimed = 0

    def reserve(dtype: torch.dtype, key: str, numel: int) -> Storage:
        nonlocal claimed
        if key not in storages:
            claimed += numel * dtype.itemsize
            if claimed > size:
                raise CheckpointError("its storages claim more bytes than the file has: refused")
            storages[key] = Storage(torch.zeros(numel, dtype=dtype))
        return storages[key]

    source = _Checked(file, size)
    first = _Unpickler(source, None).load()
    if not isinstance(first, int) or first != _LEGACY_MAGIC:
        return first
    for _ in range(2):  # version; sizes of C types, little endian on every machine in use
        _Unpickler(source, None).load()
    content = _Unpickler(source, reserve).load()
    keys = _Unpickler(source, None).load()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or set(keys) != set(storages):
        raise CheckpointError("its storages do not belong to its tensors: fetch the file again")
    for key in keys:
        values = storages[key].values
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
        self._left = self.size = size

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


# What a pickle can make


@dataclass(eq=False)
class Placeholder:
    """Stands for an object of a class that is not known here: its name, and what the file put into it."""

    kind: str
    state: list[object] = field(default_factory=list)

    def append(self, item: object) -> None:
        self.state.append(item)

    add = append

    def extend(self, items: list[object]) -> None:
        self.state.extend(items)

    def __setitem__(self, key: object, value: object) -> None:
        self.state += [key, value]


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
class Storage:
    values: Tensor  # 1-D


class _Tuple(tuple[Any, ...]):
    """A tuple that is no key if it holds another: tuples of the same tuples of the same ... take for ever to hash."""

    __slots__ = ()

    def __hash__(self) -> int:
        if any(isinstance(part, tuple) for part in self):
            raise CheckpointError("a nested key: refused")
        return super().__hash__()


class _Dict(dict[Any, Any]):
    """An OrderedDict of the file: its further state (a state_dict's versions) is not needed."""


class _Global:
    """A function or class that the file names; a call of it makes what our table says, or a placeholder."""

    def __init__(self, module: str, name: str, spend: Callable[[tuple[Any, ...]], None]) -> None:
        self.module, self.name, self.spend = module, name, spend

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    def __call__(self, *args: Any) -> object:
        self.spend(args)
        maker = _MAKERS.get(str(self))
        if maker is not None:
            return maker(*args)
        if self.module.split(".")[0] in _REFUSED and not str(self).startswith(_INERT):
            raise CheckpointError(
                f"wants to call {str(self)[:80]}, which weights never need: refused (nothing was run); "
                "if you trust the file, save its state_dict alone where it was made"
            )
        return Placeholder(str(self))


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


def _values(data: Any, dtype: object, shape: tuple[int, ...], order: str) -> np.ndarray[Any, Any]:
    raw = data.encode("latin1") if isinstance(data, str) else memoryview(data)
    if not isinstance(dtype, _Dtype):
        raise CheckpointError("an array without a type: refused")
    kind = dtype.resolve()
    if math.prod(_integers(shape)) * kind.itemsize != len(raw):
        raise CheckpointError(f"an array of shape {tuple(shape)} with {len(raw)} bytes: refused")
    flat = np.frombuffer(raw, dtype=kind)
    return flat.reshape(tuple(shape), order="F" if order == "F" else "C")


def _bytes(text: str = "", encoding: str = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise CheckpointError("bytes in an unexpected encoding: refused")
    return text.encode("latin1")


def _dtype(code: object, *_: object) -> _Dtype:
    if not isinstance(code, str):
        raise CheckpointError(f"a {type(code).__name__} where a word belongs: refused")
    return _Dtype(code)


def _from_type(maker: object, kind: object, args: tuple[Any, ...], state: object = None) -> object:
    if not isinstance(maker, _Global) or str(maker) not in _TENSOR_MAKERS:
        raise CheckpointError("a tensor of an unknown kind: refused")
    return _TENSOR_MAKERS[str(maker)](*args)


def _from_list(kind: Callable[[Any], object]) -> Callable[..., object]:
    """A container from a list in the pickle; anything else (a number asks for memory) is refused."""

    def make(items: object = ()) -> object:
        if not isinstance(items, (list, tuple, set, frozenset, dict)):
            raise CheckpointError(f"a container made from a {type(items).__name__}: refused")
        return kind(items)

    return make


_TENSOR_MAKERS: dict[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
}
_CONTAINERS: dict[str, Callable[[Any], object]] = {
    "set": set,
    "frozenset": frozenset,
    "list": list,
    "dict": dict,
    "tuple": _Tuple,
}
# Every call that a file may make, and what is done instead of it.
_MAKERS: dict[str, Callable[..., object]] = {
    **_TENSOR_MAKERS,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.nn.parameter.Parameter": lambda data=None, *_: data,
    "torch.device": lambda *_: None,
    "torch.Size": _from_list(_Tuple),
    "collections.OrderedDict": _from_list(_Dict),
    **{f"builtins.{name}": _from_list(kind) for name, kind in _CONTAINERS.items()},
    **{f"__builtin__.{name}": _from_list(kind) for name, kind in _CONTAINERS.items()},
    "builtins.slice": lambda *_: None,
    "builtins.complex": lambda *_: None,
    "_codecs.encode": _bytes,
    "builtins.bytes": _bytes,
    **{f"{module}._reconstructor": lambda kind, *_: kind() for module in ("copyreg", "copy_reg")},
    "numpy.dtype": _dtype,
    **{
        f"numpy.{core}.{name}": maker
        for core in ("core", "_core")
        for name, maker in (
            ("multiarray._reconstruct", lambda *_: Array()),
            ("multiarray.scalar", lambda dtype, data=b"": _values(data, dtype, (), "C").item()),
            ("numeric._frombuffer", lambda *args: Array(_values(*args))),
        )
    },
}


# The machine

_LoadStorage = Callable[[torch.dtype, str, int], Storage]


class _Unpickler(pickle._Unpickler):  # the one written in Python: its instructions can be replaced
    """The stack machine, with what is named, called, changed and hashed under control."""

    stack: list[Any]
    metastack: list[list[Any]]
    read: Callable[[int], bytes]

    def __init__(self, file: _Checked, storage: _LoadStorage | None) -> None:
        super().__init__(file, encoding="latin1")  # pickles of Python 2 hold their arrays' bytes in strings
        self._storage = storage
        self._allowance = 4 * file.size + (1 << 20)  # items that calls may copy: one string is not copied for ever

    def find_class(self, module: str, name: str) -> Any:
        return _Global(str(module), str(name), self._spend)

    def get_extension(self, code: int) -> None:
        raise CheckpointError(f"uses the pickle extension {code}: refused")

    def persistent_load(self, pid: Any) -> Storage:
        if self._storage is None or not isinstance(pid, tuple) or not 5 <= len(pid) <= 6 or pid[0] != "storage":
            raise CheckpointError("refers to data outside of the file: refused")
        kind, key, numel = pid[1], pid[2], pid[4]
        if not (isinstance(kind, _Global) and kind.module in ("torch", "torch.storage", "torch.cuda")):
            raise CheckpointError("a storage of an unknown kind: refused")
        dtype = _STORAGES.get(kind.name)
        is_whole = isinstance(key, str) and isinstance(numel, int) and numel >= 0 and (len(pid) == 5 or pid[5] is None)
        if dtype is None or not is_whole:
            raise CheckpointError(f"a storage of kind {kind} is not read here")
        return self._storage(dtype, key, numel)

    def _spend(self, args: tuple[Any, ...]) -> None:
        for value in args:
            self._allowance -= len(value) if isinstance(value, (str, bytes, list, tuple, dict, set, frozenset)) else 0
        if self._allowance < 0:
            raise CheckpointError("copies its own data over and over: refused")

    def call(self) -> None:
        """REDUCE and its kin: only names that the file gave can be called."""
        args, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, _Global) or not isinstance(args, tuple):
            raise CheckpointError(f"calls something that is not a class ({type(target).__name__}): refused")
        self.stack[-1] = target(*args)

    def call_with_keywords(self) -> None:
        self.stack.pop()  # keyword arguments only ever belong to classes that become placeholders
        self.call()

    def _instantiate(self, klass: Any, args: list[Any]) -> None:  # INST and OBJ
        self.stack += [klass, tuple(args)]
        self.call()

    def build(self) -> None:
        """Give an object its state: only those made here take one."""
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, Placeholder):
            made.state.append(state)
        elif isinstance(made, Array):
            _, shape, dtype, fortran, data = state
            if not isinstance(data, list):  # an array of objects: never weights
                made.values = _values(data, dtype, shape, "F" if fortran else "C")
        elif isinstance(made, _Dtype):
            made.order = str(state[1])
        elif not isinstance(made, (_Dict, Tensor)):  # whose versions and hooks are not needed
            raise CheckpointError(f"sets the state of a {type(made).__name__}: refused")

    def bytearray8(self) -> None:
        (size,) = struct.unpack("<Q", self.read(8))
        self.stack.append(bytearray(self.read(size)))  # read first: a false size asks for no memory


_Instruction = Callable[[Any], None]


def _only_into(kind: type, instruction: _Instruction, depth: int) -> _Instruction:
    """An instruction that puts items into a container ``depth`` below the top (0: below the mark), and nothing else."""

    def checked(machine: _Unpickler) -> None:
        target = machine.stack[-depth] if depth else machine.metastack[-1][-1]
        if not isinstance(target, (kind, Placeholder)):
            raise CheckpointError(f"puts items into a {type(target).__name__}: refused")
        instruction(machine)

    return checked


def _as_safe_tuple(instruction: _Instruction) -> _Instruction:
    def checked(machine: _Unpickler) -> None:
        instruction(machine)
        machine.stack[-1] = _Tuple(machine.stack[-1])

    return checked


_PLAIN: dict[int, _Instruction] = dict(pickle._Unpickler.dispatch)
_CHECKED: dict[bytes, _Instruction] = {
    **{code: _as_safe_tuple(_PLAIN[code[0]]) for code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)},
    pickle.REDUCE: _Unpickler.call,
    pickle.NEWOBJ: _Unpickler.call,
    pickle.NEWOBJ_EX: _Unpickler.call_with_keywords,
    pickle.BUILD: _Unpickler.build,
    pickle.BYTEARRAY8: _Unpickler.bytearray8,
    pickle.APPEND: _only_into(list, _PLAIN[pickle.APPEND[0]], 2),
    pickle.APPENDS: _only_into(list, _PLAIN[pickle.APPENDS[0]], 0),
    pickle.SETITEM: _only_into(dict, _PLAIN[pickle.SETITEM[0]], 3),
    pickle.SETITEMS: _only_into(dict, _PLAIN[pickle.SETITEMS[0]], 0),
    pickle.ADDITEMS: _only_into(set, _PLAIN[pickle.ADDITEMS[0]], 0),
}
_Unpickler.dispatch = {**_PLAIN, **{code[0]: instruction for code, instruction in _CHECKED.items()}}  # type: ignore[assignment,unused-ignore]
