"""Counts of operations, bytes and memory, against what a pencil gives."""

from __future__ import annotations

import onnx.parser
import pytest

from graphopt import ir
from graphopt.cost import Cost, model_cost, node_cost
from graphopt.shapes import Shapes


def model(text: str) -> ir.Model:
    return ir.from_proto(
        onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 18]> {text}')
    )


FLOPS = [
    ("(float[2,3] x, float[3,4] w) => (float y) { y = MatMul(x, w) }", 2 * 2 * 4 * 3),
    (
        "(float[2,3] x, float[4,3] w, float[4] c) => (float y) { y = Gemm<transB=1>(x, w, c) }",
        2 * 2 * 4 * 3 + 8,
    ),
    (
        "(float[3,2] x, float[3,4] w) => (float y) { y = Gemm<transA=1>(x, w) }",
        2 * 2 * 4 * 3,
    ),
    (
        "(float[1,4,8,8] x, float[6,2,3,3] w) => (float y) { y = Conv<group=2>(x, w) }",
        2 * 6 * 6 * 6 * 2 * 9,
    ),
    (
        "(float[1,4,8] x, float[4,6,3] w) => (float y) { y = ConvTranspose(x, w) }",
        2 * 4 * 8 * 6 * 3,
    ),
    (
        "(float[5,2,4] x, float[1,24,4] w, float[1,24,6] r) => (float y) "
        "{ y = LSTM<hidden_size=6>(x, w, r) }",
        2 * 5 * 2 * 24 * (4 + 6),
    ),
    (
        '(float[2,3] x, float[3,4] w) => (float y) { y = Einsum<equation="ij,jk->ik">(x, w) }',
        2 * 2 * 3 * 4,
    ),
    ("(float[2,3] x) => (float y) { y = Relu(x) }", 6),
    ("(float[2,3] x) => (float y) { y = Softmax(x) }", 30),
    ("(float[2,3] x) => (float y) { y = ReduceMean(x) }", 6),
    ("(float[1,1,8] x) => (float y) { y = MaxPool<kernel_shape=[2],strides=[2]>(x) }", 8),
    ("(float[2,3] x) => (float y) { y = Transpose(x) }", 0),
]


@pytest.mark.parametrize(("text", "flops"), FLOPS)
def test_operations(text: str, flops: int) -> None:
    found = model(f"g {text}")
    assert node_cost(found.graph[0], Shapes(found)).flops == flops
    assert model_cost(found, Shapes(found)).flops == flops


def test_bytes() -> None:
    found = model("g (float16[2,3] x, float16[3] w) => (float16 y) { y = Add(x, w)  z = Shape(y) }")
    shapes = Shapes(found)
    assert node_cost(found.graph[0], shapes) == Cost(6, 2 * (6 + 3 + 6))
    assert node_cost(found.graph[1], shapes) == Cost(0, 0)


def test_gather_reads_what_it_takes() -> None:
    found = model("g (float[1000,8] x, int64[2] i) => (float y) { y = Gather(x, i) }")
    assert node_cost(found.graph[0], Shapes(found)).bytes == 64 + 16 + 64


def test_symbols_take_their_number() -> None:
    found = model("g (float[b,3] x, float[3,4] w) => (float y) { y = MatMul(x, w) }")
    shapes = Shapes(found)
    assert node_cost(found.graph[0], shapes).flops == 24
    assert node_cost(found.graph[0], shapes, {"b": 10}).flops == 240
    assert model_cost(found, shapes, {"b": 10}).flops == 240


def test_an_unknown_rank_counts_nothing() -> None:
    found = model("g (float[2] x) => (float y) { y = com.example.What(x)  z = Relu(y) }")
    found.graph[0].outputs[0].shape = None
    cost = node_cost(found.graph[1], Shapes(found))
    assert cost.flops == 0 and cost.bytes == 0


def test_weights_count_once() -> None:
    found = model(
        """g (float[2,3] x) => (float y) <float[3] w = {1, 2, 3}> {
        a = Add(x, w)
        c = Constant<value = float[2] {1, 2}>()
        y = Add(a, w)
        }"""
    )
    cost = model_cost(found, Shapes(found))
    assert (cost.parameters, cost.weight_bytes) == (5, 20)


def test_peak_is_what_lives_at_once() -> None:
    chain = model("g (float[4] x) => (float y) { a = Relu(x)  b = Relu(a)  y = Relu(b) }")
    assert model_cost(chain, Shapes(chain)).peak_bytes == 32, "two of the chain at a time"
    kept = model("g (float[4] x) => (float y) { a = Relu(x)  b = Relu(a)  y = Add(b, x) }")
    assert model_cost(kept, Shapes(kept)).peak_bytes == 48, "x is needed again"
    view = model("g (float[4] x) => (float y) <int64[2] s = {2, 2}> { y = Reshape(x, s) }")
    assert model_cost(view, Shapes(view)).peak_bytes == 16, "a view takes no memory"


def test_control_flow_and_calls() -> None:
    loop = model(
        """g (float[4] x) => (float y) <int64 n = {5}, bool c = {1}> {
        y = Loop(n, c, x) <body = b (int64 i, bool c1, float u) => (bool c2, float v)
            { c2 = Identity(c1)  v = Relu(u) }>
        }"""
    )
    assert model_cost(loop, Shapes(loop)).flops == 5 * 4
    branch = model(
        """g (bool c, float[4] x) => (float y) {
        y = If(c) < then_branch = a () => (float p) { p = Relu(x) },
                    else_branch = e () => (float q) { r = Relu(x)  q = Relu(r) } >
        }"""
    )
    assert model_cost(branch, Shapes(branch)).flops == 8, "the dearer branch"
    text = (
        '<ir_version: 10, opset_import: ["": 18, "f": 1]> g (float[4] x, float[b] z) => (float y) '
        "{ y = f.both(x)  w = f.both(z) } "
        '<domain: "f", opset_import: ["": 18]> both (a) => (r) { s = Relu(a)  r = Neg(s) }'
    )
    call = ir.from_proto(onnx.parser.parse_model(text))
    assert model_cost(call, Shapes(call), {"b": 3}).flops == 2 * (4 + 3)
