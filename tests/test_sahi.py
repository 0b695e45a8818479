"""The adapter for SAHI: its sliced prediction with our detectors, boxes, masks and category ids as ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cascade_rcnn.errors import UserError
from cascade_rcnn.inference.detections import Detections
from cascade_rcnn.inference.detector import Detector
from small_training import small_config

pytest.importorskip("sahi")

from sahi.predict import get_prediction, get_sliced_prediction

from cascade_rcnn.sahi import CascadeRCNNDetectionModel


class Bright(Detector):
    """Finds the bright rectangle of each picture, with its mask."""

    def __init__(self, masks: str = "last") -> None:
        config = small_config(model={"masks": masks})
        super().__init__(torch.nn.Identity(), config, ("cat", "dog"), (7, 9))  # type: ignore[arg-type]
        self.batches: list[int] = []

    def look(self, arrays: object) -> list[Detections]:
        pictures = list(arrays)  # type: ignore[call-overload]
        self.batches.append(len(pictures))
        found = []
        for pixels in pictures:
            ys, xs = np.nonzero(pixels[:, :, 0] > 128)
            count = int(len(ys) > 0)
            box = [[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]] if count else np.zeros((0, 4))
            found.append(
                Detections(
                    torch.tensor(np.array(box), dtype=torch.float32),
                    torch.full((count,), 0.9),
                    torch.ones(count, dtype=torch.int64),
                    pixels.shape[:2],
                    self.class_names,
                    mask_probs=torch.ones(count, 28, 28),
                    category_ids=self.category_ids,
                )
            )
        return found


def picture() -> np.ndarray:
    pixels = np.zeros((200, 300, 3), np.uint8)
    pixels[60:90, 110:160] = 255  # over the border of slices of 128 that share 26
    return pixels


@pytest.mark.parametrize("masks", [True, False])
def test_sliced_prediction_finds_the_object_with_its_own_category(masks: bool) -> None:
    detector = Bright()
    model = CascadeRCNNDetectionModel(model=detector, confidence_threshold=0.3, device="cpu", masks=masks)
    assert model.has_mask == masks and model.num_categories == 2 and model.category_names == ["cat", "dog"]
    result = get_sliced_prediction(
        picture(), model, slice_height=128, slice_width=128, batch_size=4, perform_standard_pred=False, verbose=0
    )
    (found,) = result.object_prediction_list
    assert found.bbox.to_xyxy() == pytest.approx([110, 60, 160, 90], abs=1.5)
    assert (found.category.id, found.category.name) == (9, "dog") and found.score.value == pytest.approx(0.9)
    assert (found.mask is not None) == masks and max(detector.batches) == 4
    (row,) = result.to_coco_predictions(image_id=3)
    assert row["category_id"] == 9 and row["image_id"] == 3
    if masks:
        covered = found.mask.bool_mask
        assert covered.shape == (200, 300) and abs(int(covered.sum()) - 30 * 50) < 200


def test_a_single_picture_and_the_threshold() -> None:
    model = CascadeRCNNDetectionModel(model=Bright(), confidence_threshold=0.3, device="cpu")
    (found,) = get_prediction(picture(), model).object_prediction_list
    assert found.bbox.to_xyxy() == pytest.approx([110, 60, 160, 90], abs=1)
    assert get_prediction(picture(), model, confidence_threshold=0.95).object_prediction_list == []
    assert get_prediction(np.zeros((50, 50, 3), np.uint8), model).object_prediction_list == []
    assert not CascadeRCNNDetectionModel(model=Bright("none"), device="cpu").has_mask


def test_a_checkpoint_is_loaded_and_what_is_none_is_refused(tmp_path: Path) -> None:
    from cascade_rcnn.checkpoint import save_checkpoint
    from cascade_rcnn.models.build import build_model

    config = small_config()
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, build_model(config.model, 2).state_dict(), config=config, class_names=["cat", "dog"])
    model = CascadeRCNNDetectionModel(model_path=str(path), device="cpu", confidence_threshold=0.0)
    assert isinstance(model.model, Detector) and model.category_mapping == {"1": "cat", "2": "dog"}
    get_prediction(picture(), model)
    with pytest.raises(UserError, match="give model_path, a checkpoint or run folder, or model"):
        CascadeRCNNDetectionModel(device="cpu")
    with pytest.raises(UserError, match=r"model of type Identity: give a Detector, as cascade_rcnn.load returns it"):
        CascadeRCNNDetectionModel(model=torch.nn.Identity(), device="cpu")


def test_without_sahi_the_import_says_how_to_install_it() -> None:
    code = "import sys; sys.modules['sahi'] = None\nimport cascade_rcnn.sahi"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "pip install 'cascade-rcnn[sahi]'" in done.stderr.splitlines()[-1]
