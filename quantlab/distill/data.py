"""Rows become token sequences whose answers alone are learned, one by one or packed without contamination.

A row is a prompt and an answer that ends with the end-of-sequence token, so the student learns to stop. The loss
counts answer tokens only. Three ways to lay rows into blocks, all with the same loss for every row:

* ``none``: a row a block, padded on the right.
* ``rows``: several rows in one block of at most ``max_len`` tokens; each attends to itself alone, its positions start
  at 0.
* ``shared``: rows whose prompts begin alike (the same instruction and DDL) keep one copy of that beginning. Every
  row's own part attends to the shared beginning and to itself, and its positions go on where the beginning ends. In a
  decoder the beginning never sees what follows, so the numbers are those of separate rows, at a fraction of the tokens.

Packing is described by two numbers a token: its ``group`` (rows that share a beginning) and its ``segment`` in the
group (0 the beginning, 1, 2, … the rows). A token attends to earlier tokens of its group that are in segment 0 or in
its own segment.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from quantlab.errors import DataError
from quantlab.text2sql.data.item import Item
from quantlab.text2sql.prompt.prompt import Prompt, build_prompts, complete_statement, prompt_encoder

IGNORED = -100  # label of a token that is not learned


@dataclass(frozen=True)
class Example:
    """Tokens of one row: the last ``learned`` are learned; rows of the same ``shares`` may begin alike."""

    id: str
    tokens: tuple[int, ...]
    learned: int
    shares: str = ""

    def digest(self) -> str:
        """Names the tokens and which of them are learned."""
        return hashlib.sha256(json.dumps([self.learned, *self.tokens]).encode()).hexdigest()[:16]

    def positions(self) -> list[int]:
        """Where the model's next-token prediction is learned, int [learned]."""
        return list(range(len(self.tokens) - self.learned - 1, len(self.tokens) - 1))


@dataclass
class Block:
    """One sequence of the batch; all lists have its length, ``examples`` are in the order of their learned tokens."""

    tokens: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)


def encode(
    items: Sequence[Item], tokenizer: Any, max_len: int, prompts: Sequence[Prompt] | None = None
) -> tuple[list[Example], list[str]]:
    """Examples of Text2SQL rows, and the ids of rows that are left out: longer than ``max_len`` tokens, or with a
    prompt that would be cut when the model is asked.

    ``prompts`` are those that the model will be evaluated with, by default the plain ones. Prompt and answer are
    tokenized apart, as at inference, where the prompt stands alone.
    """
    if not items:
        return [], []
    end = end_token(tokenizer)
    prompts = build_prompts(items) if prompts is None else prompts
    asked = prompt_encoder(tokenizer)([prompt.text for prompt in prompts])
    answers = tokenizer(
        [complete_statement(item.answer) for item in items], add_special_tokens=False
    )["input_ids"]  # fmt: skip
    examples, too_long = [], []
    for item, prompt, before, answer in zip(items, prompts, asked, answers, strict=True):
        tokens = (*before, *answer, end)
        if len(tokens) > max_len or not prompt.whole:
            too_long.append(item.id)
        else:
            examples.append(Example(item.id, tokens, len(answer) + 1, prompt.beginning))
    return examples, too_long


def encode_texts(texts: Iterable[str], tokenizer: Any, max_len: int) -> list[Example]:
    """Plain texts, joined by the end-of-sequence token, cut into windows; all but a window's first token is learned."""
    end = end_token(tokenizer)
    stream: list[int] = []
    for text in texts:
        stream += [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], end]
    windows = [stream[start : start + max_len] for start in range(0, len(stream), max_len)]
    return [
        Example(f"window-{number}", tuple(window), len(window) - 1)
        for number, window in enumerate(windows, start=1)
        if len(window) >= 2
    ]


def end_token(tokenizer: Any) -> int:
    """The end-of-sequence token; DataError for a tokenizer without one."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the student's tokenizer has no end-of-sequence token, so it could not learn to stop",
            hint="set eos_token in its tokenizer_config.json",
        )
    return int(tokenizer.eos_token_id)


def split_off(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(to learn, to evaluate on): ``share`` of the examples, at least one, is kept apart; none where it is 0."""
    if not share or len(examples) < 2:
        return list(examples), []
    order = list(range(len(examples)))
    random.Random(f"evaluation {seed}").shuffle(order)
    kept = set(order[: max(1, round(share * len(examples)))])
    learned = [example for number, example in enumerate(examples) if number not in kept]
    return learned, [examples[number] for number in sorted(kept)]


def pack(examples: Sequence[Example], how: str, max_len: int, seed: int = 0) -> list[Block]:
    """Blocks of at most ``max_len`` tokens (a single longer example gets its own block), in a seeded order."""
    rng = random.Random(seed)
    shuffled = list(examples)
    rng.shuffle(shuffled)
    if how == "none":
        return [_block([[example]]) for example in shuffled]
    groups = [[example] for example in shuffled] if how == "rows" else list(_share(shuffled, max_len))
    rng.shuffle(groups)
    blocks = [_block(chosen) for chosen in _fit(groups, max_len)]
    rng.shuffle(blocks)
    return blocks


def _share(examples: Sequence[Example], max_len: int) -> Iterable[list[Example]]:
    """Groups of examples with a common beginning, each group at most ``max_len`` tokens when laid out."""
    families: dict[str, list[Example]] = {}
    for example in examples:
        families.setdefault(example.shares or example.id, []).append(example)
    for family in families.values():
        common = _common(family)
        group: list[Example] = []
        length = common
        for example in family:
            own = len(example.tokens) - common
            if group and length + own > max_len:
                yield group
                group, length = [], common
            group.append(example)
            length += own
        yield group


def _common(group: Sequence[Example]) -> int:
    """How many first tokens all examples have in common, never reaching the token before the first learned one."""
    if len(group) == 1:
        return 0
    limit = min(len(example.tokens) - example.learned - 1 for example in group)
    first = group[0].tokens
    for index in range(max(limit, 0)):
        if any(example.tokens[index] != first[index] for example in group):
            return index
    return max(limit, 0)


def _length(group: Sequence[Example]) -> int:
    common = _common(group)
    return common + sum(len(example.tokens) - common for example in group)


def _fit(groups: Sequence[list[Example]], max_len: int) -> Iterable[list[list[Example]]]:
    """First fit, longest first: lists of groups whose lengths together are at most ``max_len``."""
    bins: list[tuple[int, list[list[Example]]]] = []
    open_from = 0  # bins before it are full for everything that still comes
    ordered = sorted(groups, key=_length, reverse=True)
    shortest = _length(ordered[-1]) if ordered else 0
    for group in ordered:
        length = _length(group)
        for index in range(open_from, len(bins)):
            used, chosen = bins[index]
            if used + length <= max_len:
                chosen.append(group)
                bins[index] = (used + length, chosen)
                break
        else:
            bins.append((length, [group]))
        while open_from < len(bins) and bins[open_from][0] + shortest > max_len:
            open_from += 1
    return [chosen for _, chosen in bins]


def _block(groups: Sequence[Sequence[Example]]) -> Block:
    block = Block()
    for number, group in enumerate(groups):
        common = _common(group)
        if common:
            _append(block, group[0].tokens[:common], 0, number, 0, 0)
        for segment, example in enumerate(group, start=1):
            own = example.tokens[common:]
            _append(block, own, common, number, segment, example.learned)
            block.examples.append(example)
    return block


def _append(
    block: Block, tokens: Sequence[int], position: int, group: int, segment: int, learned: int
) -> None:
    count = len(tokens)
    block.tokens += tokens
    block.labels += [IGNORED] * (count - learned) + list(tokens[count - learned :])
    block.positions += range(position, position + count)
    block.groups += [group] * count
    block.segments += [segment] * count


def collate(blocks: Sequence[Block], pad: int, packed: bool, multiple: int = 1) -> dict[str, torch.Tensor]:
    """A batch, padded on the right to a length L: that of its longest block, rounded up to a ``multiple``.

    ``input_ids``, ``labels``, ``position_ids``: int64 [B, L]. ``attention_mask``: int64 [B, L] for rows that stand
    alone; bool [B, 1, L, L] for packed blocks, True where the row's token may look at the column's.
    """
    longest = max(len(block) for block in blocks)
    longest += -longest % multiple

    def stack(name: str, fill: int) -> torch.Tensor:
        rows = [getattr(block, name) + [fill] * (longest - len(block)) for block in blocks]
        return torch.tensor(rows, dtype=torch.int64)

    batch = {
        "input_ids": stack("tokens", pad),
        "labels": stack("labels", IGNORED),
        "position_ids": stack("positions", 0),
    }
    if packed:
        batch["attention_mask"] = visible(stack("groups", -1), stack("segments", 0))[:, None]
    else:
        batch["attention_mask"] = (stack("groups", -1) >= 0).long()
    return batch


def visible(groups: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    """bool [B, L, L] from int [B, L]: earlier or equal, of the same group, in its beginning or in the same segment.

    Padding is a group of its own, so that no row of the mask is empty (a softmax over nothing is not a number).
    """
    length = groups.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=groups.device).tril()
    same_group = groups[:, :, None] == groups[:, None, :]
    own = (segments[:, None, :] == 0) | (segments[:, :, None] == segments[:, None, :])
    return earlier & same_group & own
