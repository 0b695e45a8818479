"""Cascade Mask R-CNN, ResNeXt-101-64x4d-FPN, COCO 2017, shorter sides 640 to 800, 3x (36 epochs: 12 times 3).

    python3 tools/train.py configs/cascade_rcnn/cascade_mask_rcnn_x101_64x4d_fpn_ms_3x_coco.py
    bash tools/dist_train.sh configs/cascade_rcnn/cascade_mask_rcnn_x101_64x4d_fpn_ms_3x_coco.py 8

Published for this recipe: 46.6 box AP, 40.3 mask AP on COCO val2017 (mmdetection's model zoo).
Its authors used 12.0 GB per card with 2 images on it. Not yet measured with this project.
"""

from cascade_rcnn.config import Config, DataConfig, ModelConfig, TrainConfig

config = Config(
    model=ModelConfig(backbone="resnext101_64x4d.tv_in1k", masks="every"),
    data=DataConfig(
        root="data/coco",
        short_side=(640, 800),
        short_side_mode="range",
        keep_empty=False,
        repeat=3,
    ),
    train=TrainConfig(epochs=12, milestones=(9, 11), lr=0.02, images_per_step=16),
    published="46.6 box AP, 40.3 mask AP on COCO val2017 (mmdetection's model zoo)",
)
