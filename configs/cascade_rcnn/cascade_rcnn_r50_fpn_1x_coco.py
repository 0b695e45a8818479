"""Cascade R-CNN, ResNet-50-FPN, COCO 2017, 1x (12 epochs).

    python3 tools/train.py configs/cascade_rcnn/cascade_rcnn_r50_fpn_1x_coco.py
    bash tools/dist_train.sh configs/cascade_rcnn/cascade_rcnn_r50_fpn_1x_coco.py 8

Published for this recipe: 40.3 box AP on COCO val2017 (mmdetection's model zoo), 40.4 (8 cards, FP32).
Its authors used 4.4 GB per card with 2 images on it. Not yet measured with this project.
"""

from cascade_rcnn.config import Config, DataConfig, ModelConfig, TrainConfig

config = Config(
    model=ModelConfig(backbone="resnet50.tv_in1k"),
    data=DataConfig(root="data/coco", keep_empty=False),
    train=TrainConfig(epochs=12, milestones=(8, 11), lr=0.02, images_per_step=16),
    published="40.3 box AP on COCO val2017 (mmdetection's model zoo), 40.4 (8 cards, FP32)",
)
