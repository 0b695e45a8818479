"""Box head of one stage: two fully connected layers, a classifier and a box regressor.

R RoIs, C channels, K classes (K = background).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cascade_rcnn.models.ops.frozen_norm import fold_batch_norm, make_norm
from cascade_rcnn.models.ops.roi_align import rows_weight


class BoxHead(nn.Module):
    """RoI features [R, C, 7, 7] to class logits [R, K + 1] and deltas [R, 4] (or [R, 4 K], one box per class)."""

    takes_rows = False  # expects RoI features in memory order, [R, 49, C]
    counts_rows = False  # in training, one RoI's outputs depend on which others there are
    reads_rows = True  # accepts them in that order, and then reorders its weight in each call

    def __init__(
        self, channels: int, num_classes: int, *, width: int = 1024, size: int = 7, class_agnostic: bool = True
    ) -> None:
        super().__init__()
        self.channels = channels
        self.fc1 = nn.Linear(channels * size * size, width)
        self.fc2 = nn.Linear(width, width)
        self._add_outputs(width, num_classes, class_agnostic)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def _add_outputs(self, width: int, num_classes: int, class_agnostic: bool) -> None:
        self.classifier = nn.Linear(width, num_classes + 1)
        self.deltas = nn.Linear(width, 4 if class_agnostic else 4 * num_classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.normal_(self.deltas.weight, std=0.001)
        nn.init.zeros_(self.classifier.bias)
        nn.init.zeros_(self.deltas.bias)

    def take_rows(self) -> None:
        """For inference: reorder the first layer's weight instead of every RoI's features."""
        weight = self.fc1.weight.detach()
        bins = weight.shape[1] // self.channels
        self.fc1.weight = nn.Parameter(rows_weight(weight, bins).contiguous(), requires_grad=False)
        self.takes_rows = True

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.dim() == 3 and not self.takes_rows:  # the weight is smaller than the features of a training step
            x = F.linear(x.flatten(1), rows_weight(self.fc1.weight, x.shape[1]), self.fc1.bias)
        else:
            x = self.fc1(x.flatten(1))
        x = F.relu(x)  # [R, width]
        x = F.relu(self.fc2(x))
        return self.classifier(x), self.deltas(x)


class ConvBoxHead(BoxHead):
    """Four 3x3 convolutions and one fully connected layer (arXiv 1803.08494, 1811.08883, 2111.11429).

    ``norm``: none, group or batch, behind each convolution.
    """

    reads_rows = False

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        width: int = 1024,
        size: int = 7,
        class_agnostic: bool = True,
        norm: str = "group",
    ) -> None:
        nn.Module.__init__(self)
        self.counts_rows = norm == "batch"
        self.convs = nn.ModuleList()
        for _ in range(4):
            conv = nn.Conv2d(channels, channels, 3, padding=1, bias=norm == "none")
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            norms: list[nn.Module] = []
            if norm != "none":
                norms = [make_norm(norm, channels)]
            self.convs.append(nn.Sequential(conv, *norms, nn.ReLU()))
        self.fc1 = nn.Linear(channels * size * size, width)
        self._add_outputs(width, num_classes, class_agnostic)
        nn.init.xavier_uniform_(self.fc1.weight)
        nn.init.zeros_(self.fc1.bias)

    def take_rows(self) -> None:
        """Nothing to reorder, as the convolutions come first; their batch norms are folded."""
        for block in self.convs:
            if isinstance(block, nn.Sequential) and isinstance(block[1], (nn.BatchNorm2d, nn.SyncBatchNorm)):
                fold_batch_norm(block[0], block[1])  # type: ignore[arg-type]
                block[1] = nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for conv in self.convs:
            x = conv(x)
        x = F.relu(self.fc1(x.flatten(1)))
        return self.classifier(x), self.deltas(x)
