"""Patterns by which users name nodes and weights."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt import ir, optimize
from graphopt.errors import InputError
from graphopt.wildcards import check, fits, named
from tests._models import parse

NET = """g (float[4, 256] x) => (float[4, 8] y) <float w, float head> {
    a = MatMul (x, w)
    y = MatMul (a, head)
}"""
WEIGHTS = {"w": (256, 256), "head": (256, 8)}


@pytest.fixture
def net() -> ir.Model:
    model = parse(NET)
    rng = np.random.default_rng(0)
    for node, label, (name, shape) in zip(
        model.graph, ("body[0]", "last"), WEIGHTS.items(), strict=True
    ):
        node.name = label
        weights = ir.tensor(rng.normal(size=shape).astype(np.float32), name=name)
        kind = ir.TensorType(ir.DataType.FLOAT)
        value = ir.Value(name=name, type=kind, shape=ir.Shape(shape), const_value=weights)
        node.replace_input_with(1, value)
        model.graph.register_initializer(value)
    return model


def test_a_name_stands_for_itself_whatever_is_in_it() -> None:
    assert fits(["body[0]"], "body[0]") and not fits(["body[0]"], "body1")
    assert fits(["body*"], None, "body[0]") and not fits([], "body[0]")


def test_a_pattern_that_fits_nothing_is_named(net: ir.Model) -> None:
    check(net, ["body[[]0]", "MatMul", "hea?"])
    with pytest.raises(InputError, match=r"no node or weight is named 'tail\*'"):
        check(net, ["last", "tail*"])


def test_labels_of_patterns(net: ir.Model) -> None:
    assert named(net, ["last", "Mat*"]) == ("last", "body[0]")
    with pytest.raises(InputError, match="no node is named 'head'"):
        named(net, ["head"])


def test_labels_of_nodes_in_bodies() -> None:
    net = parse("""g (float[4, 2] x, bool k) => (float[4, 2] y) {
        y = If (k) <then_branch = t () => (float[4, 2] p) { [inside] p = Neg (x) },
            else_branch = e () => (float[4, 2] q) { q = Exp (x) }>
    }""")
    assert named(net, ["inside", "Exp"]) == ("inside", "Exp->q")


@pytest.mark.parametrize("kept", ["w", "body*"])
@pytest.mark.parametrize(
    "step",
    ["palettize-weights{bits=4,keep=[%s]}", "store-float16{keep=[%s]}", "clip-weights{keep=[%s]}"],
)
def test_passes_leave_what_is_named_by_node_or_by_weight(
    net: ir.Model, step: str, kept: str
) -> None:
    before = ir.array(net.graph.initializers["w"])
    result = optimize(net, passes=step % kept, verify="off")
    after = ir.array(result.graph.initializers["w"])
    assert before is not None and after is not None
    np.testing.assert_array_equal(after, before)
    with pytest.raises(InputError, match="no node or weight is named 'nix'"):
        optimize(net, passes=step % "nix", verify="off")
