"""Cascade Mask R-CNN, ResNet-50-FPN, COCO 2017, 1x (12 epochs).

    python3 tools/train.py configs/cascade_rcnn/cascade_mask_rcnn_r50_fpn_1x_coco.py
    bash tools/dist_train.sh configs/cascade_rcnn/cascade_mask_rcnn_r50_fpn_1x_coco.py 8

Published for this recipe: 41.2 box AP, 35.9 mask AP on COCO val2017 (mmdetection's model zoo).
Its authors used 6.0 GB per card with 2 images on it. Not yet measured with this project.
"""

from cascade_rcnn.config import Config, DataConfig, ModelConfig, TrainConfig

config = Config(
    model=ModelConfig(backbone="resnet50.tv_in1k", masks="every"),
    data=DataConfig(root="data/coco", keep_empty=False),
    train=TrainConfig(epochs=12, milestones=(8, 11), lr=0.02, images_per_step=16),
    published="41.2 box AP, 35.9 mask AP on COCO val2017 (mmdetection's model zoo)",
)
