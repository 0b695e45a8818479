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
    """Write the checksum into a file whose entry ``SEAL`` is ``UNSEALED``."""
    place = _PLACES[path.suffix]
    content = place.sub(UNSEALED.encode(), path.read_bytes())  # an IR keeps what the ONNX file said, too
    digits = f"{zlib.crc32(content):08x}".encode()
    sealed, places = place.subn(digits, content)
    assert places, f"{path} has no entry {SEAL}"
    path.write_bytes(sealed)


def check_seal(path: Path) -> None:
    """Raises CheckpointError for a file that is not as it was sealed; one without the entry is taken as it is."""
    place = _PLACES.get(path.suffix.lower())
    content = path.read_bytes() if place else b""
    found = set(place.findall(content)) if place else set()
    if place and found and {f"{zlib.crc32(place.sub(UNSEALED.encode(), content)):08x}".encode()} != found:
        raise CheckpointError(
            f"{printable(path)}: is damaged, or was changed after its export; copy or export it once more (if a "
            f"program changed it on purpose, remove {SEAL} from its metadata)"
        )
