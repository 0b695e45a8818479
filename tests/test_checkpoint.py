"""Checkpoints: what is saved comes back, and a failed or interrupted save costs nothing."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import locations
from cascade_rcnn import checkpoint
from cascade_rcnn.atomic_files import replace_file
from cascade_rcnn.checkpoint import load_checkpoint, save_checkpoint
from cascade_rcnn.config import Config, ModelConfig
from cascade_rcnn.errors import CheckpointError

CONFIG = Config(model=ModelConfig(stage_ious=(0.5, 0.65)))


def _state(value: float = 1.0, *, size: int = 4) -> dict[str, torch.Tensor]:
    return {
        "a.weight": torch.full((size, 3), value),
        "a.count": torch.tensor(7),
        "b": torch.empty(0, 5),
        "c": torch.tensor([True, False]),
        "d": torch.arange(4, dtype=torch.bfloat16),
    }


def _save(path: Path, value: float = 1.0, *, size: int = 4) -> None:
    save_checkpoint(
        path,
        _state(value, size=size),
        config=CONFIG,
        class_names=("cat", "Hündin"),
        category_ids=(3, 90),
        extra={"step": 12, "metrics": {"bbox/AP": 0.25, "segm/AP": None}},
    )


def test_a_checkpoint_comes_back_whole(tmp_path: Path) -> None:
    _save(tmp_path / "x.safetensors")
    loaded = load_checkpoint(tmp_path / "x.safetensors")
    assert loaded.config == CONFIG
    assert loaded.class_names == ("cat", "Hündin") and loaded.category_ids == (3, 90)
    assert loaded.metadata == {"step": 12, "metrics": {"bbox/AP": 0.25, "segm/AP": None}}
    assert loaded.state.keys() == _state().keys()
    for name, tensor in _state().items():
        assert loaded.state[name].dtype == tensor.dtype and torch.equal(loaded.state[name], tensor)


def test_a_training_number_that_is_refused_today_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "old.safetensors"
    _save(path)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    config = json.loads(metadata["config"])
    config["train"]["log_every"] = 0
    save_file(tensors, path, metadata=metadata | {"config": json.dumps(config)})
    assert load_checkpoint(path).config.train.log_every == 1
    assert capsys.readouterr().err == f"{path}: train.log_every 0 is read as 1 (at least 1)\n"


def test_tied_and_strided_weights_are_saved(tmp_path: Path) -> None:
    weight = torch.arange(24.0).reshape(1, 2, 3, 4)
    state = {"a": weight, "b": weight, "c": weight[..., ::2], "d": weight.to(memory_format=torch.channels_last)}
    save_checkpoint(tmp_path / "x.safetensors", state, config=CONFIG, class_names=("cat",))
    loaded = load_checkpoint(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded.state[name], tensor) for name, tensor in state.items())
    assert loaded.category_ids == (1,)


def test_a_run_folder_means_its_best_else_its_last(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither best\.safetensors nor last\.safetensors"):
        load_checkpoint(tmp_path)
    _save(tmp_path / "last.safetensors", 1.0)
    assert load_checkpoint(tmp_path).state["a.weight"][0, 0] == 1
    _save(tmp_path / "best.safetensors", 2.0)
    assert load_checkpoint(str(tmp_path)).state["a.weight"][0, 0] == 2


def _newer(path: Path) -> None:
    checkpoint.write_tensors(path, _state(), {"kind": "model", "cascade_rcnn": "999"})


def _training(path: Path) -> None:
    checkpoint.write_tensors(path, _state(), {"kind": "training"})


def _foreign(path: Path) -> None:
    save_file(_state(), path)


def _truncated(path: Path) -> None:
    _save(path)
    path.write_bytes(path.read_bytes()[:-3])


def _flipped(path: Path) -> None:
    _save(path)
    content = bytearray(path.read_bytes())
    content[-20] ^= 4
    path.write_bytes(content)


def _huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")


def _bad_config(path: Path) -> None:
    checkpoint.write_tensors(
        path, _state(), {"kind": "model", "config": "{", "class_names": "[]", "category_ids": "[]"}
    )


def _unknown_key(path: Path) -> None:
    checkpoint.write_tensors(
        path,
        _state(),
        {"kind": "model", "config": json.dumps({"model": {"wheels": 4}}), "class_names": "[]", "category_ids": "[]"},
    )


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("x.safetensors", lambda path: None, "no such file"),
        ("x.pth", lambda path: path.write_bytes(b"PK"), "cascade-rcnn convert"),
        ("x.pkl", lambda path: path.write_bytes(b"\x80"), "cascade-rcnn convert"),
        ("x.safetensors", lambda path: path.write_bytes(b""), "not a readable safetensors file"),
        (
            "x.safetensors",
            lambda path: path.write_bytes(b"hello, I am a picture" * 9),
            "not a readable safetensors file",
        ),
        ("x.jpg", lambda path: path.write_bytes(b"\xff\xd8" * 99), "not a readable safetensors file"),
        ("x.safetensors", _huge_header, "not a readable safetensors file"),
        ("x.safetensors", _truncated, "not a readable safetensors file"),
        ("x.safetensors", _flipped, "checksum"),
        ("x.safetensors", _foreign, "of another program"),
        ("x.safetensors", _newer, "format version 999.*upgrade"),
        ("x.safetensors", _training, "training state.*last.safetensors"),
        ("x.safetensors", _bad_config, "metadata is damaged"),
        ("x.safetensors", _unknown_key, "wheels"),
    ],
)
def test_what_cannot_be_used_is_named_in_one_line(tmp_path: Path, name: str, make: object, message: str) -> None:
    path = tmp_path / name
    make(path)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_failing_write_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.safetensors"
    _save(path, 1.0)

    def full(*arguments: object, **keywords: object) -> None:
        Path(str(arguments[1])).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*unchanged.*--resume") as caught:
        _save(path, 2.0)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert load_checkpoint(path).state["a.weight"][0, 0] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.safetensors"]


def test_a_file_is_flushed_through_a_descriptor_that_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows refuses to flush any other."""
    fcntl = pytest.importorskip("fcntl")
    modes = []
    monkeypatch.setattr(os, "fsync", lambda file: modes.append(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE))
    replace_file(tmp_path / "a.txt", lambda temporary: temporary.write_text("a") and None)
    assert modes == [os.O_RDWR, os.O_RDONLY]  # the file, then its folder


def test_a_write_that_reads_back_differently_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.safetensors"
    _save(path, 1.0)

    def faulty(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
        save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, file, metadata=metadata)

    monkeypatch.setattr(checkpoint, "save_file", faulty)
    with pytest.raises(CheckpointError, match="reads back differently"):
        _save(path, 2.0)
    assert load_checkpoint(path).state["a.weight"][0, 0] == 1


_LIMITED = """
import resource, sys
from pathlib import Path
sys.path[:0] = {tests!r}
from test_checkpoint import _save
from cascade_rcnn.errors import CheckpointError
path = Path({path!r})
_save(path, 1.0)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    _save(path, 2.0, size=100_000)
except CheckpointError as error:
    print(error)
"""


def test_a_file_that_grows_beyond_the_limit_of_the_disk(tmp_path: Path) -> None:
    """A real short write: the operating system refuses bytes beyond the process's limit, as a full disk does."""
    path = tmp_path / "last.safetensors"
    code = _LIMITED.format(tests=[str(Path(__file__).parent), str(locations.TESTS / "support")], path=str(path))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=locations.REPOSITORY,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "cannot be written" in done.stdout and len(done.stdout.splitlines()) == 1
    assert load_checkpoint(path).state["a.weight"].shape == (4, 3)
    assert [file.name for file in tmp_path.iterdir()] == ["last.safetensors"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


@contextmanager
def _as_plain_user() -> Iterator[None]:
    """Root may write into read-only folders: where the tests run as root, be nobody for a moment."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_read_only_folder() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _save(folder / "last.safetensors", 1.0)
        folder.chmod(0o555)
        with _as_plain_user():
            with pytest.raises(CheckpointError, match=r"cannot be written \(.*ermission denied.*unchanged"):
                _save(folder / "last.safetensors", 2.0)
            with pytest.raises(CheckpointError, match=r"cannot be written \(.*ermission denied.*nothing was left"):
                _save(folder / "new" / "last.safetensors", 2.0)
        folder.chmod(0o700)
        assert load_checkpoint(folder).state["a.weight"][0, 0] == 1
        assert [file.name for file in folder.iterdir()] == ["last.safetensors"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="cannot be written"):
        _save(tmp_path / "run" / "last.safetensors")
