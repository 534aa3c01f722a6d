"""The header of a safetensors file, byte for byte as the safetensors library writes it (no torch).

Tensors lie one after the other, wider types first and by name within a type, so that all are aligned; the header is
compact JSON, filled up with spaces to a multiple of 8 bytes. Knowing it allows writing a file piece by piece, and
saying how large it will be before there is anything to write.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

# Types from the narrowest to the widest, as the library sorts them, and their bytes.
WIDTHS: dict[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "F32": 4, "F64": 8, "I64": 8,
}  # fmt: skip
METADATA = {"format": "pt"}
Entry = tuple[str, tuple[int, ...]]  # type and shape


def layout_of(entries: Mapping[str, Entry]) -> tuple[bytes, dict[str, int]]:
    """Everything before the data (8 bytes of length, then the JSON), and where each tensor starts in the file."""
    ranks = {name: rank for rank, name in enumerate(WIDTHS)}
    order = sorted(entries, key=lambda name: (-ranks[entries[name][0]], name.encode()))
    described: dict[str, object] = {"__metadata__": METADATA}
    starts, end = {}, 0
    for name in order:
        dtype, shape = entries[name]
        starts[name] = end
        end += size_of(entries[name])
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + start for name, start in starts.items()}


def size_of(entry: Entry) -> int:
    """Bytes of one tensor."""
    return math.prod(entry[1]) * WIDTHS[entry[0]]


def file_bytes(entries: Mapping[str, Entry]) -> int:
    """Bytes of a whole file with these tensors."""
    return len(layout_of(entries)[0]) + sum(size_of(entry) for entry in entries.values())
