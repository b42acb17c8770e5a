"""Biases that make up for what quantization does to the means of the channels.

Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction",
2019, empirical bias correction. Rounded weights and clipped activations move the mean of each
output channel, most of all in depthwise convolutions, which add up few products. Going through the
quantized model in order, each layer's bias takes the difference to the mean that the float model
has there, on samples; layers behind it then see it corrected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.context import Context
from graphopt.quantizer.constants import replace_constant
from graphopt.quantizer.reconstruction import add_to_bias
from graphopt.samples import Samples
from graphopt.taps import groups, tap

__all__ = ["FLOATS", "correct_biases", "remembered"]

Floats = npt.NDArray[np.float64]

FLOATS = "graphopt.floats"
"""Key of a quantized model's `meta`: the float model. It lives as long as the process."""

_INT32 = 2**31 - 1


def remembered(model: ir.Model) -> ir.Model | None:
    """The float model that a model was quantized from in this process, if there is one."""
    found: object = cast("Mapping[str, object]", model.meta).get(FLOATS)
    return found if isinstance(found, ir.Model) else None


def correct_biases(
    context: Context,
    before: ir.Model,
    samples: Samples,
    *,
    progress: Callable[[str], None] | None = None,
) -> int:
    """Correct the biases of the Conv, ConvTranspose and Gemm that `before` has too.

    They are known by the names of what they put out, with `_float` behind it where it is quantized.
    Biases are floats, or int32 behind a DequantizeLinear. Returns how many layers were corrected,
    and records them.
    """
    originals = {node.outputs[0].name or "": node for node in before.graph if node.outputs}
    pairs: list[tuple[ir.Node, ir.Node]] = []
    for node in context.model.graph:
        name = node.outputs[0].name or "" if node.outputs else ""
        original = originals.get(name) or originals.get(name.removesuffix("_float"))
        if original is not None and original.op_type == node.op_type and _has_bias(node):
            pairs.append((node, original))
    wanted = _means(before, [node for _, node in pairs], samples)
    for node, original in pairs:
        context.check_time()
        if progress is not None:
            progress(f"bias of {ir.label(node)}")
        now = _means(context.model, [node], samples)
        shift = wanted[original.outputs[0].name or ""] - now[node.outputs[0].name or ""]
        _add(context, node, shift)
        context.changed("bias", [node], [node])
    return len(pairs)


def _has_bias(node: ir.Node) -> bool:
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or node.domain:
        return False
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None or ir.attribute(node, "beta", 1.0) != 1.0:
        return False
    source = bias.producer()
    if source is not None and source.op_type == "DequantizeLinear":
        bias = source.inputs[0]
    array = ir.array(bias)
    return array is not None and array.ndim == 1


def _means(model: ir.Model, nodes: Sequence[ir.Node], samples: Samples) -> dict[str, Floats]:
    """The mean of each channel of what linear operators put out, by the value's name."""
    axes = {n.outputs[0].name or "": -1 if n.op_type == "Gemm" else 1 for n in nodes}
    totals: dict[str, Any] = {}
    counts: dict[str, int] = dict.fromkeys(axes, 0)
    parts = [list(axes)] if len(axes) < 2 else groups(model, list(axes), next(iter(samples)))
    for part in parts:
        for tensors in tap(model, part, samples):
            for name, x in tensors.items():
                others = tuple(a for a in range(x.ndim) if a != axes[name] % x.ndim)
                totals[name] = totals.get(name, 0.0) + x.sum(axis=others, dtype=np.float64)
                counts[name] += x.size // max(1, x.shape[axes[name]])
    return {name: total / max(1, counts[name]) for name, total in totals.items()}


def _add(context: Context, node: ir.Node, shift: Floats) -> None:
    """Add numbers per channel to a bias, in its integers where it has them."""
    bias = node.inputs[2]
    assert bias is not None
    source = bias.producer()
    if source is None or source.op_type != "DequantizeLinear":
        add_to_bias(context, node, shift)
        return
    integers, scale = ir.array(source.inputs[0]), ir.array(source.inputs[1])
    assert integers is not None and scale is not None
    moved = integers + np.rint(shift / scale.astype(np.float64))
    replace_constant(context, source, 0, np.clip(moved, -_INT32, _INT32))
