"""Zeros in weights: how many, where, and what is made up for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from graphopt import models
from graphopt.errors import InputError
from graphopt.optimization import optimize
from graphopt.pruner.sparsity import Floats, Method, Pattern, sparsify
from graphopt.report import Report


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
    assert error(x, w, pattern, "sparsegpt") < 0.85 * cut


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
