"""The script that measures everything on a GPU, tried on this machine with networks that take no time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import locations
from cascade_rcnn.models.ops.capabilities import has_bfloat16_units
from small_recipe import RECIPE

SCRIPT = locations.REPOSITORY / "benchmarks" / "gpu.sh"


def measure(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("bash") is None or shutil.which("timeout") is None:
        pytest.skip("a script for bash with GNU timeout")
    variables = {
        "DEVICE": "cpu",
        "SIZE": "64 96",
        "BATCHES": "1",
        "TRAIN_BATCH": "1",
        "COMPILE": "",
        "LIMIT": "250",
        "ROUNDS": "1",
        "PYTHON": sys.executable,
        **environment,
    }
    return subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **variables},
    )


def test_a_part_that_fails_stops_no_other_and_the_table_has_the_rest(tmp_path: Path) -> None:
    (tmp_path / "boxes.py").write_text(RECIPE.format(masks="none").replace("resnet18.tv_in1k", "test_resnet"))
    done = measure(tmp_path, BOXES=str(tmp_path / "boxes.py"), MASKS="no_such_recipe")
    assert done.returncode == 1, "a part has failed"
    assert "== predict_masks_batch1 failed with code 2" in done.stdout
    reports = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    assert set(reports) == {"predict_boxes_batch1", "train_boxes_batch1"}, done.stdout
    written = (tmp_path / "out" / "results.md").read_text()
    assert done.stdout.endswith(written)
    rows = [line for line in written.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    in_bfloat16 = [row for row in rows if ", bfloat16" in row]
    assert len(in_bfloat16) == has_bfloat16_units(), "our prediction, where the processor has them"
    rows = [row for row in rows if row not in in_bfloat16]
    assert len(rows) == 2 + 2 * 2
    assert "prediction, 1 x 64 x 96" in rows[2] and "torchvision Faster R-CNN" in rows[3]
    assert "training step, 1 x 64 x 96" in rows[4]


def test_parts_are_left_out_when_the_time_is_over(tmp_path: Path) -> None:
    done = measure(tmp_path, TOTAL="0")
    assert done.returncode == 1
    assert "train_boxes_batch1 left out: 0 seconds are over" in done.stdout
    assert "nothing was measured" in (tmp_path / "out" / "results.md").read_text()
