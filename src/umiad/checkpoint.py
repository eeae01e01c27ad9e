"""Resume checkpoints without pickle: numbered folders, each complete and checked, the newest two kept.

A checkpoint `epoch-000012` holds Lightning's dictionary as `tensors.safetensors` and `rest.json`, and a
`manifest.json` with the size and SHA-256 of both. It is written beside its place, flushed and renamed, so
that a crash leaves whole checkpoints only; what a power cut damages all the same fails the manifest.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import CheckpointIO

from umiad import diskfile, strictjson, tensorfile
from umiad.errors import ConfigError, DiskError, InputError, ModelFileError

CHECKPOINTS = "checkpoints"
TENSORS, REST, MANIFEST = "tensors.safetensors", "rest.json", "manifest.json"
CEILINGS = {TENSORS: tensorfile.MAX_FILE_BYTES, REST: 64 * diskfile.MIB, MANIFEST: diskfile.MIB}
KIND, FORMAT = "umiad checkpoint", 1
FIRST_FACTOR = 2.5
"""The first checkpoint of a run asks for room for itself and those to come: two are kept, one is written."""
OLD_NAMES = ("last", "last.old.tmp")
"""Where versions before numbered checkpoints kept theirs, in the folder of the run."""
_NUMBERED = re.compile(r"epoch-([0-9]{6,})")


class SafeCheckpointIO(CheckpointIO):
    """A checkpoint is a folder of three files; what is neither tensor nor plain value is an error."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint` to the folder `path`; one that is there is replaced once the new one is complete.

        Raises:
            ModelFileError: a value that could not be read back: an object, NaN or infinity in a tensor.
            DiskError: writing failed; with needed and free bytes. Older checkpoints are untouched.
        """
        target = Path(path)
        files = _contents(checkpoint)
        needed = sum(len(content) for content in files.values())
        fresh = target.with_name(target.name + ".new.tmp")
        with diskfile.disk_errors(target, needed=needed):
            target.parent.mkdir(parents=True, exist_ok=True)
            _check_space(target, needed=needed)
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir()
            try:
                for name, content in files.items():
                    diskfile.write_synced(fresh / name, content)
                diskfile.sync_folder(fresh)
                aside = target.with_name(target.name + ".old.tmp")
                diskfile.swap_folder(fresh, target, aside=aside)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: Any = None
    ) -> dict[str, Any]:
        """Read the folder `path`, tensors to the CPU. Raises ModelFileError when it is damaged or foreign."""
        folder = Path(path)
        files = {name: _read_checked(folder / name, facts) for name, facts in _read_manifest(folder).items()}
        tensors = tensorfile.from_bytes(files[TENSORS], source=str(folder / TENSORS))
        rest = strictjson.loads(files[REST], source=str(folder / REST))
        try:
            unpacked = _unpack(rest, tensors)
        except RecursionError as error:
            raise ModelFileError(f"{folder / REST}: nested too deep, expected a few levels") from error
        if not isinstance(unpacked, dict):
            raise ModelFileError(f"{folder / REST}: holds a {type(unpacked).__name__}, expected a dictionary")
        return unpacked

    def remove_checkpoint(self, path: Any) -> None:
        """Remove the folder `path`."""
        shutil.rmtree(Path(path), ignore_errors=True)


def checkpoint_path(folder: Path, epoch: int) -> Path:
    """The checkpoint that `folder` holds of the state after `epoch` epochs."""
    return folder / f"epoch-{epoch:06d}"


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in `folder` that passes every check, and why each newer one was skipped.

    Raises:
        ConfigError: an older umiad has worked here, whose checkpoints cannot be continued.
    """
    skipped: list[str] = []
    found = _listed(folder)
    for path in found:
        try:
            SafeCheckpointIO().load_checkpoint(path)
        except ModelFileError as error:
            skipped.append(str(error))
        else:
            return path, skipped
    if not found and any((folder.parent / name).is_dir() for name in OLD_NAMES):
        raise ConfigError(
            f"{folder.parent}: the saved state was written by an older umiad; "
            "start the fit anew (leave out --resume)"
        )
    return None, skipped


def keep_only(folder: Path, kept: Collection[Path]) -> None:
    """Remove all checkpoints in `folder` but `kept`. What cannot be removed is left."""
    for path in _listed(folder):
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def clear_temporary(folder: Path) -> None:
    """Remove what interrupted saves have left in `folder`, the folder of a run. Raises DiskError."""
    with diskfile.disk_errors(folder, needed=0):
        for left in [*(folder / CHECKPOINTS).glob("*.tmp"), *folder.glob(".*.umiad-new-*")]:
            diskfile.remove(left)


def clear(folder: Path) -> None:
    """Remove all checkpoints of `folder`, the folder of a run. Raises DiskError."""
    with diskfile.disk_errors(folder, needed=0):
        for name in (CHECKPOINTS, *OLD_NAMES):
            if (folder / name).exists():
                diskfile.remove(folder / name)


def _listed(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, the newest first; an unfinished one has another name."""
    if not folder.is_dir():
        return []
    numbered = [(int(m[1]), path) for path in folder.iterdir() if (m := _NUMBERED.fullmatch(path.name))]
    return [path for _, path in sorted(numbered, reverse=True)]


def _contents(checkpoint: Mapping[str, Any]) -> dict[str, bytes]:
    """Every file of a checkpoint, name -> content, the manifest last. Raises ModelFileError."""
    tensors: dict[str, torch.Tensor] = {}
    rest = strictjson.dump_bytes(_pack(checkpoint, tensors), source=REST)
    files = {TENSORS: tensorfile.to_bytes(tensors), REST: rest}
    if len(rest) > CEILINGS[REST]:
        raise ModelFileError(f"checkpoint: {len(rest)} bytes besides tensors, at most {CEILINGS[REST]}")
    listed = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in files.items()}
    manifest = {"kind": KIND, "format": FORMAT, "files": listed}
    return {**files, MANIFEST: strictjson.dump_bytes(manifest, source=MANIFEST)}


def _check_space(target: Path, *, needed: int) -> None:
    wanted = needed if _listed(target.parent) else int(FIRST_FACTOR * needed)
    free = diskfile.free_bytes(target)
    if free is not None and free < wanted:
        raise DiskError(
            f"{target}: the checkpoint was not written: needed {wanted} bytes, free {free} bytes; "
            "older checkpoints are untouched; free some space, then go on with --resume"
        )


def _read(path: Path, *, size: int | None = None) -> bytes:
    try:
        return diskfile.read_regular(path, limit=CEILINGS[path.name], size=size, follow_links=False)
    except InputError as error:
        raise ModelFileError(str(error)) from error


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> {"bytes", "sha256"} of the two files. Raises ModelFileError unless written by us."""
    content, source = _read(folder / MANIFEST), str(folder / MANIFEST)
    manifest = strictjson.load_object(content, source=source)
    files = manifest.get("files")
    if manifest.get("kind") != KIND or manifest.get("format") != FORMAT:
        raise ModelFileError(f"{source}: not a checkpoint of this umiad (format {FORMAT})")
    if not isinstance(files, dict) or set(files) != {TENSORS, REST}:
        raise ModelFileError(f"{source}: must list {TENSORS} and {REST}")
    for facts in files.values():
        if not isinstance(facts, dict) or set(facts) != {"bytes", "sha256"}:
            raise ModelFileError(f"{source}: an entry must hold 'bytes' and 'sha256' only")
    if strictjson.dump_bytes(manifest, source=source) != content:
        raise ModelFileError(f"{source}: not as it was written; cut short or altered")
    return files


def _read_checked(path: Path, facts: Mapping[str, Any]) -> bytes:
    content = _read(path, size=facts["bytes"])
    if (found := hashlib.sha256(content).hexdigest()) != facts["sha256"]:
        raise ModelFileError(f"{path}: SHA-256 is {found}, expected {facts['sha256']}; damaged or altered")
    return content


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Replace tensors by references and mark what JSON cannot tell apart (tuples, int keys)."""
    if isinstance(value, torch.Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value
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


def _unpack(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
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
