"""Pictures that clients name by address; off unless the service was started with it."""

from __future__ import annotations

import ipaddress
import socket
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException
from typing import Any

from cascade_rcnn.errors import UserError
from cascade_rcnn.messages import one_line


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect could lead to what the check of the first address has refused."""

    def redirect_request(self, *_: Any) -> None:
        return None


def fetch_url(url: str, *, max_bytes: int, timeout: float = 10.0) -> tuple[str, bytes]:
    """Name and content of a picture on the public internet. Raises UserError: another scheme, a private address, ..."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:  # https://[
        raise UserError("url: not an address") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError("url: an address that begins with https:// or http://")
    try:
        found = {info[4][0] for info in socket.getaddrinfo(parts.hostname, parts.port or 443, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError, ValueError):
        raise UserError("url: its host is not known") from None
    if not all(ipaddress.ip_address(str(address).partition("%")[0]).is_global for address in found):
        raise UserError("url: addresses within this network are not fetched")
    opener = urllib.request.build_opener(_NoRedirect)
    try:
        with opener.open(
            urllib.request.Request(url, headers={"User-Agent": "cascade-rcnn"}), timeout=timeout
        ) as answer:
            content: bytes = answer.read(max_bytes + 1)
    except (urllib.error.URLError, HTTPException, OSError, ValueError) as error:
        raise UserError(f"url: cannot be fetched ({one_line(error)[:100]})") from None
    if len(content) > max_bytes:
        raise UserError(f"url: more than {max_bytes} bytes")
    return parts.path.rpartition("/")[2][:120] or "image", content
