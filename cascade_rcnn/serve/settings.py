"""What a service may use, and where it stops."""

from __future__ import annotations

from dataclasses import dataclass

from cascade_rcnn.errors import ConfigError

API_KEY = "CASCADE_RCNN_API_KEY"


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Limits of the service. Raises ConfigError for values out of range."""

    max_batch: int = 8
    """Images that go through the network at once."""
    max_delay: float = 0.01
    """Seconds that the first image of a batch waits for others."""
    max_queue: int = 64
    """Images that wait; beyond it requests are answered 429."""
    max_bytes: int = 32_000_000
    """Bytes of a request's body."""
    max_files: int = 16
    """Files of a request."""
    max_pixels: int = 50_000_000
    """Pixels of an image, checked before it is decoded."""
    timeout: float = 60.0
    """Seconds until a request is answered 504."""
    allow_urls: bool = False
    """Fetch images from addresses that clients name: off, since it lets them reach what this machine can reach."""
    label_studio: str = ""
    """Address of a Label Studio server: answer its machine-learning API under ``/label-studio``; empty: do not."""
    label_studio_key: str = ""
    """Its access token, to read the tasks' pictures."""
    api_key: str = ""
    """What clients must send as ``Authorization: Bearer KEY`` or ``X-API-Key: KEY``; empty: nothing."""

    @property
    def max_held(self) -> int:
        """Bytes of files and pixels that requests under way hold together; two of the largest always fit."""
        return max(1_000_000_000, 2 * (self.max_bytes + 7 * self.max_pixels))

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_queue", "max_bytes", "max_files", "max_pixels"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name.replace('_', '-')} {getattr(self, name)}: at least 1")
        if not all("!" <= character <= "~" for character in self.api_key):  # of others each client makes other bytes
            raise ConfigError(f"{API_KEY}: may have letters of ASCII, digits and punctuation only, and no blanks")
        if self.label_studio and not self.label_studio.startswith(("http://", "https://")):
            raise ConfigError(f"label-studio {self.label_studio!r}: an address such as http://localhost:8080")
        if not (0 <= self.max_delay <= 10 and 0 < self.timeout <= 3600):
            raise ConfigError(
                f"max-delay {self.max_delay}: 0 to 10 seconds; timeout {self.timeout}: up to 3600 seconds"
            )
