"""Resume checkpoints without pickle: Lightning's dictionary as safetensors (tensors) and JSON (the rest)."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import CheckpointIO

from umiad.config import canonical_json
from umiad.errors import DiskError, InputError, ModelFileError
from umiad.strictjson import loads
from umiad.tensorfile import read_tensors, write_tensors

TENSORS, REST = "tensors.safetensors", "rest.json"


class SafeCheckpointIO(CheckpointIO):
    """A checkpoint is a folder of two files; what is neither tensor nor plain value is an error.

    Written into a temporary sibling folder and renamed, so an interrupted save leaves the older one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint` to the folder `path`. Raises DiskError, ModelFileError."""
        target = Path(path)
        fresh = target.with_name(target.name + ".new.tmp")
        old = target.with_name(target.name + ".old.tmp")
        tensors: dict[str, torch.Tensor] = {}
        rest = _pack(checkpoint, tensors)
        try:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
            write_tensors(fresh / TENSORS, tensors)
            (fresh / REST).write_text(canonical_json(rest), encoding="utf-8")
            shutil.rmtree(old, ignore_errors=True)
            if target.exists():
                os.replace(target, old)
            os.replace(fresh, target)
            shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            shutil.rmtree(fresh, ignore_errors=True)
            raise DiskError(f"{target}: the checkpoint could not be written: {error}") from error

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: Any = None
    ) -> dict[str, Any]:
        """Read the folder `path`. Raises ModelFileError when it is damaged."""
        folder = newest(Path(path))
        try:
            text = (folder / REST).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelFileError(f"{folder / REST}: cannot be read: {error}") from error
        try:
            tensors = read_tensors(folder / TENSORS)
        except InputError as error:
            raise ModelFileError(str(error)) from error
        unpacked: dict[str, Any] = _unpack(loads(text, source=str(folder / REST)), tensors)
        return unpacked

    def remove_checkpoint(self, path: Any) -> None:
        """Remove the folder `path`."""
        shutil.rmtree(Path(path), ignore_errors=True)


def newest(path: Path) -> Path:
    """`path`, or the older copy beside it that a save interrupted between two renames has left."""
    old = path.with_name(path.name + ".old.tmp")
    return old if not path.exists() and old.exists() else path


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Replace tensors by references and mark what JSON cannot tell apart (tuples, int keys)."""
    if isinstance(value, torch.Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        for key in value:
            if type(key) not in (str, int):
                raise ModelFileError(f"checkpoint: key {key!r} is {type(key).__name__}, expected str or int")
        return {"dict": [[key, _pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_pack(item, tensors) for item in value]}
    if value is None or type(value) in (bool, int, str):
        return {"value": value}
    if type(value) is float:
        return {"float": value.hex()}
    raise ModelFileError(f"checkpoint: {type(value).__name__} can be neither tensor nor plain value")


def _unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    try:
        [(kind, content)] = value.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "dict":
            return {key: _unpack(item, tensors) for key, item in content}
        if kind == "list":
            return [_unpack(item, tensors) for item in content]
        if kind == "tuple":
            return tuple(_unpack(item, tensors) for item in content)
        if kind == "float":
            return float.fromhex(content)
        if kind == "value":
            return content
    except (AttributeError, ValueError, KeyError, TypeError) as error:
        raise ModelFileError(f"checkpoint: damaged entry {json.dumps(value)[:80]}") from error
    raise ModelFileError(f"checkpoint: unknown kind {kind!r}")
