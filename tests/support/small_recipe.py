"""A recipe that a CPU measures in seconds."""

from __future__ import annotations

RECIPE = """
from cascade_rcnn.config import Config, DataConfig, ModelConfig

config = Config(
    model=ModelConfig(backbone="resnet18.tv_in1k", fpn_channels=32, head_channels=64, test_proposals=50, roi_samples=32,
                      masks="{masks}"),
    data=DataConfig(workers=0, short_side=(64,), long_side=96),
)
"""
