"""Cascade Mask R-CNN, ResNet-50-FPN, COCO 2017, large-scale jitter at 1024 pixels, 200 epochs (25 times 8).

    python3 tools/train.py configs/cascade_rcnn/cascade_mask_rcnn_r50_fpn_8xb8_amp_lsj_200e_coco.py
    bash tools/dist_train.sh configs/cascade_rcnn/cascade_mask_rcnn_r50_fpn_8xb8_amp_lsj_200e_coco.py 8

Published for this recipe: none (the settings of mmdetection's box recipe, with masks).
Not yet measured with this project. Images are tested at 1024 pixels, as they were trained.
"""

from cascade_rcnn.config import Config, DataConfig, ModelConfig, TrainConfig

config = Config(
    model=ModelConfig(backbone="resnet50.tv_in1k", masks="every"),
    data=DataConfig(
        root="data/coco",
        short_side=(1024,),
        long_side=1024,
        large_scale_jitter=(0.1, 2.0),
        keep_empty=False,
        repeat=8,
        workers=4,
    ),
    train=TrainConfig(
        epochs=25,
        milestones=(22, 24),
        lr=0.08,
        images_per_step=64,
        batch_size=8,
        weight_decay=4e-5,
        warmup_steps=1000,
        warmup_factor=0.067,
        evaluate_every=5,
    ),
    published="none",
)
