"""Messages between a process and its decoding children: a JSON header and raw bytes, never objects.

Format: 4 bytes header length, 8 bytes payload length (big-endian), the header as UTF-8 JSON, the payload.
"""

from __future__ import annotations

import json
import struct
from typing import Any, BinaryIO

_LENGTHS = struct.Struct(">IQ")
MAX_HEADER = 1 << 20
MAX_PAYLOAD = 1 << 30


class BrokenWire(Exception):
    """The other side ended, or sent what is no message."""


def send(stream: BinaryIO, header: dict[str, Any], payload: bytes | memoryview = b"") -> None:
    """Write one message. Raises OSError when the other side is gone."""
    text = json.dumps(header, allow_nan=False).encode()
    stream.write(_LENGTHS.pack(len(text), len(payload)))
    stream.write(text)
    stream.write(payload)
    stream.flush()


def receive(stream: BinaryIO) -> tuple[dict[str, Any], bytearray]:
    """Read one message. Raises BrokenWire when the stream ends or what comes is no message."""
    head = _LENGTHS.unpack(_exactly(stream, _LENGTHS.size))
    if head[0] > MAX_HEADER or head[1] > MAX_PAYLOAD:
        raise BrokenWire("a message larger than any that is sent")
    try:
        header = json.loads(bytes(_exactly(stream, head[0])))
    except (ValueError, RecursionError) as error:
        raise BrokenWire("a header that is no JSON") from error
    if not isinstance(header, dict):
        raise BrokenWire("a header that is no object")
    return header, _exactly(stream, head[1])


def _exactly(stream: BinaryIO, count: int) -> bytearray:
    content = bytearray(count)
    view, done = memoryview(content), 0
    while done < count:
        read = stream.readinto(view[done:])  # type: ignore[attr-defined]
        if not read:
            raise BrokenWire("the stream ended")
        done += read
    return content
