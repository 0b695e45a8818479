"""What mkdocs generates: all settings, from the docstrings in ``config.py``, and the list of published weights."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

CONFIG = Path(__file__).resolve().parents[1] / "cascade_rcnn" / "config.py"
PUBLISHED = CONFIG.with_name("zoo") / "published.json"
SECTIONS = {"ModelConfig": "model", "DataConfig": "data", "TrainConfig": "train"}
HEAD = """# Settings

Every setting of a recipe. Change one on the command line (`--model.nms-iou 0.6`) or in a recipe file;
`cascade-rcnn config NAME` prints a recipe with all of them written out.
"""


def settings_page(source: str) -> str:
    """The page as Markdown: a table for each dataclass of ``config.py``, its fields' docstrings as their meaning."""
    parts = [HEAD]
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef) or node.name not in SECTIONS:
            continue
        section = SECTIONS[node.name]
        parts.append(f"## {section}\n\n{ast.get_docstring(node) or ''}\n")
        parts.append("| setting | default | type | meaning |\n|---|---|---|---|")
        for field, after in zip(node.body, [*node.body[1:], None]):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and field.value is not None:
                cells = (
                    f"`{section}.{field.target.id}`",
                    f"`{ast.unparse(field.value)}`",
                    f"`{ast.unparse(field.annotation)}`",
                    _meaning(after),
                )
                parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("")
    return "\n".join(parts)


def _meaning(statement: ast.stmt | None) -> str:
    """The docstring behind a field, on one line; empty where there is none."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return " ".join(str(statement.value.value).split()).replace("``", "`")
    return ""


def on_files(files: Files, config: Any) -> Files:
    """mkdocs calls this once the pages on disk are known."""
    from mkdocs.structure.files import File  # tests read the tables without mkdocs

    files.append(File.generated(config, "settings.md", content=settings_page(CONFIG.read_text(encoding="utf-8"))))
    return files


def models_table(entries: list[dict[str, Any]]) -> str:
    """Tables of published weights, one for each library."""
    lines = []
    for library in dict.fromkeys(entry["library"] for entry in entries):
        lines += [
            f"### {library}",
            "",
            "| name | box AP | mask AP | parameters | data | licence | not loaded because of |",
            "|---|---|---|---|---|---|---|",
        ]
        for entry in entries:
            if entry["library"] == library:
                cells = [f"`{entry['name']}`", entry.get("box_ap", ""), entry.get("mask_ap", "")]
                cells += [f"{entry['parameters'] / 1e6:.1f} M" if "parameters" in entry else "", entry["dataset"]]
                cells += [entry["license"].partition(" (")[0], entry.get("missing", "")]
                lines.append("| " + " | ".join(map(str, cells)) + " |")
        lines.append("")
    return "\n".join(lines)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """mkdocs calls this for each page before it is rendered."""
    mark = "<!-- list of published weights -->"
    if mark not in markdown:
        return markdown
    return markdown.replace(mark, models_table(json.loads(PUBLISHED.read_text(encoding="utf-8"))))
