"""Cascade Mask R-CNN, ResNet-50-FPN, COCO 2017, shorter sides 640 to 800, 3x (36 epochs: 12 times 3).

    python3 tools/train.py configs/cascade_rcnn/cascade_mask_rcnn_r50_fpn_ms_3x_coco.py
    bash tools/dist_train.sh configs/cascade_rcnn/cascade_mask_rcnn_r50_fpn_ms_3x_coco.py 8

Published for this recipe: 44.3 box AP, 38.5 mask AP on COCO val2017 (mmdetection's model zoo).
Its authors used 5.9 GB per card with 2 images on it. Not yet measured with this project.
"""

from cascade_rcnn.config import Config, DataConfig, ModelConfig, TrainConfig

config = Config(
    model=ModelConfig(backbone="resnet50.tv_in1k", masks="every"),
    data=DataConfig(
        root="data/coco",
        short_side=(640, 800),
        short_side_mode="range",
        keep_empty=False,
        repeat=3,
    ),
    train=TrainConfig(epochs=12, milestones=(9, 11), lr=0.02, images_per_step=16),
    published="44.3 box AP, 38.5 mask AP on COCO val2017 (mmdetection's model zoo)",
)
