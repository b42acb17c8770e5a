"""A model beyond protobuf's 2 GB, its weights in a file beside it.

    python -m tests.benchmarks.large OUT.onnx [--layers 38]

Each layer is a matrix product with a weight of 4096 x 4096 float32 (64 MiB), a bias, a Relu, and
a pair of reshapes and an identity to remove. Weights repeat one random block of rows, rotated by
the layer's number, so that no two are alike. 38 layers are 2.5 GB.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WIDTH, ROWS = 4096, 64
BYTES = WIDTH * WIDTH * 4


def write(path: Path, layers: int = 38) -> None:
    """Write the model and `NAME.data` beside it."""
    data = path.with_name(f"{path.name}.data")
    rows = np.random.default_rng(0).standard_normal((ROWS, WIDTH), np.float32) / WIDTH**0.5
    with data.open("wb") as stream:
        for layer in range(layers):
            block = np.roll(rows, layer * 101).tobytes()
            for _ in range(WIDTH // ROWS):
                stream.write(block)
    nodes: list[onnx.NodeProto] = []
    tensors = [numpy_helper.from_array(np.asarray([-1, WIDTH]), "flat")]
    value = "x"
    for layer in range(layers):
        weight, bias = f"w{layer}", f"b{layer}"
        tensors.append(_external(weight, data.name, layer))
        tensors.append(numpy_helper.from_array(np.full(WIDTH, 1e-3 * layer, np.float32), bias))
        for op, inputs in (
            ("Identity", []),
            ("MatMul", [weight]),
            ("Add", [bias]),
            ("Reshape", ["flat"]),
            ("Reshape", ["flat"]),
            ("Relu", []),
        ):
            name = f"l{layer}_{len(nodes)}"
            nodes.append(helper.make_node(op, [value, *inputs], [name], name=name))
            value = name
    nodes.append(helper.make_node("Identity", [value], ["y"], name="end"))
    shape: list[str | int | None] = ["n", WIDTH]
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        tensors,
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    path.write_bytes(model.SerializeToString())


def _external(name: str, location: str, number: int) -> TensorProto:
    tensor = TensorProto(
        name=name,
        data_type=TensorProto.FLOAT,
        dims=(WIDTH, WIDTH),
        data_location=TensorProto.EXTERNAL,
    )
    for key, value in (("location", location), ("offset", number * BYTES), ("length", BYTES)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=38)
    options = parser.parse_args()
    write(options.out, options.layers)


if __name__ == "__main__":
    main()
