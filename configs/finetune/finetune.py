"""Cascade R-CNN on a data set of your own, from ImageNet weights.

    cascade-rcnn train finetune --data my_images --out runs/mine
    python3 tools/train.py configs/finetune/finetune.py --data my_images

Input size, anchors, number of detections and flips are chosen from the data (`--explain` prints them with reasons;
docs/train.md); a setting that you give is not. The schedule follows the number of images: 100 epochs up to 100 images,
32 for 1,000, 12 from 7,000 on; the learning rate follows the real batch. Without a GPU use finetune_small.
Published for this recipe: none. Not yet measured with this project.
"""

from cascade_rcnn.config import AUTOMATIC, Config, DataConfig, ModelConfig, TrainConfig

config = Config(
    model=ModelConfig(backbone="resnet50.tv_in1k"),
    data=DataConfig(short_side=(640, 800), short_side_mode="range", photometric=True, workers=4),
    train=TrainConfig(epochs=0, lr=0.02, images_per_step=16, batch_size=2, accumulate=0),
    published="none",
    automatic=AUTOMATIC,
)
