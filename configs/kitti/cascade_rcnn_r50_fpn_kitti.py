"""Cascade R-CNN, ResNet-50-FPN, KITTI object detection (2D boxes).

    python3 tools/train.py configs/kitti/cascade_rcnn_r50_fpn_kitti.py
    bash tools/dist_train.sh configs/kitti/cascade_rcnn_r50_fpn_kitti.py 4

The data lies as its archives unpack; without ImageSets every other image is used for validation:

    data/kitti/training/{image_2,label_2}
    data/kitti/ImageSets/{train,val}.txt          (optional)

Images (1242 x 375) are enlarged to a shorter side of 576, as usual since MS-CNN (arXiv 1607.07155). DontCare regions,
and objects of classes like Van and Misc as the official protocol has them, stay out of the negatives.
Published for this network: none. Not yet measured with this project.
"""

from cascade_rcnn.config import Config, DataConfig, ModelConfig, TrainConfig

config = Config(
    model=ModelConfig(backbone="resnet50.tv_in1k", anchor_ratios=(0.5, 1.0, 2.0), score_threshold=0.01),
    data=DataConfig(
        root="data/kitti",
        short_side=(576,),
        long_side=1920,
        photometric=True,
        ignore_regions=True,
    ),
    train=TrainConfig(epochs=24, milestones=(16, 22), lr=0.01, images_per_step=8),
    published="none for this network",
)
