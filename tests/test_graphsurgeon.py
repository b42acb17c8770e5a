"""The bridge to onnx-graphsurgeon: what it lacks comes back, and its functions run as passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from graphopt import files, ir
from graphopt.context import Context
from graphopt.errors import GraphoptError, InputError
from graphopt.files.external import FileTensor
from graphopt.graphsurgeon import from_graphsurgeon, graphsurgeon_pass, to_graphsurgeon
from tests._shared import shared
from tests.test_files import externalize, small, weighted

TEXT = """
<ir_version: 10, opset_import: ["" : 21, "ai.onnx.ml" : 3]>
main (float[N, 4] x, float[4] d, bool c) => (float[N, 4] y, seq(map(int64, float)) m)
<float[4] d = {1, 2, 3, 4}, float[1] inside = {2}, float[4] dead = {0, 0, 0, 0}>
{
    [first] a = Relu (x)
    [second] b = Add (a, d)
    [choice] y = If (c) <
        then_branch = yes () => (float[N, 4] t) { [inner] t = Mul (b, inside) },
        else_branch = no () => (float[N, 4] e) { e = Div (b, inside) }
    >
    s = SequenceConstruct (a, b)
    m = ai.onnx.ml.ZipMap <classlabels_int64s = [1, 2, 3, 4]> (b)
}
"""


def rich() -> ir.Model:
    """A model with much that a graphsurgeon graph cannot hold."""
    proto = onnx.parser.parse_model(TEXT)
    proto.doc_string, proto.domain, proto.model_version = "all", "here", 7
    proto.metadata_props.add(key="author", value="me")
    graph = proto.graph
    graph.doc_string = "main graph"
    graph.metadata_props.add(key="graph", value="g")
    graph.node[0].doc_string = "first of all"
    graph.node[0].metadata_props.add(key="layer", value="1")
    graph.node[2].attribute[0].g.node[0].doc_string = "in a branch"
    graph.input[0].doc_string = "the input"
    graph.value_info.append(helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, [4]))
    graph.quantization_annotation.add(tensor_name="b").quant_parameter_tensor_names.add(
        key="SCALE_TENSOR", value="dead"
    )
    custom = helper.make_node("Odd", ["a"], ["o"], "odd", domain="custom", level=2)
    custom.attribute.add(name="none", type=onnx.AttributeProto.INTS)
    custom.attribute.add(name="bytes", type=onnx.AttributeProto.STRING, s=b"\xff")
    kind = helper.make_tensor_type_proto(TensorProto.FLOAT, [2])
    custom.attribute.append(helper.make_attribute("kind", kind))
    graph.node.append(custom)
    proto.opset_import.add(domain="custom", version=1)
    return files.load(proto)


def content(model: ir.Model) -> onnx.ModelProto:
    """A model as protobuf; the order of value infos and initializers says nothing."""
    proto = files.to_proto(model)
    for field in (proto.graph.value_info, proto.graph.initializer):
        ordered = sorted(field, key=lambda item: item.name)
        texts = [item.SerializeToString() for item in ordered]
        del field[:]
        for text in texts:
            field.add().ParseFromString(text)
    return proto


def test_what_graphsurgeon_lacks_comes_back() -> None:
    for model in (rich(), files.load(small())):
        assert content(from_graphsurgeon(to_graphsurgeon(model), model)) == content(model)


def test_without_the_original() -> None:
    model = from_graphsurgeon(to_graphsurgeon(rich()))
    assert [node.op_type for node in model.graph][:2] == ["Relu", "Add"]


def test_corpus_goes_there_and_back() -> None:
    paths = sorted(shared("corpus/models").glob("*/model.onnx"))
    for path in [path for path in paths if path.stat().st_size < 1_500_000]:
        model = files.load(path)
        assert content(from_graphsurgeon(to_graphsurgeon(model), model)) == content(model), path


@pytest.mark.parametrize(
    "kind", ["bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2fnuz", "int4", "uint4"]
)
def test_element_types(kind: str) -> None:
    array: Any = np.array([0, 1, 2, 3, 4], np.float32).astype(getattr(ml_dtypes, kind))
    model = files.load(weighted(np.zeros(5, np.float32)))
    value = model.graph.initializers["w0"]
    value.const_value = ir.Tensor(array, name="w0")
    value.dtype = model.graph.outputs[0].dtype = value.const_value.dtype
    graph = to_graphsurgeon(model)
    graph.tensors()["w0"].values = array[::-1]
    found = from_graphsurgeon(graph, model).graph.initializers["w0"].const_value
    assert found is not None and found.dtype == value.const_value.dtype
    np.testing.assert_array_equal(found.numpy(), array[::-1])


def test_untouched_weights_stay_in_their_file(tmp_path: Path) -> None:
    path = externalize(weighted(np.ones(3000, np.float32)), tmp_path / "m.onnx")
    model = files.load(path)
    found = from_graphsurgeon(to_graphsurgeon(model), model).graph.initializers["w0"]
    assert isinstance(found.const_value, FileTensor)


def drop_relu(graph: Any) -> None:
    """Feed what follows the Relu with its input."""
    relu = next(node for node in graph.nodes if node.op == "Relu")
    for user in list(relu.outputs[0].outputs):
        user.inputs = [relu.inputs[0] if t is relu.outputs[0] else t for t in user.inputs]
    graph.cleanup()


def test_function_as_a_pass() -> None:
    context = Context(rich())
    before = content(context.model)
    source = context.model
    context.model.graph[1].meta["graphopt.sources"] = ("one", "two")
    one = graphsurgeon_pass(drop_relu)
    assert one.name == str(one) == "drop-relu"
    context.record.name = one.name
    one.run(context)
    (change,) = context.record.rewrites
    assert "first" in change.before and change.after == ()
    assert [node.op_type for node in context.model.graph] == ["Add", "If", "ZipMap"]
    assert ir.sources(context.model.graph[0]) == ("one", "two")
    assert content(source) == before
    assert context.shapes.shape(context.model.graph[0].outputs[0]) is not None
    after = files.to_proto(context.model)
    assert after.graph.output == before.graph.output
    assert after.graph.input == before.graph.input
    assert after.metadata_props == before.metadata_props


def test_function_that_changes_nothing() -> None:
    context = Context(rich())
    source = context.model
    graphsurgeon_pass(lambda graph: graph, "nothing").run(context)
    assert context.model is source and not context.record.rewrites


def rename_output(graph: Any) -> None:
    """Change the signature."""
    graph.outputs[0].name = "other"


def cut(graph: Any) -> None:
    """Leave a value that nothing produces."""
    graph.nodes.remove(graph.nodes[0])


def crash(graph: Any) -> None:
    """Fail, in two lines."""
    raise KeyError(f"no such\nnode in {graph.name}")


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (rename_output, "'rename-output' changed the inputs or outputs"),
        (cut, "'cut' failed: .*'a' is produced by nothing"),
        (crash, r"'crash' failed: KeyError: .*no such\\nnode in main"),
    ],
)
def test_functions_that_fail(function: Any, why: str) -> None:
    context = Context(rich())
    source = context.model
    with pytest.raises(GraphoptError, match=why) as caught:
        graphsurgeon_pass(function).run(context)
    assert "\n" not in str(caught.value) and context.model is source


def test_graph_that_cannot_be_written() -> None:
    graph = to_graphsurgeon(rich())
    graph.nodes[0].attrs["odd"] = object()
    with pytest.raises(InputError, match="cannot be written"):
        from_graphsurgeon(graph)
