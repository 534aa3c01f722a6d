"""Batched generation: the same as one by one, and stopping at the statement."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from quantlab.evals import generation
from quantlab.evals.generation import _Watch as Watch
from quantlab.evals.generation import generate, pad_left
from quantlab.models.load import load_model
from quantlab.text2sql.data.dataset import load_items

PROMPTS = ["SELECT", "The players like small games. SELECT name", "선수 이름을 모두", "CREATE TABLE players"]


def texts(subject: Any, prompts: list[str], **options: Any) -> list[str]:
    settings = {"batch_size": 4, "max_new_tokens": 24, "device": "cpu", **options}
    return [found.text for found in generate(subject.model, subject.tokenizer, prompts, **settings)]


@pytest.mark.parametrize("which", ["tiny", "baby"])
def test_a_batch_says_what_one_by_one_says(which: str, request: pytest.FixtureRequest) -> None:
    subject = request.getfixturevalue(which)
    prompts = (
        PROMPTS
        if which == "tiny"
        else ["Once upon a time", "Lily", "The big dog ran to the park and", "He said"]
    )
    single = texts(subject, prompts, batch_size=1)
    assert texts(subject, prompts, batch_size=4) == single
    assert texts(subject, prompts, batch_size=3) == single
    assert len(set(single)) > 1


def test_agrees_with_a_plain_greedy_loop(tiny: Any) -> None:
    for prompt in PROMPTS:
        ids = tiny.tokenizer(prompt, return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        with torch.inference_mode():
            for _ in range(24):
                token = tiny.model(input_ids=ids).logits[0, -1].argmax()
                if token == tiny.tokenizer.eos_token_id:
                    break
                ids = torch.cat([ids, token.view(1, 1)], dim=1)
        expected = tiny.tokenizer.decode(ids[0, start:], skip_special_tokens=True)
        assert texts(tiny, [prompt], stop_at_statement=False) == [expected]


def test_what_the_checkpoint_suggests_is_put_aside_and_put_back(tiny: Any) -> None:
    plain = texts(tiny, PROMPTS)
    kept = tiny.model.generation_config
    try:
        tiny.model.generation_config = GenerationConfig(
            do_sample=True, temperature=5.0, repetition_penalty=3.0, eos_token_id=tiny.tokenizer.eos_token_id
        )
        suggested = tiny.model.generation_config
        assert texts(tiny, PROMPTS) == plain
        assert tiny.model.generation_config is suggested
    finally:
        tiny.model.generation_config = kept


def test_padding() -> None:
    ids, mask = pad_left([[5, 6, 7], [8]], pad=2)
    assert ids.tolist() == [[5, 6, 7], [2, 2, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def follow(tokenizer: Any, text: str, eos: bool, stop_at_statement: bool = True) -> tuple[Any, int]:
    """Feed a text token by token to a watched row; (the row, tokens until it was done)."""
    watch = Watch(tokenizer, frozenset({tokenizer.eos_token_id}), 1, stop_at_statement)
    tokens = tokenizer(text)["input_ids"] + ([tokenizer.eos_token_id] if eos else [])
    for count, token in enumerate(tokens, start=1):
        if bool(watch(torch.tensor([[0, token]]), None)[0]):
            return watch.rows[0], count
    return watch.rows[0], 0


def test_a_row_goes_on_until_it_is_seen_whether_it_stopped(tiny: Any) -> None:
    tokenizer = tiny.tokenizer
    row, _ = follow(tokenizer, "SELECT name FROM players;", eos=True)
    assert row.ended and row.done
    row, count = follow(tokenizer, "SELECT name FROM players; The players like small games.", eos=True)
    assert row.done and not row.ended
    assert tokenizer.decode(row.tokens).startswith("SELECT name FROM players;") and count < 40
    assert len(tokenizer.decode(row.tokens)) <= len("SELECT name FROM players; The players")
    row, _ = follow(tokenizer, "SELECT ';' FROM players", eos=False)
    assert not row.done
    row, _ = follow(tokenizer, "SELECT name FROM players\n\n### Question: The players", eos=False)
    assert row.done and not row.ended
    row, _ = follow(tokenizer, "SELECT name FROM players;" + "\n" * 60, eos=False)
    assert row.done and not row.ended
    row, _ = follow(tokenizer, "SELECT 1; SELECT 2; SELECT 3;", eos=True, stop_at_statement=False)
    assert row.ended and tokenizer.decode(row.tokens) == "SELECT 1; SELECT 2; SELECT 3;"


def test_rows_of_a_batch_stop_one_by_one(tiny: Any) -> None:
    tokenizer = tiny.tokenizer
    watch = Watch(tokenizer, frozenset({tokenizer.eos_token_id}), 2, True)
    eos = tokenizer.eos_token_id
    word = tokenizer("players")["input_ids"][0]
    assert watch(torch.tensor([[0, eos], [0, word]]), None).tolist() == [True, False]
    assert watch(torch.tensor([[0, eos], [0, word]]), None).tolist() == [True, False]  # padded behind its end
    assert watch.rows[0].tokens == [] and watch.rows[1].tokens == [word, word]


def test_the_unfinished_half_goes_on_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = load_model("embedded:base", device="cpu", dtype="float32")
    items = load_items("ko_text2sql/dev.jsonl", 24)
    # As the model knows them: it writes a query and goes on.
    prompts = [f"-- {item.question}\n" for item in items]
    widths: list[int] = []
    plain = type(subject.model).generate

    def watched(model: Any, **arguments: Any) -> Any:
        widths.append(len(arguments["input_ids"]))
        return plain(model, **arguments)

    monkeypatch.setattr(type(subject.model), "generate", watched)
    together = texts(subject, prompts, batch_size=24, max_new_tokens=64)
    assert widths[0] == 24 and len(widths) > 1
    assert all(later <= earlier // 2 for earlier, later in itertools.pairwise(widths))
    assert together == texts(subject, prompts, batch_size=1, max_new_tokens=64)
    monkeypatch.setattr(generation, "_parted_cache", lambda model: None)
    widths.clear()
    assert together == texts(subject, prompts, batch_size=24, max_new_tokens=64) and widths == [24]
