"""High biases handed on to the next layer.

Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction",
2019, section 4.1.3. A channel that never falls below c > 0 passes a Relu as if that were not
there: c can be taken out of the bias before it and put into the biases of what reads the channel,
whose ranges no longer waste steps between 0 and c. The paper takes c from statistics of
BatchNormalization; here it is the lowest value that samples have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.context import Context
from graphopt.gram import weight_matrix
from graphopt.quantizer.reconstruction import add_to_bias
from graphopt.samples import Samples
from graphopt.taps import groups, tap

__all__ = ["absorb_biases"]

Floats = npt.NDArray[np.float64]

_WORTH = 0.01  # of a channel's highest value: less is not worth a change
_SAFE = 0.9  # of the lowest value seen: other inputs may go lower


@dataclass
class _Pair:
    """A layer, the value that its readers take, and those."""

    node: ir.Node
    value: ir.Value
    readers: list[ir.Node]


def absorb_biases(
    context: Context,
    samples: Samples,
    *,
    progress: Callable[[str], None] | None = None,
) -> int:
    """Hand on what channels between Conv or Gemm, Relu, and Conv or Gemm never fall below.

    Readers must not pad, since zeros around the channels would be shifted too. Returns how many
    channels were changed, and records the layers.
    """
    pairs = [pair for node in context.model.graph if (pair := _pair(context, node)) is not None]
    names = [pair.value.name or "" for pair in pairs]
    lows: dict[str, Floats] = {}
    highs: dict[str, Floats] = {}
    for part in groups(context.model, names, next(iter(samples))) if names else ():
        context.check_time()
        if progress is not None:
            progress("lowest values of channels")
        for tensors in tap(context.model, part, samples):
            for name, x in tensors.items():
                others = tuple(a for a in range(x.ndim) if a != 1)
                low, high = x.min(axis=others), x.max(axis=others)
                lows[name] = np.minimum(lows.get(name, np.inf), low.astype(np.float64))
                highs[name] = np.maximum(highs.get(name, -np.inf), high.astype(np.float64))
    count = 0
    for pair, name in zip(pairs, names, strict=True):
        shift = _SAFE * lows[name]
        shift[(lows[name] <= _WORTH * highs[name]) | ~np.isfinite(shift)] = 0
        if shift.any():
            _move(context, pair, shift)
            count += int(np.count_nonzero(shift))
    return count


def _pair(context: Context, node: ir.Node) -> _Pair | None:
    """What a layer's bias can be handed on to; None where there is no such thing."""
    if not _is_layer(context, node) or not _has_bias(node):
        return None
    value = node.outputs[0]
    users = [user for user, _ in value.uses()]
    if len(users) != 1 or value.is_graph_output() or users[0].op_type != "Relu":
        return None
    value = users[0].outputs[0]
    readers = [user for user, index in value.uses() if index == 0]
    if value.is_graph_output() or len(readers) != len(list(value.uses())) or not readers:
        return None
    if not all(_is_layer(context, r) and not _pads(r) for r in readers):
        return None
    if not all(_has_bias(r) or len(r.inputs) < 3 or r.inputs[2] is None for r in readers):
        return None
    return _Pair(node, value, readers)


def _is_layer(context: Context, node: ir.Node) -> bool:
    if node.op_type not in ("Conv", "Gemm") or node.domain:
        return False
    tensor = ir.constant(node.inputs[1])
    plain = all(ir.attribute(node, name, 1.0) == 1.0 for name in ("alpha", "beta"))
    if tensor is None or tensor.dtype != ir.DataType.FLOAT or not plain:
        return False
    return not ir.attribute(node, "transA", 0) and context.shapes.dtype(node.outputs[0]) is not None


def _has_bias(node: ir.Node) -> bool:
    bias = ir.array(node.inputs[2]) if len(node.inputs) > 2 else None
    return bias is not None and bias.ndim == 1


def _pads(node: ir.Node) -> bool:
    """Whether a convolution adds zeros around its input."""
    mode = ir.attribute(node, "auto_pad", "NOTSET")
    given = cast("list[int] | None", ir.attribute(node, "pads"))
    return mode not in ("NOTSET", "VALID") or (mode == "NOTSET" and any(given or ()))


def _move(context: Context, pair: _Pair, shift: Floats) -> None:
    add_to_bias(context, pair.node, -shift)
    for reader in pair.readers:
        weights = ir.array(reader.inputs[1])
        assert weights is not None
        matrix: Any = weight_matrix(reader, weights).astype(np.float64)
        sizes, out, k = matrix.shape
        split = shift.reshape(sizes, 1, -1)
        kernel = k // split.shape[2]
        sums = (matrix.reshape(sizes, out, -1, kernel).sum(axis=3) * split).sum(axis=2)
        add_to_bias(context, reader, sums.reshape(-1))
    context.changed("absorb", [pair.node], [pair.node, *pair.readers])
