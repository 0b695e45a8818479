"""Cascade R-CNN, ResNet-50-FPN, CityPersons.

    python3 tools/train.py configs/citypersons/cascade_rcnn_r50_fpn_citypersons.py
    bash tools/dist_train.sh configs/citypersons/cascade_rcnn_r50_fpn_citypersons.py 8

The data lies like this (Cityscapes' images, CityPersons' annotations):

    data/citypersons/anno_train.mat  anno_val.mat
    data/citypersons/leftImg8bit/{train,val}/CITY/*.png

Images (2048 x 1024) are enlarged 1.3 times and anchors have the pedestrian's aspect ratio 2.44 (height over width), as
in the benchmark's own baseline (arXiv 1702.05693). Ignore regions stay out of the negatives.
Published for this network: none. Not yet measured with this project.
"""

from cascade_rcnn.config import Config, DataConfig, ModelConfig, TrainConfig

config = Config(
    model=ModelConfig(
        backbone="resnet50.tv_in1k",
        anchor_scales=(8.0, 11.3),
        anchor_ratios=(2.44,),
        score_threshold=0.01,
    ),
    data=DataConfig(root="data/citypersons", short_side=(1331,), long_side=2662, ignore_regions=True),
    train=TrainConfig(epochs=16, milestones=(10, 14), lr=0.01, images_per_step=8, batch_size=1),
    published="none for this network",
)
