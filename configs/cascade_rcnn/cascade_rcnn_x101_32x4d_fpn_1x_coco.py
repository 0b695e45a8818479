"""Cascade R-CNN, ResNeXt-101-32x4d-FPN, COCO 2017, 1x (12 epochs).

    python3 tools/train.py configs/cascade_rcnn/cascade_rcnn_x101_32x4d_fpn_1x_coco.py
    bash tools/dist_train.sh configs/cascade_rcnn/cascade_rcnn_x101_32x4d_fpn_1x_coco.py 8

Published for this recipe: 43.7 box AP on COCO val2017 (mmdetection's model zoo).
Its authors used 7.6 GB per card with 2 images on it. Not yet measured with this project.
"""

from cascade_rcnn.config import Config, DataConfig, ModelConfig, TrainConfig

config = Config(
    model=ModelConfig(backbone="resnext101_32x4d.gluon_in1k"),
    data=DataConfig(root="data/coco", keep_empty=False),
    train=TrainConfig(epochs=12, milestones=(8, 11), lr=0.02, images_per_step=16),
    published="43.7 box AP on COCO val2017 (mmdetection's model zoo)",
)
