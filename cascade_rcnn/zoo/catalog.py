"""The list of published weights: 379 checkpoints of other libraries, found by name.

``published.json`` has one entry per checkpoint: its name, address, the hash that its file name carries, published AP,
whose it is, its licence and its size, or, where weights of its kind are not converted, the part of the network that
stands in the way.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cascade_rcnn.errors import CheckpointError
from cascade_rcnn.recipes import config_names

_LIST = Path(__file__).with_name("published.json")


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published checkpoint."""

    name: str
    library: str  # whose
    url: str
    source: str  # where its facts were read
    dataset: str = "COCO"
    also: tuple[str, ...] = ()  # other names that its library has given it
    hash: str = ""  # first hex digits of the file's digest, as its name carries them
    hash_of: str = ""  # "sha256" or "md5"
    sha256: str = ""  # of the whole file, where we know it
    box_ap: float | None = None  # in per cent, as published
    mask_ap: float | None = None
    backbone: str = ""
    license: str = ""
    recipe: str = ""  # ours of the same training, where there is one
    parameters: int = 0  # of the converted network; 0: it does not load
    missing: str = ""  # the part of the network whose weights are not converted; empty: it loads

    @property
    def file(self) -> str:
        """Name of the file at its address."""
        return self.url.rpartition("/")[2]


@functools.cache
def published() -> tuple[Published, ...]:
    """All entries, in the list's order."""
    entries = json.loads(_LIST.read_text(encoding="utf-8"))
    return tuple(Published(**{**entry, "also": tuple(entry.get("also", ()))}) for entry in entries)


def normalised(name: str) -> str:
    """What spellings of a name share: case, dashes, ``mstrain`` for ``ms`` and a file's ending do not matter."""
    words = re.sub(r"\.(py|pth|pkl|yaml|safetensors)$", "", name.strip().lower())
    return re.sub(r"[^a-z0-9.+]+", "_", words.replace("mstrain", "ms")).strip("_")


def _spellings(entry: Published) -> Iterator[str]:
    yield from (entry.name, *entry.also)
    yield re.sub("^(torchvision|detectron2)_", "", entry.name)
    stem = entry.file.rpartition(".")[0]
    yield stem
    yield re.sub(r"_\d{8}[_-].*$|-[0-9a-f]{6,8}$", "", stem)  # the file, without date and hash
    if entry.library == "detectron2":
        yield config_of_detectron2(entry)


def config_of_detectron2(entry: Published) -> str:
    """As its model zoo calls it: ``COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x``."""
    return "/".join(entry.url.split("/")[-4:-2])


@functools.cache
def _by_spelling() -> dict[str, Published]:
    table: dict[str, Published] = {}
    ambiguous: set[str] = set()
    for entry in published():
        for number, spelling in enumerate(dict.fromkeys(map(normalised, _spellings(entry)))):
            other = table.setdefault(spelling, entry)
            if other is not entry and number:  # "model_final" is the file of many
                ambiguous.add(spelling)
    for spelling in ambiguous:
        if normalised(table[spelling].name) != spelling:
            del table[spelling]
    return table


def find(name: str) -> Published | None:
    """The entry of that name, in any of its spellings."""
    return _by_spelling().get(normalised(name))


def nearest(name: str) -> list[str]:
    """Up to three names that load: those that have this one in them, else those spelt most like it."""
    names = {spelling: entry.name for spelling, entry in _by_spelling().items() if not entry.missing}
    word = normalised(name)
    inside = [whole for spelling, whole in names.items() if len(word) > 3 and word in spelling]
    like = [] if inside else difflib.get_close_matches(word, names, n=9, cutoff=0.65)
    return list(dict.fromkeys(inside + [names[match] for match in like]))[:3]


def nearest_words(words: Sequence[str]) -> list[str]:
    """The words, those that no name has as the parts of names most like them; else up to three names."""
    spellings = list(_by_spelling())
    parts = {part for spelling in spellings for part in spelling.split("_") if len(part) > 3}
    right = []
    for word in map(normalised, words):
        known = any(word in spelling for spelling in spellings)
        right += [word] if known else difflib.get_close_matches(word, parts, n=1, cutoff=0.7)
    if len(right) == len(words) and any(all(word in spelling for word in right) for spelling in spellings):
        return [" ".join(right)]
    return nearest("_".join(words))


def find_loadable(name: str) -> Published:
    """The entry of that name. Raises CheckpointError: an unknown name, or a network that has no counterpart here."""
    entry = find(name)
    if entry is None:
        if name in config_names():
            raise CheckpointError(
                f"{name}: a recipe whose weights nobody has published; 'cascade-rcnn train {name} --data DIR' makes "
                "some, and a run's folder is taken as a checkpoint"
            )
        near = nearest(name)
        hint = f"did you mean {' or '.join(near)}?" if near else "'cascade-rcnn models' lists the names"
        raise CheckpointError(f"{name}: neither a file nor the name of published weights; {hint}")
    if entry.missing:
        raise CheckpointError(f"{entry.name}: {cannot_load(entry)}")
    return entry


def cannot_load(entry: Published) -> str:
    """Why, of an entry that does not load."""
    return (
        f"cannot be loaded: weights of this kind are not converted ({entry.missing}); "
        "'cascade-rcnn models' marks the ones that are"
    )


def of_file(file: str, sha256: str) -> Published | None:
    """The entry that a converted checkpoint came from: by the name of its file, and its digest where known."""
    entry = find(Path(file).stem)
    if entry is None or (entry.hash_of == "sha256" and not sha256.startswith(entry.hash)):
        return None
    return entry
