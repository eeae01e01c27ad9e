"""MedViTV2 from a checkpoint that the user names: reads it and builds `medvit`'s frozen design on it.

Nothing is downloaded here and nothing is unpickled: a published .pth is converted beforehand (`HOW_TO_GET`).
Names are those of the published code, github.com/Omid-Nejati/MedViTV2 (MIT).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from umiad import diskfile, tensorfile
from umiad import weights as backbones
from umiad.config import nearest
from umiad.detectors.medvit_frozen import FrozenConfig, FrozenMedVit
from umiad.errors import ConfigError, InputError, ModelFileError
from umiad.nn.kan import POINTS, RANGE
from umiad.nn.medvit import DESIGNS, GlobalBlock, MedVitNetwork

HOW_TO_GET = (
    "a .safetensors file with the tensors of a published MedViTV2, converted once, apart from umiad: "
    'state = torch.load("MedViT_small.pth", weights_only=True, map_location="cpu"); '
    'safetensors.torch.save_file(state.get("model", state), "MedViT_small.safetensors"); '
    "nothing is downloaded here"
)
_COUNTER = ".num_batches_tracked"
_IGNORED = re.compile(r"proj_head\.0\.(weight|bias)|.*\.num_batches_tracked|.*\.rbf\.grid")
"""What a file may hold beside what is taken: its classifier, counters, and the KAN layers' fixed centres (checked)."""
_SHARED = {"norm1.": "norm1.", "norm2.": "norm2."}
_LOCAL = {
    **_SHARED,
    "attention.qkv.": "attn.qkv.",
    "attention.proj.": "attn.proj.",
    "attention.bias": "attn.rpb",
    "feed_forward.layers.6.gate.": "conv.conv.6.fc.",
    "feed_forward.layers.": "conv.conv.",
}
_GLOBAL = {
    **_SHARED,
    "attention.query.": "e_mhsa.q.",
    "attention.key.": "e_mhsa.k.",
    "attention.value.": "e_mhsa.v.",
    "attention.proj.": "e_mhsa.proj.",
    "attention.norm.": "e_mhsa.norm.",
    "project.0.": "projection.conv.",
    "project.1.": "projection.norm.",
    "convolution.0.": "mhca.group_conv3x3.",
    "convolution.1.": "mhca.norm.",
    "convolution.3.": "mhca.projection.",
    "kan.0.norm.": "kan.layers.0.layernorm.",
    "kan.1.norm.": "kan.layers.1.layernorm.",
    "kan.0.weights.": "kan.layers.0.spline_linear.",
    "kan.1.weights.": "kan.layers.1.spline_linear.",
}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A network's tensors by our names; the file's SHA-256 in hex and the label made of it, "file:<8 hex>"."""

    state: dict[str, Tensor]
    label: str
    sha256: str


def published_names(network: MedVitNetwork) -> dict[str, str]:
    """Our name of every tensor of a network without a classifier -> its name in the published code."""
    return {name: _published(name, network) for name in network.state_dict()}


def read_checkpoint(file: str | os.PathLike[str], *, network: str = "small") -> Checkpoint:
    """Read a MedViTV2 of the published size `network` (tiny, small, base, large) from a safetensors file.

    Raises:
        InputError: there is no such file; tells what is expected.
        ModelFileError: it is no safetensors file, or not this network: the first tensor that is missing, unknown, of
            another shape or another dtype.
    """
    path = Path(file)
    if not os.path.lexists(path):
        raise InputError(path, "no such file, expected a MedViTV2 checkpoint", HOW_TO_GET)
    content = diskfile.read_regular(path, limit=tensorfile.MAX_FILE_BYTES)
    found = tensorfile.from_bytes(content, source=str(path))
    with torch.device("meta"):
        expected = MedVitNetwork(network, classes=1, seed=0, official=True)
    unused = set(_unused(expected))
    state: dict[str, Tensor] = {}
    wanted = expected.without_classifier().state_dict()
    names = published_names(expected)
    title = f"MedViTV2-{network} with the published names"
    for ours, theirs in names.items():
        if ours.endswith(_COUNTER):
            state[ours] = torch.zeros((), dtype=torch.int64)
            continue
        if theirs not in found:
            raise ModelFileError(f"{path}: not a {title}: {theirs!r} is missing{_other_size(found, network)}")
        tensor, shape = found[theirs], wanted[ours].shape
        if tensor.shape != shape or tensor.dtype != torch.float32:
            raise ModelFileError(
                f"{path}: {theirs!r} is {tensor.dtype} {list(tensor.shape)}, expected torch.float32 "
                f"{list(shape)} of a {title}{_other_size(found, network)}"
            )
        state[ours] = tensor
    for name in sorted(found.keys() - set(names.values())):
        if not _IGNORED.fullmatch(name) and name not in unused:
            raise ModelFileError(f"{path}: not a {title}: {name!r} is unknown")
        if name.endswith(".rbf.grid"):
            _check_centres(found[name], source=f"{path}: {name!r}")
    sha256 = hashlib.sha256(content).hexdigest()
    return Checkpoint(state=state, label=backbones.label_of(sha256), sha256=sha256)


def build(
    file: str | os.PathLike[str],
    *,
    preset: str = "default",
    size: int = 256,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> FrozenMedVit:
    """Build `medvit`, unfitted, on the features of the checkpoint in `file`; `settings` are those of `FrozenConfig`.

    Raises:
        ConfigError: an unknown preset, setting or value.
        InputError, ModelFileError: see `read_checkpoint`.
    """
    presets = FrozenMedVit.presets
    if preset not in presets:
        raise ConfigError(f"unknown preset {preset!r} for medvit{nearest(preset, list(presets))}")
    common = {"size": size, "seed": seed, "preset": preset}
    config = FrozenConfig.parse({**presets[preset], **(settings or {}), **common})
    checkpoint = read_checkpoint(file, network=config.network)
    return FrozenMedVit(config.model_copy(update={"weights": checkpoint.label}), checkpoint.state)


def _published(name: str, network: MedVitNetwork) -> str:
    first, _, rest = name.partition(".")
    if first == "stem":
        number, _, what = rest.partition(".")
        return f"stem.{int(number) // 3}.{('conv', 'norm')[int(number) % 3]}.{what}"
    if first != "stages":
        return name
    stage, number, inside = rest.split(".", 2)
    blocks: Any = network.stages
    block = blocks[int(stage)][int(number)]
    position = sum(len(blocks[k]) for k in range(int(stage))) + int(number)
    pooled = len(block.embed) == 3
    table = {
        **(_GLOBAL if isinstance(block, GlobalBlock) else _LOCAL),
        f"embed.{int(pooled)}.": "patch_embed.conv.",
        f"embed.{int(pooled) + 1}.": "patch_embed.norm.",
    }
    start = next(each for each in table if inside.startswith(each))
    return f"features.{position}.{table[start]}{inside.removeprefix(start)}"


def _unused(network: MedVitNetwork) -> Iterator[str]:
    """Published names of the feed-forwards that the published code builds and never calls."""
    position = 0
    for blocks in network.stages:
        for block in blocks:  # type: ignore[attr-defined] # a ModuleList of ModuleLists
            if isinstance(block, GlobalBlock):
                for name in block.unused.layers.state_dict():
                    yield f"features.{position}.conv.conv.{name.replace('6.gate.', '6.fc.')}"
            position += 1


def _check_centres(centres: Tensor, *, source: str) -> None:
    """Refuse KAN layers whose centres are not the published ones: another function would be computed."""
    expected = torch.linspace(*RANGE, POINTS)
    if centres.shape != expected.shape or not torch.allclose(centres.float(), expected, atol=1e-5):
        raise ModelFileError(
            f"{source} is {[round(float(c), 3) for c in centres.flatten()[:POINTS]]}, expected {POINTS} centres "
            f"from {RANGE[0]:g} to {RANGE[1]:g}, equally spaced"
        )


def _other_size(found: Mapping[str, Tensor], network: str) -> str:
    """A hint where the file is a MedViTV2 of another published size."""
    last = found.get("norm.weight")
    width = 0 if last is None else last.numel()
    sizes = [name for name, design in DESIGNS.items() if design.dims[-1] == width and name != network]
    return f"; it looks like network {sizes[0]!r}" if sizes else ""
