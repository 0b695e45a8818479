"""benchmarks/cascade.py: what each stage does to the boxes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import locations
from cascade_rcnn.checkpoint import save_checkpoint
from cascade_rcnn.data.formats.open import open_split
from cascade_rcnn.models.build import build_model
from small_training import small_config, small_data

sys.path.insert(0, str(locations.REPOSITORY / "benchmarks"))
import cascade


def test_it_prints_the_shares_of_proposals_and_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config()
    names = open_split(small_data(), "val").class_names
    model = build_model(config.model, len(names))
    with torch.no_grad():
        for head in model.cascade.box_heads:
            head.deltas.weight.zero_()  # every stage gives back the boxes that it gets
            head.deltas.bias.zero_()
    save_checkpoint(tmp_path / "still.safetensors", model.state_dict(), config=config, class_names=names)
    cascade.main(str(tmp_path / "still.safetensors"), str(small_data()))
    head, *rows = capsys.readouterr().out.splitlines()
    assert "IoU >= 0.7" in head and [row[:13].strip() for row in rows] == [
        "proposals",
        "after stage 1",
        "after stage 2",
        "after stage 3",
    ]
    shares = [[float(word) for word in row[13:].replace("%", "").split()] for row in rows]
    assert shares[0] == shares[1] == shares[2] == shares[3] == sorted(shares[0], reverse=True)
    assert shares[0][0] > 0
