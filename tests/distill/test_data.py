"""Tokens, labels and packing: what is learned, what sees what, and that packing changes no number."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from quantlab.distill import packed_attention
from quantlab.distill.data import IGNORED, Block, Example, collate, encode, encode_texts, pack, split_off
from quantlab.errors import DataError
from quantlab.models.load import load_model, load_tokenizer
from quantlab.models.safetensors.files import open_files
from quantlab.text2sql.data.item import Item
from quantlab.text2sql.prompt.prompt import build_prompt

from ..conftest import byte_tokenizer

ITEMS = [
    Item("a", "2", "CREATE TABLE t (x INT);", "x는?", "SELECT x FROM t"),
    Item("b", "2", "CREATE TABLE t (x INT);", "모두 몇 개?", "SELECT COUNT(*) FROM t;  "),
    Item("c", "3", "CREATE TABLE u (y INT);", "y는?", "SELECT y FROM u;"),
]


def families(seed: int = 0, count: int = 3, size: int = 4) -> list[Example]:
    """Rows in families that begin alike; tokens below 250, lengths that differ."""
    rng = random.Random(seed)
    rows = []
    for family in range(count):
        beginning = [rng.randrange(1, 250) for _ in range(rng.randrange(3, 30))]
        for number in range(size):
            own = [rng.randrange(1, 250) for _ in range(rng.randrange(2, 12))]
            answer = [rng.randrange(1, 250) for _ in range(rng.randrange(1, 8))]
            rows.append(
                Example(f"{family}-{number}", (*beginning, *own, *answer, 0), len(answer) + 1, f"f{family}")
            )
    return rows


def test_only_the_answer_and_its_end_are_learned() -> None:
    tokenizer = byte_tokenizer()
    examples, too_long = encode(ITEMS, tokenizer, 2000)
    assert not too_long
    for item, example, sql in zip(
        ITEMS, examples, ("SELECT x FROM t;", "SELECT COUNT(*) FROM t;", "SELECT y FROM u;")
    ):
        block = pack([example], "none", 2000)[0]
        learned = [label for label in block.labels if label != IGNORED]
        assert learned[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(learned[:-1]) == sql
        prompt = [t for t, label in zip(block.tokens, block.labels) if label == IGNORED]
        assert tokenizer.decode(prompt) == build_prompt(item.context, item.question)


def test_what_is_learned_follows_the_same_tokens_as_at_inference() -> None:
    """The prompt stands alone when the model is asked; its tokens must be the same in training."""
    tokenizer = load_tokenizer(open_files("embedded:base"))
    examples, _ = encode(ITEMS, tokenizer, 2000)
    for item, example in zip(ITEMS, examples):
        asked = tokenizer(build_prompt(item.context, item.question))["input_ids"]
        assert list(example.tokens[: len(asked)]) == asked
        assert example.positions()[0] == len(asked) - 1


def test_rows_that_are_too_long_are_left_out_and_named() -> None:
    examples, too_long = encode(ITEMS, byte_tokenizer(), 400)
    assert [example.id for example in examples] + too_long == ["a", "b", "c"] or set(too_long) == {"b"}
    assert all(len(example.tokens) <= 400 for example in examples)


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="end-of-sequence"):
        encode(ITEMS, tokenizer, 2000)


def test_texts_become_windows_where_all_but_the_first_token_is_learned() -> None:
    windows = encode_texts(["one two", "three"], byte_tokenizer(), 5)
    stream = [token for window in windows for token in window.tokens]
    assert byte_tokenizer().decode(stream) == "one two</s>three</s>"
    assert [len(window.tokens) for window in windows] == [5, 5, 4]
    assert all(window.learned == len(window.tokens) - 1 for window in windows)


def test_rows_for_evaluation_are_set_aside_by_the_seed() -> None:
    rows = families()
    learned, kept = split_off(rows, 0.25, 7)
    assert len(kept) == 3 and len(learned) == 9 and not {e.id for e in learned} & {e.id for e in kept}
    assert split_off(rows, 0.25, 7) == (learned, kept) != split_off(rows, 0.25, 8)
    assert split_off(rows, 0.0, 7) == (rows, [])


@given(st.integers(0, 10_000), st.sampled_from(["none", "rows", "shared"]), st.integers(20, 120))
@settings(max_examples=60, deadline=None)
def test_packing_keeps_every_row_once_and_whole(seed: int, how: str, max_len: int) -> None:
    rows = families(seed)
    blocks = pack(rows, how, max_len, seed)
    assert sorted(e.id for block in blocks for e in block.examples) == sorted(e.id for e in rows)
    for block in blocks:
        longest = max(len(example.tokens) for example in block.examples)
        assert len(block) <= max(max_len, longest)
        learned = [label for label in block.labels if label != IGNORED]
        assert learned == [t for e in block.examples for t in e.tokens[-e.learned :]]
        check_what_is_seen(block)


def check_what_is_seen(block: Block) -> None:
    """A learned token sees exactly its own row's tokens up to itself, at that row's positions."""
    mask = collate([block], 0, True)["attention_mask"][0, 0]
    at = [i for i, label in enumerate(block.labels) if label != IGNORED]
    for example in block.examples:
        mine, at = at[: example.learned], at[example.learned :]
        last = mine[-1]
        seen = mask[last].nonzero()[:, 0].tolist()
        assert [block.tokens[i] for i in seen] == list(example.tokens)
        assert [block.positions[i] for i in seen] == list(range(len(example.tokens)))


def test_shared_beginnings_are_stored_once() -> None:
    rows = families(count=2, size=6)
    separate = sum(map(len, pack(rows, "none", 2000)))
    shared = sum(map(len, pack(rows, "shared", 2000)))
    assert shared < 0.7 * separate


def losses(model: Any, blocks: Sequence[Block], how: str) -> tuple[float, torch.Tensor]:
    """Loss per learned token and the gradients, computed in one of three ways."""
    model.zero_grad()
    model.set_attn_implementation(packed_attention.NAME if how == "groups" else "sdpa")
    batch = collate(blocks, 0, how != "separate")
    extra: dict[str, Any] = {"attention_mask": batch["attention_mask"]}
    if how == "groups":
        extra = {"packed_layout": packed_attention.layout_of(blocks)}
    logits = model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, **extra
    ).logits
    labels = batch["labels"][:, 1:]
    learned = labels != IGNORED
    loss = cross_entropy(logits[:, :-1][learned], labels[learned])
    loss.backward()
    return float(loss.detach()), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("packing", ["rows", "shared"])
def test_packed_training_is_the_training_of_separate_rows(tiny: Path, packing: str) -> None:
    packed_attention.register()
    model = load_model(tiny, device="cpu", dtype="float32").model
    rows = families(seed=3)
    wanted, gradient = losses(model, pack(rows, "none", 120), "separate")
    for how in ("mask", "groups"):
        found, other = losses(model, pack(rows, packing, 120), how)
        assert found == pytest.approx(wanted, abs=1e-5)
        assert torch.allclose(other, gradient, atol=1e-5, rtol=1e-3), how


def test_without_a_layout_the_packed_attention_is_ordinary(tiny: Path) -> None:
    packed_attention.register()
    model = load_model(tiny, device="cpu", dtype="float32").model
    ids = torch.arange(1, 41)[None]
    wanted = model(ids).logits
    model.set_attn_implementation(packed_attention.NAME)
    assert torch.allclose(model(ids).logits, wanted, atol=1e-5)
