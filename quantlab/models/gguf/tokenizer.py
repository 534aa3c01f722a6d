"""The tokenizer of a GGUF file as Hugging Face's files: tokenizer.json, tokenizer_config.json, the chat template.

A file holds tokens with a type and, for SentencePiece, a score each; for byte-level byte-pair encoding (``gpt2``) also
the merges, and by name how text is cut before (``pretokenizers``). SentencePiece (``llama``) merges the pair whose
result has the highest score; as byte-pair encoding that is every way to put a token together from two others, those of
high scores first (``generate_merges`` of transformers). Written as plain JSON, without loading a library.

Not covered: other tokenizers than these two, further chat templates by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantlab.errors import DataError
from quantlab.models.gguf.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from quantlab.paths import nearest

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # types of tokens
LONGEST_TOKEN = 512  # characters; putting one together is tried at every place in it
SPACE = "\u2581"  # what SentencePiece writes for a space
ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
TEMPLATE = "tokenizer.chat_template"


def tokenizer_files(metadata: Mapping[str, Any], rows: int, positions: int, called: str) -> dict[str, str]:
    """Names and contents of the files. ``rows``: of the embedding, ``positions``: of the model, ``called``: what
    messages call the file.

    Raises:
        DataError: a kind of tokenizer that is not read, or parts of it that do not fit each other.
    """
    keys = _Keys(metadata, called)
    tokens, kinds = _tokens(keys, rows)
    special = _special(keys, tokens)
    model = keys.text("model")
    if model == "gpt2":
        known = _pre_tokenizer(keys)
        marks = _marks(keys, special, starts=known.starts)
        described = _byte_level(keys, tokens, kinds, known, _ends(marks, tokens))
    elif model == "llama":
        marks = _marks(keys, special, starts=True)
        described = _sentencepiece(keys, tokens, kinds, special, _ends(marks, tokens))
    else:
        raise DataError(f"{called}: its tokenizer is {model[:60]!r}, read are gpt2 and llama")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": positions,
        # Classes that transformers prefers for some models fill in what is not said.
        **{role: tokens[special[role]] if role in special else None for role in ROLES},
        **{f"add_{key}_token": True for key in marks},
    }
    files = {
        "tokenizer.json": json.dumps(described, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2),
    }
    template = metadata.get(TEMPLATE)
    if template is not None:
        if not isinstance(template, str):
            raise DataError(f"{called}: {TEMPLATE} is no text")
        files["chat_template.jinja"] = template
    return files


class _Keys:
    """Keys below ``tokenizer.ggml``, checked."""

    def __init__(self, metadata: Mapping[str, Any], called: str) -> None:
        self.metadata, self.called = metadata, called

    def value(self, key: str) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{key}")

    def text(self, key: str, default: str = "") -> str:
        value = self.value(key)
        if value is not None and not isinstance(value, str):
            raise self.refusal(key, "is no text")
        return default if value is None else value

    def flag(self, key: str, default: bool) -> bool:
        value = self.value(key)
        if value is not None and not isinstance(value, bool):
            raise self.refusal(key, "is neither true nor false")
        return default if value is None else value

    def texts(self, key: str) -> list[str]:
        value = self.value(key)
        if not isinstance(value, list) or not value:
            raise self.refusal(key, "is missing, or no list of texts")
        return value

    def numbers(self, key: str, count: int) -> NDArray[Any] | None:
        """One number a token; None where there are none."""
        value = self.value(key)
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or len(value) != count:
            raise self.refusal(key, f"is no list of one number for each of {count} tokens")
        return value

    def refusal(self, key: str, what: str) -> DataError:
        return DataError(f"{self.called}: tokenizer.ggml.{key} {what}")


def _tokens(keys: _Keys, rows: int) -> tuple[list[str], list[int]]:
    """Every token and its type."""
    tokens = [token or f"[EMPTY_{number}]" for number, token in enumerate(keys.texts("tokens"))]
    if len(tokens) > rows:
        raise DataError(f"{keys.called}: it has {len(tokens)} tokens, the model's embedding has {rows} rows")
    longest = max(tokens, key=len)
    if len(longest) > LONGEST_TOKEN:
        raise keys.refusal(
            "tokens", f"has one of {len(longest)} characters, at most {LONGEST_TOKEN} are allowed"
        )
    if len(set(tokens)) < len(tokens):
        seen: set[str] = set()
        twice = next(token for token in tokens if token in seen or seen.add(token))  # type: ignore[func-returns-value]
        raise keys.refusal("tokens", f"has {twice[:60]!r} twice")
    kinds = keys.numbers("token_type", len(tokens))
    return tokens, [1] * len(tokens) if kinds is None else [int(kind) for kind in kinds]


def _special(keys: _Keys, tokens: Sequence[str]) -> dict[str, int]:
    """The numbers of tokens with a role."""
    found = {}
    for role, key in ROLES.items():
        number = keys.value(key)
        if number is None:
            continue
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(tokens):
            raise keys.refusal(key, f"is {number!r}, there are {len(tokens)} tokens")
        found[role] = number
    return found


def _byte_level(
    keys: _Keys, tokens: Sequence[str], kinds: Sequence[int], known: PreTokenizer, ends: dict[str, Any] | None
) -> dict[str, Any]:
    vocabulary = {token: number for number, token in enumerate(tokens)}
    pairs = []
    for number, merge in enumerate(keys.texts("merges")):
        left, _, right = merge[1:].partition(" ")
        pair = [merge[:1] + left, right]
        if not all(part in vocabulary for part in (*pair, "".join(pair))):
            raise keys.refusal("merges", f"has {merge[:60]!r} (number {number}), which its tokens do not")
        pairs.append(pair)
    steps: list[dict[str, Any]] = [_split(expression) for expression in known.splits]
    steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False})
    return _described(
        vocabulary,
        pairs,
        _added(tokens, kinds),
        ends,
        ignore_merges=known.whole,
        normalizer={"type": "NFC"} if known.composed else None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": steps},
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    )


def _pre_tokenizer(keys: _Keys) -> PreTokenizer:
    name = keys.text("pre", "default")
    if name not in PRE_TOKENIZERS:
        near = nearest(name, PRE_TOKENIZERS)
        raise DataError(
            f"{keys.called}: how its text is cut into words is {name[:60]!r}, which is not known",
            hint=f"near it is {near}" if near else f"known are {', '.join(sorted(PRE_TOKENIZERS))}",
        )
    return PRE_TOKENIZERS[name]


def _split(expression: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


def _sentencepiece(
    keys: _Keys,
    tokens: Sequence[str],
    kinds: Sequence[int],
    special: Mapping[str, int],
    ends: dict[str, Any] | None,
) -> dict[str, Any]:
    # llama.cpp writes tokens of nothing but spaces with real ones; in the vocabulary they are SentencePiece's.
    spelled = [SPACE * len(token) if not token.strip(" ") else token for token in tokens]
    if len(set(spelled)) < len(spelled):
        raise keys.refusal("tokens", "has a token of spaces twice")
    scores = keys.numbers("scores", len(tokens))
    if scores is None or not np.isfinite(scores).all():
        raise keys.refusal("scores", "is missing, or not finite")
    added = [one for one in _added(spelled, kinds) if one["special"] or one["content"].strip(SPACE)]
    prefix = keys.flag("add_space_prefix", True)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    begin = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    ending = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    decoders = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *ending,
    ]
    if str(keys.metadata.get("general.architecture")).startswith(
        "gemma"
    ):  # whose scores are not the order of merging
        scores = -np.arange(len(tokens), dtype=np.float32)
    return _described(
        {token: number for number, token in enumerate(spelled)},
        _merges(spelled, kinds, scores),
        added,
        ends,
        byte_fallback=True,
        fuse_unk=True,
        unk_token=spelled[special["unk_token"]] if "unk_token" in special else None,
        normalizer={"type": "Sequence", "normalizers": [*begin, spaces]},
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": decoders},
    )


def _merges(tokens: Sequence[str], kinds: Sequence[int], scores: NDArray[Any]) -> list[list[str]]:
    """Every way to put a token of text together from two others, those of high scores first."""
    known = set(tokens)
    found: list[tuple[float, int, str]] = []
    for token, kind, score in zip(tokens, kinds, scores.tolist(), strict=True):
        if kind not in (UNKNOWN, CONTROL, BYTE):
            found += [
                (-score, -cut, token)
                for cut in range(1, len(token))
                if token[:cut] in known and token[cut:] in known
            ]
    return [[token[:-cut], token[-cut:]] for _, cut, token in sorted(found)]


def _added(tokens: Sequence[str], kinds: Sequence[int]) -> list[dict[str, Any]]:
    """Tokens that are found whole in a text, before it is cut."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": number, "content": token, **plain, "special": kind != USER_DEFINED}
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]


def _marks(keys: _Keys, special: Mapping[str, int], *, starts: bool) -> dict[str, int]:
    """The tokens that every text begins (``bos``) and ends (``eos``) with. ``starts``: whether it begins with one where
    the file does not say."""
    found = {}
    for key, default in (("bos", starts), ("eos", False)):
        if keys.flag(f"add_{key}_token", default):
            if f"{key}_token" in special:
                found[key] = special[f"{key}_token"]
            elif keys.value(f"add_{key}_token"):
                raise keys.refusal(
                    f"add_{key}_token", f"is true, and there is no tokenizer.ggml.{key}_token_id"
                )
    return found


def _ends(marks: Mapping[str, int], tokens: Sequence[str]) -> dict[str, Any] | None:
    """What puts the marks around a text; None without any."""
    if not marks:
        return None

    def template(*parts: tuple[str, int]) -> list[dict[str, Any]]:
        steps: list[dict[str, Any]] = []
        for part, type_id in parts:
            begin = [
                {"SpecialToken": {"id": tokens[n], "type_id": type_id}}
                for key, n in marks.items()
                if key == "bos"
            ]
            end = [
                {"SpecialToken": {"id": tokens[n], "type_id": type_id}}
                for key, n in marks.items()
                if key == "eos"
            ]
            steps += [*begin, {"Sequence": {"id": part, "type_id": type_id}}, *end]
        return steps

    named = {tokens[n]: {"id": tokens[n], "ids": [n], "tokens": [tokens[n]]} for n in marks.values()}
    return {
        "type": "TemplateProcessing",
        "single": template(("A", 0)),
        "pair": template(("A", 0), ("B", 1)),
        "special_tokens": named,
    }


def _described(
    vocabulary: Mapping[str, int],
    merges: list[list[str]],
    added: list[dict[str, Any]],
    ends: dict[str, Any] | None,
    *,
    normalizer: dict[str, Any] | None,
    pre_tokenizer: dict[str, Any] | None,
    decoder: dict[str, Any],
    unk_token: str | None = None,
    fuse_unk: bool = False,
    byte_fallback: bool = False,
    ignore_merges: bool = False,
) -> dict[str, Any]:
    """A tokenizer.json of byte-pair encoding."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": ends,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unk_token,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": fuse_unk,
            "byte_fallback": byte_fallback,
            "ignore_merges": ignore_merges,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
