"""Turn MatMul and Add of matrices into Gemm, and take additions and Transposes into a Gemm.

Why: one kernel in place of two; a Gemm reads a transposed operand at no cost.
Numerics: rounding.
Needs: both operands of rank 2 and an addend that broadcasts to the product's shape.
"""

from __future__ import annotations

from typing import Any

from graphopt import ir
from graphopt.dims import DimLike
from graphopt.passes._layout import permutation
from graphopt.rewriting import Op, Refuse, rewrite

_GEMM_TYPES = (ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE)


def _multiplies(op: Op, value: ir.Value) -> bool:
    """Whether Gemm takes tensors of a value's type."""
    dtype = op.dtype(value)
    return dtype in _GEMM_TYPES or (dtype == ir.DataType.BFLOAT16 and op.opset >= 13)


@rewrite.on("Add", benefit=2)
def fuse_matmul_add(op: Op, node: ir.Node) -> ir.Value | None:
    """MatMul, or a Gemm without an addend of its own, and Add are a Gemm."""
    for index in (0, 1):
        value, addend = node.inputs[index], node.inputs[1 - index]
        product = None if value is None else value.producer()
        if value is None or addend is None or product is None or product.domain:
            continue
        if product.op_type not in ("MatMul", "Gemm"):
            continue
        shape = op.shape(value)
        if shape is None or len(shape) != 2 or not _multiplies(op, value):
            continue
        if any(v is None or op.rank(v) != 2 for v in product.inputs[:2]):
            continue
        if product.op_type == "Gemm" and _addend(product) is not None:
            continue
        if op.uses(value) != 1:
            raise Refuse("the product is used elsewhere")
        if not broadcasts_into(op.shape(addend), shape):
            raise Refuse("what is added does not broadcast to the product's shape")
        attributes = {k: v for k, v in product.attributes.items() if k != "beta"}
        return op.build("Gemm", [*product.inputs[:2], addend], attributes)[0]
    return None


def broadcasts_into(shape: tuple[DimLike, ...] | None, into: tuple[DimLike, ...]) -> bool:
    """Whether a shape is proven to broadcast to another without making it larger."""
    if shape is None or len(shape) > len(into):
        return False
    tail = into[len(into) - len(shape) :]
    return all(have in (1, want) for have, want in zip(shape, tail, strict=True))


def _addend(gemm: ir.Node) -> ir.Value | None:
    return gemm.inputs[2] if len(gemm.inputs) > 2 else None


@rewrite.on("Gemm")
def flatten_bias(op: Op, node: ir.Node) -> ir.Value | None:
    """A constant row that a Gemm adds is a vector, which is what runtimes take for a bias."""
    addend = _addend(node)
    array = op.const(addend)
    if array is None or array.ndim < 2 or array.size != array.shape[-1] or array.size == 1:
        return None
    bias = op.initializer(array.reshape(-1))
    return op.build("Gemm", [*node.inputs[:2], bias], dict(node.attributes))[0]


@rewrite.on("Gemm")
def fuse_transpose_gemm(op: Op, node: ir.Node) -> ir.Value | None:
    """A Gemm reads the operand of a Transpose the other way round."""
    inputs: list[Any] = list(node.inputs)
    attributes: dict[str, Any] = {**node.attributes}
    for index, name in ((0, "transA"), (1, "transB")):
        value = inputs[index]
        producer = None if value is None else value.producer()
        if producer is None or producer.op_type != "Transpose" or producer.domain:
            continue
        if permutation(op, producer) == [1, 0] and ir.constant(producer.inputs[0]) is None:
            inputs[index] = producer.inputs[0]
            attributes[name] = 1 - op.attr(node, name, 0)
    if inputs == list(node.inputs):
        return None
    return op.build("Gemm", inputs, attributes)[0]


@rewrite.on("Transpose")
def fuse_product_transpose(op: Op, node: ir.Node) -> ir.Value | None:
    """A product of matrices that is then transposed is the product the other way round."""
    value = node.inputs[0]
    product = None if value is None else value.producer()
    if value is None or product is None or op.uses(value) != 1 or product.domain or op.opset < 11:
        return None
    if product.op_type not in ("MatMul", "Gemm") or permutation(op, node) != [1, 0]:
        return None
    if any(v is None or op.rank(v) != 2 for v in product.inputs[:2]):
        return None
    if not _multiplies(op, value) or len(product.inputs) > 2:
        return None
    turned = [1 - op.attr(product, name, 0) for name in ("transB", "transA")]
    attributes = {
        name: value for name, value in zip(("transA", "transB"), turned, strict=True) if value
    }
    scale = {"alpha": op.attr(product, "alpha", 1.0)} if product.op_type == "Gemm" else {}
    return op.build("Gemm", product.inputs[1::-1], {**attributes, **scale})[0]


@rewrite.on("MatMul")
def fuse_transpose_matmul(op: Op, node: ir.Node) -> ir.Value | None:
    """A MatMul of matrices, one of which only it reads transposed, is a Gemm."""
    if any(v is None or op.rank(v) != 2 for v in node.inputs) or op.opset < 11:
        return None
    attributes: dict[str, Any] = {}
    inputs = list(node.inputs)
    for index, name in ((0, "transA"), (1, "transB")):
        value = inputs[index]
        producer = None if value is None else value.producer()
        if value is None or producer is None or op.uses(value) != 1:
            continue
        if producer.op_type != "Transpose" or producer.domain or not _multiplies(op, value):
            continue
        if permutation(op, producer) != [1, 0]:
            continue
        inputs[index], attributes[name] = producer.inputs[0], 1
    return op.build("Gemm", inputs, attributes)[0] if attributes else None
