"""mmdetection's config files: ``_base_`` followed and merged as mmengine merges, nothing run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cascade_rcnn.convert import config_syntax
from cascade_rcnn.errors import ConfigError
from cascade_rcnn.messages import one_line, printable, shown

_MOST_FILES = 100
_DELETE = "_delete_"


def read_config_file(path: str | Path) -> tuple[dict[str, Any], dict[Path, list[str]], set[str]]:
    """All names of a config with those of its base files, each file with the names that it sets itself, and the names
    that the files use in other values.

    Raises ConfigError: a file that is missing, too large or no config; what is no plain value (with file and line);
    base files that name each other, or set the same name; a dictionary over something else.
    """
    files: dict[Path, list[str]] = {}
    used: set[str] = set()
    names = _read(Path(path), files, used, above=())
    return config_syntax.copied(names, where=printable(path)), files, used


def _read(path: Path, files: dict[Path, list[str]], used: set[str], *, above: tuple[Path, ...]) -> dict[str, Any]:
    where, real = printable(path), Path(os.path.realpath(path))
    if real in above:
        raise ConfigError(f"{where}: its base files lead back to itself")
    if len(files) >= _MOST_FILES:
        raise ConfigError(f"{where}: more than {_MOST_FILES} base files")
    files[path] = []
    tree = config_syntax.parse(_text(path, where), where=where)
    used |= config_syntax.used_names(tree)
    base: dict[str, Any] = {}
    for name in config_syntax.bases(tree, where=where):
        if "::" in name:
            raise ConfigError(f"{where}: _base_ {shown(name)} lies in an installed package: give that file's path")
        target = Path(os.path.normpath(path.parent / name))
        if not target.is_file():
            raise ConfigError(f"{printable(target)}: no such file, which _base_ of {where} names")
        found = _read(target, files, used, above=(*above, real))
        twice = sorted(set(found) & set(base))
        if twice:
            raise ConfigError(f"{where}: two of its base files set {twice[0]}; mmdetection refuses that too")
        base |= found
    base = config_syntax.copied(base, where=where)
    names = config_syntax.evaluate(tree, base, where=where)
    names = config_syntax.copied(names, where=where)
    files[path] = sorted(map(str, names))
    return _merged(names, base, where=where)


def _text(path: Path, where: str) -> str:
    if not path.is_file():
        raise ConfigError(f"{where}: no such file")
    if path.suffix != ".py":
        raise ConfigError(f"{where}: mmdetection's configs in Python (.py) are read")
    try:
        if path.stat().st_size > config_syntax.MAX_TEXT:
            raise ConfigError(f"{where}: {path.stat().st_size / 1e6:.0f} MB, too large for a config")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where} cannot be read: {one_line(error)}") from error


def _merged(over: Mapping[str, Any], base: Mapping[str, Any], *, where: str, path: str = "") -> dict[str, Any]:
    """``over`` laid over ``base``: dictionaries are merged unless they say ``_delete_=True``, all else is replaced."""
    result = dict(base)
    for key, value in over.items():
        place = f"{path}.{key}" if path else str(key)
        if not isinstance(value, dict):
            result[key] = value
            continue
        value = dict(value)
        if value.pop(_DELETE, False) or key not in base:
            result[key] = _merged(value, {}, where=where, path=place)
        elif isinstance(base[key], dict):
            result[key] = _merged(value, base[key], where=where, path=place)
        else:
            raise ConfigError(
                f"{where}: {place} is a dictionary over {shown(base[key])} of a base file; mmdetection refuses that "
                "too: add _delete_=True to it"
            )
    return result
