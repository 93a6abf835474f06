"""A digest of the source that decides what a policy does, and of no more: what a cached result of it depends on.

From the policy's class on, every definition is followed that it names, within the policies and the agent. So a
change to a neighbour in the same file, or to comments, layout and docstrings, leaves the digest as it is.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_FOLLOWED = ("mixloader.policies.", "mixloader.agent.")
_SKIPPED = ("mixloader.policies.base",)  # the protocol and the registry decide nothing


def source_digest(cls: type) -> str:
    """Hex digest of the source of a class, of what it is made of and uses, and of parameters that lie beside it."""
    found: dict[tuple[str, str], str] = {}
    files: set[Path] = set()
    queue = [(base.__module__, base.__name__) for base in cls.__mro__ if base.__module__ not in ("builtins", "typing")]
    while queue:
        module, name = at = queue.pop()
        if at in found or module in _SKIPPED or not (module.startswith(_FOLLOWED) or module == cls.__module__):
            continue
        path, definitions = _definitions(module)
        found[at] = "".join(map(_code, definitions.get(name, [])))
        if name in definitions:
            files.update(path.parent.glob("*.safetensors"))
        for statement in definitions.get(name, []):
            queue.extend(_named_by(statement, module))
    digest = hashlib.sha256("".join(f"{at}{found[at]}" for at in sorted(found)).encode())
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:20]


@cache
def _definitions(module: str) -> tuple[Path, dict[str, list[ast.stmt]]]:
    """The file of a module, and the top-level statements that give each of its names a meaning."""
    path = Path(str(importlib.import_module(module).__file__))
    by_name: dict[str, list[ast.stmt]] = {}
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        for name in _given(statement):
            by_name.setdefault(name, []).append(statement)
    return path, by_name


def _given(statement: ast.stmt) -> Iterable[str]:
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return [statement.name]
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name.partition(".")[0] for alias in statement.names]
    return {node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def _named_by(statement: ast.stmt, module: str) -> Iterator[tuple[str, str]]:
    """(module, name) of what a statement may use: its own module's names, and those that it imports."""
    for node in ast.walk(statement):
        if isinstance(node, ast.Name):
            yield module, node.id
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if _is_module(node.module, alias.name):
                    own = f"{node.module}.{alias.name}"
                    yield from ((own, name) for name in _definitions(own)[1])
                else:
                    yield node.module, alias.name


def _is_module(package: str, name: str) -> bool:
    full = f"{package}.{name}"
    return f"{package}.".startswith(_FOLLOWED) and hasattr(importlib.import_module(package), "__path__") and (
        find_spec(full) is not None
    )  # fmt: skip


def _code(statement: ast.stmt) -> str:
    """The program alone: no positions, comments and docstrings."""
    copy = ast.parse(ast.unparse(statement))
    for node in ast.walk(copy):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [s for s in body if not _is_text(s)]  # type: ignore[attr-defined]
    return ast.dump(copy)


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
