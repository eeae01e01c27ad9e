"""The manifest of a saved or exported model: which files belong to it, their sizes and SHA-256.

It shows integrity, not authenticity: whoever can alter a file can alter the manifest too. To detect that,
keep the manifest's own SHA-256 elsewhere.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from umiad import __version__, diskfile, strictjson, tensorfile
from umiad.errors import InputError, ModelFileError

MANIFEST, CONFIG, WEIGHTS, SPLIT, CARD = (
    "manifest.json",
    "config.json",
    "weights.safetensors",
    "split.json",
    "card.md",
)
GRAPH, IR_GRAPH, IR_WEIGHTS = "model.onnx", "model.xml", "model.bin"
REQUIRED = (CONFIG, WEIGHTS, SPLIT, CARD)
MAX_JSON_BYTES = 1 * diskfile.MIB
MAX_OTHER_BYTES = 64 * diskfile.MIB
MAX_GRAPH_BYTES = (2 << 30) - 1  # what one protobuf message may hold
CEILINGS = {
    CONFIG: MAX_JSON_BYTES,
    CARD: MAX_JSON_BYTES,
    WEIGHTS: tensorfile.MAX_FILE_BYTES,
    GRAPH: MAX_GRAPH_BYTES,
    IR_WEIGHTS: MAX_GRAPH_BYTES,
}
MAX_FILES = 64
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"[0-9A-Za-z.+!-]{1,40}")


@dataclass(frozen=True)
class Kind:
    """What a folder of ours is: its `name` in the manifest, what people call it, and the files it must have.

    `format`: the one that this umiad writes, and the newest that it reads.
    """

    name: str
    noun: str
    required: tuple[str, ...]
    format: int


MODEL = Kind("umiad model", "saved model", REQUIRED, format=1)
EXPORT = Kind("umiad export", "exported model", (CONFIG, CARD), format=1)
_KINDS = {kind.name: kind for kind in (MODEL, EXPORT)}


def ceiling(name: str) -> int:
    """Largest size in bytes that a file of this name may have: split and extra files 64 MiB."""
    return CEILINGS.get(name, MAX_OTHER_BYTES)


def build(files: Mapping[str, bytes], *, kind: Kind = MODEL) -> dict[str, Any]:
    """The manifest of these files (name -> content). Raises ModelFileError if `read` would refuse it."""
    listed = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
    }
    manifest = {"format": kind.format, "kind": kind.name, "umiad_version": __version__, "files": listed}
    _check_files(listed, kind=kind, source=f"the {kind.noun.split()[-1]} to be saved")
    return manifest


def read(path: Path, *, sha256: str | None = None, kind: Kind = MODEL) -> dict[str, Any]:
    """Read and check a manifest of this `kind`; with `sha256` (hex) it must hash to it.

    Raises:
        ModelFileError: no manifest, none of ours, of another kind or format, unsafe names, or too large.
    """
    return read_hashed(path, sha256=sha256, kind=kind)[0]


def read_hashed(path: Path, *, sha256: str | None = None, kind: Kind = MODEL) -> tuple[dict[str, Any], str]:
    """The manifest and the SHA-256 (hex) of the very bytes it was read from. Raises as `read` does."""
    if not os.path.lexists(path):
        raise ModelFileError(f"{path}: not there, expected in every {kind.noun}; is {path.parent} one?")
    content = diskfile.read_regular(path, limit=MAX_JSON_BYTES, follow_links=False)
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256:
        raise ModelFileError(f"{path}: SHA-256 is {found}, expected {sha256}: not the model that was pinned")
    manifest = strictjson.load_object(content, source=str(path))
    if manifest.get("kind") != kind.name:
        raise ModelFileError(f"{path}: {_other_kind(manifest.get('kind'), kind)}")
    _check_format(manifest, kind=kind, source=str(path))
    _check_files(manifest.get("files"), kind=kind, source=str(path))
    return manifest, found


def kind_of(folder: Path) -> Kind | None:
    """What a folder's manifest says it is; None where there is no readable manifest of ours. Nothing is checked."""
    try:
        content = diskfile.read_regular(folder / MANIFEST, limit=MAX_JSON_BYTES, follow_links=False)
        return _KINDS.get(str(strictjson.load_object(content, source=MANIFEST).get("kind")))
    except (InputError, ModelFileError):
        return None


def _other_kind(found: object, expected: Kind) -> str:
    known = _KINDS.get(found) if isinstance(found, str) else None
    if known is EXPORT:
        return (
            "of an exported model, which can only score (`umiad score`); here use the model it was made from"
        )
    if known is not None:
        return f"of a {known.noun}, expected one of an {expected.noun}"
    return f"not a manifest of umiad (its 'kind' is not {expected.name!r})"


def read_listed(folder: Path, manifest: Mapping[str, Any]) -> dict[str, bytes]:
    """Read every listed file of a model folder once, checking size and SHA-256 of the bytes returned.

    The weights' header is checked before the rest of that file is read.

    Raises:
        ModelFileError: a file is missing, a link, or not the one that was saved.
    """
    found: dict[str, bytes] = {}
    for name, facts in manifest["files"].items():
        path, expected = folder / name, facts["sha256"]
        if not os.path.lexists(path):
            raise ModelFileError(f"{path}: missing, expected {facts['bytes']} bytes; copy the model again")
        content = diskfile.read_regular(
            path,
            limit=ceiling(name),
            size=facts["bytes"],
            follow_links=False,
            check_head=partial(_check_weights, path) if name == WEIGHTS else None,
        )
        if (digest := hashlib.sha256(content).hexdigest()) != expected:
            raise ModelFileError(f"{path}: SHA-256 is {digest}, expected {expected}; damaged or altered")
        found[name] = content
    return found


def _check_weights(path: Path, head: bytes, total: int) -> None:
    tensorfile.check_header(head, total=total, source=str(path))


def _check_format(manifest: Mapping[str, object], *, kind: Kind, source: str) -> None:
    number, version = manifest.get("format"), manifest.get("umiad_version")
    if type(number) is not int or number < 1:
        raise ModelFileError(
            f"{source}: format is {str(number)[:40]!r}, expected an integer from 1 to {kind.format}"
        )
    if not isinstance(version, str) or not _VERSION.fullmatch(version):
        raise ModelFileError(f"{source}: umiad_version is missing or malformed, expected text like '0.1.0'")
    if number > kind.format:
        raise ModelFileError(
            f"{source}: format {number}, this umiad {__version__} reads up to {kind.format}; "
            f"it was written by umiad {version}: pip install 'umiad>={version}'"
        )


def _check_files(files: object, *, kind: Kind, source: str) -> None:
    if not isinstance(files, dict) or len(files) > MAX_FILES:
        raise ModelFileError(f"{source}: 'files' must be an object with at most {MAX_FILES} names")
    if missing := [name for name in kind.required if name not in files]:
        raise ModelFileError(f"{source}: lists no {missing[0]}, expected {', '.join(kind.required)}")
    if len({name.casefold() for name in files} | {MANIFEST}) != len(files) + 1:
        raise ModelFileError(f"{source}: file names must differ in more than case and not be {MANIFEST}")
    for name, facts in files.items():
        if not _NAME.fullmatch(name):
            raise ModelFileError(
                f"{source}: file name {name[:120]!r}, expected letters, digits, '.', '_', '-' only"
            )
        if not isinstance(facts, dict) or set(facts) != {"bytes", "sha256"}:
            raise ModelFileError(f"{source}: entry of {name} must hold 'bytes' and 'sha256' only")
        size, digest = facts["bytes"], facts["sha256"]
        if type(size) is not int or not 0 <= size <= ceiling(name):
            raise ModelFileError(
                f"{source}: {name} has {str(size)[:40]} bytes, expected 0 to {ceiling(name)}"
            )
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise ModelFileError(f"{source}: SHA-256 of {name} is malformed, expected 64 hex digits")
