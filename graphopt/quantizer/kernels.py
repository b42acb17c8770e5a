"""How much of a model a runtime really computes in integers, told by its own optimized graph."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import onnx

from graphopt import files, ir
from graphopt.errors import GraphoptError
from graphopt.runner import one_line, onnxruntime

_INTEGER = frozenset(
    (
        *("QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger"),
        *("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits", "MatMulBnb4"),
        *("DynamicQuantizeLSTM", "QAttention", "QOrderedMatMul"),
    )
)
_FLOAT = frozenset(
    (
        *("Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul"),
        *("FusedMatMul", "TransposeMatMul", "LSTM", "GRU", "RNN", "Attention"),
    )
)


@dataclass(frozen=True)
class Kernels:
    """Of the convolutions, products and recurrences of a model."""

    integer: int
    floats: tuple[str, ...]
    """Names of those that are computed in floats."""
    moves: int
    """QuantizeLinear and DequantizeLinear nodes that are left, which take time of their own."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.integer + len(self.floats)


def count_kernels(model: ir.Model) -> Kernels:
    """What ONNX Runtime makes of a model on this machine's CPU.

    Raises GraphoptError where it cannot load the model.
    """
    ort = onnxruntime()

    with tempfile.TemporaryDirectory(prefix="graphopt-kernels-") as folder:
        source, result = Path(folder) / "model.onnx", Path(folder) / "optimized.onnx"
        files.save(model, source)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.optimized_model_filepath = str(result)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", "weights.bin"
        )
        try:
            ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise GraphoptError(f"ONNX Runtime cannot load the model: {one_line(error)}") from error
        proto = onnx.ModelProto.FromString(result.read_bytes())
    return _count(proto.graph)


def _count(graph: onnx.GraphProto) -> Kernels:
    integer, moves = 0, 0
    floats: list[str] = []
    stack = [graph]
    while stack:
        for node in stack.pop().node:
            integer += node.op_type in _INTEGER
            moves += node.op_type in ("QuantizeLinear", "DequantizeLinear")
            if node.op_type in _FLOAT:
                floats.append(node.name or f"{node.op_type}->{next(iter(node.output), '')}")
            stack += [a.g for a in node.attribute if a.HasField("g")]
    return Kernels(integer, tuple(floats), moves)
