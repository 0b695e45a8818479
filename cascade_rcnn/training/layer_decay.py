"""Layer-wise decay of the learning rate (arXiv 2106.08254, 2201.03545): what a backbone has learnt before changes less
the nearer it is to the input."""

from __future__ import annotations

import re
from collections.abc import Iterable

from cascade_rcnn.errors import ConfigError

BODY = "backbone.body."
# Stage and block in a parameter's name, and the number of the first stage.
_LAYOUTS = (
    (re.compile(r"stages_(\d)\.(?:blocks\.(\d+)\.)?"), 0),  # ConvNeXt
    (re.compile(r"layers_(\d)\.(?:blocks\.(\d+)\.)?"), 0),  # Swin
    (re.compile(r"layer(\d)\.(\d+)\."), 1),  # ResNet
)
_BLOCKS_IN_GROUP = 3  # of the third stage, the long one


def rate_factors(names: Iterable[str], decay: float) -> dict[str, float]:
    """Factor of each parameter's learning rate: 1 outside the backbone's body, and ``decay`` once more for each group.

    Groups from the input: stem; stage 1; stage 2; each three blocks of stage 3; stage 4. A stage begins with its
    downsampling. Raises ConfigError for a backbone whose stages are not told by its parameters' names.
    """
    places = {name: _place(name) for name in names}
    stages = {stage for stage, _ in places.values()}
    if not {1, 2, 3, 4} <= stages:
        raise ConfigError("train.layer_decay is for ConvNeXt, Swin and ResNet backbones: set it to 1 for others")
    last = 3 + max(block for stage, block in places.values() if stage == 3) // _BLOCKS_IN_GROUP + 1
    factors = {}
    for name, (stage, block) in places.items():
        group = {3: 3 + block // _BLOCKS_IN_GROUP, 4: last, 5: last + 1}.get(stage, stage)
        factors[name] = decay ** (last + 1 - group)
    return factors


def _place(name: str) -> tuple[int, int]:
    """Stage (0: the stem, 5: behind the backbone) and block."""
    if not name.startswith(BODY):
        return 5, 0
    for pattern, first in _LAYOUTS:
        if match := pattern.match(name, len(BODY)):
            return int(match[1]) - first + 1, int(match[2] or 0)
    return 0, 0
