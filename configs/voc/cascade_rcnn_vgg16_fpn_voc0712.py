"""Cascade R-CNN, VGG-16-FPN, Pascal VOC: trained on 2007 and 2012 trainval, tested on 2007 test.

    python3 tools/train.py configs/voc/cascade_rcnn_vgg16_fpn_voc0712.py
    bash tools/dist_train.sh configs/voc/cascade_rcnn_vgg16_fpn_voc0712.py 4

The data lies as its archives unpack:

    data/VOCdevkit/VOC2007/{Annotations,ImageSets/Main,JPEGImages}
    data/VOCdevkit/VOC2012/{Annotations,ImageSets/Main,JPEGImages}

The authors' settings: shorter side 600, 45,000 steps of 8 images (22 epochs) at a rate of 0.001 for 8 images.
Published for this network: none. The authors' cascade on VGG-16 without an FPN has 51.2 AP, 79.1 AP50, 56.3 AP75
(COCO's metric on VOC 2007 test; README of github.com/zhaoweicai/cascade-rcnn).
Not yet measured with this project.
"""

from cascade_rcnn.config import Config, DataConfig, ModelConfig, TrainConfig

config = Config(
    model=ModelConfig(backbone="vgg16.tv_in1k", frozen_stages=0),
    data=DataConfig(
        root="data/VOCdevkit",
        train="2007_trainval+2012_trainval",
        val="2007_test",
        short_side=(600,),
        long_side=1000,
    ),
    train=TrainConfig(epochs=22, milestones=(15, 20), lr=0.001, images_per_step=8),
    published="none for this network",
)
