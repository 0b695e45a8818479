"""735 kinds of hostile input against a running service: damaged pictures, bombs, broken forms, fields and HTTP.

    python3 benchmarks/serve_hostile.py CHECKPOINT

starts ``cascade-rcnn serve`` on a free port of this machine and sends each kind over a connection of its own. A kind
passes if its answer is none of the service's failures (500), names no path and no traceback, is a problem in JSON of
one line unless it is a success, and if ``/health`` answers within 2 seconds right after. Everything is made from a
seed. Ends with 1 if a kind fails, and prints it.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import signal
import socket
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))

from serve_process import Service

Wire = bytes | Callable[[socket.socket], None]  # what is sent; or what is done with the connection
HOST = b"Host: localhost\r\nConnection: close\r\n"


@dataclass(frozen=True)
class Kind:
    """One kind of input; ``silent``: the client leaves or breaks off, so that no answer is right too."""

    name: str
    wire: Wire
    silent: bool = False


def request(
    body: bytes, kind: bytes = b"", *, target: bytes = b"/predict", method: bytes = b"POST", headers: bytes = b""
) -> bytes:
    """A request as it goes over the wire."""
    typed = b"Content-Type: " + kind + b"\r\n" if kind else b""
    length = b"Content-Length: %d\r\n" % len(body)
    return method + b" " + target + b" HTTP/1.1\r\n" + HOST + typed + headers + length + b"\r\n" + body


def form(*parts: bytes, end: bytes = b"--b--\r\n", boundary: bytes = b"b", kind: bytes = b"") -> bytes:
    """A request with a multipart form; each part is its headers and content."""
    body = b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts) + end
    return request(body, kind or b"multipart/form-data; boundary=" + boundary)


def part(content: bytes, disposition: bytes = b'form-data; name="file"; filename="a.png"', more: bytes = b"") -> bytes:
    """A part of a form."""
    return b"Content-Disposition: " + disposition + b"\r\n" + more + b"\r\n" + content


def picture(kind: str = "PNG", size: tuple[int, int] = (64, 48), mode: str = "RGB", **options: object) -> bytes:
    """A small picture of noise and a gradient."""
    rng = np.random.default_rng(0)
    pixels = (rng.integers(0, 60, (size[1], size[0], 3)) + np.linspace(0, 190, size[0])[:, None]).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(content, kind, **options)
    return content.getvalue()


def _damages(rng: random.Random, whole: bytes) -> Iterator[tuple[str, bytes]]:
    size = len(whole)
    for share in (0.02, 0.1, 0.3, 0.5, 0.9, 0.99):
        yield f"truncated at {share:.0%}", whole[: max(1, int(size * share))]
    yield "last byte missing", whole[:-1]
    yield "first byte missing", whole[1:]
    yield "tail only", whole[size // 2 :]
    yield "doubled", whole + whole
    yield "reversed", whole[::-1]
    yield "halves swapped", whole[size // 2 :] + whole[: size // 2]
    yield "garbage behind", whole + rng.randbytes(5000)
    yield "garbage in front", rng.randbytes(3) + whole
    for name, fill in (("zeros", b"\0"), ("ones", b"\xff")):
        yield f"{name} in the middle", whole[: size // 2] + fill * (size // 4) + whole[3 * size // 4 :]
        yield f"{name} in the header", whole[:12] + fill * 12 + whole[24:]
    for name, low, high, count in (
        ("header", 4, 60, 4),
        ("header", 4, 60, 20),
        ("body", 60, size, 10),
        ("body", 60, size, 200),
    ):
        content = bytearray(whole)
        for _ in range(count):
            content[rng.randrange(low, min(high, size))] = rng.randrange(256)
        yield f"{count} bytes of the {name} changed", bytes(content)
    at = rng.randrange(30, size)
    yield "bytes cut out", whole[:at] + whole[at + 17 :]
    yield "bytes put in", whole[:at] + rng.randbytes(17) + whole[at:]


def damaged(rng: random.Random) -> Iterator[Kind]:
    """Files of all formats, damaged in all ways."""
    wholes = {
        "jpeg": picture("JPEG"),
        "progressive jpeg": picture("JPEG", progressive=True),
        "png": picture(),
        "palette png": picture(mode="P"),
        "webp": picture("WEBP"),
        "lossless webp": picture("WEBP", lossless=True),
        "gif": picture("GIF"),
        "bmp": picture("BMP"),
        "tiff": picture("TIFF"),
        "lzw tiff": picture("TIFF", compression="tiff_lzw"),
        "avif": picture("AVIF"),
    }
    for kind, whole in wholes.items():
        for name, content in _damages(rng, whole):
            yield Kind(f"{kind}, {name}", request(content, b"image/" + kind.split()[-1].encode()))


def _chunk(kind: bytes, content: bytes, crc: int | None = None) -> bytes:
    checked = zlib.crc32(kind + content) if crc is None else crc
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checked)


def _png(width: int, height: int, *chunks: bytes, depth: int = 8, colours: int = 2) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + _chunk(b"IEND", b"")


def _tiff(*tags: tuple[int, int, int, int], after: int = 0) -> bytes:
    rows = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + rows + struct.pack("<I", after)


def _with_jpeg_size(width: int, height: int) -> bytes:
    whole = picture("JPEG")
    at = whole.index(b"\xff\xc0") + 5
    return whole[:at] + struct.pack(">HH", height, width) + whole[at + 4 :]


def _many_scans() -> bytes:
    whole = picture("JPEG", progressive=True)
    first = whole.index(b"\xff\xda")
    second = whole.index(b"\xff\xda", first + 2)
    return whole[:second] + whole[first:second] * 5000 + whole[second:]


def bombs(rng: random.Random) -> Iterator[Kind]:
    """Files that are small and would become large, slow or odd."""
    idat = _chunk(b"IDAT", zlib.compress(bytes(64 * 193)))
    size = ((256, 4, 1), (257, 4, 1))
    contents = {
        "png of 60,000 x 60,000": _png(60000, 60000, idat),
        "png of 2^31 - 1 squared": _png(2**31 - 1, 2**31 - 1, idat),
        "png of 2^32 - 1": _png(2**32 - 1, 1, idat),
        "png of 0 x 0": _png(0, 0, idat),
        "png without pixels": _png(64, 64),
        "png of 40 megapixels, no data": _png(8000, 5000, idat),
        "png with text of 60 MB": _png(64, 64, _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(60_000_000), 9)), idat),
        "png with a profile of 60 MB": _png(
            64, 64, _chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(60_000_000), 9)), idat
        ),
        "png with pixels of 300 MB": _png(64, 64, _chunk(b"IDAT", zlib.compress(bytes(300_000_000), 9))),
        "png with 50,000 chunks": _png(64, 64, *[_chunk(b"tEXt", b"k\0v")] * 50_000, idat),
        "png with wrong checksums": _png(64, 64, _chunk(b"IDAT", b"", 1), idat),
        "png with a chunk of 4 GB": b"\x89PNG\r\n\x1a\n\xff\xff\xff\xffIHDR" + bytes(40),
        "png, depth 3": _png(64, 64, idat, depth=3),
        "png, colours 7": _png(64, 64, idat, colours=7),
        "png of 16 bits": picture(mode="I;16"),
        "palette png without a palette": _png(64, 64, idat, colours=3),
        "apng that says 2^32 - 1 frames": _png(64, 64, _chunk(b"acTL", b"\xff" * 8), idat),
        "jpeg of 65,500 x 65,500": _with_jpeg_size(65500, 65500),
        "jpeg of 0 x 0": _with_jpeg_size(0, 0),
        "jpeg of 7,000 x 7,000, no data": _with_jpeg_size(7000, 7000),
        "jpeg of 5,000 scans": _many_scans(),
        "jpeg of inks": picture("JPEG", mode="CMYK"),
        "jpeg, exif garbage": picture("JPEG", exif=b"Exif\0\0II*\0" + rng.randbytes(3000)),
        "jpeg, exif that points at itself": picture(
            "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0" + b"\xff\xff" + b"\x08\0\0\0" * 400
        ),
        "jpeg, profile garbage": picture("JPEG", icc_profile=rng.randbytes(60_000)),
        "jpeg, markers only": b"\xff\xd8" + b"\xff\xe0\x00\x02" * 50_000 + b"\xff\xd9",
        "gif of 65,535 x 65,535": b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\x08\0;",
        "gif, frame outside": b"GIF89a\x10\0\x10\0\x80\0\0"
        + bytes(6)
        + b",\xf0\xff\xf0\xff\xff\xff\xff\xff\0\x02\x02D\x01\0;",
        "gif without frames": b"GIF89a\x10\0\x10\0\x80\0\0" + bytes(6) + b";",
        "bmp of 2^31 - 1": picture("BMP")[:18] + struct.pack("<ii", 2**31 - 1, 2**31 - 1) + picture("BMP")[26:],
        "bmp of negative width": picture("BMP")[:18] + struct.pack("<ii", -64, 48) + picture("BMP")[26:],
        "bmp of negative height": picture("BMP")[:18] + struct.pack("<ii", 64, -48) + picture("BMP")[26:],
        "tiff of 4 gigapixels": _tiff(
            (256, 4, 1, 65535), (257, 4, 1, 65535), (258, 3, 1, 8), (273, 4, 1, 8), (279, 4, 1, 9)
        ),
        "tiff, tag of 2^32 - 1 values": _tiff(*((a, b, c, 64) for a, b, c in size), (273, 4, 2**32 - 1, 8)),
        "tiff whose directory is its next": _tiff((256, 4, 1, 64), after=8),
        "tiff without tags": _tiff(),
        "tiff, directory outside": b"II*\0\xff\xff\xff\xff",
        "tiff of floats": picture("TIFF", mode="F"),
        "bigtiff head": b"II+\0\x08\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff",
        "webp that says 16,384 squared": b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0\x2f\xff\xff\xff\x0f" + bytes(9),
        "webp, riff of 4 GB": b"RIFF\xff\xff\xff\xffWEBPVP8 \xff\xff\xff\xff",
        "one pixel": picture(size=(1, 1)),
        "a line of 30,000 pixels": picture(size=(30_000, 1)),
        "a column of 30,000 pixels": picture(size=(1, 30_000)),
    }
    for magic, name in ((b"%PDF-1.7\n", "pdf"), (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "eps"),
        (b"PK\x03\x04", "zip"),
                        (b"\x1f\x8b\x08", "gzip"), (b"\x7fELF", "elf"), (b"8BPS\0\1", "psd"), (b"\0\0\1\0\1\0",
                        "ico"),
                        (b"\0\0\0\x18ftypheic", "heic"), (b"\0\0\0\x0cjP  \r\n\x87\n", "jpeg 2000"), (b"BM",
                        "bmp head"),
                        (b"SIMPLE  =   T", "fits"), (b"P6\n9999999 9999999\n255\n", "ppm"), (b"\xd7\xcd\xc6\x9a",
                        "wmf"),
                        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "svg"), (b"<!DOCTYPE a [<!ENTITY b 'c'>]>",
                        "xml"),
                        (b"<script>alert(1)</script>", "html"), (b"import os\n", "python"), (b"\x80\x04\x95",
                        "pickle"),
                        (b"", "random bytes"), (bytes(100), "zeros")):  # fmt: skip
        contents[f"no picture but {name}"] = magic + rng.randbytes(400)
    for name, content in contents.items():
        yield Kind(name, request(content, b"application/octet-stream"))


def forms(rng: random.Random) -> Iterator[Kind]:
    """Multipart forms: broken, with odd names and charsets, with too much."""
    png, multipart = picture(), b"multipart/form-data"
    whole = part(png)
    names = [b"../../etc/passwd", b"..\\..\\boot.ini", b"/etc/shadow", b"C:\\a.png", b"a\0.png", b"%00",
        b"%2e%2e%2fa", b"", b".", b"..",
             b"a" * 10_000, b"<script>alert(1)</script>", b"\x1b[31mred", b"a\rb", b"\xff\xfe\xfd",
             b"\xed\xa0\x80", "\u202egnp.exe".encode(),
             "\U0001f600".encode() * 50, b"a\\\"b", b"a;b=c", b"{{7*7}}", b"${jndi:ldap://x}", b"%s%n%x", b"CON",
                 b"/proc/self/environ"]  # fmt: skip
    for name in names:
        yield Kind(f"file name {name[:30]!r}", form(part(png, b'form-data; name="file"; filename="' + name + b'"')))
        yield Kind(
            f"no picture, file name {name[:30]!r}", form(part(b"x", b'form-data; name="f"; filename="' + name + b'"'))
        )
    for charset in (b"utf-7", b"utf-16", b"utf-32", b"punycode", b"idna", b"unicode_escape",
        b"raw_unicode_escape", b"undefined",
                    b"zlib", b"rot13", b"base64", b"mbcs", b"../../x", b"a\xe9", b"", b"x" * 3000, b"utf-8\\0",
                    b"cp65001"):  # fmt: skip
        kind = multipart + b'; boundary=b; charset="' + charset + b'"'
        yield Kind(
            f"charset {charset[:20]!r}",
            form(part(png, b'form-data; name="\xff\xd8"; filename="\\ud800\xff"'), kind=kind),
        )
    for boundary in (b"", b" ", b"a" * 5000, b"\xff\xff", b'"', b'"b', b"b b", b"--", b"(b)", b"b;boundary=c", b"\t"):
        yield Kind(f"boundary {boundary[:10]!r}", form(whole, kind=multipart + b"; boundary=" + boundary))
    parts = {
        "no boundary": form(whole, kind=multipart),
        "no end": form(whole, end=b""),
        "half an end": form(whole, end=b"--b"),
        "nothing": request(b"", multipart + b"; boundary=b"),
        "end only": form(),
        "preamble only": request(b"hello" * 100, multipart + b"; boundary=b"),
        "nested": form(b"Content-Type: multipart/mixed; boundary=c\r\n\r\n--c\r\n" + whole + b"\r\n--c--"),
        "17 files": form(*[whole] * 17),
        "17 fields": form(*[part(b"x", b'form-data; name="a"')] * 17),
        "5,000 fields": form(*[part(b"x", b'form-data; name="a"')] * 5000),
        "a field of 2 MB": form(part(bytes(2_000_000), b'form-data; name="a"')),
        "a field and no file": form(part(b"x", b'form-data; name="file"')),
        "no name": form(part(png, b'form-data; filename="a.png"')),
        "no disposition": form(b"Content-Type: image/png\r\n\r\n" + png),
        "no headers": form(b"\r\n" + png),
        "two dispositions": form(part(png, more=b'Content-Disposition: form-data; name="b"\r\n')),
        "disposition of 50 kB": form(part(png, b'form-data; name="' + b"a" * 50_000 + b'"; filename="b"')),
        "1,000 headers of a part": form(part(png, more=b"X-A: b\r\n" * 1000)),
        "a header without a colon": form(part(png, more=b"X\r\n")),
        "a header name with blanks": form(part(png, more=b"X Y: z\r\n")),
        "attachment": form(part(png, b'attachment; name="a"; filename="b"')),
        "filename*": form(part(png, b"form-data; name=\"a\"; filename*=utf-8''%ff%fe%00..%2f")),
        "filename* of an odd charset": form(part(png, b"form-data; name=\"a\"; filename*=undefined''%ff")),
        "filename without quotes": form(part(png, b"form-data; name=a; filename=../b")),
        "base64": form(part(b"iVBORw0KGgo=", more=b"Content-Transfer-Encoding: base64\r\n")),
        "line feeds only": form(whole).replace(b"\r\n--b", b"\n--b"),
        "an empty file": form(part(b"")),
        "a good and a damaged file": form(whole, part(png[:50])),
        "16 good files": form(*[whole] * 16),
        "the boundary within a file": form(part(png + b"\r\n--b\r\n" + png)),
        "random bytes": request(rng.randbytes(3000), multipart + b"; boundary=b"),
    }
    for name, wire in parts.items():
        yield Kind(f"form: {name}", wire)
    for kind in (b"application/x-www-form-urlencoded", b"text/html", b"application/xml", b"image/svg+xml",
        b"a" * 5000, b"/", b";", b"\xff",
                 b"multipart/mixed; boundary=b", b"multipart/byteranges", b"MULTIPART/FORM-DATA; BOUNDARY=b",
                 b"application/json"):  # fmt: skip
        yield Kind(f"content type {kind[:30]!r}, a form", form(whole, kind=kind))
        yield Kind(f"content type {kind[:30]!r}, text", request(b"a=b&c=d", kind))


def fields(rng: random.Random) -> Iterator[Kind]:
    """Parameters of the query, and bodies in JSON."""
    numbers = (b"-1", b"2", b"nan", b"inf", b"-inf", b"1e400", b"1e-400", b"0x1", b"1_0", b"%2b1", b"", b"%00",
        b"a", b"%ff", b"9" * 5000,
               b"1;2", b"[]", b"null", b"true", b"-0", b"%d9%a3", b"0.5%0a", b"'or 1=1--")  # fmt: skip
    for name in (b"score", b"stages", b"masks"):
        for value in numbers:
            target = b"/predict?" + name + b"=" + value
            yield Kind(f"{name.decode()}={value[:12]!r}", request(picture(), b"image/png", target=target))
    for query in (b"score=1&score=2", b"&&&&", b"=", b"score", b"%", b"%zz=%zz", b"a=" + b"b" * 30_000,
        b"&".join([b"a=1"] * 5000), b"score[]=1", b"?score=1",
                  b"__proto__=1", b"model=/etc/passwd"):  # fmt: skip
        yield Kind(f"query {query[:12]!r}", request(picture(), target=b"/predict?" + query))
    urls = ["http://127.0.0.1/", "file:///etc/passwd", "http://169.254.169.254/", "http://[", "http://[::1]/",
        "http://a:b@c:99999/", "", " ", "\ud800",
            "http://" + "a" * 5000, "gopher://a", "http://0x7f.1/", "//a", "http://\x00", 5, None, [], {}, True,
                1e308]  # fmt: skip
    bodies = [json.dumps({"url": url}).encode() for url in urls]
    bodies += [b"", b"{", b"null", b"[]", b'"url"', b"5", b"NaN", b"[" * 9999, b'{"url":' * 1000, b'{"a":1}',
        b"\xff\xfe", b"\xef\xbb\xbf{}",
               '{"url":"a"}'.encode("utf-16"), b"9" * 9000, b'{"url":1' + b"0" * 5000 + b"}",
               b'{"url":"' + b"a" * 20_000, rng.randbytes(500)]  # fmt: skip
    for number, body in enumerate(bodies):
        yield Kind(f"json {number}: {body[:30]!r}", request(body, b"application/json"))
    regions = "<RectangleLabels name='l' toName='i'><Label value='{}'/></RectangleLabels>"
    config = f"<View><Image name='i' value='$image'/>{regions}</View>"
    known = config.format("circle")
    tasks = [None, 5, [], {}, [5], [{}], [{"data": 5}], [{"id": "x", "data": {"image": 5}}],
        [{"data": {"image": "http://["}}],
             [{"data": {"image": "/../../etc/passwd"}}], [{"data": {"image": "file:///etc/passwd"}}],
             [{"data": {"image": "\ud800"}}]]  # fmt: skip
    labels = [
        None,
        5,
        [],
        "",
        "<View>",
        "<a/>" * 1000,
        "<!DOCTYPE a [<!ENTITY b 'c'>]><View>&b;</View>",
        "\0",
        "\ud800",
        "<a>" * 5000,
        config.format("unknown"),
    ]
    calls = [{"tasks": one, "label_config": known} for one in tasks] + [
        {"tasks": [{}], "label_config": one} for one in labels
    ]
    for number, call in enumerate(calls):
        yield Kind(
            f"label studio {number}",
            request(json.dumps(call).encode(), b"application/json", target=b"/label-studio/predict"),
        )
    for number, label in enumerate(labels):
        yield Kind(
            f"label studio's setup {number}",
            request(json.dumps({"schema": label}).encode(), target=b"/label-studio/setup"),
        )


def wires() -> Iterator[Kind]:
    """HTTP itself: methods, paths, headers, lengths, what is no HTTP."""
    png = picture()
    for method in (
        b"GET",
        b"PUT",
        b"DELETE",
        b"PATCH",
        b"OPTIONS",
        b"HEAD",
        b"TRACE",
        b"CONNECT",
        b"post",
        b"M" * 5000,
        b"PO ST",
        b"\xff",
        b"PROPFIND",
        b"BREW",
    ):
        yield Kind(f"method {method[:10]!r}", request(b"", method=method))
    for path in (b"/../../etc/passwd", b"//etc/passwd", b"/%2e%2e/%2e%2e/etc/passwd", b"/static/../../x",
        b"/predict/", b"/predict/../model", b"/%00", b"/%ff", b"/" + b"a" * 20_000,
                 b"*", b"http://other/predict", b"predict", b"/predict#a", b"/\\", b"/.git/config", b"/.env",
                 b"/docs", b"/openapi.json/..", b"/a b", b"/\xc3\xa9", b"", b"/label-studio/../x",
                 b"/label-studio/versions", b"/model?" + b"a" * 60_000, b"/;a=b"):  # fmt: skip
        yield Kind(f"path {path[:30]!r}", request(b"", target=path, method=b"GET"))
    for header in (b"X: " + b"a" * 70_000, b"X: y\r\n" * 2000, b"X\0Y: z", b"X: a\0b", b" folded", b"X : y",
        b": empty", b"no colon", b"X: a\rb", b"Host: other", b"Content-Length: 5",
                   b"Content-Length: -1", b"Content-Length: a", b"Content-Length: 1, 2", b"Content-Length: +5",
                   b"Content-Length: " + b"9" * 5000,
                   b"Content-Length: 99999999999999", b"Transfer-Encoding: gzip",
                   b"Transfer-Encoding: chunked, gzip", b"Transfer-Encoding: chunked",
                   b"Transfer-Encoding: xchunked",
                   b"Expect: 100-continue", b"Expect: 500",
                   b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==",
                   b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AA",
                   b"Range: bytes=0-5", b"Accept: nothing/*", b"Content-Encoding: gzip",
                   b"Cookie: " + b"a=b; " * 5000,
                   b"Authorization: Basic !!!", b"Authorization: Basic /////w==", b"Authorization: \xff",
                   b"X-API-Key: \xff\xfe", b"X-Forwarded-For: ' OR 1", b"X-HTTP-Method-Override: DELETE",
                   b"Connection: " + b"close, " * 1000,
                   b"Content-Type: image/png\r\nContent-Type: multipart/form-data",
                   b"Accept-Language: " + b"a" * 9000, b"Origin: null", b"Referer: \xff"):  # fmt: skip
        yield Kind(f"header {header[:40]!r}", request(png, headers=header + b"\r\n"), silent=True)
    chunked = b"POST /predict HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"
    for chunk in (b"-1\r\na", b"xyz\r\na", b"ffffffffffffffffff\r\na", b"5;" + b"a" * 70_000 + b"\r\nhello\r\n",
        b"5\r\nhello", b"2\r\nhello\r\n", b"0\r\nX: " + b"a" * 70_000 + b"\r\n\r\n", b"\r\n", b"0x5\r\nhello\r\n",
                  b"0\r\n\r\n", b"5\r\nhello\r\n0\r\n\r\n", b"0\r\nContent-Length: 5\r\n\r\nhello"):  # fmt: skip
        yield Kind(f"chunk {chunk[:20]!r}", chunked + chunk, silent=True)
    raw = {
        "no host": b"GET /health HTTP/1.1\r\n\r\n",
        "http/0.9": b"GET /\r\n\r\n",
        "http/1.0": b"GET /model HTTP/1.0\r\n\r\n",
        "http/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "http/9.9": b"GET / HTTP/9.9\r\n" + HOST + b"\r\n",
        "line feeds": b"GET /model HTTP/1.1\nHost: a\n\n",
        "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        "ssh": b"SSH-2.0-OpenSSH_9.6\r\n",
        "socks": b"\x05\x01\x00",
        "redis": b"*1\r\n$4\r\nPING\r\n",
        "smtp": b"EHLO a\r\n",
        "zeros": bytes(4000),
        "ones": b"\xff" * 100_000,
        "line feeds only": b"\r\n" * 5000,
        "a line without an end": b"GET /" + b"a" * 200_000,
        "50 requests at once": request(b"", target=b"/model", method=b"GET") * 50,
        "a good and a broken one": request(png) + b"\0\1\2\r\n\r\n",
        "length and chunks": b"POST /predict HTTP/1.1\r\n"
        + HOST
        + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET",
        "no blank behind the colon": b"GET /model HTTP/1.1\r\nHost:a\r\n\r\n",
        "proxy": b"PROXY TCP4 1.1.1.1 2.2.2.2 1 2\r\nGET / HTTP/1.1\r\n\r\n",
    }
    for name, wire in raw.items():
        yield Kind(f"raw: {name}", wire, silent=True)


def _leave(connection: socket.socket, wire: bytes) -> None:
    connection.sendall(wire)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset


def _trickle(connection: socket.socket, first: bytes, again: bytes) -> None:
    connection.sendall(first)
    connection.setblocking(False)
    for _ in range(200):
        time.sleep(0.1)
        try:
            if connection.recv(1, socket.MSG_PEEK) is not None:
                break
        except BlockingIOError:
            pass
        connection.sendall(again)
    connection.setblocking(True)


def slow(_: random.Random) -> Iterator[Kind]:
    """Clients that never end, leave, or do not read."""
    png = picture()
    chunked = b"POST /predict HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"
    typed = (
        b"POST /predict HTTP/1.1\r\n"
        + HOST
        + b"Content-Type: multipart/form-data; boundary=b\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    block = b"2000\r\n" + bytes(8192) + b"\r\n"
    acts: dict[str, tuple[Callable[[socket.socket], None], bool]] = {
        "a chunked body that never ends": (partial(_trickle, first=chunked, again=block), False),
        "a chunked form that never ends": (
            partial(_trickle, first=typed + b"6\r\n--b\r\nC\r\n", again=b"1\r\na\r\n"),
            False,
        ),
        "a body, byte by byte": (partial(_trickle, first=request(png)[:-500], again=b"x"), False),
        "a head, byte by byte": (partial(_trickle, first=b"GET / HTTP/1.1\r\nX: ", again=b"a"), False),
        "silence": (partial(_trickle, first=b"", again=b""), False),
        "gone after the head": (partial(_leave, wire=chunked), True),
        "gone within the body": (partial(_leave, wire=request(png)[:-100]), True),
        "gone before the answer": (partial(_leave, wire=request(png)), True),
        "gone within a form": (partial(_leave, wire=form(part(png))[:-60]), True),
        "gone within the request line": (partial(_leave, wire=b"GET /pre"), True),
    }
    for name, (act, silent) in acts.items():
        yield Kind(f"slow: {name}", act, silent=silent)


def kinds(seed: int) -> list[Kind]:
    """All of them, from a seed."""
    rng = random.Random(seed)
    found = [*slow(rng), *damaged(rng), *bombs(rng), *forms(rng), *fields(rng), *wires()]
    assert len({kind.name for kind in found}) == len(found)
    return found


def exchange(port: int, wire: Wire, seconds: float = 30.0) -> bytes:
    """What the service answers."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        answer = b""
        try:
            if callable(wire):
                wire(connection)
            else:
                connection.sendall(wire)
        except OSError:  # the service has answered and closed while it was still being sent
            pass
        try:
            while some := connection.recv(65536):
                answer += some
        except OSError:
            pass
        return answer


_SECRETS = re.compile(rb"Traceback|File \"|site-packages|\.py\b|/usr/|/root|/home/|/tmp/|/opt/|0x[0-9a-f]{9}")


def fault(kind: Kind, answer: bytes) -> str:
    """What is wrong with an answer; empty: nothing."""
    if answer.startswith(b"HTTP/1.1 100"):  # go on: the answer follows
        answer = answer.partition(b"\r\n\r\n")[2]
    if not answer:
        return "" if kind.silent else "no answer"
    head, _, body = answer.partition(b"\r\n\r\n")
    match = re.match(rb"HTTP/1\.1 (\d+)", head)
    if not match:
        return f"not HTTP: {answer[:60]!r}"
    status = int(match[1])
    if status in (500, 502):
        return f"{status}: {body[:200]!r}"
    own = Path(__file__).resolve().parents[1]
    secret = None if b"text/html" in head else _SECRETS.search(answer)
    if secret or str(own).encode() in answer or socket.gethostname().encode() in head:
        return f"names {secret and secret[0]!r}: {answer[:300]!r}"
    if status < 400:
        return ""
    if b"application/problem+json" not in head.lower():
        return f"{status}, not problem+json: {head[:200]!r}"
    if not body and kind.name.startswith("method b'HEAD"):
        return ""
    try:
        problem, _ = json.JSONDecoder().raw_decode(body.decode())
        return "" if "\n" not in problem["detail"] and problem["status"] == status else f"its problem: {problem}"
    except (ValueError, KeyError, TypeError):
        return f"its body: {body[:100]!r}"


def attack(service: Service, kind: Kind) -> tuple[str, str]:
    """The status, and what is wrong: in the answer, or with the service afterwards."""
    answer = exchange(service.port, kind.wire)
    wrong = fault(kind, answer)
    began = time.perf_counter()
    if not exchange(service.port, request(b"", target=b"/health", method=b"GET"), 5).startswith(b"HTTP/1.1 200"):
        wrong = wrong or "the service does not answer afterwards"
    if time.perf_counter() - began > 2:
        wrong = wrong or f"the next answer took {time.perf_counter() - began:.1f} s"
    return answer[9:12].decode("latin-1") or "none", wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    everything = kinds(args.seed)
    good = request(picture(), target=b"/predict?score=0")
    with Service(args.checkpoint, "--timeout", "8", "--label-studio", "http://127.0.0.1:9") as service:
        first, memory, began = exchange(service.port, good), service.memory(), time.perf_counter()
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(partial(attack, service), everything))
        seconds = time.perf_counter() - began
        last = exchange(service.port, good)
        counts = Counter(status for status, _ in results)
        print(f"{len(everything)} kinds in {seconds:.0f} s; answers: {dict(sorted(counts.items()))}")
        print(f"memory {memory:.0f} MB before, {service.memory():.0f} MB after, {service.peak():.0f} MB at most")
        faults = [f"{kind.name}: {wrong}" for kind, (_, wrong) in zip(everything, results) if wrong]
        if first.partition(b"\r\n\r\n")[2] != last.partition(b"\r\n\r\n")[2]:
            faults.append(f"a good picture is answered otherwise than before: {last[:200]!r}")
        service.end(signal.SIGTERM)
        if b"Traceback" in service.log():
            faults.append(f"the log has a traceback: {service.log()[-3000:].decode(errors='replace')}")
    print("\n".join(faults) or "no fault")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
