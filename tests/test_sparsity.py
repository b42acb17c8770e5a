"""Zeros in weights: how many, where, and what is made up for."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import graphopt
from graphopt import ir, models
from graphopt.errors import InputError
from graphopt.optimization import optimize
from graphopt.pruner.sparsity import Floats, Method, Pattern, caught_up, sparsify
from graphopt.report import Report
from graphopt.runner import Runner
from tests._models import parse


def data(k: int) -> tuple[Floats, Floats]:
    """Inputs whose columns go together, and weights."""
    rng = np.random.default_rng(0)
    mixing = np.eye(k) + 1.2 * rng.standard_normal((k, k)) / np.sqrt(k)
    return rng.standard_normal((4000, k)) @ mixing, rng.standard_normal((1, 48, k))


def error(x: Floats, w: Floats, pattern: str, method: Method) -> float:
    found = sparsify(w, Pattern.parse(pattern), method, (x.T @ x)[None])
    assert np.mean(found == 0) == pytest.approx(0.5, abs=0.01)
    if ":" in pattern:
        zeros = np.count_nonzero(found.reshape(1, 48, -1, 4) == 0, axis=3)
        assert np.all(zeros == 2)
    return float(np.sum((x @ (found - w)[0].T) ** 2) / np.sum((x @ w[0].T) ** 2))


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_what_is_left_makes_up_for_what_went(pattern: str) -> None:
    x, w = data(160)
    cut = error(x, w, pattern, "magnitude")
    assert error(x, w, pattern, "wanda") < 1.02 * cut
    assert error(x, w, pattern, "sparsegpt") < 0.6 * cut


def test_errors_of_earlier_layers_are_caught_up_with() -> None:
    """Weights for inputs that were turned and shrunk do what they did with the earlier ones."""
    x, w = data(16)
    rng = np.random.default_rng(1)
    now = 0.8 * x @ (np.eye(16) + 0.2 * rng.standard_normal((16, 16)))
    found = caught_up(w, (now.T @ now)[None], (x.T @ now)[None])
    expected = x @ w[0].T
    before, after = now @ w[0].T - expected, now @ found[0].T - expected
    assert np.sum(after**2) < 0.1 * np.sum(before**2)


def test_inputs_that_are_always_zero_cost_nothing() -> None:
    x, w = data(64)
    x[:, :32] = 0
    assert error(x, w, "0.5", "sparsegpt") < 1e-12


@pytest.mark.parametrize("text", ["0", "1", "1.5", "x", "4:2", "0:4", "2:3:4", "-1:4", "2:5"])
def test_what_is_no_sparsity(text: str) -> None:
    with pytest.raises(InputError, match="a share like"):
        Pattern.parse(text)


def test_on_a_model() -> None:
    samples: Any = "random"
    report = Report()
    path = models.path("digits_cnn")
    optimize(path, passes="sparsify-weights{sparsity=2:4}", data=samples, report=report)
    with_data = report.losses[0].sqnr_db
    plain = Report()
    optimize(path, passes="sparsify-weights{sparsity=2:4}", report=plain)
    assert with_data is not None and plain.losses[0].sqnr_db is not None
    assert report.record("sparsify-weights").rewrites[0].rule == "sparsegpt"
    assert plain.record("sparsify-weights").rewrites[0].rule == "magnitude"


def test_methods_that_need_data_say_so() -> None:
    path = models.path("digits_cnn")
    with pytest.raises(InputError, match="needs data"):
        optimize(path, passes="sparsify-weights{method=wanda}")
    with pytest.raises(InputError, match="one of"):
        optimize(path, passes="sparsify-weights{method=luck}")


def looked_up(pipeline: str, ids: list[int]) -> tuple[npt.NDArray[np.float32], int]:
    """What a table of 300 rows gives after a pass that saw rows 5 to 7, and its rows by then."""
    rng = np.random.default_rng(0)
    table = rng.standard_normal((300, 8)).astype(np.float32)
    table[9] = 3 * table[6]
    model = parse("net (int64[3] ids, float[300,8] w) => (float[3,8] y) { y = Gather(w, ids) }")
    value = model.graph.inputs.pop()
    value.const_value = ir.tensor(table, name="w")
    model.graph.register_initializer(value)
    seen = [{"ids": np.array([5, 6, 7])}]
    small = graphopt.optimize(model, passes=pipeline, data=seen)
    found = Runner(small).run({"ids": np.array(ids)})["y"]
    left = ir.array(small.graph.initializers["w"])
    assert left is not None
    return found - table[[5, 6, 7]], len(left)


@pytest.mark.parametrize(
    ("pipeline", "ids", "rows"),
    [
        ("prune-vocabulary", [5, 9, 7], 3),  # the ninth is most like the sixth
        ("prune-vocabulary", [-295, 6, 7], 3),
        ("prune-vocabulary{unknown=6}", [5, 100, 7], 3),
        ("prune-vocabulary{ratio=0.5}", [5, 6, 7], 150),
        ("prune-vocabulary{keep=[w]}", [5, 6, 7], 300),
    ],
)
def test_vocabulary(pipeline: str, ids: list[int], rows: int) -> None:
    """Rows that data use are as before; one that has gone is the most alike, or that of choice."""
    gap, left = looked_up(pipeline, ids)
    assert not gap.any()
    assert left == rows


@pytest.mark.parametrize("options", ["ratio=1", "ratio=-1", "unknown=-2", "unknown=300"])
def test_bad_vocabulary(options: str) -> None:
    """A share outside 0 to 1, a row that there is not."""
    with pytest.raises(InputError, match="prune-vocabulary"):
        looked_up(f"prune-vocabulary{{{options}}}", [5, 6, 7])


def test_clipping() -> None:
    """No weight of a layer is beyond the limit, and those within are as before."""
    name = "classify.weight"
    before = ir.array(graphopt.load(models.path("digits_cnn")).graph.initializers[name])
    small = graphopt.optimize(models.path("digits_cnn"), passes="clip-weights{share=0.1}")
    after = ir.array(small.graph.initializers[name])
    assert before is not None and after is not None
    limit = np.abs(after).max()
    assert 0.05 < np.mean(np.abs(before) > limit) <= 0.1
    assert np.array_equal(np.clip(before, -limit, limit), after)
    with pytest.raises(InputError, match="clip-weights"):
        graphopt.optimize(models.path("digits_cnn"), passes="clip-weights{share=1}")
