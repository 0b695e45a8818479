"""Cascade R-CNN, ResNet-50-FPN, WIDER FACE.

    python3 tools/train.py configs/widerface/cascade_rcnn_r50_fpn_widerface.py
    bash tools/dist_train.sh configs/widerface/cascade_rcnn_r50_fpn_widerface.py 8

The data lies as its archives unpack:

    data/widerface/wider_face_split/wider_face_{train,val}_bbx_gt.txt
    data/widerface/WIDER_{train,val}/images/EVENT/*.jpg

Most faces are small: anchors start at 16 pixels and images are enlarged to a shorter side of up to 1200.
Faces marked invalid stay out of the negatives; up to 750 faces are kept per image.
Published for this network: none. Not yet measured with this project.
"""

from cascade_rcnn.config import Config, DataConfig, ModelConfig, TrainConfig

config = Config(
    model=ModelConfig(
        backbone="resnet50.tv_in1k",
        anchor_scales=(4.0, 5.66),
        anchor_ratios=(1.0, 1.5),
        score_threshold=0.01,
        max_detections=750,
        test_proposals=2000,
    ),
    data=DataConfig(
        root="data/widerface",
        short_side=(640, 1200),
        short_side_mode="range",
        long_side=1600,
        photometric=True,
        ignore_regions=True,
    ),
    train=TrainConfig(epochs=24, milestones=(16, 22), lr=0.01, images_per_step=8, batch_size=1),
    published="none for this network",
)
