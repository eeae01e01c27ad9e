"""The manifest of a saved model: which files belong to it, their sizes and SHA-256.

It shows integrity, not authenticity: whoever can alter a file can alter the manifest too. To detect that,
keep the manifest's own SHA-256 elsewhere.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from umiad import __version__, diskfile, strictjson, tensorfile
from umiad.errors import ModelFileError

MANIFEST, CONFIG, WEIGHTS, SPLIT, CARD = (
    "manifest.json",
    "config.json",
    "weights.safetensors",
    "split.json",
    "card.md",
)
REQUIRED = (CONFIG, WEIGHTS, SPLIT, CARD)
FORMAT = 1
KIND = "umiad model"
MAX_JSON_BYTES = 1 * diskfile.MIB
MAX_OTHER_BYTES = 64 * diskfile.MIB
CEILINGS = {CONFIG: MAX_JSON_BYTES, CARD: MAX_JSON_BYTES, WEIGHTS: tensorfile.MAX_FILE_BYTES}
MAX_FILES = 64
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"[0-9A-Za-z.+!-]{1,40}")


def ceiling(name: str) -> int:
    """Largest size in bytes that a file of this name may have: split and extra files 64 MiB."""
    return CEILINGS.get(name, MAX_OTHER_BYTES)


def build(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The manifest of these files (name -> content). Raises ModelFileError if `read` would refuse it."""
    listed = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
    }
    manifest = {"format": FORMAT, "kind": KIND, "umiad_version": __version__, "files": listed}
    _check_files(listed, source="the model to be saved")
    return manifest


def read(path: Path, *, sha256: str | None = None) -> dict[str, Any]:
    """Read and check a manifest; with `sha256` (hex) it must hash to it.

    Raises:
        ModelFileError: no manifest, none of ours, another format, unsafe names, or too large.
    """
    return read_hashed(path, sha256=sha256)[0]


def read_hashed(path: Path, *, sha256: str | None = None) -> tuple[dict[str, Any], str]:
    """The manifest and the SHA-256 (hex) of the very bytes it was read from. Raises as `read` does."""
    if not os.path.lexists(path):
        raise ModelFileError(f"{path}: not there, expected in every saved model; is {path.parent} one?")
    content = diskfile.read_regular(path, limit=MAX_JSON_BYTES, follow_links=False)
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256:
        raise ModelFileError(f"{path}: SHA-256 is {found}, expected {sha256}: not the model that was pinned")
    manifest = strictjson.load_object(content, source=str(path))
    if manifest.get("kind") != KIND:
        raise ModelFileError(f"{path}: not a manifest of umiad (its 'kind' is not {KIND!r})")
    _check_format(manifest, source=str(path))
    _check_files(manifest.get("files"), source=str(path))
    return manifest, found


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


def _check_format(manifest: Mapping[str, object], *, source: str) -> None:
    number, version = manifest.get("format"), manifest.get("umiad_version")
    if type(number) is not int or number < 1:
        raise ModelFileError(
            f"{source}: format is {str(number)[:40]!r}, expected an integer from 1 to {FORMAT}"
        )
    if not isinstance(version, str) or not _VERSION.fullmatch(version):
        raise ModelFileError(f"{source}: umiad_version is missing or malformed, expected text like '0.1.0'")
    if number > FORMAT:
        raise ModelFileError(
            f"{source}: format {number}, this umiad {__version__} reads up to {FORMAT}; "
            f"it was written by umiad {version}: pip install 'umiad>={version}'"
        )


def _check_files(files: object, *, source: str) -> None:
    if not isinstance(files, dict) or len(files) > MAX_FILES:
        raise ModelFileError(f"{source}: 'files' must be an object with at most {MAX_FILES} names")
    if missing := [name for name in REQUIRED if name not in files]:
        raise ModelFileError(f"{source}: lists no {missing[0]}, expected {', '.join(REQUIRED)}")
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
