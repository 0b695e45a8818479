"""Mask R-CNN, ResNet-101-FPN, COCO 2017, 1x (12 epochs): the one-stage baseline of the cascade.

    python3 tools/train.py configs/mask_rcnn/mask_rcnn_r101_fpn_1x_coco.py
    bash tools/dist_train.sh configs/mask_rcnn/mask_rcnn_r101_fpn_1x_coco.py 8

Published for this recipe: 40.0 box AP, 36.1 mask AP on COCO val2017 (mmdetection's model zoo).
Not yet measured with this project.
"""

from cascade_rcnn.config import Config, DataConfig, ModelConfig, TrainConfig

config = Config(
    model=ModelConfig(
        backbone="resnet101.tv_in1k",
        stage_ious=(0.5,),
        class_agnostic_boxes=False,
        masks="every",
    ),
    data=DataConfig(root="data/coco", keep_empty=False),
    train=TrainConfig(epochs=12, milestones=(8, 11), lr=0.02, images_per_step=16),
    published="40.0 box AP, 36.1 mask AP on COCO val2017 (mmdetection's model zoo)",
)
