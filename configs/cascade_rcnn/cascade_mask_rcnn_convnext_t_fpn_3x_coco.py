"""Cascade Mask R-CNN, ConvNeXt-T-FPN (ImageNet-1k), COCO 2017, GIoU loss, shorter sides 480 to 800, 3x (36 epochs).

    python3 tools/train.py configs/cascade_rcnn/cascade_mask_rcnn_convnext_t_fpn_3x_coco.py
    bash tools/dist_train.sh configs/cascade_rcnn/cascade_mask_rcnn_convnext_t_fpn_3x_coco.py 8

Published for this network: 50.4 box AP, 43.7 mask AP on COCO val2017 (ConvNeXt's authors).
Published for this recipe: none. Theirs starts from weights that were not averaged, timm has the averaged ones (EMA).
Not yet measured with this project.
"""

from cascade_rcnn.config import Config, DataConfig, ModelConfig, TrainConfig

config = Config(
    model=ModelConfig(
        backbone="convnext_tiny.fb_in1k",
        norm="sync",
        output_norms=True,
        drop_path=0.4,
        frozen_stages=-1,
        class_agnostic_boxes=False,
        box_head="4conv1fc_bn",
        box_loss="giou",
        box_loss_weight=10.0,
        masks="every",
    ),
    data=DataConfig(root="data/coco", short_side=tuple(range(480, 801, 32)), crop=0.5, keep_empty=False),
    train=TrainConfig(
        epochs=36,
        milestones=(27, 33),
        optimizer="adamw",
        lr=2e-4,
        weight_decay=0.05,
        norm_weight_decay=False,
        layer_decay=0.7,
    ),
    published="50.4 box AP, 43.7 mask AP on COCO val2017 (ConvNeXt's authors)",
)
