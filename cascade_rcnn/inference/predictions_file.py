"""``predictions.json`` written as the predictions come: constant memory, whole or not at all, in shards that join.

Each of n processes writes ``predictions-i-of-n.json``; the last to finish joins them all to ``predictions.json``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from cascade_rcnn.errors import ConfigError, UserError
from cascade_rcnn.messages import printable

if TYPE_CHECKING:
    from typing_extensions import Self

NAME = "predictions.json"


def parse_shard(word: str) -> tuple[int, int]:
    """``2/8`` to (2, 8): the second of eight parts; an empty word takes torchrun's RANK and WORLD_SIZE."""
    if not word:
        return int(os.environ.get("RANK", 0)) + 1, int(os.environ.get("WORLD_SIZE", 1))
    match = re.fullmatch(r"(\d+)/(\d+)", word)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"shard {word!r}: write i/n with i from 1 to n, e.g. 1/8 for the first of eight parts")
    return int(match[1]), int(match[2])


class ResultsFile:
    """A JSON list on disk that grows by ``add``; appears under its name only when the ``with`` block ends well.

    What was written when the block is left by an error or Ctrl-C stays beside it as valid JSON, ``*.partial.json``.
    """

    head, foot = "[", "\n]\n"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(f"{path.stem}.partial{path.suffix}")
        self.count = 0
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.partial.open("w", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise UserError(
                f"{printable(self.partial)}: cannot be written ({error.strerror}); choose another --out"
            ) from error
        self._file.write(self.head)
        return self

    def add(self, results: Iterable[Mapping[str, Any]]) -> None:
        """Append objects, one a line."""
        assert self._file is not None, "use ResultsFile in a with statement"
        for result in results:
            self._file.write(("\n" if self.count == 0 else ",\n") + json.dumps(result))
            self.count += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        self._file.write(self.foot)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if kind is None:
            self.partial.replace(self.path)


def results_path(out: Path, shard: tuple[int, int]) -> Path:
    """Where this process writes: the file itself when it is alone."""
    return out / NAME if shard[1] == 1 else out / f"predictions-{shard[0]}-of-{shard[1]}.json"


def join_shards(out: Path, shards: int) -> Path | None:
    """Join the files of all shards once the last is there, in order, and remove them; None while some are missing.

    Every process calls this at its end; if two end at once, the second finds the work done.
    """
    parts = [results_path(out, (number, shards)) for number in range(1, shards + 1)]
    if not all(part.exists() for part in parts):
        return None
    whole = out / NAME
    working = out / f".{NAME}.{os.getpid()}"
    try:
        with working.open("w", encoding="utf-8") as target:
            _join(parts, target)
        working.replace(whole)
        for part in parts:
            part.unlink(missing_ok=True)
    except FileNotFoundError:  # another process has joined them and is removing them
        working.unlink(missing_ok=True)
    return whole


def _join(parts: Iterable[Path], target: IO[str]) -> None:
    target.write("[")
    count = 0
    for part in parts:
        with part.open(encoding="utf-8") as source:
            for line in source:  # one object a line, as ResultsFile writes them
                entry = line.strip().rstrip(",")
                if entry not in ("[", "]", ""):
                    target.write(("\n" if count == 0 else ",\n") + entry)
                    count += 1
    target.write("\n]\n")
    target.flush()
    os.fsync(target.fileno())
