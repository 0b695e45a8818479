"""A checksum of an exported network's file within the file itself: a runtime takes damaged weights as they come.

It is the CRC-32 of the file in which its own digits are zeros. OpenVINO's IR says it twice.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path

from cascade_rcnn.errors import CheckpointError
from cascade_rcnn.messages import printable

SEAL = "cascade_rcnn_crc32"  # name of the entry among the network's metadata
UNSEALED = "00000000"
_PLACES = {  # what stands before the digits
    ".onnx": re.compile(rb"(?<=" + SEAL.encode() + rb"\x12\x08)[0-9a-f]{8}"),
    ".xml": re.compile(rb"(?<=<" + SEAL.encode() + rb' value=")[0-9a-f]{8}'),
}


def seal(path: Path) -> None:
    """Write the checksum into a file that has an entry ``SEAL``; an IR has the ONNX file's, too."""
    place, content = _PLACES[path.suffix], path.read_bytes()
    sealed, places = place.subn(_checksum(content, place), content)
    assert places, f"{path} has no entry {SEAL}"
    path.write_bytes(sealed)


def check_seal(path: Path) -> None:
    """Raises CheckpointError for a file that is not as it was sealed; one without the entry is taken as it is."""
    place = _PLACES.get(path.suffix.lower())
    content = path.read_bytes() if place else b""
    found = set(place.findall(content)) if place else set()
    if place and found and found != {_checksum(content, place)}:
        raise CheckpointError(
            f"{printable(path)}: is damaged, or was changed after its export; copy or export it once more (if a "
            f"program changed it on purpose, remove {SEAL} from its metadata)"
        )


def _checksum(content: bytes, place: re.Pattern[bytes]) -> bytes:
    """Its digits; those that stand in ``content`` count as ``UNSEALED``."""
    value, end, view = 0, 0, memoryview(content)
    for digits in place.finditer(content):
        value = zlib.crc32(UNSEALED.encode(), zlib.crc32(view[end : digits.start()], value))
        end = digits.end()
    return f"{zlib.crc32(view[end:], value):08x}".encode()
