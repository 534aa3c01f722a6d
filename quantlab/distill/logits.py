"""A teacher's top-k log-probabilities: gathered once, kept on disk (`logit_store.py`), reused.

The teacher runs once over each example, in batches of like length; of every position that is learned, the K most likely
next tokens are kept and the mass of all others together.

**Temperature.** Values are taken at the temperature of the training, and belong to it. They cannot be re-tempered: with
r the mass of the rest, p_T(i) = p(i)^(1/T) / sum_j p(j)^(1/T), and what the rest adds to that normaliser is only known
to lie between r^(1/T) and (V - K)^(1 - 1/T) r^(1/T) for T > 1 (all on one token, or spread evenly). For T = 2,
V = 150,000 and r = 0.01 that is anything from 0.1 to 39. Hence the temperature is part of a store's identity.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock

from quantlab.distill.logit_store import (
    FORMAT,
    TopLogits,
    Writer,
    check_identity,
    example_digest,
    read_index,
    remove_leftovers,
    write_index,
)
from quantlab.distill.losses import VALUES_AT_ONCE
from quantlab.distill.vocabulary import same_vocabulary, vocabulary_digest
from quantlab.errors import DataError
from quantlab.progress import Advance, Progress

__all__ = [
    "Example",
    "TopLogits",
    "example_digest",
    "gather_logits",
    "same_vocabulary",
    "top_logprobs",
    "vocabulary_digest",
]

SHARD_POSITIONS = 2**16
SHARD_SECONDS = 60.0  # at most this much work is lost to a kill


class Example(NamedTuple):
    """Tokens, and those positions among them whose distribution over the next token is learned."""

    input_ids: Sequence[int]
    positions: Sequence[int]


def top_logprobs(
    logits: torch.Tensor, top_k: int, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is stored of `logits` [N, V]: log-probabilities of softmax(logits / temperature) float32 [N, K + 1], the
    last column being that of the rest (-inf where K = V), and the tokens int64 [N, K]."""
    scaled = logits.float() / temperature
    whole = torch.logsumexp(scaled, dim=1, keepdim=True)
    values, indices = scaled.topk(top_k, dim=1)
    rest = torch.logsumexp(scaled.scatter(1, indices, -torch.inf), dim=1, keepdim=True)
    return torch.cat([values, rest], dim=1) - whole, indices


def gather_logits(
    model: Any,
    examples: Iterable[tuple[Sequence[int], Sequence[int]]],
    store_path: Path,
    *,
    top_k: int,
    temperature: float,
    batch_tokens: int,
    device: str,
    identity: Mapping[str, str],
    progress: Progress,
    vocabulary: int | None = None,
    shard_positions: int = SHARD_POSITIONS,
) -> TopLogits:
    """Make sure that the store holds every one of `examples`; run the teacher on those that it lacks.

    Args:
        model: a causal language model of transformers, on `device`.
        examples: (input_ids, positions) each; repetitions are run once.
        batch_tokens: tokens in a batch, padding included; an example longer than that runs alone.
        identity: what the values depend on besides the examples, which are known by their content: digests of the
            teacher and of its vocabulary. `top_k`, `temperature` and `vocabulary` are added to it.
        vocabulary: only the first so many logits count (see `same_vocabulary`); default, all that the model has.

    Raises:
        DataError: the store was made from something else (says what differs), a shard is damaged, an example does not
            fit the model, or the teacher's logits are not numbers.
    """
    size = vocabulary or int(model.config.get_text_config().vocab_size)
    top_k = min(top_k, size)
    wanted = {
        **{key: str(value) for key, value in identity.items()},
        "top_k": str(top_k),
        "temperature": repr(float(temperature)),
        "vocabulary": str(size),
    }
    store_path.mkdir(parents=True, exist_ok=True)
    # Processes of one training start together: one gathers, the others wait and find it done.
    with FileLock(store_path / ".lock"):
        index = read_index(store_path, missing_ok=True)
        if not index:
            index = {"format": FORMAT, "identity": wanted, "shards": []}
            write_index(store_path, index)
        check_identity(store_path, index["identity"], wanted)
        index["shards"] = [shard for shard in index["shards"] if (store_path / shard["file"]).is_file()]
        remove_leftovers(store_path, index)
        known = TopLogits(store_path, index)
        todo = _missing(examples, known, int(model.config.get_text_config().vocab_size))
        if not todo:
            return known
        writer = Writer(store_path, index, size)
        tokens = sum(len(example.input_ids) for example in todo.values())
        with progress.task("teacher's log-probabilities", total=tokens) as advance:
            for counts, rows in _run(model, todo, top_k, temperature, batch_tokens, device, size, advance):
                writer.add(counts, *rows)
                if writer.positions >= shard_positions or writer.age() > SHARD_SECONDS:
                    writer.flush()
        writer.flush()
        return TopLogits(store_path, index)


def _missing(
    examples: Iterable[tuple[Sequence[int], Sequence[int]]], known: TopLogits, vocabulary: int
) -> dict[bytes, Example]:
    """Examples that are not in the store, each once. DataError for one that the model cannot read."""
    found = {}
    for number, (input_ids, positions) in enumerate(examples):
        if not input_ids or min(input_ids) < 0 or max(input_ids) >= vocabulary:
            raise DataError(f"example {number}: no tokens, or tokens outside the teacher's {vocabulary}")
        if positions and not 0 <= min(positions) <= max(positions) < len(input_ids):
            raise DataError(f"example {number}: positions outside its {len(input_ids)} tokens")
        digest = example_digest(input_ids, positions)
        if digest not in known:
            found[digest] = Example(input_ids, positions)
    return found


def _run(
    model: Any,
    todo: Mapping[bytes, Example],
    top_k: int,
    temperature: float,
    batch_tokens: int,
    device: str,
    vocabulary: int,
    advance: Advance,
) -> Iterator[tuple[list[tuple[bytes, int]], tuple[torch.Tensor, torch.Tensor]]]:
    """Batches of (digest and positions of each example), (log-probabilities [P, K + 1], tokens [P, K])."""
    selects = "logits_to_keep" in inspect.signature(model.forward).parameters
    training = model.training
    model.eval()
    try:
        for batch in _batches(todo, batch_tokens):
            with torch.inference_mode():
                chosen = _batch_logits(model, [todo[digest] for digest in batch], device, selects)
                if vocabulary > chosen.shape[1]:
                    raise DataError(f"the teacher has {chosen.shape[1]} logits, not {vocabulary}")
                size = max(1, VALUES_AT_ONCE // vocabulary)
                parts = [
                    top_logprobs(part, top_k, temperature) for part in chosen[:, :vocabulary].split(size)
                ]
                values, indices = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
            if bool(values.isnan().any()):
                raise DataError("the teacher's logits are not numbers", hint="load it as bfloat16 or float32")
            yield [(digest, len(todo[digest].positions)) for digest in batch], (values, indices)
            advance(sum(len(todo[digest].input_ids) for digest in batch))
    finally:
        model.train(training)


def _batches(todo: Mapping[bytes, Example], batch_tokens: int) -> Iterator[list[bytes]]:
    """Digests of examples of like length, longest first so that too little memory shows at once."""
    batch: list[bytes] = []
    for digest in sorted(todo, key=lambda d: (-len(todo[d].input_ids), d)):
        if batch and (len(batch) + 1) * len(todo[batch[0]].input_ids) > batch_tokens:
            yield batch
            batch = []
        batch.append(digest)
    if batch:
        yield batch


def _batch_logits(model: Any, batch: Sequence[Example], device: str, selects: bool) -> torch.Tensor:
    """Logits [P, V] at the positions of a batch, example by example.

    Padded on the right: in a causal model no token sees what comes after it, so padding cannot change anything.
    """
    length = max(len(example.input_ids) for example in batch)
    ids = torch.zeros(len(batch), length, dtype=torch.int64)
    mask = torch.zeros(len(batch), length, dtype=torch.int64)
    for row, example in enumerate(batch):
        ids[row, : len(example.input_ids)] = torch.tensor(example.input_ids)
        mask[row, : len(example.input_ids)] = 1
    rows = torch.tensor([row for row, e in enumerate(batch) for _ in e.positions], dtype=torch.int64)
    columns = torch.tensor([position for e in batch for position in e.positions], dtype=torch.int64)
    extra = {}
    if selects:  # only the columns that some example learns
        kept, columns = columns.unique(return_inverse=True)
        extra["logits_to_keep"] = kept.to(device)
    output = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, **extra)
    chosen: torch.Tensor = output.logits[rows.to(device), columns.to(device)]
    return chosen
