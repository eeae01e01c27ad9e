"""ONNX as bytes: what our exports hold is let through, everything else is refused by name before a runtime sees it."""

import pytest

from umiad import onnxfile
from umiad.errors import ModelFileError

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
helper = onnx.helper
FLOAT = onnx.TensorProto.FLOAT
SIZE = 64


def graph():
    """images [batch,3,S,S] -> their mean over channels, and its maximum."""
    nodes = [
        helper.make_node("ReduceMean", ["images", "channel"], ["anomaly_map"], keepdims=0),
        helper.make_node("ReduceMax", ["anomaly_map", "pixels"], ["image_score"], keepdims=0),
    ]
    constants = [
        helper.make_tensor("channel", onnx.TensorProto.INT64, [1], [1]),
        helper.make_tensor("pixels", onnx.TensorProto.INT64, [2], [1, 2]),
    ]
    made = helper.make_graph(
        nodes,
        "score",
        [helper.make_tensor_value_info("images", FLOAT, ["batch", 3, SIZE, SIZE])],
        [
            helper.make_tensor_value_info("anomaly_map", FLOAT, ["batch", SIZE, SIZE]),
            helper.make_tensor_value_info("image_score", FLOAT, ["batch"]),
        ],
        constants,
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def check(model):
    onnxfile.check(model.SerializeToString(), size=SIZE, source="model.onnx")


def add_node(model, kind, **attributes):
    model.graph.node.append(helper.make_node(kind, ["images"], [f"more {kind}"], **attributes))


def subgraph():
    return helper.make_graph([], "inner", [], [])


def external(tensor):
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")


def foreign_domain(model):
    model.graph.node.append(helper.make_node("Relu", ["images"], ["more"], domain="com.example"))


def constant_outside(model):
    tensor = helper.make_tensor("inner", FLOAT, [1], [0.0])
    external(tensor)
    model.graph.node.append(helper.make_node("Constant", [], ["more"], value=tensor))


def negative_size(model):
    model.graph.initializer[0].dims[0] = -1


def function(model):
    model.functions.add(name="Relu", domain="")


def second_opset(model):
    model.opset_import.append(helper.make_opsetid("com.example", 1))


def other_size(model):
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 32


def fixed_batch(model):
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def float64(model):
    model.graph.output[1].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE


ATTACKS = {
    "an operator that loops": (lambda m: add_node(m, "Loop", body=subgraph()), "'Loop' is not among"),
    "an operator that branches": (lambda m: add_node(m, "If"), "'If' is not among"),
    "random numbers": (lambda m: add_node(m, "RandomNormalLike"), "'RandomNormalLike' is not among"),
    "a known name with a graph inside": (lambda m: add_node(m, "Relu", body=subgraph()), "graph of its own"),
    "an operator of another domain": (foreign_domain, "of domain 'com.example'"),
    "external data": (lambda m: external(m.graph.initializer[0]), "lies in another file"),
    "external data of a constant": (constant_outside, "lies in another file"),
    "a negative size": (negative_size, "negative size"),
    "functions": (function, "holds functions"),
    "a second operator set": (second_opset, "operator sets ai.onnx 20, com.example 1"),
    "an old operator set": (lambda m: setattr(m.opset_import[0], "version", 7), "operator sets ai.onnx 7"),
    "a future operator set": (
        lambda m: setattr(m.opset_import[0], "version", 99),
        "operator sets ai.onnx 99",
    ),
    "no operator set": (lambda m: m.ClearField("opset_import"), "operator sets missing"),
    "another size": (other_size, "inputs"),
    "a fixed batch": (fixed_batch, "a fixed batch"),
    "another type": (float64, "no float32 tensor"),
    "a missing output": (lambda m: m.graph.output.pop(), "outputs"),
    "sparse tensors": (lambda m: m.graph.sparse_initializer.add(), "sparse"),
}


def test_a_plain_graph_passes():
    check(graph())
    assert onnxfile.opset(graph().SerializeToString(), source="x") == 20


@pytest.mark.parametrize("name", ATTACKS)
def test_M6_what_no_export_holds_is_refused_by_name(name):
    change, words = ATTACKS[name]
    model = graph()
    change(model)
    with pytest.raises(ModelFileError) as caught:
        check(model)
    assert words in str(caught.value)
    assert str(caught.value).startswith("model.onnx: ")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("content", [b"\x80\x04.", b"PK\x03\x04", b"\xff" * 100, b"{}"])
def test_M6_bytes_that_are_no_onnx_are_refused(content):
    with pytest.raises(ModelFileError, match=r"^model.onnx: "):
        onnxfile.check(content, size=SIZE, source="model.onnx")


def test_M6_more_nodes_than_any_export_has_are_refused(monkeypatch):
    monkeypatch.setattr(onnxfile, "MAX_NODES", 1)
    with pytest.raises(ModelFileError, match="2 nodes, expected at most 1"):
        check(graph())


def test_no_operator_of_the_list_holds_a_graph_or_is_random():
    from onnx import defs

    for name in onnxfile.OPERATORS:
        schema = defs.get_schema(name, max_inclusive_version=onnxfile.OPSETS[-1], domain="")
        kinds = {attribute.type for attribute in schema.attributes.values()}
        assert not kinds & {defs.OpSchema.AttrType.GRAPH, defs.OpSchema.AttrType.GRAPHS}, name
        assert "Random" not in name


def test_what_tells_of_the_machine_is_not_written():
    model = graph()
    secret = "/home/someone/project/secret.py"
    model.doc_string = model.graph.doc_string = model.graph.node[0].doc_string = secret
    for holder in (model, model.graph, model.graph.node[0], model.graph.input[0], model.graph.initializer[0]):
        holder.metadata_props.add(key="pkg.torch.onnx.stack_trace", value=secret)
    model.graph.value_info.append(helper.make_tensor_value_info("x", FLOAT, [1]))
    content = onnxfile.cleaned(model)
    assert secret.encode() not in content
    assert content == onnxfile.cleaned(graph())
    onnxfile.check(content, size=SIZE, source="model.onnx")
