"""Layers taken apart: what the two compute is what the one would, and the rest is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
import pytest

from graphopt import ir
from graphopt.errors import GraphoptError
from graphopt.gram import columns, weight_matrix
from graphopt.lowrank import Truncation, can_split, factor, halves, is_plane
from graphopt.pruner.splitting import rank_of, saving, split
from graphopt.runner import Runner
from tests.test_gram import model_of

CASES = [
    ("Conv", (2, 16, 9, 10), (24, 16, 3, 5), "<strides = [2, 1], pads = [1, 2, 1, 2]>"),
    ("Conv", (2, 16, 9, 10), (24, 16, 3, 3), "<strides = [1, 2], dilations = [2, 1]>"),
    ("Conv", (2, 16, 9, 10), (24, 16, 3, 3), '<auto_pad = "SAME_LOWER", strides = [2, 2]>'),
    ("Conv", (2, 40, 9, 10), (50, 40, 1, 1), ""),
    ("Conv", (2, 40, 9), (24, 40, 3), "<pads = [1, 1]>"),
    ("Gemm", (64, 40), (40, 30), ""),
    ("Gemm", (40, 64), (30, 40), "<transA = 1, transB = 1>"),
    ("MatMul", (2, 30, 40), (40, 30), ""),
]


@pytest.mark.parametrize(("op", "x", "w", "attributes"), CASES)
def test_halves(op: str, x: Sequence[int], w: Sequence[int], attributes: str) -> None:
    """Two layers in a model do what the product on paper does, and are off by what is told."""
    model = model_of(op, x, w, attributes)
    (node,) = model.graph
    data = np.random.default_rng(0).standard_normal(x).astype(np.float32) + 0.5
    rows = columns(node, data)[0].astype(np.float64)
    rows = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
    moment = rows.T @ rows / len(rows)
    array = ir.array(node.inputs[1])
    assert array is not None
    assert can_split(node)
    matrix = weight_matrix(node, array)[0].astype(np.float64)
    whole = np.concatenate([matrix, np.zeros((len(matrix), 1))], axis=1)
    truncation = Truncation(w, whole, moment, plane=is_plane(node, w))
    rank = rank_of(node, w, 0.5)
    before = Runner(model).run({"x": data})["y"]
    assert isinstance(before, np.ndarray)
    assert split(model, node, rank, moment)
    after = cast("npt.NDArray[np.float32]", Runner(model).run({"x": data})["y"])
    exact, product = rows @ whole.T, rows @ truncation.product(rank).T
    axis = 1 if op == "Conv" else -1
    got = np.moveaxis(after, axis, -1).reshape(exact.shape)
    assert np.abs(got - product).max() < 1e-4
    error = np.square(product - exact).sum() / np.square(exact - exact.mean(0)).sum()
    assert error == pytest.approx(truncation.error(rank))
    assert 0 < error < 0.7
    assert truncation.error(len(truncation.values)) < 1e-9


def test_data_count() -> None:
    """Ranks fit what comes in: nothing is lost of inputs that lie in a plane."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((30, 40))
    inputs = rng.standard_normal((100, 2)) @ rng.standard_normal((2, 40))
    rows = np.concatenate([inputs, np.ones((100, 1))], axis=1)
    whole = np.concatenate([weights, np.ones((30, 1))], axis=1)
    known = Truncation((40, 30), whole, rows.T @ rows / 100, plane=False)
    blind = Truncation((40, 30), whole, None, plane=False)
    assert known.error(2) < 1e-3
    assert blind.error(2) > 0.5


def test_what_is_not_worth_it() -> None:
    """A rank too high stays one layer, and so do layers that are small or in groups."""
    model = model_of("MatMul", (4, 40), (40, 40))
    (node,) = model.graph
    assert saving(node, (40, 40), 20) is None
    assert not split(model, node, 20, None)
    assert saving(node, (40, 40), 10) == pytest.approx((0.5, 0.5))
    for op, x, w, attributes in (
        ("MatMul", (4, 8), (8, 8), ""),
        ("Conv", (1, 64, 8, 8), (64, 32, 3, 3), "<group = 2>"),
        ("ConvTranspose", (1, 64, 8, 8), (64, 32, 3, 3), ""),
    ):
        assert not can_split(next(iter(model_of(op, x, w, attributes).graph)))


def test_attributes_of_a_plane() -> None:
    """A kernel's columns have the strides and pads of the first axis, its rows of the second."""
    model = model_of(
        "Conv", (1, 16, 9, 9), (16, 16, 3, 3), "<strides = [2, 1], pads = [1, 0, 2, 1]>"
    )
    (node,) = model.graph
    first, second = np.zeros((4, 16, 3)), np.zeros((16, 4, 3))
    made = halves(node, np.float32, first, second, plane=True)
    found = [{a.name: tuple(a.as_ints()) for a in part} for part in made.attributes]
    assert [w.shape for w in made.weights] == [(4, 16, 3, 1), (16, 4, 1, 3)]
    assert found[0] == {"strides": (2, 1), "pads": (1, 0, 2, 0)}
    assert found[1] == {"strides": (1, 1), "pads": (0, 0, 0, 1)}


def test_a_factor_of_what_rounding_made_indefinite() -> None:
    """The diagonal grows by as little as makes it one; sums of nothing have one, too."""
    x = np.random.default_rng(0).standard_normal((50, 4))
    x = np.concatenate([x, x], axis=1)
    moment = x.T @ x - 1e-9 * np.eye(8)
    with pytest.raises(np.linalg.LinAlgError):
        np.linalg.cholesky(moment)
    for sums in (moment, np.stack([moment, np.eye(8)]), np.zeros((8, 8))):
        lower = factor(sums)
        near = 2e-4 * max(float(sums.max()), 1e-9)
        assert np.allclose(lower @ lower.swapaxes(-1, -2), sums, rtol=0, atol=near)
    with pytest.raises(GraphoptError, match="not finite"):
        factor(np.full((2, 2), np.nan))
