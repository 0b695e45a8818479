"""mmdetection's optimizers, schedules and hooks, 2.x and 3.x, as fields of ``TrainConfig``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from cascade_rcnn.convert.config_values import as_dict, as_list, same, whole, word
from cascade_rcnn.convert.mmdet_findings import ANY, Findings
from cascade_rcnn.messages import few_names, shown

_HARMLESS_HOOKS = (
    "NumClassCheckHook",
    "CheckInvalidLossHook",
    "MemoryProfilerHook",
    "SyncBuffersHook",
    "SetEpochInfoHook",
)
_DEFAULT_HOOKS = (
    *("IterTimerHook", "LoggerHook", "ParamSchedulerHook", "CheckpointHook", "DistSamplerSeedHook", "RuntimeInfoHook"),
    *("DetVisualizationHook", "TrackVisualizationHook", "GroundingVisualizationHook"),
)
# Imports that bring no code but the libraries' own, whose types are known by their names, or refused.
_IMPORTS = {"", *(f"{library}{part}" for library in ("mmcls", "mmdet", "mmpretrain") for part in ("", ".models"))}
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
    *("dataset_type", "data_root", "train_pipeline", "test_pipeline", "val_pipeline", "launcher"),
    *("log_config", "checkpoint_config", "dist_params", "resume_from", "opencv_num_threads"),
    *("mp_start_method", "file_client_args", "gpu_ids", "img_norm_cfg", "persistent_workers", "cudnn_benchmark"),
}
_READ = {
    *("model", "data", "train_dataloader", "train_cfg", "optim_wrapper", "optimizer", "optimizer_config", "lr_config"),
    *("param_scheduler", "runner", "total_epochs", "evaluation", "auto_scale_lr", "custom_hooks", "load_from", "fp16"),
    *("randomness", "seed", "deterministic", "custom_imports", "default_hooks", "workflow"),
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
    if seed is not None:
        settings["seed"] = found.whole(seed, "randomness.seed", least=0)
    if found.flag(random.get("deterministic", names.get("deterministic") or False), "randomness.deterministic"):
        settings["deterministic"] = True
    backbone = as_dict(as_dict(names.get("model")).get("backbone"))
    for name in ("with_cp", "use_checkpoint"):
        if found.flag(backbone.get(name, False), f"backbone.{name}"):
            settings["activation_checkpointing"] = True
    _check_loops(names, found)
    if names.get("load_from"):
        found.left_out.append(
            f"load_from = {shown(names['load_from'])}: convert that checkpoint, and give --train.init"
        )
    asked = names.get("custom_imports")
    imports = [str(name) for name in as_list(asked.get("imports") if isinstance(asked, Mapping) else asked)]
    if not _IMPORTS.issuperset(imports):
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
    known: dict[str, tuple[Any, ...]] = dict.fromkeys(("lr", "weight_decay", "paramwise_cfg", "constructor"), ANY)
    if kind == "SGD":
        known |= {"momentum": ANY, "nesterov": (False,), "dampening": (0,)}
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
    known = dict.fromkeys(("optimizer", "paramwise_cfg", "constructor", "clip_grad", "accumulative_counts"), ANY)
    found.check(wrapper, "optim_wrapper", known | {"loss_scale": ANY, "dtype": ANY, "use_fsdp": (False,)})
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
    settings = precision | _clip(wrapper.get("clip_grad"), "optim_wrapper.clip_grad", found)
    if "accumulative_counts" in wrapper:
        counts = wrapper["accumulative_counts"]
        settings["accumulate"] = found.whole(counts, "optim_wrapper.accumulative_counts", least=1)
    return settings


def _old_wrapper(names: Mapping[str, Any], found: Findings) -> dict[str, Any]:
    hook = as_dict(names.get("optimizer_config"))
    known = {"grad_clip": ANY, "loss_scale": ANY, "distributed": ANY, "cumulative_iters": ANY}
    # DistOptimizerHook: of the programs of Swin's and ConvNeXt's authors
    known |= {"update_interval": ANY, "coalesce": ANY, "bucket_size_mb": ANY, "use_fp16": ANY}
    found.check(hook, "optimizer_config", known)
    kinds = ("", "OptimizerHook", "Fp16OptimizerHook", "GradientCumulativeOptimizerHook", "DistOptimizerHook")
    found.expect(word(hook.get("type")), "optimizer_config.type", *kinds)
    if names.get("fp16"):
        _say_precision(f"fp16 = {shown(names['fp16'])}", found)
    elif hook.get("use_fp16") is True or word(hook.get("type")) == "Fp16OptimizerHook":
        _say_precision("optimizer_config: half precision", found)
    settings = _clip(hook.get("grad_clip"), "optimizer_config.grad_clip", found)
    for name in ("cumulative_iters", "update_interval"):
        if name in hook:
            settings["accumulate"] = found.whole(hook[name], f"optimizer_config.{name}", least=1)
    return settings


def _say_precision(what: str, found: Findings) -> None:
    found.left_out.append(f"{what} (here train.precision auto: bf16 on GPUs that have it; fp16 if you say so)")


def _clip(clip: object, path: str, found: Findings) -> dict[str, Any]:
    if clip is None or clip == {}:
        return {}
    found.check(as_dict(clip), path, {"max_norm": ANY, "norm_type": (2,)})
    largest = as_dict(clip).get("max_norm")
    if not _is_number(largest):
        found.refuse(f"{path}.max_norm", largest if as_dict(clip) else clip, "a number")
        return {}
    return {"clip_grad_norm": float(largest)}  # type: ignore[arg-type]


def _decay(parts: Mapping[str, Any], network: Mapping[str, Any], found: Findings) -> dict[str, Any]:
    """What is not decayed: norms, biases and tables of positions, or nothing; what of these differs is listed."""
    path = "paramwise_cfg"
    known: dict[str, tuple[Any, ...]] = {"norm_decay_mult": (0, 1), "bias_decay_mult": (0, 1), "bypass_duplicate": ANY}
    found.check(parts, path, known | {"bias_lr_mult": (1,), "custom_keys": ANY})
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
    found.check(parts, path, {"decay_rate": ANY, "decay_type": ("layer_wise",), "num_layers": ANY})
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
    elif (whole(epochs) or 0) < 1:
        found.refuse("max_epochs", epochs, "a number of epochs")
    if loop.get("dynamic_intervals"):
        found.left_out.append(f"train_cfg.dynamic_intervals = {shown(loop['dynamic_intervals'])}")
    every = loop.get("val_interval", as_dict(names.get("evaluation")).get("interval", 1))
    every = found.whole(every, "val_interval", least=1)
    return {"epochs": max(1, whole(epochs) or 12), "evaluate_every": every}


def _schedulers(names: Mapping[str, Any], epochs: int, found: Findings) -> dict[str, Any]:
    settings: dict[str, Any] = {"milestones": (), "warmup_steps": 0}
    parts = [as_dict(part) for part in as_list(names.get("param_scheduler"))]
    kinds = [word(part.get("type")) for part in parts]
    if kinds.count("LinearLR") > 1 or len(kinds) - kinds.count("LinearLR") > 1:
        found.refuse("param_scheduler", kinds, "one LinearLR as warm-up, and one MultiStepLR or CosineAnnealingLR")
    for kind, part in zip(kinds, parts):
        path = f"param_scheduler.{kind}"
        if kind == "LinearLR":
            known = {"start_factor": ANY, "end_factor": (1,), "by_epoch": (False,), "begin": (0,), "end": ANY}
            found.check(part, path, known)
            found.expect(part.get("by_epoch", True), f"{path}.by_epoch", False)
            settings["warmup_factor"] = found.number(part.get("start_factor", 1 / 3), f"{path}.start_factor")
            settings["warmup_steps"] = found.whole(part.get("end"), f"{path}.end", least=0)
        elif kind == "MultiStepLR":
            known = {"milestones": ANY, "gamma": (0.1,), "by_epoch": (True,), "begin": (0,), "end": ANY}
            found.check(part, path, known)
            steps = _milestones(part.get("milestones"), epochs, f"{path}.milestones", found)
            settings["milestones"] = steps
            end = found.whole(part.get("end", epochs), f"{path}.end", least=1)
            if late := [str(step) for step in steps if step >= end]:
                said = f"mmdetection's rate does not fall at {', '.join(late)}, here it does"
                found.left_out.append(f"{path}.end = {end}: {said}")
        elif kind == "CosineAnnealingLR":
            known = {"T_max": (epochs,), "eta_min": (0,), "by_epoch": (True,), "begin": (0,), "end": ANY}
            found.check(part, path, known | {"convert_to_iter_based": (True,)})
            end = part.get("end", part.get("T_max", epochs))
            if (whole(end) or 0) < epochs or ("T_max" not in part and end != epochs):
                found.refuse(f"{path}.end", end, f"{epochs}, the number of epochs")
            settings["schedule"] = "cosine"
        else:
            found.refuse("param_scheduler.type", kind, "LinearLR, MultiStepLR, CosineAnnealingLR")
    return settings


def _old_schedule(names: Mapping[str, Any], epochs: int, found: Findings) -> dict[str, Any]:
    part = as_dict(names.get("lr_config"))
    policy = str(part.get("policy", "")).lower()
    known: dict[str, tuple[Any, ...]] = {"policy": ANY, "by_epoch": (True,), "warmup": ("linear", None)}
    known |= {"warmup_iters": ANY, "warmup_ratio": ANY, "warmup_by_epoch": (False,)}
    settings: dict[str, Any] = {"milestones": (), "warmup_steps": 0}
    if policy == "step":
        known |= {"step": ANY, "gamma": (0.1,)}
        every = whole(part.get("step"))  # a single number is every so many epochs
        steps = list(range(every, min(epochs, 10_000), every)) if every and every > 0 else part.get("step")
        settings["milestones"] = _milestones(steps, epochs, "lr_config.step", found)
    elif policy == "cosineannealing":
        known |= {"min_lr": (0,), "min_lr_ratio": (0,)}
        settings["schedule"] = "cosine"
    else:
        found.refuse("lr_config.policy", part.get("policy"), "step or CosineAnnealing")
    found.check(part, "lr_config", known)
    if part.get("warmup"):
        settings["warmup_steps"] = found.whole(part.get("warmup_iters", 0), "lr_config.warmup_iters", least=0)
        settings["warmup_factor"] = found.number(part.get("warmup_ratio", 0.1), "lr_config.warmup_ratio")
    return settings


def _milestones(value: object, epochs: int, path: str, found: Findings) -> tuple[int, ...]:
    """Those before the end, rising."""
    if not isinstance(value, list):
        found.refuse(path, value, "a list of epochs")
        return ()
    steps = [found.whole(item, path, least=1) for item in value]
    if len(set(steps)) < len(steps):
        found.refuse(path, value, "each epoch once")
    return tuple(sorted({step for step in steps if step < epochs}))


def _batch(names: Mapping[str, Any], settings: Mapping[str, Any], found: Findings) -> dict[str, Any]:
    loader, old = as_dict(names.get("train_dataloader")), as_dict(names.get("data"))
    size = loader.get("batch_size", old.get("samples_per_gpu", old.get("imgs_per_gpu", 2)))
    size = found.whole(as_dict(old.get("train_dataloader")).get("samples_per_gpu", size), "batch_size", least=1)
    meant = as_dict(names.get("auto_scale_lr")).get("base_batch_size")
    if meant is not None:
        meant = found.whole(meant, "auto_scale_lr.base_batch_size", least=1)
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
    standing = as_dict(names.get("default_hooks"))
    for name in ("param_scheduler", "sampler_seed"):
        if name in standing and standing[name] is None:
            found.refuse(f"default_hooks.{name}", None, "mmdetection's")
    hooks = [("custom_hooks", as_dict(hook)) for hook in as_list(names.get("custom_hooks"))]
    hooks += [("default_hooks", as_dict(hook)) for hook in standing.values() if hook is not None]
    for place, hook in hooks:
        kind = word(hook.get("type"))
        is_known = kind in _HARMLESS_HOOKS or (place == "default_hooks" and kind in _DEFAULT_HOOKS)
        if kind == "EMAHook" and "ema" not in settings:
            settings |= _moving_average(hook, f"{place}.EMAHook", found)
        elif kind == "EarlyStoppingHook" and "patience" not in settings:
            settings |= _early_stop(hook, f"{place}.EarlyStoppingHook", found)
        elif not is_known:
            twice = kind in ("EMAHook", "EarlyStoppingHook")
            found.refuse(f"{place}.type", kind, "once" if twice else "EMAHook, EarlyStoppingHook")
    return settings


def _moving_average(hook: Mapping[str, Any], path: str, found: Findings) -> dict[str, Any]:
    known = dict.fromkeys(("momentum", "priority", "update_buffers", "strict_load"), ANY)
    known |= {"ema_type": ("ExponentialMovingAverage", "mmengine.ExponentialMovingAverage")}
    found.check(hook, path, known)
    momentum = found.number(hook.get("momentum", 0.0002), f"{path}.momentum")
    if not 0 < momentum < 1:
        found.refuse(f"{path}.momentum", momentum, "above 0 and below 1: the share of the new weights")
        return {}
    return {"ema": round(1.0 - momentum, 10)}


def _early_stop(hook: Mapping[str, Any], path: str, found: Findings) -> dict[str, Any]:
    """train.patience counts every evaluation that is not better; the other settings are listed."""
    differences = {
        "min_delta": "any better result counts here",
        "monitor": "box AP is watched here, mask AP with masks",
        "rule": "a higher AP is better here",
        "stopping_threshold": "no AP ends a training here",
    }
    found.check(hook, path, dict.fromkeys((*differences, "patience", "strict", "check_finite", "priority"), ANY))
    for name, here in differences.items():
        value = hook.get(name, 0.1 if name == "min_delta" else None)  # the former: mmengine's default
        if value is not None and value != 0:
            found.left_out.append(f"{path}.{name} = {shown(value)}: {here}")
    return {"patience": found.whole(hook.get("patience", 5), f"{path}.patience", least=1)}


def _check_loops(names: Mapping[str, Any], found: Findings) -> None:
    """The kinds of loop and runner, and how results are measured."""
    loop = as_dict(names.get("train_cfg")) if "data" not in names else {}
    found.expect(word(loop.get("type", "EpochBasedTrainLoop")), "train_cfg.type", "EpochBasedTrainLoop")
    runner = word(as_dict(names.get("runner")).get("type", "EpochBasedRunner"))
    if runner == "EpochBasedRunnerAmp":
        _say_precision("runner.type = 'EpochBasedRunnerAmp'", found)
    else:
        found.expect(runner, "runner.type", "EpochBasedRunner", "IterBasedRunner")  # the latter: refused by max_iters
    if not same(names.get("workflow", [["train", 1]]), [["train", 1]]):
        found.left_out.append(f"workflow = {shown(names['workflow'])}: training alone, evaluated every few epochs")
    parts = [("val_evaluator.", as_dict(part)) for part in as_list(names.get("val_evaluator"))]
    parts.append(("evaluation.", as_dict(names.get("evaluation"))))
    for path, part in parts:
        metrics = as_list(part.get("metric"))
        if not set(map(str, metrics)) <= {"bbox", "segm", "mAP"}:
            found.left_out.append(f"{path}metric = {shown(part['metric'])}: evaluated by COCO's AP of boxes and masks")
        for name in ("iou_thr", "iou_thrs", "proposal_nums"):
            if part.get(name) is not None:
                found.left_out.append(f"{path}{name} = {shown(part[name])}: evaluated at COCO's IoUs and counts")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
