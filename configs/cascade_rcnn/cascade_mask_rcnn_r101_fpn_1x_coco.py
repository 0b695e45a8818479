"""Cascade Mask R-CNN, ResNet-101-FPN, COCO 2017, 1x (12 epochs).

    python3 tools/train.py configs/cascade_rcnn/cascade_mask_rcnn_r101_fpn_1x_coco.py
    bash tools/dist_train.sh configs/cascade_rcnn/cascade_mask_rcnn_r101_fpn_1x_coco.py 8

Published for this recipe: 42.9 box AP, 37.3 mask AP on COCO val2017 (mmdetection's model zoo).
Its authors used 7.9 GB per card with 2 images on it. Not yet measured with this project.
"""

from cascade_rcnn.config import Config, DataConfig, ModelConfig, TrainConfig

config = Config(
    model=ModelConfig(backbone="resnet101.tv_in1k", masks="every"),
    data=DataConfig(root="data/coco", keep_empty=False),
    train=TrainConfig(epochs=12, milestones=(8, 11), lr=0.02, images_per_step=16),
    published="42.9 box AP, 37.3 mask AP on COCO val2017 (mmdetection's model zoo)",
)
