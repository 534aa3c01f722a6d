"""The Python files that a model's configuration names: code of its own, run only with ``--trust-remote-code``.

``auto_map`` in config.json and tokenizer_config.json maps auto classes to ``module.Class`` (or
``owner/repo--module.Class``, which stays on the hub and is nothing to copy); a module's relative imports belong to
it, as transformers resolves them (``dynamic_module_utils.get_relative_import_files``). Whatever else is executable in a
model's directory is nobody's business and is not copied. Nothing is imported or run here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantlab.models.safetensors.weight_files import read_json, stays_inside

CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json")


def named_code(path: Path) -> list[str]:
    """Names of the Python files, relative to the model directory ``path``, that its configurations name; sorted.

    Raises:
        DataError: a configuration that is not JSON.
    """
    found: set[str] = set()
    waiting = [
        f"{module}.py"
        for name in CONFIGS
        if (path / name).is_file()
        for module in _modules(read_json(path / name).get("auto_map"))
    ]
    while waiting:
        file = waiting.pop()
        if file in found or not _plain_file(path, file):
            continue
        found.add(file)
        waiting += [str(Path(file).parent / other) for other in _relative_imports(path / file)]
    return sorted(found)


def _modules(mapping: Any) -> Iterator[str]:
    """Modules of the directory itself in the values of an ``auto_map``."""
    for value in mapping.values() if isinstance(mapping, dict) else ():
        # tokenizers name a slow and a fast class
        for reference in value if isinstance(value, list) else [value]:
            if isinstance(reference, str) and "--" not in reference and "." in reference:
                yield reference.rpartition(".")[0].replace(".", "/")


def _plain_file(path: Path, file: str) -> bool:
    """Whether ``file`` is one of the directory ``path`` and not a way out of it."""
    return stays_inside(file) and (path / file).is_file()


def _relative_imports(file: Path) -> Iterator[str]:
    """Files, relative to that of ``file``, which it imports with ``from .module import`` or ``from . import``."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError, RecursionError):
        return  # its reader will say so
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from (f"{name.replace('.', '/')}.py" for name in names)
