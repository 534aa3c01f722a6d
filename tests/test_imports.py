"""The import rule: a module imports only from rows below its own, siblings in a row not each other, and no files in a
circle.

Imports inside functions count too. Lazy tables of dotted strings (`"gptq": "quantlab.quant.methods.gptq:..."`) do
not: they are how an upper row names what a lower one must not know.
"""

import ast
from collections.abc import Iterator, Mapping
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
    ("text2sql",),
    ("quant", "teacher"),
    ("formats", "models"),
    ("calibration", "data"),
    ("recipe", "runs"),
    ("paths", "progress", "registry", "stats", "textfile", "workers"),
    ("errors",),
)
SAME = {  # one piece in files
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
        ("quantlab.quant.methods.gptq", "from quantlab.evals import run_task"),
        ("quantlab.quant.methods.gptq", "from quantlab import evals"),
        ("quantlab.quant.methods.gptq", "import quantlab.cli"),
        ("quantlab.evals.speed", "def f():\n    from quantlab.report.html import page"),
        ("quantlab.text2sql.data.dataset", "if TYPE_CHECKING:\n    from quantlab.evals import run_task"),
        ("quantlab.runs.run", "from quantlab.recipe.load import Recipe"),
        ("quantlab.text2sql.data.dataset", "from ...evals import speed"),
        ("quantlab.text2sql.__init__", "from ..evals.speed import evaluate"),
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
        ("quantlab.recipe", "from quantlab.recipe.yaml_errors import explain"),
        ("quantlab.commands.measure", "from quantlab.models.safetensors.files import ModelFiles"),
    ],
)
def test_the_rule_allows(module: str, source: str) -> None:
    assert violations(source, module) == []


def file_imports(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Which files of `sources` (dotted name → text) import which, wherever the statement stands."""
    found: dict[str, set[str]] = {}
    for module, text in sources.items():
        names = imported(ast.parse(text), module)
        files = {name if name in sources else name.rpartition(".")[0] for name in names}
        found[module] = {file for file in files if file in sources and file != module}
    return found


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Every group of files that can reach each other (Tarjan's strongly connected components of two or more)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_no_files_import_each_other_in_a_circle() -> None:
    sources = {name: path.read_text(encoding="utf-8") for name, path in modules()}
    assert circles(file_imports(sources)) == []


@pytest.mark.parametrize(
    "planted",
    [
        "from quantlab.planted.b import x",
        "import quantlab.planted.b",
        "from quantlab.planted import b",
        "def f():\n    from quantlab.planted.b import x",
        "if TYPE_CHECKING:\n    from quantlab.planted.b import X",
    ],
)
def test_a_planted_circle_is_found(planted: str) -> None:
    sources = {
        "quantlab.planted.a": planted,
        "quantlab.planted.b": "from quantlab.planted.c import y",
        "quantlab.planted.c": "from quantlab.planted.a import z",
        "quantlab.planted.d": "from quantlab.planted.a import z",
    }
    assert circles(file_imports(sources)) == [[f"quantlab.planted.{name}" for name in "abc"]]


def test_the_quantizer_does_not_know_text2sql() -> None:
    for name, path in modules():
        if unit(name) in ("quant", "formats", "models"):
            names = imported(ast.parse(path.read_text(encoding="utf-8")), name)
            assert not [other for other in names if other.startswith("quantlab.text2sql")]
