"""Anchors: size, shape, place and padding."""

import torch

from cascade_rcnn.models.anchors import AnchorGenerator


def test_anchors_have_the_scale_ratio_and_centre_asked_for() -> None:
    generator = AnchorGenerator((4, 8), scales=(8.0,), ratios=(0.5, 1.0, 2.0))
    fine, coarse = generator([(2, 3), (1, 2)])
    assert fine.shape == (2 * 3 * 3, 4) and coarse.shape == (1 * 2 * 3, 4)
    size = fine[:, 2:] - fine[:, :2]
    torch.testing.assert_close(size.prod(dim=1), torch.full((18,), 32.0**2))
    torch.testing.assert_close(size[:3, 1] / size[:3, 0], torch.tensor([0.5, 1.0, 2.0]))
    centres = (fine[:, :2] + fine[:, 2:]) / 2
    assert centres[::3].tolist() == [[0, 0], [4, 0], [8, 0], [0, 4], [4, 4], [8, 4]]  # row by row


def test_torchvisions_anchors_are_whole_pixels() -> None:
    from torchvision.models.detection.anchor_utils import AnchorGenerator as Reference

    ours = AnchorGenerator((4,), scales=(8.0,), ratios=(0.5, 1.0, 2.0), rounded=True)
    theirs = Reference(((32,),), ((0.5, 1.0, 2.0),)).generate_anchors((32,), (0.5, 1.0, 2.0))
    torch.testing.assert_close(ours.base[0], theirs)


def test_anchors_in_a_batchs_padding_are_outside() -> None:
    generator = AnchorGenerator((32,), scales=(1.0,), ratios=(1.0,))
    inside = generator.inside([(3, 4)], torch.tensor([[96, 128], [33, 64]]))
    assert inside[0].all()
    assert inside[1].view(3, 4).tolist() == [[True, True, False, False], [True, True, False, False], [False] * 4]
