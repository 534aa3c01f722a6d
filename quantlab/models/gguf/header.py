"""The header of a GGUF file, read by a reader that believes no number in it (no torch).

Layout, little endian (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)::

    "GGUF", version, number of tensors, number of keys
    keys:     name, type, value          an array is the type of its elements, their number, the elements
    tensors:  name, dimensions (innermost first), ggml type, offset from the data's start
    data:     from the next multiple of the alignment on

Every length is compared with what is left of the file before anything of that size is read, so that memory is bounded
by a small multiple of the header that is really there. ``gguf.GGUFReader`` maps the file and makes several arrays of
each element before any count is checked.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from quantlab.errors import DataError

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # version 1 counted in 32 bits and was replaced within weeks
LARGEST_HEADER = 128 * 2**20  # bytes; a vocabulary of 256 thousand tokens takes 10 MB
AHEAD = 2**16  # bytes that are read together
LONGEST_KEY, LONGEST_NAME = 65_535, 255  # bytes
MOST_DIMENSIONS = 4
ALIGNMENT, LARGEST_ALIGNMENT = 32, 2**16
NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")  # of a tensor: nothing that leads out of a folder
STRING, ARRAY, BOOL = 8, 9, 7
NUMBERS = {
    0: "u1",
    1: "i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
SMALLEST_PAIR = 8 + 4 + 1  # bytes of a key and its value
SMALLEST_TENSOR = 8 + 4 + 8 + 4 + 8


@dataclass(frozen=True)
class Stored:
    """A tensor as the file has it: its ggml type (number and name), its shape with the outermost dimension first, its
    first byte in the file and its bytes."""

    name: str
    kind: int
    kind_name: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its data. ``metadata``: numbers, texts, lists of texts, NumPy arrays of numbers.
    ``stamp``: time and size of the file that was read; ``digest``: SHA-256 of the header's bytes."""

    file: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    stamp: tuple[int, int]
    digest: str


class _Unsound(Exception):
    """What is wrong with a file, for the message."""


def read_header(file: Path) -> Header:
    """The header of a GGUF file, every part of it checked against the file's size.

    Raises:
        DataError: no GGUF file of a known version, cut short, or damaged; says where and what was expected.
    """
    try:
        found = file.stat()
        return _read(file, (found.st_mtime_ns, found.st_size))
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}") from error


def stamp_of(file: Path) -> tuple[int, int]:
    """Time and size of a file, by which a change is noticed."""
    found = file.stat()
    return found.st_mtime_ns, found.st_size


@lru_cache(maxsize=4)
def _read(file: Path, stamp: tuple[int, int]) -> Header:
    """``stamp`` is part of the key, so that a changed file is read anew."""
    with file.open("rb") as stream:
        cursor = _Cursor(stream, stamp[1])
        try:
            tensor_count, pair_count = _start(cursor)
            metadata = _metadata(cursor, pair_count)
            described = _described(cursor, tensor_count)
            tensors = _placed(described, _data_start(cursor, metadata), metadata, stamp[1])
        except _Unsound as error:
            raise DataError(
                f"{file} is not a sound GGUF file: {error}", hint="it is cut short or damaged: fetch it again"
            ) from None
        return Header(file, metadata, tensors, stamp, _digest(stream, cursor.place))


def _digest(stream: BinaryIO, size: int) -> str:
    """SHA-256 of the first ``size`` bytes, hexadecimal."""
    total = sha256()
    stream.seek(0)
    while size > 0 and (piece := stream.read(min(size, AHEAD))):
        total.update(piece)
        size -= len(piece)
    return total.hexdigest()


class _Cursor:
    """Reads on and on, never more than the file has."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self.stream, self.size, self.place = stream, size, 0
        self._ahead, self._at = b"", 0  # bytes that are read already, and which is next

    @property
    def left(self) -> int:
        """Bytes that the rest of the header can have."""
        return min(self.size, LARGEST_HEADER) - self.place

    def take(self, count: int, what: str) -> bytes:
        """The next ``count`` bytes."""
        if count > self.left:
            if count <= self.size - self.place:
                raise _Unsound(f"its header is larger than {LARGEST_HEADER >> 20} MiB ({what})")
            raise _Unsound(f"{what} needs {count} bytes at byte {self.place}, the file has {self.size}")
        if count > len(self._ahead) - self._at:
            kept = self._ahead[self._at :]
            self._ahead, self._at = kept + self.stream.read(max(count - len(kept), AHEAD)), 0
        data = self._ahead[self._at : self._at + count]
        if len(data) != count:
            raise _Unsound(f"it ends at byte {self.place + len(data)}, inside {what}")
        self.place += count
        self._at += count
        return data

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}"), what))[0]

    def text(self, what: str, longest: int | None = None) -> str:
        length = int.from_bytes(self.take(8, what), "little")
        if longest is not None and length > longest:
            raise _Unsound(f"{what} has {length} bytes, at most {longest} are allowed")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise _Unsound(f"{what} is not UTF-8") from None


def _start(cursor: _Cursor) -> tuple[int, int]:
    """Magic and version; returns the numbers of tensors and of keys."""
    magic = cursor.take(4, "the magic number")
    if magic != MAGIC:
        raise _Unsound(f"it begins with {magic!r}, expected {MAGIC!r}")
    version = cursor.number("I", "the version")
    if version & 0xFFFF == 0 and version:
        raise _Unsound("it is big-endian; only little-endian files are read")
    if version not in VERSIONS:
        raise _Unsound(f"it is of version {version}, read are {' and '.join(map(str, VERSIONS))}")
    tensor_count = cursor.number("Q", "the number of tensors")
    pair_count = cursor.number("Q", "the number of keys")
    for count, smallest, what in (
        (pair_count, SMALLEST_PAIR, "keys"),
        (tensor_count, SMALLEST_TENSOR, "tensors"),
    ):
        if count * smallest > cursor.left:
            raise _Unsound(f"it claims {count} {what}, for which its {cursor.size} bytes have no room")
    return tensor_count, pair_count


def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for number in range(count):
        key = cursor.text(f"the name of key {number}", LONGEST_KEY)
        if key in found:
            raise _Unsound(f"key {key!r} is there twice")
        found[key] = _value(cursor, cursor.number("I", f"the type of {key!r}"), f"{key!r}")
    return found


def _value(cursor: _Cursor, kind: int, what: str) -> Any:
    if kind == STRING:
        return cursor.text(what)
    if kind != ARRAY:
        dtype = _number_type(kind, what)
        value = np.frombuffer(cursor.take(dtype.itemsize, what), dtype)[0].item()
        return bool(value) if kind == BOOL else value
    inner = cursor.number("I", what)
    count = cursor.number("Q", what)
    smallest = 8 if inner == STRING else _number_type(inner, f"the elements of {what}").itemsize
    if count * smallest > cursor.left:
        raise _Unsound(f"{what} claims {count} elements, for which its {cursor.size} bytes have no room")
    if inner == STRING:
        inside = f"an element of {what}"
        return [cursor.text(inside) for _ in range(count)]
    values = np.frombuffer(cursor.take(count * smallest, what), NUMBERS[inner])
    return values.astype(bool) if inner == BOOL else values


def _number_type(kind: int, what: str) -> np.dtype[Any]:
    if kind not in NUMBERS:
        raise _Unsound(f"{what} is of type {kind}, which no GGUF file has there")
    return np.dtype(NUMBERS[kind])


def _described(cursor: _Cursor, count: int) -> dict[str, tuple[tuple[int, ...], int, int]]:
    """By tensor: shape (outermost dimension first), ggml type, offset."""
    found: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for number in range(count):
        name = cursor.text(f"the name of tensor {number}", LONGEST_NAME)
        if not NAME.fullmatch(name):
            raise _Unsound(
                f"tensor {number} is called {name!r}, expected letters, digits, - and _ between dots"
            )
        if name in found:
            raise _Unsound(f"tensor {name} is there twice")
        dimensions = cursor.number("I", f"the shape of {name}")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise _Unsound(f"{name} has {dimensions} dimensions, expected 1 to {MOST_DIMENSIONS}")
        sizes = struct.unpack(f"<{dimensions}Q", cursor.take(8 * dimensions, f"the shape of {name}"))
        kind, offset = cursor.number("I", f"the type of {name}"), cursor.number("Q", f"the offset of {name}")
        if not all(sizes):
            raise _Unsound(f"{name} has a dimension of 0")
        found[name] = (tuple(reversed(sizes)), kind, offset)
    return found


def _data_start(cursor: _Cursor, metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", ALIGNMENT)
    good = isinstance(alignment, int) and 8 <= alignment <= LARGEST_ALIGNMENT and alignment.bit_count() == 1
    if not good:
        raise _Unsound(
            f"general.alignment is {alignment!r}, expected a power of 2 from 8 to {LARGEST_ALIGNMENT}"
        )
    return -(-cursor.place // alignment) * int(alignment)


def _placed(
    described: Mapping[str, tuple[tuple[int, ...], int, int]],
    start: int,
    metadata: Mapping[str, Any],
    file_size: int,
) -> dict[str, Stored]:
    """Tensors with their bytes, none outside the file and no two in the same place."""
    alignment = metadata.get("general.alignment", ALIGNMENT)
    found: dict[str, Stored] = {}
    for name, (shape, kind, offset) in described.items():
        kind_name, block, block_bytes = ggml_type(kind, name)
        if shape[-1] % block:
            raise _Unsound(f"{name} {list(shape)} is {kind_name}, whose rows are multiples of {block}")
        size = math.prod(shape) // block * block_bytes
        if offset % alignment:
            raise _Unsound(f"{name} lies at offset {offset}, not a multiple of the alignment {alignment}")
        if start + offset + size > file_size:
            raise _Unsound(f"{name} ends at byte {start + offset + size}, the file has {file_size}")
        found[name] = Stored(name, kind, kind_name, shape, start + offset, size)
    end, before = start, ""
    for tensor in sorted(found.values(), key=lambda tensor: tensor.start):
        if tensor.start < end:
            raise _Unsound(f"{tensor.name} overlaps {before}")
        end, before = tensor.start + tensor.size, tensor.name
    return found


def ggml_type(kind: int, name: str) -> tuple[str, int, int]:
    """Name, numbers in a block and bytes of a block of a ggml type, that of tensor ``name``.

    Raises:
        _Unsound: no such type, or one that cannot be decoded.
    """
    found = _decodable(kind)
    if found is None:
        raise _Unsound(f"{name} is of ggml type {_kind_name(kind)}, which cannot be decoded here")
    return found


@cache
def _decodable(kind: int) -> tuple[str, int, int] | None:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        known = GGMLQuantizationType(kind)
        block, size = GGML_QUANT_SIZES[known]
        dequantize(np.zeros((1, size), np.uint8), known)
    except (ValueError, KeyError, NotImplementedError):
        return None
    return known.name, block, size


def _kind_name(kind: int) -> str:
    from gguf.constants import GGMLQuantizationType

    return GGMLQuantizationType(kind).name if kind in set(GGMLQuantizationType) else str(kind)
