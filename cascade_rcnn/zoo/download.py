"""Downloads that can be interrupted: resumed where they stopped, verified, renamed only when whole."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

from cascade_rcnn.errors import CheckpointError
from cascade_rcnn.messages import one_line, printable
from cascade_rcnn.zoo.catalog import Published

MIRROR = "CASCADE_RCNN_MIRROR"
_TIMEOUT = 30.0  # seconds without a byte
_TRIES = 4
_BLOCK = 1 << 20


def addresses(entry: Published) -> list[str]:
    """Where the file may be, first choice first: at its own address, or at the mirror that the environment names.

    A mirror is a host or a folder. It has the file under the path of its address, or directly under its name (or the
    entry's name, where many files are called alike).
    """
    mirror = os.environ.get(MIRROR, "").strip().rstrip("/")
    if not mirror:
        return [entry.url]
    if mirror.startswith("file://"):
        mirror = urllib.request.url2pathname(urllib.parse.urlsplit(mirror).path)
    path = urllib.parse.urlsplit(entry.url).path
    ending = Path(entry.file).suffix
    return [f"{mirror}{path}", f"{mirror}/{entry.name}{ending}", f"{mirror}/{entry.file}"]


def fetch(entry: Published, dest: Path) -> None:
    """Put the file of ``entry`` at ``dest``, whole and verified.

    What an earlier attempt left in ``dest`` + ``.part`` is continued. Raises CheckpointError: offline, a mirror without
    the file, a file of another length or digest (only the part file is deleted then), a folder that cannot be written.
    """
    part = dest.with_name(dest.name + ".part")
    try:
        if dest.is_file():  # put there by hand, or left by a process that ended before it was converted
            if differs := _difference(entry, dest):
                raise CheckpointError(
                    f"{entry.name}: {printable(dest)} is another file: its {differs}; delete it, and the right one is "
                    f"downloaded; if you trust it all the same, 'cascade-rcnn convert FILE' reads it"
                )
            return
        for address in addresses(entry):
            if _copied(address, part, entry.name) or _downloaded(address, part, entry.name):
                break
        else:
            raise CheckpointError(f"{entry.name}: {_nowhere(entry)}, or put the file at {dest} yourself")
        if differs := _difference(entry, part):
            size = _size(part)
            part.unlink(missing_ok=True)
            again = "they were deleted: try again" if "://" in address else "nothing was kept: replace that file"
            raise CheckpointError(
                f"{entry.name}: {size} bytes came from {printable(address)} whose {differs}; {again}, or name another "
                f"place in {MIRROR}; if you trust the file all the same, 'cascade-rcnn convert FILE' reads it"
            )
        part.replace(dest)
    except OSError as error:
        raise CheckpointError(
            f"{printable(part)}: cannot be written ({one_line(error)}); free some space, or name another folder in "
            "CASCADE_RCNN_CACHE"
        ) from error


def _nowhere(entry: Published) -> str:
    mirror = os.environ.get(MIRROR, "")
    is_place = "://" in mirror or Path(mirror).expanduser().is_dir()
    hint = "" if is_place else " (no such folder; an address begins with https://)"
    return f"not at any of {printable(', '.join(addresses(entry)))}; check {MIRROR}{hint}"


def _copied(address: str, part: Path, name: str) -> bool:
    """Copy from a folder; False where the address is none, or has no such file."""
    if "://" in address:
        return False
    source = Path(address).expanduser()
    if not source.is_file():
        return False
    try:
        file = source.open("rb")
    except OSError as error:
        raise CheckpointError(f"{name}: {printable(source)} cannot be read ({one_line(error)})") from error
    with file, part.open("wb") as copy:
        shutil.copyfileobj(file, copy)
    return True


def _downloaded(address: str, part: Path, name: str) -> bool:
    """Download, trying again where the connection breaks; False where the server has no such file."""
    if "://" not in address:
        return False
    for attempt in range(_TRIES):
        before = _size(part)
        try:
            return _one_request(address, part, name)
        except urllib.error.HTTPError as error:
            if error.code in (403, 404, 410) and os.environ.get(MIRROR):
                return False
            if error.code < 500 and error.code not in (408, 429):
                reason = printable(" ".join(str(error.reason).split()))
                raise CheckpointError(
                    f"{name}: {address} answers {error.code} ({reason}); name another host or a folder in {MIRROR}, or "
                    "fetch the file elsewhere and convert it with 'cascade-rcnn convert'"
                ) from error
            problem: Exception = error
        except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
            problem = error
        except ValueError as error:  # of the parts of urllib that take addresses apart
            raise CheckpointError(
                f"{name}: {printable(address)} is no address ({one_line(error)}); mend {MIRROR} or the proxy's variable"
            ) from error
        if _size(part) == before and attempt and not isinstance(problem, (urllib.error.HTTPError, _RestartError)):
            break  # not a byte came: the host cannot be reached
        time.sleep(min(2.0**attempt, 8.0) if attempt else 0.2)
    reason = " ".join(str(getattr(problem, "reason", "") or problem).split()) + _via_proxy(address)
    kept = f"; {_size(part)} bytes are kept and the next attempt continues there" if _size(part) else ""
    raise CheckpointError(
        f"{name}: cannot fetch {address} ({reason}){kept}; offline? fetch the file elsewhere and put it at "
        f"{part.with_suffix('')}, or name its folder in {MIRROR}"
    ) from problem


def _via_proxy(address: str) -> str:
    """Named where there is one, without the password that it may hold: the fault may be its."""
    url = urllib.parse.urlsplit(address)
    proxy = urllib.request.getproxies().get(url.scheme, "")
    if not proxy or urllib.request.proxy_bypass(url.hostname or ""):
        return ""
    return f", through the proxy {printable(proxy.rpartition('@')[2])} of {url.scheme}_proxy"


class _RestartError(ConnectionError):
    """What an earlier attempt left cannot be continued; it is deleted."""


def _one_request(address: str, part: Path, name: str) -> bool:
    """One request, from where the part file ends; True when the file is as long as the server says."""
    have = _size(part)
    headers = {"User-Agent": "cascade-rcnn", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        answer = urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()  # its page is not read
        if error.code == 416 and have:
            _check_length(part, have, error.headers.get("Content-Range", ""))
            return True
        raise
    except urllib.error.URLError:
        raise
    except OSError as error:  # of the network: what the disk says is told otherwise
        raise ConnectionError(one_line(error)) from error
    with answer:
        if answer.headers.get_content_type() == "text/html":
            raise CheckpointError(
                f"{name}: {address} answers with a web page; if this network wants a login, log in with a browser and "
                f"try again, or name another place in {MIRROR}"
            )
        unpack = _unpacker(answer, address, name)
        total = 0
        if answer.status == 206 and unpack is None:
            start, total = _range(answer.headers.get("Content-Range", ""))
            if start not in (have, None):
                part.unlink(missing_ok=True)
                raise _RestartError(f"asked for bytes from {have} on, the server answers from {start} on")
        elif answer.status == 206:  # bytes of a packed file do not continue ours
            part.unlink(missing_ok=True)
            raise _RestartError("the server packs its answers")
        else:  # the whole file again
            have = 0
        length = answer.headers.get("Content-Length", "")
        if unpack is None and not total and length.isdecimal():
            total = have + int(length)
        with part.open("ab" if have else "wb") as file, _bar(name, total, have) as advance:
            while block := _received(answer):
                file.write(_unpacked(unpack, block, part))
                advance(len(block))
        if total and _size(part) < total:
            raise ConnectionError(f"the connection ended after {_size(part)} of {total} bytes")
        if unpack and not unpack.eof:
            part.unlink(missing_ok=True)
            raise _RestartError("the connection ended within a packed answer")
    return True


def _check_length(part: Path, have: int, content_range: str) -> None:
    """The server has nothing behind what we have: the file is whole, unless it is longer than the server's."""
    _, total = _range(content_range)
    if total and total != have:
        part.unlink(missing_ok=True)
        raise _RestartError(f"{have} bytes were there of a file that has {total}")


def _range(text: str) -> tuple[int | None, int]:
    """Of ``bytes 7-9/10`` or ``bytes */10``: the first byte (None: not said) and the length of the file (0)."""
    match = re.fullmatch(r"\s*bytes\s+(?:(\d+)-\d+|\*)/(\d+|\*)\s*", text)
    if match is None:
        return None, 0
    return int(match[1]) if match[1] else None, int(match[2]) if match[2] != "*" else 0


def _unpacker(answer: Any, address: str, name: str) -> Any:
    """What unpacks an answer that was packed although nobody asked for it; None for a plain one."""
    packed = (answer.headers.get("Content-Encoding") or "identity").strip().lower()
    if packed == "identity":
        return None
    if packed not in ("gzip", "x-gzip", "deflate"):
        raise CheckpointError(
            f"{name}: {address} packs its answer ({printable(packed)}), which is not unpacked here; name another host "
            f"or a folder in {MIRROR}"
        )
    return zlib.decompressobj(zlib.MAX_WBITS | 32)  # of both kinds


def _unpacked(unpack: Any, block: bytes, part: Path) -> bytes:
    try:
        plain: bytes = unpack.decompress(block) if unpack else block
    except zlib.error as error:
        part.unlink(missing_ok=True)
        raise _RestartError(f"a packed answer that cannot be unpacked: {one_line(error)}") from error
    return plain


def _received(answer: Any) -> bytes:
    try:
        block: bytes = answer.read(_BLOCK)
    except OSError as error:
        raise ConnectionError(one_line(error)) from error
    return block


def _difference(entry: Published, file: Path) -> str:
    """How the file differs from the digest in its name, or from ours of the whole file; empty where it does not."""
    wanted = [(entry.hash_of, entry.hash)] if entry.hash else []
    wanted += [("sha256", entry.sha256)] if entry.sha256 else []
    for algorithm, expected in wanted:
        digest = hashlib.new(algorithm, usedforsecurity=False)
        with file.open("rb") as content:
            while block := content.read(_BLOCK):
                digest.update(block)
        found = digest.hexdigest()
        if not found.startswith(expected):
            return f"{algorithm} is {found[: max(len(expected), 8)]}... and should be {expected}"
    return ""


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0


@contextmanager
def _bar(name: str, total: int, have: int) -> Iterator[Any]:
    """A progress bar in bytes, on stderr; where stderr is no terminal, one line."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        size = f"{total / 1e6:.0f} MB" if total else "size unknown"
        print(f"downloading {name} ({size}{f', from byte {have}' if have else ''})", file=sys.stderr, flush=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=total or None, completed=have)
        yield lambda count: bar.advance(task, count)
