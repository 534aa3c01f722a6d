"""The task from rows to metrics, with and without a model."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from quantlab.evals.text2sql import evaluate, score, summarize
from quantlab.progress import Silent
from quantlab.registry.tasks import Text2SqlOptions
from quantlab.text2sql.data.dataset import load_items
from quantlab.text2sql.data.item import Item

DDL = "CREATE TABLE players (name TEXT, score INTEGER);"
GOLDS = [
    "SELECT name FROM players;",
    "SELECT COUNT(*) FROM players;",
    "SELECT name FROM players ORDER BY score DESC LIMIT 1;",
    "SELECT MAX(score) FROM players;",
    "SELECT name FROM players WHERE score > 100;",  # empty: no evidence
]


@pytest.fixture
def source(tmp_path: Path) -> str:
    connection = sqlite3.connect(tmp_path / "game.sqlite")
    connection.executescript(DDL + "INSERT INTO players VALUES ('가람', 3), ('나래', 5), ('다온', 5);")
    connection.close()
    rows = [
        {
            "id": f"q{i}",
            "db_id": 1,
            "context": DDL,
            "question": f"질문 {i}",
            "answer": gold,
            "database": "game.sqlite",
        }
        for i, gold in enumerate(GOLDS)
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_scoring_outputs_without_a_model(source: str) -> None:
    outputs = [
        "select NAME from players;</s>",  # exact, stopped
        "```sql\nSELECT COUNT(name) FROM players;\n```\n행의 수입니다.",  # right in another way, goes on
        "SELECT name FROM players WHERE name = '다온'",  # a tie, cut the other way
        "모르겠습니다.",  # nothing
        "SELECT name FROM players WHERE score > 100;",
    ]
    samples = score(load_items(source), outputs, progress=Silent())
    assert [sample.verdict for sample in samples] == ["ok", "ok", "ok", "unparsed", "ok"]
    assert [sample.extra["exact"] for sample in samples] == [True, False, False, False, True]
    assert [sample.extra["stopped"] for sample in samples] == [True, False, True, False, True]
    assert [sample.extra["evidence"] for sample in samples] == [True, True, True, True, False]
    assert samples[1].extra["sql"] == "SELECT COUNT(name) FROM players;"
    assert samples[1].extra["cut_after"] == "\n```\n행의 수입니다."
    metrics = summarize(samples)
    assert metrics["ex"] == 3 / 4 and metrics["em"] == 2 / 5 and metrics["stopped"] == 3 / 5
    assert (metrics["scored"], metrics["no_evidence"], metrics["n_unparsed"]) == (4, 1, 1)
    assert metrics["ex_low"] == pytest.approx(0.3006, abs=1e-4) and metrics["ex_high"] == pytest.approx(
        0.9544, abs=1e-4
    )


def test_an_empty_result_never_counts_on_its_own(source: str) -> None:
    """The published evaluators' flaw: nothing equals nothing, so any query that returns nothing is right."""
    outputs = ["SELECT 1 WHERE 0;"] * 5
    samples = score(load_items(source), outputs, progress=Silent())
    assert [sample.verdict for sample in samples] == ["wrong"] * 4 + ["error"]
    assert summarize(samples)["ex"] == 0.0


def test_a_hostile_answer_is_an_error_and_the_file_stays(source: str, tmp_path: Path) -> None:
    before = (tmp_path / "game.sqlite").read_bytes()
    samples = score(load_items(source), ["DROP TABLE players;"] * 5, progress=Silent())
    assert {sample.verdict for sample in samples} == {"error"}
    assert (tmp_path / "game.sqlite").read_bytes() == before


def test_with_a_model(tiny: Any, source: str) -> None:
    options = Text2SqlOptions(data=source, batch_size=2, max_new_tokens=12)
    found = evaluate(tiny, options, progress=Silent())
    assert [sample.id for sample in found.samples] == [f"q{i}" for i in range(5)]
    assert found.metrics["items"] == 5 and found.metrics["ex"] == 0.0
    assert found.metrics["truncated"] == sum(sample.extra["truncated"] for sample in found.samples)
    assert all(not (sample.extra["truncated"] and sample.extra["stopped"]) for sample in found.samples)
    again = evaluate(tiny, options.model_copy(update={"batch_size": 5}), progress=Silent())
    assert [sample.output for sample in again.samples] == [sample.output for sample in found.samples]
    assert again.metrics["data_digest"] == found.metrics["data_digest"]


def test_without_a_database_witness_databases_are_made(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTLAB_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "q.jsonl"
    rows = [
        {"db_id": 1, "context": DDL, "question": "?", "answer": "SELECT name FROM players WHERE score > 50;"},
        {"db_id": 1, "context": "CREATE nonsense", "question": "?", "answer": "SELECT 1;"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = evaluate(tiny, Text2SqlOptions(data=str(path), max_new_tokens=8), progress=Silent())
    assert found.metrics["scored"] == 1 and found.metrics["no_evidence"] == 1
    assert found.details["witness"]["items"] == 1 and found.details["witness"]["mutation_score"] > 0.9
    assert "the DDL cannot be read" in found.samples[1].why and found.samples[1].verdict == "error"
    right = score(load_items(str(path)), [rows[0]["answer"], "SELECT 1;"], progress=Silent())
    assert right[0].verdict == "ok" and right[0].extra["witness"]["databases"] >= 1


def test_nothing_scored_is_no_share() -> None:
    metrics = summarize([])
    assert metrics["ex"] is None and metrics["ex_low"] is None and metrics["em"] is None


def test_real_questions_score_their_own_golds() -> None:
    """Spider and defog samples: every gold against itself, on its real database."""
    root = Path(__file__).parents[3] / "shared" / "data" / "text2sql"
    if not root.is_dir():
        pytest.skip("the real questions are not at hand")
    items: list[Item] = []
    for name in ("spider_sample", "defog_sample"):
        items += load_items(str(root / name / "questions.jsonl"), limit=100)
    samples = score(items, [item.answer for item in items], progress=Silent())
    assert {sample.verdict for sample in samples} == {"ok"}
    assert sum(sample.extra["evidence"] for sample in samples) > 180
