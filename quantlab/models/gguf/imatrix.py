"""llama.cpp's importance matrix: sums of squared activations by input channel, and of how many tokens. Written in its
GGUF form, read in that and the older one (``.dat``).

For a tensor ``blk.0.attn_q.weight`` of the model it holds ``blk.0.attn_q.weight.in_sum2`` float32 [columns] (one row an
expert, where there are several) and ``blk.0.attn_q.weight.counts``. Source: ``tools/imatrix/imatrix.cpp`` of llama.cpp.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from quantlab.calibration.importance import imatrix_digest
from quantlab.errors import DataError
from quantlab.models.gguf.header import MAGIC, read_header


def write_imatrix(
    path: Path,
    sums: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    *,
    source: str,
    chunks: int,
    chunk_size: int,
) -> None:
    """Write the file, beside its place and then renamed.

    Args:
        sums: by tensor, with ``.weight``: sums of squares float32 [experts, columns], and tokens float32 [experts]; one
            expert where there are none.
        source: the calibration text's name. chunks, chunk_size: how many rows of how many tokens were seen.

    Raises:
        OSError: it cannot be written.
    """
    from gguf import GGUFWriter

    writer = GGUFWriter(None, "")
    writer.kv_data[0].clear()  # an importance matrix has no architecture
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [source])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", chunk_size)
    for name, (squares, tokens) in sorted(sums.items()):
        writer.add_tensor(f"{name}.in_sum2", squares.to(torch.float32).numpy())
        writer.add_tensor(f"{name}.counts", tokens.to(torch.float32)[:, None].numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.part")
    try:
        writer.write_header_to_file(unfinished)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


class Sums(NamedTuple):
    """Of one tensor: sums of squared activations float32 [experts, columns], and of how many tokens, float32 [experts];
    one expert where there are none. ``tokens`` is None where the file counts something else."""

    squares: torch.Tensor
    tokens: torch.Tensor | None

    def means(self, columns: int) -> tuple[torch.Tensor, list[int]]:
        """Mean squares [experts, columns], zeros for an expert that saw nothing, and the tokens that each is of. Where
        those are not known they count as no fewer than the ``columns``."""
        if self.tokens is None:
            return self.squares, [columns] * len(self.squares)
        counts = [int(count) for count in self.tokens.tolist()]
        rows = [row / count if count else row for row, count in zip(self.squares, counts, strict=True)]
        return torch.stack(rows), counts


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix as a file has it. ``sums``: by tensor, with ``.weight``. ``source``: names of its texts.
    ``chunks``: how many rows of text it is of. ``digest``: 16 hexadecimal digits of the file's bytes."""

    sums: Mapping[str, Sums]
    source: str
    chunks: int
    digest: str


def open_imatrix(path: Path) -> Imatrix:
    """An importance matrix of llama.cpp, in its GGUF form or the older one (``.dat``). No number in it is believed.

    Raises:
        DataError: it cannot be read, is no importance matrix, or is damaged; says which tensor.
    """
    digest = imatrix_digest(path)
    with path.open("rb") as stream:
        newer = stream.read(len(MAGIC)) == MAGIC
    sums, source, chunks = _read_gguf(path) if newer else _read_dat(path)
    if not sums:
        raise DataError(f"{path} holds no sums of squared activations: {EXPECTED}")
    for name, found in sums.items():
        counts = found.tokens
        values = found.squares if counts is None else torch.cat([found.squares.flatten(), counts])
        if not torch.isfinite(values).all() or (values < 0).any():
            raise DataError(
                f"{path}: {name} is damaged: it has sums or counts that are negative or not finite"
            )
    return Imatrix(sums, source, chunks, digest)


def read_imatrix(path: Path) -> dict[str, torch.Tensor]:
    """Mean squared activations by tensor, float32 [experts, columns]; experts that saw nothing have ones.

    Raises:
        DataError: as :func:`open_imatrix`.
    """
    found = {}
    for name, sums in open_imatrix(path).sums.items():
        means, counts = sums.means(sums.squares.shape[1])
        found[name] = means.masked_fill(torch.tensor(counts)[:, None] == 0, 1.0)
    return found


EXPECTED = "expected what llama-imatrix or --save-imatrix writes"
MOST_NAME = 1024  # bytes of a tensor's name
_INT = struct.Struct("<i")


def _read_gguf(path: Path) -> tuple[dict[str, Sums], str, int]:
    header = read_header(path)
    found = {}
    for name, stored in header.tensors.items():
        owner, ending = name.removesuffix(".in_sum2"), name.endswith(".in_sum2")
        if not ending:
            continue
        counts = header.tensors.get(f"{owner}.counts")
        if counts is None or stored.kind_name != "F32" or counts.kind_name != "F32":
            raise DataError(f"{path}: {owner} is damaged: expected sums and counts in float32")
        tokens = torch.from_numpy(np.fromfile(path, "<f4", counts.size // 4, offset=counts.start))
        squares = torch.from_numpy(np.fromfile(path, "<f4", stored.size // 4, offset=stored.start))
        if len(squares) % len(tokens):
            raise DataError(f"{path}: {owner} is damaged: {len(squares)} sums for {len(tokens)} counts")
        found[owner] = Sums(squares.view(len(tokens), -1), tokens)
    texts = header.metadata.get("imatrix.datasets")
    chunks = header.metadata.get("imatrix.chunk_count")
    source = ", ".join(map(str, texts)) if isinstance(texts, list) else ""
    return found, source, chunks if isinstance(chunks, int) else 0


def _read_dat(path: Path) -> tuple[dict[str, Sums], str, int]:
    """The older form: a number of entries, then of each the name's length, the name, in how many chunks it was seen,
    the number of values, and the values, which are means times the chunks. How many experts a tensor has is not said:
    they are in one row. After them the number of chunks and the text's name."""
    data, place = path.read_bytes(), 0

    def take(count: int, what: str) -> bytes:
        nonlocal place
        if not 0 <= count <= len(data) - place:
            raise DataError(f"{path} is no importance matrix, or cut short: {what}; {EXPECTED}")
        place += count
        return data[place - count : place]

    def number(what: str, least: int, most: int) -> int:
        (value,) = _INT.unpack(take(4, what))
        if not least <= value <= most:
            raise DataError(f"{path} is no importance matrix: {what} is {value}; {EXPECTED}")
        return int(value)

    found = {}
    for _ in range(number("the number of entries", 1, len(data) // 12)):
        raw = take(number("the length of a name", 1, MOST_NAME), "a name")
        try:
            name = raw.decode("ascii")
        except UnicodeDecodeError:
            raise DataError(f"{path} is no importance matrix: a name is not ASCII; {EXPECTED}") from None
        calls = number(f"the chunks of {name}", 0, 2**31 - 1)
        values = np.frombuffer(take(4 * number(f"the length of {name}", 1, len(data) // 4), name), "<f4")
        if name in found:
            raise DataError(f"{path} is damaged: {name} is there twice")
        found[name] = Sums(torch.from_numpy(values.copy())[None] / max(calls, 1), None)
    if len(data) - place < 8:  # the oldest files end here
        return found, "", 0
    chunks = number("the number of chunks", 0, 2**31 - 1)
    source = take(number("the length of the text's name", 0, len(data)), "the text's name")
    return found, source.decode("utf-8", "replace"), chunks
