"""Documents to token ids, as the model at hand sees them in use.

Texts are joined with a blank line and tokenised once, without special tokens. A conversation is rendered by the model's
chat template, which writes the special tokens itself, and tokenised by itself: these are the ids that
``apply_chat_template`` gives. An instruction is rendered as a conversation of two messages where the model has a
template, else it is a text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from quantlab.calibration.documents import SEPARATOR, Document
from quantlab.errors import DataError, first_line


def is_templated(document: Document, tokenizer: Any) -> bool:
    """Whether a document goes through the chat template.

    Raises:
        DataError: it is a conversation, and the model has no template.
    """
    if document.kind == "text":
        return False
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if document.kind == "messages" and not has_template:
        raise DataError(
            f"{document.place}: messages need a chat template, and this model's tokenizer has none",
            hint='give rows of "text" as the model sees them in use, or a model with a chat template',
        )
    return has_template


def render(document: Document, tokenizer: Any) -> str:
    """A document through the chat template.

    Raises:
        DataError: the template refuses it, naming the row.
    """
    try:
        return str(tokenizer.apply_chat_template([*document.messages], tokenize=False))
    except Exception as error:  # a template is a program of the model's: it raises what it likes
        raise DataError(f"{document.place}: the chat template refuses it: {first_line(error)}") from error


def packed_ids(documents: Iterable[Document], tokenizer: Any) -> list[int]:
    """All documents one after the other."""
    ids: list[int] = []
    for templated, run in groupby(documents, key=lambda document: is_templated(document, tokenizer)):
        if templated:
            for one in _encode([render(document, tokenizer) for document in run], tokenizer):
                ids += one
        else:
            ids += _encode([SEPARATOR.join(document.text for document in run)], tokenizer)[0]
    return ids


def separate_ids(documents: Sequence[Document], tokenizer: Any) -> list[list[int]]:
    """Each document by itself."""
    texts = [render(d, tokenizer) if is_templated(d, tokenizer) else d.text for d in documents]
    return _encode(texts, tokenizer) if texts else []


def opening_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text of its own accord: the token that begins a text, or nothing."""
    plain, full = _encode(["a"], tokenizer)[0], list(tokenizer("a", verbose=False)["input_ids"])
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    return []


def special_ids(tokenizer: Any) -> set[int]:
    """Tokens that stand for no text: those of beginnings and ends, roles, padding."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}


def _encode(texts: list[str], tokenizer: Any) -> list[list[int]]:
    found: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return found
