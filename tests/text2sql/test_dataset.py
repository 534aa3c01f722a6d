"""Reading rows, and naming the line that is wrong."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from quantlab.errors import DataError
from quantlab.paths import DATA
from quantlab.text2sql.data.dataset import digest, load_items, on_the_hub
from quantlab.text2sql.data.hub import parse_hub
from quantlab.text2sql.prompt.prompt import HEADINGS, build_prompt, complete_statement

ROW = {
    "db_id": 1,
    "context": "CREATE TABLE t (a INTEGER);",
    "question": "모두?",
    "answer": "SELECT a FROM t;",
}


def write(path: Path, *rows: Any) -> str:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


def test_reads_rows(tmp_path: Path) -> None:
    sqlite3.connect(tmp_path / "d.sqlite").close()
    (tmp_path / "d.sqlite").touch()
    items = load_items(
        write(tmp_path / "q.jsonl", ROW, "", {**ROW, "id": "x", "database": "d.sqlite", "level": "easy"})
    )
    assert [item.id for item in items] == ["1", "x"]
    assert items[0].database is None and items[1].database == tmp_path / "d.sqlite"
    assert items[1].extra == {"level": "easy"} and items[0].golds == ("SELECT a FROM t;",)
    assert load_items(str(tmp_path / "q.jsonl"), limit=1) == items[:1]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "expected an object, found list"),
        ({"question": "?", "answer": "SELECT 1"}, "no 'db_id'"),
        ({**ROW, "answer": " "}, "'answer' must be text"),
        ({**ROW, "question": 3}, "'question' must be text"),
        ({**ROW, "context": ""}, "no 'context'"),
        ({**ROW, "context": None, "db": "nowhere", "tables": ["t"]}, "no 'context'"),
        ({**ROW, "database": "missing.sqlite"}, "no database"),
        ({**ROW, "alternatives": "SELECT 1"}, "'alternatives' must be a list"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: Any, words: str) -> None:
    source = write(tmp_path / "q.jsonl", ROW, row)
    with pytest.raises(DataError, match=words) as caught:
        load_items(source)
    assert f"{source}:2:" in str(caught.value)


def test_other_complaints(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows"):
        load_items(write(tmp_path / "empty.jsonl"))
    with pytest.raises(DataError, match="no such file"):
        load_items(str(tmp_path / "nothing.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(DataError, match="cannot read"):
        load_items(str(tmp_path / "latin.jsonl"))


def test_hub_names() -> None:
    assert parse_hub("hf:shangrilar/ko_text2sql/origin:test") == ("shangrilar/ko_text2sql", "origin", "test")
    assert parse_hub("hf:a/b") == ("a/b", None, "train")
    with pytest.raises(DataError):
        parse_hub("hf:a/b/c/d:test")


def test_evidence_is_text_or_nothing(tmp_path: Path) -> None:
    texts = [" 서버 = server\r\n둘째 줄 ", "", "  ", None]
    rows = [{**ROW, "id": number, "evidence": text} for number, text in enumerate(texts)]
    items = load_items(write(tmp_path / "a.jsonl", *rows))
    assert [item.evidence for item in items] == ["서버 = server\r\n둘째 줄", "", "", ""]
    bare = load_items(write(tmp_path / "b.jsonl", *({**ROW, "id": number} for number in range(4))))
    assert digest(items[1:]) == digest(bare[1:]) and digest(items) != digest(bare)


def test_what_is_on_the_hub() -> None:
    assert on_the_hub("hf:a/b:test") and on_the_hub("ko_text2sql:hf:a/b:test")
    assert not on_the_hub("ko_text2sql:test") and not on_the_hub("ko_text2sql:/data/hf:test.csv")


@pytest.mark.parametrize(
    "source", ["hf:shangrilar/ko_text2sql/origin:test", "ko_text2sql:hf:shangrilar/ko_text2sql/origin:test"]
)
def test_the_books_questions_on_the_hub(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read by their adapter with or without its name: in MySQL's dialect, without the index that pandas left."""
    pytest.importorskip("datasets")
    place = tmp_path / "shangrilar" / "ko_text2sql"  # the datasets library takes a folder of that name for it
    (place / "origin").mkdir(parents=True)
    (place / "README.md").write_text(
        "---\nconfigs:\n- config_name: origin\n  data_files:\n  - split: test\n    path: origin/test.csv\n---\n"
    )
    (place / "origin" / "test.csv").write_text(
        ',db_id,context,question,answer\n0,1,"CREATE TABLE p (\n  id INT\n);",몇 명?,SELECT COUNT(*) FROM p\n',
        encoding="utf-8",
    )
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (item,) = load_items(source)
    assert (item.id, item.db_id, item.dialect, item.database) == ("1", "1", "mysql", None)
    assert item.context == "CREATE TABLE p (\n  id INT\n);" and item.extra == {"benchmark": "ko_text2sql"}


def test_the_digest_names_the_content(tmp_path: Path) -> None:
    one = load_items(write(tmp_path / "a.jsonl", ROW))
    same = load_items(write(tmp_path / "b.jsonl", ROW))
    other = load_items(write(tmp_path / "c.jsonl", {**ROW, "answer": "SELECT 1;"}))
    assert digest(one) == digest(same) != digest(other)


@pytest.mark.parametrize("split", ["test", "dev", "train"])
def test_bundled_sets(split: str) -> None:
    if not (DATA / "ko_text2sql" / f"{split}.jsonl").exists():
        pytest.skip("not built yet")
    items = load_items(f"ko_text2sql:{split}", limit=50)
    assert len(items) == 50
    assert all("CREATE TABLE" in item.context for item in items)
    assert all(item.database is not None for item in items)
    assert items == load_items(f"ko_text2sql/{split}.jsonl", limit=50)


def test_prompt() -> None:
    prompt = build_prompt("CREATE TABLE t (a INTEGER);\n", " 모두? ")
    assert prompt.splitlines()[2:] == [HEADINGS[0], ROW["context"], "", HEADINGS[1], "모두?", "", HEADINGS[2]]
    assert prompt.endswith("### SQL:\n")
    assert complete_statement(" SELECT 1 ; ; ") == "SELECT 1;"
