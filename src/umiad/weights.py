"""Pretrained weights of the backbone: from a file, the cache, or a download with a pinned hash.

Labels tell what weights a result rests on: "random", "imagenet" (torchvision's published file),
"imagenet-l4shortcut" (the same, BatchNorm folded, layer 4 without its residual branches), and
"file:<first 8 hex of the SHA-256>" for any other.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING

from umiad import diskfile, tensorfile
from umiad.config import TINY, nearest
from umiad.errors import ConfigError, InputError, ModelFileError

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[int, int], None]

RANDOM, DAMAGED = "random", "damaged"
BLOCKS = {"resnet18": ((2, 2, 2, 2), 1), "resnet34": ((3, 4, 6, 3), 1), "resnet50": ((3, 4, 6, 3), 4)}
"""Backbone -> blocks per stage, and how much wider than its kernels a block's output is."""
MAX_BYTES = 256 * diskfile.MIB
TIMEOUT_SECONDS = 30
SUFFIXES = (".safetensors", ".pth")
WAYS_OUT = (
    "on a machine with network: umiad weights fetch; from a file: umiad weights add FILE or --weights PATH; "
    "without pretraining: --weights random"
)


@dataclass(frozen=True)
class Published:
    """A file on the network that is trusted by its hash alone."""

    label: str
    url: str
    bytes: int
    sha256: str


IMAGENET = Published(
    label="imagenet",
    url="https://download.pytorch.org/models/resnet18-f37072fd.pth",
    bytes=46_830_571,
    sha256="f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec",
)
L4_SHORTCUT = "imagenet-l4shortcut"
L4_SHORTCUT_SHA256 = "13249a7534be53aebd4bd0d73fb51cad952a2f5abaa02847c8d95dc19ae1fe79"


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights ready for the backbone.

    `state` holds the 100 float32 entries of ResNet18 under torchvision's names, without classifier and batch
    counters; None = random initial weights. `origin` is where they come from, in words.
    """

    label: str
    state: dict[str, Tensor] | None
    origin: str
    sha256: str | None


@dataclass(frozen=True)
class Entry:
    """A weights file in the cache; label "damaged" if it is not what its name says."""

    label: str
    path: Path
    bytes: int
    sha256: str


def resolve(
    source: str,
    *,
    backbone: str = "resnet18",
    cache: Path | None = None,
    download: bool = True,
    progress: Progress | None = None,
) -> Weights:
    """Find weights by label ("random", "imagenet", one in the cache) or by the path of a file.

    Labels in the cache are ResNet18's; another `backbone` (resnet34, resnet50) takes "random" or a .safetensors
    file under torchvision's names.

    "imagenet" is downloaded once if the cache has none and `download` is True. `cache` replaces
    `cache_folder()`. A file is a .safetensors, or torchvision's published .pth, recognised by its hash.

    Raises:
        ConfigError: an unknown backbone.
        InputError: no such file or label, or no network; tells the ways out.
        ModelFileError: damaged, foreign format, or not that backbone.
    """
    if backbone not in (*BLOCKS, TINY):
        raise ConfigError(f"unknown backbone {backbone!r}{nearest(backbone, list(BLOCKS))}")
    if source == RANDOM:
        return Weights(label=RANDOM, state=None, origin="random initial weights", sha256=None)
    if backbone == TINY:
        raise InputError(source, f"{TINY} is for tests and takes 'random' only", "use resnet18")
    if backbone != "resnet18":
        return _read_other(Path(source), backbone)
    cached = _cached(source, cache=cache)
    if cached is None and source == IMAGENET.label:
        if not download:
            raise InputError(source, "these weights are not in the cache and downloading is off", WAYS_OUT)
        cached = fetch(cache=cache, progress=progress).path
    if cached is not None:
        return _read(cached, label=source)
    path = Path(source)
    if os.path.lexists(path) or path.suffix or path.name != source:
        return _read(path)
    known = [RANDOM, IMAGENET.label, *(entry.label for entry in listing(cache=cache))]
    raise InputError(source, f"neither a weights file nor a label{nearest(source, known)}", WAYS_OUT)


def available(*, cache: Path | None = None) -> str:
    """Label of the best pretrained weights in the cache, or "random" where there are none. Reads no file."""
    labels = (IMAGENET.label, L4_SHORTCUT)
    return next((label for label in labels if _cached(label, cache=cache)), RANDOM)


def add(file: str | os.PathLike[str], *, cache: Path | None = None) -> Entry:
    """Copy a weights file into the cache after checking that it is a ResNet18.

    Raises:
        InputError: there is no such file.
        ModelFileError: damaged, foreign format, or not a ResNet18.
        DiskError: the cache cannot be written.
    """
    path = Path(file)
    content = diskfile.read_regular(path, limit=MAX_BYTES)
    _parse(content, source=str(path))
    return _store(content, cache=cache)


def fetch(*, cache: Path | None = None, progress: Progress | None = None) -> Entry:
    """Download torchvision's ImageNet weights (45 MiB) into the cache, unless they are there already.

    `progress(bytes so far, bytes in all)` is called now and then. Nothing reads the download before its
    SHA-256 is the one pinned here, and nothing else ever reaches the disk.

    Raises:
        InputError: the network or the server failed; tells the ways out.
        ModelFileError: what came is not the published file.
        DiskError: the cache cannot be written.
    """
    cached = _cached(IMAGENET.label, cache=cache)
    if cached is not None and (entry := _entry(cached)).label == IMAGENET.label:
        return entry
    content = _download(IMAGENET, progress=progress)
    if (found := hashlib.sha256(content).hexdigest()) != IMAGENET.sha256:
        raise ModelFileError(
            f"{IMAGENET.url}: got {len(content)} bytes with SHA-256 {found}, expected {IMAGENET.bytes} bytes "
            f"with {IMAGENET.sha256}; nothing was kept; try again, or see whether a proxy alters downloads"
        )
    return _store(content, cache=cache)


def listing(*, cache: Path | None = None) -> list[Entry]:
    """The weights files in the cache, each hashed anew, by label. Empty where there is no cache.

    Raises:
        InputError, ModelFileError: a file there cannot be read.
    """
    folder = _weights_folder(cache)
    if not folder.is_dir():
        return []
    files = (path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES and path.is_file())
    return sorted((_entry(path) for path in files), key=lambda entry: (entry.label, entry.path.name))


def cache_folder() -> Path:
    """$UMIAD_CACHE, else the platform's folder for what can be fetched again."""
    if chosen := os.environ.get("UMIAD_CACHE"):
        return Path(chosen)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "umiad" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "umiad"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "umiad"


def label_of(sha256: str) -> str:
    """The label of a file with this SHA-256 (hex)."""
    known = {IMAGENET.sha256: IMAGENET.label, L4_SHORTCUT_SHA256: L4_SHORTCUT}
    return known.get(sha256, f"file:{sha256[:8]}")


def resnet18_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of ResNet18's entries in torchvision's naming, without classifier and counters."""
    return backbone_shapes("resnet18")


def backbone_shapes(backbone: str) -> dict[str, tuple[int, ...]]:
    """The same of "resnet18", "resnet34" or "resnet50"."""
    blocks, expansion = BLOCKS[backbone]
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (64, 3, 7, 7), **_norm("bn1", 64)}
    before = 64
    for stage, (width, count) in enumerate(zip((64, 128, 256, 512), blocks, strict=True), start=1):
        for block in range(count):
            start, inputs, outputs = f"layer{stage}.{block}", before, width * expansion
            kernels = (3, 3) if expansion == 1 else (1, 3, 1)
            widths = [inputs, *([width] * (len(kernels) - 1)), outputs]
            for k, kernel in enumerate(kernels):
                shapes |= {f"{start}.conv{k + 1}.weight": (widths[k + 1], widths[k], kernel, kernel)}
                shapes |= _norm(f"{start}.bn{k + 1}", widths[k + 1])
            if inputs != outputs:
                shapes |= {f"{start}.downsample.0.weight": (outputs, inputs, 1, 1)}
                shapes |= _norm(f"{start}.downsample.1", outputs)
            before = outputs
    return shapes


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}


def _weights_folder(cache: Path | None) -> Path:
    return (cache_folder() if cache is None else cache) / "weights"


def _cached(label: str, *, cache: Path | None) -> Path | None:
    """The cache's file for a label, by name only."""
    name = label.replace("file:", "file-")
    if not name.replace("-", "").isalnum():
        return None
    return next(
        (path for end in SUFFIXES if (path := _weights_folder(cache) / f"{name}{end}").is_file()), None
    )


def _store(content: bytes, *, cache: Path | None) -> Entry:
    sha256 = hashlib.sha256(content).hexdigest()
    name = label_of(sha256).replace("file:", "file-") + (
        ".pth" if sha256 == IMAGENET.sha256 else ".safetensors"
    )
    path = _weights_folder(cache) / name
    diskfile.write_atomic(path, content)
    return Entry(label=label_of(sha256), path=path, bytes=len(content), sha256=sha256)


def _entry(path: Path) -> Entry:
    content = diskfile.read_regular(path, limit=MAX_BYTES)
    sha256 = hashlib.sha256(content).hexdigest()
    label = label_of(sha256)
    intact = path.stem == label.replace("file:", "file-")
    return Entry(label=label if intact else DAMAGED, path=path, bytes=len(content), sha256=sha256)


def _read(path: Path, *, label: str | None = None) -> Weights:
    """Read a weights file; with `label` it must be the file of that label."""
    content = diskfile.read_regular(path, limit=MAX_BYTES)
    sha256 = hashlib.sha256(content).hexdigest()
    found = label_of(sha256)
    if label is not None and found != label:
        raise ModelFileError(
            f"{path}: damaged, SHA-256 {sha256} is not {label!r}; delete it, then fetch or add it again"
        )
    return Weights(label=found, state=_parse(content, source=str(path)), origin=str(path), sha256=sha256)


def _read_other(path: Path, backbone: str) -> Weights:
    """Read a file for a backbone that has no published weights here."""
    if not os.path.lexists(path):
        raise InputError(
            path,
            f"no such file; {backbone} takes 'random' or a .safetensors file with torchvision's names",
            "labels such as 'imagenet' are for resnet18",
        )
    content = diskfile.read_regular(path, limit=MAX_BYTES)
    state = _checked(tensorfile.from_bytes(content, source=str(path)), source=str(path), backbone=backbone)
    sha256 = hashlib.sha256(content).hexdigest()
    return Weights(label=label_of(sha256), state=state, origin=str(path), sha256=sha256)


def _parse(content: bytes, *, source: str) -> dict[str, Tensor]:
    """The 100 entries from a file's bytes; unpickled only if these very bytes have the pinned hash."""
    if hashlib.sha256(content).hexdigest() == IMAGENET.sha256:
        import torch

        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    else:
        state = tensorfile.from_bytes(content, source=source)
    return _checked(state, source=source, backbone="resnet18")


def _checked(state: Mapping[str, Tensor], *, source: str, backbone: str) -> dict[str, Tensor]:
    import torch

    shapes, title = backbone_shapes(backbone), backbone.replace("resnet", "ResNet")
    entries = {
        name: tensor
        for name, tensor in state.items()
        if not name.startswith("fc.") and not name.endswith(".num_batches_tracked")
    }
    if missing := [name for name in shapes if name not in entries]:
        raise ModelFileError(f"{source}: not a {title} with torchvision's names: {missing[0]!r} is missing")
    if unknown := sorted(entries.keys() - shapes.keys()):
        raise ModelFileError(f"{source}: not a {title} with torchvision's names: {unknown[0]!r} is unknown")
    for name, shape in shapes.items():
        tensor = entries[name]
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
            raise ModelFileError(
                f"{source}: {name!r} is {tensor.dtype} {list(tensor.shape)}, "
                f"expected torch.float32 {list(shape)}"
            )
    return {name: entries[name].detach() for name in shapes}


def _download(published: Published, *, progress: Progress | None) -> bytes:
    """At most one byte more than the published size, over https only."""
    from urllib.request import urlopen

    parts: list[bytes] = []
    received = 0
    try:
        with urlopen(published.url, timeout=TIMEOUT_SECONDS) as response:  # noqa: S310 - a constant https address
            if not response.geturl().startswith("https://"):
                raise ModelFileError(
                    f"{published.url}: sent on to an address without https; nothing was read"
                )
            while part := response.read(min(diskfile.MIB, published.bytes + 1 - received)):
                parts.append(part)
                received += len(part)
                if progress is not None:
                    progress(min(received, published.bytes), published.bytes)
    except (OSError, HTTPException) as error:
        raise InputError(published.url, f"download failed: {error}", WAYS_OUT) from error
    return b"".join(parts)
