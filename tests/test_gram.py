"""Columns and weight matrices against ONNX Runtime's own operators; sums of columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from graphopt import files, gram, ir
from graphopt.errors import InputError
from graphopt.runner import Runner
from tests._text import proto


def model_of(op: str, x: Sequence[int], w: Sequence[int], attributes: str = "") -> ir.Model:
    """A model of one linear operator with random weights."""
    weights = np.random.default_rng(1).standard_normal(w).astype(np.float32)
    made: Any = proto(
        f"net (float[{','.join(map(str, x))}] x) => (float y) {{ y = {op} {attributes} (x, w) }}"
    )
    made.graph.output[0].type.tensor_type.ClearField("shape")
    made.graph.initializer.append(ir.to_proto(ir.tensor(weights, name="w")))
    return files.load(made)


CASES = [
    ("Conv", (2, 6, 9, 8), (4, 6, 3, 3), ""),
    ("Conv", (2, 6, 9, 8), (4, 3, 3, 2), "<group = 2, strides = [2, 1], pads = [1, 0, 2, 1]>"),
    ("Conv", (1, 6, 9, 8), (6, 1, 3, 3), "<group = 6, dilations = [2, 1], pads = [2, 1, 2, 1]>"),
    ("Conv", (1, 3, 9, 8), (4, 3, 3, 2), '<auto_pad = "SAME_UPPER", strides = [2, 2]>'),
    ("Conv", (1, 3, 9, 8), (4, 3, 2, 4), '<auto_pad = "SAME_LOWER", strides = [2, 3]>'),
    ("Conv", (1, 3, 9), (4, 3, 3), '<auto_pad = "VALID", strides = [2]>'),
    ("Conv", (1, 2, 5, 6, 4), (4, 2, 3, 2, 1), "<pads = [1, 0, 0, 1, 1, 0]>"),
    ("ConvTranspose", (2, 4, 5, 6), (4, 3, 3, 3), ""),
    (
        "ConvTranspose",
        (1, 4, 5, 6),
        (4, 3, 3, 2),
        "<group = 2, strides = [2, 3], dilations=[2, 1]>",
    ),
    (
        *("ConvTranspose", (1, 4, 5, 6), (4, 1, 3, 3)),
        "<group = 4, strides = [2, 2], pads = [1, 0, 1, 2], output_padding = [1, 0]>",
    ),
    ("ConvTranspose", (1, 4, 5, 6), (4, 2, 3, 3), "<strides = [2, 2], output_shape = [10, 12]>"),
    ("ConvTranspose", (1, 4, 5, 6), (4, 2, 3, 3), '<strides = [2, 2], auto_pad = "SAME_UPPER">'),
    ("ConvTranspose", (1, 4, 5, 6), (4, 2, 3, 3), '<strides = [2, 2], auto_pad = "SAME_LOWER">'),
    ("ConvTranspose", (1, 4, 5), (4, 2, 1), "<pads = [1, 1]>"),
    ("Gemm", (5, 7), (7, 3), "<alpha = 0.5>"),
    ("Gemm", (7, 5), (3, 7), "<transA = 1, transB = 1>"),
    ("MatMul", (2, 5, 7), (7, 3), ""),
    ("MatMul", (7,), (7, 3), ""),
    ("MatMul", (5, 7), (7,), ""),
    ("MatMul", (2, 3, 5, 7), (3, 7, 4), ""),
    ("MatMul", (5, 7), (3, 7, 4), ""),
]


@pytest.mark.parametrize("case", CASES, ids=[f"{c[0]}{c[1]}{c[2]}{c[3]}" for c in CASES])
def test_columns_times_weights(case: tuple[str, Sequence[int], Sequence[int], str]) -> None:
    """Their product is what the operator computes, and the weight matrix can be undone."""
    op, x_shape, w_shape, attributes = case
    model = model_of(op, x_shape, w_shape, attributes)
    (node,) = model.graph
    weights = ir.array(node.inputs[1])
    assert weights is not None
    x = np.random.default_rng(2).standard_normal(x_shape).astype(np.float32)
    expected = Runner(model).run({"x": x})["y"]

    matrix = gram.weight_matrix(node, weights)
    product = gram.columns(node, x) @ matrix.transpose(0, 2, 1)  # [groups, rows, out]
    found: Any
    if op.startswith("Conv"):
        found = product.reshape(product.shape[0], x_shape[0], -1, product.shape[2])
        found = found.transpose(1, 0, 3, 2).reshape(expected.shape)
    elif len(w_shape) > 2 and len(x_shape) > 2:
        found = product.reshape(w_shape[0], x_shape[0], -1, w_shape[-1]).transpose(1, 0, 2, 3)
    else:
        found = product.reshape(expected.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert np.array_equal(gram.weight_tensor(node, matrix, w_shape), weights)

    pieces = list(gram.column_blocks(node, x, limit=256))
    assert np.array_equal(np.concatenate(pieces, axis=1), gram.columns(node, x))


def test_sums() -> None:
    """XᵀX, mean and count over samples of different sizes; sums merge by addition."""
    model = model_of("Conv", (1, 4, 6, 6), (4, 2, 3, 3), "<group = 2>")
    (node,) = model.graph
    rng = np.random.default_rng(3)
    samples = [rng.standard_normal((1, 4, n, 6)).astype(np.float32) for n in (6, 9)]
    (whole,) = gram.accumulate([node], [{"x": x} for x in samples]).values()
    (first,) = gram.accumulate([node], [{"x": samples[0]}]).values()
    (second,) = gram.accumulate([node], [{"x": samples[1]}]).values()
    rows = np.concatenate([gram.columns(node, x) for x in samples], axis=1).astype(np.float64)
    np.testing.assert_allclose(whole.xtx, rows.transpose(0, 2, 1) @ rows, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(whole.mean, rows.mean(axis=1), atol=1e-6)
    assert whole.count == rows.shape[1]
    np.testing.assert_allclose((first + second).xtx, whole.xtx)


def test_some_of_the_rows() -> None:
    """A bound on the rows takes a grid of them; the phases together take all, each once."""
    model = model_of("Conv", (1, 3, 20, 20), (4, 3, 3, 3), "<pads = [1, 1, 1, 1]>")
    (node,) = model.graph
    x = np.random.default_rng(4).standard_normal((1, 3, 20, 20)).astype(np.float32)
    parts = [b for phase in range(16) for b in gram.column_blocks(node, x, rows=25, phase=phase)]
    assert {p.shape for p in parts} == {(1, 25, 27)}
    found, whole = np.concatenate(parts, axis=1)[0], gram.columns(node, x)[0]
    assert np.array_equal(found[np.lexsort(found.T)], whole[np.lexsort(whole.T)])
    (bounded,) = gram.accumulate([node], [{"x": x}], rows=25).values()
    assert bounded.count == 25


def test_what_cannot_be() -> None:
    """Other operators, weights that are no constant, inputs that do not fit or are not finite."""
    (relu,) = files.load(proto("net (float[2] x) => (float[2] y) { y = Relu (x) }")).graph
    with pytest.raises(InputError, match="Relu"):
        gram.columns(relu, np.ones(2, np.float32))
    text = "net (float[2,2] x, float[2,2] w) => (float[2,2] y) { y = MatMul (x, w) }"
    (matmul,) = files.load(proto(text)).graph
    with pytest.raises(InputError, match="no constant"):
        gram.columns(matmul, np.ones((2, 2), np.float32))
    (conv,) = model_of("Conv", (1, 4, 6, 6), (4, 4, 3, 3)).graph
    with pytest.raises(InputError, match="takes"):
        gram.columns(conv, np.ones((1, 3, 6, 6), np.float32))
    with pytest.raises(InputError, match="not finite"):
        gram.accumulate([conv], [{"x": np.full((1, 4, 6, 6), np.nan, np.float32)}])


def test_what_does_not_fit_into_memory_has_no_sums() -> None:
    models = (
        model_of("MatMul", (1, 16), (16, 4)),
        model_of("Conv", (1, 4, 5, 5), (4, 2, 2, 2), "<group = 2>"),
    )
    wide, small = (next(iter(model.graph)) for model in models)
    least, most = 2 * 8 * 8 * 8, 16 * 16 * 8
    assert gram.affordable([wide, small], least) == [small]
    assert gram.affordable([wide, small], least + most) == [wide, small]
    assert gram.affordable([wide, small], least - 1) == []
