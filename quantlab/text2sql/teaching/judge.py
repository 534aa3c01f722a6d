"""A judge's yes or no, and the strict reading of JSON replies.

A reply is one JSON object with exactly the keys of its schema, with or without a code fence around it, and nothing
else. Whatever else came is a ValueError whose text says what was wrong: it is shown, and it decides that the
request is asked again. Nothing is guessed from a half-right reply, since a guessed verdict would be counted like a
real one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from quantlab.teacher.ledger import Request
from quantlab.text2sql.data.item import Item
from quantlab.text2sql.prompt.prompt import row_fields
from quantlab.text2sql.teaching.prompts import Prompt, judge_request

MAX_REPLY = 200_000  # characters
_SHOWN = 60


@dataclass(frozen=True)
class Verdict:
    """`yes`: the query answers the question, says the judge; `why` in its words."""

    yes: bool
    why: str


def parse_verdict(text: str) -> Verdict:
    """`{"why": "…", "answer": "yes" | "no"}` as a Verdict; ValueError for anything else."""
    content = parse_object(text, ("why", "answer"))
    why, answer = content["why"], content["answer"]
    if not isinstance(why, str):
        raise ValueError(f"'why' must be text, found {kind_of(why)}")
    if answer not in ("yes", "no"):
        raise ValueError(f'\'answer\' must be "yes" or "no", found {shorten(answer)}')
    return Verdict(answer == "yes", why.strip())


def unusable_verdict(text: str) -> str | None:
    """Why `text` is no verdict, or None: the `accept` of a gathering of verdicts."""
    return reason_of(parse_verdict, text)


def judge_requests(
    prompt: Prompt,
    items: Sequence[Item],
    predicted: Mapping[str, str] | None = None,
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    structured: bool = True,
) -> list[Request]:
    """A request for each item: is its own answer right, or, with `predicted` (id → SQL), is that, with the item's
    answer as the reference."""
    return [
        judge_request(
            prompt,
            sql=item.answer if predicted is None else predicted[item.id],
            **row_fields(item),
            reference=None if predicted is None else item.answer,
            max_tokens=max_tokens,
            temperature=temperature,
            structured=structured,
            label=item.id,
        )
        for item in items
    ]


def collect_verdicts(items: Sequence[Item], texts: Sequence[str | None]) -> dict[str, Verdict]:
    """Item id → verdict, in the order of `items`; an item whose reply is missing or unusable has none."""
    found: dict[str, Verdict] = {}
    for item, text in zip(items, texts, strict=True):
        if text is None:
            continue
        try:
            found[item.id] = parse_verdict(text)
        except ValueError:
            continue  # the cleaning counts it under "no verdict"
    return found


def parse_object(text: str, keys: Sequence[str]) -> dict[str, Any]:
    """The JSON object with exactly `keys` that `text` is; ValueError says what is wrong."""
    if len(text) > MAX_REPLY:
        raise ValueError(f"the reply is longer than {MAX_REPLY} characters")
    body = _without_fence(text.strip())
    if not body:
        raise ValueError("the reply is empty")
    try:
        content = json.loads(body, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            found = shorten(body[error.pos :].strip())
            raise ValueError(f"something stands behind the JSON object: {found}") from None
        where = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"not JSON: {error.msg} at {where}: {shorten(body[error.pos :])}") from None
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, found {kind_of(content)}")
    exact_keys(content, keys, "the object")
    _check_text(content)
    return content


def exact_keys(content: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    missing = [key for key in keys if key not in content]
    unknown = [shorten(key) for key in content if key not in keys]
    if missing:
        raise ValueError(f"{where} has no key {', '.join(map(repr, missing))}")
    if unknown:
        raise ValueError(
            f"{where} has unknown keys {', '.join(unknown[:5])}; expected only {', '.join(keys)}"
        )


def reason_of(parse: Any, text: str) -> str | None:
    """None where `parse(text)` succeeds, else what its ValueError says."""
    try:
        parse(text)
    except ValueError as error:
        return str(error)
    return None


def kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def shorten(value: Any) -> str:
    """A value as it may stand in a message: one line, quoted, not long."""
    text = repr(value) if isinstance(value, str) else kind_of(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _without_fence(text: str) -> str:
    """The inside of a code fence that encloses the whole text, else the text."""
    if not text.startswith("```"):
        return text
    first, newline, rest = text.partition("\n")
    if first.strip("` \t\r").lower() not in ("", "json"):
        raise ValueError(f"a code fence that is not JSON: {shorten(first)}")
    if not newline or not rest.endswith("```"):
        raise ValueError("the code fence is not closed at the end of the reply")
    return rest[:-3].strip()


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shorten(twice)} stands twice")
    return content


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"not JSON: {name} is no JSON number")


def _check_text(value: Any) -> None:
    """Text must be encodable (an escape can smuggle in half a surrogate pair) and free of NUL."""
    waiting = [value]
    while waiting:
        current = waiting.pop()
        if isinstance(current, dict):
            waiting += [*current.keys(), *current.values()]
        elif isinstance(current, list):
            waiting += current
        elif isinstance(current, str):
            if "\x00" in current:
                raise ValueError("text contains a NUL character")
            try:
                current.encode("utf-8")
            except UnicodeEncodeError:
                raise ValueError("text contains half a surrogate pair") from None
