"""Real questions on their real databases: golds, accepted alternatives, and DDL. Skipped where they are not at hand."""

from pathlib import Path

import pytest

from quantlab.text2sql.data.dataset import load_items
from quantlab.text2sql.data.item import Item
from quantlab.text2sql.sandbox.pool import Sandbox
from quantlab.text2sql.schema.ddl import read_schema
from quantlab.text2sql.scoring.execution import judge
from quantlab.text2sql.testdata.witness import build

ROOT = Path(__file__).parents[3] / "shared" / "data" / "text2sql"


def questions(name: str) -> list[Item]:
    if not ROOT.is_dir():
        pytest.skip("the real questions are not at hand")
    return load_items(str(ROOT / name / "questions.jsonl"))


@pytest.mark.parametrize(("name", "count"), [("spider_sample", 600), ("defog_sample", 107)])
def test_every_gold_is_right(name: str, count: int) -> None:
    items = questions(name)
    assert len(items) == count
    with Sandbox(workers=2) as sandbox:
        for item in items:
            assert item.database is not None
            verdict = judge(sandbox, item.database, item.golds, item.answer)
            empty = not verdict.evidence and "both results are empty" in verdict.why
            assert verdict.verdict == "ok" or empty, (item.id, verdict)


def test_every_alternative_is_right_and_many_only_as_one() -> None:
    """Alternatives return a code for a name, or both: against the first gold alone most of them would be wrong."""
    together = alone = 0
    with Sandbox(workers=2) as sandbox:
        for item in questions("defog_sample"):
            assert item.database is not None
            for other in item.alternatives:
                together += 1
                assert judge(sandbox, item.database, item.golds, other).verdict == "ok", (item.id, other)
                alone += judge(sandbox, item.database, [item.answer], other).verdict == "ok"
    assert together == 100 and alone < 10


def test_their_ddl_gives_witness_databases(tmp_path: Path) -> None:
    made = total = killed = 0
    items = questions("spider_sample")[::12] + questions("defog_sample")[::6]
    with Sandbox(workers=1) as sandbox:
        for item in items:
            found = build(read_schema(item.context, "sqlite"), item.golds, sandbox, tmp_path)
            made += bool(found.databases)
            total, killed = total + found.mutants, killed + found.killed
            if found.databases:
                assert judge(sandbox, found.databases, item.golds, item.answer).verdict == "ok", item.id
    assert made >= 0.98 * len(items) and killed >= 0.93 * total
