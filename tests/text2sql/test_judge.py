"""Strict replies: what is read, what is refused and in which words, and that garbage only ever is a ValueError."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.text2sql.data.item import Item
from quantlab.text2sql.teaching.judge import (
    Verdict,
    collect_verdicts,
    judge_requests,
    parse_verdict,
    unusable_verdict,
)
from quantlab.text2sql.teaching.prompts import load_prompt, parse_answer
from quantlab.text2sql.teaching.question_writing import parse_written

GOOD = '{"why": "조건이 같다", "answer": "yes"}'
PARSERS: list[Callable[[str], Any]] = [parse_verdict, parse_written, parse_answer]


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"\n  {GOOD}\r\n",
        f"```json\n{GOOD}\n```",
        f"```\n{GOOD}```",
        '```JSON\n{"answer":"yes",\n"why":"조건이 같다"}\n```\n',
    ],
)
def test_accepted(text: str) -> None:
    assert parse_verdict(text) == Verdict(True, "조건이 같다")
    assert unusable_verdict(text) is None


def test_no_is_no_and_fences_inside_text_stay() -> None:
    assert parse_verdict('{"why": "```sql``` differs", "answer": "no"}') == Verdict(
        False, "```sql``` differs"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("```json\n```", "empty"),
        ("yes", "not JSON"),
        ("true", "found true or false"),
        ("[]", "found a list"),
        ('"yes"', "found text"),
        (GOOD[:-3], "not JSON: Unterminated string"),
        (GOOD[:-1] + ",}", "not JSON"),
        (GOOD + GOOD, "behind the JSON object"),
        (GOOD + " 이상입니다.", "behind the JSON object: '이상입니다.'"),
        ("판정: " + GOOD, "not JSON"),
        (f"```sql\n{GOOD}\n```", "fence that is not JSON"),
        (f"```json\n{GOOD}", "not closed"),
        (f"```json\n```json\n{GOOD}\n```\n```", "not JSON"),
        (f"```json {GOOD} ```", "fence that is not JSON"),
        ('{"answer": "yes"}', "no key 'why'"),
        ('{"why": "x"}', "no key 'answer'"),
        ('{"why": "x", "answer": "yes", "confidence": 1}', "unknown keys 'confidence'"),
        ('{"why": "x", "answer": "no", "answer": "yes"}', "'answer' stands twice"),
        ('{"why": "x", "answer": true}', "found true or false"),
        ('{"why": "x", "answer": "Yes"}', "found 'Yes'"),
        ('{"why": "x", "answer": ["yes"]}', "found a list"),
        ('{"why": null, "answer": "yes"}', "'why' must be text, found null"),
        ('{"why": NaN, "answer": "yes"}', "NaN is no JSON number"),
        ('{"why": "x", "answer": "yes\\u0000"}', "NUL"),
        ('{"why": "\\ud800", "answer": "yes"}', "surrogate"),
        ("{'why': 'x', 'answer': 'yes'}", "not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"why":' * 20_000, "nested too deeply"),
        ("9" * 5000, ""),
        ("x" * 1_000_000, "longer than"),
        ("<think>hm</think>" + GOOD, "not JSON"),
    ],
)
def test_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_verdict(text)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 300, "a reason is a line, not the reply"
    assert unusable_verdict(text) == str(caught.value)


def test_many_duplicate_keys_are_quick() -> None:
    with pytest.raises(ValueError, match="twice"):
        parse_verdict("{" + ",".join(f'"{i}":1' for i in range(15_000)) + ',"14999":1}')


PIECES = st.sampled_from(
    [
        "```", "```json\n", "{", "}", "[", "]", ",", ":", '"', '"why"', '"answer"', '"yes"', '"pairs"', '"sql"',
        '"question"', "NaN", "-Infinity", "1e999", "\\u0000", "\\ud800", "\x00", "\n", " ", "SELECT 1;", "null", "'",
        "/*", "--", "WITH x AS (", "\ud800", "한글",
    ]
)  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(st.one_of(st.text(max_size=200), st.lists(PIECES, max_size=40).map("".join)))
def test_garbage_raises_nothing_but_value_error(text: str) -> None:
    for parse in PARSERS:
        with contextlib.suppress(ValueError):
            parse(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["why", "answer", "pairs", "question", "sql", "x"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@settings(max_examples=120, deadline=None)
@given(JSON)
def test_any_json_raises_nothing_but_value_error(value: Any) -> None:
    for parse in (parse_verdict, parse_written):
        with contextlib.suppress(ValueError):
            parse(json.dumps(value))


@pytest.mark.parametrize(
    "text", ["x" * 1_000_000, "```" * 300_000, "(" * 1_000_000, "SELECT " * 150_000, "'" * 1_000_001]
)
def test_a_megabyte(text: str) -> None:
    for parse in PARSERS:
        with contextlib.suppress(ValueError):
            parse(text)


def test_collecting_leaves_out_what_is_missing_or_unusable() -> None:
    items = [Item(str(n), "1", "CREATE TABLE t (a);", "q", "SELECT a FROM t") for n in range(4)]
    texts = [GOOD, None, "maybe", '{"why": "", "answer": "no"}']
    assert collect_verdicts(items, texts) == {"0": Verdict(True, "조건이 같다"), "3": Verdict(False, "")}


def test_requests_for_rows_and_for_predictions() -> None:
    items = [Item("a", "1", "CREATE TABLE t (a);", "질문?", "SELECT a FROM t;")]
    prompt = load_prompt("judge", "ko")
    (own,) = judge_requests(prompt, items)
    assert (
        "SELECT a FROM t;" in own.messages[1]["content"] and "<reference>" not in own.messages[1]["content"]
    )
    (other,) = judge_requests(prompt, items, {"a": "SELECT 2"})
    assert "<sql>\nSELECT 2\n</sql>" in other.messages[1]["content"]
    assert "<reference>\nSELECT a FROM t;\n</reference>" in other.messages[1]["content"]
    assert (other.label, other.question) == ("a", "질문?")
