"""Damaged and hostile GGUF files: each is refused with what is wrong, nothing is written, and no number in a file
makes memory grow beyond a small multiple of the file.

A sound file is described here field by field, without the library that writes them, so that any field can lie.
"""

from __future__ import annotations

import os
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from quantlab.errors import DataError
from quantlab.models.finite import refuse_nonfinite
from quantlab.models.refusals import refuse_unusable
from quantlab.models.safetensors.files import ModelFiles, open_files

TEXT, U32, F32, I32, ARRAY, U64 = 8, 4, 6, 5, 9, 10
HIDDEN, FFN, VOCABULARY, ALIGNED = 32, 64, 7, 32
TOKENS = ["a", "b", "c", "ab", "</s>", "<s>"]
SLACK = 4 * 2**20  # bytes that Python itself may take on the way


def text(value: bytes | str) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def array(kind: int, count: int, data: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + data


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


@dataclass
class Tensor:
    shape: tuple[int, ...]  # outermost dimension first
    kind: int = 0
    data: bytes = b""
    offset: int | None = None  # None: where it lies
    dimensions: int | None = None

    def __post_init__(self) -> None:
        if not self.data:
            count = 1
            for size in self.shape:
                count *= size
            self.data = struct.pack("<f", 0.5) * count if count < 10**6 else b""


def sound_pairs() -> dict[str, tuple[int, bytes]]:
    sizes = {
        "block_count": 1, "context_length": 64, "embedding_length": HIDDEN, "feed_forward_length": FFN,
        "attention.head_count": 2,
    }  # fmt: skip
    return {
        "general.architecture": (TEXT, text("llama")),
        **{f"llama.{key}": (U32, u32(value)) for key, value in sizes.items()},
        "llama.attention.layer_norm_rms_epsilon": (F32, struct.pack("<f", 1e-5)),
        "tokenizer.ggml.model": (TEXT, text("gpt2")),
        "tokenizer.ggml.pre": (TEXT, text("gpt-2")),
        "tokenizer.ggml.tokens": (ARRAY, array(TEXT, len(TOKENS), b"".join(map(text, TOKENS)))),
        "tokenizer.ggml.token_type": (ARRAY, array(I32, 6, struct.pack("<6i", 1, 1, 1, 1, 3, 3))),
        "tokenizer.ggml.merges": (ARRAY, array(TEXT, 1, text("a b"))),
        "tokenizer.ggml.eos_token_id": (U32, u32(4)),
    }


def sound_tensors() -> dict[str, Tensor]:
    square, wide = Tensor((HIDDEN, HIDDEN)), Tensor((FFN, HIDDEN))
    return {
        "token_embd.weight": Tensor((VOCABULARY, HIDDEN)),
        "output_norm.weight": Tensor((HIDDEN,)),
        "blk.0.attn_norm.weight": Tensor((HIDDEN,)),
        "blk.0.ffn_norm.weight": Tensor((HIDDEN,)),
        **{f"blk.0.attn_{part}.weight": square for part in ("q", "k", "v", "output")},
        "blk.0.ffn_gate.weight": wide,
        "blk.0.ffn_up.weight": wide,
        "blk.0.ffn_down.weight": Tensor((HIDDEN, FFN)),
    }


@dataclass
class Parts:
    """A file in its parts. ``more``: keys and tensors that come last, whatever they are called."""

    magic: bytes = b"GGUF"
    version: bytes = u32(3)
    pairs: dict[str, tuple[int, bytes]] = field(default_factory=sound_pairs)
    tensors: dict[str, Tensor] = field(default_factory=sound_tensors)
    more_pairs: list[tuple[bytes, int, bytes]] = field(default_factory=list)
    more_tensors: list[tuple[bytes, Tensor]] = field(default_factory=list)
    tensor_count: int | None = None
    pair_count: int | None = None

    def bytes(self) -> bytes:
        pairs = [(key.encode(), *value) for key, value in self.pairs.items()] + self.more_pairs
        tensors = [(name.encode(), tensor) for name, tensor in self.tensors.items()] + self.more_tensors
        counts = (
            len(tensors) if self.tensor_count is None else self.tensor_count,
            len(pairs) if self.pair_count is None else self.pair_count,
        )
        head = self.magic + self.version + struct.pack("<QQ", *counts)
        head += b"".join(text(key) + u32(kind) + value for key, kind, value in pairs)
        data = b""
        for name, tensor in tensors:
            sizes = struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
            offset = len(data) if tensor.offset is None else tensor.offset
            dimensions = len(tensor.shape) if tensor.dimensions is None else tensor.dimensions
            head += text(name) + u32(dimensions) + sizes + u32(tensor.kind) + struct.pack("<Q", offset)
            data += tensor.data + bytes(-len(tensor.data) % ALIGNED)
        return head + bytes(-len(head) % ALIGNED) + data


def pair(key: str, kind: int, value: bytes) -> Callable[[], Parts]:
    """The sound file with another value for a key."""
    return lambda: Parts(pairs=sound_pairs() | {key: (kind, value)})


def tensor(name: str, **changes: Any) -> Callable[[], Parts]:
    """The sound file with a tensor changed."""

    def make() -> Parts:
        tensors = sound_tensors()
        tensors[name] = replace(tensors.get(name, Tensor((HIDDEN,))), **changes)
        return Parts(tensors=tensors)

    return make


def without(*keys: str) -> Callable[[], Parts]:
    return lambda: Parts(
        pairs={k: v for k, v in sound_pairs().items() if k not in keys},
        tensors={k: v for k, v in sound_tensors().items() if k not in keys},
    )


UP = "blk.0.ffn_up.weight"
TOKEN_KEY = "tokenizer.ggml.tokens"
DAMAGED: dict[str, tuple[Callable[[], Parts | bytes], str]] = {
    "empty": (lambda: b"", "needs 4 bytes at byte 0, the file has 0"),
    "another kind of file": (lambda: Parts(magic=b"PK\3\4"), "begins with b'PK"),
    "big-endian": (lambda: Parts(version=struct.pack(">I", 3)), "big-endian"),
    "version 1": (lambda: Parts(version=u32(1)), "version 1, read are 2 and 3"),
    "a version to come": (lambda: Parts(version=u32(77)), "version 77"),
    "cut in the counts": (lambda: Parts().bytes()[:13], "the number of tensors"),
    "cut in a key": (lambda: Parts().bytes()[:40], "claims"),
    "cut in the tokens": (lambda: Parts().bytes()[:500], "'tokenizer.ggml"),
    "cut in the data": (lambda: Parts().bytes()[:-4000], "blk.0.ffn_down.weight ends at byte"),
    "2**63 tensors": (lambda: Parts(tensor_count=2**63), "claims 9223372036854775808 tensors"),
    "2**64 - 1 keys": (lambda: Parts(pair_count=2**64 - 1), "claims 18446744073709551615 keys"),
    "one key too many": (lambda: Parts(pair_count=len(sound_pairs()) + 1), "is not a sound GGUF file"),
    "a huge name": (
        lambda: Parts(more_pairs=[(b"k" * 70_000, U32, u32(1))]), "70000 bytes, at most 65535"),
    "a name of 2**62 bytes": (
        lambda: Parts().bytes()[:24] + struct.pack("<Q", 2**62) + bytes(5000), "at most 65535 are allowed"),
    "a text of 2**62 bytes": (
        pair("tokenizer.chat_template", TEXT, struct.pack("<Q", 2**62)), "'tokenizer.chat_template' needs"),
    "2**61 numbers": (
        pair("tokenizer.ggml.scores", ARRAY, array(U64, 2**61, b"")), "claims 2305843009213693952 elements"),
    "2**62 texts": (pair(TOKEN_KEY, ARRAY, array(TEXT, 2**62, b"")), "claims 4611686018427387904 elements"),
    "an array of arrays": (
        pair(TOKEN_KEY, ARRAY, array(ARRAY, 1, array(U32, 0, b""))), "of type 9, which no GGUF file has there"),
    "a value of no type": (pair("llama.rope.freq_base", 99, b"\0" * 8), "of type 99"),
    "bytes that are no text": (pair("general.name", TEXT, text(b"\xff\xfe")), "'general.name' is not UTF-8"),
    "a key twice": (
        lambda: Parts(more_pairs=[(b"general.architecture", TEXT, text("qwen2"))]), "architecture' is there twice"),
    "a tensor twice": (
        lambda: Parts(more_tensors=[(b"output_norm.weight", Tensor((HIDDEN,)))]), "output_norm.weight is there twice"),
    "no alignment": (pair("general.alignment", U32, u32(0)), "general.alignment is 0"),
    "an odd alignment": (pair("general.alignment", U32, u32(24)), "general.alignment is 24"),
    "a vast alignment": (pair("general.alignment", U32, u32(2**31)), "general.alignment is 2147483648"),
    "an alignment in words": (pair("general.alignment", TEXT, text("32")), "general.alignment is '32'"),
    "far outside": (tensor(UP, offset=2**40), f"{UP} ends at byte"),
    "an offset that wraps": (tensor(UP, offset=2**64 - 32), f"{UP} ends at byte"),
    "two in one place": (tensor(UP, offset=0), "overlaps"),
    "between the places": (tensor(UP, offset=7), "not a multiple of the alignment 32"),
    "no dimension": (tensor(UP, dimensions=0, shape=()), "0 dimensions"),
    "2**31 dimensions": (tensor(UP, dimensions=2**31), "2147483648 dimensions"),
    "a dimension of 0": (tensor(UP, shape=(FFN, 0)), "a dimension of 0"),
    "2**120 numbers": (tensor(UP, shape=(2**60, 2**60)), "ends at byte"),
    "a way out of the folder": (
        lambda: Parts(more_tensors=[(b"../../x.weight", Tensor((HIDDEN,)))]), "is called '../../x.weight'"),
    "a name with an end in it": (
        lambda: Parts(more_tensors=[(b"x\0.weight", Tensor((HIDDEN,)))]), "is called"),
    "a type to come": (tensor(UP, kind=777), "ggml type 777, which cannot be decoded"),
    "whole numbers": (tensor(UP, kind=26), "ggml type I32, which cannot be decoded"),
    "a type of computing": (tensor(UP, kind=9), "ggml type Q8_1, which cannot be decoded"),
    "rows that are no blocks": (tensor(UP, kind=12), "whose rows are multiples of 256"),
    "an unknown architecture": (pair("general.architecture", TEXT, text("mamba")), "architecture 'mamba'"),
    "no architecture": (without("general.architecture"), "no general.architecture"),
    "an architecture in numbers": (pair("general.architecture", U32, u32(1)), "no general.architecture"),
    "a billion blocks": (pair("llama.block_count", U32, u32(10**9)), "block_count is 1000000000, its tensors are of 1"),
    "no heads": (pair("llama.attention.head_count", U32, u32(0)), "head_count is '0'"),
    "more heads than numbers": (pair("llama.attention.head_count", U32, u32(10**6)), "key_length is missing"),
    "another width": (
        pair("llama.embedding_length", U32, u32(64)), r"is \[7, 32\], expected \[7, 64\] \(vocab, hidden\)"),
    "endless experts": (pair("llama.expert_count", U32, u32(2**31 - 1)), "2147483647 experts, at most 4096"),
    "endless frequencies": (tensor("rope_freqs.weight"), r"rope_freqs.weight is \[32\], expected 8"),
    "not a number": (
        pair("llama.attention.layer_norm_rms_epsilon", F32, struct.pack("<f", float("nan"))), "expected a number"),
    "a tensor missing": (without("blk.0.attn_k.weight"), "blk.0.attn_k.weight is not in the file"),
    "a tensor of another model": (tensor("blk.0.ssm_a"), "blk.0.ssm_a is none that its architecture has"),
    "one of three pieces": (pair("split.count", U32, u32(3)), "one of 3 pieces"),
    "an adapter": (pair("general.type", TEXT, text("adapter")), "holds a 'adapter'"),
    "more tokens than rows": (
        pair(TOKEN_KEY, ARRAY, array(TEXT, 8, b"".join(map(text, "abcdefgh")))), "8 tokens, the model's embedding"),
    "a token twice": (
        pair(TOKEN_KEY, ARRAY, array(TEXT, 6, b"".join(text(c) for c in "abcdea"))), "has 'a' twice"),
    "an endless token": (
        pair(TOKEN_KEY, ARRAY, array(TEXT, 1, text("x" * 5000))), "one of 5000 characters"),
    "types of other tokens": (
        pair("tokenizer.ggml.token_type", ARRAY, array(I32, 2, bytes(8))), "one number for each of 6 tokens"),
    "merges of other tokens": (
        pair("tokenizer.ggml.merges", ARRAY, array(TEXT, 1, text("x y"))), "has 'x y' .number 0., which its tokens"),
    "an end that is no token": (pair("tokenizer.ggml.eos_token_id", U32, u32(6)), "is 6, there are 6 tokens"),
    "an unknown tokenizer": (pair("tokenizer.ggml.model", TEXT, text("rwkv")), "tokenizer is 'rwkv'"),
    "unknown words": (pair("tokenizer.ggml.pre", TEXT, text("qwen22")), "'qwen22', which is not known"),
    "a template in numbers": (pair("tokenizer.chat_template", U32, u32(1)), "chat_template is no text"),
}  # fmt: skip


def opened(path: Path) -> ModelFiles:
    files = open_files(path)
    refuse_unusable(files)
    return files


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUANTLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_sound_file_is_read(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "sound.gguf").write_bytes(Parts().bytes())
    files = opened(tmp_path / "sound.gguf")
    refuse_nonfinite(files)
    assert files.config["hidden_size"] == HIDDEN and len(files.tensors) == len(sound_tensors())
    assert cache.is_dir()


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_files_are_refused(damage: str, tmp_path: Path, cache: Path) -> None:
    make, said = DAMAGED[damage]
    made = make()
    path = tmp_path / "hostile.gguf"
    path.write_bytes(made if isinstance(made, bytes) else made.bytes())
    before = sorted(tmp_path.rglob("*"))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=said):
            opened(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * path.stat().st_size + SLACK
    assert sorted(tmp_path.rglob("*")) == before


def test_a_header_of_a_gigabyte_is_not_read(tmp_path: Path, cache: Path) -> None:
    """The file has the bytes that a length claims, all zeros on no disk; nothing of that size is a header."""
    path = tmp_path / "vast.gguf"
    path.write_bytes(pair("tokenizer.chat_template", TEXT, struct.pack("<Q", 2**30))().bytes())
    os.truncate(path, 2**32)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="its header is larger than 128 MiB"):
            opened(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < SLACK and not cache.exists()


def test_many_small_texts_take_a_small_multiple(tmp_path: Path, cache: Path) -> None:
    """Texts of two letters are what costs most a byte of the file."""
    count = 20_000
    words = b"".join(text(chr(0x100 + i % 1000) + chr(97 + i % 26)) for i in range(count))
    path = tmp_path / "words.gguf"
    path.write_bytes(pair(TOKEN_KEY, ARRAY, array(TEXT, count, words))().bytes())
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="20000 tokens, the model's embedding has 7"):
            opened(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * path.stat().st_size + SLACK


@pytest.mark.parametrize("scale", [0x7C00, 0x7E00, 0xFC00], ids=["infinity", "NaN", "-infinity"])
def test_a_scale_that_is_no_number_is_found(scale: int, tmp_path: Path, cache: Path) -> None:
    blocks = bytearray(struct.pack("<H", 0x3C00) + b"\1" * 32) * FFN  # Q8_0: a scale, then 32 codes
    struct.pack_into("<H", blocks, 5 * 34, scale)
    path = tmp_path / "bad.gguf"
    path.write_bytes(tensor(UP, kind=8, data=bytes(blocks))().bytes())
    files = opened(path)
    with pytest.raises(
        DataError, match=r"32 values are NaN or infinite in model.layers.0.mlp.up_proj.weight.*\[5, 0\]"
    ):
        refuse_nonfinite(files)


def test_a_file_that_changes_is_noticed(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(Parts().bytes())
    info = opened(path).tensors["model.norm.weight"]
    path.write_bytes(Parts().bytes() + bytes(32))
    assert info.reader is not None
    with pytest.raises(DataError, match="changed while it was in use"):
        info.reader.read()
