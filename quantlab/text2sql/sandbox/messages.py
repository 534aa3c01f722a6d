"""Messages between the sandbox and its workers: length-prefixed JSON (4 bytes big-endian, then ASCII) on a pipe.

Never pickle: what comes back from a process that ran hostile SQL is data, and only data. JSON knows no bytes,
so a blob travels as {"b": base64}, in both directions without anybody else's doing.
"""

from __future__ import annotations

import base64
import json
import struct
from typing import IO, Any


def _encode(value: Any) -> dict[str, str]:
    if isinstance(value, bytes):
        return {"b": base64.b64encode(value).decode("ascii")}
    raise TypeError(
        f"a value of type {type(value).__name__} cannot be sent; None, int, float, str or bytes can"
    )


def _decode(found: dict[str, Any]) -> Any:
    return base64.b64decode(found["b"]) if found.keys() == {"b"} else found


_ENCODER = json.JSONEncoder(separators=(",", ":"), default=_encode)
_DECODER = json.JSONDecoder(object_hook=_decode)


def read_frame(stream: IO[bytes]) -> dict[str, Any] | None:
    """The next message, or None at the end of input, which may cut a frame short."""
    head = stream.read(4)
    if len(head) < 4:
        return None
    size = struct.unpack(">I", head)[0]
    body = stream.read(size)
    if len(body) < size:
        return None
    message: dict[str, Any] = _DECODER.decode(body.decode("ascii"))
    return message


def write_frame(stream: IO[bytes], message: dict[str, Any]) -> None:
    """TypeError for a value that JSON and this module have no form for."""
    body = _ENCODER.encode(message).encode("ascii")
    stream.write(struct.pack(">I", len(body)) + body)
    stream.flush()
