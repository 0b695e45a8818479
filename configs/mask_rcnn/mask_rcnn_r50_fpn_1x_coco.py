"""Mask R-CNN, ResNet-50-FPN, COCO 2017, 1x (12 epochs): the one-stage baseline of the cascade.

    python3 tools/train.py configs/mask_rcnn/mask_rcnn_r50_fpn_1x_coco.py
    bash tools/dist_train.sh configs/mask_rcnn/mask_rcnn_r50_fpn_1x_coco.py 8

Published for this recipe: 38.2 box AP, 34.7 mask AP on COCO val2017 (mmdetection's model zoo).
Not yet measured with this project.
"""

from cascade_rcnn.config import Config, DataConfig, ModelConfig, TrainConfig

config = Config(
    model=ModelConfig(
        backbone="resnet50.tv_in1k",
        stage_ious=(0.5,),
        class_agnostic_boxes=False,
        masks="every",
    ),
    data=DataConfig(root="data/coco", keep_empty=False),
    train=TrainConfig(epochs=12, milestones=(8, 11), lr=0.02, images_per_step=16),
    published="38.2 box AP, 34.7 mask AP on COCO val2017 (mmdetection's model zoo)",
)
