"""What `graphopt diff` finds between two models."""

from __future__ import annotations

import json

import numpy as np

from graphopt import files, ir
from graphopt.differences import diff
from tests._text import model, proto

NET = """
net (float[2,4] x) => (float[2,4] y) <float[4] w = {1, 2, 3, 4}> {
  [scale] a = Mul (x, w)
  [zero] b = Relu (a)
  [soft] y = Softmax <axis = 1> (b)
}
"""


def test_equal_models() -> None:
    found = diff(proto(NET), proto(NET))
    assert found.identical and found.kept == 3
    assert list(found.lines()) == ["no difference in 3 nodes and 16 bytes of weights"]


def test_nodes_by_name() -> None:
    changed = NET.replace("axis = 1", "axis = 0").replace("Relu (a)", "Tanh (a)")
    found = diff(proto(NET), proto(changed))
    (soft,) = found.changed
    assert soft.node.label == "soft" and soft.changes == ("axis: 1 became 0",)
    assert [gone.node.op for gone in found.removed] == ["Relu"]
    assert [new.node.op for new in found.added] == ["Tanh"]
    assert found.kept == 1 and "~ Softmax soft: axis: 1 became 0" in found.lines()


def test_inputs_that_were_rewired() -> None:
    found = diff(proto(NET), proto(NET.replace("(b)", "(a)")))
    assert found.changed[0].changes == ("input 0: b became a",)


def test_lineage_tells_what_became_of_nodes() -> None:
    one, other = model(NET), model(NET)
    nodes = {node.name: node for node in other.graph}
    fused = ir.Node("", "HardSwish", [other.graph.inputs[0]], name="fused")
    fused.meta[ir.SOURCES] = ("scale", "zero")
    other.graph.insert_before(nodes["soft"], fused)
    nodes["soft"].replace_input_with(0, fused.outputs[0])
    other.graph.remove([nodes["zero"], nodes["scale"]], safe=True)
    found = diff(one, other)
    assert {gone.node.label: gone.into for gone in found.removed} == {
        "scale": ("fused",),
        "zero": ("fused",),
    }
    assert found.added[0].sources == ("scale", "zero")
    assert "+ HardSwish fused, from scale, zero" in found.lines()


def test_lineage_is_read_from_files_and_follows_new_names() -> None:
    other = model(NET.replace("[zero]", "[again]"))
    for node in other.graph:
        if node.name == "again":
            node.metadata_props[ir.SOURCES] = json.dumps(["zero"])
    found = diff(model(NET), files.load(files.to_proto(other)))
    assert found.changed[0].changes == ("name: zero became again",)
    assert not found.removed and not found.added


def test_weights() -> None:
    found = diff(proto(NET), proto(NET.replace("{1, 2, 3, 4}", "{1, 2, 3, 5}")))
    assert [(w.name, w.change, w.bytes_after) for w in found.weights] == [
        ("w", "values changed", 16)
    ]
    wider = NET.replace("float[4] w", "double[4] w").replace("float[2,4]", "double[2,4]")
    found = diff(proto(NET), proto(wider))
    assert found.weights[0].change == "FLOAT [4] became DOUBLE [4]"
    assert found.weight_bytes == (16, 32)
    assert any(line.startswith("input x: ") for line in found.header)


def test_weights_that_are_not_numbers_are_equal_to_themselves() -> None:
    one, other = model(NET), model(NET)
    for each in (one, other):
        each.graph.initializers["w"].const_value = ir.tensor(np.full(4, np.nan, np.float32))
    assert diff(one, other).identical


def test_opsets_signature_and_metadata() -> None:
    newer = NET.replace("float[2,4] y)", "float[n,4] y)")
    one, other = proto(NET), proto(newer)
    other.opset_import[0].version = 21
    entry = other.metadata_props.add()
    entry.key, entry.value = "author", "somebody"
    header = diff(one, other).header
    assert "opset ai.onnx: 20 became 21" in header
    assert "metadata author: nothing became somebody" in header
    assert any(line.startswith("output y: ") for line in header)


def test_subgraphs_and_functions() -> None:
    text = """
    net (float[4] x, bool p) => (float[4] y) {
      [choice] y = If (p) <
        then_branch = yes () => (float[4] u) { [u] u = Abs (x) },
        else_branch = no () => (float[4] v) { [v] v = Neg (x) }
      >
    }
    """
    found = diff(proto(text), proto(text.replace("Neg", "Exp")))
    assert [str(gone.node) for gone in found.removed] == ["Neg v in choice.else_branch"]
    assert found.kept == 2
    json.dumps(found.to_dict())
