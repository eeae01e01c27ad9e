"""Named tensors in a safetensors file, with the checks that the format's library leaves to its users.

Format: 8 bytes little-endian header length, a JSON header, the tensors' bytes (safetensors, version 0.8
read). Our own header check runs first, on at most 1 MiB, before the library or an allocation sees the file.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from umiad import diskfile, strictjson
from umiad.errors import ModelFileError

if TYPE_CHECKING:
    from torch import Tensor

LENGTH_BYTES = 8
MAX_HEADER_BYTES = diskfile.HEAD_BYTES - LENGTH_BYTES  # 1 MiB
MAX_FILE_BYTES = 2 << 30
DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
MAX_AXES = 16
LENGTH_BYTES = 8
METADATA = "__metadata__"
FOREIGN_STARTS = (
    (b"PK", "a zip archive (a .pth or .ckpt of PyTorch, or .npz)"),
    (b"\x80", "a pickled object (an old .pth, .pkl or joblib file)"),
    (b"\x93NUMPY", "a NumPy array file"),
    (b"\x1f\x8b", "a gzip file"),
    (b"\x78", "a zlib stream (a compressed joblib file)"),
    (b"\x89HDF", "an HDF5 file"),
)
CONVERT_HINT = (
    "umiad reads safetensors only and never unpickles; convert the file beforehand, apart from umiad, with "
    "PyTorch's weights_only=True and safetensors.torch.save_file"
)


def to_bytes(tensors: Mapping[str, Tensor], *, finite: bool = True) -> bytes:
    """Serialise tensors of any device or layout; equal tensors give equal bytes.

    Raises:
        ModelFileError: a name or dtype that does not fit the format, or (with `finite`) NaN or infinity:
            what `from_bytes` would refuse is not written in the first place.
    """
    import torch
    from safetensors.torch import save

    for name, tensor in tensors.items():
        if not isinstance(name, str) or name == METADATA or not isinstance(tensor, torch.Tensor):
            raise ModelFileError(f"tensor {name!r} ({type(tensor).__name__}): expected a named torch.Tensor")
        if tensor.dtype not in _torch_dtypes():
            raise ModelFileError(
                f"tensor {name!r}: dtype {tensor.dtype}, expected one of {sorted(DTYPE_BYTES)}"
            )
    if finite:
        _refuse_nonfinite(tensors, source="tensors to be saved")
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    content: bytes = save(plain)
    check_header(content, total=len(content), source="tensors to be saved")
    return content


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, finite: bool = True) -> str:
    """Write atomically (see `diskfile.write_atomic`) and return the SHA-256 of the file in hex.

    Raises:
        ModelFileError: as in `to_bytes`.
        DiskError: writing failed; an older file is untouched.
    """
    content = to_bytes(tensors, finite=finite)
    diskfile.write_atomic(path, content)
    return hashlib.sha256(content).hexdigest()


def read_tensors(path: Path, *, sha256: str | None = None, finite: bool = True) -> dict[str, Tensor]:
    """Read tensors to the CPU after every check; with `sha256` (hex) the file must hash to it.

    The header is checked before the rest is read, so a lying header costs 1 MiB at most.

    Raises:
        InputError: there is no such file.
        ModelFileError: anything else that is wrong with it.
    """

    def check_head(head: bytes, total: int) -> None:
        check_header(head, total=total, source=str(path))

    content = diskfile.read_regular(path, limit=MAX_FILE_BYTES, check_head=check_head)
    if sha256 is not None and (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise ModelFileError(
            f"{path}: SHA-256 is {found}, expected {sha256}; the file is damaged or was altered"
        )
    return from_bytes(content, source=str(path), finite=finite)


def from_bytes(content: bytes, *, source: str, finite: bool = True) -> dict[str, Tensor]:
    """Tensors from the bytes of a safetensors file; `source` names it in errors.

    Raises:
        ModelFileError: foreign format, malformed header, or (with `finite`) NaN or infinity.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    check_header(content, total=len(content), source=source)
    try:
        tensors: dict[str, Tensor] = load(content)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise ModelFileError(f"{source}: refused by safetensors: {error}") from error
    if finite:
        _refuse_nonfinite(tensors, source=source)
    return tensors


def check_header(head: bytes, *, total: int, source: str) -> None:
    """Check the header of a safetensors file from its first bytes and its total size in bytes.

    Required: header within 1 MiB, names unique, dtypes known, each tensor's bytes = its shape's, and the
    tensors in offset order filling the file from end to end without hole or overlap.

    Raises:
        ModelFileError: naming the first violation.
    """
    if total > MAX_FILE_BYTES:
        raise ModelFileError(f"{source}: {total} bytes, the ceiling is {MAX_FILE_BYTES} bytes")
    if len(head) < LENGTH_BYTES:
        raise ModelFileError(f"{source}: {len(head)} bytes, expected a safetensors file; {CONVERT_HINT}")
    (length,) = struct.unpack_from("<Q", head)
    if length > min(MAX_HEADER_BYTES, total - LENGTH_BYTES):
        kind = next((f"this is {word}" for start, word in FOREIGN_STARTS if head.startswith(start)), "")
        most = f"the ceiling is {MAX_HEADER_BYTES} bytes and the file has {total} bytes"
        problem = kind or f"damaged or foreign: header of {length} bytes, {most}"
        raise ModelFileError(f"{source}: {problem}; expected a safetensors file; {CONVERT_HINT}")
    header = strictjson.load_object(head[LENGTH_BYTES : LENGTH_BYTES + length], source=f"{source} (header)")
    _check_metadata(header.pop(METADATA, {}), source=source)
    spans = sorted(_span(name, entry, source=source) for name, entry in header.items())
    _check_coverage(spans, expected=total - LENGTH_BYTES - length, source=source)


def _check_metadata(metadata: object, *, source: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModelFileError(f"{source}: {METADATA} must map names to strings")


def _span(name: str, entry: object, *, source: str) -> tuple[int, int, str]:
    """Begin, end and name of one tensor's bytes, after checking its header entry."""
    where = f"{source}: tensor {name[:80]!r}"
    if not isinstance(entry, dict) or set(entry) != ENTRY_KEYS:
        raise ModelFileError(f"{where}: malformed header entry, expected {sorted(ENTRY_KEYS)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ModelFileError(f"{where}: dtype {str(dtype)[:40]!r}, expected one of {sorted(DTYPE_BYTES)}")
    if not _are_sizes(shape) or len(shape) > MAX_AXES:
        raise ModelFileError(f"{where}: shape must be at most {MAX_AXES} integers from 0 to {MAX_FILE_BYTES}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ModelFileError(f"{where}: data_offsets must be two integers in order, 0 to {MAX_FILE_BYTES}")
    needed, given = math.prod(shape) * DTYPE_BYTES[dtype], offsets[1] - offsets[0]
    if needed != given:
        raise ModelFileError(f"{where}: {given} bytes, but {dtype} {shape} needs {needed} bytes")
    return offsets[0], offsets[1], name


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value <= MAX_FILE_BYTES for value in values
    )


def _check_coverage(spans: list[tuple[int, int, str]], *, expected: int, source: str) -> None:
    position = 0
    for begin, end, name in spans:
        if begin != position:
            word = "overlaps the one before" if begin < position else "leaves a hole before it"
            raise ModelFileError(
                f"{source}: tensor {name[:80]!r} {word}: starts at {begin}, expected {position}"
            )
        position = end
    if position != expected:
        raise ModelFileError(
            f"{source}: tensors take {position} bytes, the file holds {expected} bytes for them"
        )


def _torch_dtypes() -> set[object]:
    import torch

    floats = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
    return floats | {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}


def _refuse_nonfinite(tensors: Mapping[str, Tensor], *, source: str) -> None:
    """One pass: NaN and infinity stay in a sum, whatever is added. Finite values whose sum overflows are counted."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.sum().isfinite():
            continue
        if not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise ModelFileError(
                f"{source}: tensor {name!r} has {count} values NaN or infinite, expected none"
            )
