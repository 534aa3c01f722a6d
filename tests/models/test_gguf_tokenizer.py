"""Tokenizers of GGUF files: SentencePiece merged as its own algorithm merges, text cut as each name of a cut says."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from quantlab.errors import DataError
from quantlab.models.gguf.pretokenizers import PRE_TOKENIZERS
from quantlab.models.gguf.tokenizer import SPACE, tokenizer_files

NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6
LETTERS = [SPACE, *"abcdehlot고"]
PIECES = [
    "he", "el", "ll", "lo", "la", "at", "th", "the", "hel", "hell", "hello", "llo", "all", "ball", "tall", f"{SPACE}t",
    f"{SPACE}the", f"{SPACE}h", f"{SPACE}hello", SPACE * 2, SPACE * 4, "ab", "aba", "ba", "bab",
]  # fmt: skip


def vocabulary() -> tuple[list[str], list[int], list[float]]:
    """Specials, all bytes, letters, then pieces with scores in an order of their own."""
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *LETTERS,
        *PIECES,
        "<|end|>",
    ]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(LETTERS) + len(PIECES)), USER]
    ranks = list(range(len(PIECES)))
    random.Random(3).shuffle(ranks)
    scores = [0.0] * 259 + [-1e6] * len(LETTERS) + [-float(rank) for rank in ranks] + [-1e9]
    return tokens, kinds, scores


def metadata(**changes: Any) -> dict[str, Any]:
    tokens, kinds, scores = vocabulary()
    keys = {
        "model": "llama", "tokens": tokens, "token_type": np.array(kinds), "scores": np.array(scores, np.float32),
        "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0,
    }  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in (keys | changes).items() if value is not None}


def made(**changes: Any) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_files(metadata(**changes), 1000, 64, "a file")["tokenizer.json"])


def merged(text: str) -> list[int]:
    """SentencePiece's algorithm, as llama.cpp has it: of all neighbours whose join is a token, the pair with the
    highest score is joined, the leftmost of equals, until there is none; what is no token is spelled in bytes."""
    tokens, _, scores = vocabulary()
    number = {token: place for place, token in enumerate(tokens)}
    parts = list(text)
    while True:
        joins = [
            (-scores[number[a + b]], place)
            for place, (a, b) in enumerate(itertools.pairwise(parts))
            if a + b in number
        ]
        if not joins:
            break
        place = min(joins)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    found = []
    for part in parts:
        spelled = [number[f"<0x{byte:02X}>"] for byte in part.encode()]
        found += [number[part]] if part in number else spelled
    return found


def test_sentencepiece_merges_as_its_own_algorithm() -> None:
    tokenizer, seeded = made(), random.Random(0)
    for _ in range(500):
        text = "".join(seeded.choice("abcdehlot고 x漢") for _ in range(seeded.randrange(1, 24)))
        expected = merged(SPACE + text.replace(" ", SPACE))
        assert tokenizer.encode(text, add_special_tokens=False).ids == expected, text
        assert tokenizer.decode(expected) == text


def test_marks_around_a_text() -> None:
    assert made().encode("a").ids == [1, *merged(f"{SPACE}a")]
    assert made(add_bos_token=False, add_eos_token=True).encode("a").ids == [*merged(f"{SPACE}a"), 2]
    assert made(bos_token_id=None).encode("a").ids == merged(f"{SPACE}a")
    assert made(add_bos_token=True).encode("a", "b").ids == [1, *merged(f"{SPACE}a"), 1, *merged(f"{SPACE}b")]
    with pytest.raises(DataError, match="add_bos_token is true, and there is no tokenizer.ggml.bos_token_id"):
        made(bos_token_id=None, add_bos_token=True)


def test_no_space_in_front_and_tokens_found_whole() -> None:
    tokenizer = made(add_space_prefix=False, add_bos_token=False)
    last = len(vocabulary()[0]) - 1
    assert tokenizer.encode("hello<|end|>the</s>").ids == [*merged("hello"), last, *merged("the"), 2]


def test_tokens_of_spaces_are_spelled_as_sentencepiece_does() -> None:
    tokens, kinds, scores = vocabulary()
    tokens += ["   "]
    tokenizer = made(
        tokens=tokens,
        token_type=np.array([*kinds, USER]),
        scores=np.array([*scores, 1.0]),
        add_bos_token=False,
    )
    assert tokenizer.token_to_id(SPACE * 3) == len(tokens) - 1
    assert tokenizer.encode("a   b").tokens == [SPACE, "a", SPACE * 3, "b"]


@pytest.mark.parametrize(
    "scores", [None, np.array([1.0]), np.full(297, np.nan, np.float32)], ids=["none", "few", "NaN"]
)
def test_scores_that_are_no_scores(scores: Any) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.ggml\.scores"):
        made(scores=scores)


# Words that a name cuts "I'll pay 12345 won, OK?  둘\n\n x" into.
CUTS = {
    "gpt-2": ["I", "'ll", " pay", " 12345", " won", ",", " OK", "?", " ", " 둘", "\n\n", " x"],
    "smollm": ["I", "'ll", " pay", " ", "1", "2", "3", "4", "5", " won", ",", " OK", "?", " ", " 둘", "\n\n", " x"],
    "llama-bpe": ["I", "'ll", " pay", " ", "123", "45", " won", ",", " OK", "?", " ", " 둘", "\n\n", " x"],
    "qwen2": ["I", "'ll", " pay", " ", "1", "2", "3", "4", "5", " won", ",", " OK", "?", " ", " 둘", "\n\n", " x"],
    "tekken": ["I", "'ll", " pay", " ", "1", "2", "3", "4", "5", " won", ",", " OK", "?", " ", " 둘", "\n\n", " x"],
    "gpt-4o": ["I'll", " pay", " ", "123", "45", " won", ",", " OK", "?", " ", " 둘", "\n\n", " x"],
}  # fmt: skip


def cut(name: str, text: str) -> list[str]:
    """The words that a text is cut into."""
    from tokenizers import Regex, pre_tokenizers

    steps = [pre_tokenizers.Split(Regex(e), "isolated") for e in PRE_TOKENIZERS[name].splits]
    return [word for word, _ in pre_tokenizers.Sequence(steps).pre_tokenize_str(text)]


@pytest.mark.parametrize("name", CUTS)
def test_words(name: str) -> None:
    assert cut(name, "I'll pay 12345 won, OK?  둘\n\n x") == CUTS[name]


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_nothing_is_lost_between_words(name: str) -> None:
    seeded = random.Random(1)
    for _ in range(50):
        text = "".join(seeded.choice("aB9 .,'\n\t가漢é²_$") for _ in range(30))
        assert "".join(cut(name, text)) == text


def test_byte_level_files() -> None:
    tokens = ["a", "b", "ab", "Ġ", "Ġab", "<|x|>", "é"]
    keys = {
        "model": "gpt2", "pre": "llama-bpe", "tokens": tokens, "token_type": np.array([1, 1, 1, 1, 1, 3, 1]),
        "merges": ["a b", "Ġ ab"], "scores": None, "bos_token_id": 5, "eos_token_id": None, "unknown_token_id": None,
    }  # fmt: skip
    files = tokenizer_files(metadata(**keys), 7, 64, "a file")
    tokenizer = Tokenizer.from_str(files["tokenizer.json"])
    assert tokenizer.encode("ab ab<|x|>a").ids == [5, 2, 4, 5, 0]  # such texts begin with a token unless told
    assert json.loads(files["tokenizer_config.json"])["bos_token"] == "<|x|>"
    assert "chat_template.jinja" not in files
