"""mmdetection's config language without Python: the syntax tree of a config is read, nothing in it is run.

Read are literals, ``dict(...)``, lists and tuples (``[*x, 1]``), names assigned above, items of dictionaries and lists,
``_base_.x`` and ``{{_base_.x}}``, arithmetic with numbers, texts put together with ``+`` or as plain f-strings.
Whatever else stands there is refused with its line (files), or becomes ``UNREAD`` (texts inside checkpoints, where
most of what is written is of no interest).
"""

from __future__ import annotations

import ast
import json
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from cascade_rcnn.errors import ConfigError
from cascade_rcnn.messages import shown

MAX_TEXT = 2_000_000
_LONGEST = 100_000  # characters of a text, items of a list
_LARGEST = 1e15
_MOST_VALUES, _DEEPEST = 200_000, 60


class Unread:
    """Stands for an expression that is not a literal."""

    def __repr__(self) -> str:
        return "an expression"


UNREAD = Unread()
# Names of a file whose values nobody needs here (test-time augmentation): UNREAD if they are no plain values.
_NEEDLESS = ("tta_model", "tta_pipeline")


class _NotPlainError(Exception):
    def __init__(self, node: ast.AST, what: str) -> None:
        super().__init__(what)
        self.line = getattr(node, "lineno", 0)


def assignments(text: str) -> dict[str, Any]:
    """Top-level ``name = value`` of a config's text; values that cannot be read are ``UNREAD``."""
    if len(text) > MAX_TEXT:
        return {}
    try:
        if text.lstrip().startswith("{"):
            found = json.loads(text)
            return dict(found) if isinstance(found, Mapping) else {}
        tree = ast.parse(text)
        evaluator = _Evaluator({}, strict=False)
        for node in tree.body:
            if isinstance(node, ast.Assign):
                evaluator.assign(node)
        return copied(evaluator.names, where="text")
    except (SyntaxError, ValueError, RecursionError, MemoryError, _NotPlainError):  # ConfigError is a ValueError
        return {}


def copied(value: dict[str, Any], *, where: str) -> dict[str, Any]:
    """Without shared parts. Raises ConfigError where a few names stand for billions of values, or for themselves."""
    left = _MOST_VALUES

    def copy(part: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > _DEEPEST:
            what = f"more than {_MOST_VALUES} values" if left < 0 else "nested too deeply"
            raise ConfigError(f"{where}: {what}: not a config")
        if isinstance(part, dict):
            return {key: copy(item, depth + 1) for key, item in part.items()}
        return [copy(item, depth + 1) for item in part] if isinstance(part, list) else part

    return {name: copy(part, 0) for name, part in value.items()}


def parse(text: str, *, where: str) -> ast.Module:
    """The tree of a config file. Raises ConfigError with the line of what is no Python, or nested too deeply."""
    try:
        return ast.parse(text)
    except SyntaxError as error:
        line = f", line {error.lineno}" if error.lineno else ""  # none for a NUL byte
        raise ConfigError(f"{where}{line}: not valid Python ({error.msg})") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{where}: nested too deeply, or no text: not a config") from error


def evaluate(tree: ast.Module, base: dict[str, Any], *, where: str) -> dict[str, Any]:
    """The names that a config file assigns, ``_base_`` left out; ``base`` is what its base files give.

    Assignments into ``_base_`` (``_base_.model.x = 1``) change ``base``. Raises ConfigError with file and line for
    everything that is no plain value.
    """
    evaluator = _Evaluator({"_base_": base}, strict=True)
    try:
        for node in tree.body:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue  # a docstring
            if not isinstance(node, ast.Assign):
                inner = node.value if isinstance(node, ast.Expr) else node
                raise _NotPlainError(node, _refusal(inner, _dotted(inner.func) if isinstance(inner, ast.Call) else ""))
            if _assigns_base(node):
                continue
            try:
                evaluator.assign(node)
            except _NotPlainError:
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
                if len(names) < len(node.targets) or not set(names) <= set(_NEEDLESS):
                    raise
                evaluator.names |= dict.fromkeys(names, UNREAD)
    except _NotPlainError as error:
        raise ConfigError(f"{where}, line {error.line}: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{where}: nested too deeply: not a config") from error
    evaluator.names.pop("_base_", None)
    return evaluator.names


def bases(tree: ast.Module, *, where: str) -> list[str]:
    """What ``_base_ = ...`` of a file names. Raises ConfigError unless it is a text or a list of texts."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and _assigns_base(node):
            try:
                found = ast.literal_eval(node.value)
            except (ValueError, TypeError, RecursionError, MemoryError):
                found = None
            found = [found] if isinstance(found, str) else found
            if not isinstance(found, (list, tuple)) or not all(isinstance(name, str) for name in found):
                raise ConfigError(f"{where}, line {node.lineno}: _base_ must be a path or a list of paths")
            return list(found)
    return []


def used_names(tree: ast.Module) -> set[str]:
    """Names that a file reads to build its values, its own and those of its base files (``_base_.x``)."""
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            used.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "_base_":
            used.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            used |= set(re.findall(r"\{\{\s*_base_\.(\w+)", node.value))
    return used - {"dict", "_base_"}


def _assigns_base(node: ast.Assign) -> bool:
    return any(isinstance(target, ast.Name) and target.id == "_base_" for target in node.targets)


_KINDS: dict[type[ast.AST], str] = {
    ast.Import: "an import",
    ast.ImportFrom: "an import",
    ast.With: "'with' (a config of the new style: give the one of the same name under configs/, or the config.py that "
    "a training wrote into its work_dir)",
    ast.FunctionDef: "a function",
    ast.ClassDef: "a class",
    ast.Call: "a call",
    ast.Lambda: "a lambda",
    ast.ListComp: "a comprehension",
    ast.DictComp: "a comprehension",
    ast.SetComp: "a comprehension",
    ast.GeneratorExp: "a comprehension",
    ast.IfExp: "a condition",
    ast.If: "a condition",
    ast.For: "a loop",
    ast.While: "a loop",
    ast.Slice: "a slice",
    ast.JoinedStr: "an f-string with more than names",
    ast.Delete: "'del'",
    ast.AugAssign: "an assignment with an operator",
    ast.Set: "a set",
}


def _refusal(node: ast.AST, name: str = "") -> str:
    kind = _KINDS.get(type(node), f"an expression ({type(node).__name__})")
    named = f" ({name[:60]})" if name else ""
    return f"{kind}{named} is not read, since nothing in a config is run: write the value itself"


_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}


class _Evaluator:
    """Values of expressions, given the names assigned so far."""

    def __init__(self, names: dict[str, Any], *, strict: bool) -> None:
        self.names = names
        self._strict = strict

    def assign(self, node: ast.Assign) -> None:
        value = self.value(node.value)
        for target in node.targets:
            if isinstance(target, ast.Name):
                self.names[target.id] = value
            elif self._strict:
                self._assign_inside(target, value)

    def _assign_inside(self, target: ast.expr, value: Any) -> None:
        """``_base_.a.b = value``, ``steps[1]['scale'] = value``."""
        if not isinstance(target, (ast.Attribute, ast.Subscript)):
            raise _NotPlainError(target, "only a name, or a setting in a dictionary or list, can be assigned")
        holder = self.value(target.value)
        key = target.attr if isinstance(target, ast.Attribute) else self.value(target.slice)
        is_key = isinstance(holder, dict) and isinstance(key, str)
        is_place = isinstance(holder, list) and type(key) is int and -len(holder) <= key < len(holder)
        if not (is_key or is_place) or isinstance(value, Unread):
            raise _NotPlainError(target, f"no place for {shown(key)}: only settings of dictionaries and lists change")
        holder[key] = value

    def value(self, node: ast.expr) -> Any:
        """Raises _NotPlainError in files; UNREAD in texts."""
        handler = _HANDLERS.get(type(node))
        try:
            if handler is None:
                raise _NotPlainError(node, _refusal(node))
            found = handler(self, node)
            if found is UNREAD and self._strict:  # one of _NEEDLESS
                raise _NotPlainError(node, "the value of a name that was not read, since nothing in a config is run")
            return found
        except _NotPlainError:
            if self._strict:
                raise
            return UNREAD

    def constant(self, node: ast.Constant) -> Any:
        value = node.value
        if isinstance(value, str) and "{{" in value:
            inner = value.strip().removeprefix("{{").removesuffix("}}").strip()
            if value.strip().startswith("{{_base_.") or inner.startswith("_base_."):
                return self._of_base(node, inner)
            raise _NotPlainError(node, f"{shown(value)} asks for what only mmdetection puts in: write the value itself")
        if not isinstance(value, (str, int, float, bool, type(None))):
            raise _NotPlainError(node, f"{shown(value)} is no number and no text")
        if isinstance(value, (int, float)) and not abs(value) <= _LARGEST:
            raise _NotPlainError(node, "a value too large for a setting")
        return value

    def _of_base(self, node: ast.expr, words: str) -> Any:
        found: Any = self.names.get("_base_", {})
        for word in words.split(".")[1:]:
            if not isinstance(found, dict) or word not in found:
                raise _NotPlainError(node, f"{shown(words)}: not in its base files")
            found = found[word]
        return found

    def sequence(self, node: ast.List | ast.Tuple) -> Any:
        result: list[Any] = []
        for item in node.elts:
            if not isinstance(item, ast.Starred):
                result.append(self.value(item))
                continue
            found = self.value(item.value)
            if not isinstance(found, list) or len(result) + len(found) > _LONGEST:
                raise _NotPlainError(item, "* before something that is no list, or too long")
            result += found
        return result

    def name(self, node: ast.Name) -> Any:
        if node.id not in self.names:
            raise _NotPlainError(node, f"{node.id} is not assigned above in this file (those of base files: _base_.x)")
        return self.names[node.id]

    def negative(self, node: ast.UnaryOp) -> Any:
        value = self.value(node.operand)
        if isinstance(node.op, ast.Not) and isinstance(value, bool):
            return not value
        if not isinstance(node.op, (ast.USub, ast.UAdd)) or not isinstance(value, (int, float)):
            raise _NotPlainError(node, "an operator before something that is no number")
        return -value if isinstance(node.op, ast.USub) else value

    def arithmetic(self, node: ast.BinOp) -> Any:
        left, right = self.value(node.left), self.value(node.right)
        both = (left, right)
        joins = type(left) is type(right) and isinstance(left, (str, list)) and isinstance(node.op, ast.Add)
        counts = all(isinstance(item, (int, float)) for item in both)
        if type(node.op) not in _ARITHMETIC or not (joins or counts):
            raise _NotPlainError(node, "an operator between values that are not numbers (or two texts, or two lists)")
        if isinstance(node.op, ast.Pow) and (abs(left) > 1000 or abs(right) > 16):
            raise _NotPlainError(node, "a power too large for a setting")
        try:
            result = _ARITHMETIC[type(node.op)](left, right)
        except ArithmeticError as error:
            raise _NotPlainError(node, f"arithmetic that fails: {error}") from error
        if isinstance(result, complex) or (counts and abs(result) > _LARGEST) or (joins and len(result) > _LONGEST):
            raise _NotPlainError(node, "a value too large for a setting")
        return result

    def dictionary(self, node: ast.Dict) -> Any:
        result: dict[Any, Any] = {}
        for key, item in zip(node.keys, node.values):
            name = self.value(key) if key is not None else UNREAD
            if isinstance(name, (str, int)):
                result[name] = self.value(item)
            elif self._strict:
                raise _NotPlainError(node, "a key that is no text, or **")
        return result

    def call(self, node: ast.Call) -> Any:
        if not isinstance(node.func, ast.Name) or node.func.id != "dict":
            raise _NotPlainError(node, _refusal(node, _dotted(node.func)))
        result: dict[Any, Any] = {}
        if len(node.args) > 1:
            raise _NotPlainError(node, "dict() of several values")
        given = [word.arg for word in node.keywords if word.arg is not None]
        if len(set(given)) < len(given):
            twice = next(name for name in given if given.count(name) > 1)
            raise _NotPlainError(node, f"dict() with {twice} twice, which Python refuses too")
        for item in (*node.args, *(word.value for word in node.keywords if word.arg is None)):
            found = self.value(item)
            if isinstance(found, dict):
                result |= found
            elif self._strict:
                raise _NotPlainError(node, "dict() of something that is no dictionary")
        return result | {word.arg: self.value(word.value) for word in node.keywords if word.arg is not None}

    def item(self, node: ast.Subscript) -> Any:
        holder, key = self.value(node.value), self.value(node.slice)
        is_key = isinstance(holder, dict) and isinstance(key, (str, int)) and key in holder
        is_place = isinstance(holder, list) and type(key) is int and -len(holder) <= key < len(holder)
        if not (is_key or is_place):
            raise _NotPlainError(node, f"no {shown(key)} there: not read")
        return holder[key]

    def attribute(self, node: ast.Attribute) -> Any:
        holder = self.value(node.value)
        if not isinstance(holder, dict) or node.attr not in holder:
            of_base = _dotted(node).startswith("_base_.")
            place = "not in its base files" if of_base else "no setting of a dictionary above"
            raise _NotPlainError(node, f"{_dotted(node)[:60]}: {place}")
        return holder[node.attr]

    def braces(self, node: ast.Set) -> Any:
        """``{{_base_.x}}``, which Python takes for a set in a set."""
        inner = node.elts[0]
        if len(node.elts) == 1 and isinstance(inner, ast.Set) and len(inner.elts) == 1:
            return self.value(inner.elts[0])
        raise _NotPlainError(node, _refusal(node))

    def text(self, node: ast.JoinedStr) -> Any:
        parts = []
        for part in node.values:
            plain = isinstance(part, ast.FormattedValue) and part.conversion == -1 and part.format_spec is None
            if isinstance(part, ast.FormattedValue) and not (
                plain and isinstance(part.value, (ast.Name, ast.Attribute))
            ):
                raise _NotPlainError(node, _refusal(node))
            found = self.value(part.value) if isinstance(part, ast.FormattedValue) else self.value(part)
            if not isinstance(found, (str, int, float)):
                raise _NotPlainError(node, _refusal(node))
            parts.append(str(found))
        if sum(map(len, parts)) > _LONGEST:
            raise _NotPlainError(node, "a value too large for a setting")
        return "".join(parts)


def _dotted(node: ast.expr) -> str:
    """``a.b.c`` of attributes of a name; "" for anything else."""
    words: list[str] = []
    while isinstance(node, ast.Attribute):
        words.append(node.attr)
        node = node.value
    return ".".join(reversed([*words, node.id])) if isinstance(node, ast.Name) else ".".join(reversed(words))


_HANDLERS: dict[type[ast.expr], Callable[[_Evaluator, Any], Any]] = {
    ast.Constant: _Evaluator.constant,
    ast.List: _Evaluator.sequence,
    ast.Tuple: _Evaluator.sequence,
    ast.Name: _Evaluator.name,
    ast.UnaryOp: _Evaluator.negative,
    ast.BinOp: _Evaluator.arithmetic,
    ast.Dict: _Evaluator.dictionary,
    ast.Call: _Evaluator.call,
    ast.Subscript: _Evaluator.item,
    ast.Attribute: _Evaluator.attribute,
    ast.Set: _Evaluator.braces,
    ast.JoinedStr: _Evaluator.text,
}
