"""Cascade Mask R-CNN, ResNet-50-FPN, from nothing: large-scale jitter, norms everywhere, 100 epochs of COCO 2017.

    python3 tools/train.py configs/cascade_rcnn/cascade_mask_rcnn_r50_fpn_lsj_100e_coco.py
    bash tools/dist_train.sh configs/cascade_rcnn/cascade_mask_rcnn_r50_fpn_lsj_100e_coco.py 8

Published for this recipe: none. Its settings are those of detectron2's new baselines, whose Mask R-CNN has one stage:
44.6 box AP, 40.3 mask AP after 100 epochs. Not yet measured with this project. `--model.norm sync` needs GPUs.
"""

from cascade_rcnn.config import Config, DataConfig, ModelConfig, TrainConfig

config = Config(
    model=ModelConfig(
        backbone="resnet50.tv_in1k",
        pretrained=False,
        norm="sync",
        fpn_and_mask_norms=True,
        frozen_stages=-1,
        semantics="detectron2",
        rpn_convs=2,
        box_head="4conv1fc_bn",
        class_agnostic_boxes=False,
        masks="every",
    ),
    data=DataConfig(
        root="data/coco", short_side=(1024,), long_side=1024, large_scale_jitter=(0.1, 2.0), keep_empty=False, workers=4
    ),
    train=TrainConfig(
        epochs=100,
        milestones=(89, 96),
        lr=0.1,
        weight_decay=4e-5,
        images_per_step=64,
        batch_size=8,
        warmup_steps=500,
        warmup_factor=0.067,
        evaluate_every=10,
    ),
    published="none",
)
