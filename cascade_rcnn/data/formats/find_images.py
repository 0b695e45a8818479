"""Which picture an annotation means: the one it names, or the only one it can mean.

Annotations are written on other machines: with backslashes, absolute folders, a server's address, a name that macOS
decomposed, ``.JPG`` for ``.jpg``, or a PNG that was converted later. A name is taken as it stands first. Otherwise the
picture must be the only candidate, must have the size that the annotation states, must not lie in another split's
folder, and must not be claimed by two names; then it is used, and said.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from cascade_rcnn.data import files
from cascade_rcnn.data.images import IMAGE_SUFFIXES, image_size
from cascade_rcnn.data.problems import Problems
from cascade_rcnn.messages import printable, shown

# Pictures in these folders are not photographs: masks, drawings, small copies
_OTHER_PICTURES = frozenset(
    [
        "mask",
        "masks",
        "segmentationclass",
        "segmentationobject",
        "segmentation",
        "segmentations",
        "visualization",
        "visualizations",
        "labels",
        "annotations",
        "predictions",
        "preds",
        "runs",
        "thumbnails",
        "thumbs",
        "depth",
        "debug",
    ]
)
_EXACT, _REWRITTEN, _SPELLING, _ENDING, _ELSEWHERE = range(5)
_HOW = {
    _REWRITTEN: ("image-name", "are written for another place (path of another machine, a server's address)"),
    _SPELLING: ("image-name", "are spelled differently on the disk (upper case, composed letters)"),
    _ENDING: ("image-elsewhere", "have another ending on the disk"),
    _ELSEWHERE: ("image-elsewhere", "lie in another folder than the one looked at"),
}


def same_name(name: str) -> str:
    """Equal for names that differ only in upper case or in how accents are composed."""
    return unicodedata.normalize("NFC", name).casefold()


def stem_of(name: str) -> str:
    """A file name without its picture ending; other dots stay (``frame.0001``)."""
    stem, dot, ending = name.rpartition(".")
    return stem if dot and f".{ending.lower()}" in IMAGE_SUFFIXES else name


class ImageFinder:
    """Finds the pictures of one split below ``root``; ``folders`` are where they may lie, the likeliest first."""

    def __init__(self, root: Path, folders: Sequence[Path], *, split: str = "") -> None:
        self.root, self.folders = root, list(dict.fromkeys([*folders, root]))
        self._split = files.split_word(split)
        self._listings: dict[str, frozenset[str]] = {}
        self._spellings: dict[str, tuple[dict[str, list[str]], dict[str, list[str]]]] = {}
        self._everywhere: dict[str, list[Path]] | None = None

    def find(
        self, names: Sequence[object], sizes: Sequence[tuple[int, int]], problems: Problems, where: str
    ) -> list[Path | ValueError]:
        """The file of each name, there or not; ``ValueError`` with the reason where it is no name below the root.

        ``sizes`` are the (height, width) of the annotations, 0 where they do not say. What was found by another name
        than the one written is added to ``problems``.
        """
        found = [self._find(name, size) for name, size in zip(names, sizes)]
        claims = Counter(path for path, _, _ in found if path is not None)
        paths: list[Path | ValueError] = []
        told: dict[int, list[tuple[str, Path]]] = defaultdict(list)
        for name, (path, how, plain) in zip(names, found):
            if path is not None and (how == _EXACT or claims[path] == 1):
                paths.append(path)
                if how != _EXACT:
                    told[how].append((str(name), path))
            else:
                paths.append(plain)
        for how, pairs in sorted(told.items()):
            kind, text = _HOW[how]
            name, path = pairs[0]
            problems.add(
                kind,
                where,
                f"{len(pairs):,} of {len(names):,} image names {text}: {shown(name)} is {printable(path)}",
            )
        return paths

    def _find(self, name: object, size: tuple[int, int]) -> tuple[Path | None, int, Path | ValueError]:
        """(the picture or None, how it was found, what stands for it where it is not there)."""
        plain: Path | ValueError
        try:
            plain = files.safe_path(self.root, self.folders[0], name)
        except ValueError as error:
            plain = error
        if isinstance(plain, Path) and self._is_there(plain):
            return plain, _EXACT, plain
        if isinstance(name, str) and name.strip() and "\0" not in name and _can_be_a_file(name):
            for path, how in self._candidates(name):
                if how < _ENDING or self._has_size(path, size):
                    return path, how, plain
            if (found := self._elsewhere(name, size)) is not None:
                return found, _ELSEWHERE, plain
        return None, _EXACT, plain

    def _candidates(self, name: str) -> Iterator[tuple[Path, int]]:
        """Files in the likely folders: ends of the name as written, then in another spelling or with another ending."""
        ends = _ends(name)
        places = [folder.joinpath(*end) for end in ends for folder in self.folders]
        for path in places:
            if self._is_there(path):
                yield path, _REWRITTEN
        for path in places:
            by_name, by_stem = self._spelled(path.parent)
            for table, key, how in (
                (by_name, same_name(path.name), _SPELLING),
                (by_stem, same_name(stem_of(path.name)), _ENDING),
            ):
                same = table.get(key, [])
                if len(same) == 1:
                    yield path.with_name(same[0]), how

    def _elsewhere(self, name: str, size: tuple[int, int]) -> Path | None:
        """The only picture of this name anywhere below the root, or the only one that shares most of its path."""
        last = same_name(_ends(name)[-1][-1])
        found = [path for path in self._index().get(last, []) if self._may_be(path)]
        if not found and all(size):  # with another ending too; the size has to speak for it
            found = [path for path in self._index().get(stem_of(last), []) if self._may_be(path)]
        if len(found) > 1:
            wanted = [same_name(part) for part in _ends(name)[0]]
            shared = [_common_end(wanted, [same_name(part) for part in path.parts]) for path in found]
            found = [path for path, length in zip(found, shared) if length == max(shared)]
        if len(found) > 1 and self._split:
            found = [path for path in found if self._words(path) == {self._split}]
        return found[0] if len(found) == 1 and self._has_size(found[0], size) else None

    def _may_be(self, path: Path) -> bool:
        return not self._split or self._words(path) <= {self._split}

    def _words(self, path: Path) -> set[str]:
        return {word for part in path.relative_to(self.root).parts[:-1] if (word := files.split_word(part))}

    def _has_size(self, path: Path, size: tuple[int, int]) -> bool:
        return not all(size) or image_size(path) in (size, size[::-1])

    def _is_there(self, path: Path) -> bool:
        return path.name in self._listing(path.parent)

    def _listing(self, folder: Path) -> frozenset[str]:
        """Names in a folder, read once: a look at the disk per image is slow on a network drive."""
        key = str(folder)
        if key not in self._listings:
            try:
                with os.scandir(folder) as entries:
                    self._listings[key] = frozenset(entry.name for entry in entries)
            except (OSError, ValueError):
                self._listings[key] = frozenset()
        return self._listings[key]

    def _spelled(self, folder: Path) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        key = str(folder)
        if key not in self._spellings:
            tables: tuple[dict[str, list[str]], dict[str, list[str]]] = (defaultdict(list), defaultdict(list))
            for name in self._listing(folder):
                if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES:
                    tables[0][same_name(name)].append(name)
                    tables[1][same_name(stem_of(name))].append(name)
            self._spellings[key] = tables
        return self._spellings[key]

    def _index(self) -> dict[str, list[Path]]:
        if self._everywhere is None:
            self._everywhere = defaultdict(list)
            for path in files.list_files_below(self.root, skip=_OTHER_PICTURES):
                for key in {same_name(path.name), same_name(path.stem)}:
                    self._everywhere[key].append(path)
        return self._everywhere


def _can_be_a_file(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def _ends(name: str) -> list[list[str]]:
    """The parts of a path from elsewhere, longest first: C:\\set\\val\\a.jpg is set/val/a.jpg, val/a.jpg, a.jpg."""
    ends: list[list[str]] = []
    for text in dict.fromkeys([name, unquote(name)]):
        parts = [part for part in text.replace("\\", "/").split("/") if part.strip() not in ("", ".", "..")]
        parts = parts[1:] if len(parts) > 1 and parts[0].endswith(":") else parts
        ends += [parts[start:] for start in range(len(parts))]
    return sorted(ends, key=len, reverse=True) or [[name]]


def _common_end(first: Sequence[str], second: Sequence[str]) -> int:
    shared = 0
    for one, other in zip(reversed(first), reversed(second)):
        if one != other:
            break
        shared += 1
    return shared
