"""Support vector machines and linear models in TVM, against ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from graphopt import backends, files, ir
from tests.test_tvm import CPU, agree, needs_tvm

ROWS, COLUMNS = 7, 5
LABELED = ("SVMClassifier", "LinearClassifier")
X = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)
X[2] = 0

Operator = tuple[str, dict[str, Any]]


def model(*operators: Operator, dtype: Any = TensorProto.FLOAT) -> ir.Model:
    """Operators of ai.onnx.ml on one input; the first of two outputs is a label."""
    nodes, outputs = list[Any](), list[Any]()
    for index, (kind, attributes) in enumerate(operators):
        kinds = {f"y{index}": TensorProto.FLOAT}
        if kind in LABELED:
            kinds = {f"label{index}": TensorProto.INT64, **kinds}
        domain, name = "ai.onnx.ml", f"{kind}{index}"
        nodes.append(helper.make_node(kind, ["x"], [*kinds], name, domain=domain, **attributes))
        outputs += [helper.make_tensor_value_info(name, each, None) for name, each in kinds.items()]
    given = helper.make_tensor_value_info("x", dtype, ["n", COLUMNS])
    graph = helper.make_graph(nodes, "net", [given], outputs)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx.ml", 1)]
    return files.load(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def machine(kernel: str, counts: list[int], *, probable: bool, degree: float = 3) -> Operator:
    """A random SVMClassifier with some support vectors of each class."""
    rng = np.random.default_rng(len(counts))
    vectors, pairs = sum(counts), len(counts) * (len(counts) - 1) // 2
    attributes: dict[str, Any] = {
        "kernel_type": kernel,
        "kernel_params": [0.3, 0.4, degree],
        "vectors_per_class": counts,
        "support_vectors": rng.standard_normal(vectors * COLUMNS).tolist(),
        "coefficients": rng.standard_normal((len(counts) - 1) * vectors).tolist(),
        "rho": rng.standard_normal(pairs).tolist(),
        "classlabels_ints": [7, 3, 5, 1][: len(counts)],
    }
    if probable:
        attributes["prob_a"] = (-rng.random(pairs) - 0.5).tolist()
        attributes["prob_b"] = rng.standard_normal(pairs).tolist()
    return "SVMClassifier", attributes


def regressor(one_class: int) -> Operator:
    """A random SVMRegressor."""
    rng = np.random.default_rng(1)
    return "SVMRegressor", {
        "kernel_type": "RBF",
        "kernel_params": [0.2, 0.0, 3.0],
        "n_supports": 6,
        "support_vectors": rng.standard_normal(6 * COLUMNS).tolist(),
        "coefficients": rng.standard_normal(6).tolist(),
        "rho": [0.1],
        "one_class": one_class,
    }


@needs_tvm
def test_machines(tmp_path: Path) -> None:
    made = model(
        machine("RBF", [4, 6, 3], probable=True),
        machine("LINEAR", [3, 2, 4, 3], probable=True),
        machine("POLY", [3, 5, 2, 2], probable=False),
        machine("POLY", [3, 5], probable=False, degree=2),
        machine("SIGMOID", [4, 4], probable=True),
        regressor(0),
        regressor(1),
    )
    agree(made, {"x": X}, tmp_path / "a")


def weights(classes: int) -> dict[str, Any]:
    """Of a linear model."""
    rng = np.random.default_rng(2)
    return {"coefficients": rng.standard_normal(classes * COLUMNS).tolist()}


@needs_tvm
def test_linear_models(tmp_path: Path) -> None:
    flat = {"kernel_params": [0.1, 0.0, 3.0]}
    three, two = {"classlabels_ints": [4, 8, 6]}, {"classlabels_ints": [4, 8]}
    soft, logistic = {"post_transform": "SOFTMAX"}, {"post_transform": "LOGISTIC"}
    made = model(
        ("SVMClassifier", {**weights(3), **three, **flat, "rho": [0.2]}),
        ("SVMClassifier", {**weights(2), **two, **flat, "rho": [-0.2]}),
        ("LinearClassifier", {**weights(3), **three, **soft, "intercepts": [0.1, 0.2, -0.3]}),
        ("LinearClassifier", {**weights(2), **two, **logistic, "intercepts": [0.1, 0.2]}),
        ("LinearRegressor", {**weights(2), "targets": 2, "intercepts": [0.1, 0.2]}),
        ("Normalizer", {"norm": "L1"}),
        ("Normalizer", {"norm": "L2"}),
    )
    agree(made, {"x": X}, tmp_path / "a")


@needs_tvm
def test_double_rows(tmp_path: Path) -> None:
    made = model(machine("RBF", [4, 6, 3], probable=True), dtype=TensorProto.DOUBLE)
    agree(made, {"x": X.astype(np.float64)}, tmp_path / "a")


@needs_tvm
@pytest.mark.parametrize(
    ("kind", "attributes", "reason"),
    [
        ("Normalizer", {"norm": "MAX"}, "the norm MAX"),
        ("LinearRegressor", {**weights(1), "post_transform": "PROBIT"}, "the transform PROBIT"),
        ("SVMRegressor", {**weights(1), "post_transform": "PROBIT"}, "transforms of a machine"),
    ],
)
def test_what_is_not_taken(kind: str, attributes: dict[str, Any], reason: str) -> None:
    (why,) = backends.get("tvm").supports(model((kind, attributes)), CPU).values()
    assert reason in why
