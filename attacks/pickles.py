"""Files in formats that execute code when they are read, each with a canary inside; see `attacks.models`.

Harmless: what would be executed creates an empty marker file in the test's own folder.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

CANARY = "canary-fired"
"""Name of the marker file: where it exists, something was unpickled."""


class Canary:
    """Unpickling it creates an empty file at `marker`, and nothing else."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        """What unpickling calls: open(marker, "w")."""
        return open, (self.marker, "w")


def dumped(marker: Path, *, protocol: int = 4) -> bytes:
    """A plain pickle."""
    return pickle.dumps({"state_dict": Canary(marker)}, protocol=protocol)


def torch_file(
    marker: Path, *, zipped: bool = True, content: Callable[[Canary], object] | None = None
) -> bytes:
    """What torch.save writes: a zip archive, or before 1.6 a row of pickles."""
    import torch

    file = io.BytesIO()
    found = content(Canary(marker)) if content else {"state_dict": Canary(marker)}
    torch.save(found, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def lightning_file(marker: Path) -> bytes:
    """A checkpoint of Lightning: hyper-parameters and callbacks are pickled objects."""
    return torch_file(
        marker,
        content=lambda canary: {
            "pytorch-lightning_version": "2.4.0",
            "state_dict": {},
            "hyper_parameters": canary,
            "callbacks": {"x": canary},
        },
    )


def joblib_file(marker: Path, *, compress: Any = 0) -> bytes:
    """What joblib.dump writes, compressed by "zlib", "gzip", "bz2", "lzma" or "xz", or not."""
    import joblib

    file = io.BytesIO()
    joblib.dump({"model": Canary(marker)}, file, compress=compress)
    return file.getvalue()


def numpy_file(marker: Path, *, archive: bool = False) -> bytes:
    """An array of objects as .npy or .npz."""
    import numpy as np

    file, array = io.BytesIO(), np.array([Canary(marker)], dtype=object)
    if archive:
        np.savez(file, array=array)
    else:
        np.save(file, array, allow_pickle=True)
    return file.getvalue()


def zip_of(name: str, content: bytes) -> bytes:
    """A zip archive with one member."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
    return file.getvalue()


def tar_of(name: str, content: bytes) -> bytes:
    """A tar archive with one member."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def safetensors_start(content: bytes) -> bytes:
    """A whole, valid safetensors file without tensors, followed by `content`."""
    return struct.pack("<Q", 2) + b"{}" + content


def pickle_with_length(marker: Path) -> bytes:
    """A pickle of protocol 2 whose first eight bytes are a header length that fits the file."""
    body = pickle.dumps(Canary(marker), protocol=2)  # 80 02: a length of 0x..0280 if the next bytes are zero
    return b"\x80\x02" + bytes(6) + b"{}".ljust(0x280) + body


PICKLES: dict[str, tuple[str, Callable[[Path], bytes]]] = {
    **{f"protocol {n}": (".pkl", lambda marker, n=n: dumped(marker, protocol=n)) for n in range(6)},
    "torch zip": (".pth", torch_file),
    "torch legacy": (".pt", lambda marker: torch_file(marker, zipped=False)),
    "lightning": (".ckpt", lightning_file),
    "joblib": (".joblib", joblib_file),
    **{
        f"joblib {kind}": (".joblib", lambda marker, kind=kind: joblib_file(marker, compress=(kind, 3)))
        for kind in ("zlib", "gzip", "bz2", "lzma", "xz")
    },
    "npy of objects": (".npy", numpy_file),
    "npz of objects": (".npz", lambda marker: numpy_file(marker, archive=True)),
    "zip of a pickle": (".zip", lambda marker: zip_of("archive/data.pkl", dumped(marker))),
    "tar of a pickle": (".tar", lambda marker: tar_of("data.pkl", dumped(marker))),
    "gzip of a pickle": (".pkl.gz", lambda marker: gzip.compress(dumped(marker))),
    "zlib of a pickle": (".pkl.z", lambda marker: zlib.compress(dumped(marker))),
    "bz2 of a pickle": (".pkl.bz2", lambda marker: bz2.compress(dumped(marker))),
    "xz of a pickle": (".pkl.xz", lambda marker: lzma.compress(dumped(marker))),
    "pickle, then zip": (".pth", lambda marker: dumped(marker) + torch_file(marker)),
    "zip, then pickle": (".pth", lambda marker: torch_file(marker) + dumped(marker)),
    "safetensors, then pickle": (".safetensors", lambda marker: safetensors_start(dumped(marker))),
    "safetensors, then zip": (".safetensors", lambda marker: safetensors_start(torch_file(marker))),
    "pickle that looks like a length": (".safetensors", pickle_with_length),
    "PNG, then pickle": (".png", lambda marker: b"\x89PNG\r\n\x1a\n" + dumped(marker)),
    "JSON, then pickle": (".json", lambda marker: b"{}\n" + dumped(marker)),
}
"""Name -> usual suffix of the file, and what makes its bytes from the path of the marker."""
