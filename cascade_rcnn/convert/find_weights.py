"""Where a file keeps its weights: nestings, prefixes, averaged copies; and what its metadata says."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from cascade_rcnn.convert.key_tables import SIGNS, pattern
from cascade_rcnn.convert.safe_pickle import Placeholder, as_tensor, read_pickled
from cascade_rcnn.errors import CheckpointError
from cascade_rcnn.messages import printable

# Keys under which programs put the state_dict, the most specific first.
_HOLDERS = ("state_dict", "model_state_dict", "model_state", "model", "blobs", "module", "net", "network", "weights")
_AVERAGES = ("ema_state_dict", "state_dict_ema", "model_ema", "ema", "ema_model", "teacher")
_SKIPPED = (
    "optimizer",
    "optimizers",
    "optimizer_states",
    "scheduler",
    "lr_schedulers",
    "callbacks",
    "hyper_parameters",
)
_DEPTH = 4  # of nested dictionaries


@dataclass
class FoundWeights:
    """What was found in the file."""

    state: dict[str, Tensor]
    class_names: tuple[str, ...] = ()
    config: str | Mapping[str, Any] = ""
    detectron_text: str = ""
    notes: list[str] = field(default_factory=list)


def find_weights(path: Path) -> FoundWeights:
    """The weights in a file, wherever its library puts them, and what it says about them."""
    content: object = _read_safetensors(path) if path.suffix == ".safetensors" else read_pickled(path)
    if not isinstance(content, Mapping):
        what = f"a pickled {content.kind}" if isinstance(content, Placeholder) else f"a {type(content).__name__}"
        raise CheckpointError(f"{path}: holds {what}, not a state_dict: save model.state_dict() where it was made")
    found = FoundWeights({})
    candidates = list(_state_dicts(content, ""))
    if not candidates:
        objects = [key for key, value in content.items() if isinstance(value, Placeholder)]
        if objects:
            raise CheckpointError(
                f"{path}: holds the network as an object ({printable(objects[0])[:40]}), not as a state_dict: save "
                "model.state_dict() where it was made"
            )
        keys = ", ".join(printable(key)[:40] for key in list(content)[:5])
        raise CheckpointError(f"{path}: no weights found (it holds {keys or 'nothing'}); give one with a state_dict")
    place, found.state = min(candidates, key=lambda candidate: _rank(candidate[0]))
    others = [other for other, state in candidates if other != place and len(state) >= 0.5 * len(found.state)]
    if place.count("."):
        found.notes.append(f"weights: under {place}")
    if others and others != ["ema_state_dict"]:
        found.notes.append(f"weights: those under {place}; left out: {', '.join(others)}")
    _strip_prefix(found, path)
    if "ema_state_dict" in content or any(key.startswith("ema_") for key in found.state):
        found.notes.append("weights: the moving averages (EMA), which its library stores under the plain keys")
    _read_metadata(found, content)
    return found


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            if "cascade_rcnn" in (file.metadata() or {}):
                raise CheckpointError(f"{path}: already a checkpoint of this program: use it as it is")
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:100]
        raise CheckpointError(f"{path}: not a readable safetensors file ({reason}): fetch it again") from error


def _state_dicts(content: Mapping[Any, Any], place: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(where, weights) of every dictionary that holds more than a few tensors; their own key is '' at the top."""
    state = {}
    for key, value in content.items():
        tensor = as_tensor(value) if isinstance(key, str) else None
        if tensor is not None:
            state[key] = tensor
    if state:
        yield place, state
    if place.count(".") >= _DEPTH:
        return
    for key, value in content.items():
        if isinstance(value, Mapping) and isinstance(key, str) and key not in (*_SKIPPED, "meta", "hub"):
            yield from _state_dicts(value, f"{place}.{key}" if place else key)


def _rank(place: str) -> tuple[int, int, int]:
    """Plain weights before averaged ones, known places before others, outer before inner."""
    words = place.split(".")
    last = words[-1]
    averaged = any(word in _AVERAGES for word in words)
    known = _HOLDERS.index(last) if last in _HOLDERS else len(_HOLDERS)
    return int(averaged), known if place else len(_HOLDERS) + 1, len(words)


def _strip_prefix(found: FoundWeights, path: Path) -> None:
    """Keys without what a wrapper put before all of them (``model.``, ``module.``, ``ema_model.module.``)."""
    prefixes = _prefixes(found.state)
    if not prefixes or "" in prefixes:
        return
    averaged = [prefix for prefix in prefixes if re.search(r"\b(ema|teacher|averaged)|_ema\b", prefix)]
    chosen = averaged or prefixes
    if len(chosen) > 1:
        raise CheckpointError(
            f"{path}: holds {len(chosen)} networks, with the prefixes {printable(', '.join(chosen))}: save the "
            "state_dict of one"
        )
    prefix = chosen[0]
    total = len(found.state)
    found.state = {key.removeprefix(prefix): value for key, value in found.state.items() if key.startswith(prefix)}
    left = total - len(found.state)
    rest = f"; {left} without it left out" if left else ""
    found.notes.append(f"weights: the prefix {prefix} was taken off {len(found.state)} keys{rest}")


def _prefixes(state: Mapping[str, Tensor]) -> list[str]:
    """What stands before the keys that give a format away; shortest first. "" if such a key stands alone."""
    for sign, _ in SIGNS:
        search = re.compile(rf"((?:[A-Za-z_]\w*\.)*?)(?:{pattern(sign).pattern})")
        counted = Counter(match[1] for key in state if (match := search.fullmatch(key)))
        if counted:
            return sorted(counted, key=len)
    return []


def _read_metadata(found: FoundWeights, content: Mapping[Any, Any]) -> None:
    meta = content.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    dataset = meta.get("dataset_meta")
    for place in (dataset if isinstance(dataset, Mapping) else {}, meta, content):
        for key in ("classes", "CLASSES", "class_names", "thing_classes"):
            names = place.get(key)
            if isinstance(names, str) and names:  # ('cat') is no tuple: one name
                names = (names,)
            if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
                found.class_names = found.class_names or tuple(names)
    text = content.get("cfg")
    found.detectron_text = text if isinstance(text, str) else ""
    for key in ("cfg", "config"):
        value = meta.get(key)
        if isinstance(value, str) or (isinstance(value, Mapping) and "model" in value):
            found.config = found.config or value
