"""The package as a whole: public names, light imports, what the distribution carries."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cascade_rcnn
import locations
from cascade_rcnn.recipes import config_names

REPOSITORY = locations.REPOSITORY
PACKAGE = Path(cascade_rcnn.__file__).resolve().parent
HEAVY = ("torch", "torchvision", "timm", "numpy", "scipy", "PIL", "rich", "faster_coco_eval")


def test_public_names_are_these() -> None:
    assert set(cascade_rcnn.__all__) == {
        "CheckpointError",
        "Config",
        "ConfigError",
        "DataConfig",
        "DataError",
        "Detections",
        "Detector",
        "ModelConfig",
        "TrainConfig",
        "UserError",
        "__version__",
        "load",
        "load_config",
    }
    assert dir(cascade_rcnn) == sorted(cascade_rcnn.__all__)


@pytest.mark.parametrize("name", cascade_rcnn.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(cascade_rcnn, name) is not None


def test_an_unknown_name_is_an_attribute_error_that_lists_the_names() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'lod'; public names: .*load"):
        _ = cascade_rcnn.lod


def test_import_loads_nothing_heavy() -> None:
    code = (
        "import sys, cascade_rcnn, cascade_rcnn.cli, cascade_rcnn.recipes\n"
        "cascade_rcnn.load_config, cascade_rcnn.Config, cascade_rcnn.UserError\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, cwd=PACKAGE.parent, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_the_type_checker_sees_the_same_names_as_python() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    imported = {
        (alias.name, node.module) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    lazy = cascade_rcnn._NEEDS_TORCH
    assert imported == {(name, f"cascade_rcnn.inference.{module}") for name, module in lazy.items()}


def test_the_distribution_carries_version_types_licence_and_recipes() -> None:
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert 'path = "cascade_rcnn/__init__.py"' in project and '"configs" = "cascade_rcnn/configs"' in project
    assert re.fullmatch(r"\d+\.\d+\.\d+", cascade_rcnn.__version__)
    assert (PACKAGE / "py.typed").is_file()
    licence = (REPOSITORY / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence and "Copyright 2026 The cascade-rcnn authors" in licence
    assert f"version: {cascade_rcnn.__version__}" in (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {cascade_rcnn.__version__}" in (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert {"cascade_rcnn_r50_fpn_1x_coco", "finetune"} <= set(config_names())


@pytest.mark.parametrize(
    "page", sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")]), ids=lambda page: page.name
)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text) + re.findall(r'(?:src|href)="([^"#]+)"', text)
    local = [target for target in targets if "://" not in target and not target.startswith("mailto:")]
    generated = {"settings.md"}  # by docs/hooks.py
    assert [target for target in local if target not in generated and not (page.parent / target).exists()] == []


def test_ci_runs_the_commands_of_the_readme_as_they_are_written() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    ci = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    assert "\npip install . && cascade-rcnn demo\n" in readme and "cascade-rcnn demo --quick" in ci
    assert "\npip install '.[test]' && pytest\n" in readme and "pip install '.[test]' && pytest" in ci


def test_the_commands_of_the_field_find_their_files_and_refuse_a_mistake() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (single,) = re.findall(r"^python3 (tools/\S+) (configs/\S+)$", readme, re.MULTILINE)
    (several,) = re.findall(r"^bash (tools/\S+) (configs/\S+) 8$", readme, re.MULTILINE)
    assert [name for name in {*single, *several} if not (REPOSITORY / name).is_file()] == []
    done = subprocess.run(
        [sys.executable, *single, "--train.epochz", "3"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--train.epochz: no such setting (did you mean --train.epochs" in done.stderr
