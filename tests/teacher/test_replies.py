"""What an answer may look like: lists of content parts, streams, and characters that end lines elsewhere. Every way an
answer travels (live, streamed, in a batch) ends with it in the ledger, and nothing is asked twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from asking import endpoint, some_requests
from hostile_server import HostileServer
from test_client import bill

from quantlab.distill.prepare import ask_judge
from quantlab.progress import Silent
from quantlab.recipe.distill import Judge
from quantlab.teacher.client import gather
from quantlab.teacher.ledger import Ledger
from quantlab.teacher.replies import join_events, message_text
from quantlab.teacher.transport import read_completion
from quantlab.text2sql.data.dataset import load_items

ROOT = Path(__file__).parents[2]
WAYS: dict[str, dict[str, Any]] = {"live": {}, "streamed": {"stream": True}, "batch": {}}
SHAPES: dict[str, Callable[[str], Any]] = {
    "text": lambda text: [{"type": "text", "text": text}],
    "output_text": lambda text: [{"type": "output_text", "text": text, "annotations": []}],
    "several": lambda text: [{"type": "text", "text": text[:3]}, {"type": "text", "text": text[3:]}],
    "strings": lambda text: [text[:1], text[1:]],
    "thinking": lambda text: [
        {"type": "thinking", "thinking": "hm, SELECT 2;"},
        {"type": "reasoning", "text": "SELECT 3;"},
        {"type": "text", "text": text},
    ],
    "no type": lambda text: [{"text": text}],
    "value": lambda text: [{"type": "text", "text": {"value": text, "annotations": []}}],
    "refusal": lambda text: [{"type": "refusal", "refusal": text}],
}


def text(*parts: Any) -> dict[str, Any]:
    return {"content": list(parts)}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"content": "a"}, "a"),
        ({"content": ""}, ""),
        ({"content": None}, None),
        ({}, None),
        ({"content": []}, None),
        ({"content": {"type": "text", "text": "a"}}, "a"),
        (text({"type": "text", "text": "a"}), "a"),
        (text({"type": "text", "text": ""}), ""),
        (text({"type": "text", "text": "a "}, {"type": "output_text", "text": " b"}, "c"), "a  bc"),
        (text({"type": "thinking", "thinking": "a"}), None),
        (text({"type": "thinking", "thinking": [{"type": "text", "text": "a"}]}, "b"), "b"),
        (text({"type": "reasoning", "text": "a"}, {"type": "redacted_thinking", "data": "x"}), None),
        (text({"type": "image_url", "image_url": {"url": "x"}}, {"type": "tool_use", "text": "y"}), None),
        (text({"type": "refusal", "refusal": "no"}), "no"),
        (text({"type": "refusal", "refusal": "no"}, {"type": "text", "text": "a"}), "a"),
        (text({"type": "text", "text": ""}, {"type": "refusal", "refusal": "no"}), "no"),
        ({"content": None, "refusal": "no"}, "no"),
        ({"content": [], "refusal": "no"}, "no"),
        ({"refusal": "no"}, "no"),
        (text(None, 3, True, [], {}, {"type": "text"}, {"type": "text", "text": None}), None),
        (text({"type": ["text"], "text": "a"}, {"type": "text", "text": ["a"]}), None),
        ({"content": 3}, None),
        ("a", None),
        (None, None),
    ],
)
def test_the_text_of_a_message(message: Any, expected: str | None) -> None:
    assert message_text(message) == expected
    body = {"choices": [{"message": message, "finish_reason": "stop"}]}
    assert read_completion(json.dumps(body)).text == expected


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", WAYS)
def test_parts_are_paid_for_once(tmp_path: Path, way: str, shape: str) -> None:
    requests = some_requests(3)
    said = "SELECT 1; -- \u2028가\x85😀"
    with HostileServer(answer=lambda *_: said, content=SHAPES[shape], **WAYS[way]) as server:
        asked = endpoint(server, batch=way == "batch", attempts=3)
        first = gather(requests, asked, tmp_path / "l.db", Silent(), poll=0.05, period=0.1)
        assert first.failed == {} and first.faults == {}
        assert [answer and answer.text for answer in first.answers] == [said] * 3
        assert [answer and answer.finish for answer in first.answers] == ["stop"] * 3
        assert len(server.arrivals) == 3
        share = 2 if way == "batch" else 1
        assert first.spending.requests == 3 and first.spending.usd == pytest.approx(bill(server) / share)
        again = gather(requests, asked, tmp_path / "l.db", Silent(), poll=0.05)
        assert again.answers == first.answers and again.spending.cached == 3
        assert len(server.arrivals) == 3
    with Ledger(tmp_path / "l.db") as ledger:
        assert ledger.totals().open == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("parts", [[], [{"type": "thinking", "thinking": "hm"}], [{"type": "text"}]])
def test_parts_without_a_text_are_no_answer(tmp_path: Path, way: str, parts: list[Any]) -> None:
    with HostileServer(content=lambda _: parts, **WAYS[way]) as server:
        asked = endpoint(server, batch=way == "batch", attempts=2)
        found = gather(some_requests(1), asked, tmp_path / "l.db", Silent(), poll=0.05, period=0.1)
        assert found.failed == {0: "no answer in it, 2 attempts"} and len(server.arrivals) == 2


@pytest.mark.parametrize("way", WAYS)
def test_a_judge_that_answers_in_parts(tmp_path: Path, way: str) -> None:
    items = load_items("ko_text2sql:dev", 3)
    said = json.dumps({"why": "it does", "answer": "yes"})
    with HostileServer(answer=lambda *_: said, content=SHAPES["thinking"], **WAYS[way]) as server:
        judge = Judge(model="gpt-4o", endpoint=server.url, batch=way == "batch")
        if way == "batch":  # whose pause between two looks is half a minute
            server.patience = 1
        for _ in range(2):
            verdicts, gathered = ask_judge(items, judge, tmp_path / "l.db", Silent())
            assert {verdict.yes for verdict in verdicts.values()} == {True} and len(verdicts) == 3
        assert gathered.spending.cached == 3 and len(server.arrivals) == 3


def test_a_teacher_that_answers_in_parts_through_the_command_line(tmp_path: Path) -> None:
    with HostileServer(answer=lambda *_: "SELECT 1;", content=SHAPES["several"]) as server:
        recipe = {
            "kind": "distill",
            "student": {"model": "embedded:base"},
            "teacher": {
                "endpoint": server.url,
                "model": "gpt-4o",
                "max_requests": 3,
                "concurrency": 1,
                "attempts": 2,
            },
            "data": {"source": "ko_text2sql/train.jsonl", "limit": 6, "filters": ["parses"]},
            "evaluate": [],
        }
        (tmp_path / "r.yaml").write_text(json.dumps(recipe))
        for _ in range(2):
            done = subprocess.run(
                [sys.executable, "-m", "quantlab", "distill", "r.yaml", "--ledger", "l.db"],
                cwd=tmp_path,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
                timeout=200,
                check=False,
            )
            assert done.returncode == 1 and "max_requests 3" in done.stderr, done.stderr
            assert "no answer in it" not in done.stderr
        asked = [json.dumps(body["messages"]) for body in server.bodies]
        assert len(asked) == len(set(asked)) == 3
    with Ledger(tmp_path / "l.db") as ledger:
        assert ledger.rows("SELECT text FROM answers", ()) == [("SELECT 1;",)] * 3


# Streams and files whose strings hold what ends lines elsewhere


@pytest.mark.parametrize(
    "inside", ["\u2028", "\u2029", "\x85", "\u2028\u2029\x85", "\x0b\x0c\x1c\x1d\x1e", "\r\n\t"]
)
@pytest.mark.parametrize("way", WAYS)
def test_line_ends_inside_answers(tmp_path: Path, way: str, inside: str) -> None:
    said = f"SELECT 1;{inside}끝"
    with HostileServer(answer=lambda *_: said, raw=True, **WAYS[way]) as server:
        asked = endpoint(server, batch=way == "batch")
        found = gather(some_requests(2), asked, tmp_path / "l.db", Silent(), poll=0.05)
        assert [answer and answer.text for answer in found.answers] == [said] * 2
        assert found.faults == {} and len(server.arrivals) == 2


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"], ids=ascii)
def test_line_ends_of_streams(tmp_path: Path, line_end: str) -> None:
    with HostileServer(stream=True, raw=True, line_end=line_end, answer=lambda *_: "가\u2028나") as server:
        found = gather(some_requests(1), endpoint(server), tmp_path / "l.db", Silent())
        assert found.answers[0] is not None and found.answers[0].text == "가\u2028나"


def chunk(content: Any, finish: str | None = None) -> str:
    return json.dumps(
        {"choices": [{"delta": {"content": content}, "finish_reason": finish}]}, ensure_ascii=False
    )


END = chunk(None, "stop")


@pytest.mark.parametrize(
    "stream",
    [
        f"data: {chunk('ab')}\n\ndata: {END}\n\ndata: [DONE]\n\n",
        f"data:{chunk('ab')}\n\ndata:{END}",
        f"\ufeff: a comment\n\nevent: x\ndata: {chunk('ab')}\nid: 1\nretry: 3\n\ndata: {END}\n\n",
        f"data: {chunk('ab')}\ndata: {END}\ndata: [DONE]\n",  # no blank lines between
        f"data: {chunk('a')}\r\r\ndata: {chunk('b')}\n\rdata: {END}\r\n\r\n",
        "".join(f"data: {line}\n" for line in json.dumps(json.loads(chunk("ab")), indent=1).split("\n"))
        + f"\ndata: {END}\n\n",  # one event of several data lines
        f"data: {chunk(['a', {'type': 'text', 'text': 'b'}])}\n\ndata: {END}\n\n",
        f"data: {chunk([{'type': 'thinking', 'thinking': 'x'}])}\n\ndata: {chunk('ab')}\n\ndata: {END}\n\n",
        f"data: {chunk('')}\n\ndata: {chunk('ab', 'stop')}\n\n" + 'data: {"choices": []}\n\n',
    ],
)
def test_events(stream: str) -> None:
    outcome = read_completion(stream, "text/event-stream; charset=utf-8")
    assert (outcome.text, outcome.finish) == ("ab", "stop")


@pytest.mark.parametrize(
    "stream",
    [
        f"data: {chunk('ab')}\n\n",
        f"data: {chunk('ab')[:-3]}\n\ndata: {END}\n\n",
        'data: {"error": {"message": "x"}}\n\n',
        'data: {"choices": [3]}\n\n',
        "data: [1]\n\n",
        "data: " + "[" * 200_000 + "\n\n",
        "",
    ],
)
def test_streams_that_break_off(stream: str) -> None:
    outcome = read_completion(stream, "text/event-stream")
    assert (outcome.fate, outcome.fault, outcome.text) == ("uncertain", "garbled", None)


def test_refusals_in_streams() -> None:
    deltas = [{"content": ""}, {"refusal": "I "}, {"refusal": "will not"}]
    events = [json.dumps({"choices": [{"delta": delta}]}) for delta in deltas]
    body = join_events("".join(f"data: {event}\n\n" for event in [*events, END]))
    assert message_text(body["choices"][0]["message"]) == "I will not"


def test_a_body_with_a_mark() -> None:
    assert read_completion('\ufeff{"choices": [{"message": {"content": "a"}}]}').text == "a"
