"""The saved model: a folder of config.json, weights.safetensors, split.json, card.md and manifest.json.

`load` is the only way in and never unpickles. `save` leaves either the old model or the new one, whatever
happens. One writer per model at a time: a save clears away what an interrupted one has left beside it.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

from umiad import __version__, diskfile, strictjson, tensorfile
from umiad import manifest as manifests
from umiad.errors import DiskError, InputError, ModelFileError
from umiad.manifest import CARD, CONFIG, MANIFEST, REQUIRED, SPLIT, WEIGHTS, Kind

if TYPE_CHECKING:
    from torch import Tensor

HARMLESS = {".DS_Store", "Thumbs.db", "desktop.ini"}  # file managers leave these; a save may drop them
MAX_BUILD_BYTES = 4 << 30
SPARE_BYTES = 128 * diskfile.MIB
"""What building a detector may take beyond its saved tensors: layers that it does not keep, passing values."""


@dataclass(frozen=True, eq=False)
class SavedModel:
    """What a model folder holds, checked: plain values and tensors on the CPU.

    `config` and `split` are JSON objects whose meaning is the caller's duty to check; `extras` are further
    files (name -> content) such as a training log; `manifest_sha256` is that of the manifest as it was read.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    split: dict[str, Any]
    manifest: dict[str, Any]
    card: str
    extras: dict[str, bytes] = field(default_factory=dict)
    manifest_sha256: str = ""


Migration: TypeAlias = Callable[[SavedModel], SavedModel]
MIGRATIONS: dict[int, Migration] = {}
"""Format n -> what turns a model of format n into one of n + 1. Every older format that is still read has its steps
here; an entry goes in together with a higher `manifest.MODEL.format`. There is one format so far."""


class Buildable(Protocol):
    """What `rebuild` asks of a detector."""

    def state(self) -> Mapping[str, Tensor]:
        """All tensors by name."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Fill from `state`; raises ModelFileError on a missing, unknown or misshapen tensor."""
        ...


BuildableT = TypeVar("BuildableT", bound=Buildable)


def save(
    path: str | os.PathLike[str],
    *,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    split: Mapping[str, Any],
    card: str,
    extras: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a model folder, replacing an older model there; returns its path.

    `extras`: further files, name -> content (for example "log.jsonl"), listed in the manifest. The folder is
    written beside its place, flushed, and renamed into place; after any failure the older model is as it was.

    Raises:
        InputError: at `path` lies something that is not a model of ours; it is left alone.
        ConfigError: a value in `config` or `split` that JSON cannot hold.
        ModelFileError: tensors or extra names that `load` would refuse.
        DiskError: writing failed; with needed and free bytes.
    """
    return write_folder(Path(path), _contents(config, tensors, split, card=card, extras=extras or {}))


def write_folder(path: Path, contents: Mapping[str, bytes], *, kind: Kind = manifests.MODEL) -> Path:
    """Write these files (name -> content) and their manifest as a folder of this `kind`, as `save` does.

    Raises InputError, ModelFileError and DiskError as `save` does.
    """
    manifest = strictjson.dump_bytes(manifests.build(contents, kind=kind), source=MANIFEST)
    files = {**contents, MANIFEST: manifest}  # the manifest last
    target = Path(os.path.realpath(path))
    needed = sum(len(content) for content in files.values())
    with diskfile.disk_errors(target, needed=needed):
        target.parent.mkdir(parents=True, exist_ok=True)
        _restore(target)
        check_target(target, kind=kind)
        _clear_leftovers(target)
        _check_space(target, needed=needed)
        with _temporary_folder(target) as fresh:
            for name, content in files.items():
                diskfile.write_synced(fresh / name, content)
            diskfile.sync_folder(fresh)
            aside = target.with_name(f".{target.name}.umiad-old-{secrets.token_hex(4)}")
            diskfile.swap_folder(fresh, target, aside=aside)
    return path


def update(
    path: str | os.PathLike[str],
    *,
    config: Mapping[str, Any],
    split: Mapping[str, Any] | None = None,
    card: str | None = None,
) -> Path:
    """Rewrite the configuration (and split and card, where given) of a saved model; weights and extras stay.

    Raises what `load` and `save` raise; after any failure the older model is as it was.
    """
    old = load(path)
    return save(
        path,
        config=config,
        tensors=old.tensors,
        split=old.split if split is None else split,
        card=old.card if card is None else card,
        extras=old.extras,
    )


def load(path: str | os.PathLike[str], *, manifest_sha256: str | None = None) -> SavedModel:
    """Read a model folder after checking manifest, sizes, hashes, strict JSON, tensor header, finite values.

    `manifest_sha256` pins the manifest, and through it every file; without it a consistent alteration of
    files and manifest together goes unseen. A model of an older format is brought up to date (`MIGRATIONS`); its
    `manifest` stays what the file says.

    Raises:
        InputError: nothing is there, or reading is not permitted.
        ModelFileError: anything else; names the file, what was found and what was expected.
    """
    folder = _existing(Path(path))
    manifest, digest = manifests.read_hashed(folder / MANIFEST, sha256=manifest_sha256)
    files = manifests.read_listed(folder, manifest)
    try:
        card = files.pop(CARD).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{folder / CARD}: not UTF-8 at byte {error.start}, expected text") from error
    saved = SavedModel(
        path=Path(path),
        config=strictjson.load_object(files.pop(CONFIG), source=str(folder / CONFIG)),
        tensors=tensorfile.from_bytes(files.pop(WEIGHTS), source=str(folder / WEIGHTS)),
        split=strictjson.load_object(files.pop(SPLIT), source=str(folder / SPLIT)),
        manifest=manifest,
        card=card,
        extras=files,
        manifest_sha256=digest,
    )
    return _migrated(saved)


def rebuild(saved: SavedModel, make: Callable[[], BuildableT]) -> BuildableT:
    """Build with `make`, which follows the saved configuration, and fill with the saved tensors.

    A configuration may be altered too: while `make` runs, the memory of every tensor is added up before it is
    taken. What may be taken follows from the tensors in the file: no more than 2 times these and 128 MiB, and
    4 GiB at most.

    Raises:
        ModelFileError: that is exceeded, nothing can be built, or the tensors in the file are not those
            of what was built, by name, shape and dtype; the first mismatch is named.
        UmiadError: what `make` raises on purpose.
    """
    held = sum(tensor.numel() * tensor.element_size() for tensor in saved.tensors.values())
    source = str(saved.path / CONFIG)
    try:
        with _memory_limit(min(2 * held + SPARE_BYTES, MAX_BUILD_BYTES), source=source):
            built = make()
    except (ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise ModelFileError(
            f"{source}: nothing can be built from it: {type(error).__name__}: {str(error)[:200]}"
        ) from error
    expected = built.state()
    for name, tensor in saved.tensors.items():
        if name in expected and tensor.dtype != expected[name].dtype:
            raise ModelFileError(
                f"{saved.path / WEIGHTS}: tensor {name!r} has dtype {tensor.dtype}, "
                f"expected {expected[name].dtype}"
            )
    built.load_state(saved.tensors)
    return built


def check_target(path: str | os.PathLike[str], *, kind: Kind = manifests.MODEL) -> None:
    """Check that `save` may write to `path`: nothing there, an empty folder, or only a model of ours of this `kind`.

    Raises:
        InputError: something else is there; names it.
    """
    target, hint = Path(path), "choose another path, or remove it yourself"
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise InputError(target, "is no folder, expected a model folder or nothing", hint)
    try:
        present = {entry.name for entry in target.iterdir()} - HARMLESS
        owned = {MANIFEST, *manifests.read(target / MANIFEST, kind=kind)["files"]} if present else set()
    except OSError as error:
        raise InputError(target, f"cannot be read: {error.strerror or error}", hint) from error
    except ModelFileError as error:
        raise InputError(target, f"is a folder without a readable umiad model ({error})", hint) from error
    if foreign := sorted(present - owned):
        raise InputError(
            target, f"holds {foreign[0]!r}, which is no part of the model; not overwritten", hint
        )


def _migrated(saved: SavedModel) -> SavedModel:
    """The model in today's format. Raises ModelFileError where a step is missing."""
    written, version = saved.manifest["format"], saved.manifest["umiad_version"]
    for number in range(written, manifests.MODEL.format):
        if number not in MIGRATIONS:
            raise ModelFileError(
                f"{saved.path / MANIFEST}: format {written}, this umiad {__version__} reads "
                f"{manifests.MODEL.format} and knows no step from {number}; use umiad {version}, which wrote it, "
                "or fit the model again"
            )
        saved = replace(MIGRATIONS[number](saved), path=saved.path, manifest=saved.manifest)
    return saved


def _memory_limit(limit: int, *, source: str) -> AbstractContextManager[object]:
    """Refuse, before it takes memory, the operation of torch with which new tensors exceed `limit` bytes in all."""
    from torch.utils._python_dispatch import (
        TorchDispatchMode,
    )  # torch's documented way to see every operation

    class Meter(TorchDispatchMode):
        taken = 0

        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            """No: torch would import its compiler (seconds) to keep it out of here, and nothing is compiled here."""
            return False

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.taken += _new_bytes(func, args, kwargs or {})
            if self.taken > limit:
                raise ModelFileError(
                    f"{source}: what it describes takes {self.taken} bytes or more, "
                    f"expected {limit} at most from the tensors saved with it; damaged or altered"
                )
            return func(*args, **(kwargs or {}))

    return Meter()


def _new_bytes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Bytes that an operation is about to take, asked of torch's meta device: nothing is computed.

    0 for views, for what is done in place, and for what has no answer before it is computed.
    """
    import torch
    from torch.utils._pytree import tree_leaves, tree_map_only

    schema = func._schema
    if any(each.alias_info is not None for each in schema.returns):
        return 0
    args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, dict(kwargs)))
    names = {argument.name for argument in schema.arguments}
    kwargs |= {name: value for name, value in (("device", "meta"), ("generator", None)) if name in names}
    try:
        made = func(*args, **kwargs)
    except (RuntimeError, TypeError):  # meta has no answer for it
        return 0
    found = [each for each in tree_leaves(made) if isinstance(each, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in found)


def _contents(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    split: Mapping[str, Any],
    *,
    card: str,
    extras: Mapping[str, bytes],
) -> dict[str, bytes]:
    """Every file of a model folder but its manifest, name -> content. Raises as `save` does."""
    files = dict(extras)
    if reserved := sorted({*REQUIRED, MANIFEST} & set(files)):
        raise ModelFileError(f"extra file {reserved[0]}: this name belongs to the model; choose another")
    files[CONFIG] = strictjson.dump_bytes(dict(config), source=CONFIG)
    files[SPLIT] = strictjson.dump_bytes(dict(split), source=SPLIT)
    files[CARD] = card.encode("utf-8", errors="backslashreplace")
    files[WEIGHTS] = tensorfile.to_bytes(tensors)
    return files


def _existing(path: Path) -> Path:
    """The model folder; where a save was interrupted between two renames, the older one beside it."""
    if path.is_dir():
        return path
    if path.is_file():
        raise ModelFileError(
            f"{path}: is a file{_kind(path)}, expected a model folder written by umiad; "
            f"files of other tools are not read"
        )
    if os.path.lexists(path):
        raise ModelFileError(f"{path}: is a broken link or special file, expected a model folder")
    if left := _siblings(Path(os.path.realpath(path)), "old"):
        return left[0]
    raise InputError(
        path, "no such folder, expected a saved model", "check the path; `umiad fit` writes models"
    )


def _kind(path: Path) -> str:
    """What a file seems to be by its first bytes, in brackets; empty if unknown."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError:
        return ""
    return next((f" ({word})" for start, word in tensorfile.FOREIGN_STARTS if head.startswith(start)), "")


def _siblings(target: Path, kind: str) -> list[Path]:
    """Folders that saves of `target` use or have left beside it; `kind` is "new" or "old"."""
    start = f".{target.name}.umiad-{kind}-"
    try:
        found = [entry for entry in target.parent.iterdir() if entry.name.startswith(start)]
    except OSError:
        return []
    return sorted(entry for entry in found if entry.is_dir() and not entry.is_symlink())


def _restore(target: Path) -> None:
    """Put back the older model of a save that was interrupted between two renames. Raises OSError."""
    old = _siblings(target, "old")
    if old and not os.path.lexists(target):
        old[0].rename(target)


def _clear_leftovers(target: Path) -> None:
    """Remove what interrupted saves have left. Raises OSError."""
    for left in _siblings(target, "old") + _siblings(target, "new"):
        shutil.rmtree(left)


def _check_space(target: Path, *, needed: int) -> None:
    free = diskfile.free_bytes(target)
    if free is not None and free < needed:
        raise DiskError(
            f"{target}: needed {needed} bytes, free {free} bytes; nothing was written; "
            f"free some space or choose another folder"
        )


@contextmanager
def _temporary_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside `target`, removed at the end if it is still there."""
    fresh = target.with_name(f".{target.name}.umiad-new-{secrets.token_hex(4)}")
    fresh.mkdir()
    try:
        yield fresh
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
