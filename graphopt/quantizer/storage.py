"""Weights of a few bits put into a model: behind DequantizeLinear, or in ONNX Runtime's operators.

Formats: DequantizeLinear with a scale per channel or per block (ONNX operators, opset 21 for 4
bits and blocks, 25 for 2 bits); com.microsoft.MatMulNBits and GatherBlockQuantized (ONNX Runtime,
ContribOperators.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.context import Context
from graphopt.driver import remove, replace_value
from graphopt.errors import InputError
from graphopt.gram import weight_tensor
from graphopt.quantizer.constants import constant_value, drop_unused
from graphopt.quantizer.rounding import Codes, Scheme

__all__ = ["dequantized", "fits_nbits", "gather_blocks", "matmul_nbits", "opset_needed", "store"]

Array = npt.NDArray[Any]

_TYPES = {
    (2, True): ir.DataType.INT2,
    (2, False): ir.DataType.UINT2,
    (4, True): ir.DataType.INT4,
    (4, False): ir.DataType.UINT4,
    (8, True): ir.DataType.INT8,
    (8, False): ir.DataType.UINT8,
}


def dtype_of(scheme: Scheme) -> ir.DataType:
    """The type of a scheme's codes. Raises InputError for bits that ONNX has no type for."""
    found = _TYPES.get((scheme.bits, scheme.symmetric))
    if found is None:
        raise InputError(f"weights are stored with 2, 4 or 8 bits, not with {scheme.bits}")
    return found


def opset_needed(scheme: Scheme, k: int, groups: int = 1) -> int:
    """The opset whose DequantizeLinear reads groups of rows of k weights in a scheme."""
    if scheme.bits == 2:
        return 25
    return 21 if scheme.bits == 4 or 0 < scheme.block < k or groups > 1 else 13


def _k_axis(node: ir.Node, rank: int) -> int:
    """The axis of the weights of a Gemm, MatMul, LSTM or GRU along which blocks lie."""
    if node.op_type == "Gemm":
        return 1 if ir.attribute(node, "transB", 0) else 0
    return rank - 2 if node.op_type == "MatMul" else rank - 1


def _per_channel(node: ir.Node, codes: Codes, shape: Sequence[int]) -> int | None:
    """The axis that has a scale for each of its indices, where one does."""
    groups, _, blocks = codes.scale.shape
    if blocks != 1:
        return None
    if node.op_type == "Conv":
        return 0
    if groups > 1:
        return None
    return {"ConvTranspose": 1, "Gemm": 1 - _k_axis(node, 2)}.get(
        node.op_type, len(shape) - 1 if node.op_type == "MatMul" else len(shape) - 2
    )


def _blocked(node: ir.Node, per_block: Array, shape: Sequence[int]) -> tuple[Array, int, int]:
    """Numbers per block in the weights' own order; the axis of blocks; the size of one."""
    if node.op_type == "ConvTranspose":
        groups, out = per_block.shape[:2]
        spread = per_block.reshape(groups, out, *[1] * (len(shape) - 2))
        size = shape[0] // groups
        return np.ascontiguousarray(np.broadcast_to(spread, (groups, out, *shape[2:]))), 0, size
    axis = _k_axis(node, len(shape))
    wanted = list(shape)
    wanted[axis] = per_block.shape[2]
    return weight_tensor(node, per_block, wanted), axis, 0


def dequantized(
    context: Context, node: ir.Node, index: int, codes: Codes, shape: Sequence[int]
) -> ir.Value:
    """A DequantizeLinear, before a node, of the codes of one of its weights.

    `codes` are those of the matrix that `gram.weight_matrix` makes of weights of that shape; for
    LSTM and GRU of the weights as they are. The node's operand is replaced; where nothing else
    uses it, the result takes its name.
    """
    graph, old = node.graph, node.inputs[index]
    assert graph is not None and old is not None
    tensor = ir.constant(old)
    assert tensor is not None
    kind = dtype_of(codes.scheme)
    axis = _per_channel(node, codes, shape)
    size = 0
    scale: Array = codes.scale
    zero: Array = codes.zero
    if axis is None:
        scale, axis, size = _blocked(node, codes.scale, shape)
        zero, _, _ = _blocked(node, codes.zero, shape)
        size = size or codes.scheme.block or shape[axis]
    else:
        scale, zero = scale.reshape(-1), zero.reshape(-1)
    whole = weight_tensor(node, codes.codes, shape)
    hint = old.name or "weight"
    inputs = [
        constant_value(context, graph, whole.astype(kind.numpy()), f"{hint}_quantized"),
        constant_value(context, graph, scale.astype(tensor.dtype.numpy()), f"{hint}_scale"),
    ]
    if not codes.scheme.symmetric:
        narrow = zero.astype(kind.numpy())
        inputs.append(constant_value(context, graph, narrow, f"{hint}_zero_point"))
    attributes = {"axis": axis, **({"block_size": size} if size else {})}
    made = _node(context, "", "DequantizeLinear", inputs, attributes, f"{hint}_dequantized")
    made.meta[ir.SOURCES] = ir.sources(node)
    graph.insert_before(node, made)
    result = made.outputs[0]
    result.type, result.shape = ir.TensorType(tensor.dtype), ir.Shape(shape)
    context.shapes.update(made, context.root(graph))
    node.replace_input_with(index, result)
    if drop_unused(context, old):
        context.rename(result, hint)
    return result


def fits_nbits(node: ir.Node, scheme: Scheme) -> bool:
    """Whether MatMulNBits can stand for a node: a MatMul or plain Gemm with blocks it knows."""
    blocks = scheme.block in (16, 32, 64, 128, 256) and scheme.bits in (2, 4, 8)
    tensor = ir.constant(node.inputs[1])
    if not blocks or tensor is None or len(tensor.shape) != 2:
        return False
    if node.op_type == "Gemm":
        plain = not any(ir.attribute(node, n, 0) for n in ("transA",))
        return plain and ir.attribute(node, "alpha", 1.0) == 1 == ir.attribute(node, "beta", 1.0)
    return node.op_type == "MatMul"


def matmul_nbits(
    context: Context, node: ir.Node, codes: Codes, *, accuracy_level: int = 4
) -> ir.Node:
    """Put a MatMulNBits in the place of a MatMul or Gemm.

    Accuracy level 4 lets the kernel round activations to 8 bits per block; 0 keeps them as floats.
    """
    graph, old = node.graph, node.inputs[1]
    assert graph is not None and old is not None
    tensor = ir.constant(old)
    assert tensor is not None
    scheme = codes.scheme
    _, out, k = codes.codes.shape
    middle = 1 << (scheme.bits - 1)
    blocks = codes.scale.shape[2]
    whole = np.zeros((out, blocks * scheme.block), np.uint8)
    whole[:, :k] = (codes.codes[0] + (middle if scheme.symmetric else 0)).astype(np.uint8)
    packed = pack(whole, scheme.bits).reshape(out, blocks, scheme.block * scheme.bits // 8)
    hint = old.name or "weight"
    scale = codes.scale[0].astype(tensor.dtype.numpy())
    inputs: list[ir.Value | None] = [
        node.inputs[0],
        constant_value(context, graph, packed, f"{hint}_quantized"),
        constant_value(context, graph, scale, f"{hint}_scale"),
    ]
    if not scheme.symmetric:
        zero = pack(codes.zero[0].astype(np.uint8), scheme.bits)
        inputs.append(constant_value(context, graph, zero, f"{hint}_zero_point"))
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        inputs += [None] * (5 - len(inputs)) + [bias]
    attributes = {
        **{"K": k, "N": out, "bits": scheme.bits, "block_size": scheme.block},
        "accuracy_level": accuracy_level,
    }
    made = _node(context, "com.microsoft", "MatMulNBits", inputs, attributes, ir.label(node))
    _take_place(context, node, made)
    return made


def gather_blocks(context: Context, node: ir.Node, codes: Codes) -> ir.Node:
    """Put a GatherBlockQuantized in the place of a Gather of rows."""
    graph, old = node.graph, node.inputs[0]
    assert graph is not None and old is not None
    tensor = ir.constant(old)
    assert tensor is not None
    scheme = codes.scheme
    middle = 0 if not scheme.symmetric else 1 << (scheme.bits - 1)
    shifted = (codes.codes[0] + middle).astype(np.uint8)
    data = pack(shifted, scheme.bits)
    zero = (codes.zero[0] + middle).astype(np.uint8)
    hint = old.name or "weight"
    inputs = [
        constant_value(context, graph, data, f"{hint}_quantized"),
        node.inputs[1],
        constant_value(
            context, graph, codes.scale[0].astype(tensor.dtype.numpy()), f"{hint}_scale"
        ),
        constant_value(context, graph, pack(zero, scheme.bits), f"{hint}_zero_point"),
    ]
    attributes = {
        **{"gather_axis": 0, "quantize_axis": 1, "block_size": scheme.block},
        "bits": scheme.bits,
    }
    made = _node(context, "com.microsoft", "GatherBlockQuantized", inputs, attributes, hint)
    _take_place(context, node, made)
    return made


def gather_rows(context: Context, node: ir.Node, codes: Codes) -> ir.Node:
    """Let a Gather of rows take 8-bit rows, each times its scale: plain operators, symmetric."""
    graph, old = node.graph, node.inputs[0]
    assert graph is not None and old is not None
    tensor = ir.constant(old)
    assert tensor is not None
    hint = old.name or "weight"
    rows = constant_value(context, graph, codes.codes[0].astype(np.int8), f"{hint}_quantized")
    scale = codes.scale[0].astype(tensor.dtype.numpy())
    scales = constant_value(context, graph, scale, f"{hint}_scale")
    axis = {"axis": 0}
    nodes = [
        _node(context, "", "Gather", [rows, node.inputs[1]], axis, f"{hint}_rows"),
        _node(context, "", "Gather", [scales, node.inputs[1]], axis, f"{hint}_scales"),
    ]
    to = {"to": int(tensor.dtype)}
    nodes.append(_node(context, "", "Cast", [nodes[0].outputs[0]], to, f"{hint}_float"))
    last = _node(context, "", "Mul", [nodes[2].outputs[0], nodes[1].outputs[0]], {}, f"{hint}_row")
    _take_place(context, node, *nodes, last)
    return last


def store(
    context: Context, node: ir.Node, codes: Codes, *, vendor: bool, level: int = 4
) -> ir.Node:
    """Store a linear operator's codes: as MatMulNBits where that is allowed and fits."""
    if vendor and fits_nbits(node, codes.scheme):
        return matmul_nbits(context, node, codes, accuracy_level=level)
    tensor = ir.constant(node.inputs[1])
    assert tensor is not None
    dequantized(context, node, 1, codes, tensor.shape.numpy())
    return node


def pack(values: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Rows of small numbers in bytes, the first in the lowest bits; each row ends on a byte."""
    if bits == 8:
        return values
    each = 8 // bits
    width = math.ceil(values.shape[-1] / each)
    padded = np.zeros((*values.shape[:-1], width * each), np.uint8)
    padded[..., : values.shape[-1]] = values
    split = padded.reshape(*values.shape[:-1], width, each)
    result = np.zeros(split.shape[:-1], np.uint8)
    for place in range(each):
        result |= split[..., place] << np.uint8(bits * place)
    return result


def _node(
    context: Context,
    domain: str,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, int],
    hint: str,
) -> ir.Node:
    attrs = [ir.convenience.convert_attribute(k, v) for k, v in attributes.items()]
    made = ir.Node(domain, op_type, inputs, attrs)
    made.outputs[0].name = context.unique(hint)
    made.name = context.unique_node(hint)
    return made


def _take_place(context: Context, node: ir.Node, *made: ir.Node) -> None:
    """Put nodes where one stands; the last one's result is the old one's."""
    graph = node.graph
    assert graph is not None
    for new in made:
        new.meta[ir.SOURCES] = ir.sources(node)
        if new.domain:
            context.root(graph).opset_imports.setdefault(new.domain, 1)
    graph.insert_before(node, made)
    for new in made:
        context.shapes.update(new, context.root(graph))
    replace_value(context, node.outputs[0], made[-1].outputs[0], fresh=True)
    remove(context, node)
