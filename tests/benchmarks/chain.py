"""A long model of the things that exporters leave behind: how does cost grow with size?

    python -m tests.benchmarks.chain OUT.onnx [--nodes 1000]

Blocks follow one another, each with shape arithmetic for a reshape, an identity, a pair of
transposes, an affine operation spelled in four, a GELU spelled in five, a repeated subexpression,
and constants to fold; so nearly every node meets a rule, and the work per node is the same
whatever the number of blocks.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

WIDTH, HEADS = 16, 4


class _Block:
    """Collects the nodes of one block under names of its own."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.nodes: list[NodeProto] = []

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"b{self.number}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def build(self, x: str) -> str:
        """x float[n, s, 16] to the same."""
        first, second = (
            self.add("Unsqueeze", self.add("Gather", self.add("Shape", x), index), "zero")
            for index in ("zero_scalar", "one_scalar")
        )
        shape = self.add("Concat", first, second, "split", axis=0)
        y = self.add("Reshape", self.add("Identity", x), shape)
        y = self.add("Transpose", y, perm=[0, 2, 1, 3])
        y = self.add("Transpose", self.add("Relu", y), perm=[0, 2, 1, 3])
        y = self.add("Reshape", y, self.add("Concat", first, second, "width", axis=0))
        scale = self.add("Mul", "scale", self.add("Sqrt", "two"))
        y = self.add("Add", self.add("Mul", y, scale), self.add("Sub", "bias", "two"))
        y = self.add("Add", self.add("Mul", y, "scale"), "bias")
        erf = self.add("Add", self.add("Erf", self.add("Div", y, "root")), "unit")
        y = self.add("Mul", self.add("Mul", y, erf), "half")
        again = self.add("Add", self.add("Sigmoid", y), self.add("Sigmoid", y))
        return self.add("Cast", self.add("Sub", again, "zero_float"), to=TensorProto.FLOAT)


def chain(nodes: int) -> onnx.ModelProto:
    """A model of at least so many nodes, all on a path from its input to its output."""
    constants = {
        "zero": np.asarray([0]),
        "zero_scalar": np.asarray(0),
        "one_scalar": np.asarray(1),
        "split": np.asarray([HEADS, WIDTH // HEADS]),
        "width": np.asarray([WIDTH]),
        "scale": np.linspace(0.5, 1.5, WIDTH, dtype=np.float32),
        "bias": np.linspace(-1, 1, WIDTH, dtype=np.float32),
        "two": np.asarray(2, np.float32),
        "root": np.asarray(2**0.5, np.float32),
        "unit": np.asarray(1, np.float32),
        "half": np.asarray(0.5, np.float32),
        "zero_float": np.asarray(0, np.float32),
    }
    made: list[NodeProto] = []
    value = "x"
    while len(made) < nodes:
        block = _Block(len(made))
        value = block.build(value)
        made += block.nodes
    made.append(helper.make_node("Identity", [value], ["y"], name="end"))
    shape: list[str | int | None] = ["n", "s", WIDTH]
    graph = helper.make_graph(
        made,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--nodes", type=int, default=1000)
    options = parser.parse_args()
    options.out.write_bytes(chain(options.nodes).SerializeToString())


if __name__ == "__main__":
    main()
