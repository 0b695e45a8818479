"""MATLAB files, whole and damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from cascade_rcnn.data.formats import matlab
from cascade_rcnn.errors import DataError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "truth.mat"
    cells = np.empty((2, 1), dtype=object)
    cells[0, 0], cells[1, 0] = np.arange(12.0).reshape(3, 4), "a name"
    savemat(target, {"cells": cells, "number": 7.0})
    return target


def test_a_file_is_read(path: Path) -> None:
    content = matlab.read_mat(path)
    assert set(content) == {"cells", "number"} and matlab.unwrap(content["number"]) == 7
    assert matlab.text(content["cells"][1, 0]) == "a name"


@pytest.mark.parametrize("seed", range(6))
def test_changed_bytes_are_read_or_refused(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    content = bytearray(path.read_bytes())
    for place in rng.integers(128, len(content), 12):
        content[place] = rng.integers(256)
    path.write_bytes(content)
    try:
        matlab.read_mat(path)
    except DataError as error:
        assert "truth.mat" in str(error) and "\n" not in str(error)


def test_a_file_that_crashes_the_reader_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matlab._trial.end()
    with monkeypatch.context() as patch:
        patch.setattr(matlab, "_TRIAL", "import os; input(); os.abort()")
        with pytest.raises(DataError, match=r"truth\.mat: crashes the reader"):
            matlab.read_mat(path)
    assert set(matlab.read_mat(path)) == {"cells", "number"}  # by a new process


def test_a_file_that_never_ends_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matlab._trial.end()
    monkeypatch.setattr(matlab, "_TRIAL", "import time; input(); time.sleep(60)")
    monkeypatch.setattr(matlab, "_TRIAL_SECONDS", 0.5)
    with pytest.raises(DataError, match=r"truth\.mat: .*more than 0\.5 s"):
        matlab.read_mat(path)
