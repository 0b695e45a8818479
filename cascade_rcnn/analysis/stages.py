"""COCO results of each stage of a cascade on a split, from one pass over the images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade_rcnn.config import Config
from cascade_rcnn.data.dataset import DetectionDataset
from cascade_rcnn.data.formats.open import open_split
from cascade_rcnn.data.loader import eval_loader
from cascade_rcnn.data.orientation import refuse_undecided
from cascade_rcnn.data.records import DataSplit
from cascade_rcnn.data.split_levels import with_range
from cascade_rcnn.distributed import choose_device
from cascade_rcnn.errors import DataError, UserError
from cascade_rcnn.evaluation.coco import coco_truth
from cascade_rcnn.evaluation.evaluate_model import as_split, detect_split, match_classes
from cascade_rcnn.inference.exported import ExportedNetwork, usual_device
from cascade_rcnn.inference.run_model import Inference, detect_each_stage, to_detections
from cascade_rcnn.messages import printable
from cascade_rcnn.progress import progress_bar

if TYPE_CHECKING:
    from cascade_rcnn.inference.detector import Detector

Results = list[dict[str, Any]]


@dataclass(frozen=True)
class Ran:
    """What a checkpoint said about a split."""

    results: dict[str, Results]  # "stage 1" ..., last what all stages say together
    truth: dict[str, Any]  # COCO's layout
    split: DataSplit
    config: Config
    limit: int  # detections of an image and class that count, as in ``evaluate``


def run_stages(checkpoint: str | Path, data: str | Path, *, split: str, device: str, inference: Inference) -> Ran:
    """Load a checkpoint and run it on a split; everything as ``evaluate`` does.

    Raises:
        CheckpointError, DataError: what cannot be read, classes that the checkpoint does not know, or no objects.
    """
    from cascade_rcnn.inference.detector import load

    if inference.stages == "auto":
        raise UserError("--stages auto: analyze shows every stage, which takes all proposals through them; drop it")
    detector = load(checkpoint, device=choose_device(usual_device(checkpoint, device)), **inference.of_load())
    print(detector.choices())
    settings = detector.config.data
    settings = replace(settings, val=split or settings.val)
    opened = open_split(data, settings.val, orientation=settings.orientation)
    if not any(len(record.boxes) for record in opened.records):
        raise DataError(
            f"{printable(opened.root)}: split {opened.name!r} has no objects in its {len(opened):,} images: nothing to "
            "analyse; name another --split"
        )
    refuse_undecided(opened, settings.orientation)
    settings, line = with_range(settings, opened)
    if line:
        print(line)
    detector.config = replace(detector.config, data=settings)
    class_map = match_classes(detector.class_names, opened, checkpoint)
    results = stage_results(detector, opened, class_map=class_map, inference=inference)
    limit = max(100, detector.config.model.max_detections)
    return Ran(results, coco_truth(opened), opened, detector.config, limit)


def stage_results(
    detector: Detector, split: DataSplit, *, class_map: Sequence[int], inference: Inference
) -> dict[str, Results]:
    """COCO results by the name of the stage; ``mean of stages`` equals ``detect_split``. One stage: only that.

    An exported network gives only what all its stages say together.
    """
    config, model = detector.config, detector.model
    if isinstance(model, ExportedNetwork):
        print("an exported network does not show its stages: the report has what they say together")
        together, _ = detect_split(model, config, split, class_map=class_map, batch_size=inference.batch_size)
        return {"exported network": together}
    dataset = DetectionDataset(split, config.data, training=False, semantics=config.model.semantics)
    names, ids, absent = as_split(split, class_map)
    stages = model.cascade.stages_at_test
    words = [*(f"stage {k + 1}" for k in range(stages)), "mean of stages"]
    results: dict[str, Results] = {word: [] for word in words}
    loader = eval_loader(dataset, batch_size=inference.batch_size)
    try:
        with progress_bar(len(dataset)) as advance:
            for images, _ in loader:
                for word, raw in zip(words, detect_each_stage(model, images, inference.precision)):
                    for found in to_detections(raw, images, names, ids):
                        results[word].extend(one for one in found.to_coco() if one["category_id"] != absent)
                advance(len(images))
    finally:
        loader.close()
    return results if stages > 1 else {"stage 1": results["mean of stages"]}
