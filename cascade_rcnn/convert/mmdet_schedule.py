"""mmdetection's optimizers, schedules and hooks, 2.x and 3.x, as fields of ``TrainConfig``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from cascade_rcnn.convert.config_text import as_dict, as_list, same
from cascade_rcnn.convert.mmdet_findings import Findings, word
from cascade_rcnn.messages import few_names, shown

_ANY: tuple[Any, ...] = ()
_HARMLESS_HOOKS = (
    "NumClassCheckHook",
    "CheckInvalidLossHook",
    "MemoryProfilerHook",
    "SyncBuffersHook",
    "SetEpochInfoHook",
)
_LIBRARIES = ("mmcls", "mmcv", "mmdet", "mmengine", "mmpretrain")  # whose types are known by their names, or refused
_PRECISIONS = {"float16": "fp16", "bfloat16": "bf16"}
# Words in parameters' names that custom_keys leaves without decay, and what they are here.
_FREE_OF_DECAY = {
    "norm": "norm",
    "bias": "bias",
    ".bias": "bias",
    "absolute_pos_embed": "table",
    "relative_position_bias_table": "table",
}
# Names that only say how to log, evaluate or start.
_UNUSED = {
    *("default_scope", "env_cfg", "vis_backends", "visualizer", "log_processor", "log_level", "resume", "val_cfg"),
    *("test_cfg", "val_dataloader", "test_dataloader", "val_evaluator", "test_evaluator", "backend_args", "work_dir"),
    *("dataset_type", "data_root", "train_pipeline", "test_pipeline", "val_pipeline", "default_hooks", "launcher"),
    *("log_config", "checkpoint_config", "dist_params", "workflow", "resume_from", "opencv_num_threads"),
    *("mp_start_method", "file_client_args", "gpu_ids", "img_norm_cfg", "persistent_workers", "cudnn_benchmark"),
}
_READ = {
    *("model", "data", "train_dataloader", "train_cfg", "optim_wrapper", "optimizer", "optimizer_config", "lr_config"),
    *("param_scheduler", "runner", "total_epochs", "evaluation", "auto_scale_lr", "custom_hooks", "load_from", "fp16"),
    *("randomness", "seed", "deterministic", "custom_imports"),
}


def train_settings(
    names: Mapping[str, Any], network: Mapping[str, Any], found: Findings, *, used: Collection[str] = ()
) -> dict[str, Any]:
    """Fields of TrainConfig. ``network``: those of ModelConfig; ``used``: names that stand in other values."""
    old = "optimizer" in names and "optim_wrapper" not in names
    settings = _optimizer(names, network, found, old=old)
    settings |= _length(names, found)
    settings |= (
        _old_schedule(names, settings["epochs"], found) if old else _schedulers(names, settings["epochs"], found)
    )
    settings |= _batch(names, settings, found)
    settings |= _hooks(names, found)
    random = as_dict(names.get("randomness"))
    seed = random.get("seed", names.get("seed"))
    if type(seed) is int:
        settings["seed"] = seed
    if random.get("deterministic", names.get("deterministic")) is True:
        settings["deterministic"] = True
    backbone = as_dict(as_dict(names.get("model")).get("backbone"))
    if backbone.get("with_cp") is True or backbone.get("use_checkpoint") is True:
        settings["activation_checkpointing"] = True
    if names.get("load_from"):
        found.left_out.append(
            f"load_from = {shown(names['load_from'])}: convert that checkpoint, and give --train.init"
        )
    imports = [str(name) for name in as_list(as_dict(names.get("custom_imports")).get("imports"))]
    if not all(name.partition(".")[0] in _LIBRARIES for name in imports):
        found.left_out.append(
            f"custom_imports {shown(imports)}: not imported; whether they change known parts is not seen"
        )
    others = sorted(map(str, set(names) - _READ - _UNUSED - set(used)))
    if others:
        found.left_out.append(f"names that are not known here: {few_names(others, most=20)}")
    return settings


def _optimizer(names: Mapping[str, Any], network: Mapping[str, Any], found: Findings, *, old: bool) -> dict[str, Any]:
    wrapper = as_dict(names.get("optim_wrapper"))
    path = "optimizer" if old else "optim_wrapper.optimizer"
    optimizer = as_dict(names.get("optimizer") if old else wrapper.get("optimizer"))
    kind = word(optimizer.get("type"))
    known: dict[str, tuple[Any, ...]] = dict.fromkeys(("lr", "weight_decay", "paramwise_cfg", "constructor"), _ANY)
    if kind == "SGD":
        known |= {"momentum": _ANY, "nesterov": (False,), "dampening": (0,)}
    elif kind == "AdamW":
        known |= {"betas": ([0.9, 0.999],), "eps": (1e-8,)}
    else:
        found.refuse(f"{path}.type", kind, "SGD or AdamW")
        return {}
    found.check(optimizer, path, known)
    settings: dict[str, Any] = {"optimizer": kind.lower(), "lr": optimizer.get("lr", 0.0)}
    settings["weight_decay"] = optimizer.get("weight_decay", 0.0 if kind == "SGD" else 0.01)
    if kind == "SGD":
        settings["momentum"] = optimizer.get("momentum", 0.0)
    parts = as_dict(wrapper.get("paramwise_cfg") or optimizer.get("paramwise_cfg"))
    constructor = word(wrapper.get("constructor") or optimizer.get("constructor"))
    if constructor == "LearningRateDecayOptimizerConstructor":
        settings |= _layer_decay(parts, str(network.get("backbone")), found)
    else:
        place = "optimizer" if old else "optim_wrapper"
        usual = ("DefaultOptimWrapperConstructor", "DefaultOptimizerConstructor", "")
        found.expect(constructor, f"{place}.constructor", *usual)
        settings |= _decay(parts, network, found)
    return settings | (_old_wrapper(names, found) if old else _wrapper(wrapper, found))


def _wrapper(wrapper: Mapping[str, Any], found: Findings) -> dict[str, Any]:
    known = dict.fromkeys(("optimizer", "paramwise_cfg", "constructor", "clip_grad", "accumulative_counts"), _ANY)
    found.check(wrapper, "optim_wrapper", known | {"loss_scale": _ANY, "dtype": _ANY, "use_fsdp": (False,)})
    kind, dtype = word(wrapper.get("type", "OptimWrapper")), wrapper.get("dtype")
    found.expect(kind, "optim_wrapper.type", "OptimWrapper", "AmpOptimWrapper")
    precision: dict[str, Any] = {}
    if kind == "AmpOptimWrapper":
        found.expect(dtype, "optim_wrapper.dtype", None, *_PRECISIONS)
        if dtype in _PRECISIONS:
            precision["precision"] = _PRECISIONS[str(dtype)]
        else:
            _say_precision("optim_wrapper.type = 'AmpOptimWrapper'", found)
    scale = wrapper.get("loss_scale", "dynamic")
    if kind == "AmpOptimWrapper" and scale != "dynamic":
        found.left_out.append(f"optim_wrapper.loss_scale = {shown(scale)} (fp16 finds its scale while it trains)")
    settings = precision | _clip(as_dict(wrapper.get("clip_grad")), "optim_wrapper.clip_grad", found)
    if "accumulative_counts" in wrapper:
        settings["accumulate"] = wrapper["accumulative_counts"]
    return settings


def _old_wrapper(names: Mapping[str, Any], found: Findings) -> dict[str, Any]:
    hook = as_dict(names.get("optimizer_config"))
    known = {"grad_clip": _ANY, "loss_scale": _ANY, "distributed": _ANY, "cumulative_iters": _ANY}
    # DistOptimizerHook: of the programs of Swin's and ConvNeXt's authors
    known |= {"update_interval": _ANY, "coalesce": _ANY, "bucket_size_mb": _ANY, "use_fp16": _ANY}
    found.check(hook, "optimizer_config", known)
    kinds = ("", "OptimizerHook", "Fp16OptimizerHook", "GradientCumulativeOptimizerHook", "DistOptimizerHook")
    found.expect(word(hook.get("type")), "optimizer_config.type", *kinds)
    if names.get("fp16"):
        _say_precision(f"fp16 = {shown(names['fp16'])}", found)
    elif hook.get("use_fp16") is True or word(hook.get("type")) == "Fp16OptimizerHook":
        _say_precision("optimizer_config: half precision", found)
    settings = _clip(as_dict(hook.get("grad_clip")), "optimizer_config.grad_clip", found)
    for name in ("cumulative_iters", "update_interval"):
        if name in hook:
            settings["accumulate"] = hook[name]
    return settings


def _say_precision(what: str, found: Findings) -> None:
    found.left_out.append(f"{what} (here train.precision auto: bf16 on GPUs that have it; fp16 if you say so)")


def _clip(clip: Mapping[str, Any], path: str, found: Findings) -> dict[str, Any]:
    found.check(clip, path, {"max_norm": _ANY, "norm_type": (2,)})
    return {"clip_grad_norm": float(clip["max_norm"])} if _is_number(clip.get("max_norm")) else {}


def _decay(parts: Mapping[str, Any], network: Mapping[str, Any], found: Findings) -> dict[str, Any]:
    """What is not decayed: norms, biases and tables of positions, or nothing; what of these differs is listed."""
    path = "paramwise_cfg"
    known: dict[str, tuple[Any, ...]] = {"norm_decay_mult": (0, 1), "bias_decay_mult": (0, 1), "bypass_duplicate": _ANY}
    found.check(parts, path, known | {"bias_lr_mult": (1,), "custom_keys": _ANY})
    free = {word for word in ("norm", "bias") if parts.get(f"{word}_decay_mult", 1) == 0}
    for name, rules in as_dict(parts.get("custom_keys")).items():
        found.check(as_dict(rules), f"{path}.custom_keys.{name}", {"decay_mult": (0, 1), "lr_mult": (1,)})
        if as_dict(rules).get("decay_mult", 1) != 0:
            continue
        if name not in _FREE_OF_DECAY:
            found.refuse(f"{path}.custom_keys.{name}.decay_mult", 0, f"1, or 0 for {', '.join(_FREE_OF_DECAY)}")
            continue
        free.add(_FREE_OF_DECAY[name])
        if name == "norm":
            free.add("norms by name")
    if not free & {"norm", "bias"}:
        if "table" in free:
            found.left_out.append(f"{path}: tables of positions, which are not decayed there")
        return {}
    decayed = [] if "bias" in free else ["biases"]
    decayed += [] if "norm" in free else ["norms"]
    has_batch_norm = network.get("box_head") == "4conv1fc_bn" or not network.get("output_norms")
    decayed += ["batch norms (their names have no 'norm')"] if "norms by name" in free and has_batch_norm else []
    if decayed:
        found.left_out.append(
            f"{path}: {' and '.join(decayed)} are decayed there (train.norm_weight_decay False: no norms, biases or "
            "tables of positions)"
        )
    return {"norm_weight_decay": False}


def _layer_decay(parts: Mapping[str, Any], backbone: str, found: Findings) -> dict[str, Any]:
    """LearningRateDecayOptimizerConstructor, which also leaves norms and biases without decay."""
    path = "paramwise_cfg"
    found.check(parts, path, {"decay_rate": _ANY, "decay_type": ("layer_wise",), "num_layers": _ANY})
    if not backbone.startswith("convnext_"):
        found.refuse("optim_wrapper.constructor", "LearningRateDecayOptimizerConstructor", "for a ConvNeXt")
        return {}
    groups = 6 if backbone.startswith("convnext_tiny") else 12  # three blocks of stage 3 are one (training/layer_decay)
    if parts.get("num_layers") != groups:
        found.refuse(f"{path}.num_layers", parts.get("num_layers"), f"{groups}, by the depth of {backbone}")
    rate = parts.get("decay_rate")
    if not _is_number(rate) or not 0 < rate <= 1:  # type: ignore[operator]
        found.refuse(f"{path}.decay_rate", rate, "above 0, at most 1")
        return {}
    return {"layer_decay": rate, "norm_weight_decay": False}


def _length(names: Mapping[str, Any], found: Findings) -> dict[str, Any]:
    loop = as_dict(names.get("train_cfg")) if "data" not in names else {}
    runner = as_dict(names.get("runner"))
    epochs = loop.get("max_epochs", runner.get("max_epochs", names.get("total_epochs")))
    steps = loop.get("max_iters", runner.get("max_iters"))
    if steps is not None:
        found.refuse("max_iters", steps, "schedules count epochs: steps x images per step / images of the data")
    elif type(epochs) is not int or epochs < 1:
        found.refuse("max_epochs", epochs, "a number of epochs")
    if loop.get("dynamic_intervals"):
        found.left_out.append(f"train_cfg.dynamic_intervals = {shown(loop['dynamic_intervals'])}")
    every = loop.get("val_interval", as_dict(names.get("evaluation")).get("interval", 1))
    return {"epochs": epochs if type(epochs) is int else 12, "evaluate_every": every if type(every) is int else 1}


def _schedulers(names: Mapping[str, Any], epochs: int, found: Findings) -> dict[str, Any]:
    settings: dict[str, Any] = {"milestones": (), "warmup_steps": 0}
    for part in map(as_dict, as_list(names.get("param_scheduler"))):
        kind = word(part.get("type"))
        path = f"param_scheduler.{kind}"
        if kind == "LinearLR":
            known = {"start_factor": _ANY, "end_factor": (1,), "by_epoch": (False,), "begin": (0,), "end": _ANY}
            found.check(part, path, known)
            found.expect(part.get("by_epoch", True), f"{path}.by_epoch", False)
            settings["warmup_factor"] = part.get("start_factor", 1 / 3)
            settings["warmup_steps"] = part.get("end")
        elif kind == "MultiStepLR":
            known = {"milestones": _ANY, "gamma": (0.1,), "by_epoch": (True,), "begin": (0,), "end": _ANY}
            found.check(part, path, known)
            settings["milestones"] = _milestones(part.get("milestones"), epochs)
        elif kind == "CosineAnnealingLR":
            known = {"T_max": (epochs,), "eta_min": (0,), "by_epoch": (True,), "begin": (0,), "end": _ANY}
            found.check(part, path, known | {"convert_to_iter_based": (True,)})
            settings["schedule"] = "cosine"
        else:
            found.refuse("param_scheduler.type", kind, "LinearLR, MultiStepLR, CosineAnnealingLR")
    return settings


def _old_schedule(names: Mapping[str, Any], epochs: int, found: Findings) -> dict[str, Any]:
    part = as_dict(names.get("lr_config"))
    policy = str(part.get("policy", "")).lower()
    known: dict[str, tuple[Any, ...]] = {"policy": _ANY, "by_epoch": (True,), "warmup": ("linear", None)}
    known |= {"warmup_iters": _ANY, "warmup_ratio": _ANY, "warmup_by_epoch": (False,)}
    settings: dict[str, Any] = {"milestones": (), "warmup_steps": 0}
    if policy == "step":
        known |= {"step": _ANY, "gamma": (0.1,)}
        settings["milestones"] = _milestones(part.get("step"), epochs)
    elif policy == "cosineannealing":
        known |= {"min_lr": (0,), "min_lr_ratio": (0,)}
        settings["schedule"] = "cosine"
    else:
        found.refuse("lr_config.policy", part.get("policy"), "step or CosineAnnealing")
    found.check(part, "lr_config", known)
    if part.get("warmup"):
        settings["warmup_steps"] = part.get("warmup_iters", 0)
        settings["warmup_factor"] = part.get("warmup_ratio", 0.1)
    return settings


def _milestones(value: object, epochs: int) -> tuple[int, ...]:
    """Those before the end; a single number is every so many epochs, as 2.x takes it."""
    if type(value) is int and value > 0:
        return tuple(range(value, min(epochs, 10_000), value))
    return tuple(item for item in as_list(value) if type(item) is int and item < epochs)


def _batch(names: Mapping[str, Any], settings: Mapping[str, Any], found: Findings) -> dict[str, Any]:
    loader, old = as_dict(names.get("train_dataloader")), as_dict(names.get("data"))
    size = loader.get("batch_size", old.get("samples_per_gpu", old.get("imgs_per_gpu", 2)))
    scaling = as_dict(names.get("auto_scale_lr"))
    meant = scaling.get("base_batch_size")
    if type(size) is not int or (meant is not None and type(meant) is not int):
        found.refuse("batch_size", [size, meant], "whole numbers")
        return {}
    lr = settings.get("lr")
    if meant is None:
        found.notes.append(f"train.images_per_step {8 * size}: assumed, 8 GPUs with {size} images each; lr is for them")
    elif settings.get("optimizer") == "sgd" and _is_number(lr) and not same(lr, 0.02 * meant / 16):
        found.notes.append(
            f"train.lr {lr:g} is taken as meant for {meant} images per step (auto_scale_lr.base_batch_size) and scaled "
            "to your batch; if you chose it for another batch, set train.images_per_step to that"
        )
    return {"batch_size": size, "images_per_step": meant or 8 * size}


def _hooks(names: Mapping[str, Any], found: Findings) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for hook in map(as_dict, as_list(names.get("custom_hooks"))):
        kind = word(hook.get("type"))
        momentum = hook.get("momentum", 0.0002)
        if (
            kind == "EMAHook"
            and _is_number(momentum)
            and word(hook.get("ema_type", "")) in ("", "ExponentialMovingAverage")
        ):
            known = dict.fromkeys(("momentum", "ema_type", "priority", "update_buffers", "strict_load"), _ANY)
            found.check(hook, "custom_hooks.EMAHook", known)
            settings["ema"] = round(1.0 - momentum, 10)
        elif kind == "EarlyStoppingHook" and type(hook.get("patience", 5)) is int:
            settings["patience"] = hook.get("patience", 5)
        elif kind not in _HARMLESS_HOOKS:
            found.refuse("custom_hooks.type", kind)
    return settings


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
