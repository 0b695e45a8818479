"""Reading recipes: a Python file with ``config = Config(...)``, the JSON of a run, and ``--key.sub value`` on top.

    load_config("cascade_rcnn_r50_fpn_1x_coco")                     # by bare name, from configs/
    load_config("my_recipe.py")                                     # any file; also config.json or the folder of a run
    apply_overrides(config, ["--train.epochs", "3", "--model.stage-ious", "0.5", "0.6", "--data.flip=0"])

Every mistake is one line that names the file or option, the value, and what would fit. Nothing here imports torch.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import json
import math
import re
import shutil
import textwrap
import traceback
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union

from cascade_rcnn.config import Config, DataConfig, ModelConfig, TrainConfig
from cascade_rcnn.errors import ConfigError
from cascade_rcnn.messages import one_line

# Keys that older versions wrote into config.json and checkpoints: the key of today, or None where it has no meaning
# any more. Keys that an older version did not know yet take their defaults.
RENAMED_KEYS: dict[str, str | None] = {}

# Other programs' names for our settings, for the hint on an unknown one
_ALIASES = {
    "learning_rate": "lr",
    "base_lr": "lr",
    "max_epochs": "epochs",
    "num_epochs": "epochs",
    "max_iter": "max_steps",
    "samples_per_gpu": "batch_size",
    "ims_per_batch": "images_per_step",
    "workers_per_gpu": "workers",
    "num_workers": "workers",
    "img_scale": "short_side",
    "image_size": "short_side",
    "imgsz": "short_side",
    "load_from": "init",
    "weights": "init",
    "amp": "precision",
    "score_thr": "score_threshold",
    "max_per_img": "max_detections",
}

# Other programs' options that mean something else here
_ELSEWHERE = {
    "work_dir": "the run's folder is --out RUN",
    "cfg_options": "write each setting as --key.sub value",
    "auto_scale_lr": "the learning rate always follows the real batch",
    "amp": "it is --train.precision bf16 (or fp16)",
    "launcher": "start it with torchrun --nproc-per-node 8 -m cascade_rcnn train ...",
    "num_gpus": "start it with torchrun --nproc-per-node 8 -m cascade_rcnn train ...",
    "gpus": "start it with torchrun --nproc-per-node 8 -m cascade_rcnn train ...",
    "eval_only": "it is the command cascade-rcnn evaluate",
    "config_file": "the recipe is the first word, without an option",
}

_Section = TypeVar("_Section")
_WORDS_FOR_BOOL = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}


def config_names() -> list[str]:
    """Bare names that ``load_config`` knows, sorted."""
    return sorted(_recipe_files())


def load_config(name_or_path: str | Path) -> Config:
    """Read a recipe by bare name, by file (.py, .json) or by the folder of a run.

    Raises ConfigError: no such name or file (with the closest names), or a mistake inside the file (with its line).
    """
    text = str(name_or_path)
    path = Path(text)
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise ConfigError(f"{text}: no config.json in this folder; give a recipe's name or file, or a run's folder")
    elif not path.is_file():
        recipes = _recipe_files()
        name = (path.stem if path.suffix == ".py" else path.name).replace("-", "_")
        looks_like_file = path.suffix in (".py", ".json") or path.parent != Path()
        if looks_like_file or name not in recipes:
            what = "config file" if looks_like_file else "config name"
            raise ConfigError(
                f"{text}: no such {what}{_closest(name, list(recipes))}; 'cascade-rcnn config' lists all names"
            )
        path = recipes[name]
    if path.suffix == ".json":
        return _load_json(path)
    if path.suffix != ".py":
        raise ConfigError(f"{text}: a config is a .py file with 'config = Config(...)' or the config.json of a run")
    return _load_python(path)


def config_from_dict(values: Mapping[str, Any], *, source: str = "config") -> Config:
    """Build a config from plain nested dictionaries, as ``Config.to_dict`` gives and as JSON stores them.

    ``source`` is named in messages. Raises ConfigError for unknown keys (with the closest), wrong types and values
    that do not fit. Missing keys take their defaults.
    """
    return _build(Config, _with_current_keys(values), source=source, prefix="")


def apply_overrides(config: Config, arguments: Sequence[str]) -> Config:
    """Change a config by command-line words: ``--train.epochs 3 --model.stage-ious 0.5 0.6 --data.flip=0``.

    Dashes and underscores mean the same. A switch alone means true, ``--train.no-compile`` false; ``none`` is None.
    All changes are applied together, so values that must agree may come in any order. Changing only the number of
    epochs moves the milestones with it: 24 instead of 12 turns 8 and 11 into 16 and 22.
    A setting that is given is no longer chosen from the data (``Config.automatic``).
    Raises ConfigError: an unknown key (with the closest), or a value of the wrong type (with the type).
    """
    hints = _flat_hints(Config)
    changes: dict[str, dict[str, Any]] = {}
    top_level: dict[str, Any] = {}
    for option, words in _split_options(arguments):
        key, words = _find_key(option, words, hints)
        value = _parse(words, hints[key], where=option)
        section, _, leaf = key.rpartition(".")
        if section:
            changes.setdefault(section, {})[leaf] = value
        else:
            top_level[leaf] = value
    if "epochs" in changes.get("train", {}) and "milestones" not in changes["train"]:
        changes["train"]["milestones"] = _moved_milestones(config.train, changes["train"]["epochs"])
    if config.automatic and "automatic" not in top_level:
        given = {f"{section}.{leaf}" for section, values in changes.items() for leaf in values}
        given |= {"model.anchor_scales"} if "model.anchor_sizes" in given else set()
        top_level["automatic"] = tuple(name for name in config.automatic if name not in given)
        _let_sides_agree(config.data, changes.get("data", {}), top_level["automatic"])
    for section, values in changes.items():
        top_level[section] = dataclasses.replace(getattr(config, section), **values)
    return dataclasses.replace(config, **top_level)


def _let_sides_agree(own: DataConfig, given: dict[str, Any], free: tuple[str, ...]) -> None:
    """Of the input's two sides, one that is left to the data follows the given one, where they would contradict."""
    factor = own.long_side / max(own.short_side)
    if "data.long_side" in free and "short_side" in given and max(given["short_side"]) > own.long_side:
        given["long_side"] = math.ceil(max(given["short_side"]) * factor / 32) * 32
    if "data.short_side" in free and "long_side" in given and given["long_side"] < max(own.short_side):
        given["short_side"] = (max(32, int(given["long_side"] / factor / 32) * 32),)


def settings_help(recipe: Sequence[str]) -> str:
    """All settings with their forms, values (of a recipe, if one is named) and meanings, for ``--help``."""
    config = load_config(recipe[0]) if recipe else Config()
    whose = (
        f"with the values of {recipe[0]}"
        if recipe
        else "with the values of a recipe that leaves them out\n"
        "('cascade-rcnn train CONFIG --help' shows those of CONFIG)"
    )
    width = min(shutil.get_terminal_size().columns, 100)
    lines = [f"Settings, changed by --key.sub value, {whose}:"]
    for section, part in vars(config).items():
        cls = type(part)
        if not dataclasses.is_dataclass(cls):
            continue
        about = " ".join((cls.__doc__ or "").split()).replace("``", "")
        lines += ["", *textwrap.wrap(f"{section}: {about}", width), ""]
        meanings, hints = _meanings(cls), typing.get_type_hints(cls)
        for name, value in vars(part).items():
            lines.append(f"  {_form(f'{section}.{name}', hints[name])}")
            text = f"{meanings.get(name, '')} (default: {_as_words(value)})".strip()
            lines += textwrap.wrap(text, width, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)


def _meanings(cls: type) -> dict[str, str]:
    """The docstring below each field of a dataclass, on one line."""
    (node,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(node, ast.ClassDef)
    found = {}
    for statement, after in itertools.pairwise(node.body):
        if not isinstance(statement, ast.AnnAssign):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found[ast.unparse(statement.target)] = " ".join(str(after.value.value).split()).replace("``", "")
    return found


def _form(key: str, hint: Any) -> str:
    """How a setting is written on the command line: ``--train.lr NUMBER``, ``--data.flip-x, --data.no-flip-x``."""
    option = "--" + key.replace("_", "-")
    if hint is bool:
        return f"{option}, {option.replace('.', '.no-', 1)}"
    return f"{option} {_placeholder(hint)}"


def _placeholder(hint: Any) -> str:
    origin, parameters = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, UnionType):
        return f"{_placeholder(_without_none(hint))} | none"
    if origin is Literal:
        return "{" + ",".join(parameters) + "}"
    if origin is tuple:
        if parameters[-1] is Ellipsis:
            return f"{_placeholder(parameters[0])} ..."
        return " ".join(map(_placeholder, parameters))
    return {int: "INTEGER", float: "NUMBER", bool: "true|false"}.get(hint, "TEXT")


def _as_words(value: object) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, tuple):
        return " ".join(map(_as_words, value)) or "none given"
    if isinstance(value, float):
        return f"{value:g}"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value) if value != "" else "''"


def _moved_milestones(train: TrainConfig, epochs: int) -> tuple[int, ...]:
    """The milestones at the same fractions of ``epochs``; for a recipe without a schedule, at 2/3 and 11/12."""
    if epochs == 0:
        return train.milestones
    shares = [place / train.epochs for place in train.milestones] if train.epochs else [2 / 3, 11 / 12]
    return tuple(sorted({place for place in (round(share * epochs) for share in shares) if 0 < place < epochs}))


def config_to_python(config: Config) -> str:
    """A recipe file that gives this very config, every setting written out."""
    lines = [
        f'"""{_title(config)}"""',
        "",
        "from cascade_rcnn.config import Config, DataConfig, ModelConfig, TrainConfig",
        "",
        "config = Config(",
    ]
    for section, value in vars(config).items():
        if dataclasses.is_dataclass(value):
            lines.append(f"    {section}={type(value).__name__}(")
            lines += [f"        {name}={setting!r}," for name, setting in vars(value).items()]
            lines.append("    ),")
        else:
            lines.append(f"    {section}={value!r},")
    return "\n".join([*lines, ")", ""])


def _title(config: Config) -> str:
    says = config.published
    return f"Published: {says}" if says and says != "none" else "A recipe with every setting written out."


def _recipe_files() -> dict[str, Path]:
    package = Path(__file__).resolve().parent
    checkout = package.parent / "configs"
    in_checkout = checkout.is_dir() and (package.parent / "pyproject.toml").is_file()
    folder = checkout if in_checkout else package / "configs"
    return {path.stem: path for path in sorted(folder.rglob("*.py")) if not path.stem.startswith("_")}


def _load_python(path: Path) -> Config:
    try:
        code = compile(path.read_text(encoding="utf-8"), str(path), "exec", dont_inherit=True)
        names: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
        exec(code, names)
    except SyntaxError as error:
        raise ConfigError(f"{path}, line {error.lineno}: {error.msg}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        raise ConfigError(f"{path}, line {lines[-1] if lines else '?'}: {_told(error)}") from error
    config = names.get("config")
    if not isinstance(config, Config):
        found = "nothing of that name" if config is None else f"config is a {type(config).__name__}"
        raise ConfigError(f"{path}: expected 'config = Config(...)', found {found}")
    return config_from_dict(config.to_dict(), source=str(path))  # checks the types, which Python has not done


def _load_json(path: Path) -> Config:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    return config_from_dict(values, source=str(path))


def _told(error: Exception) -> str:
    """A ConfigError speaks for itself; of Python's own errors the kind is worth telling (NameError, TypeError)."""
    message = one_line(error)
    if isinstance(error, ConfigError):
        return message
    if isinstance(error, TypeError) and "unexpected keyword argument" in message:
        key = message.rsplit("'", 2)[-2]
        called = message.partition(".")[0]
        (cls,) = [cls for cls in (Config, ModelConfig, DataConfig, TrainConfig) if cls.__name__ == called] or [Config]
        return f"unknown setting {key}{_closest(key, list(typing.get_type_hints(cls)))}"
    return f"{type(error).__name__}: {message}"


def _closest(word: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(matches)}?)" if matches else ""


# Nested dictionaries


def _with_current_keys(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Move what older versions wrote to the keys of today."""
    if not RENAMED_KEYS or not isinstance(values, Mapping):
        return values
    result = {name: dict(part) if isinstance(part, Mapping) else part for name, part in values.items()}
    for old, new in RENAMED_KEYS.items():
        section, _, leaf = old.rpartition(".")
        holder = result.get(section) if section else result
        if isinstance(holder, dict) and leaf in holder:
            value = holder.pop(leaf)
            if new is not None:
                new_section, _, new_leaf = new.rpartition(".")
                (result.setdefault(new_section, {}) if new_section else result).setdefault(new_leaf, value)
    return result


def _build(cls: type[_Section], values: object, *, source: str, prefix: str) -> _Section:
    if not isinstance(values, Mapping):
        where = f"{source}: {prefix.rstrip('.')}" if prefix else source
        raise ConfigError(f"{where} is {_in_json(values)}, expected an object with settings")
    hints = typing.get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name not in hints:
            raise ConfigError(
                f"{source}: unknown setting {prefix}{name}{_closest(str(name), list(hints))}; "
                "if a newer version wrote it, upgrade cascade-rcnn"
            )
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            arguments[name] = _build(typing.cast(type, hint), value, source=source, prefix=f"{name}.")
        else:
            arguments[name] = _check(value, hint, where=f"{source}: {prefix}{name}")
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _check(value: Any, hint: Any, *, where: str) -> Any:
    """Return ``value`` as ``hint`` wants it (lists become tuples, int fits float); ConfigError if it does not fit."""
    origin, parameters = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, UnionType):
        if value is None and NoneType in parameters:
            return None
        return _check(value, _without_none(hint), where=where)
    if origin is Literal and isinstance(value, str) and value in parameters:
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        if parameters[-1] is Ellipsis:
            return tuple(_check(item, parameters[0], where=where) for item in value)
        if len(value) == len(parameters):
            return tuple(_check(item, part, where=where) for item, part in zip(value, parameters))
    fits_float = hint is float and isinstance(value, (int, float)) and not isinstance(value, bool)
    if fits_float and math.isfinite(value):
        return float(value)
    if hint in (bool, str) and isinstance(value, hint):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ConfigError(f"{where} is {_in_json(value)}, expected {_describe(hint)}")


def _in_json(value: object) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


def _without_none(hint: Any) -> Any:
    """The one type beside None; settings have no other unions."""
    (only,) = [part for part in typing.get_args(hint) if part is not NoneType]
    return only


def _describe(hint: Any) -> str:
    origin, parameters = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, UnionType):
        return f"{_describe(_without_none(hint))}, or none"
    if origin is Literal:
        return "one of " + ", ".join(parameters)
    if origin is tuple:
        if parameters[-1] is not Ellipsis:
            return f"{len(parameters)} numbers"
        return f"rows of {_describe(parameters[0])}" if typing.get_origin(parameters[0]) is tuple else "numbers"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return names.get(hint, str(hint))


# Words of a command line


def _split_options(arguments: Sequence[str]) -> list[tuple[str, list[str]]]:
    """``["--a.b", "1", "2", "--c.d=3"]`` to ``[("--a.b", ["1", "2"]), ("--c.d", ["3"])]``."""
    options: list[tuple[str, list[str]]] = []
    for word in arguments:
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            options.append((option, [value] if equals else []))
        elif re.match("-[A-Za-z]{2}", word) and word.lower() not in ("-inf", "-nan"):
            raise ConfigError(f"{word}: options begin with two dashes: -{word}")
        elif options:
            options[-1][1].append(word)
        else:
            raise ConfigError(f"unexpected {word!r}: settings are changed by --key.sub value, e.g. --train.epochs 3")
    return options


def _flat_hints(cls: type, prefix: str = "") -> dict[str, Any]:
    """``{"model.backbone": str, ..., "published": str}``."""
    flat: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            flat |= _flat_hints(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            flat[prefix + name] = hint
    return flat


def _find_key(option: str, words: list[str], hints: Mapping[str, Any]) -> tuple[str, list[str]]:
    key = option[2:].replace("-", "_")
    if key in hints:
        return key, words
    section, _, leaf = key.rpartition(".")
    positive = f"{section}.{leaf.removeprefix('no_')}"
    if leaf.startswith("no_") and hints.get(positive) is bool and not words:
        return positive, ["false"]
    if key in _ELSEWHERE:
        raise ConfigError(f"{option}: not known here; {_ELSEWHERE[key]} (docs/migrate.md)")
    same_leaf = [name for name in hints if name.rpartition(".")[2] in (leaf, _ALIASES.get(leaf))]
    known = same_leaf or difflib.get_close_matches(key, list(hints), n=2, cutoff=0.6)
    hint = f" (did you mean {' or '.join('--' + name.replace('_', '-') for name in known)}?)" if known else ""
    raise ConfigError(f"{option}: no such setting{hint}; 'cascade-rcnn train --help' lists all settings")


def _parse(words: list[str], hint: Any, *, where: str) -> Any:
    """The value that the words after an option mean; commas and brackets are accepted between numbers."""
    origin = typing.get_origin(hint)
    if origin in (Union, UnionType):
        return None if [word.lower() for word in words] == ["none"] else _parse(words, _without_none(hint), where=where)
    if origin is tuple:
        items = " ".join(words).translate(str.maketrans("()[],", "     ")).split()
        return _parse_tuple(items, hint, where=where)
    if hint is bool and not words:
        return True
    if len(words) != 1:
        given = "no value" if not words else "several: " + " ".join(words)
        raise ConfigError(f"{where} takes one value, {_describe(hint)}, and got {given}")
    return _parse_scalar(words[0], hint, where=where)


def _parse_tuple(items: list[str], hint: Any, *, where: str) -> tuple[Any, ...]:
    parameters = typing.get_args(hint)
    inner = parameters[0]
    if typing.get_origin(inner) is tuple:
        width = len(typing.get_args(inner))
        if not items or len(items) % width:
            raise ConfigError(f"{where} got {len(items)} numbers, expected rows of {width} numbers")
        return tuple(_parse_tuple(items[i : i + width], inner, where=where) for i in range(0, len(items), width))
    if not items or (parameters[-1] is not Ellipsis and len(items) != len(parameters)):
        raise ConfigError(f"{where} got {len(items)} values, expected {_describe(hint)}")
    return tuple(_parse_scalar(item, inner, where=where) for item in items)


def _parse_scalar(word: str, hint: Any, *, where: str) -> Any:
    value: Any = word
    try:
        if hint is bool:
            value = _WORDS_FOR_BOOL.get(word.lower(), word)
        elif hint in (int, float):
            value = hint(word)
    except ValueError:
        pass  # _check names the value and the type
    return _check(value, hint, where=where)
