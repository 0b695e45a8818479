"""Fixtures: a small checkpoint on a server on loopback, and a list of published weights with that one entry."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cascade_rcnn.zoo import download
from foreign_checkpoints import small_state
from loopback import NAME, Server, forget_list, set_list


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("published") / "small.pth"
    torch.manual_seed(0)
    torch.save({"state_dict": small_state(), "meta": {"dataset_meta": {"classes": ("cat", "dog", "eel")}}}, path)
    return path


@pytest.fixture
def server(checkpoint: Path) -> Iterator[Server]:
    made = Server(checkpoint.read_bytes())
    yield made
    made.close()


@pytest.fixture
def zoo(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A list with one entry, the server's file, and an empty cache; gives the entry, to be changed before use."""
    digest = hashlib.sha256(server.content).hexdigest()
    entry = {
        "name": NAME,
        "also": ["cascade-mask-rcnn_small_mstrain-1x_cats"],
        "library": "mmdetection",
        "url": f"{server.address}/v2.0/small_{digest[:8]}.pth",
        "hash": digest[:8],
        "hash_of": "sha256",
        "box_ap": 41.2,
        "license": "Apache-2.0",
        "source": "made here",
    }
    set_list(monkeypatch, tmp_path / "published.json", entry)
    monkeypatch.setenv("CASCADE_RCNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CASCADE_RCNN_MIRROR", raising=False)
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    yield entry
    forget_list()
