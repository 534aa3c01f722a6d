"""What stands in a completion: the text of its message, and the chunks of a stream put together.

Content is a string, or a list of parts (https://platform.openai.com/docs/api-reference/chat/object and servers that
are compatible with it): `{"type": "text", "text": …}`, `output_text`, plain strings. The texts of the parts are joined
as they stand. What a model thought (`reasoning`, `thinking`) and parts of any other kind are no answer. A refusal
counts where there is no text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from quantlab.errors import DataError
from quantlab.textfile import MARK, parse_json

TEXT_PARTS = ("text", "output_text", None)  # None: a part that has a text and does not say what it is
_LINE_END = re.compile("\r\n|\n|\r")  # of server-sent events; U+2028 and U+0085 are plain characters


def message_text(message: Any) -> str | None:
    """The answer in a message or in a delta: its text, else its refusal, None where it holds neither."""
    if not isinstance(message, Mapping):
        return None
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    texts = [text for text in map(_part_text, parts) if text is not None]
    refusals = [*map(_part_refusal, parts), message.get("refusal")]
    refused = "".join(text for text in refusals if isinstance(text, str))
    return "".join(texts) or refused or ("" if texts else None)


def join_events(text: str) -> dict[str, Any]:
    """The chunks of a stream as one completion.

    Raises:
        ValueError, DataError: a chunk is no JSON, the server reports an error, or the stream breaks off.
    """
    parts: list[Any] = []
    finish, usage = None, None
    for chunk in _chunks(text):
        if not isinstance(chunk, dict) or "error" in chunk:
            raise ValueError("an error in the stream")
        usage = chunk.get("usage") or usage
        choices = chunk.get("choices")
        for choice in choices if isinstance(choices, list) else []:
            if not isinstance(choice, dict):
                raise ValueError("a choice is no object")
            parts += _parts_of(choice.get("delta"))
            finish = choice.get("finish_reason") or finish
    if finish is None:
        raise ValueError("the stream breaks off")
    return {"choices": [{"message": {"content": parts}, "finish_reason": finish}], "usage": usage}


def _parts_of(delta: Any) -> list[Any]:
    """What one chunk adds to the content, as parts."""
    if not isinstance(delta, Mapping):
        return []
    content, refusal = delta.get("content"), delta.get("refusal")
    parts = content if isinstance(content, list) else [] if content is None else [content]
    return [*parts, *([{"type": "refusal", "refusal": refusal}] if isinstance(refusal, str) else [])]


def _part_text(part: Any) -> str | None:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping) or part.get("type") not in TEXT_PARTS:
        return None
    text = part.get("text")
    if isinstance(text, Mapping):  # {"text": {"value": …}}
        text = text.get("value")
    return text if isinstance(text, str) else None


def _part_refusal(part: Any) -> Any:
    return (
        part.get("refusal") if isinstance(part, Mapping) and part.get("type") in ("refusal", None) else None
    )


def _chunks(text: str) -> Iterator[Any]:
    """The JSON of each event."""
    for lines in _events(text):
        try:
            yield parse_json("\n".join(lines), "an event")
        except DataError:
            if len(lines) == 1:
                raise
            for line in lines:  # a server that leaves out the blank lines between its events
                yield parse_json(line, "an event")


def _events(text: str) -> Iterator[list[str]]:
    """The data lines of each event: https://html.spec.whatwg.org/multipage/server-sent-events.html."""
    lines: list[str] = []
    for line in [*_LINE_END.split(text.removeprefix(MARK)), ""]:
        if not line and lines:
            yield lines
            lines = []
        data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
        if data and data != "[DONE]":
            lines.append(data)
