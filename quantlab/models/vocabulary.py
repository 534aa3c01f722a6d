"""Whether every token that a tokenizer makes has a row in its model's embedding, from the files alone (no torch).

Tokens are added to a tokenizer more easily than rows to a model. A token without a row ends in ``index out of range``
the first time a text holds it, hours into a run; a padding token without one does at the first batch. So the highest
id that the tokenizer's files can make, and the ids of special tokens in the configurations, are compared with the
embedding before anything starts.

Not covered: tokenizers that are only a SentencePiece model or code of their own; ``load.load_tokenizer`` compares those
once they are loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantlab.errors import DataError
from quantlab.models.safetensors.files import ModelFiles, TensorInfo

LOOKUP = re.compile(
    r"(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|token_embedding|embeddings?)\.weight$"
)
NOT_TOKENS = re.compile(r"pos|wpe|token_type|rotary|norm")
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LISTED = ("additional_special_tokens", "extra_special_tokens")
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def refuse_foreign_tokens(files: ModelFiles) -> None:
    """Refuse a model whose tokenizer, or whose configuration, names tokens that its embedding has no row for.

    Raises:
        DataError: names the token, its id and the number of rows.
    """
    rows = embedding_rows(files)
    if rows is None:
        return
    tokens = stored_tokens(files.path)
    if tokens:
        token, number = max(tokens.items(), key=lambda pair: pair[1])
        refuse_beyond(files.name, token, number, rows, sum(i >= rows for i in tokens.values()))
    for file, key, number in _special_ids(files):
        # -1 has been written for "none" since the first Llama conversions, and torch counts it from the end.
        if number >= rows or number < -1 or (number == -1 and key != "pad_token_id"):
            raise DataError(
                f"{files.name}: {key} in {file} is {number}, the model's embedding has rows 0 to {rows - 1}",
                hint=f"correct {key} in {file}, or resize the model: model.resize_token_embeddings(len(tokenizer))",
            )


def refuse_beyond(called: str, token: str, number: int, rows: int, count: int = 1) -> None:
    """Refuse a token whose id is beyond an embedding of ``rows``; ``count``: how many tokens are.

    Raises:
        DataError: names the token and both sizes.
    """
    if number < rows:
        return
    others = f" ({count} tokens are beyond it)" if count > 1 else ""
    raise DataError(
        f"{called}: the tokenizer has token {token!r} with id {number}, the model's embedding has {rows} rows{others}",
        hint="resize the model and save it again: model.resize_token_embeddings(len(tokenizer)); "
        "or take the added tokens out of the tokenizer",
    )


def embedding_rows(files: ModelFiles) -> int | None:
    """Rows of the matrix that token ids are looked up in; what the configuration says where no tensor is called like
    one, None where that says nothing either."""
    found = [t for name, t in files.tensors.items() if _is_lookup(name, t)]
    if found:
        return max(t.shape[0] for t in found)
    size = files.config.get("vocab_size")
    return size if isinstance(size, int) and size > 0 else None


def _is_lookup(name: str, tensor: TensorInfo) -> bool:
    inside = re.search(r"\.\d+\.", name)  # of a block
    return not inside and len(tensor.shape) == 2 and bool(LOOKUP.search(name)) and not NOT_TOKENS.search(name)


def stored_tokens(path: Path) -> dict[str, int]:
    """Every token that the tokenizer's JSON files give an id, special ones that transformers would append included;
    empty where there is no ``tokenizer.json`` or ``vocab.json``."""
    described = _json(path / "tokenizer.json")
    model = described.get("model") if isinstance(described.get("model"), dict) else {}
    tokens = _vocabulary(model.get("vocab") if isinstance(model, dict) else None)
    tokens = tokens or _vocabulary(_json(path / "vocab.json"))
    if not tokens:
        return {}
    for entry in described.get("added_tokens") or []:
        if isinstance(entry, dict) and isinstance(entry.get("id"), int):
            tokens[str(entry.get("content"))] = entry["id"]
    for token, number in _vocabulary(_json(path / "added_tokens.json")).items():
        # beside tokenizer.json: appended
        tokens.setdefault(token, max(tokens.values()) + 1 if described else number)
    settings = _json(path / "tokenizer_config.json")
    decoder = settings.get("added_tokens_decoder")
    for number, entry in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(entry, dict) and str(number).isdecimal():
            tokens[str(entry.get("content"))] = int(number)
    for name in [*_named_specials(settings), *_named_specials(_json(path / "special_tokens_map.json"))]:
        tokens.setdefault(name, max(tokens.values()) + 1)  # transformers appends what no file gives an id
    return tokens


def _vocabulary(content: Any) -> dict[str, int]:
    """Token to id: an object of ids, or (Unigram) a list of tokens with scores, whose places are the ids."""
    if isinstance(content, dict):
        return {str(token): i for token, i in content.items() if isinstance(i, int)}
    if isinstance(content, list):
        return {str(entry[0]): i for i, entry in enumerate(content) if isinstance(entry, list) and entry}
    return {}


def _named_specials(settings: Mapping[str, Any]) -> Iterator[str]:
    listed: list[Any] = [settings.get(key) for key in NAMED]
    for key in LISTED:
        group = settings.get(key)
        listed += (
            group if isinstance(group, list) else list(group.values()) if isinstance(group, dict) else []
        )
    for entry in listed:
        content = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(content, str) and content:
            yield content


def _special_ids(files: ModelFiles) -> Iterator[tuple[str, str, int]]:
    """(file, key, id) of every special token that the configurations name by its id."""
    for file, content in (
        ("config.json", files.config),
        ("generation_config.json", _json(files.path / "generation_config.json")),
    ):
        for key in SPECIAL_IDS:
            value = content.get(key)
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int) and not isinstance(number, bool):
                    yield file, key, number


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none, or none that can be read: its reader will say so."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
