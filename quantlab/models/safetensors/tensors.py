"""Tensors of a safetensors file by plain positioned reads and writes.

``safetensors.safe_open`` maps the file: every page touched counts as resident memory of the process until the mapping
goes, and stays mapped while any tensor from it lives. A walk through a model block by block then holds far more than a
block. Here the bytes are read into memory that the tensor owns; what was read before is the kernel's page cache, which
is nobody's resident memory. Header: 8 bytes of length (little endian), JSON, then the data
(https://huggingface.co/docs/safetensors).

Offsets are checked by ``read_header`` when a model is opened; here only a file that changed since then is noticed.

Writing goes tensor by tensor, large ones in pieces, where the library first copies everything that a file will hold.
The bytes are the same.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from quantlab.errors import DataError
from quantlab.models.safetensors.files import TensorInfo
from quantlab.models.safetensors.header import layout_of

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
PIECE = 16 * 2**20  # bytes of a tensor that are in memory at once while it is copied from file to file


@dataclass(frozen=True)
class Source:
    """A tensor to be written: its type, its shape, and its content as consecutive pieces, made when they are needed."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[torch.Tensor]]


def in_memory(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> Source:
    """A tensor at hand as something to write, in ``dtype`` (None: its own)."""
    wanted = dtype or tensor.dtype

    def pieces() -> Iterator[torch.Tensor]:
        yield tensor.detach().to("cpu", wanted)

    return Source(wanted, tuple(tensor.shape), pieces)


def in_file(info: TensorInfo, dtype: torch.dtype | None = None) -> Source:
    """A stored tensor as something to write, in ``dtype`` (None: its own); only a piece of it is in memory at a
    time."""
    wanted = dtype or DTYPES[info.dtype]

    def pieces() -> Iterator[torch.Tensor]:
        if not info.shape:
            yield read_tensor(info).to(wanted)
            return
        rows = max(1, PIECE * info.shape[0] // max(info.count * DTYPES[info.dtype].itemsize, 1))
        for start in range(0, info.shape[0], rows):
            yield read_tensor(info, slice(start, start + rows)).to(wanted)

    return Source(wanted, info.shape, pieces)


def write_tensors(path: Path, tensors: Mapping[str, Source]) -> None:
    """Write a safetensors file, the same bytes as ``safetensors.torch.save_file``.

    Raises:
        OSError: it cannot be written (a full disk); what is there so far is no sound file.
    """
    head, starts = layout_of({name: (CODES[s.dtype], s.shape) for name, s in tensors.items()})
    with path.open("wb", buffering=0) as stream:
        _write_all(stream.fileno(), memoryview(head), 0)
        for name, source in tensors.items():
            offset = starts[name]
            for piece in source.pieces():
                data = piece.contiguous().reshape(-1).view(torch.uint8)
                _write_all(stream.fileno(), memoryview(data.numpy()), offset)
                offset += len(data)


def _write_all(fd: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwritev(fd, [view[done:]], offset + done)


def read_tensor(info: TensorInfo, rows: slice | None = None) -> torch.Tensor:
    """A tensor from its file, on the CPU, in memory of its own.

    Args:
        rows: only this contiguous part along the first dimension; None reads all.

    Raises:
        DataError: the file cannot be read, ends early, or no longer holds this tensor.
    """
    if info.reader is not None:
        return torch.from_numpy(info.reader.read(rows))
    start, stop = _span(info)
    shape = info.shape
    if rows is not None:
        first, last, step = rows.indices(shape[0])
        if step != 1:
            raise ValueError("rows must be contiguous")
        width = (stop - start) // max(shape[0], 1)
        start, stop = start + first * width, start + max(first, last) * width
        shape = (max(first, last) - first, *shape[1:])
    data = torch.empty(stop - start, dtype=torch.uint8)
    _read_into(data, info.file, start)
    return data.view(DTYPES[info.dtype]).reshape(shape)


def read_rows(info: TensorInfo, ids: torch.Tensor) -> torch.Tensor:
    """Rows ``ids`` int64 [...] of a matrix [n, m]: an embedding looked up without reading the rest. [..., m]."""
    wanted, back = torch.unique(ids.reshape(-1), return_inverse=True)
    found = torch.stack([read_tensor(info, slice(i, i + 1))[0] for i in wanted.tolist()])
    return found[back].reshape(*ids.shape, info.shape[1])


def read_exactly(fd: int, data: torch.Tensor, offset: int) -> int:
    """Fill ``data`` uint8 [n] from an open file at ``offset``; returns the bytes read, fewer at the file's end."""
    view, done = memoryview(data.numpy()), 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)  # one call moves at most 2 GiB
        if count == 0:
            break
        done += count
    return done


def _read_into(data: torch.Tensor, file: Path, offset: int) -> None:
    try:
        fd = os.open(file, os.O_RDONLY)
        try:
            done = read_exactly(fd, data, offset)
        finally:
            os.close(fd)
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}") from error
    if done < len(data):
        raise DataError(f"{file} ends early: {len(data)} bytes expected at {offset}, {done} are there")


def _span(info: TensorInfo) -> tuple[int, int]:
    """First and last byte (exclusive) of a tensor in its file."""
    try:
        found = info.file.stat()
        offsets = _offsets(info.file, found.st_mtime_ns, found.st_size)
    except OSError as error:
        raise DataError(f"cannot read {info.file}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{info.file} is not a sound safetensors file: {error}") from error
    span = offsets.get(info.name)
    if span is None or info.dtype not in DTYPES:
        raise DataError(f"{info.file} holds no tensor {info.name} of a type that can be read ({info.dtype})")
    number, pieces = info.piece or (0, 1)
    size = math.prod(info.shape) * DTYPES[info.dtype].itemsize
    expected = size * pieces
    if span[1] - span[0] != expected:
        raise DataError(
            f"{info.file}: {info.name} has {span[1] - span[0]} bytes, expected {expected}",
            hint="the file changed while it was in use",
        )
    return (span[0] + number * size, span[0] + (number + 1) * size) if info.piece else span


@lru_cache(maxsize=256)
def _offsets(file: Path, mtime: int, size: int) -> dict[str, tuple[int, int]]:
    """Where each tensor of a file lies; the file's time and size are part of the key, so that a changed file is read
    anew."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > size - 8:
            raise ValueError(f"its header claims {length} bytes, the file has {size}")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return {
        name: (8 + length + entry["data_offsets"][0], 8 + length + entry["data_offsets"][1])
        for name, entry in header.items()
    }
