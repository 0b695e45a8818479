"""Settings that a training chooses from its data, each with one line that says why: ``Config.automatic``.

    config, choices = choose(load_config("finetune"), split, machine=Machine(gpu_memory=24.0))
    for choice in choices:
        print(choice.line())

Only annotations are looked at. G objects of the split; an object's side is the square root of its box's area.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.check.memory import Machine, step_memory
from cascade_rcnn.check.objects import anchor_sides, best_anchor_iou, object_table
from cascade_rcnn.config import AUTOMATIC, Config, ModelConfig
from cascade_rcnn.data.records import DataSplit
from cascade_rcnn.messages import few_names, printable, shown

# Input pixels of the median object's side: below, a box has few cells of the finest level; above, pixels are wasted.
_LEAST_SIDE, _MOST_SIDE = 48.0, 128.0
_LOWEST, _HIGHEST = 0.6, 1.6  # times the recipe's own input size
_SMALLEST_INPUT = 320
_MOST_OBJECTS = 20_000  # measured; a regular sample of more
_MOST_ASPECT = 3.0

_SCALES = (8.0, 6.0, 4.0, 12.0, 3.0, 16.0, 2.0)
_RATIOS = ((0.5, 1.0, 2.0), (0.33, 0.5, 1.0, 2.0, 3.0), (0.2, 0.33, 0.5, 1.0, 2.0, 3.0, 5.0))
_REACHED = 0.98  # of the objects: no need for other anchors
_WORTH, _WORTH_MORE = 0.01, 0.05  # of the objects: what other anchors must bring, and what more anchors must
_LOST = 0.01  # of the largest objects: what other anchors may lose

_UNEVEN = 10  # times as many images of one class as of another: worth balancing
_MOST_REPEATS = 4  # of an image in an epoch
_COMMON = 0.1  # of the images: a class that so many show is not repeated

_SIDED = frozenset(["left", "right", "clockwise", "counterclockwise", "anticlockwise", "leftward", "rightward"])
_READ = frozenset(
    [
        "text",
        "texts",
        "digit",
        "digits",
        "letter",
        "letters",
        "character",
        "characters",
        "word",
        "words",
        "numeral",
        "numerals",
    ]
)


@dataclass(frozen=True)
class Choice:
    """One setting, what it became, and why."""

    setting: str
    value: object
    reason: str

    def line(self) -> str:
        """``model.max_detections 240: twice the 120 objects of plate_12.jpg``."""
        values = self.value if isinstance(self.value, tuple) else (self.value,)
        words = " ".join(f"{item:g}" if isinstance(item, float) else f"{item}" for item in values)
        return f"{self.setting} {words}: {self.reason}"


@dataclass(frozen=True)
class _Objects:
    """What is to be learnt, in pixels of the original images."""

    boxes: NDArray[np.float64]  # [G, 4]
    sizes: NDArray[np.float64]  # [G, 2] (width, height) of the image
    images: NDArray[np.float64]  # [N, 2] (width, height) of each image whose size is known

    def scale(self, short: float, long: float) -> NDArray[np.float64]:
        """Factor [G] from the image of each object to the network's input."""
        scale: NDArray[np.float64] = np.minimum(short / self.sizes.min(axis=1), long / self.sizes.max(axis=1))
        return scale

    def median_side(self, short: float, long: float) -> float:
        """Side of the median object in input pixels."""
        width, height = (self.boxes[:, 2:] - self.boxes[:, :2]).T
        return float(np.median(np.sqrt(width * height) * self.scale(short, long)))


def _objects(split: DataSplit) -> _Objects:
    table = object_table(split)
    learnt = np.flatnonzero(~table.ignore & (table.sizes > 0).all(axis=1))
    learnt = learnt[:: max(1, math.ceil(len(learnt) / _MOST_OBJECTS))]
    images = np.array([(record.width, record.height) for record in split.records], dtype=np.float64).reshape(-1, 2)
    return _Objects(table.boxes[learnt], table.sizes[learnt], images[(images > 0).all(axis=1)])


def choose(config: Config, split: DataSplit, *, machine: Machine) -> tuple[Config, list[Choice]]:
    """The config with every setting of ``config.automatic`` chosen for the training split, and the reasons.

    What is not listed there keeps its value, which has a line too. ``automatic`` of the result is None: nothing is
    left to choose. A config that chooses nothing (None) is returned as it is, without lines.
    """
    if config.automatic is None:
        return config, []
    objects = _objects(split)
    choosers: Mapping[str, Callable[[Config], list[Choice]]] = {
        "data.short_side": lambda c: _input_size(c, objects, machine),
        "train.batch_size": lambda c: _batch_size(c, objects, machine),
        "model.anchor_scales": lambda c: _anchor_scales(c, objects),
        "model.anchor_ratios": lambda c: _anchor_ratios(c, objects),
        "model.max_detections": lambda c: _max_detections(c, split),
        "data.flip": lambda c: _flip(c, split),
        "data.repeat_threshold": lambda c: _repeat_threshold(c, split),
        "train.precision": lambda c: _precision(c, machine),
    }
    found: list[Choice] = []
    for chooser in choosers.values():
        chosen = chooser(config)
        found += chosen
        config = _changed(config, {choice.setting: choice.value for choice in chosen})
    return dataclasses.replace(config, automatic=None), found


_LOOKED_FOR = 1000  # images


def measured(split: DataSplit) -> list[str]:
    """On what the choices rest, a line or two: annotations, whose images may be elsewhere."""
    records = split.records
    objects = sum(int((~record.ignore).sum()) for record in records)
    lines = [
        f"measured: {objects:,} object{'s' * (objects != 1)} in {len(records):,} image{'s' * (len(records) != 1)} "
        f"of {split.name!r}"
    ]
    looked_for = records[:: math.ceil(len(records) / _LOOKED_FOR) or 1]
    missing = [record.path for record in looked_for if not record.path.is_file()]
    if missing:
        lines.append(
            f"missing: {len(missing):,} of {len(looked_for):,} images that were looked for ({printable(missing[0])} "
            "first): chosen from the annotations alone"
        )
    return lines


def advice(config: Config, machine: Machine) -> list[str]:
    """A line where the machine is too slow for the network: one of the usual width, without a GPU."""
    if machine.gpu_memory is None and config.model.fpn_channels >= 256:
        return ["no GPU: this network takes hours to days on a CPU; finetune_small is made for one"]
    return []


def keep_choices(config: Config, earlier: Config) -> Config:
    """``config`` with what a run chose when it began, for a resumed run: its network must stay what it is."""
    names = config.automatic or ()
    return dataclasses.replace(_changed(config, {name: _value(earlier, name) for name in names}), automatic=None)


def _value(config: Config, name: str) -> object:
    section, _, leaf = name.partition(".")
    return getattr(getattr(config, section), leaf)


def _changed(config: Config, values: Mapping[str, object]) -> Config:
    """With settings replaced, those of a section together: they must agree."""
    sections: dict[str, dict[str, object]] = {}
    for name, value in values.items():
        section, _, leaf = name.partition(".")
        sections.setdefault(section, {})[leaf] = value
    parts = {name: dataclasses.replace(getattr(config, name), **changes) for name, changes in sections.items()}
    return dataclasses.replace(config, **parts)  # type: ignore[arg-type]


def _free(config: Config, name: str) -> bool:
    assert name in AUTOMATIC, name
    return name in (config.automatic or ())


def _kept(config: Config, name: str, reason: str = "as given") -> Choice:
    return Choice(name, _value(config, name), reason)


# Input size


def _input_size(config: Config, objects: _Objects, machine: Machine) -> list[Choice]:
    """``data.short_side`` and ``data.long_side``: the median object between 48 and 128 pixels, within the memory."""
    data = config.data
    free_short, free_long = _free(config, "data.short_side"), _free(config, "data.long_side")
    if not len(objects.boxes) and (free_short or free_long):
        reason = "the recipe's: no object in an image of known size"
        names = {"data.short_side": free_short, "data.long_side": free_long}
        return [_kept(config, name, reason) if free else _kept(config, name) for name, free in names.items()]
    own = max(data.short_side)
    aspect = float(np.percentile(objects.images.max(axis=1) / objects.images.min(axis=1), 90))
    longer = max(data.long_side / own, min(aspect, _MOST_ASPECT))  # than the shorter side, by this factor
    short, found = own, [_kept(config, "data.short_side")]
    if free_short:
        short, reason = _short_side(config, objects, longer, machine)
        lowest = round(min(data.short_side) / own * short / 32) * 32
        sides = tuple(dict.fromkeys((min(lowest, short), short)))
        found = [Choice("data.short_side", sides if len(data.short_side) > 1 else (short,), reason)]
    if not free_long:
        return [*found, _kept(config, "data.long_side")]
    reason = f"{longer:.2g} times the shorter side"
    if aspect > longer:
        reason += f", no more, though one of ten images is over {aspect:.3g} times as long as wide"
    elif longer > data.long_side / own:
        reason += f", for nine of ten images are at most that long ({aspect:.2g})"
    same = short == own and longer == data.long_side / own
    long = data.long_side if same else max(short, math.ceil(short * longer / 32) * 32)
    return [*found, Choice("data.long_side", long, reason)]


def _short_side(config: Config, objects: _Objects, longer: float, machine: Machine) -> tuple[int, str]:
    data, own = config.data, max(config.data.short_side)
    fixed = None if _free(config, "data.long_side") else data.long_side

    def long(short: float) -> float:
        return fixed or short * longer

    def side(short: float) -> float:
        return objects.median_side(short, long(short))

    there = max(side(own), 1e-3)
    factor = _LEAST_SIDE / there if there < _LEAST_SIDE else min(1.0, _MOST_SIDE / there)
    enlarged = max(own, 2 * float(np.median(objects.images.min(axis=1))))  # more than twice shows nothing new
    highest = min(_HIGHEST * own, enlarged, fixed or math.inf)
    lowest = min(own, max(_LOWEST * own, _SMALLEST_INPUT))
    short = max(32, round(min(max(factor * own, lowest), highest) / 32) * 32) if factor != 1 else own
    batch = _batch_sizes(config)[-1]
    candidates = [*range(short, _SMALLEST_INPUT, -32), min(short, _SMALLEST_INPUT)]
    needed = (step_memory(config, objects.images, side, long(side), batch, machine) for side in candidates)
    fits = next((side for side, memory in zip(candidates, needed) if memory <= machine.planned), candidates[-1])
    tight, short = fits < short, fits
    reason = f"the median object's side is {side(short):.0f} pixels there"
    if short != own:
        reason += f" ({there:.0f} at the recipe's {own})"
    if tight:
        reason += f"; more would not fit into {machine.words} with {batch} image{'s' * (batch > 1)} a pass"
    elif side(short) < 0.9 * _LEAST_SIDE:
        reason += f", less than {_LEAST_SIDE:.0f}: tiles may help (docs/huge.md)"
    return short, reason


# Memory


def _batch_sizes(config: Config) -> list[int]:
    """Images a pass from the recipe's own down to those of the most passes that leave a step what it is."""
    train = config.train
    if not _free(config, "train.batch_size") or train.accumulate or config.model.norm in ("batch", "sync"):
        return [train.batch_size]  # batch norm learns from the images of a pass
    smaller = (size for size in range(train.batch_size - 1, 0, -1) if train.images_per_step % size == 0)
    return [train.batch_size, *smaller]


def _batch_size(config: Config, objects: _Objects, machine: Machine) -> list[Choice]:
    """Fewer images a pass where more would not fit into the memory: a step keeps its images, in more passes."""
    name, own = "train.batch_size", config.train.batch_size
    if not _free(config, name):
        return [_kept(config, name)]
    if math.isinf(machine.planned):
        return []
    short, long = max(config.data.short_side), config.data.long_side
    needed = {size: step_memory(config, objects.images, short, long, size, machine) for size in _batch_sizes(config)}
    fits = next((size for size, memory in needed.items() if memory <= machine.planned), list(needed)[-1])
    reason = f"a pass takes about {needed[fits]:.0f} of {machine.words}"
    if fits != own:
        reason += f", with {own} images about {needed[own]:.0f}; a step keeps its {config.train.images_per_step} images"
    if needed[fits] > machine.planned:
        reason += f": more than the {machine.planned:.1f} that are planned with, and it may not fit"
    return [Choice(name, fits, reason)]


# Anchors


@dataclass(frozen=True)
class _Reach:
    """The objects that some anchor meets with IoU 0.5, at the input's size."""

    anchors: tuple[float, ...]  # scales or ratios
    met: NDArray[np.bool_]  # [G]
    largest: NDArray[np.int64]  # rows of the tenth with the longest sides: few, but often those that matter

    @property
    def share(self) -> float:
        return float(self.met.mean())

    def loses_the_largest_of(self, own: _Reach) -> bool:
        lost = own.met[self.largest] & ~self.met[self.largest]
        return bool(lost.mean() > _LOST)


def _reach(
    config: Config,
    objects: _Objects,
    *,
    scales: tuple[float, ...] | None = None,
    ratios: tuple[float, ...] | None = None,
) -> _Reach:
    """What the config's anchors reach with other ``scales`` or other ``ratios``."""
    short, long = config.data.test_short_side or max(config.data.short_side), config.data.long_side
    boxes = objects.boxes * objects.scale(short, long)[:, None]
    sides = anchor_sides(ModelConfig(anchor_scales=scales or config.model.anchor_scales))
    met = best_anchor_iou(boxes, sizes=sides, ratios=ratios or config.model.anchor_ratios) >= 0.5
    by_area = np.argsort((boxes[:, 2:] - boxes[:, :2]).prod(axis=1), kind="stable")
    return _Reach(scales or ratios or (), met, by_area[-math.ceil(len(boxes) / 10) :])


def _anchor_scales(config: Config, objects: _Objects) -> list[Choice]:
    """One scale, or more where one is not enough; the recipe's own unless others reach clearly more objects."""
    name, own = "model.anchor_scales", config.model.anchor_scales
    if config.model.anchor_sizes is not None:
        return [_kept(config, "model.anchor_sizes")]
    if kept := _anchors_kept(config, name, objects):
        return [kept]
    pairs = [(scale, round(scale * math.sqrt(2), 1)) for scale in _SCALES]
    candidates = [
        own,
        *((scale,) for scale in _SCALES if (scale,) != own),
        *pairs,
        *((scale, *own) for scale in _SCALES if scale < min(own)),
        *((*pair, *own) for pair in pairs if pair[1] < min(own)),
    ]
    return [_best_anchors(name, [_reach(config, objects, scales=scales) for scales in candidates])]


def _anchor_ratios(config: Config, objects: _Objects) -> list[Choice]:
    name, own = "model.anchor_ratios", config.model.anchor_ratios
    if kept := _anchors_kept(config, name, objects):
        return [kept]
    if config.model.anchor_sizes is not None:
        return [_kept(config, name, "the recipe's: model.anchor_sizes is given")]
    candidates = [own, *(ratios for ratios in _RATIOS if ratios != own)]
    return [_best_anchors(name, [_reach(config, objects, ratios=ratios) for ratios in candidates])]


def _anchors_kept(config: Config, name: str, objects: _Objects) -> Choice | None:
    if not _free(config, name):
        return _kept(config, name)
    if config.train.init:
        return _kept(config, name, f"the recipe's, since training goes on with the RPN of {config.train.init}")
    if not len(objects.boxes):
        return _kept(config, name, "the recipe's: no object in an image of known size")
    return None


def _best_anchors(name: str, candidates: list[_Reach]) -> Choice:
    """The first candidate (the recipe's own), or one that reaches clearly more and does not lose the largest objects.

    As many anchors as the own cost nothing: the best of them, if it brings something. More of them must bring more,
    and are compared with the best so far.
    """
    own = best = candidates[0]
    others = [other for other in candidates[1:] if not other.loses_the_largest_of(own)]
    cheap = [other for other in others if len(other.anchors) <= len(own.anchors)]
    first = max(cheap, key=lambda reach: reach.share, default=own)
    if own.share < _REACHED and first.share > own.share + _WORTH:
        best = first
    for other in others:
        needed = _WORTH if len(other.anchors) <= len(best.anchors) else _WORTH_MORE
        if best.share < _REACHED and other.share > best.share + needed:
            best = other
    return Choice(name, best.anchors, _reached(best, own))


def _reached(best: _Reach, own: _Reach) -> str:
    text = f"anchors reach {best.share:.1%} of the objects (IoU 0.5)"
    if best is not own:
        return f"{text}, {own.share:.1%} with the recipe's {' '.join(f'{item:g}' for item in own.anchors)}"
    return text if own.share >= _REACHED else f"{text}; none of the others tried reaches clearly more"


# The rest


def _max_detections(config: Config, split: DataSplit) -> list[Choice]:
    """Twice the most objects in an image; never below 100, which COCO's metric counts; within the proposals."""
    name = "model.max_detections"
    if not _free(config, name):
        return [_kept(config, name)]
    counts = [int((~record.ignore).sum()) for record in split.records]
    most = max(counts, default=0)
    fullest = shown(split.records[counts.index(most)].file_name) if most else ""
    wanted, limit = math.ceil(2 * most / 10) * 10, config.model.test_proposals
    if wanted <= 100:
        value, reason = 100, f"COCO's number, and enough: the fullest image has {most} object{'s' * (most != 1)}"
    else:
        value, reason = wanted, f"twice the {most} objects of {fullest}"
    if value > limit:
        value, reason = limit, f"all model.test_proposals; {fullest or 'the fullest image'} has {most} objects"
    return [Choice(name, value, reason)]


def _flip(config: Config, split: DataSplit) -> list[Choice]:
    """No flip where a mirrored image would be labelled wrongly."""
    name = "data.flip"
    if not _free(config, name):
        return [_kept(config, name)]
    sided, read = _classes_with_direction(split.class_names)
    if sided or read:
        names = few_names([shown(word) for word in sided or read], most=3)
        why = "tell left from right" if sided else "are read"
        return [Choice(name, 0.0, f"classes that {why}: {names}")]
    return [_kept(config, name, "no class name speaks of left and right or of writing")]


def _classes_with_direction(names: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Classes whose names say left or right, and those whose objects are writing."""
    words = {name: set(_words(name)) for name in names}
    sided = [name for name in names if words[name] & _SIDED]
    read = [name for name in names if words[name] & _READ]
    signs = [name for name in names if len(name) == 1 and name.isalnum()]
    letters = [name for name in signs if name.isalpha()]
    if len(letters) >= 3 or len(set(signs) & set("0123456789")) >= 8:
        read += [name for name in signs if name not in read]
    return sided, read


def _words(name: str) -> list[str]:
    """``turnLeft_only2`` to ``turn left only``."""
    return re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower())


def _repeat_threshold(config: Config, split: DataSplit) -> list[Choice]:
    """Images of rare classes come more often, where classes differ by more than ten times."""
    name = "data.repeat_threshold"
    if not _free(config, name):
        return [_kept(config, name)] if _value(config, name) else []
    images = np.zeros(len(split.class_names), np.int64)
    for record in split.records:
        images[np.unique(record.labels[~record.ignore])] += 1
    present = np.flatnonzero(images)
    if len(present) < 2:
        return []
    rarest, commonest = present[images[present].argmin()], present[images[present].argmax()]
    few, many = images[rarest], images[commonest]
    if few == many:
        return [_kept(config, name, f"as many images show each class ({many})")]
    show = "image shows" if few == 1 else "images show"
    reason = f"{few} {show} {shown(split.class_names[rarest])}, {many} {shown(split.class_names[commonest])}"
    if many <= _UNEVEN * few:
        return [_kept(config, name, f"{reason}, not ten times as many: no image is repeated")]
    value = min(_COMMON, _MOST_REPEATS**2 * few / len(split.records))
    return [Choice(name, float(f"{value:.2g}"), f"{reason}; an image comes up to {_MOST_REPEATS} times in an epoch")]


def _precision(config: Config, machine: Machine) -> list[Choice]:
    """On a processor bfloat16 pays only where it has units for it, so a recipe must ask for this choice."""
    name = "train.precision"
    if not _free(config, name):
        return [] if config.train.precision == "auto" else [_kept(config, name)]
    if machine.gpu_memory is not None:
        return [Choice(name, "auto", "the GPU's own choice")]
    if machine.bfloat16:
        return [Choice(name, "bf16", "this processor multiplies bfloat16 itself")]
    return [Choice(name, "fp32", "this processor has no units for bfloat16")]
