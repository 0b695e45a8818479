"""A detector as a ``DetectionModel`` of SAHI (https://github.com/obss/sahi), for its sliced prediction and its tools.

    from cascade_rcnn.sahi import CascadeRCNNDetectionModel
    from sahi.predict import get_sliced_prediction

    model = CascadeRCNNDetectionModel(model_path="runs/demo", confidence_threshold=0.3, device="cpu")
    result = get_sliced_prediction("large.png", model, slice_height=1024, slice_width=1024)

``detector.predict(..., tile=1024)`` does the like without SAHI (docs/huge.md says where they differ).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.errors import UserError
from cascade_rcnn.inference.detections import Detections
from cascade_rcnn.inference.detector import Detector, load

try:
    from sahi.models.base import DetectionModel
    from sahi.prediction import ObjectPrediction
except ImportError as _error:
    raise UserError("the package sahi is missing: pip install 'cascade-rcnn[sahi]'") from _error

Shifts = list[list[int | float]]


class CascadeRCNNDetectionModel(DetectionModel):  # type: ignore[misc]  # SAHI's types may be missing
    """Takes ``model_path`` (whatever ``cascade_rcnn.load`` takes) or ``model``, a ``Detector``.

    Category ids are the data set's own, so that SAHI's COCO results can be scored. SAHI takes an object's box from its
    mask where there is one; ``masks=False`` keeps the box of the network, and is faster.
    """

    category_mapping: dict[str, str] | None

    def __init__(self, *args: Any, masks: bool = True, **kwargs: Any) -> None:
        self._wants_masks = masks
        super().__init__(*args, **kwargs)

    def load_model(self) -> None:
        """From ``model_path``."""
        if self.model_path is None:
            raise UserError("CascadeRCNNDetectionModel: give model_path, a checkpoint or run folder, or model")
        self.set_model(load(self.model_path, device=self.device))

    def set_model(self, model: Any, **kwargs: Any) -> None:
        """A ``Detector`` in memory."""
        if not isinstance(model, Detector):
            raise UserError(f"model of type {type(model).__name__}: give a Detector, as cascade_rcnn.load returns it")
        self.model = model
        self._ids = model.category_ids or tuple(range(1, len(model.class_names) + 1))
        if self.category_mapping is None:
            self.category_mapping = {str(number): name for number, name in zip(self._ids, model.class_names)}

    @property
    def has_mask(self) -> bool:
        """Whether predictions have masks."""
        return bool(self._wants_masks and self.model.config.model.masks != "none")

    @property
    def num_categories(self) -> int:
        return len(self.model.class_names)

    @property
    def category_names(self) -> list[str]:
        return list(self.model.class_names)

    def perform_inference(self, image: NDArray[np.uint8]) -> None:
        """One picture [H, W, 3], RGB."""
        self.perform_batch_inference([image])

    def perform_batch_inference(self, images: list[NDArray[np.uint8]]) -> None:
        """Several pictures [H, W, 3], RGB, at once."""
        self._original_predictions = self.model.predict(list(images), batch_size=max(len(images), 1))

    def _create_object_prediction_list_from_original_predictions(
        self, shift_amount_list: Any = None, full_shape_list: Any = None
    ) -> None:
        found: list[Detections] = self._original_predictions
        shifts = _for_each(shift_amount_list, len(found)) or [[0, 0]] * len(found)
        shapes = _for_each(full_shape_list, len(found)) or [list(one.size) for one in found]
        self._object_prediction_list_per_image = [
            self._predictions(one, shift, shape) for one, shift, shape in zip(found, shifts, shapes)
        ]

    def _predictions(self, found: Detections, shift: list[int | float], shape: list[int | float]) -> list[Any]:
        found = found[found.scores > self.confidence_threshold]
        polygons = found.polygons() if self.has_mask else [[] for _ in range(len(found))]
        rows = zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), found.names, polygons)
        return [
            ObjectPrediction(
                bbox=box,
                category_id=self._ids[label],
                category_name=name,
                segmentation=[ring.reshape(-1).tolist() for ring in rings] or None,
                score=score,
                shift_amount=shift,
                full_shape=shape,
            )
            for box, score, label, name, rings in rows
        ]


def _for_each(values: Any, count: int) -> Shifts:
    """SAHI gives one pair, or one for each image, or None."""
    if values is None or not len(values):
        return []
    pairs = [list(values)] if not isinstance(values[0], list | tuple) else [list(pair) for pair in values]
    return pairs * count if len(pairs) == 1 else pairs
