"""GGUF files: written tensor by tensor, and read back into a transformers model.

The header holds all names, shapes and offsets, so it is known to the byte before any tensor is; tensors then follow one
after the other and are never in memory together. The ``gguf`` package writes the header; version 3, little endian,
tensors aligned to 32 bytes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantlab.formats.gguf.architectures import Place, Places
from quantlab.formats.gguf.metadata import add_settings, extra_tensors
from quantlab.formats.gguf.tokenizer import add_tokenizer
from quantlab.registry.block_types import BLOCK_TYPES, PLAIN_TYPES
from quantlab.registry.mixtures import AUTO_TYPE, FILE_TYPES

if TYPE_CHECKING:
    from gguf import GGUFWriter

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
QUANTIZATION_VERSION = 2  # of ggml's block types


@dataclass(frozen=True)
class Entry:
    """A tensor to be written. ``kind``: a name in ``BLOCK_TYPES`` or ``PLAIN_TYPES``. ``shape``: of its numbers, the
    row's length last. ``parts``: what gives its bytes, one after the other."""

    name: str
    kind: str
    shape: tuple[int, ...]
    parts: Sequence[Callable[[], Bytes]]

    @property
    def bytes(self) -> int:
        count = int(np.prod(self.shape[:-1], dtype=np.int64))
        return count * row_bytes(self.kind, self.shape[-1])


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of a row of ``columns`` numbers."""
    return PLAIN_TYPES[kind][1] * columns if kind in PLAIN_TYPES else BLOCK_TYPES[kind].row_bytes(columns)


def write(
    path: Path, entries: Sequence[Entry], folder: Path, settings: Mapping[str, Any], wanted: str, called: str
) -> None:
    """Write a model's file.

    Args:
        entries: its tensors, in the order they are to have.
        folder: where the tokenizer is. settings: as ``metadata.read_settings`` gives them.
        wanted: the type or mixture that most of it is in, or "auto". called: the model's name.

    Raises:
        DataError: as ``add_settings`` and ``add_tokenizer``. OSError: the file cannot be written.
    """
    writer = _header(entries, folder, settings, wanted, called, path)
    try:
        assert writer.fout is not None
        stream = writer.fout[0]
        writer.write_padding(stream, stream.tell())
        for entry in entries:
            written = 0
            for part in entry.parts:
                data = part()
                stream.write(np.ascontiguousarray(data).view(np.uint8).data)
                written += data.nbytes
            if written != entry.bytes:
                raise RuntimeError(f"{entry.name} has {written} bytes, {entry.bytes} were announced")
            writer.write_padding(stream, written)
    finally:
        writer.close()


def file_bytes(
    entries: Sequence[Entry], folder: Path, settings: Mapping[str, Any], wanted: str, called: str
) -> int:
    """Bytes of the file that :func:`write` makes of these tensors, whose ``parts`` are not asked for.

    Raises:
        DataError: as :func:`write`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "header"
        writer = _header(entries, folder, settings, wanted, called, path)
        align = writer.data_alignment
        writer.close()
        sizes = [path.stat().st_size, *(entry.bytes for entry in entries)]
    return sum(-(-size // align) * align for size in sizes)


def _header(
    entries: Sequence[Entry], folder: Path, settings: Mapping[str, Any], wanted: str, called: str, path: Path
) -> GGUFWriter:
    """A writer that has written all but the tensors."""
    from gguf import GGMLQuantizationType, GGUFWriter

    held = Places(settings, called).architecture
    writer = GGUFWriter(None, held.name)
    writer.add_name(called)
    writer.add_quantization_version(QUANTIZATION_VERSION)
    writer.add_file_type(FILE_TYPES[most_common(entries) if wanted == AUTO_TYPE else wanted])
    add_settings(writer, settings, held, called)
    add_tokenizer(writer, folder, int(settings["vocab_size"]), called)
    for entry in entries:
        number = PLAIN_TYPES[entry.kind][0] if entry.kind in PLAIN_TYPES else BLOCK_TYPES[entry.kind].number
        shape = (*entry.shape[:-1], row_bytes(entry.kind, entry.shape[-1]))
        writer.add_tensor_info(
            entry.name, shape, np.dtype(np.uint8), entry.bytes, GGMLQuantizationType(number)
        )
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer


def most_common(entries: Sequence[Entry]) -> str:
    """The block type that most of the bytes are in, the larger one of equals."""
    counts = dict.fromkeys(BLOCK_TYPES, 0)
    for entry in entries:
        if entry.kind in counts:
            counts[entry.kind] += entry.bytes
    return max(counts, key=lambda kind: counts[kind])


def extras(settings: Mapping[str, Any], places: Places) -> Iterator[Entry]:
    """The tensors beside the model's own."""
    for name, values in extra_tensors(settings, places.architecture).items():
        yield Entry(name, "F32", values.shape, [partial(_as_bytes, values)])


def _as_bytes(values: np.ndarray[Any, Any]) -> Bytes:
    return np.asarray(values.view(np.uint8))


__all__ = ["Entry", "Place", "extras", "file_bytes", "row_bytes", "write"]
