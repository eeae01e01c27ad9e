"""An OpenVINO graph (model.xml with model.bin), checked as bytes before the runtime sees it.

The XML is refused with any declaration of its own (entities that grow, files that are fetched), with layers that are
not plain arithmetic of OpenVINO's own operator sets, and with data outside of model.bin.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from xml.etree import ElementTree

from umiad.errors import ModelFileError

MAX_LAYERS = 50_000
_WORDS = """
    Abs Add Atan AvgPool BatchNormInference Broadcast Ceiling Clamp Concat Const Convert ConvertLike Convolution
    ConvolutionBackpropData CumSum DepthToSpace Divide Einsum Elu Equal Erf Exp Floor FloorMod Gather
    GatherElements GatherND Gelu Greater GreaterEqual GroupConvolution HSigmoid HSwish HardSigmoid
    Interpolate Less LessEqual Log LogSoftmax
    LogicalAnd LogicalNot LogicalOr MVN MatMul MaxPool Maximum Minimum Mod Multiply Negative NormalizeL2
    NotEqual PReLU Pad Parameter Power Range ReLU ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd
    ReduceSum Reshape Result Round ScatterElementsUpdate ScatterNDUpdate ScatterUpdate Select ShapeOf Sigmoid
    Sign Slice SoftMax SoftPlus Softmax SpaceToDepth Split Sqrt SquaredDifference Squeeze StridedSlice Subtract
    Swish Tanh Tile TopK Transpose Unsqueeze VariadicSplit
"""
LAYERS = frozenset(_WORDS.split())
"""Plain arithmetic: none of them loops, branches, keeps a state or reads anything."""
ENDS = {"Parameter": 1, "Result": 2}
"""Layers through which a graph takes images, and gives maps and scores."""
_OPSET = re.compile(r"opset\d{1,2}")
_DECLARATION = re.compile(rb"<!\s*(DOCTYPE|ENTITY|\[)", re.IGNORECASE)


def check(graph: bytes, weights: bytes, *, source: str) -> None:
    """Refuse what no export of ours holds. Raises ModelFileError that names what was found."""
    if b"\x00" in graph or _DECLARATION.search(graph):
        raise ModelFileError(f"{source}: holds a declaration, expected plain UTF-8 XML; altered")
    try:
        root = ElementTree.fromstring(graph.decode("utf-8"))  # noqa: S314 - see above
    except (ElementTree.ParseError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{source}: no XML ({str(error)[:100]}); damaged or altered") from error
    for problem in _problems(root, held=len(weights)):
        raise ModelFileError(f"{source}: {problem}; not an export of this umiad, or altered")


def _problems(root: ElementTree.Element, *, held: int) -> Iterator[str]:
    """What a graph of ours never has."""
    if root.tag != "net":
        yield f"<{root.tag[:40]}> at the top, expected <net>"
    layers = list(root.iter("layer"))
    if not 0 < len(layers) <= MAX_LAYERS:
        yield f"{len(layers)} layers, expected 1 to {MAX_LAYERS}"
    if any(len(list(layer.iter("layer"))) > 1 or layer.find("body") is not None for layer in layers):
        yield "layers within a layer, expected none"
    for kind, count in ENDS.items():
        if (found := sum(layer.get("type") == kind for layer in layers)) != count:
            yield f"{found} layers {kind!r}, expected {count}"
    for layer in layers:
        kind, version = layer.get("type", ""), layer.get("version", "")
        if kind not in LAYERS or not _OPSET.fullmatch(version):
            yield f"layer {kind[:60]!r} of {version[:40]!r} is not among the {len(LAYERS)} that exports use"
        for data in layer.iter("data"):
            yield from _data_problems(data, kind=kind, held=held)


def _data_problems(data: ElementTree.Element, *, kind: str, held: int) -> Iterator[str]:
    if kind != "Const":
        return
    numbers = [data.get(name, "") for name in ("offset", "size")]
    if not all(each.isascii() and each.isdigit() and len(each) < 20 for each in numbers):
        yield "a constant without offset and size"
    elif sum(map(int, numbers)) > held:
        yield f"a constant at {numbers[0]} of {numbers[1]} bytes, but model.bin has {held}"
