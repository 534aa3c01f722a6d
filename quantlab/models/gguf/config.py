"""A GGUF header as Hugging Face has the model: config.json, and which tensor of the file is which of the model.

Everything is compared before anything is used: the number of blocks with the blocks that are there, every shape with
the sizes that the keys give, the tokens with the rows of the embedding. What does not fit, is missing or left over is
refused by name. No torch.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quantlab.errors import DataError
from quantlab.models.gguf.architectures import (
    EXPERT,
    HEAD,
    Architecture,
    Place,
    architecture_of,
    head_size,
)
from quantlab.models.gguf.facts import Facts
from quantlab.models.gguf.header import Header, Stored
from quantlab.models.gguf.rope import TABLES, rope_keys
from quantlab.models.gguf.weights import GgufTensor, whole

BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
MOST_EXPERTS = 4096  # of a layer
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SPECIAL_IDS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}


@dataclass(frozen=True)
class Described:
    """A GGUF file as Hugging Face has the model. ``tensors``: readers by Hugging Face's names. ``encoding``: the ggml
    type of most weights. ``plain``: what unquantized weights of a checkpoint made from it are kept in."""

    config: dict[str, Any]
    tensors: Mapping[str, GgufTensor]
    encoding: str
    plain: str


def describe(header: Header, called: str) -> Described:
    """Configuration and tensors of the model in a file; ``called`` is what messages call it.

    Raises:
        DataError: an architecture that is not known, a key, tensor or shape that does not fit; names it.
    """
    metadata = header.metadata
    pieces = metadata.get("split.count", 1)
    if pieces not in (0, 1):
        raise DataError(
            f"{called} is one of {pieces!r} pieces of a model",
            hint="join them first: llama-gguf-split --merge",
        )
    if metadata.get("general.type", "model") != "model":
        raise DataError(f"{called} holds a {metadata['general.type']!r}, expected a model")
    known, facts = architecture_of(metadata, called)
    blocks = facts.count("block_count")
    there = {int(found[1]) for name in header.tensors if (found := BLOCK.fullmatch(name))}
    if there != set(range(len(there))) or blocks != len(there):
        raise DataError(
            f"{called}: {facts.architecture}.block_count is {blocks}, its tensors are of {len(there)} blocks"
        )
    sizes = _sizes(header, facts)
    expected, switches = _expected(header, known, blocks)
    tensors = dict(_placed(header, expected, sizes, called))
    weights: Counter[str] = Counter()
    for stored in header.tensors.values():
        weights[stored.kind_name] += math.prod(stored.shape)
    encoding = weights.most_common(1)[0][0]
    plain = PLAIN.get(encoding, "bfloat16")
    config = _config(header, known, facts, sizes) | switches | {"dtype": plain}
    return Described(config, tensors, encoding, plain)


def _sizes(header: Header, facts: Facts) -> dict[str, int]:
    """The names in shapes, and their sizes."""
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise DataError(f"{facts.called}: it holds no tensor token_embd.weight of two dimensions")
    heads, head = facts.count("attention.head_count"), head_size(facts)
    value = facts.count("attention.value_length", head)
    if head % 2 or value != head:
        raise DataError(
            f"{facts.called}: heads have {head} numbers in keys and {value} in values, expected the same even number"
        )
    groups = facts.count("attention.head_count_kv", heads)
    if heads % groups:
        raise DataError(f"{facts.called}: {heads} heads of queries are no multiple of {groups} of keys")
    experts = facts.count("expert_count") if facts.number("expert_count", 0) else 1
    if experts > MOST_EXPERTS:
        raise DataError(f"{facts.called}: it has {experts} experts, at most {MOST_EXPERTS} are read")
    ffn = facts.count("feed_forward_length", facts.count("expert_feed_forward_length", 1))
    return {
        "one": 1,
        "hidden": facts.count("embedding_length"),
        "vocab": embedding.shape[0],
        "head": head,
        "q": heads * head,
        "kv": groups * head,
        "qkv": (heads + 2 * groups) * head,
        "ffn": ffn,
        "2ffn": 2 * ffn,
        "experts": experts,
        "expert_ffn": facts.count("expert_feed_forward_length", ffn),
        "shared_ffn": facts.count("expert_shared_feed_forward_length", ffn),
    }


def _expected(header: Header, known: Architecture, blocks: int) -> tuple[dict[str, Place], dict[str, Any]]:
    """Every tensor that the file is to have, names in a block made whole, and what of the configuration follows from
    which it has."""
    inside = dict(known.blocks)
    switches: dict[str, Any] = {"tie_word_embeddings": "output.weight" not in header.tensors}
    for key, places in known.optional.items():
        switches[key] = any(f"blk.0.{name}" in header.tensors for name in places)
        inside |= places if switches[key] else {}
    found = dict(known.outside) | ({} if switches["tie_word_embeddings"] else HEAD)
    for index in range(blocks):
        found |= {
            f"blk.{index}.{name}": Place(f"model.layers.{index}.{p.name}", p.shape, p.heads, p.shift)
            for name, p in inside.items()
        }
    return found, switches


def _placed(
    header: Header, expected: Mapping[str, Place], sizes: Mapping[str, int], called: str
) -> Iterator[tuple[str, GgufTensor]]:
    missing = sorted(expected.keys() - header.tensors.keys())
    if missing:
        more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise DataError(f"{called}: tensor {missing[0]}{more} is not in the file")
    for name, stored in header.tensors.items():
        if name in TABLES:
            continue
        if name not in expected:
            raise DataError(f"{called}: tensor {name} is none that its architecture has")
        yield from _readers(header, stored, expected[name], sizes, called)


def _readers(
    header: Header, stored: Stored, place: Place, sizes: Mapping[str, int], called: str
) -> Iterator[tuple[str, GgufTensor]]:
    """One reader, or one for each expert of a stack."""
    shape = tuple(sizes[size] for size in place.shape)
    stored_shape = stored.shape
    if place.shape[0] == "one" and len(stored_shape) == 1:
        stored_shape = (1, *stored_shape)
    if stored_shape != shape:
        by_name = ", ".join(place.shape)
        raise DataError(
            f"{called}: {stored.name} is {list(stored.shape)}, expected {list(shape)} ({by_name})"
        )
    head = sizes["head"] if place.heads else 0
    common = (header.file, header.stamp, stored.name, stored.kind)
    if EXPERT not in place.name:
        yield place.name, GgufTensor(*common, shape, stored.start, head, place.shift)
        return
    each = stored.size // shape[0]
    for expert in range(shape[0]):
        name = place.name.replace(EXPERT, str(expert))
        yield name, GgufTensor(*common, shape[1:], stored.start + expert * each)


def _config(header: Header, known: Architecture, facts: Facts, sizes: Mapping[str, int]) -> dict[str, Any]:
    """config.json, in the keys that every version of transformers reads."""
    head = sizes["head"]
    rotated = facts.count("rope.dimension_count", head)
    own = known.config(facts)
    if rotated != head and "partial_rotary_factor" not in own:
        raise DataError(
            f"{facts.called}: {facts.architecture}.rope.dimension_count is {rotated}, expected that of a head, {head}"
        )
    tables = {name: whole(header, header.tensors[name]) for name in TABLES if name in header.tensors}
    special = {key: header.metadata.get(written) for key, written in SPECIAL_IDS.items()}
    return {
        "architectures": [known.model_class],
        "model_type": known.model_type,
        "vocab_size": sizes["vocab"],
        "hidden_size": sizes["hidden"],
        "num_hidden_layers": facts.count("block_count"),
        "num_attention_heads": sizes["q"] // head,
        "num_key_value_heads": sizes["kv"] // head,
        "head_dim": head,
        "max_position_embeddings": facts.count("context_length"),
        "rms_norm_eps": facts.number("attention.layer_norm_rms_epsilon"),
        **own,
        **rope_keys(facts, rotated, tables),
        **{key: value for key, value in special.items() if value is not None},
    }
