"""The paper's Table 2 beside the layers of our network, found by running it: benchmarks/results/table2.json.

python benchmarks/table2.py

egmf's preset "paper" with random weights; forward hooks note what goes in and comes out.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from printed import Notes
from results_store import load_named, paper_table
from umiad.api import build
from umiad.nn.encoder import grid, pool
from umiad.nn.fusion import cell_mean, upsample
from umiad.nn.resnet import ResNet
from umiad.parameters import count
from umiad.report import Block, Table, Text
from win_table import missing

NAME, COMMAND = "table2", "python benchmarks/table2.py"
SIZE, BATCH, SCALES = 256, 32, (1, 2, 3, 4)
Shapes = list[list[int]]
OURS_ONLY = (
    ("F1' of the EGM", "network.edge.down", "64 to 128 channels, stride 2"),
    ("gate of F1'", "network.edge.gate_fine", "one channel; softmax over the pair of gates"),
    ("gate of F2", "network.edge.gate_coarse", "one channel; softmax over the pair of gates"),
    ("EGM", "network.edge", "F1, F2 to F_edge"),
    ("EAM", "network.guidance.aggregate", "F_edge, F4 to F_agg and F_cat"),
)
"""Modules that the paper's table leaves out: name, module, remark."""
CHOICES = {
    "AvgPool2d": "mean over cells",
    "UpSample": "nearest",
}


# Measuring


def measure(
    *, size: int = SIZE, batch: int = BATCH, settings: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Layers of the network for `batch` random images of `size` px, in the paper's order, ours alone last.

    Each: "part" and "layer" as the paper calls them, "input" and "output" (lists of shapes), "pooled" (shape after
    pooling, or None), "parameters", "what".
    """
    detector = build("egmf", preset="paper", weights="random", size=size, settings=settings)
    images = torch.randn((batch, 3, size, size), generator=torch.Generator().manual_seed(0))
    seen: dict[str, tuple[Shapes, Shapes]] = {}
    # the detector runs its backbone folded, in one go: the plain one shows its layers
    shown = nn.ModuleDict(
        {"pyramid": ResNet(detector.config.backbone), "network": detector.module["network"]}
    )
    with torch.no_grad(), _noting(shown, seen):
        f1, f2, f3, f4 = shown["pyramid"](images)
        latents = shown["network"](f1, f2, f3, f4)
    modules = dict(shown.named_modules())
    rows = [*_extractor(images, (f1, f2, f3, f4), seen, modules), *_flows(seen, modules)]
    rows += _fusion(latents.us, latents.ys, seen, modules)
    return rows + [
        _row("not in the paper's table", name, *seen[path], parameters=_total(modules[path]), what=what)
        for name, path, what in OURS_ONLY
        if path in seen
    ]


@contextmanager
def _noting(module: nn.Module, seen: dict[str, tuple[Shapes, Shapes]]) -> Iterator[None]:
    """Inside, the shapes that go into and come out of every submodule are put into `seen`."""

    def hook(name: str) -> Any:
        def note(_: nn.Module, inputs: Any, outputs: Any) -> None:
            seen[name] = (_shapes(inputs), _shapes(outputs))

        return note

    handles = [part.register_forward_hook(hook(name)) for name, part in module.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shapes(values: Any) -> Shapes:
    """Shapes of all tensors in nested tuples."""
    if isinstance(values, Tensor):
        return [list(values.shape)]
    return [shape for each in values for shape in _shapes(each)] if isinstance(values, tuple) else []


def _row(
    part: str,
    layer: str,
    given: Shapes,
    made: Shapes,
    *,
    parameters: int = 0,
    what: str = "",
    pooled: Any = None,
) -> dict[str, Any]:
    found = {"part": part, "layer": layer, "input": given, "output": made, "pooled": pooled}
    return found | {"parameters": parameters, "what": what}


def _total(*modules: nn.Module) -> int:
    return sum(count(each)["total"] for each in modules)


def _extractor(
    images: Tensor, features: Sequence[Tensor], seen: Mapping[str, Any], modules: Mapping[str, nn.Module]
) -> Iterator[dict[str, Any]]:
    part = "Feature extractor"
    yield _row(part, "Input_size", _shapes(images), _shapes(images))
    stem = [modules[f"pyramid.{name}"] for name in ("conv1", "bn1")]
    given, made = seen["pyramid.conv1"][0], seen["pyramid.bn1"][1]
    yield _row(part, "Conv2d + BN + ReLu", given, made, parameters=_total(*stem), what=_kernel(stem[0]))
    yield _row(part, "Maxpool", *seen["pyramid.maxpool"], what=_kernel(modules["pyramid.maxpool"]))
    for k, each in zip(SCALES, features, strict=True):
        name = f"pyramid.layer{k}"
        pooled = list(pool(each).shape)
        yield _row(part, f"Layer{k}", *seen[name], parameters=_total(modules[name]), pooled=pooled)


def _flows(seen: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Any]]:
    for k in SCALES:
        name = f"network.flows.{k - 1}"
        (given, condition), (made, _) = seen[name]
        what = f"condition {_times(condition[1:])}"
        yield _row(
            "Multi_flow", f"Decoder layer{k}", [given], [made], parameters=_total(modules[name]), what=what
        )


def _fusion(
    us: Sequence[Tensor], ys: Sequence[Tensor], seen: Mapping[str, Any], modules: Mapping[str, nn.Module]
) -> Iterator[dict[str, Any]]:
    """Steps that are functions are run here once more on the network's own latents."""
    part, coarse = "Fusion_flow", grid(us[-1])
    pooled = [cell_mean(u, coarse) for u in us]
    for k in SCALES[:3]:
        yield _row(
            part,
            f"AvgPool2d layer{k}",
            _shapes(us[k - 1]),
            _shapes(pooled[k - 1]),
            what=CHOICES["AvgPool2d"],
        )
    yield _row(part, "Layer4", _shapes(us[3]), _shapes(pooled[3]))
    together = torch.cat(pooled, dim=1)
    yield _row(part, "Concat", _shapes(tuple(pooled)), _shapes(together))
    for name in ("network.fusion.reduce", "network.fusion.expand"):
        module = modules[name]
        yield _row(part, "Conv2d", *seen[name], parameters=_total(module), what=_kernel(module))
    split = together.split([u.shape[1] for u in us], dim=1)
    yield _row(part, "Split", _shapes(together), _shapes(tuple(split)))
    for k, (each, y) in enumerate(zip(split[:3], ys, strict=False), start=1):
        made = upsample(each, grid(y))
        yield _row(part, f"UpSample layer{k}", _shapes(each), _shapes(made), what=CHOICES["UpSample"])
    yield _row(part, "Layer4", _shapes(split[3]), _shapes(ys[3]))


def _kernel(module: nn.Module) -> str:
    """Kernel and stride of a convolution or pooling."""
    kernel, stride = (getattr(module, name) for name in ("kernel_size", "stride"))
    sides = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    step = stride[0] if isinstance(stride, tuple) else stride
    return f"kernel {_times(sides)}, stride {step}"


# Rendering


def table2_blocks() -> list[Block]:
    """The paper's layers with our shapes and parameters beside them; then what only ours has."""
    facts = load_named(NAME)
    if not facts:
        return [missing("Table 2", f"benchmarks/results/{NAME}.json", COMMAND)]
    notes = Notes()
    printed = paper_table(2)
    rows = [_beside(paper, own, notes) for paper, own in zip(printed, facts["rows"], strict=False)]
    for own in facts["rows"][len(printed) :]:
        shown = ("-", _joined(own["output"]), "-", f"{own['parameters']:,}", "-", own["what"])
        rows.append((own["part"], own["layer"], *shown))
    header = ("part", "layer", "paper: output", "ours: output", "agrees", "parameters")
    header += ("paper: key parameter", "ours")
    caption = (
        f"Batch x channels x height x width; {facts['size']} px, batch {facts['batch']}, random weights; parameters of "
        "the layer, frozen ones included. A standard ResNet18 has twice the paper's height and width from the stem to "
        "layer 4; AvgPool2d(3, stride 2, padding 1) on each layer's output, the 'pyramid pooling' of the paper's text, "
        "brings it to the sizes that the flows work on, which agree. Pooling in the fusion is the mean over exactly "
        "the cells that its nearest upsampling fills. F_cat is what the edges add to F4. Commit "
        f"{facts['commit']}."
    )
    return [
        Table("Table 2: layers", header, rows, caption),
        Text("Notes on the paper's Table 2", notes.lines()),
    ]


def _beside(paper: Mapping[str, str], own: Mapping[str, Any], notes: Notes) -> tuple[str, ...]:
    if (paper["part"], paper["layer"]) != (own["part"], own["layer"]):
        raise SystemExit(f"{NAME}.json: {own['part']} {own['layer']} where the paper has {paper['layer']}")
    made = _joined(own["output"])
    agrees = "yes" if made == paper["output_size"] else "no"
    if agrees == "no" and own["pooled"] and _times(own["pooled"]) == paper["output_size"]:
        agrees, made = "after pooling", f"{made}; pooled {_times(own['pooled'])}"
    return (
        paper["part"],
        paper["layer"],
        notes.mark(paper, "output_size"),
        made,
        agrees,
        f"{own['parameters']:,}",
        notes.mark(paper, "key_parameter"),
        own["what"] or "-",
    )


def _joined(shapes: Sequence[Sequence[int]]) -> str:
    return "; ".join(map(_times, shapes))


def _times(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def main() -> None:
    """Run the network once unless the result is there."""
    from paper_protocol import CODE, RESULTS, write

    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    if not (target := RESULTS / f"{NAME}.json").exists():
        write(target, {"rows": measure(), "size": SIZE, "batch": BATCH, "weights": "random", "commit": CODE})


if __name__ == "__main__":
    main()
