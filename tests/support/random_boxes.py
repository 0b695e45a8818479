"""Boxes at random places."""

from __future__ import annotations

import torch


def random_boxes(n: int, *, seed: int = 0, side: float = 100.0) -> torch.Tensor:
    corner = torch.rand(n, 2, generator=torch.Generator().manual_seed(seed)) * side
    size = torch.rand(n, 2, generator=torch.Generator().manual_seed(seed + 1)) * side + 1
    return torch.cat([corner, corner + size], dim=1)
