"""An ONNX graph, checked as bytes before any runtime sees it: nothing but known arithmetic on what it holds itself.

ONNX files may name further files (CVE-2022-25882, CVE-2024-27318), call operators from elsewhere, and loop. Ours do
none of it, so whatever does is no export of ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from umiad.errors import ModelFileError, require

IMAGES, ANOMALY_MAP, IMAGE_SCORE = "images", "anomaly_map", "image_score"
"""Names of the input [B,3,S,S] and of the outputs [B,S,S] and [B], all float32."""
OPSETS = range(18, 25)
MAX_NODES = 50_000
_WORDS = """
    Abs Add And ArgMax ArgMin Atan AveragePool BatchNormalization Cast Ceil Clip Concat Constant ConstantOfShape
    Conv ConvTranspose CumSum DepthToSpace DequantizeLinear Div Einsum Elu Equal Erf Exp Expand Flatten Floor
    Gather GatherElements GatherND Gelu Gemm GlobalAveragePool Greater GreaterOrEqual GroupNormalization HardSigmoid
    HardSwish Identity InstanceNormalization LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax MatMul Max
    MaxPool Mean Min Mod Mul Neg Not Or PRelu Pad Pow QuantizeLinear Range Reciprocal ReduceL1 ReduceL2
    ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize
    Round ScatterElements ScatterND Shape Sigmoid Sign Slice Softmax Softplus SpaceToDepth Split Sqrt Squeeze
    Sub Sum Tanh Tile TopK Transpose Trilu Unsqueeze Where
"""
OPERATORS = frozenset(_WORDS.split())
"""Plain arithmetic of the standard: none of them loops, calls, draws random numbers or reads anything."""
_PLAIN_DOMAINS = ("", "ai.onnx")
_PURPOSE = "reading an exported ONNX model"


def check(content: bytes, *, size: int, source: str) -> None:
    """Refuse every graph that an export of ours for images of `size` x `size` cannot be.

    Raises:
        ModelFileError: no ONNX, an unknown operator, domain or version, data in other files, graphs within the graph,
            functions, too many nodes, or other inputs and outputs; names what was found.
        MissingExtraError: the package onnx is not there.
    """
    model = _parsed(content, source=source)
    for problem in _problems(model, size=size):
        raise ModelFileError(f"{source}: {problem}; not an export of this umiad, or altered")


def opset(content: bytes, *, source: str) -> int:
    """The version of the operators that a checked graph uses."""
    return int(_parsed(content, source=source).opset_import[0].version)


def cleaned(model: Any) -> bytes:
    """The bytes of a fresh graph without what tells of the machine that made it (paths in stack traces).

    Raises ModelFileError where it is too large for one file.
    """
    for holder in (model, model.graph):
        holder.doc_string = ""
        holder.ClearField("metadata_props")
    graph = model.graph
    for part in (*graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info):
        part.doc_string = ""
        part.ClearField("metadata_props")
    graph.ClearField("value_info")
    try:
        return bytes(model.SerializeToString(deterministic=True))
    except ValueError as error:
        raise ModelFileError(f"the graph: {str(error)[:200]}; expected at most 2 GiB") from error


def _parsed(content: bytes, *, source: str) -> Any:
    onnx = require("onnx", extra="onnx", purpose=_PURPOSE)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except Exception as error:  # protobuf's DecodeError is not the same class in all of its builds
        raise ModelFileError(
            f"{source}: no ONNX model ({type(error).__name__}); damaged or altered"
        ) from error
    return model


def _problems(model: Any, *, size: int) -> Iterator[str]:
    """What a graph of ours never has, worst first."""
    graph = model.graph
    if len(graph.node) > MAX_NODES:
        yield f"{len(graph.node)} nodes, expected at most {MAX_NODES}"
    if model.functions or model.training_info:
        yield "holds functions or training steps, expected none"
    versions = [(entry.domain, entry.version) for entry in model.opset_import]
    if len(versions) != 1 or versions[0][0] not in _PLAIN_DOMAINS or versions[0][1] not in OPSETS:
        shown = ", ".join(f"{domain[:40] or 'ai.onnx'} {version}" for domain, version in versions[:5])
        yield f"operator sets {shown or 'missing'}, expected one, ai.onnx {OPSETS[0]} to {OPSETS[-1]}"
    if graph.sparse_initializer or graph.quantization_annotation:
        yield "holds sparse or quantised tensors, expected none"
    for node in graph.node:
        yield from _node_problems(node)
    yield from _tensor_problems(graph.initializer)
    yield from _interface_problems(graph, size=size)


def _node_problems(node: Any) -> Iterator[str]:
    name = f"operator {node.op_type[:60]!r}"
    if node.domain not in _PLAIN_DOMAINS:
        yield f"{name} of domain {node.domain[:60]!r}, expected only those of ai.onnx"
    if node.op_type not in OPERATORS:
        yield f"{name} is not among the {len(OPERATORS)} that exports use"
    for attribute in node.attribute:
        if attribute.HasField("g") or attribute.graphs or attribute.ref_attr_name:
            yield f"{name} holds a graph of its own, expected none"
        if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
            yield f"{name} holds a sparse tensor, expected none"
        yield from _tensor_problems([*attribute.tensors, *([attribute.t] if attribute.HasField("t") else [])])


def _tensor_problems(tensors: Iterable[Any]) -> Iterator[str]:
    for tensor in tensors:
        if tensor.data_location or tensor.external_data:
            yield f"tensor {tensor.name[:60]!r} lies in another file, expected all data in this one"
        if min(tensor.dims, default=0) < 0:
            yield f"tensor {tensor.name[:60]!r} has a negative size"


def _interface_problems(graph: Any, *, size: int) -> Iterator[str]:
    expected = {
        "inputs": (graph.input, {IMAGES: (3, size, size)}),
        "outputs": (graph.output, {ANOMALY_MAP: (size, size), IMAGE_SCORE: ()}),
    }
    for word, (values, wanted) in expected.items():
        found = {value.name: _shape(value) for value in values}
        if found != wanted or len(values) != len(wanted):
            yield f"{word} {str(found)[:200]}, expected {wanted} after the batch, as float32"


def _shape(value: Any) -> tuple[int, ...] | str:
    """Lengths after the batch's; a word where it is no float32 tensor with a free batch."""
    tensor = value.type.tensor_type
    if tensor.elem_type != 1 or not tensor.shape.dim:
        return "no float32 tensor"
    batch, *rest = tensor.shape.dim
    return tuple(each.dim_value for each in rest) if batch.dim_param else "a fixed batch"
