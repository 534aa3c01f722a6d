"""Greedy generation in batches that stops as soon as every answer holds a complete SQL statement.

Prompts are sorted by length and padded on the left. A row is done when the model ends the sequence, or when
its text holds a complete statement and something more: what follows the statement shows whether the model
would have stopped by itself. When half of a batch is done, the other half goes on alone, with its part of the cache.
Only the answer's tokens are decoded. Whatever sampling the checkpoint suggests in its generation config is put aside,
so every model is decoded in the same way.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from quantlab.evals.kv_cache import Caches
from quantlab.progress import Advance
from quantlab.text2sql.extraction.extract import rest_is_nothing, statement_end
from quantlab.text2sql.prompt.prompt import prompt_encoder

LOOK_EVERY = 8  # tokens between two looks at a row that has shown no sign of a statement's end
REST_CHARACTERS = 32  # blanks and closing fences after a statement that are waited through
LEAST_ROWS = 8  # fewer go on together until the last is done: a step costs the same for one and for eight


@dataclass(frozen=True)
class Generation:
    """`text` without the prompt and without special tokens. `ended`: the model wrote its end-of-sequence token."""

    text: str
    tokens: int
    ended: bool
    full: bool  # max_new_tokens were used up before the row was done


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    batch_size: int,
    max_new_tokens: int,
    device: str,
    stop_at_statement: bool = True,
    caches: Caches | None = None,
    advance: Advance | None = None,
) -> list[Generation]:
    """Answers in the order of `prompts`, the longest prompts run first. `caches` makes those of the batches, where the
    model's own will not do."""
    caches = caches or Caches(model, None)
    batch_size = min(batch_size, getattr(model, "most_rows", batch_size))
    encoded = prompt_encoder(tokenizer)(prompts)
    order = sorted(range(len(prompts)), key=lambda index: -len(encoded[index]))
    results: dict[int, Generation] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows = [encoded[index] for index in chosen]
        watch = _Watch(tokenizer, _end_ids(model, tokenizer), len(rows), stop_at_statement)
        with caches.fresh() as cache:
            _run(model, tokenizer, rows, watch, max_new_tokens, device, cache)
        for index, row in zip(chosen, watch.all_rows, strict=True):
            text = tokenizer.decode(row.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            results[index] = Generation(text, len(row.tokens), row.ended, not row.done)
        if advance is not None:
            advance(len(rows))
    return [results[index] for index in range(len(prompts))]


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, attention mask), int64 [rows, longest]."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.tensor(row, dtype=torch.int64)
        mask[index, longest - len(row) :] = 1
    return ids, mask


@torch.inference_mode()
def _run(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Sequence[int]],
    watch: _Watch,
    max_new_tokens: int,
    device: str,
    cache: Any,
) -> None:
    ends = sorted(watch.end_ids)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends[0] if ends else 0)
    ids, mask = (part.to(device) for part in pad_left(rows, pad))
    longest = ids.shape[1] + max_new_tokens
    if cache is None:
        cache = _parted_cache(model)
        watch.parts = cache is not None
    config = GenerationConfig(
        do_sample=False, num_beams=1, max_length=longest, pad_token_id=pad, eos_token_id=ends or None
    )
    while True:
        with _own_config(model, config):
            ids = model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([watch]),
                **({"past_key_values": cache} if cache is not None else {}),
            )
        kept = watch.keep_unfinished()
        if not watch.parts or not kept or ids.shape[1] >= longest:
            return
        chosen = torch.tensor(kept)  # on the CPU: a cache may lie on several devices
        mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)[chosen]
        ids = ids[chosen]
        cache.batch_select_indices(chosen)


def _parted_cache(model: Any) -> DynamicCache | None:
    """A cache out of which rows can be taken, where the model keeps keys and values alone; None: it makes its own."""
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        return None
    if not getattr(model, "_supports_default_dynamic_cache", bool)():  # bool() is False
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return cache if cache.layers and all(type(layer) in plain for layer in cache.layers) else None


@contextmanager
def _own_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    """transformers fills what a given config leaves open from the model's own: put that one aside."""
    kept = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = kept


def _end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends a sequence: the generation config's (one or several) and the tokenizer's."""
    named = getattr(model.generation_config, "eos_token_id", None)
    ids = set(named) if isinstance(named, list | tuple) else {named}
    ids.add(tokenizer.eos_token_id)
    return frozenset(int(token) for token in ids if token is not None)


@dataclass
class _Row:
    tokens: list[int]
    ended: bool = False
    done: bool = False
    signs: bool = False  # a token that can end a statement was seen


class _Watch(StoppingCriteria):
    """Follows every row of a batch; called by `generate` after each token.

    `rows` are those that are being generated. With `parts` it says stop when half of them are done.
    """

    def __init__(self, tokenizer: Any, end_ids: frozenset[int], rows: int, stop_at_statement: bool) -> None:
        self.tokenizer = tokenizer
        self.end_ids = end_ids
        self.stop_at_statement = stop_at_statement
        self.all_rows = [_Row([]) for _ in range(rows)]
        self.rows = self.all_rows
        self.parts = False
        self.stopped = False
        self.signs = _sign_ids(tokenizer) if stop_at_statement else frozenset()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if not self.stopped:  # on GPUs `generate` may run on for a step, and take it back
            for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
                if not row.done:
                    self._follow(row, token)
            left = sum(not row.done for row in self.rows)
            few = self.parts and len(self.rows) > LEAST_ROWS and left <= len(self.rows) // 2
            self.stopped = few or not left
        return torch.tensor([self.stopped or row.done for row in self.rows], device=input_ids.device)

    def keep_unfinished(self) -> list[int]:
        """Go on with the rows that are not done; their places among those there were."""
        kept = [place for place, row in enumerate(self.rows) if not row.done]
        self.rows = [self.rows[place] for place in kept]
        self.stopped = False
        return kept

    def _follow(self, row: _Row, token: int) -> None:
        if token in self.end_ids:
            row.ended = row.done = True
            return
        row.tokens.append(token)
        row.signs = row.signs or token in self.signs
        if not self.stop_at_statement or not (row.signs or len(row.tokens) % LOOK_EVERY == 0):
            return
        text = self.tokenizer.decode(row.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        end = statement_end(text)
        if end is not None:
            rest = text[end:]
            row.done = len(rest) > REST_CHARACTERS or not rest_is_nothing(rest)


def _sign_ids(tokenizer: Any) -> frozenset[int]:
    """Tokens that hold a semicolon, a heading or a fence, also as byte tokens."""
    words = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    signs = (";", "#", "`", "<0x3B>")
    return frozenset(
        index
        for index, word in enumerate(words)
        if word is not None and any(sign in str(word) for sign in signs)
    )
