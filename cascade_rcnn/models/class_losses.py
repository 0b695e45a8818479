"""Class losses of the box heads beside cross entropy, for classes of which some are rare or most boxes are easy.

M samples, K classes; logits [M, K + 1], the background last. With each of them a head's scores are a softmax over
K + 1, so nothing else changes.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

FOCAL_GAMMA = 2.0
SEESAW_P, SEESAW_Q = 0.8, 2.0
_LEAST_OWN_SCORE = 0.01  # a class whose samples score less is compensated no more for it


class Focal(nn.Module):
    """Cross entropy [M] times (1 - p)^2, p the probability of the right class: well recognised samples count little.

    The factor of Lin et al., arXiv 1708.02002, on the softmax of a two-stage head instead of on one sigmoid per class,
    and without their balance of foreground and background, which the sampling of boxes sets.
    """

    def forward(self, logits: Tensor, wanted: Tensor) -> Tensor:
        log_p = -F.cross_entropy(logits, wanted, reduction="none")
        return -((1 - log_p.exp()).clamp(min=0.0) ** FOCAL_GAMMA) * log_p


class Seesaw(nn.Module):
    """Cross entropy in which frequent classes push rare ones down less (Wang et al., arXiv 2008.10032).

    In the softmax of a sample of class i, class j counts S_ij times: (N_j / N_i)^p of the samples seen so far, where j
    is rarer, times (p_j / p_i)^q, where j scores higher. The background neither pushes less nor is pushed less: the
    paper's own branch for objectness is not built.
    """

    counts: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.int64))  # [K] samples of each class so far

    def forward(self, logits: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(logits + self.log_factors(logits.detach(), wanted), wanted, reduction="none")

    @torch.no_grad()
    def count(self, wanted: Tensor, counted: Tensor) -> None:
        """Add the samples ``counted`` [M] of a training step, those of all processes; background is not counted."""
        seen = torch.zeros(len(self.counts) + 1, dtype=torch.int64, device=wanted.device)
        seen.index_add_(0, wanted, counted.long())
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(seen)
        self.counts += seen[:-1]

    def log_factors(self, logits: Tensor, wanted: Tensor) -> Tensor:
        """log S [M, K + 1] of the samples; 0 for the background and for samples of it."""
        background = len(self.counts)
        foreground = wanted < background
        own = wanted.clamp(max=background - 1)  # [M]
        frequency = self.counts.clamp(min=1).float().log()  # [K]
        mitigation = SEESAW_P * (frequency[None] - frequency[own, None]).clamp(max=0.0)  # [M, K]
        scores = logits.log_softmax(dim=-1)[:, :-1]
        own_score = scores.gather(1, own[:, None]).clamp(min=math.log(_LEAST_OWN_SCORE))
        compensation = SEESAW_Q * (scores - own_score).clamp(min=0.0)
        factors = (mitigation + compensation).scatter(1, own[:, None], 0.0) * foreground[:, None]
        return F.pad(factors, (0, 1))


def build_class_loss(kind: str, num_classes: int) -> nn.Module:
    """``kind``: focal or seesaw."""
    return Seesaw(num_classes) if kind == "seesaw" else Focal()
