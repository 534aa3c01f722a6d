"""The import rule: a module imports only from rows below its own, and siblings in a row not each other.

Imports inside functions count too. Lazy tables of dotted strings (`"gptq": "quantlab.quant.gptq:..."`) do not: they are
how an upper row names what a lower one must not know.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import quantlab

PACKAGE = Path(quantlab.__file__).parent
ROWS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("demo",),
    ("commands",),
    ("distill", "evals", "report"),
    ("quant", "teacher"),
    ("formats", "sql", "models"),
    ("calibration", "data"),
    ("recipe", "results"),
    ("paths", "progress", "textfile", "workers"),
    ("errors",),
)
SAME = {  # one piece in files
    **dict.fromkeys(("recipe_yaml", "recipe_parts", "recipe_distill"), "recipe"),
    "text_encodings": "textfile",
}
ROW_OF = {name: number for number, row in enumerate(ROWS) for name in row}


def imported(tree: ast.AST, module: str) -> Iterator[str]:
    """Dotted names that a module imports, wherever the statement stands; relative ones resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level]
                base = ".".join([*parents, *([base] if base else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}"


def unit(dotted: str) -> str | None:
    """`quantlab.evals.text2sql.x` → `evals`; None for what is not quantlab's, or is quantlab itself."""
    parts = dotted.split(".")
    if parts[0] != "quantlab" or len(parts) < 2 or parts[1].startswith("__version"):
        return None
    return SAME.get(parts[1], parts[1])


def violations(source: str, module: str) -> list[str]:
    """What `module` (dotted) imports against the rule."""
    mine = unit(module)
    if mine is None:
        return [f"{module} imports {name}" for name in imported(ast.parse(source), module) if unit(name)]
    found = []
    for name in imported(ast.parse(source), module):
        other = unit(name)
        if other is None or other == mine:
            continue
        if other not in ROW_OF:
            found.append(f"{module} imports {name}, which is in no row")
        elif ROW_OF[other] <= ROW_OF[mine]:
            found.append(f"{module} imports {name}: {mine} must not know {other}")
    return found


def modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def test_every_module_is_in_a_row() -> None:
    assert len(modules()) > 30
    assert {unit(name) for name, _ in modules()} - {None} <= ROW_OF.keys()


@pytest.mark.parametrize(("name", "path"), modules(), ids=[name for name, _ in modules()])
def test_imports_point_downwards(name: str, path: Path) -> None:
    # A package's own relative imports start one level higher than a module's.
    module = name + ".__init__" if path.name == "__init__.py" else name
    assert violations(path.read_text(encoding="utf-8"), module if name != "quantlab" else name) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("quantlab.quant.gptq", "from quantlab.evals import TASKS"),
        ("quantlab.quant.gptq", "from quantlab import evals"),
        ("quantlab.quant.gptq", "import quantlab.cli"),
        ("quantlab.evals.speed", "def f():\n    from quantlab.report.html import page"),
        ("quantlab.sql.dataset", "if TYPE_CHECKING:\n    from quantlab.models.load import Subject"),
        ("quantlab.results", "from quantlab.recipe import Recipe"),
        ("quantlab.sql.dataset", "from ..models import load"),
        ("quantlab.sql.__init__", "from ..evals.speed import evaluate"),
        ("quantlab.errors", "from quantlab.paths import slug"),
        ("quantlab.paths", "from quantlab.nowhere import x"),
        ("quantlab", "from quantlab.errors import DataError"),
    ],
)
def test_the_rule_catches(module: str, source: str) -> None:
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("quantlab.evals.speed", "from quantlab.quant.pipeline import check\nfrom .statistics import wilson"),
        ("quantlab.evals.__init__", 'T = {"speed": "quantlab.report.html:page"}'),
        ("quantlab.errors", "from quantlab import __version__\nimport json"),
        ("quantlab.recipe", "from quantlab.recipe_yaml import explain"),
        ("quantlab.commands.measure", "from quantlab.models.files import ModelFiles"),
    ],
)
def test_the_rule_allows(module: str, source: str) -> None:
    assert violations(source, module) == []
