"""What can be wrong with the bytes of a safetensors file; see `attacks.models`."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

DEEP = 10_000
"""Levels of nested JSON: beyond what Python's parser takes."""
Header = dict[str, Any]
Change = Callable[[Header, bytes], bytes]
"""Header and data of a good file -> the bytes of a bad one."""


def split_file(content: bytes) -> tuple[Header, bytes]:
    """The header and the data of a safetensors file."""
    (length,) = struct.unpack_from("<Q", content)
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join_file(header: Header | bytes, data: bytes, *, length: int | None = None) -> bytes:
    """A safetensors file, with a lying header length where one is given."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _entry(**changes: Any) -> Change:
    """Change fields of the header's first float tensor of two axes or more."""

    def change(header: Header, data: bytes) -> bytes:
        name = next(
            key for key, value in header.items() if value.get("dtype") == "F32" and len(value["shape"]) > 1
        )
        fields = {key: value(header[name][key]) for key, value in changes.items()}
        return join_file(header | {name: header[name] | fields}, data)

    return change


def _renamed(header: Header, data: bytes) -> bytes:
    name = max(header)
    return join_file({(f"{key}_" if key == name else key): value for key, value in header.items()}, data)


def _missing(header: Header, data: bytes) -> bytes:
    last = max(header, key=lambda key: header[key]["data_offsets"][1])
    return join_file({k: v for k, v in header.items() if k != last}, data[: header[last]["data_offsets"][0]])


def _more(*, count: int, name: str = "extra{}", size: int = 0) -> Change:
    """Further tensors of bytes, each of `size` bytes."""

    def change(header: Header, data: bytes) -> bytes:
        more = {
            name.format(k): {
                "dtype": "U8",
                "shape": [size],
                "data_offsets": [len(data) + k * size, len(data) + (k + 1) * size],
            }
            for k in range(count)
        }
        return join_file(header | more, data + bytes(count * size))

    return change


def last_value(pattern: bytes) -> Change:
    """Overwrite the last float32 of the file."""
    return lambda header, data: join_file(header, data[:-4] + pattern)


def _raw(text: bytes, *, length: int | None = None) -> Change:
    return lambda header, data: join_file(text, data, length=length)


def _length(length: int) -> Change:
    return lambda header, data: join_file(header, data, length=length)


def _twice(header: Header, data: bytes) -> bytes:
    name = max(header)
    return join_file(
        json.dumps(header)[:-1].encode() + f", {json.dumps({name: header[name]})[1:]}".encode(), data
    )


def _shift(begin: int, end: int) -> Callable[[list[int]], list[int]]:
    return lambda offsets: [offsets[0] + begin, offsets[1] + end]


CHANGES: dict[str, tuple[Change, str]] = {
    "header length 0": (_length(0), "JSON"),
    "header length 2^63": (_length(2**63), "ceiling"),
    "header length 2^64 - 1": (_length(2**64 - 1), "ceiling"),
    "header length 200 MB": (_length(200 << 20), "ceiling"),
    "header one byte short": (lambda h, d: join_file(h, d, length=len(json.dumps(h)) - 1), "JSON"),
    "header not JSON": (_raw(b"{'a': 1}"), "JSON"),
    "header not UTF-8": (_raw(b'{"\xff": 1}'), "UTF-8"),
    "header a list": (_raw(b"[]"), "list"),
    "header nested": (_raw(b"[" * DEEP), "nested"),
    "header nested objects": (_raw(b'{"a":' * DEEP + b"1" + b"}" * DEEP), "nested"),
    "header of blanks": (_raw(b"{}".ljust((1 << 20) + 1)), "ceiling"),
    "header with NaN": (_raw(b'{"a": NaN}'), "NaN"),
    "header with a giant integer": (_raw(b'{"a": ' + b"9" * 10_000 + b"}"), "JSON"),
    "nothing after the header": (lambda h, d: join_file(h, b""), "the file holds"),
    "one byte more": (lambda h, d: join_file(h, d + b"\0"), "the file holds"),
    "a name twice": (_twice, "twice"),
    "offsets past the end": (_entry(data_offsets=_shift(1 << 20, 1 << 20)), "hole"),
    "offsets negative": (_entry(data_offsets=lambda _: [-8, 0]), "data_offsets"),
    "offsets backwards": (_entry(data_offsets=lambda both: both[::-1]), "data_offsets"),
    "offsets overlap": (_entry(data_offsets=_shift(-4, -4)), "overlaps"),
    "offsets leave a hole": (_entry(data_offsets=_shift(4, 4)), ""),
    "offsets beyond 2^63": (_entry(data_offsets=lambda _: [2**63, 2**63 + 4]), "data_offsets"),
    "a shape that overflows": (_entry(shape=lambda _: [2**62, 4]), "shape"),
    "a product that overflows": (_entry(shape=lambda _: [2**31, 2**31, 4]), "needs"),
    "a shape with a negative axis": (_entry(shape=lambda shape: [-each for each in shape]), "shape"),
    "a shape in floats": (_entry(shape=lambda shape: [float(each) for each in shape]), "shape"),
    "a shape of 1e5 axes": (_entry(shape=lambda shape: shape + [1] * 10**5), "shape"),
    "another shape": (_entry(shape=lambda shape: [*shape[1:], shape[0], 1]), "shape"),
    "another dtype": (_entry(dtype=lambda _: "I32"), "dtype"),
    "an unknown dtype": (_entry(dtype=lambda _: "PICKLE"), "dtype"),
    "1e5 names": (_more(count=10**5, name="{}"), "ceiling"),
    "12000 names": (_more(count=12_000, name="{}"), "not part of this model"),
    "a tensor more": (_more(count=1, size=8), "not part of this model"),
    "code in a tensor": (
        lambda h, d: _more(count=1, size=8)(h, d)[:-8] + b"cos\nexec",
        "not part of this model",
    ),
    "a tensor less": (_missing, "missing"),
    "a tensor renamed": (_renamed, ""),
    "no tensors": (lambda h, d: join_file({}, b""), "missing"),
    "NaN": (last_value(struct.pack("<f", float("nan"))), "NaN"),
    "infinity": (last_value(struct.pack("<f", float("inf"))), "infinite"),
    "minus infinity": (last_value(struct.pack("<f", float("-inf"))), "infinite"),
}
"""Name -> change, and words of the error that must come of it."""
