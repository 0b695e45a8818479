"""``predictions.geojson``: what was found in georeferenced pictures, as RFC 7946 wants it.

Longitude and latitude in WGS 84, outer rings counter-clockwise, holes clockwise and apart, no ``crs``. A feature is the
outline of an object's mask, or its box for a network without masks and where a mask has no pixel.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.data.contours import Outline
from cascade_rcnn.data.windows import Georeference
from cascade_rcnn.inference.detections import Detections
from cascade_rcnn.inference.predictions_file import ResultsFile

_DECIMALS = 9  # of a degree: 0.1 millimetres
_HALF_WORLD = 180.0  # degrees: a ring wider than that goes the other way round, over the date line


class FeaturesFile(ResultsFile):
    """A feature collection that grows as ``ResultsFile`` does."""

    head, foot = '{"type": "FeatureCollection", "features": [', "\n]}\n"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.over_date_line = 0  # objects whose geometry is left out

    def add_detections(self, detections: Detections, georeference: Georeference, facts: dict[str, Any]) -> None:
        """A feature for each of the detections, with ``facts`` among its properties."""
        features = list(_features(detections, georeference, facts))
        self.over_date_line += sum(feature["geometry"] is None for feature in features)
        self.add(features)


def _features(detections: Detections, georeference: Georeference, facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    parts = detections.outlines() if detections.mask_probs is not None else [[] for _ in range(len(detections))]
    rows = zip(detections.boxes.double().tolist(), detections.scores.tolist(), detections.names, parts)
    for (x1, y1, x2, y2), score, name, outlines in rows:
        box = Outline(np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)]), [])
        properties = {**facts, "category": name, "score": score, "bbox_pixels": [x1, y1, x2 - x1, y2 - y1]}
        yield {"type": "Feature", "geometry": _geometry(outlines or [box], georeference), "properties": properties}


def _geometry(parts: list[Outline], georeference: Georeference) -> dict[str, Any] | None:
    """A polygon, or several; None where the date line would have to cut it."""
    polygons = []
    for part in parts:
        rings = [georeference.lonlat(ring) for ring in (part.outer, *part.holes)]
        if np.ptp(rings[0][:, 0]) > _HALF_WORLD:
            return None
        polygons.append([_closed(ring, left=place == 0) for place, ring in enumerate(rings)])
    if len(polygons) == 1:
        return {"type": "Polygon", "coordinates": polygons[0]}
    return {"type": "MultiPolygon", "coordinates": polygons}


def _closed(ring: NDArray[np.float64], *, left: bool) -> list[list[float]]:
    """A ring that ends where it begins, and has its inside on its left hand (a hole's: on its right)."""
    x, y = ring.T
    counter_clockwise = float(np.dot(x - x[0], np.roll(y, -1) - np.roll(y, 1))) > 0
    ring = ring if counter_clockwise == left else ring[::-1]
    rounded: list[list[float]] = np.round(np.concatenate([ring, ring[:1]]), _DECIMALS).tolist()
    return rounded
