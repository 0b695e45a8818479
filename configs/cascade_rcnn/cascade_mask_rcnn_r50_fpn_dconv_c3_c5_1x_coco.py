"""Cascade Mask R-CNN, ResNet-50-FPN with deformable convolutions in stages 3 to 5, COCO 2017, 1x (12 epochs).

    python3 tools/train.py configs/cascade_rcnn/cascade_mask_rcnn_r50_fpn_dconv_c3_c5_1x_coco.py
    bash tools/dist_train.sh configs/cascade_rcnn/cascade_mask_rcnn_r50_fpn_dconv_c3_c5_1x_coco.py 8

Published for this recipe: 44.4 box AP, 38.6 mask AP on COCO val2017 (mmdetection's model zoo).
Not yet measured with this project.
"""

from cascade_rcnn.config import Config, DataConfig, ModelConfig, TrainConfig

config = Config(
    model=ModelConfig(backbone="resnet50.tv_in1k", deformable="plain", masks="every"),
    data=DataConfig(root="data/coco", keep_empty=False),
    train=TrainConfig(epochs=12, milestones=(8, 11), lr=0.02, images_per_step=16),
    published="44.4 box AP, 38.6 mask AP on COCO val2017 (mmdetection's model zoo)",
)
