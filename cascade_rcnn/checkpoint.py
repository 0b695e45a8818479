"""Checkpoints: safe to write, safe to read, and complete.

A checkpoint is one ``.safetensors`` file: the weights and, as JSON in its metadata, the resolved configuration, the
class names, the data set's category ids, the format version, and whatever the writer adds (step, epoch, metrics).
Nothing here reads or writes a pickle.

Every file is written to a temporary name in the same folder, flushed to disk, read back, and only then renamed over
its predecessor. A process that is killed at any moment leaves either the old file or the new one, whole.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cascade_rcnn.atomic_files import clear_failure, replace_file, umask
from cascade_rcnn.config import Config, within_bounds
from cascade_rcnn.errors import CheckpointError, ConfigError
from cascade_rcnn.messages import one_line

FORMAT_VERSION = 1
"""Raised when a reader of the older version would misread the file; new optional metadata does not raise it."""

BEST, LAST = "best.safetensors", "last.safetensors"
STATE = Path("state") / "training.safetensors"
_FOREIGN = (".pth", ".pt", ".pkl", ".ckpt", ".bin", ".tar")
_EXPORTED = (".onnx", ".xml", ".pt2")


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk: everything needed to build and use it."""

    state: dict[str, Tensor]  # on the CPU, keys of ``CascadeRCNN.state_dict()``
    config: Config
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]  # the data set's own ids, as long as class_names; 1..K when it has none
    metadata: dict[str, Any] = field(default_factory=dict)  # what the writer adds: step, epoch, metrics, ...


def save_checkpoint(
    path: str | Path,
    state: Mapping[str, Tensor],
    *,
    config: Config,
    class_names: Sequence[str],
    category_ids: Sequence[int] = (),
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint atomically; ``extra`` is anything that JSON can hold.

    Raises CheckpointError when the file cannot be written (disk full, read-only folder); a previous file of that name
    is then as it was.
    """
    ids = tuple(category_ids) or tuple(range(1, len(class_names) + 1))
    metadata = {
        "kind": "model",
        "config": json.dumps(config.to_dict()),
        "class_names": json.dumps(list(class_names)),
        "category_ids": json.dumps([int(number) for number in ids]),
        "extra": json.dumps(dict(extra or {})),
    }
    write_tensors(Path(path), state, metadata)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint, or the best (else the last) of a run folder.

    Raises CheckpointError, in one line with the way out: no such file, a checkpoint of another library, a damaged
    file, or a file of a newer version.
    """
    file = find_checkpoint(Path(path))
    state, metadata = read_tensors(file, kind="model")
    from cascade_rcnn.recipes import config_from_dict

    try:
        class_names = tuple(str(name) for name in json.loads(metadata["class_names"]))
        category_ids = tuple(int(number) for number in json.loads(metadata["category_ids"]))
        values = json.loads(metadata["config"])
        if isinstance(values.get("train"), dict):
            values["train"], moved = within_bounds(values["train"])
            for line in moved:
                print(f"{file}: {line}", file=sys.stderr)
        config = config_from_dict(values, source=f"{file}, config")
        extra = json.loads(metadata.get("extra", "{}"))
    except ConfigError as error:
        raise CheckpointError(f"{error}; the checkpoint was written by another version of this program") from error
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file}: its metadata is damaged ({type(error).__name__}: {error}); use another copy of the checkpoint"
        ) from error
    return Checkpoint(state, config, class_names, category_ids, extra)


def save_training(run: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Write the state of a training into its run folder: one file, so that all of it belongs to the same step.

    ``info`` is what JSON can hold. Raises CheckpointError when it cannot be written; the state from before then stays.
    """
    write_tensors(run / STATE, tensors, {"kind": "training", "info": json.dumps(dict(info))})


def load_training(run: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what ``save_training`` wrote. Raises CheckpointError: damaged, or of a newer version."""
    tensors, metadata = read_tensors(run / STATE, kind="training")
    try:
        info: dict[str, Any] = json.loads(metadata["info"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{run / STATE}: its metadata is damaged; start anew from {LAST} in another folder with --out"
        ) from error
    return tensors, info


def find_checkpoint(path: Path) -> Path:
    """The file that ``path`` means: itself, or best.safetensors, else last.safetensors, of a run folder."""
    if path.is_dir():
        for name in (BEST, LAST):
            if (path / name).is_file():
                return path / name
        _refuse_exported(path, (path / f"model{suffix}" for suffix in _EXPORTED))
        raise CheckpointError(
            f"{path}: neither {BEST} nor {LAST} in this folder; give a run's folder or a .safetensors file"
        )
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file; give a .safetensors checkpoint, the folder of a run, or a name that "
            "'cascade-rcnn models' lists"
        )
    if path.suffix.lower() in _FOREIGN:
        raise CheckpointError(
            f"{path}: a checkpoint of another library; convert it first: "
            f"cascade-rcnn convert {path} {path.with_suffix('.safetensors').name}"
        )
    _refuse_exported(path, [path] if path.suffix.lower() in _EXPORTED else [])
    return path


def _refuse_exported(path: Path, files: Iterable[Path]) -> None:
    if any(file.is_file() for file in files):
        raise CheckpointError(
            f"{path}: an exported network, whose weights cannot be read back; give the checkpoint that it was made from"
        )


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file atomically, with a checksum of its tensors in the metadata."""
    on_host = _on_host(tensors)
    metadata = {
        "format": "pt",
        "cascade_rcnn": str(FORMAT_VERSION),
        "crc32": str(_checksum(on_host)),
        **metadata,
    }

    def write(temporary: Path) -> None:
        save_file(on_host, temporary, metadata=dict(metadata))
        temporary.chmod(0o666 & ~umask())  # safetensors creates files that only their owner can read

    def verify(temporary: Path) -> None:
        with safe_open(temporary, framework="pt") as file:
            if file.metadata() != metadata or str(_checksum(_Lazy(file))) != metadata["crc32"]:
                raise OSError("the file reads back differently from what was written")

    with clear_failure(path):
        replace_file(path, write, verify)


def read_tensors(path: Path, *, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what ``write_tensors`` wrote: tensors on the CPU, and the metadata. ``kind`` is "model" or "training"."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            _check_origin(path, metadata, kind)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path}: not a readable safetensors file ({one_line(error)}); it is damaged or of "
            "another kind: use another copy"
        ) from error
    if str(_checksum(tensors)) != metadata.get("crc32", str(_checksum(tensors))):
        raise CheckpointError(f"{path}: the weights do not match their checksum, the file is damaged; use another copy")
    return tensors, metadata


def _check_origin(path: Path, metadata: Mapping[str, str], kind: str) -> None:
    version = metadata.get("cascade_rcnn", "")
    if not version.isdecimal():
        raise CheckpointError(
            f"{path}: a safetensors file of another program (no cascade_rcnn metadata); if it holds "
            "backbone weights only, name it in --model.backbone-weights"
        )
    if int(version) > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {version}, this program reads up to {FORMAT_VERSION}; "
            "upgrade it: pip install --upgrade cascade-rcnn"
        )
    found = metadata.get("kind", "")
    if found != kind:
        way_out = (
            f"give {LAST} or {BEST} of the run instead"
            if found == "training"
            else "resume needs the run's own state folder"
        )
        raise CheckpointError(f"{path}: holds a {found or 'nameless'} state where a {kind} state is wanted; {way_out}")


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU where needed; names that share memory (tied weights) get memory of their own."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        host = tensor.detach().to("cpu").contiguous()
        address = host.untyped_storage().data_ptr()
        if host.numel() and (address in seen or host.untyped_storage().nbytes() != host.nbytes):
            host = host.clone()
        seen.add(host.untyped_storage().data_ptr())
        result[name] = host
    return result


class _Lazy(Mapping[str, Tensor]):
    """An open safetensors file as a mapping that reads one tensor at a time."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.keys())

    def __len__(self) -> int:
        return len(self._file.keys())


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 over names and bytes, in the order of the names; about a second per 1.5 GB."""
    value = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        if tensor.numel():
            value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return value
