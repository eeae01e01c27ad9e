"""What detectors prepare from frozen parts, computed once per image and kept: in memory, or on disk."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from umiad.errors import DiskError, TrainingError

if TYPE_CHECKING:
    from umiad.detectors.contract import Detector

MEMORY_LIMIT = 1 << 30
"""Bytes of features kept in memory by default; 99 images at 256 px take 0.2 GB with egmf's preset "paper"."""

Progress = Callable[[int, int], None]
Item = tuple[str, np.ndarray, tuple[int, int]]
"""Key, network input [3,S,S], and height and width of the image it was made from."""


class FeatureCache:
    """Prepared features of n images as rows: `cache.rows([3, 0])` gives a batch of those two.

    Up to `memory_limit` bytes the rows live in memory, above it in a memory-mapped temporary folder that
    `close` (or leaving the `with` block) removes. `keys` name the images (content hash, and variant such
    as a flip); a key that occurs twice is stored once. `compact`: float32 features are kept in float16, half the room,
    and come back as float32, rounded to 11 bits; what that does to accuracy is in docs/performance.md.
    """

    def __init__(
        self,
        keys: Sequence[str],
        *,
        memory_limit: int = MEMORY_LIMIT,
        folder: Path | None = None,
        compact: bool = False,
    ) -> None:
        self.keys = tuple(keys)
        self._row_of = {key: row for row, key in enumerate(dict.fromkeys(keys))}
        self._rows = [self._row_of[key] for key in keys]
        self._limit, self._compact = memory_limit, compact
        self._packed: frozenset[str] = frozenset()
        self._parent = folder
        self._folder: Path | None = None
        self._store: dict[str, Tensor] = {}

    def __enter__(self) -> FeatureCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def on_disk(self) -> bool:
        """Whether the rows had to go to disk."""
        return self._folder is not None

    @property
    def unique(self) -> int:
        """Number of rows stored: images of equal content are stored once."""
        return len(self._row_of)

    def rows(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The prepared features of images `indices`, in that order; raises IndexError out of range."""
        rows = torch.tensor([self._rows[index] for index in indices])
        found = {name: values[rows] for name, values in self._store.items()}
        return {name: values.float() if name in self._packed else values for name, values in found.items()}

    def fill(
        self,
        detector: Detector,
        images: Iterable[Item],
        *,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> FeatureCache:
        """Prepare each distinct key once. `images` yields (key, input [3,S,S], original (H, W)) in any order.

        Raises DiskError where there is no room, TrainingError where `compact` cannot hold a feature.
        """
        done: set[str] = set()
        device = device_of(detector.module)
        for batch in _batches(_first_of_each(images), batch_size):
            rows = torch.tensor([self._row_of[key] for key, _, _ in batch])
            inputs = torch.from_numpy(np.stack([image for _, image, _ in batch]))
            sizes = torch.tensor([size for _, _, size in batch])
            prepared = detector.prepare(inputs.to(device), original_size=sizes.to(device))
            if not self._store:
                self._allocate(prepared)
            for name, values in prepared.items():
                self._store[name][rows] = self._kept(name, values.cpu())
            done.update(key for key, _, _ in batch)
            if progress is not None:
                progress(len(done), len(self._row_of))
        return self

    def close(self) -> None:
        """Forget the features and remove the temporary folder, if there is one."""
        self._store = {}
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _kept(self, name: str, values: Tensor) -> Tensor:
        """Values as they are stored. Raises TrainingError for those beyond float16 where that is wanted."""
        if name not in self._packed:
            return values
        packed = values.half()
        if bool((packed.isinf() & values.isfinite()).any()):
            most = float(values[values.isfinite()].abs().max())
            raise TrainingError(
                f"features {name!r} reach {most:.3g}, more than float16 holds (65504): fit without compact features"
            )
        return packed

    def _allocate(self, prepared: dict[str, Tensor]) -> None:
        n = len(self._row_of)
        if self._compact:
            self._packed = frozenset(k for k, values in prepared.items() if values.dtype == torch.float32)
        kept = {k: torch.float16 if k in self._packed else values.dtype for k, values in prepared.items()}
        needed = sum(n * values[0].numel() * kept[k].itemsize for k, values in prepared.items())
        if needed <= self._limit:
            self._store = {k: torch.empty((n, *v.shape[1:]), dtype=kept[k]) for k, v in prepared.items()}
            return
        self._folder = Path(tempfile.mkdtemp(prefix="umiad-features-", dir=self._parent))
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            folder = self._folder
            self.close()
            raise DiskError(
                f"{folder}: caching features needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free "
                "(set TMPDIR to a larger disk, or fit on fewer images)"
            )
        for name, values in prepared.items():
            shape, dtype = (n, *values.shape[1:]), torch.empty(0, dtype=kept[name]).numpy().dtype
            mapped = np.memmap(self._folder / f"{name}.bin", dtype=dtype, mode="w+", shape=shape)
            self._store[name] = torch.from_numpy(mapped)


def device_of(module: nn.Module) -> torch.device:
    """Where the tensors of a module lie; the CPU for one that has none."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _first_of_each(images: Iterable[Item]) -> Iterator[Item]:
    seen: set[str] = set()
    for item in images:
        if item[0] not in seen:
            seen.add(item[0])
            yield item


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    stream = iter(items)
    while batch := list(itertools.islice(stream, size)):
        yield batch
