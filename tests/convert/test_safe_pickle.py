"""Foreign checkpoints are read, and hostile ones are refused, without running anything that the file asks for."""

from __future__ import annotations

import argparse
import builtins
import collections
import io
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_rcnn.convert.safe_pickle import Array, Placeholder, as_tensor, read_pickled
from cascade_rcnn.errors import CheckpointError

LEGACY = pytest.param(False, id="legacy")
ZIP = pytest.param(True, id="zip")


class Calls:
    """Pickles as a call of any function with any arguments."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


class HistoryBuffer:
    """Stands for a training library's own class: pickled by reference, gone where it is read."""

    def __init__(self) -> None:
        self.values = np.arange(3.0)


class ConfigDict(dict):  # type: ignore[type-arg]
    pass


def torch_zip(path: Path, program: bytes, records: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        for name, data in (records or {}).items():
            archive.writestr(f"archive/{name}", data)
    return path


@pytest.mark.parametrize("as_zip", [ZIP, LEGACY])
def test_reads_what_torch_saved(tmp_path: Path, as_zip: bool) -> None:
    base = torch.arange(24.0)
    half = torch.tensor([1.5, -2]).to(torch.bfloat16)
    content = {
        "state_dict": collections.OrderedDict(
            whole=base.reshape(4, 6),
            view=base.reshape(4, 6)[1:3, ::2],
            transposed=base.reshape(4, 6).t(),
            parameter=torch.nn.Parameter(torch.ones(2, 2)),
            count=torch.tensor(7),
            half=half,
            empty=torch.zeros(0, 4),
            flags=torch.tensor([True, False]),
        ),
        "epoch": 12,
        "names": ("a", "b"),
        "labels": {1, 2},
    }
    path = tmp_path / "a.pth"
    torch.save(content, path, _use_new_zipfile_serialization=as_zip)
    read: Any = read_pickled(path)
    assert read["epoch"] == 12 and read["names"] == ("a", "b") and read["labels"] == {1, 2}
    for name, expected in content["state_dict"].items():  # type: ignore[attr-defined]
        found = as_tensor(read["state_dict"][name])
        assert found is not None and found.dtype == expected.dtype
        assert torch.equal(found, expected.detach()), name


@pytest.mark.parametrize("as_zip", [ZIP, LEGACY])
def test_unknown_classes_become_placeholders(tmp_path: Path, as_zip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (HistoryBuffer, ConfigDict):
        monkeypatch.setattr(kind, "__module__", "mmengine.made_up")
    for name in ("mmengine", "mmengine.made_up"):
        monkeypatch.setitem(sys.modules, name, sys.modules[__name__])
    path = tmp_path / "a.pth"
    torch.save(
        {
            "state_dict": {"w": torch.ones(2)},
            "hub": {"loss": HistoryBuffer()},
            "cfg": ConfigDict(a=1),
            "args": argparse.Namespace(lr=0.1),
            "lr": np.float64(0.02),
            "out": Path("x"),
        },
        path,
        _use_new_zipfile_serialization=as_zip,
    )
    read: Any = read_pickled(path)
    assert isinstance(read["hub"]["loss"], Placeholder) and str(read["cfg"].kind) == "mmengine.made_up.ConfigDict"
    assert read["lr"] == 0.02
    assert torch.equal(read["state_dict"]["w"], torch.ones(2))


@pytest.mark.parametrize("protocol", range(2, 6))
def test_reads_numpy_pickles_of_every_protocol(tmp_path: Path, protocol: int) -> None:
    blobs = {
        "a_w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "f": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big": np.arange(3, dtype=">f4"),
        "objects": np.array([None, {}], dtype=object),
        "scalar": np.float32(3),
        "counts": np.arange(4, dtype=np.int64),
    }
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"blobs": blobs, "cfg": "MODEL: {}\n"}, protocol=protocol))
    read: Any = read_pickled(path)
    for name in ("a_w", "f", "big", "counts"):
        found = as_tensor(read["blobs"][name])
        assert found is not None and np.array_equal(found.numpy(), blobs[name]), name
    assert as_tensor(read["blobs"]["objects"]) is None and read["blobs"]["scalar"] == 3


def test_reads_arrays_written_by_python_2(tmp_path: Path) -> None:
    array = np.arange(3, dtype="<f4")
    raw = array.tobytes()
    # As Python 2 writes: byte strings (opcode U), the module names of its time, protocol 2.
    program = (
        b"\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
        b"K\x03\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U"
        + bytes([len(raw)])
        + raw
        + b"tbs."
    )
    path = tmp_path / "old.pkl"
    path.write_bytes(program)
    found: Any = read_pickled(path)
    assert isinstance(found["w"], Array)
    assert np.array_equal(as_tensor(found["w"]).numpy(), array)  # type: ignore[union-attr]


HOSTILE = {
    "os.system": lambda flag: Calls(os.system, f"touch {flag}"),
    "eval": lambda flag: Calls(builtins.eval, f"open({str(flag)!r}, 'w')"),
    "exec": lambda flag: Calls(builtins.exec, f"open({str(flag)!r}, 'w')"),
    "open": lambda flag: Calls(builtins.open, str(flag), "w"),
    "getattr": lambda flag: Calls(getattr, "x", "upper"),
    "import": lambda flag: Calls(builtins.__import__, "os"),
    "torch.load": lambda flag: Calls(torch.load, str(flag)),
    "torch.save": lambda flag: Calls(torch.save, {}, str(flag)),
    "torch.hub.load": lambda flag: Calls(torch.hub.load, "a/b", "c"),
    "nested call": lambda flag: Calls(list, Calls(os.system, f"touch {flag}")),
    "in a list": lambda flag: [1, [2, Calls(os.system, f"touch {flag}")]],
    "as a key": lambda flag: {"state_dict": {Calls(os.system, f"touch {flag}"): 1}},
    "beside weights": lambda flag: {"state_dict": {"w": torch.ones(1)}, "x": Calls(os.mkdir, str(flag))},
    "bytearray bomb": lambda flag: Calls(bytearray, 1 << 45),
    "list bomb": lambda flag: Calls(list, Calls(range, 1 << 45)),
    "numpy load": lambda flag: Calls(np.load, str(flag)),
}


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_calls_are_refused_and_not_run(tmp_path: Path, name: str, kind: str) -> None:
    flag = tmp_path / "ran"
    content = HOSTILE[name](flag)
    path = tmp_path / "hostile.pth"
    if kind == "plain":
        if isinstance(content, dict) and "x" in content:
            content.pop("state_dict")
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError, match=r"refused") as caught:
        read_pickled(path)
    assert not flag.exists()
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def raw_programs() -> dict[str, bytes]:
    system = b"cposix\nsystem\n"
    return {
        "INST": b"(S'true'\niposix\nsystem\n.",
        "OBJ": b"(cposix\nsystem\nS'true'\no.",
        "NEWOBJ": b"\x80\x02" + system + b"U\x04true\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04" + system + b"U\x04true\x85}\x92.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
        "from the memo": b"\x80\x02" + system + b"q\x000h\x00U\x04true\x85R.",
        "state on a name": b"\x80\x02" + system + b"}U\x08__call__K\x01sb.",
        "state on a tensor class": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}U\x08__code__K\x01sb.",
        "state on a list": b"\x80\x02]}U\x01aK\x01sb.",
        "call of a placeholder": b"\x80\x02cmmcv\nX\n)R)R.",
        "call of a tuple": b"\x80\x02))R.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent id": b"\x80\x02U\x03etcQ.",
        "append to a name": b"\x80\x02" + system + b"K\x01a.",
        "item of a string": b"\x80\x02U\x01aK\x00K\x01s.",
        "reconstructor": b"\x80\x02ccopy_reg\n_reconstructor\n" + system + b"c__builtin__\nobject\nN\x87R.",
    }


@pytest.mark.parametrize("name", raw_programs())
def test_every_opcode_that_calls_or_changes_is_closed(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "system", lambda command: pytest.fail(f"ran {command}"))
    for kind in ("plain", "zip"):
        path = tmp_path / f"{kind}.pth"
        if kind == "plain":
            path.write_bytes(raw_programs()[name])
        else:
            torch_zip(path, raw_programs()[name])
        with pytest.raises(CheckpointError) as caught:
            read_pickled(path)
        assert "\n" not in str(caught.value)


def test_state_of_a_placeholder_stays_inert(tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(b"\x80\x02cmmcv\nX\n)\x81}(U\x0c__setstate__K\x01U\x09__class__K\x02ub.")
    made = read_pickled(path)
    assert type(made) is Placeholder and made.state == [{"__setstate__": 1, "__class__": 2}]


def test_deep_nesting_neither_crashes_nor_recurses(tmp_path: Path) -> None:
    path = tmp_path / "deep.pkl"
    path.write_bytes(b"\x80\x02" + b"(" * 300_000 + b"t" * 300_000 + b".")
    assert isinstance(read_pickled(path), tuple)


def test_a_huge_memo_index_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "memo.pkl"
    path.write_bytes(b"\x80\x02K\x07r\xff\xff\xff\x7f.")
    assert read_pickled(path) == 7


@pytest.mark.parametrize("opcode", [b"B", b"X", b"T", b"\x8b"])
def test_false_lengths_cost_no_memory(tmp_path: Path, opcode: bytes) -> None:
    path = tmp_path / "long.pkl"
    path.write_bytes(b"\x80\x04" + opcode + struct.pack("<I", 0x7FFFFFFF) + b"abc.")
    with pytest.raises(CheckpointError, match="damaged"):
        read_pickled(path)


def storage_program(numel: int, *, size: str = "K\x02", stride: str = "K\x01") -> bytes:
    number = b"\x8a\x08" + struct.pack("<q", numel)
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\nFloatStorage\nU\x010U\x03cpu"
        + number
        + b"tQK\x00"
        + size.encode("latin1")
        + b"\x85"
        + stride.encode("latin1")
        + b"\x85"
        + b"\x89ccollections\nOrderedDict\n)RtR."
    )


def test_a_storage_must_be_as_long_as_its_tensors_claim(tmp_path: Path) -> None:
    good: Any = read_pickled(torch_zip(tmp_path / "good.pth", storage_program(2), {"data/0": b"\0" * 8}))
    assert good.tolist() == [0, 0]
    for numel in (1, 3, 1 << 50, -1):
        with pytest.raises(CheckpointError):
            read_pickled(torch_zip(tmp_path / "bad.pth", storage_program(numel), {"data/0": b"\0" * 8}))
    for size, stride in (("K\x03", "K\x01"), ("K\x02", "K\x09"), ("J\xff\xff\xff\x7f", "K\x00")):
        with pytest.raises(CheckpointError):
            read_pickled(
                torch_zip(tmp_path / "bad.pth", storage_program(2, size=size, stride=stride), {"data/0": b"\0" * 8})
            )


SHARED = b"K\x01\x85" + b"2\x86" * 60  # a tuple of the same tuple twice, 60 times: 2 ** 60 leaves


@pytest.mark.parametrize(
    "program",
    [
        b"}" + SHARED + b"K\x01s.",
        b"(" + SHARED + b"K\x01d.",
        b"}(" + SHARED + b"K\x01u.",
        b"\x8f(" + SHARED + b"\x90.",
        b"(" + SHARED + b"\x91.",
        b"cbuiltins\nset\n]" + SHARED + b"a\x85R.",
        b"ccollections\nOrderedDict\n]" + SHARED + b"K\x01\x86a\x85R.",
        b"cnumpy\ndtype\n" + SHARED + b"\x85R.",
        b"ctorch._tensor\n_rebuild_from_type_v2\n(" + SHARED + b"K\x01)NtR.",
        b"(U\x07storagectorch\nFloatStorage\n" + SHARED + b"U\x03cpuK\x01tQ.",
    ],
    ids=range(10),
)
def test_structures_that_share_themselves_take_no_time(tmp_path: Path, program: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"refused|not read"):
        read_pickled(torch_zip(tmp_path / "shared.pth", b"\x80\x04" + program))


def test_one_string_is_not_copied_over_and_over(tmp_path: Path) -> None:
    text = b"X" + struct.pack("<I", 400_000) + b"a" * 400_000 + b"q\x00"
    path = tmp_path / "copies.pkl"
    path.write_bytes(b"\x80\x02](" + text + b"c_codecs\nencode\nh\x00\x85R" * 5000 + b"e.")
    with pytest.raises(CheckpointError, match="over and over"):
        read_pickled(path)


def test_shapes_are_numbers(tmp_path: Path) -> None:
    for size in ("U\x01a", "]", "G\x3f\xf0\0\0\0\0\0\0"):
        with pytest.raises(CheckpointError, match="whole numbers"):
            read_pickled(torch_zip(tmp_path / "s.pth", storage_program(2, size=size), {"data/0": b"\0" * 8}))


def test_zip_tricks_are_refused(tmp_path: Path) -> None:
    inner = tmp_path / "inner.pth"
    torch.save({"w": torch.ones(1)}, inner)
    outer = tmp_path / "outer.zip"
    with zipfile.ZipFile(outer, "w") as archive:
        archive.write(inner, "inner.pth")
    with pytest.raises(CheckpointError, match=r"no data\.pkl"):
        read_pickled(outer)
    with pytest.raises(CheckpointError):  # a zip where the pickle should be is not followed
        read_pickled(torch_zip(tmp_path / "nested.pth", inner.read_bytes()))
    bomb = tmp_path / "bomb.pth"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10_000_000)
    with pytest.raises(CheckpointError, match=r"refused|compressed"):
        read_pickled(bomb)
    script = torch_zip(tmp_path / "script.pth", b"\x80\x02}.", {"code/m.py": b"print()"})
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_pickled(script)
    with zipfile.ZipFile(script, "a", zipfile.ZIP_DEFLATED) as archive:  # as torch.jit.save does
        archive.writestr("archive/code/n.py", b"print()" * 50)
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_pickled(script)
    program = storage_program(2)
    with pytest.raises(CheckpointError):
        read_pickled(torch_zip(tmp_path / "outside.pth", program, {"other": b"\0" * 8}))


def test_other_files_are_named(tmp_path: Path) -> None:
    page = tmp_path / "model.pth"
    page.write_text("<html>404</html>")
    with pytest.raises(CheckpointError, match="web page"):
        read_pickled(page)
    page.write_bytes(b"")
    with pytest.raises(CheckpointError, match="neither"):
        read_pickled(page)
    with pytest.raises(CheckpointError, match=r"nothere\.pth.*existing"):
        read_pickled(tmp_path / "nothere.pth")
    with pytest.raises(CheckpointError):
        read_pickled(tmp_path)


def valid_files() -> list[bytes]:
    files = []
    for as_zip in (True, False):
        buffer = io.BytesIO()
        torch.save({"w": torch.ones(3), "n": np.float64(2)}, buffer, _use_new_zipfile_serialization=as_zip)
        files.append(buffer.getvalue())
    return [*files, pickle.dumps({"a": np.ones(3)})]


@settings(max_examples=150, deadline=None)
@given(which=st.integers(0, 2), at=st.floats(0, 1), value=st.integers(0, 255), cut=st.floats(0.3, 1))
def test_random_damage_gives_the_one_error_or_a_value(
    tmp_path_factory: pytest.TempPathFactory, which: int, at: float, value: int, cut: float
) -> None:
    data = bytearray(valid_files()[which])
    data[int(at * (len(data) - 1))] = value
    path = tmp_path_factory.mktemp("damage") / "x.pth"
    path.write_bytes(data[: max(1, int(cut * len(data)))])
    try:
        read_pickled(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
