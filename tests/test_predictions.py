"""`quantlab evaluate --predictions`: scored without a model, as a user runs it."""

import csv
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
DDL = "CREATE TABLE players (player_id INTEGER PRIMARY KEY, name TEXT NOT NULL, score INTEGER NOT NULL, team TEXT);"
GOLDS = {
    "a": "SELECT name FROM players WHERE score > 50;",
    "b": "SELECT COUNT(*) FROM players;",
    "c": "SELECT DISTINCT team FROM players;",
    "d": "SELECT name FROM players ORDER BY score DESC LIMIT 2;",
}
PREDICTED = {
    "a": "```sql\nSELECT name FROM players WHERE score >= 50;\n```",
    "b": "SELECT COUNT(name) FROM players",
    "c": "SELECT team FROM players;",
    "d": "DROP TABLE players;",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    connection = sqlite3.connect(tmp_path / "game.sqlite")
    connection.executescript(
        DDL + "INSERT INTO players VALUES (1, '가람', 50, 'x'), (2, '나래', 60, 'x'), (3, '다온', 70, NULL);"
    )
    connection.close()
    write(tmp_path / "populated.jsonl", [{**row, "database": "game.sqlite"} for row in questions()])
    write(tmp_path / "bare.jsonl", questions())
    write(
        tmp_path / "predicted.jsonl", [{"id": name, "prediction": text} for name, text in PREDICTED.items()]
    )
    return tmp_path


def questions() -> list[dict[str, Any]]:
    return [
        {"id": name, "db_id": 1, "context": DDL, "question": f"질문 {name}", "answer": gold}
        for name, gold in GOLDS.items()
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def evaluate(folder: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "QUANTLAB_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "quantlab", "evaluate", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stderr
    return done


def test_populated_and_witness_databases(folder: Path) -> None:
    verdicts = {}
    for data in ("populated", "bare"):
        done = evaluate(
            folder,
            "--task",
            "text2sql",
            "--predictions",
            "predicted.jsonl",
            "--data",
            f"{data}.jsonl",
            "--json",
        )
        summary = json.loads(done.stdout)
        samples = [json.loads(line) for line in (folder / summary["samples"]).read_text().splitlines()]
        verdicts[data] = {sample["id"]: sample["verdict"] for sample in samples}
        assert summary["metrics"]["ex"] == 0.25 and summary["metrics"]["ex_low"] > 0
        assert ("witness" in summary["details"]) == (data == "bare")
    assert verdicts["populated"] == verdicts["bare"] == {"a": "wrong", "b": "ok", "c": "wrong", "d": "error"}
    with sqlite3.connect(folder / "game.sqlite") as connection:
        assert connection.execute("SELECT COUNT(*) FROM players").fetchone() == (3,)
    board = (folder / "results" / "leaderboard.csv").read_text(encoding="utf-8")
    assert board.count("predicted.jsonl") == 2


@pytest.mark.parametrize("kind", ["bundled", ".csv", ".jsonl", ".parquet"])
def test_the_books_columns_are_scored_by_witness_databases(tmp_path: Path, kind: str) -> None:
    """Questions as the book has them, db_id, context, question, answer and no database, in every form of file."""
    from quantlab.text2sql.data.dataset import load_items

    bundled = "ko_text2sql:ko_text2sql/test_book_columns.csv"
    items = load_items(bundled, 6)
    rows = [
        {"db_id": 1, "context": item.context, "question": item.question, "answer": item.answer}
        for item in items
    ]
    path = tmp_path / f"test{kind}"
    if kind == ".csv":
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif kind == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == ".jsonl":
        write(path, rows)
    data = bundled if kind == "bundled" else f"ko_text2sql:{path}"
    wrong = "SELECT 1;"
    write(
        tmp_path / "p.jsonl", [{"prediction": one["answer"]} for one in rows[:-1]] + [{"prediction": wrong}]
    )
    options = ("--set", "tasks.text2sql.limit=6", "--set", "tasks.text2sql.dialect=sqlite", "--json")
    summary = json.loads(evaluate(tmp_path, "--predictions", "p.jsonl", "--data", data, *options).stdout)
    witness = summary["details"]["witness"]
    assert (summary["metrics"]["n_ok"], summary["metrics"]["n_wrong"]) == (5, 1)
    assert witness["items"] == 6 and witness["databases"] >= 6
    assert witness["mutation_score"] == witness["killed"] / witness["mutants"] > 0.8


def test_published_rules_and_a_judge_beside_ours(folder: Path) -> None:
    write(
        folder / "judge.jsonl",
        [
            {"id": "a", "answer": "yes", "why": "경계값은 상관없다"},
            {"id": "b", "answer": "yes"},
            {"id": "c", "answer": "no"},
        ],
    )
    done = evaluate(
        folder, "--predictions", "predicted.jsonl", "--data", "populated.jsonl", "--metric", "bird", "--metric",
        "spider-test-suite", "--judge", "judge.jsonl",
    )  # fmt: skip
    said = done.stdout
    assert "1 ok, 2 wrong, 1 error" in said
    assert "by the rule of bird: 50.0 %" in said and "duplicates" in said  # {x, NULL} as a set
    assert "by the rule of spider-test-suite: 50.0 %" in said and "DISTINCT is taken out" in said
    assert (
        "judge yes" in said
        and "Cohen's κ" in said
        and "a: judge yes, execution wrong: 경계값은 상관없다" in said
    )
    run = next((folder / "results" / "runs").iterdir())
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    judge = record["tasks"]["text2sql"]["details"]["judge"]
    assert (judge["both_yes"], judge["judge_only"], judge["execution_only"], judge["both_no"]) == (1, 1, 0, 1)
    assert judge["unpaired"] == 1 and [one["id"] for one in judge["disagreements"]] == ["a"]


def test_again(folder: Path) -> None:
    arguments = ("--predictions", "predicted.jsonl", "--data", "populated.jsonl")
    evaluate(folder, *arguments)
    assert "scored already" in evaluate(folder, *arguments, code=2).stderr
    shown = evaluate(folder, *arguments, "--resume", "--json")
    assert json.loads(shown.stdout)["metrics"]["n_ok"] == 1


def test_lines_without_ids_go_by_order(folder: Path) -> None:
    write(folder / "plain.jsonl", [{"sql": text} for text in PREDICTED.values()])
    done = evaluate(folder, "--predictions", "plain.jsonl", "--data", "populated.jsonl", "--json")
    assert json.loads(done.stdout)["metrics"]["n_ok"] == 1


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"id": "a", "prediction": "x"}], "no prediction for b, c, d"),
        (
            [{"id": "a", "prediction": "x"}, {"id": "a", "prediction": "y"}],
            "predicted.jsonl:2: a second line for 'a'",
        ),
        ([{"id": "z", "prediction": "x"}], "predicted.jsonl:1: the data have no question 'z'"),
        ([{"id": "a", "text": "x"}], "predicted.jsonl:1: no 'prediction' or 'output' or 'sql'"),
        ([{"id": "a", "prediction": 3}], "predicted.jsonl:1: 'prediction' must be text"),
        ([{"prediction": "x"}], "1 predictions without an id for 4 questions"),
        ([], "no lines"),
    ],
)
def test_bad_predictions(folder: Path, rows: list[dict[str, Any]], words: str) -> None:
    write(folder / "predicted.jsonl", rows)
    done = evaluate(folder, "--predictions", "predicted.jsonl", "--data", "populated.jsonl", code=4)
    assert words in done.stderr
    assert not (folder / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "nothing to evaluate"),
        (("embedded:base", "--predictions", "predicted.jsonl"), 2, "at once"),
        (
            ("--predictions", "predicted.jsonl", "--data", "populated.jsonl", "--task", "perplexity"),
            2,
            "only task",
        ),
        (("--predictions", "predicted.jsonl", "--data", "populated.jsonl", "--metric", "birds"), 2, "rules"),
        (("--predictions", "predicted.jsonl", "--data", "nowhere.jsonl"), 4, "no such file"),
        (("--predictions", "nowhere.jsonl", "--data", "populated.jsonl"), 4, "no such file"),
        (
            ("--predictions", "predicted.jsonl", "--data", "populated.jsonl", "--judge", "no.jsonl"),
            4,
            "no such file",
        ),
        (("embedded:base", "--judge", "predicted.jsonl"), 2, "--judge goes with --predictions"),
        (("--predictions", "predicted.jsonl", "--baseline", "embedded:base"), 2, "--baseline has no meaning"),
    ],
)
def test_bad_arguments(folder: Path, arguments: tuple[str, ...], code: int, words: str) -> None:
    assert words in evaluate(folder, *arguments, code=code).stderr
