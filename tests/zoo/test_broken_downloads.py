"""Servers, disks and files as they should not be: the right weights, or one line that names what, where and a way out.

What stands in the cache under a name is always whole and the network of that name.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch

import cascade_rcnn
import locations
import zoo_fixtures
from cascade_rcnn.checkpoint import load_checkpoint
from cascade_rcnn.config import ModelConfig
from cascade_rcnn.errors import CheckpointError, UserError
from cascade_rcnn.models.build import build_model
from cascade_rcnn.zoo import store
from cascade_rcnn.zoo.command import run_models
from foreign_checkpoints import mmdetection_name, small_state
from loopback import NAME, Server, set_list

checkpoint, server, zoo = zoo_fixtures.checkpoint, zoo_fixtures.server, zoo_fixtures.zoo


def _models(tmp_path: Path) -> Path:
    folder = tmp_path / "cache" / "models"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _is_whole() -> bool:
    return load_checkpoint(store.by_name(NAME)).class_names == ("cat", "dog", "eel")


def _arrives(server: Server) -> bool:
    """Without converting it, which takes its time."""
    with store.fetched(NAME) as file:
        return file.read_bytes() == server.content


def _refused() -> str:
    """The one line."""
    with pytest.raises(CheckpointError) as caught:
        cascade_rcnn.load(NAME)
    said = str(caught.value)
    assert "\n" not in said
    return said


# Answers


def _packed(content: bytes, encoding: str, *, cut: int | None = None) -> Callable[[BaseHTTPRequestHandler], None]:
    body = gzip.compress(content, 0) if encoding == "gzip" else zlib.compress(content, 0)

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(206 if "Range" in handler.headers else 200)
        handler.send_header("Content-Encoding", encoding)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[:cut])
        handler.close_connection = True

    return answer


def _chunked(content: bytes, *, whole: bool = True) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for at in range(0, len(content), 1 << 20):
            block = content[at : at + (1 << 20)]
            handler.wfile.write(f"{len(block):x}\r\n".encode() + block + b"\r\n")
        handler.wfile.write(b"0\r\n\r\n" if whole else b"")
        handler.close_connection = True

    return answer


def _plain(
    body: bytes, *, status: int = 200, length: int | None = None, **headers: str
) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        if length is not None:
            handler.send_header("Content-Length", str(length))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        with contextlib.suppress(ConnectionError):
            handler.wfile.write(body)
        handler.close_connection = True

    return answer


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_packed_answer_that_nobody_asked_for_is_unpacked(zoo: dict[str, Any], server: Server, encoding: str) -> None:
    server.answers = [_packed(server.content, encoding)]
    assert _arrives(server)


def test_a_packed_answer_that_breaks_off_is_fetched_again(zoo: dict[str, Any], server: Server) -> None:
    server.answers = [_packed(server.content, "gzip", cut=100_000), _packed(server.content, "gzip")]
    assert _arrives(server)


def test_a_packed_answer_does_not_continue_a_part(zoo: dict[str, Any], server: Server, tmp_path: Path) -> None:
    (_models(tmp_path) / f"{NAME}.pth.part").write_bytes(server.content[:5000])
    server.answers = [_packed(server.content, "gzip")] * 2
    assert _arrives(server) and [wanted for _, wanted in server.requests] == ["bytes=5000-", ""]


def test_a_packed_answer_that_is_damaged_is_one_line(zoo: dict[str, Any], server: Server, tmp_path: Path) -> None:
    server.answers = [_plain(b"not gzip", Content_Encoding="gzip")] * 4
    assert "cannot be unpacked" in _refused() and not list(_models(tmp_path).iterdir())


def test_an_unknown_packing_is_refused(zoo: dict[str, Any], server: Server) -> None:
    server.answers = [_plain(b"x", Content_Encoding="br")]
    said = _refused()
    assert zoo["url"] in said and "packs its answer (br)" in said and "CASCADE_RCNN_MIRROR" in said


@pytest.mark.parametrize("whole", [True, False])
def test_a_chunked_answer(zoo: dict[str, Any], server: Server, whole: bool) -> None:
    server.answers = [_chunked(server.content, whole=whole)]
    assert _arrives(server) and len(server.requests) == 2 - whole


def test_a_length_that_is_too_large_is_no_reason_to_refuse_the_right_file(zoo: dict[str, Any], server: Server) -> None:
    content = server.content
    server.answers = [
        _plain(content, length=len(content) + 10),
        _plain(b"", status=416, Content_Range=f"bytes */{len(content)}"),
    ]
    assert _arrives(server)


def test_a_length_that_is_too_small_names_both_digests(zoo: dict[str, Any], server: Server, tmp_path: Path) -> None:
    server.answers = [_plain(server.content, length=1000)]
    said = _refused()
    assert "1000 bytes came from" in said and zoo["hash"] in said and zoo["url"] in said
    assert not list(_models(tmp_path).iterdir())
    assert _arrives(server)


@pytest.mark.parametrize("length", ["-5", "many", "1e9"])
def test_a_length_that_is_no_number_is_not_used(zoo: dict[str, Any], server: Server, length: str) -> None:
    server.answers = [_plain(server.content, Content_Length=length)]
    assert _arrives(server)


def test_a_server_that_answers_from_elsewhere(zoo: dict[str, Any], server: Server, tmp_path: Path) -> None:
    """It says 206 and sends the file from its beginning."""
    (_models(tmp_path) / f"{NAME}.pth.part").write_bytes(server.content[:5000])
    length = len(server.content)
    server.answers = [_plain(server.content, status=206, Content_Range=f"bytes 0-{length - 1}/{length}")]
    assert _arrives(server) and [wanted for _, wanted in server.requests] == ["bytes=5000-", ""]


def test_a_part_that_is_longer_than_the_file_is_begun_again(
    zoo: dict[str, Any], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a digest only the length tells that it is another file's."""
    set_list(monkeypatch, tmp_path / "list.json", {key: value for key, value in zoo.items() if "hash" not in key})
    length = len(server.content)
    (_models(tmp_path) / f"{NAME}.pth.part").write_bytes(b"x" * (length + 9))
    server.answers = [_plain(b"", status=416, Content_Range=f"bytes */{length}")]
    assert _arrives(server) and [wanted for _, wanted in server.requests] == [f"bytes={length + 9}-", ""]


def test_a_redirection_in_a_circle(zoo: dict[str, Any], server: Server) -> None:
    server.answers = [_plain(b"", status=302, Location=zoo["url"])] * 40
    said = _refused()
    assert zoo["url"] in said and "answers 302" in said and "CASCADE_RCNN_MIRROR" in said


def test_a_redirection_to_a_file_of_this_machine_is_not_followed(
    zoo: dict[str, Any], server: Server, checkpoint: Path
) -> None:
    server.answers = [_plain(b"", status=302, Location=checkpoint.as_uri())]
    assert "not allowed" in _refused()


def test_a_redirection_is_followed(zoo: dict[str, Any], server: Server) -> None:
    server.answers = [_plain(b"", status=302, Location=f"{server.address}/elsewhere/x.pth")]
    assert _arrives(server) and server.requests[1][0] == "/elsewhere/x.pth"


@pytest.mark.parametrize("status", [500, 502, 503, 429, 408])
def test_a_server_in_trouble_is_asked_again(zoo: dict[str, Any], server: Server, status: int) -> None:
    server.answers = [status, status]
    assert _arrives(server) and len(server.requests) == 3


@pytest.mark.parametrize("status", [401, 403, 404, 410, 416, 451])
def test_a_server_that_refuses_is_quoted_with_a_way_out_and_the_next_command_succeeds(
    zoo: dict[str, Any], server: Server, status: int
) -> None:
    server.answers = [status]
    said = _refused()
    assert f"{zoo['url']} answers {status}" in said and "CASCADE_RCNN_MIRROR" in said and len(server.requests) == 1
    assert _arrives(server)


def test_nothing_but_trouble_is_one_line(zoo: dict[str, Any], server: Server) -> None:
    server.status = 500
    said = _refused()
    assert zoo["url"] in said and "Internal Server Error" in said and len(server.requests) == 4


@pytest.mark.parametrize("body", [b"<!DOCTYPE html><html>log in</html>", b'{"error": "quota"}', b""])
def test_something_else_that_is_called_a_file(
    zoo: dict[str, Any], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    server.answers = [_plain(body, length=len(body), Content_Type="application/octet-stream")]
    assert zoo["hash"] in _refused() and not list(_models(tmp_path).iterdir())
    set_list(monkeypatch, tmp_path / "list.json", {key: value for key, value in zoo.items() if "hash" not in key})
    server.answers = [_plain(body, length=len(body), Content_Type="application/octet-stream")]
    said = _refused()
    assert f"{NAME}.pth" in said and "delete it, to fetch it again" in said
    (_models(tmp_path) / f"{NAME}.pth").unlink()
    assert _arrives(server)


def test_a_connection_that_closes_without_a_word(zoo: dict[str, Any], server: Server) -> None:
    server.answers = [lambda handler: handler.connection.close() or None] * 1
    assert _arrives(server)


@pytest.mark.parametrize("proxy", ["http://me:secret@127.0.0.1:1", "http://me:secret@host:port", "::bad"])
def test_a_proxy_that_does_not_work_is_named_without_its_password(
    zoo: dict[str, Any], monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    monkeypatch.setattr("urllib.request._opener", None)  # it has looked for proxies once
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    said = _refused()
    assert f"through the proxy {proxy.rpartition('@')[2]} of http_proxy" in said and "secret" not in said


# Mirrors


@pytest.mark.parametrize("spelling", ["{}", "{}/", "{}//", " {} ", "file://{}", "file://{}/"])
def test_spellings_of_a_mirror_folder(
    zoo: dict[str, Any], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    mirror = tmp_path / "my mirror"
    mirror.mkdir()
    (mirror / f"{NAME}.pth").write_bytes(server.content)
    monkeypatch.setenv("CASCADE_RCNN_MIRROR", spelling.format(mirror))
    assert _arrives(server) and not server.requests


@pytest.mark.parametrize("place", ["/no/such/folder", "mirror.example/weights", "file:///no/such/folder"])
def test_a_mirror_that_is_not_there(zoo: dict[str, Any], monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setenv("CASCADE_RCNN_MIRROR", place)
    said = _refused()
    assert place.removeprefix("file://") in said and "check CASCADE_RCNN_MIRROR" in said
    assert ("an address begins with https://" in said) == ("://" not in place)


@pytest.mark.parametrize(
    "place", ["http://[half", "http://host:port", "ftq://host", "http://127.0.0.1:1/größe", "http://a b"]
)
def test_a_mirror_that_is_no_address(zoo: dict[str, Any], monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setenv("CASCADE_RCNN_MIRROR", place)
    said = _refused()
    assert place.split("//")[1][:4] in said and "CASCADE_RCNN_MIRROR" in said


def test_a_wrong_file_in_a_mirror_is_named_and_stays(
    zoo: dict[str, Any], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = tmp_path / "mirror" / f"{NAME}.pth"
    wrong.parent.mkdir()
    wrong.write_bytes(b"another")
    monkeypatch.setenv("CASCADE_RCNN_MIRROR", str(wrong.parent))
    said = _refused()
    assert str(wrong) in said and zoo["hash"] in said and "replace that file" in said
    assert wrong.read_bytes() == b"another" and not list(_models(tmp_path).iterdir())


# The cache


def test_a_full_disk_keeps_what_came(zoo: dict[str, Any], server: Server, tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full")
    part = _models(tmp_path) / f"{NAME}.pth.part"
    part.symlink_to(full)
    said = _refused()
    assert str(part) in said and "No space left" in said and "CASCADE_RCNN_CACHE" in said
    part.unlink()
    assert _is_whole()


def test_a_disk_that_is_full_at_the_conversion_keeps_the_download(
    zoo: dict[str, Any], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("cascade_rcnn.checkpoint.save_file", full)
        said = _refused()
    assert "No space left" in said and "CASCADE_RCNN_CACHE" in said and "is kept" in said
    assert [path.name for path in _models(tmp_path).iterdir()] == [f"{NAME}.pth"]
    assert _is_whole() and len(server.requests) == 1


def test_a_cache_that_can_only_be_read_gives_what_it_has(
    zoo: dict[str, Any], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.by_name(NAME)
    opened = Path.open

    def refuse(self: Path, mode: str = "r", **given: Any) -> Any:
        if self.is_relative_to(tmp_path / "cache") and set(mode) & set("wax+"):
            raise OSError(30, "Read-only file system")
        return opened(self, mode, **given)

    monkeypatch.setattr(Path, "open", refuse)
    assert _is_whole()
    (_models(tmp_path) / f"{NAME}.safetensors").unlink()
    said = _refused()
    assert str(_models(tmp_path)) in said and "Read-only file system" in said and "CASCADE_RCNN_CACHE" in said


@pytest.mark.parametrize("place", ["cache", "cache/models"])
def test_a_file_in_the_caches_place(zoo: dict[str, Any], tmp_path: Path, place: str) -> None:
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    said = _refused()
    assert str(tmp_path / "cache" / "models") in said and "CASCADE_RCNN_CACHE" in said and path.read_text() == "mine"


def test_a_file_system_without_locks_is_told(
    zoo: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def none(descriptor: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    assert _is_whole() and "has no locks" in capsys.readouterr().err


def _half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _nothing(content: bytes) -> bytes:
    return b""


def _no_header(content: bytes) -> bytes:
    return content[:8] + b"x" * 100 + content[108:]


def _another_byte(content: bytes) -> bytes:
    middle = len(content) * 3 // 4
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    ("damage", "by_path"),
    [(_half, False), (_nothing, False), (_no_header, False), (_another_byte, False), (_half, True)],
)
def test_weights_that_are_damaged_in_the_cache_are_fetched_anew(
    zoo: dict[str, Any],
    server: Server,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[bytes], bytes],
    by_path: bool,
) -> None:
    kept = store.by_name(NAME)
    kept.write_bytes(damage(kept.read_bytes()))
    capsys.readouterr()
    assert cascade_rcnn.load(kept if by_path else NAME, device="cpu").class_names == ("cat", "dog", "eel")
    assert load_checkpoint(kept).class_names == ("cat", "dog", "eel")
    said = capsys.readouterr().err
    assert said.count(": it is fetched anew\n") == 1 and str(kept) in said and len(server.requests) == 2


def test_weights_that_are_damaged_stay_until_others_are_there(
    zoo: dict[str, Any], server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = store.by_name(NAME)
    kept.write_bytes(b"damaged")
    server.status = 404
    capsys.readouterr()
    said = _refused()
    assert zoo["url"] in said and "CASCADE_RCNN_MIRROR" in said and kept.read_bytes() == b"damaged"
    assert f"{kept}: not a readable safetensors file" in capsys.readouterr().err


def test_one_of_many_is_cleared_by_its_name(
    zoo: dict[str, Any],
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = f"other_{NAME}"  # has the other's whole name in it
    set_list(monkeypatch, tmp_path / "list.json", zoo, zoo | {"name": other, "also": []})
    for name in (NAME, other):
        (_models(tmp_path) / f"{name}.safetensors").write_bytes(b"kept")
        (_models(tmp_path) / f"{name}.pth.part").write_bytes(b"began")
    run_models(["other"], cache="show")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:-1]] == [other]
    with pytest.raises(UserError, match="no published weights have 'nobody' in their name"):
        run_models(["nobody"], cache="clear")
    assert len(list(_models(tmp_path).iterdir())) == 4
    run_models([NAME], cache="clear")
    assert sorted(path.name for path in _models(tmp_path).iterdir()) == [f"{other}.pth.part", f"{other}.safetensors"]


# Processes that die or come at once

_PROCESS = """
import os, signal, sys
from pathlib import Path
from cascade_rcnn.zoo import catalog, store
catalog._LIST = Path(sys.argv[1])
if "die" in sys.argv:
    import cascade_rcnn.checkpoint
    def half(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    cascade_rcnn.checkpoint.save_file = half
print(store.by_name(sys.argv[2]))
"""


def _start(tmp_path: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _PROCESS, str(tmp_path / "published.json"), NAME, *words]
    environment = os.environ | {"PYTHONPATH": str(locations.REPOSITORY), "CASCADE_RCNN_CACHE": str(tmp_path / "cache")}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _wait(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        threading.Event().wait(0.02)  # time.sleep is patched


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_killed_while_it_downloads_the_one_that_waits_goes_on(
    zoo: dict[str, Any], server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.go_on.clear()
    part = _models(tmp_path) / f"{NAME}.pth.part"
    first = _start(tmp_path)
    _wait(lambda: part.is_file() and part.stat().st_size > 0)

    def kill() -> None:
        first.send_signal(signal.SIGKILL)
        first.communicate(timeout=60)
        server.go_on.set()

    threading.Timer(1.0, kill).start()
    assert _is_whole() and "waiting for another process that fetches" in capsys.readouterr().err
    assert len(server.requests) == 2 and server.requests[1][1].startswith("bytes=")
    kept = sorted(path.name for path in _models(tmp_path).iterdir())
    assert kept == [f"{NAME}.safetensors", f"{NAME}.txt"]


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_killed_while_it_converts_the_next_one_needs_no_network(
    zoo: dict[str, Any], server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dead = _start(tmp_path, "die")
    dead.communicate(timeout=120)
    assert dead.returncode == -signal.SIGKILL and not (_models(tmp_path) / f"{NAME}.safetensors").exists()
    (_models(tmp_path) / f".{NAME}.unproven.safetensors").write_bytes(b"killed a moment later")
    assert store.cached() == {}
    run_models(cache="show")
    assert "files that were not converted" in capsys.readouterr().out
    server.status = 500
    assert _is_whole() and len(server.requests) == 1
    assert sorted(path.name for path in _models(tmp_path).iterdir()) == [f"{NAME}.safetensors", f"{NAME}.txt"]


@pytest.mark.skipif(os.name == "nt", reason="locks of POSIX")
def test_clearing_the_cache_leaves_what_another_process_fetches(
    zoo: dict[str, Any], server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.go_on.clear()
    (_models(tmp_path) / "old.safetensors").write_bytes(b"old")
    part = _models(tmp_path) / f"{NAME}.pth.part"
    fetching = _start(tmp_path)
    _wait(lambda: part.is_file() and part.stat().st_size > 0)
    run_models(cache="clear")
    assert f"another process is fetching them: {NAME}" in capsys.readouterr().out
    assert not (_models(tmp_path) / "old.safetensors").exists()
    assert part.is_file()
    fetching.send_signal(signal.SIGKILL)
    fetching.communicate(timeout=60)
    server.go_on.set()
    assert _is_whole() and server.requests[1][1].startswith("bytes=")


def test_a_cache_that_cannot_be_cleared_is_one_line(
    zoo: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store.by_name(NAME)

    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(CheckpointError, match=rf"{NAME}.safetensors: cannot be deleted \(Permission denied\)"):
        run_models(cache="clear")


def test_a_cache_that_cannot_be_read_is_one_line(
    zoo: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _models(tmp_path)

    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    for words in ("show", "clear", ""):
        with pytest.raises(CheckpointError, match=rf"{folder}: cannot be read \(Permission denied\)"):
            run_models(cache=words)


# Files that are not what they are called


def _published_as(
    zoo: dict[str, Any], server: Server, content: bytes, tmp_path: Path, patch: pytest.MonkeyPatch, **changes: str
) -> None:
    server.content = content
    digest = hashlib.sha256(content).hexdigest()
    set_list(patch, tmp_path / "list.json", zoo | {"hash": digest[:8], "sha256": digest} | changes)


class _Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_hostile_file_with_the_right_digest_runs_nothing(
    zoo: dict[str, Any], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    hit = tmp_path / "hit"
    if form == "pickle":
        content = pickle.dumps(_Hostile(hit))
    else:
        torch.save({"state_dict": _Hostile(hit), "meta": {}}, tmp_path / "hostile.pth")
        content = (tmp_path / "hostile.pth").read_bytes()
    _published_as(zoo, server, content, tmp_path, monkeypatch)
    said = _refused()
    assert not hit.exists() and f"{NAME}.pth" in said and "its digest is right" in said
    assert not (_models(tmp_path) / f"{NAME}.safetensors").exists()


def test_another_architecture_under_the_right_digest_is_refused(
    zoo: dict[str, Any], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(backbone="resnet34", fpn_channels=32, head_channels=16)
    state = {mmdetection_name(key): value for key, value in build_model(config, 3).state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "other.pth")
    content = (tmp_path / "other.pth").read_bytes()
    _published_as(zoo, server, content, tmp_path, monkeypatch, backbone="r18")
    said = _refused()
    assert "another network than its name says (no masks, the backbone resnet34 instead of resnet18)" in said
    assert sorted(path.name for path in _models(tmp_path).iterdir()) == [f"{NAME}.pth"]


def test_a_network_without_counterpart_under_the_right_digest_is_refused(
    zoo: dict[str, Any], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = small_state() | {"roi_head.semantic_head.conv_logits.weight": torch.zeros(1)}
    torch.save({"state_dict": state}, tmp_path / "other.pth")
    content = (tmp_path / "other.pth").read_bytes()
    _published_as(zoo, server, content, tmp_path, monkeypatch)
    said = _refused()
    assert f"{NAME}.pth" in said and "no counterpart" in said and "cascade-rcnn models" in said
