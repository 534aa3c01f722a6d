"""Teachers on this machine: a model, a file of recorded answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from asking import some_requests

from quantlab.errors import DataError
from quantlab.progress import Silent
from quantlab.recipe.distill import Endpoint
from quantlab.teacher.client import gather
from quantlab.teacher.estimate import estimate
from quantlab.teacher.ledger import Answer, Ledger, Request, request_key
from quantlab.teacher.local import identity, load_recorded
from quantlab.text2sql.prompt.prompt import INSTRUCTION


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_recorded_answers_of_a_ledger(tmp_path: Path) -> None:
    requests = some_requests(4)
    with Ledger(tmp_path / "paid.db") as ledger:
        for number, request in enumerate(requests[:3]):
            answer = Answer(f"SELECT {number};", 5, 5, 0.1, "stop", 0.0)
            ledger.put(request_key("gpt-4o", request), "gpt-4o", request, answer)
        ledger.export(tmp_path / "recorded.jsonl")
    teacher = Endpoint(model=f"file:{tmp_path / 'recorded.jsonl'}", max_tokens=999)
    before = estimate(requests, teacher, tmp_path / "l.db")
    assert (before.requests, before.usd) == (4, 0.0)
    found = gather(requests, teacher, tmp_path / "l.db", Silent())
    assert [a and a.text for a in found.answers] == ["SELECT 0;", "SELECT 1;", "SELECT 2;", None]
    assert found.failed == {3: "no recorded answer in recorded.jsonl"}
    assert found.spending.usd == 0.0 and found.spending.requests == 3
    assert gather(requests[:3], teacher, tmp_path / "l.db", Silent()).spending.cached == 3


def test_a_changed_file_answers_anew(tmp_path: Path) -> None:
    request = Request(({"role": "user", "content": "?"},), {}, "", question="how many?")
    path = write(tmp_path / "a.jsonl", [{"question": "how many?", "answer": "SELECT 1;"}])
    teacher = Endpoint(model=f"file:{path}")
    assert gather([request], teacher, tmp_path / "l.db", Silent()).answers[0].text == "SELECT 1;"  # type: ignore[union-attr]
    write(path, [{"question": "how many?", "answer": "SELECT 22;"}])
    assert gather([request], teacher, tmp_path / "l.db", Silent()).answers[0].text == "SELECT 22;"  # type: ignore[union-attr]


def test_text2sql_rows_are_found_by_question_and_context(tmp_path: Path) -> None:
    rows = [
        {
            "question": "모두 몇 개야?",
            "answer": "SELECT count(*) FROM a;",
            "context": "CREATE TABLE a (x INT);",
        },
        {
            "question": "모두 몇  개야?",
            "answer": "SELECT count(*) FROM b;",
            "context": "CREATE TABLE b (x INT);",
        },
        {"question": "이름은?", "answer": "SELECT name FROM c;"},
    ]
    path = write(tmp_path / "rows.jsonl", rows)

    def asking(question: str, context: str) -> Request:
        return Request(({"role": "user", "content": f"{context}\n\n{question}"},), {}, "", question=question)

    requests = [
        asking("모두 몇 개야?", "CREATE TABLE b (x INT);"),
        asking("모두 몇 개야?", "CREATE TABLE a (x INT);"),
        asking(" 이름은? ", "CREATE TABLE c (name TEXT);"),
        asking("없는 질문", ""),
        Request(({"role": "user", "content": "이름은?"},), {}, ""),
    ]
    found = gather(
        requests,
        Endpoint(model=f"file:{path}"),
        tmp_path / "l.db",
        Silent(),
        accept=lambda t: "c" in t and None,
    )
    assert [a and a.text[-2] for a in found.answers] == ["b", "a", "c", None, None]
    refused = gather(
        requests[:1], Endpoint(model=f"file:{path}"), tmp_path / "m.db", Silent(), accept=lambda t: "no"
    )
    assert refused.failed == {0: "no"} and refused.answers == [None]


def test_the_bundled_rows_are_recorded_answers(tmp_path: Path) -> None:
    from quantlab.text2sql.data.dataset import load_items

    items = load_items("ko_text2sql:test", limit=20)
    requests = [
        Request(({"role": "user", "content": f"{i.context}\n{i.question}"},), {}, i.id, question=i.question)
        for i in items
    ]
    found = gather(requests, Endpoint(model="file:ko_text2sql/test.jsonl"), tmp_path / "l.db", Silent())
    assert [a and a.text for a in found.answers] == [item.answer for item in items]


@pytest.mark.parametrize("line", ["[]", "{", '{"key": 1, "text": "a"}', '{"question": "a"}', ""])
def test_bad_files_are_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match="bad.jsonl"):
        load_recorded(path)


def test_no_such_teacher(tmp_path: Path) -> None:
    for model in ("file:nowhere.jsonl", "hf:embedded:none"):
        with pytest.raises(DataError):
            gather(some_requests(1), Endpoint(model=model), tmp_path / "l.db", Silent())


def test_a_model_of_this_machine(tmp_path: Path) -> None:
    """Batched answers are the ones that each prompt gets alone, and cost nothing the second time."""
    body = "### DDL:\nCREATE TABLE players (name TEXT, level INTEGER);\n\n### Question:\n{}\n\n### SQL:\n"
    requests = [
        Request(
            ({"role": "system", "content": INSTRUCTION}, {"role": "user", "content": body.format(question)}),
            {"max_tokens": limit},
            question,
        )
        for question, limit in (
            ("플레이어의 이름을 모두 보여줘", 16),
            ("플레이어는 몇 명이야?", 24),
            ("이름", 1),
        )
    ]
    teacher = Endpoint(model="hf:embedded:base", concurrency=4)
    assert identity(teacher).startswith("hf:embedded:base@")
    found = gather(requests, teacher, tmp_path / "l.db", Silent())
    assert found.failed == {} and found.spending.usd == 0.0
    assert found.answers[0] is not None and found.answers[0].text.startswith("SELECT")
    assert found.answers[2] is not None and (found.answers[2].output_tokens, found.answers[2].finish) == (
        1,
        "length",
    )
    alone = gather(requests[::-1], teacher.model_copy(update={"concurrency": 1}), tmp_path / "m.db", Silent())
    assert [a and a.text for a in alone.answers[::-1]] == [a and a.text for a in found.answers]
    assert gather(requests, teacher, tmp_path / "l.db", Silent()).spending.cached == 3
