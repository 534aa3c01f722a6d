"""The tiers name tests that exist, and a fast test may start no process."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from tests.conftest import TESTS
from tests.tiers import EXHAUSTIVE, FAST, tiers_of


@pytest.mark.parametrize("named", sorted(FAST | EXHAUSTIVE))
def test_what_is_named_exists(named: str) -> None:
    file, _, test = named.partition("::")
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert not test or test in functions


def test_a_test_is_in_one_tier() -> None:
    assert tiers_of("test_recipe.py", "test_x") == ("fast",)
    assert tiers_of("quant/test_kill.py", "test_killed_runs_end_in_the_same_bytes") == ("exhaustive",)
    assert tiers_of("quant/test_kill.py", "test_x") == ()
    assert not {named.partition("::")[0] for named in EXHAUSTIVE} & FAST


@pytest.mark.fast
def test_a_fast_test_cannot_start_a_process() -> None:
    with pytest.raises(RuntimeError, match="starts a process"):
        subprocess.run([sys.executable, "-c", ""], check=True)
