"""Cascade Mask R-CNN as detectron2 trains it (Misc/cascade_mask_rcnn_R_50_FPN_3x), COCO 2017.

    python3 tools/train.py configs/detectron2/detectron2_cascade_mask_rcnn_r50_fpn_3x.py
    bash tools/dist_train.sh configs/detectron2/detectron2_cascade_mask_rcnn_r50_fpn_3x.py 8

Published for this recipe: 44.3 box AP, 38.5 mask AP on COCO val2017 (detectron2's model zoo).
Not yet measured with this project. detectron2 counts 270,000 steps of 16 images, here rounded to whole epochs.

Caffe's ImageNet weights are not among timm's. From detectron2's model zoo take R-50.pkl, run
`cascade-rcnn convert R-50.pkl r50_caffe.safetensors` and add `--model.backbone-weights r50_caffe.safetensors`.
"""

from cascade_rcnn.config import Config, DataConfig, ModelConfig, TrainConfig

config = Config(
    model=ModelConfig(
        backbone="resnet50.tv_in1k",
        style="caffe",
        norm="frozen",
        semantics="detectron2",
        masks="one",
    ),
    data=DataConfig(root="data/coco", short_side=(640, 672, 704, 736, 768, 800), keep_empty=False),
    train=TrainConfig(epochs=37, milestones=(29, 34), lr=0.02, images_per_step=16, warmup_steps=1000),
    published="44.3 box AP, 38.5 mask AP on COCO val2017 (detectron2's model zoo)",
)
