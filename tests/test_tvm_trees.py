"""Ensembles of trees and what stands around them in TVM, against ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from graphopt import backends, files
from graphopt.backends import Array
from tests.test_tvm import CPU, agree, needs_tvm, random

ROWS = 9


def forest(kind: str, rng: np.random.Generator, **attributes: Any) -> onnx.ModelProto:
    """Three random trees of different depths over five features."""
    nodes: dict[str, list[Any]] = {
        name: []
        for name in ("treeids", "nodeids", "modes", "featureids", "values", "true", "false")
    }
    leaves: list[tuple[int, int]] = []
    mode = attributes.pop("mode", "BRANCH_LEQ")
    for tree, depth in enumerate((0, 2, 3)):
        for node in range(2 ** (depth + 1) - 1):
            leaf = node >= 2**depth - 1
            if leaf:
                leaves.append((tree, node))
            for name, value in (
                *(("treeids", tree), ("nodeids", node), ("modes", "LEAF" if leaf else mode)),
                *(("featureids", int(rng.integers(5))), ("values", float(rng.standard_normal()))),
                *(("true", 0 if leaf else 2 * node + 1), ("false", 0 if leaf else 2 * node + 2)),
            ):
                nodes[name].append(value)
    width = 3
    prefix = "target" if kind == "Regressor" else "class"
    some = {
        f"{prefix}_treeids": [tree for tree, _ in leaves for _ in range(width)],
        f"{prefix}_nodeids": [node for _, node in leaves for _ in range(width)],
        f"{prefix}_ids": [index for _ in leaves for index in range(width)],
        f"{prefix}_weights": rng.random(len(leaves) * width).tolist(),
    }
    parts = {f"nodes_{name}": nodes[name] for name in ("treeids", "nodeids", "modes", "values")}
    parts["nodes_featureids"] = nodes["featureids"]
    parts |= {f"nodes_{branch}nodeids": nodes[branch] for branch in ("true", "false")}
    kinds = [("y", TensorProto.FLOAT)]
    if kind == "Classifier":
        attributes["classlabels_int64s"] = [7, 3, 5]
        kinds = [("label", TensorProto.INT64), ("y", TensorProto.FLOAT)]
    else:
        attributes["n_targets"] = width
    node = helper.make_node(
        f"TreeEnsemble{kind}", ["x"], [name for name, _ in kinds], "trees", domain="ai.onnx.ml",
        **parts, **some, **attributes,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [ROWS, 5])],
        [helper.make_tensor_value_info(name, dtype, None) for name, dtype in kinds],
    )
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9)


@needs_tvm
@pytest.mark.parametrize("mode", ["BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT"])
def test_regression(tmp_path: Path, mode: str) -> None:
    model = forest("Regressor", np.random.default_rng(0), mode=mode, base_values=[1.0, 2.0, 3.0])
    agree(files.load(model), feeds(), tmp_path / "a", tolerance=1e-6)


@needs_tvm
@pytest.mark.parametrize("transform", ["NONE", "SOFTMAX", "LOGISTIC"])
def test_classification(tmp_path: Path, transform: str) -> None:
    model = forest("Classifier", np.random.default_rng(1), post_transform=transform)
    agree(files.load(model), feeds(), tmp_path / "a", tolerance=1e-6)


@needs_tvm
@pytest.mark.parametrize(
    ("kind", "attributes", "reason"),
    [
        ("Regressor", {"aggregate_function": "MAX"}, "the aggregate MAX"),
        ("Regressor", {"mode": "BRANCH_EQ"}, "comparisons BRANCH_EQ"),
        ("Regressor", {"post_transform": "PROBIT"}, "the transform PROBIT"),
    ],
)
def test_what_is_left_to_others(kind: str, attributes: dict[str, Any], reason: str) -> None:
    model = forest(kind, np.random.default_rng(2), **attributes)
    assert backends.get("tvm").supports(files.load(model), CPU) == {"trees": reason}


def feeds() -> dict[str, Array]:
    """Rows of features."""
    return {"x": random(ROWS, 5)}
