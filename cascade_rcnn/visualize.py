"""The drawing functions under their documented name; they live in ``cascade_rcnn.drawing``."""

from cascade_rcnn.drawing.annotations import (
    draw_batch,
    draw_detections,
    draw_marks,
    draw_record,
    draw_targets,
    side_by_side,
)
from cascade_rcnn.drawing.charts import ap_by_iou_chart, contact_sheet

__all__ = [
    "ap_by_iou_chart",
    "contact_sheet",
    "draw_batch",
    "draw_detections",
    "draw_marks",
    "draw_record",
    "draw_targets",
    "side_by_side",
]
