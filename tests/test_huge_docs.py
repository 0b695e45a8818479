"""The code of docs/huge.md for other tools, run as it stands there."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cascade_rcnn.config import Config, DataConfig
from cascade_rcnn.inference.detector import Detector
from locations import REPOSITORY
from tiny import TINY, tiny_model


def _code(containing: str) -> str:
    text = (REPOSITORY / "docs" / "huge.md").read_text(encoding="utf-8")
    (found,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if containing in block]
    return str(found)


def _detector() -> Detector:
    limits: dict[str, Any] = {"score_threshold": 0.0, "max_detections": 10, "masks": "none"}
    config = Config(model=replace(TINY, **limits), data=DataConfig(short_side=(96,), long_side=160))
    return Detector(tiny_model(**limits), config, ("cat", "dog", "eel"))


@pytest.mark.filterwarnings("ignore")  # supervision's own
def test_supervisions_slicer() -> None:
    pytest.importorskip("supervision", reason="needs pip install 'cascade-rcnn[supervision]'")
    seen: list[tuple[int, ...]] = []

    class Sees(Detector):
        def predict(self, image: Any, **options: Any) -> Any:
            seen.append(image.shape)
            return super().predict(image, **options | {"score_threshold": 0.0})

    detector = _detector()
    sees = Sees(detector.model, detector.config, detector.class_names)
    image = np.random.default_rng(0).integers(0, 255, (1500, 1024, 3), dtype=np.uint8)
    names: dict[str, Any] = {"detector": sees, "image": image}
    exec(_code("InferenceSlicer"), names)
    assert len(seen) == 2 and max(seen) == (1024, 1024, 3)
    assert len(names["found"]) > 0 and names["found"].xyxy[:, 3].max() > 1024
