"""The trainings: which there are, what each needs, and how its configuration is made from config.yaml.

A job is a row of the experiment with one seed, e.g. ``cascade-s0`` or ``small50_single_bccd-s2``.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from product import Config, DataConfig, ModelConfig, TrainConfig

HERE = Path(__file__).resolve().parent
STAGE_STDS = (0.1, 0.1, 0.2, 0.2)


@dataclass(frozen=True)
class Job:
    """One training and what is looked at afterwards."""

    row: str
    seed: int
    spec: dict[str, Any] = field(hash=False)  # the row's entry in config.yaml
    images: int = 0  # of the training split; 0: all
    start: str = ""  # job whose network this one begins with
    needs: tuple[str, ...] = ()  # jobs whose checkpoints this one uses

    @property
    def name(self) -> str:
        return f"{self.row}-s{self.seed}"

    @property
    def data(self) -> str:
        return str(self.spec.get("data", "nuclei"))

    @property
    def integral(self) -> tuple[float, ...]:
        return tuple(self.spec.get("integral", ()))


def read_settings(*, quick: bool = False, larger: bool = False, path: Path = HERE / "config.yaml") -> dict[str, Any]:
    """config.yaml; in miniature with ``quick``, with its section ``larger`` if asked for."""
    settings: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    changes, more = settings.pop("quick"), settings.pop("larger")
    if larger:
        for name, own in more["data"].items():
            settings["data"][name] |= own
        for key in ("network", "training"):
            settings[key] |= more[key]
    settings["quick"] = quick
    if not quick:
        return settings
    for key in ("seeds", "steps", "bootstrap", "shapes"):
        settings[key] = changes[key]
    settings["small"]["sizes"] = changes["sizes"]
    settings["data"] = {name: dict(changes["data"]) for name in settings["data"]}
    settings["network"] |= changes["network"] | {"pretrained": False}
    settings["training"] |= changes["training"]
    settings["weights"] = {}
    for spec in settings["rows"].values():
        if "backbone" in spec:
            spec["backbone"] = changes["backbones"].get(spec["backbone"], spec["backbone"])
    return settings


def settings_of(work: Path) -> dict[str, Any]:
    """The settings of a folder of trainings: ``run.py --larger`` trains in WORK/larger."""
    return read_settings(larger=work.name == "larger")


def all_jobs(settings: dict[str, Any]) -> dict[str, Job]:
    """Every job by its name: all rows of the first seed, then of the next; what others need comes before them."""
    jobs = []
    for seed in settings["seeds"]:
        for row, spec in settings["rows"].items():
            needs = (f"cascade-s{seed}",) if re.fullmatch(r"single\d", row) else ()
            jobs.append(Job(row, seed, spec, needs=needs))
        jobs += _small_jobs(settings, seed)
    first = [f"{settings['small']['from']}_{kind}-s{settings['seeds'][0]}" for kind in ("single", "cascade")]
    jobs.sort(key=lambda job: (job.name not in first, settings["seeds"].index(job.seed)))
    return {job.name: job for job in jobs}


def _small_jobs(settings: dict[str, Any], seed: int) -> list[Job]:
    small, jobs = settings["small"], []
    for size in small["sizes"]:
        for kind, ious in (("single", [0.5]), ("cascade", [0.5, 0.6, 0.7])):
            for begin in ("imagenet", small["from"]):
                start = "" if begin == "imagenet" else f"{begin}_{kind}-s{settings['seeds'][0]}"
                spec = {"ious": ious, "data": small["data"]}
                jobs.append(Job(f"small{size}_{kind}_{begin}", seed, spec, size, start, (start,) if start else ()))
    return jobs


def train_split(job: Job, settings: dict[str, Any]) -> str:
    """Name of the split that a job learns from; subsets are nested and drawn with the job's seed."""
    name = str(settings["data"][job.data]["train"])
    return f"{name}{job.images}_{job.seed}" if job.images else name


def job_config(job: Job, settings: dict[str, Any], *, work: Path, weights: Path, images: int, loaders: int) -> Config:
    """The product's configuration of a job that learns from ``images`` images."""
    data, training = settings["data"][job.data], copy.deepcopy(settings["training"])
    network = _network(job, settings, weights)
    steps = settings["steps"]
    repeat = math.ceil(steps * training["images_per_step"] / images)
    return Config(
        model=ModelConfig(**_tuples(network)),
        data=DataConfig(
            root=str(work / "data" / job.data),
            train=train_split(job, settings),
            val=data["val"].replace("+", "_"),
            short_side=(data["crop"] or data["short_side"],),
            long_side=data["crop"] or data["long_side"],
            large_scale_jitter=tuple(data["jitter"]) if data["crop"] else None,
            flip=0.5,
            vertical_flip=0.5,
            repeat=repeat,
            workers=loaders,
        ),
        train=TrainConfig(
            **training,
            milestones=(),
            epochs=1,
            max_steps=steps,
            evaluate_every=0,
            seed=job.seed,
            log_every=10,
            init=str(work / "trained" / job.start / "last.safetensors") if job.start else "",
        ),
    )


def evaluated(config: Config, own: dict[str, Any]) -> Config:
    """The configuration of a trained network that looks at whole pictures of a data set; ``own`` are its settings."""
    whole = dataclasses.replace(
        config.data, short_side=(own["short_side"],), long_side=own["long_side"], large_scale_jitter=None
    )
    return dataclasses.replace(config, data=whole)


def _network(job: Job, settings: dict[str, Any], weights: Path) -> dict[str, Any]:
    network, spec = copy.deepcopy(settings["network"]), job.spec
    backbone = network["backbone"] = spec.get("backbone", network["backbone"])
    network |= {"stage_ious": spec["ious"], "masks": spec.get("masks", "none")}
    if spec.get("same_statistics"):
        network["stage_stds"] = [list(STAGE_STDS)] * len(spec["ious"])
    file = settings["weights"].get(backbone)
    network["pretrained"] = bool(file)
    network["backbone_weights"] = str(weights / file) if file else ""
    network["norm"] = "frozen_statistics" if file else "batch"
    return network


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    known = {one.name for one in fields(ModelConfig)}
    assert set(values) <= known, set(values) - known

    def frozen(value: Any) -> Any:
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    return {key: frozen(value) for key, value in values.items()}
