"""Cascade R-CNN, ResNet-50-FPN with deformable convolutions in stages 3 to 5, COCO 2017, 1x (12 epochs).

    python3 tools/train.py configs/cascade_rcnn/cascade_rcnn_r50_fpn_dconv_c3_c5_1x_coco.py
    bash tools/dist_train.sh configs/cascade_rcnn/cascade_rcnn_r50_fpn_dconv_c3_c5_1x_coco.py 8

Published for this recipe: 43.8 box AP on COCO val2017 (mmdetection's model zoo).
Not yet measured with this project.
"""

from cascade_rcnn.config import Config, DataConfig, ModelConfig, TrainConfig

config = Config(
    model=ModelConfig(backbone="resnet50.tv_in1k", deformable="plain"),
    data=DataConfig(root="data/coco", keep_empty=False),
    train=TrainConfig(epochs=12, milestones=(8, 11), lr=0.02, images_per_step=16),
    published="43.8 box AP on COCO val2017 (mmdetection's model zoo)",
)
