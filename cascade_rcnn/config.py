"""Everything that a user can set, as plain dataclasses; a recipe is a Python file with one ``config = Config(...)``.

Values are checked when a config is created, so a typo costs no training time. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from cascade_rcnn.errors import ConfigError

SemanticsName = Literal["mmdetection", "detectron2", "paper", "torchvision"]
Orientation = Literal["auto", "stored", "upright"]
# Settings that ``check/choices.py`` can choose, in its order
AUTOMATIC = (
    "data.short_side",
    "data.long_side",
    "train.batch_size",
    "model.anchor_scales",
    "model.anchor_ratios",
    "model.max_detections",
    "data.flip",
    "data.repeat_threshold",
    "train.precision",
)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


# Bounds of numbers, both included, and what is said of a number below them; of a tuple, each number's.
_Bounds = tuple[float, float, str]
_ABOVE_0, _BELOW_1 = math.ulp(0.0), math.nextafter(1.0, 0.0)
_MOST = 2**31 - 1  # of whole numbers, unless they have a bound of their own
_POSITIVE: _Bounds = (_ABOVE_0, math.inf, "above 0")
_POSITIVES: _Bounds = (_ABOVE_0, math.inf, "numbers above 0, at least one")
_PROBABILITY: _Bounds = (0.0, 1.0, "a probability, from 0 to 1")
_COUNTED: _Bounds = (1, _MOST, "at least 1")
_OR_NONE: _Bounds = (0, math.inf, "0 (none) or more")
_STEPS_OR_NEVER: _Bounds = (0, _MOST, "0 (never) or more")
_SIDES: _Bounds = (32, _MOST, "at least one size of at least 32 pixels")
_BOUNDS: dict[str, _Bounds] = {
    "model.drop_path": (0.0, _BELOW_1, "from 0 to below 1"),
    "model.frozen_stages": (-1, 4, "between -1 and 4"),
    "model.deformable_stages": (1, 4, "stages 1 to 4"),
    "model.deformable_groups": _COUNTED,
    "model.fpn_channels": _COUNTED,
    "model.anchor_scales": _POSITIVES,
    "model.anchor_sizes": _POSITIVES,
    "model.anchor_ratios": _POSITIVES,
    "model.rpn_convs": _COUNTED,
    "model.rpn_samples": _COUNTED,
    "model.stage_ious": (_ABOVE_0, _BELOW_1, "each in (0, 1)"),
    "model.stage_loss_weights": (0.0, math.inf, "each 0 or more"),
    "model.stage_stds": (_ABOVE_0, math.inf, "each above 0"),
    "model.roi_samples": _COUNTED,
    "model.head_channels": _COUNTED,
    "model.box_loss_weight": _POSITIVE,
    "model.mask_channels": _COUNTED,
    "model.stop_after_stage": (0, _MOST, "0 (all) or more"),
    "model.score_threshold": (0.0, _BELOW_1, "from 0 to below 1"),
    "model.nms_iou": (_ABOVE_0, 1.0, "above 0, at most 1"),
    "model.max_detections": _COUNTED,
    "model.train_proposals": (0, _MOST, "0 (as model.semantics has it) or more"),
    "model.test_proposals": _COUNTED,
    "data.short_side": _SIDES,
    "data.long_side": (32, _MOST, "at least 32 pixels"),
    "data.test_short_side": (0, _MOST, "0 (the largest of data.short_side) or a size in pixels"),
    "data.large_scale_jitter": (_ABOVE_0, 100.0, "two factors, the smaller first, above 0 and at most 100"),
    "data.crop": _PROBABILITY,
    "data.crop_short_side": _SIDES,
    "data.crop_range": (16, _MOST, "the smaller first, at least 16 pixels"),
    "data.copy_paste": _PROBABILITY,
    "data.mosaic": _PROBABILITY,
    "data.flip": _PROBABILITY,
    "data.vertical_flip": _PROBABILITY,
    "data.repeat": _COUNTED,
    "data.repeat_threshold": (0.0, _BELOW_1, "a share of the images, below 1; 0 repeats none"),
    "data.workers": (0, _MOST, "0 (loads in the main process) or more"),
    "data.pad_multiple": _COUNTED,
    "data.max_pixels": (1, 2**53, "at least 1"),
    "train.epochs": (0, _MOST, "0 (chosen from the number of images) or more"),
    "train.milestones": (1, _MOST, "epochs, each at least 1"),
    "train.lr": _POSITIVE,
    "train.images_per_step": _COUNTED,
    "train.batch_size": _COUNTED,
    "train.accumulate": (0, _MOST, "0 (as train.images_per_step wants) or more"),
    "train.momentum": (0.0, _BELOW_1, "0 (none) or more, below 1"),
    "train.weight_decay": _OR_NONE,
    "train.layer_decay": (_ABOVE_0, 1.0, "above 0, at most 1 (none)"),
    "train.warmup_steps": (0, _MOST, "0 (none) or more"),
    "train.warmup_factor": (0.0, 1.0, "from 0 to 1"),
    "train.clip_grad_norm": _OR_NONE,
    "train.ema": (0.0, _BELOW_1, "0 (off) or a decay below 1"),
    "train.evaluate_every": _STEPS_OR_NEVER,
    "train.val_loss_images": (0, _MOST, "0 (none) or more"),
    "train.save_every": (0, _MOST, "0 (at the end of each epoch only) or more"),
    "train.patience": _STEPS_OR_NEVER,
    "train.log_every": _COUNTED,
    "train.max_steps": (0, _MOST, "0 (the whole schedule) or more"),
    "train.max_bad_losses": _COUNTED,
    "train.max_bad_images": (0, _MOST, "0 or more"),
    "train.stall_minutes": _OR_NONE,
    "train.seed": (0, 2**63 - 1, "0 or more"),
}
_NOT_EMPTY = (_POSITIVES, _SIDES)


def _check_bounds(section: str, settings: object) -> None:
    """Every number of a section within its bounds, and finite."""
    for name, value in vars(settings).items():
        key = f"{section}.{name}"
        if key not in _BOUNDS or value is None:
            continue
        low, high, words = bounds = _BOUNDS[key]
        numbers = _numbers(value)
        _require(bool(numbers) or bounds not in _NOT_EMPTY, f"{key} {value}: {words}")
        for number in numbers:
            _require(low <= number < math.inf, f"{key} {value}: {words}")
            _require(number <= high, f"{key} {value}: {f'at most {high}' if high >= _MOST else words}")


def _numbers(value: object) -> list[float]:
    if isinstance(value, tuple):
        return [number for item in value for number in _numbers(item)]
    return [value]  # type: ignore[list-item]


def within_bounds(train: Mapping[str, object]) -> tuple[dict[str, object], list[str]]:
    """The training settings of a checkpoint, single numbers moved to the nearest bound, and a line for each of these.

    Older versions let any number through; how a network was trained must not keep it from being used.
    """
    moved, lines = dict(train), []
    for name, value in train.items():
        low, high, words = _BOUNDS.get(f"train.{name}", (-math.inf, math.inf, ""))
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not low <= value <= high:
            moved[name] = low if value < low else high
            lines.append(f"train.{name} {value} is read as {moved[name]:g} ({words})")
    return moved, lines


def pixel_range(text: str) -> Literal["auto", "dtype", "percentile"] | tuple[float, float]:
    """What ``data.range`` says: one of its words, or the two levels that become black and white.

    Raises:
        ConfigError: anything else.
    """
    if text in ("auto", "dtype", "percentile"):
        return text  # type: ignore[return-value]
    try:
        low, high = (float(word) for word in text.replace(",", " ").split())
    except ValueError:
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(
            f"data.range {text!r}: auto, dtype, percentile, or the levels that become black and white, e.g. '0 4095'"
        )
    return low, high


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network. What the three published implementations do differently is set by ``semantics``."""

    backbone: str = "resnet50.tv_in1k"
    """timm name with its weights' tag: any network with features of strides 4..32 that takes images of any size."""
    pretrained: bool = True
    """Start from the ImageNet weights of that name (downloaded once, or found in the cache)."""
    backbone_weights: str = ""
    """A file with backbone weights (.safetensors or .pth) instead of timm's."""
    style: Literal["pytorch", "caffe"] = "pytorch"
    """ResNet stride in the 3x3 (pytorch; RGB, mean and std) or in the 1x1 convolution (caffe; BGR, std 1)."""
    norm: Literal["frozen_statistics", "frozen", "batch", "sync", "group"] = "frozen_statistics"
    """Batch norm: statistics frozen and affine trained; all frozen; trained; trained over all GPUs; or group norm."""
    fpn_and_mask_norms: bool = False
    """Batch norm, as ``norm`` batch or sync has it, behind the convolutions of FPN and mask heads too."""
    output_norms: bool = False
    """A layer norm for each of the backbone's maps, as detectors with ConvNeXt or Swin have."""
    drop_path: float = 0.0
    """Stochastic depth: the probability that the last block is skipped in training; it grows linearly from 0."""
    frozen_stages: int = 1
    """-1 trains all, 0 freezes the stem, 1 the stem and the first stage, ... 4 the whole backbone."""
    deformable: Literal["none", "plain", "modulated"] = "none"
    """Deformable convolutions (DCN, or DCNv2 with modulation) for the 3x3 of deformable_stages of a ResNet."""
    deformable_stages: tuple[int, ...] = (2, 3, 4)
    """Of the backbone's four stages; 2 to 4 are C3 to C5."""
    deformable_groups: int = 1
    semantics: SemanticsName = "mmdetection"
    """Whose training and test details to follow (docs/parity.md)."""

    fpn_channels: int = 256
    anchor_scales: tuple[float, ...] = (8.0,)
    """Anchor side in units of the level's stride."""
    anchor_sizes: tuple[float, ...] | None = None
    """Anchor sides in pixels instead of anchor_scales: one for each of the five levels, or several, level by level."""
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height over width."""
    rpn_convs: int = 1
    """3x3 convolutions before the RPN's outputs."""
    rpn_samples: int = 256
    """Anchors per image in the RPN's loss, at most half of them positive."""

    stage_ious: tuple[float, ...] = (0.5, 0.6, 0.7)
    """IoU that makes a box positive, per stage; its length is the number of stages (one: Faster R-CNN)."""
    stage_loss_weights: tuple[float, ...] | None = None
    """Weight of each stage's losses; None: 1, 0.5, 0.25, ... (mmdetection, paper) or 1 (detectron2, torchvision)."""
    stage_stds: tuple[tuple[float, float, float, float], ...] | None = None
    """Standard deviation of the box deltas per stage; None: (.1, .1, .2, .2) divided by 1, 2, 3, ..."""
    roi_samples: int = 512
    """RoIs per image in a stage's loss, at most a quarter of them positive."""
    class_agnostic_boxes: bool = True
    """One box per RoI (the paper's cascade) or one per class (Faster R-CNN)."""
    head_channels: int = 1024
    box_head: Literal["2fc", "4conv1fc", "4conv1fc_gn", "4conv1fc_bn"] = "2fc"
    """Two fully connected layers, or four convolutions and one, without norm, with group norm or with batch norm."""
    class_loss: Literal["cross_entropy", "focal", "seesaw"] = "cross_entropy"
    """Of the box heads: focal gives well recognised boxes little weight, seesaw rare classes more (docs/train.md)."""
    box_loss: Literal["smooth_l1", "giou", "diou", "ciou"] = "smooth_l1"
    """Of the box deltas, or, IoU losses, of the boxes that they give."""
    box_loss_weight: float = 1.0
    """IoU losses are small: published recipes give them 10."""
    masks: Literal["none", "every", "last", "one"] = "none"
    """A mask head at every stage, at the last, or one trained on stage 1's samples and run on the final boxes."""
    mask_channels: int = 256

    # Test time
    stop_after_stage: int = 0
    """Use the first n stages only; 0 uses all."""
    score_threshold: float = 0.05
    nms: Literal["class", "agnostic", "soft"] = "class"
    nms_iou: float = 0.5
    max_detections: int = 100
    """Detections kept per image; raise it for dense scenes."""
    train_proposals: int = 0
    """RPN proposals kept per level and per image in training; 0: as model.semantics has it (1000 or 2000)."""
    test_proposals: int = 1000
    """RPN proposals kept per image at test time."""

    def __post_init__(self) -> None:
        stages = len(self.stage_ious)
        _require(stages >= 1, "model.stage_ious is empty: give one IoU per stage, e.g. 0.5 0.6 0.7")
        _check_bounds("model", self)
        for name in ("stage_loss_weights", "stage_stds"):
            value = getattr(self, name)
            _require(
                value is None or len(value) == stages,
                f"model.{name} has {len(value or ())} entries for {stages} stages (the length of model.stage_ious)",
            )
        _require(
            0 <= self.stop_after_stage <= stages,
            f"model.stop_after_stage {self.stop_after_stage}: there are {stages} stages; 0 uses all",
        )
        sizes = self.anchor_sizes
        _require(
            sizes is None or len(sizes) % 5 == 0,
            f"model.anchor_sizes {sizes}: sides in pixels for each of five levels, as many for each",
        )
        _require(
            self.box_loss == "smooth_l1" or self.semantics != "paper",
            f"model.box_loss {self.box_loss}: model.semantics paper has smooth_l1 only",
        )
        _require(
            not self.fpn_and_mask_norms or self.norm in ("batch", "sync"),
            f"model.fpn_and_mask_norms with model.norm {self.norm}: give batch or sync; group puts its own norms there",
        )
        grouped = {"fpn_channels": self.norm == "group" or self.box_head == "4conv1fc_gn"}
        grouped["mask_channels"] = self.norm == "group" and self.masks != "none"
        for name, has_groups in grouped.items():
            _require(
                not has_groups or getattr(self, name) % 32 == 0,
                f"model.{name} {getattr(self, name)}: group norm has 32 groups; give a multiple of 32",
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the data is and what the network sees of it."""

    root: str = ""
    """Folder of the data set; its format is recognised (docs/data.md)."""
    train: str = "train"
    """Split to train on; several joined with a plus: 2007_trainval+2012_trainval."""
    val: str = "val"
    """Split to evaluate on."""
    short_side: tuple[int, ...] = (800,)
    """Shorter side in training: one size, or the choices (or the two ends, see short_side_mode)."""
    short_side_mode: Literal["choice", "range"] = "choice"
    long_side: int = 1333
    """Limit of the longer side."""
    test_short_side: int = 0
    """Shorter side at test time; 0: the largest of short_side."""
    large_scale_jitter: tuple[float, float] | None = None
    """Resize by a random factor of (long_side, long_side), then crop or pad to it: (0.1, 2.0)."""
    crop: float = 0.0
    """Probability that an image is resized, cropped at random, then resized as usual (DETR's augmentation)."""
    crop_short_side: tuple[int, ...] = (400, 500, 600)
    """Choices of the shorter side before that crop."""
    crop_range: tuple[int, int] = (384, 600)
    """Smallest and largest side of that crop, height and width each at random."""
    copy_paste: float = 0.0
    """Probability that objects of another image are pasted on an image, along their masks (arXiv 2012.07177)."""
    mosaic: float = 0.0
    """Probability that an image is put together from parts of four, at half to full scale (arXiv 2004.10934)."""
    augment: str = ""
    """Python file with one ``transform`` of Albumentations, or a function like it, run on each training image."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    vertical_flip: float = 0.0
    photometric: bool = False
    """Random brightness, contrast, saturation and hue."""
    antialias: bool | None = None
    """Resize with antialiasing (Pillow's bilinear); None: as model.semantics wants it."""
    keep_empty: bool = True
    """Train on images without objects too."""
    ignore_regions: bool = False
    """Keep crowds, DontCare and ignored objects out of the negatives instead of treating them as background."""
    repeat: int = 1
    """Passes over the data per epoch."""
    repeat_threshold: float = 0.0
    """Repeat images with classes that less than this share of the images show (LVIS: 0.001); 0: none."""
    workers: int = 2
    """Loader processes per GPU."""
    pad_multiple: int = 32
    pad_buckets: bool | None = None
    """Pad to one of six sizes, so that code is made six times at most; None: where something is compiled."""
    max_pixels: int = 100_000_000
    """Refuse to decode an image with more pixels than this."""
    orientation: Orientation = "auto"
    """What labels count of pictures with an orientation tag where their own size does not say: stored or upright."""
    range: str = "auto"
    """Levels of 16-bit and float pictures that become black and white: auto, dtype, percentile, or two numbers."""

    def __post_init__(self) -> None:
        _check_bounds("data", self)
        _require(
            self.short_side_mode == "choice" or len(self.short_side) <= 2,
            f"data.short_side {self.short_side}: with short_side_mode range give the two ends, or one size",
        )
        _require(
            self.long_side >= max(self.short_side),
            f"data.long_side {self.long_side} is below the shorter side {max(self.short_side)}: raise it",
        )
        _require(
            not self.mosaic or self.large_scale_jitter is None,
            "data.mosaic and data.large_scale_jitter both make the picture: use one of them",
        )
        self._check_crop()
        _require(
            self.orientation in ("auto", "stored", "upright"),
            f"data.orientation {self.orientation!r}: auto, stored or upright",
        )
        pixel_range(self.range)

    def _check_crop(self) -> None:
        _require(
            not self.crop or self.large_scale_jitter is None,
            "data.crop and data.large_scale_jitter both crop: use one of them",
        )
        for name in ("crop_range", "large_scale_jitter"):
            low, high = getattr(self, name) or (0, 0)
            _require(low <= high, f"data.{name} {getattr(self, name)}: {_BOUNDS[f'data.{name}'][2]}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The schedule. ``lr`` belongs to ``images_per_step`` images and is scaled when the real number differs."""

    init: str = ""
    """A checkpoint (.safetensors or run folder) to start from, whatever its classes; same network as this recipe's."""
    epochs: int = 12
    """Passes over the data; 0 chooses epochs, milestones and warm-up from the number of images."""
    milestones: tuple[int, ...] = (8, 11)
    """Epochs after which the learning rate falls to a tenth (schedule multistep)."""
    schedule: Literal["multistep", "cosine"] = "multistep"
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.02
    images_per_step: int = 16
    """Images per step that lr is meant for."""
    batch_size: int = 2
    """Images per process and pass."""
    accumulate: int = 1
    """Passes per step; 0: as many as bring the real batch up to images_per_step."""
    momentum: float = 0.9
    weight_decay: float = 1e-4
    norm_weight_decay: bool = True
    """Decay norm weights and biases too, as mmdetection's SGD recipes do."""
    layer_decay: float = 1.0
    """Factor of the learning rate from one group of the backbone's layers to the group before it, e.g. 0.7; 1: none."""
    warmup_steps: int = 500
    warmup_factor: float = 0.001
    clip_grad_norm: float = 0.0
    """Limit of the gradient's norm; 0: none."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on GPUs that have it, else fp32."""
    ema: float = 0.0
    """Decay of the moving average of the weights, e.g. 0.9998; 0: none."""
    activation_checkpointing: bool = False
    """Recompute the backbone's activations backward: less memory, about a quarter more time."""
    compile: bool = False
    """torch.compile backbone, FPN and heads."""
    evaluate_every: int = 1
    """Epochs between evaluations; 0: never."""
    val_loss_images: int = 32
    """Images of the validation split, the same each time, whose losses every evaluation measures too; 0: none."""
    save_every: int = 0
    """Steps between checkpoints within an epoch; 0: at the end of each epoch only."""
    patience: int = 0
    """Stop after so many evaluations without a better result; 0: never."""
    summary: bool = True
    """Look back: summary.html at every evaluation and at the end, curves.json of the best evaluation, run.json."""
    log_every: int = 50
    """Steps between logged lines."""
    loggers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Who gets the curves besides log.jsonl: tensorboard (where it is installed), wandb, mlflow."""
    max_steps: int = 0
    """Stop after so many steps; 0: the whole schedule."""
    max_bad_losses: int = 5
    """Stop after so many non-finite losses in a row."""
    max_bad_images: int = 100
    """Stop when more images than this could not be read."""
    stall_minutes: float = 10.0
    """Report a process that has spent more minutes than this on one step, with step and images; 0: never."""
    seed: int = 0
    deterministic: bool = False
    """Bit-equal runs, slower."""

    def __post_init__(self) -> None:
        _check_bounds("train", self)
        _require(list(self.milestones) == sorted(set(self.milestones)), f"train.milestones {self.milestones}: rising")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A recipe: network, data, schedule."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    published: str = ""
    """What others reached with this recipe, and where that is written."""
    automatic: tuple[str, ...] | None = None
    """Settings that a training chooses from its data (docs/train.md); one given on the command line is not chosen."""

    def __post_init__(self) -> None:
        _require(
            not self.data.crop or self.model.semantics != "paper",
            f"data.crop {self.data.crop}: model.semantics paper resizes once only; use data.large_scale_jitter, or 0",
        )
        for name, used in (("mosaic", self.data.mosaic), ("augment", self.data.augment)):
            _require(
                not used or self.model.semantics != "paper",
                f"data.{name} {used}: model.semantics paper compares boxes in the original image; use another",
            )
        unknown = [name for name in self.automatic or () if name not in AUTOMATIC]
        _require(not unknown, f"automatic {' '.join(unknown)}: can be chosen are {', '.join(AUTOMATIC)}; or none")

    def to_dict(self) -> dict[str, object]:
        """Plain nested dictionaries, as written to ``config.json`` and into checkpoints."""
        return dataclasses.asdict(self)


def finetune_schedule(config: Config, num_images: int) -> Config:
    """Fill in the schedule of a recipe with ``train.epochs = 0`` from the number of training images.

    A small data set gets more epochs, although fewer images in total: epochs = 1000 / sqrt(images), between 12
    (the 1x schedule, reached at 7,000 images) and 100 (100 images and fewer). The learning rate falls at 2/3 and 11/12
    as in 1x, and the warm-up takes at most a tenth of the steps. A config that names its epochs is returned as it is.
    """
    train = config.train
    if train.epochs:
        return config
    epochs = min(100, max(12, round(1000 / math.sqrt(max(1, num_images)))))
    images_per_step = train.batch_size * train.accumulate or train.images_per_step  # accumulate 0 fills the step
    steps = epochs * config.data.repeat * math.ceil(max(1, num_images) / images_per_step)
    milestones = (round(epochs * 2 / 3), round(epochs * 11 / 12))
    warmup = min(train.warmup_steps, max(1, steps // 10))
    return dataclasses.replace(
        config, train=dataclasses.replace(train, epochs=epochs, milestones=milestones, warmup_steps=warmup)
    )
