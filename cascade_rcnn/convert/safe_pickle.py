"""Reads weights out of other libraries' pickled checkpoints without running anything that the file asks for.

A pickle is a program for a small stack machine. Its dangerous instructions name a function and call it. Here a name
becomes an inert ``Name``; a call is looked up in a table (``pickle_makers``) of our own few functions that rebuild
tensors, arrays and containers; a class of a training library becomes a ``Placeholder`` that remembers its name and
nothing else; a name of Python itself, torch or numpy that is not in the table is an error. No name is ever imported,
nothing that comes from the file is ever called, and every size is checked against the file's own before memory is asked
for.

``torch.load(weights_only=True)`` stops at mmengine's history buffers and detectron2's arrays. As this reader is needed
for those, it reads all files: one way, the same with every version of torch.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from cascade_rcnn.convert.pickle_makers import Array, Dtype, Name, Placeholder, Storage, check_keys, fill_array, make
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
            return _Machine(_Checked(program, entries[programs[0]].file_size), load).load()


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
    first = _Machine(source, None).load()
    if not isinstance(first, int) or first != _LEGACY_MAGIC:
        return first
    for _ in range(2):  # version; sizes of C types, little endian on every machine in use
        _Machine(source, None).load()
    content = _Machine(source, reserve).load()
    keys = _Machine(source, None).load()
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


_LoadStorage = Callable[[torch.dtype, str, int], Storage]


class _Machine(pickle._Unpickler):  # the one written in Python: its instructions can be replaced
    """The stack machine, with every instruction that calls something replaced."""

    stack: list[Any]
    append: Callable[[object], None]
    pop_mark: Callable[[], list[Any]]
    readline: Callable[[], bytes]

    def __init__(self, file: _Checked, storage: _LoadStorage | None) -> None:
        super().__init__(file, encoding="latin1")  # pickles of Python 2 hold their arrays' bytes in strings
        self._storage = storage
        self._allowance = 4 * file.size + (1 << 20)  # items that calls may copy: one string is not copied for ever

    def find_class(self, module: str, name: str) -> Any:
        return Name(str(module), str(name))

    def get_extension(self, code: int) -> None:
        raise CheckpointError(f"uses the pickle extension {code}: refused")

    def persistent_load(self, pid: Any) -> Storage:
        if self._storage is None or not isinstance(pid, tuple) or not 5 <= len(pid) <= 6 or pid[0] != "storage":
            raise CheckpointError("refers to data outside of the file: refused")
        kind, key, numel = pid[1], pid[2], pid[4]
        if not (isinstance(kind, Name) and kind.module in ("torch", "torch.storage", "torch.cuda")):
            raise CheckpointError("a storage of an unknown kind: refused")
        dtype = _STORAGES.get(kind.name)
        is_whole = isinstance(key, str) and isinstance(numel, int) and numel >= 0 and (len(pid) == 5 or pid[5] is None)
        if dtype is None or not is_whole:
            raise CheckpointError(f"a storage of kind {kind} is not read here")
        return self._storage(dtype, key, numel)

    def _call(self, target: object, args: object) -> object:
        if not isinstance(target, Name) or not isinstance(args, tuple):
            raise CheckpointError(f"calls something that is not a class ({type(target).__name__}): refused")
        self._spend(args)
        return make(target, args)

    def _spend(self, values: Any) -> None:
        for value in values if isinstance(values, tuple) else ():
            self._allowance -= len(value) if isinstance(value, (str, bytes, list, tuple, dict, set, frozenset)) else 0
        if self._allowance < 0:
            raise CheckpointError("copies its own data over and over: refused")

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
            fill_array(made, state)
        elif isinstance(made, Dtype):
            made.order = str(state[1])
        elif not isinstance(made, (OrderedDict, Tensor)):  # whose _metadata and hooks are not needed
            raise CheckpointError(f"sets the state of a {type(made).__name__}: refused")

    def _op_dict(self) -> None:
        values = self.pop_mark()
        self.append({})
        self._fill(dict, values)

    def _op_frozenset(self) -> None:
        values = self.pop_mark()
        check_keys(values)
        self.append(frozenset(values))

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
            check_keys(values if kind is set else values[::2])
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
    pickle.DICT[0]: _Machine._op_dict,
    pickle.FROZENSET[0]: _Machine._op_frozenset,
}
_Machine.dispatch = {**pickle._Unpickler.dispatch, **_OPCODES}  # type: ignore[dict-item,unused-ignore]
