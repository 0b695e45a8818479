"""What keeps the package a house one can live in: rooms in an order, short functions, few files on the model's path.

The model's files are counted while a training of two steps runs: importing a module alone does not count.
"""

from __future__ import annotations

import ast
import functools
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import pytest

import cascade_rcnn
import locations
from cascade_rcnn import recipes
from cascade_rcnn.config import Config, DataConfig, ModelConfig, TrainConfig

PACKAGE = Path(cascade_rcnn.__file__).resolve().parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "configs")
FUNCTION_LINES, PARAMETERS = 60, 9
MODEL_FILES = 14

# Lowest first: a module imports from its own room and from those before it.
ROOMS = (
    "errors messages rounding structures config atomic_files cache",
    "recipes checkpoint distributed progress",
    "models.ops",
    "models",
    "data",
    "data.formats",
    "convert",
    "zoo",
    "drawing",
    "runtime",  # what runs without torch
    "inference",
    "evaluation",
    "analysis",
    "history",
    "check",
    "training",
    "export",
    "benchmark",
    "serve",
    # one verb each, and documented names
    "train evaluate analyze compare predict predict_without_torch score demo visualize ray sahi",
    "labels",
    "cli __main__",
)

Function = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def _trees() -> list[tuple[str, ast.Module]]:
    return [(str(path.relative_to(PACKAGE)), ast.parse(path.read_text(encoding="utf-8"))) for path in MODULES]


def _functions() -> Iterator[tuple[str, Function]]:
    for name, tree in _trees():
        for node in ast.walk(tree):
            if isinstance(node, Function):
                yield f"{name}:{node.lineno} {node.name}", node


def _parameters(function: Function) -> list[str]:
    arguments = function.args
    names = [a.arg for a in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]]
    return [name for name in names if name not in ("self", "cls")]


def _is_kernel(function: Function) -> bool:
    """A Triton kernel takes a pointer and a stride for each axis, and is one piece: it cannot be split like others."""
    return any("triton" in ast.unparse(decorator) for decorator in function.decorator_list)


def _module_name(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _imports() -> dict[str, set[str]]:
    """The modules of the package that each module imports, at its top or within functions."""
    modules = {_module_name(name) for name, _ in _trees()}
    graph: dict[str, set[str]] = {}
    for name, tree in _trees():
        found = graph.setdefault(_module_name(name), set())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("cascade_rcnn."):
                parent = node.module.removeprefix("cascade_rcnn.")
                found |= {f"{parent}.{a.name}" if f"{parent}.{a.name}" in modules else parent for a in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module == "cascade_rcnn":
                found |= {a.name for a in node.names if a.name in modules}
    del graph["__init__"]  # gives the public names, lazily
    return graph


def _floor(module: str) -> int:
    """How high the room of a module lies in ``ROOMS``."""
    for level, names in enumerate(ROOMS):
        if module in names.split() or module.rpartition(".")[0] in names.split():
            return level
    raise AssertionError(f"{module}: in which room is it? Name it in ROOMS")


def test_no_room_imports_one_above_it() -> None:
    upward = [f"{a} -> {b}" for a, found in _imports().items() for b in found if _floor(b) > _floor(a)]
    assert upward == []


def test_every_room_stands_in_the_docs() -> None:
    page = (locations.REPOSITORY / "docs" / "index.md").read_text(encoding="utf-8")
    table = page.partition("## Rooms")[2].partition("\n## ")[0]
    rooms = sorted({path.relative_to(PACKAGE).parts[0] for path in MODULES if len(path.relative_to(PACKAGE).parts) > 1})
    assert rooms and [room for room in rooms if f"`{room}/`" not in table] == []


def test_no_imports_go_in_a_circle() -> None:
    graph = _imports()
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_no_function_is_longer_than_a_screen() -> None:
    lines = {name: (node.end_lineno or 0) - node.lineno + 1 for name, node in _functions() if not _is_kernel(node)}
    assert {name: count for name, count in lines.items() if count > FUNCTION_LINES} == {}


def test_no_function_takes_too_many_parameters() -> None:
    counts = {name: len(_parameters(node)) for name, node in _functions() if not _is_kernel(node)}
    assert {name: count for name, count in counts.items() if count > PARAMETERS} == {}


def test_nothing_is_registered_and_no_string_names_a_class() -> None:
    classes = {node.name for _, tree in _trees() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    found = []
    for name, tree in _trees():
        type_variables = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "TypeVar"
        ]
        allowed = {inner for node in type_variables for inner in ast.walk(node)}
        theirs = {"CollectorRegistry", "registry"} if name == "serve/app.py" else set()  # words of Prometheus
        for node in ast.walk(tree):
            words = [getattr(node, field, "") for field in ("id", "attr", "name", "arg")]
            if any(isinstance(word, str) and "registr" in word.lower() and word not in theirs for word in words):
                found.append(f"{name}:{getattr(node, 'lineno', 0)} registers")
            is_class_name = isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in classes
            # the first lists the public names, the second holds mmdetection's, some of which are ours too
            listing = name in ("__init__.py", "convert/config_rules.py")
            if is_class_name and node not in allowed and not listing:
                found.append(f"{name}:{node.lineno} names the class {node.value}")
    assert found == []


@pytest.mark.parametrize("path", recipes._recipe_files().values(), ids=lambda path: path.stem)
def test_a_recipe_is_understood_from_itself_and_config_py(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    imported = {
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert imported == {"cascade_rcnn.config"}
    assert len(text.splitlines()) <= 60 and (ast.get_docstring(ast.parse(text)) or "") != ""


class _Files:
    """Context that notes the package's files in which a function ran (importing a module alone does not count)."""

    def __init__(self) -> None:
        self.seen: dict[str, set[str]] = {}

    def _note(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)) and code.co_name != "<module>":
            self.seen.setdefault(str(Path(code.co_filename).relative_to(PACKAGE)), set()).add(code.co_name)

    def __enter__(self) -> _Files:
        threading.settrace(self._note)
        sys.settrace(self._note)  # returns None: called once per function, not per line
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]


def _tiny_config(data: Path, masks: Literal["none", "every"]) -> Config:
    return Config(
        model=ModelConfig(
            backbone="resnet18",
            pretrained=False,
            fpn_channels=16,
            head_channels=16,
            mask_channels=8,
            masks=masks,
            norm="batch",
            frozen_stages=-1,
            test_proposals=50,
        ),
        data=DataConfig(root=str(data), short_side=(64,), long_side=96, workers=0),
        train=TrainConfig(epochs=1, milestones=(), batch_size=2, images_per_step=2, warmup_steps=1, max_steps=2),
    )


def _files_of_a_training(folder: Path, masks: Literal["none", "every"]) -> dict[str, set[str]]:
    """Train two steps and evaluate, in this process."""
    from cascade_rcnn.data.synthetic_shapes import generate_shapes
    from cascade_rcnn.train import train

    data = generate_shapes(folder / "data", train_images=4, val_images=4, size=64)
    with _Files() as files:
        train(_tiny_config(data, masks), out=folder / "run")
    return files.seen


@pytest.fixture(scope="module")
def files_of_one_image(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    return _files_of_a_training(tmp_path_factory.mktemp("boxes"), "none")


def _model_files(seen: dict[str, set[str]]) -> set[str]:
    return {name for name in seen if name.startswith("models/") or name == "structures.py"}


def test_masks_add_one_file(files_of_one_image: dict[str, set[str]], tmp_path: Path) -> None:
    assert _model_files(_files_of_a_training(tmp_path, "every")) - _model_files(files_of_one_image) == {
        "models/mask_head.py"
    }


def test_the_model_is_few_files(files_of_one_image: dict[str, set[str]]) -> None:
    model = _model_files(files_of_one_image)
    assert "models/cascade.py" in model
    assert len(model) <= MODEL_FILES, "\n".join(sorted(model))
