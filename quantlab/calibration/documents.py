"""Sources of text to documents.

A row of JSON Lines, or of a dataset of the hub, is a text, a conversation (``messages``, as chat templates take it), or
an instruction with its answer in columns of their own. Which it is, its columns say, row by row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from quantlab.errors import DataError
from quantlab.paths import find_source
from quantlab.textfile import json_lines, read_text

SEPARATOR = "\n\n"  # between texts that are joined
Message = Mapping[str, Any]


class Columns(NamedTuple):
    """Columns of an instruction: what is ``asked``, in this order, of which ``needed`` has to be there; the answer."""

    asked: tuple[str, ...]
    needed: str
    answer: str


INSTRUCTIONS = (
    Columns(("instruction", "input"), "instruction", "output"),
    Columns(("prompt",), "prompt", "completion"),
    Columns(("context", "question"), "question", "answer"),
)
EXPECTED = '"text", "messages", ' + " or ".join(f'"{c.needed}" with "{c.answer}"' for c in INSTRUCTIONS)


@dataclass(frozen=True, slots=True)
class Document:
    """One row of a source.

    text: the text; of an instruction its parts joined with blank lines, for models without a chat template.
    messages: of a conversation or an instruction, ``role`` and ``content`` each, the content always a string.
    where, number: "mine.jsonl, line" and 3.
    """

    kind: Literal["text", "messages", "instruction"]
    text: str
    messages: Sequence[Message]
    where: str
    number: int

    @property
    def place(self) -> str:
        return f"{self.where} {self.number}"

    @property
    def content(self) -> str:
        """All that is said in it, without what a chat template adds."""
        return self.text or SEPARATOR.join(filter(None, map(_content, self.messages)))

    def identity(self) -> str:
        """A text that no other document has: of a text the text itself."""
        if self.kind == "text":
            return self.text
        return json.dumps(self.messages, ensure_ascii=False, sort_keys=True, default=str)


def read_texts(source: str) -> list[str]:
    """The texts of a source: ``.jsonl`` with a ``text`` field, any other file as one text, or
    ``hf:<owner>/<dataset>[/<config>]:<split>``.

    Raises:
        DataError: missing, unreadable, empty, or a row without text, naming the row.
    """
    if source.startswith("hf:"):
        found = _from_hub(source)
        if "text" not in found.column_names:
            raise DataError(f"{source} has no text column, only {', '.join(found.column_names)}")
        return [t for t in found["text"] if t and t.strip()]
    path = find_source(source)
    texts = []
    for document in _jsonl(path, _only_text) if path.suffix == ".jsonl" else [_whole(path)]:
        texts += [document.text] if document.text.strip() else []
    if not texts:
        raise _nothing_in(path)
    return texts


def read_documents(source: str) -> list[Document]:
    """The rows of a source as documents, those without a word among them; see the module.

    Raises:
        DataError: missing, unreadable, empty, or a row of no known kind, naming the row and the columns expected.
    """
    if source.startswith("hf:"):
        documents = list(_hub_documents(source))
        if not documents:
            raise DataError(f"{source} holds no text")
        return documents
    path = find_source(source)
    documents = list(_jsonl(path, document_of)) if path.suffix == ".jsonl" else [_whole(path)]
    if not any(document.content.strip() for document in documents):
        raise _nothing_in(path)
    return documents


def identities(documents: Iterable[Document]) -> list[str]:
    """What names the content of a source; equal to ``read_texts`` where all are texts."""
    return [document.identity() for document in documents if document.content.strip()]


def document_of(row: Any, where: str, number: int) -> Document:
    """The document that one row is, by its columns.

    Raises:
        DataError: no known kind, or a column holds something else than it should.
    """
    place = f"{where} {number}"
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected an object with {EXPECTED}, found {type(row).__name__}")
    if isinstance(row.get("text"), str):
        return Document("text", _string(row["text"], f"{place}: text"), (), where, number)
    if row.get("messages") is not None:
        return Document("messages", "", _messages(row["messages"], place), where, number)
    for columns in INSTRUCTIONS:
        if row.get(columns.needed) is not None and row.get(columns.answer) is not None:
            asked = [
                _string(row[name], f"{place}: {name}") for name in columns.asked if row.get(name) is not None
            ]
            question = SEPARATOR.join(part for part in asked if part.strip())
            answer = _string(row[columns.answer], f"{place}: {columns.answer}")
            messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
            return Document("instruction", question + SEPARATOR + answer, messages, where, number)
    names = [str(name)[:40] for name in list(row)[:12]]
    raise DataError(f"{place}: expected {EXPECTED}; found {', '.join(map(repr, names)) or 'no columns'}")


def _messages(value: Any, place: str) -> tuple[Message, ...]:
    form = 'expected a list of {"role": ..., "content": ...}'
    if not isinstance(value, list) or not value:
        raise DataError(f"{place}: messages: {form}")
    found = []
    for number, message in enumerate(value):
        where = f"{place}: messages[{number}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{where}: {form}")
        kept = {key: inner for key, inner in message.items() if inner is not None}
        found.append(kept | {"content": _said(kept, where)})
    return tuple(found)


def _said(message: Message, where: str) -> str:
    """The content of a message: a string, or a list of parts that are text. A call of a tool may have none."""
    content = message.get("content", "" if "tool_calls" in message else None)
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return "".join(_string(text, f"{where}: content") for text in texts)


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: expected text, found {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: half of a surrogate pair at character {error.start + 1}") from error
    return value


def _content(message: Message) -> str:
    """What a message says, with calls of tools and the like."""
    rest = {key: value for key, value in message.items() if key not in ("role", "content")}
    more = json.dumps(rest, ensure_ascii=False, sort_keys=True, default=str) if rest else ""
    return f"{message['content']}{more}"


def _only_text(row: Any, where: str, number: int) -> Document:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise DataError(f'{where} {number}: expected an object with a "text" string')
    return Document("text", row["text"], (), where, number)


def _whole(path: Path) -> Document:
    return Document("text", read_text(path), (), f"{path}, line", 1)


def _jsonl(path: Path, document: Any) -> Iterator[Document]:
    for number, row in json_lines(path, "{name}, line {number}"):
        yield document(row, f"{path}, line", number)


def _nothing_in(path: Path) -> DataError:
    return DataError(f"{path} holds no text", hint='expected UTF-8 text, or JSON lines with a "text" field')


def _hub_documents(source: str) -> Iterator[Document]:
    found, where = _from_hub(source), f"{source}, row"
    if "text" in found.column_names:
        for number, text in enumerate(found["text"]):
            if text and text.strip():
                yield Document("text", text, (), where, number)
        return
    for number, row in enumerate(found):
        yield document_of(row, where, number)


def _from_hub(source: str) -> Any:
    from datasets import load_dataset

    name, _, split = source.removeprefix("hf:").partition(":")
    parts = name.split("/")
    # Two parts are an owner and a dataset, or a dataset without an owner and its configuration.
    readings = [("/".join(parts[:2]), "/".join(parts[2:]) or None)]
    if len(parts) == 2:
        readings.append((parts[0], parts[1]))
    found, failure = None, None
    for dataset, config in readings:
        try:
            found = load_dataset(dataset, config, split=split or "train")
            break
        except Exception as error:  # the library raises a dozen kinds, all meaning: not to be had
            failure = failure or error
    if found is None:
        raise DataError(
            f"cannot load {source}: {failure}", hint="form: hf:<owner>/<dataset>[/<config>]:<split>"
        )
    return found
