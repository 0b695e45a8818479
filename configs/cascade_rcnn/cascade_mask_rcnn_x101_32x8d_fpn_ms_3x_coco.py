"""Cascade Mask R-CNN, ResNeXt-101-32x8d-FPN, COCO 2017, shorter sides 640 to 800, 3x (36 epochs: 12 times 3).

    python3 tools/train.py configs/cascade_rcnn/cascade_mask_rcnn_x101_32x8d_fpn_ms_3x_coco.py
    bash tools/dist_train.sh configs/cascade_rcnn/cascade_mask_rcnn_x101_32x8d_fpn_ms_3x_coco.py 8

Published for this recipe: 46.1 box AP, 39.9 mask AP on COCO val2017 (mmdetection's model zoo).
Its authors used 12.1 GB per card with 2 images on it. Not yet measured with this project.

The published run started from Caffe2's ImageNet weights (detectron2's X-101-32x8d.pkl); timm's are torchvision's.
"""

from cascade_rcnn.config import Config, DataConfig, ModelConfig, TrainConfig

config = Config(
    model=ModelConfig(backbone="resnext101_32x8d.tv_in1k", norm="frozen", masks="every"),
    data=DataConfig(
        root="data/coco",
        short_side=(640, 800),
        short_side_mode="range",
        keep_empty=False,
        repeat=3,
    ),
    train=TrainConfig(epochs=12, milestones=(9, 11), lr=0.02, images_per_step=16),
    published="46.1 box AP, 39.9 mask AP on COCO val2017 (mmdetection's model zoo)",
)
