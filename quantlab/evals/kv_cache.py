"""Keys and values held as integers while a model is measured (KIVI, Liu et al. 2024, arXiv:2402.02750).

What attention has to remember grows with every token and soon outweighs a quantized model. Keys have channels that are
large in every token, so they are quantized channel by channel, in groups of `group_size` tokens; values have no such
channels and are quantized token by token, in groups of `group_size` channels. A group is stored as its minimum, a
scale, and codes of 2, 4 or 8 bits, really packed. The newest tokens wait as they are until there are `residual`
of them.

A forward pass attends to its own tokens and to those still waiting as they are, and to all earlier ones as they were
stored. Hence feeding `residual` tokens at a time gives the same as feeding one after the other, and perplexity and
fidelity are measured like that: every token is predicted from the cache that decoding would have had. A prompt that is
fed at once is read exactly, and quantized for what follows.

Nothing here is fast: the stored tokens are unpacked at every step, which servers do inside the attention kernel. Not
covered: beam search; layers with a sliding window (their cache is small) and without attention keep what they have.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from quantlab.errors import RecipeError
from quantlab.formats import bits as bitstream
from quantlab.quant.grid import Grid, decode, encode, storable_scales
from quantlab.registry.tasks import KvCacheOptions

ROWS = 16  # codes are packed in rows of this many, which fill whole words at 2, 4 and 8 bits


@dataclass(frozen=True)
class Groups:
    """Quantized groups. `words`: packed codes, int32; `low` [...] in the model's type and `scales` [...] bfloat16, one
    a group; `shape`: [..., values of a group]."""

    words: torch.Tensor
    low: torch.Tensor
    scales: torch.Tensor
    shape: torch.Size
    bits: int

    @classmethod
    def of(cls, groups: torch.Tensor, bits: int) -> Groups:
        """Round `groups` [..., width] to nearest between their minimum and maximum."""
        grid = Grid(bits, groups.shape[-1], symmetric=False)
        low, high = torch.aminmax(groups, dim=-1)
        scales = storable_scales((high.float() - low.float()) / grid.max_code)
        above = groups.float() - low.float()[..., None]
        codes = encode(above, scales[..., None], torch.zeros_like(above), grid).to(torch.uint8)
        words = bitstream.pack(codes.reshape(ROWS, -1), bits)
        return cls(words, low, scales.to(torch.bfloat16), groups.shape, bits)

    def values(self) -> torch.Tensor:
        """What is stored, [..., width] in the model's type."""
        codes = bitstream.unpack(self.words, self.bits, ROWS).reshape(self.shape)
        above = decode(codes.float(), self.scales.float()[..., None], torch.zeros(1, device=codes.device))
        return (above + self.low.float()[..., None]).to(self.low.dtype)

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.low.nbytes + self.scales.nbytes


@dataclass(frozen=True)
class Stored:
    """Some tokens of one layer, out of the way of attention."""

    keys: Groups  # [batch, heads, tokens / group_size, head_dim, group_size]
    values: Groups  # [batch, heads, tokens, head_dim / width, width]

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor, options: KvCacheOptions) -> Stored:
        """`keys` and `values` [batch, heads, tokens, head_dim], the tokens being whole groups."""
        size = options.group_size
        width = size if values.shape[-1] % size == 0 else values.shape[-1]
        return cls(
            Groups.of(keys.unflatten(-2, (-1, size)).transpose(-1, -2), options.bits),
            Groups.of(values.unflatten(-1, (-1, width)), options.bits),
        )

    def restored(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys.values().transpose(-1, -2).flatten(-3, -2), self.values.values().flatten(-2)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


class QuantizedLayer(DynamicLayer):
    """The cache of one layer. `keys` and `values` are the tokens that wait, `stored` those before them."""

    is_croppable = False
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, options: KvCacheOptions) -> None:
        super().__init__()
        self.options = options
        self.stored: list[Stored] = []
        self.length = 0
        self.unquantized = 0  # bytes

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in new tokens [batch, heads, tokens, head_dim]; returns the keys and values to attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        restored = [part.restored() for part in self.stored]
        super().update(key_states, value_states)
        keys = torch.cat([*(pair[0] for pair in restored), self.keys], dim=-2)
        values = torch.cat([*(pair[1] for pair in restored), self.values], dim=-2)
        self.length += key_states.shape[-2]
        self.unquantized += key_states.nbytes + value_states.nbytes
        full = self.keys.shape[-2] // self.options.residual * self.options.residual
        if full:
            ready = (self.keys[..., :full, :], self.values[..., :full, :])
            self.stored.append(Stored.of(*ready, self.options))
            # Copies, so that what has been stored is let go of.
            self.keys, self.values = self.keys[..., full:, :].clone(), self.values[..., full:, :].clone()
        return keys, values

    def get_seq_length(self) -> int:
        return self.length

    def reset(self) -> None:
        self.stored, self.length, self.unquantized = [], 0, 0
        super().reset()

    def held(self) -> tuple[int, int]:
        """(bytes held, bytes that the same tokens take as they come)."""
        waiting = self.keys.nbytes + self.values.nbytes if self.is_initialized else 0
        return sum(part.nbytes for part in self.stored) + waiting, self.unquantized

    def _greedy_only(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError("a quantized cache only grows: greedy decoding, no beams")

    crop = reorder_cache = batch_repeat_interleave = batch_select_indices = _greedy_only


class Caches:
    """Makes the caches of one task and remembers what they held; without options the model makes its own."""

    def __init__(self, model: Any, options: KvCacheOptions | None) -> None:
        self.model = model
        self.options = options
        self.layers = (0, 0)
        self.largest = (0, 0)

    @property
    def step(self) -> int | None:
        """Tokens to feed at a time where all of a text is scored; None: all at once, with no cache."""
        return self.options.residual if self.options else None

    @contextmanager
    def fresh(self) -> Iterator[Any]:
        """An empty cache for one batch, None without options; its size is noted at the end.

        Raises:
            RecipeError: no layer of the model has a cache that grows with the text.
        """
        if self.options is None:
            yield None
            return
        cache = DynamicCache(config=self.model.config)
        cache.layers = [
            QuantizedLayer(self.options) if type(layer) is DynamicLayer else layer for layer in cache.layers
        ]
        quantized = [layer for layer in cache.layers if isinstance(layer, QuantizedLayer)]
        if not quantized:
            raise RecipeError(
                "tasks.kv_cache: no layer of this model attends to the whole text", hint="leave the key out"
            )
        yield cache
        held, plain = (sum(part) for part in zip(*(layer.held() for layer in quantized), strict=True))
        self.layers = (len(quantized), len(cache.layers))
        self.largest = max(self.largest, (held, plain), key=lambda pair: pair[1])

    def details(self) -> dict[str, Any]:
        """For the run's record: the setting, the layers it covers, and the largest cache; empty without options."""
        if self.options is None:
            return {}
        (covered, layers), (held, plain) = self.layers, self.largest
        found = {"quantized_layers": covered, "layers": layers, "bytes": held, "unquantized_bytes": plain}
        return {"kv_cache": self.options.model_dump() | found}


def logits_of(model: Any, ids: torch.Tensor, caches: Caches) -> torch.Tensor:
    """Logits [windows, seq_len, vocabulary] of `ids` [windows, seq_len], as decoding with these caches sees them."""
    if caches.step is None:
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
        return logits
    with caches.fresh() as cache:
        parts = [
            model(input_ids=part, past_key_values=cache, use_cache=True).logits
            for part in ids.split(caches.step, dim=1)
        ]
    return torch.cat(parts, dim=1)
