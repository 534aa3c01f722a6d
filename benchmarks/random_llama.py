"""A Llama with random weights, written tensor by tensor: the model of the side-by-side benchmarks at any size.

    python benchmarks/random_llama.py OUT [--hidden 768 --blocks 8 --heads 12 --kv-heads 4 --ffn 2048 --vocab 4096]
    python benchmarks/random_llama.py OUT --like 1.5gb       # hidden 1536, 26 blocks, ffn 4096
    python benchmarks/random_llama.py OUT --like 8b          # the shape of Llama-3-8B, 16 GB

Weights are drawn as transformers initialises them: matrices and embeddings from N(0, 0.02), norms 1. `--outliers N`
makes N channels of every norm eight times as large, which is how real models look to methods that watch activations.
Every tensor has its own seed, so neither the shard size nor the order of writing changes a value, and only one tensor
is in memory at a time. The tokenizer has one word a token id (`w17` is token 17), so rows of token ids can be handed to
a tool as text and come back unchanged (`text_of_rows`).
"""

from __future__ import annotations

import argparse
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SPECIAL = ("<pad>", "<s>", "</s>")  # ids 0, 1, 2; rows are drawn from the ids after them
OUTLIER_FACTOR = 8.0
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}  # in a safetensors header


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama. ``shard_bytes``: a file is closed when the next tensor would take it past this."""

    hidden: int = 768
    blocks: int = 8
    heads: int = 12
    kv_heads: int = 4
    ffn: int = 2048
    vocab: int = 4096
    positions: int = 2048
    dtype: str = "bfloat16"
    tied: bool = False
    outliers: int = 0
    shard_bytes: int = 2**30
    seed: int = 0

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


SHAPES = {
    "57m": Shape(),
    "1.5gb": Shape(hidden=1536, ffn=4096, blocks=26, heads=12, kv_heads=12, shard_bytes=2**28),
    "8b": Shape(4096, 32, 32, 8, 14336, 128256, positions=8192, shard_bytes=2**32),
    "tiny": Shape(hidden=256, blocks=2, heads=4, kv_heads=2, ffn=768, vocab=512),
}


def tensor_shapes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and dimensions of every stored tensor, in the order of the model."""
    hidden, kv = shape.hidden, shape.kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocab, hidden)
    for i in range(shape.blocks):
        at = f"model.layers.{i}"
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.self_attn.q_proj.weight", (hidden, hidden)
        yield f"{at}.self_attn.k_proj.weight", (kv, hidden)
        yield f"{at}.self_attn.v_proj.weight", (kv, hidden)
        yield f"{at}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
        yield f"{at}.mlp.gate_proj.weight", (shape.ffn, hidden)
        yield f"{at}.mlp.up_proj.weight", (shape.ffn, hidden)
        yield f"{at}.mlp.down_proj.weight", (hidden, shape.ffn)
    yield "model.norm.weight", (hidden,)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocab, hidden)


def parameters(shape: Shape) -> int:
    return sum(math.prod(dims) for _, dims in tensor_shapes(shape))


def make_tensor(shape: Shape, name: str, dims: tuple[int, ...], device: str = "cpu") -> torch.Tensor:
    """The values of one tensor, on the CPU. Those drawn on a GPU differ from those drawn on a CPU."""
    import torch

    dtype = getattr(torch, shape.dtype)
    if len(dims) == 1:
        ones = torch.ones(dims)
        if shape.outliers and name != "model.norm.weight":
            generator = torch.Generator().manual_seed(shape.seed)  # the same channels in every block
            ones[torch.randperm(dims[0], generator=generator)[: shape.outliers]] = OUTLIER_FACTOR
        return ones.to(dtype)
    # A CPU generator looks at 32 bits of its seed, so the model's seed and the name are mixed, not set side by side.
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{shape.seed}/{name}".encode()))
    return torch.empty(dims, device=device).normal_(0.0, 0.02, generator=generator).to(dtype).cpu()


def build(out: Path, shape: Shape, device: str = "cpu") -> Path:
    """Write the model into ``out``: shards and their index, configuration, tokenizer. ``config.json`` comes last, so a
    folder that has one is complete."""
    if shape.hidden % shape.heads or shape.heads % shape.kv_heads:
        raise ValueError(
            f"{shape.heads} heads and {shape.kv_heads} kv heads do not divide {shape.hidden} channels"
        )
    out.mkdir(parents=True, exist_ok=True)
    shards = list(_shards(shape))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = (
            f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        )
        _write_shard(out / name, shape, shard, device)
        weight_map |= {tensor: name for tensor, _ in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": parameters(shape) * BYTES[shape.dtype]}, "weight_map": weight_map}
        _write_json(out / "model.safetensors.index.json", index)
    write_tokenizer(out, shape.vocab)
    _write_json(out / "config.json", config(shape))
    return out


def _shards(shape: Shape) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    shard: list[tuple[str, tuple[int, ...]]] = []
    size = 0
    for name, dims in tensor_shapes(shape):
        width = math.prod(dims) * BYTES[shape.dtype]
        if shard and size + width > shape.shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append((name, dims))
        size += width
    yield shard


def _write_shard(
    path: Path, shape: Shape, tensors: Sequence[tuple[str, tuple[int, ...]]], device: str
) -> None:
    """One safetensors file, whose header is known before the first value is drawn."""
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dims in tensors:
        start, end = end, end + math.prod(dims) * BYTES[shape.dtype]
        header[name] = {"dtype": NAMES[shape.dtype], "shape": list(dims), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, dims in tensors:
            stream.write(
                memoryview(make_tensor(shape, name, dims, device).view(torch.uint8).numpy()).cast("B")
            )


def config(shape: Shape) -> dict[str, Any]:
    """``config.json`` as transformers 4 and 5 both read it."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": shape.hidden, "intermediate_size": shape.ffn, "num_hidden_layers": shape.blocks,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
        "vocab_size": shape.vocab, "max_position_embeddings": shape.positions, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "initializer_range": 0.02, "attention_bias": False, "mlp_bias": False,
        "tie_word_embeddings": shape.tied, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "torch_dtype": shape.dtype, "use_cache": True,
    }  # fmt: skip


def words(vocab: int) -> list[str]:
    return [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), vocab))]


def write_tokenizer(out: Path, vocab: int) -> None:
    """One word a token id, split at white space; no token is added at either end."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words(vocab))}, unk_token="<pad>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    _save_tokenizer(out, tokenizer)


def write_byte_tokenizer(out: Path) -> None:
    """GPT-2's way to cut text and its alphabet of bytes, without merges: one that a GGUF file can hold."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {word: i for i, word in enumerate([*SPECIAL, *letters])}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    _save_tokenizer(out, tokenizer)


def _save_tokenizer(out: Path, tokenizer: Any) -> None:
    tokenizer.save(str(out / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<pad>", "clean_up_tokenization_spaces": False, "model_max_length": 10**9,
    }  # fmt: skip
    _write_json(out / "tokenizer_config.json", described)


def random_rows(vocab: int, rows: int, seq_len: int, seed: int = 0) -> torch.Tensor:
    """Token ids int64 [rows, seq_len], none of them special."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL), vocab, (rows, seq_len), generator=generator)


def text_of_rows(rows: torch.Tensor) -> str:
    """Text that the tokenizer of :func:`write_tokenizer` turns into these ids, one line a row."""
    return "\n".join(" ".join(f"w{i}" for i in row) for row in rows.tolist()) + "\n"


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--like", choices=sorted(SHAPES), default="57m", help="where the other sizes come from"
    )
    for name, default in asdict(SHAPES["57m"]).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None)
        elif isinstance(default, str):
            parser.add_argument(flag, choices=sorted(BYTES), default=None)
        else:
            parser.add_argument(flag, type=int, default=None)
    parser.add_argument("--device", default="cpu", help="where the numbers are drawn (cuda is faster)")
    args = parser.parse_args()
    wished = {name: getattr(args, name) for name in asdict(SHAPES[args.like])}
    shape = replace(SHAPES[args.like], **{name: value for name, value in wished.items() if value is not None})
    build(args.out, shape, args.device)
    size = parameters(shape) * BYTES[shape.dtype]
    print(f"{args.out}: {parameters(shape) / 1e6:.1f} M parameters, {size / 1e6:.0f} MB in {shape.dtype}")


if __name__ == "__main__":
    main()
