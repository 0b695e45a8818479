import torch

from cascade_rcnn.models.roi_align import assign_levels


def test_levels_follow_the_box_size_and_are_clamped() -> None:
    sides = torch.tensor([0.0, 1, 55.9, 112, 224, 447, 448, 3000])
    boxes = torch.stack((sides * 0, sides * 0, sides, sides), dim=1)
    assert assign_levels(boxes, 4).tolist() == [0, 0, 0, 1, 2, 2, 3, 3]
