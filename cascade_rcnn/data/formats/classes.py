"""Classes of several splits, brought together by name: ids and order may differ from file to file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cascade_rcnn.data.records import DataSplit


def with_same_classes(splits: Sequence[DataSplit]) -> list[DataSplit]:
    """The splits with one list of classes: those of the first in its order, then what the others add.

    Labels are rewritten. A class that is added keeps its category id where that is free, else takes the next one.
    """
    first = splits[0]
    ids = dict(zip(first.class_names, first.category_ids))
    for split in splits[1:]:
        for name, number in zip(split.class_names, split.category_ids):
            if name not in ids:
                ids[name] = number if number not in ids.values() else max(ids.values()) + 1
    return [_relabelled(split, ids) for split in splits]


def _relabelled(split: DataSplit, ids: dict[str, int]) -> DataSplit:
    names = tuple(ids)
    if split.class_names == names and split.category_ids == tuple(ids.values()):
        return split
    label = {name: number for number, name in enumerate(names)}
    table = np.array([label[name] for name in split.class_names] or [0], dtype=np.int64)
    records = [
        replace(record, labels=table[record.labels] if len(record.labels) else record.labels)
        for record in split.records
    ]
    same_ids = all(ids[name] == number for name, number in zip(split.class_names, split.category_ids))
    return replace(
        split,
        records=records,
        class_names=names,
        category_ids=tuple(ids.values()),
        truth=split.truth if same_ids else None,  # the file speaks of other ids
    )


def strange_classes(known: Sequence[str], split: DataSplit) -> dict[str, int]:
    """Classes of a split that ``known`` does not list and that have objects: name and number of objects."""
    labels = np.concatenate([record.labels for record in split.records] or [np.zeros(0, np.int64)])
    counts = np.bincount(labels, minlength=len(split.class_names))
    return {name: int(count) for name, count in zip(split.class_names, counts.tolist()) if name not in known and count}


def similar_names(names: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of names that differ only in upper case, blanks, hyphens or underscores."""
    seen: dict[str, str] = {}
    pairs = []
    for name in names:
        key = "".join(letter for letter in name.casefold() if letter not in " -_")
        if key in seen:
            pairs.append((seen[key], name))
        else:
            seen[key] = name
    return pairs
