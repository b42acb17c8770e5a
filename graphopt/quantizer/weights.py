"""Which weights of a model are stored with few bits, and with how many.

Linear operators with constant weights of their own, tables of embeddings, and the weights of LSTM
and GRU, each gate's rows with scales of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt import files, ir
from graphopt.context import Context
from graphopt.gram import LINEAR, grams, weight_matrix, weight_tensor
from graphopt.quantizer.rounding import Scheme, gptq
from graphopt.runner import Runner
from graphopt.wildcards import fits, names

__all__ = ["RECURRENT", "Chosen", "average_bits", "choose", "spend"]

Feeds = Mapping[str, npt.NDArray[Any]]

RECURRENT = ("LSTM", "GRU", "RNN")
"""Operators whose inputs 1 and 2 are weights."""
_SMALL = 256  # weights below which scales and names would take more than is won
_ROWS = 128  # output positions of each of them
_TRIED = 32  # samples on which a layer's rounding is judged


@dataclass
class Chosen:
    """Nodes whose weights are rounded, each kind in graph order, and how."""

    linear: list[tuple[ir.Node, Scheme]] = field(default_factory=list[tuple[ir.Node, Scheme]])
    inner: list[tuple[ir.Node, Scheme]] = field(default_factory=list[tuple[ir.Node, Scheme]])
    """Linear operators in bodies of If, Loop and Scan, whose inputs nobody looks at."""
    tables: list[tuple[ir.Node, Scheme]] = field(default_factory=list[tuple[ir.Node, Scheme]])
    recurrent: list[tuple[ir.Node, Scheme]] = field(default_factory=list[tuple[ir.Node, Scheme]])


def choose(
    context: Context,
    scheme: Scheme,
    *,
    bits: Mapping[str, int] | None = None,
    keep: Sequence[str] = (),
    tables: bool = True,
) -> Chosen:
    """The weights that a scheme suits, in bodies too; blocks go to matrices, not to kernels.

    `bits` and `keep` are patterns of nodes and weights: other bits (32 for none), and none. A
    refusal is recorded for weights that are shared.
    """
    chosen = Chosen()
    kinds: dict[str, list[tuple[ir.Node, Scheme]]] = {
        **dict.fromkeys(LINEAR, chosen.linear),
        **dict.fromkeys(RECURRENT, chosen.recurrent),
        "Gather": chosen.tables,
    }
    for node in ir.nested_nodes(context.model):
        found = kinds.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        index = 0 if node.op_type == "Gather" else 1
        tensor = ir.constant(node.inputs[index]) if found is not None else None
        if found is None or tensor is None or tensor.dtype != ir.DataType.FLOAT:
            continue
        if len(tensor.shape) < 2 or tensor.size < _SMALL:
            continue
        if found is chosen.tables and (not tables or not _is_table(node, tensor)):
            continue
        value = node.inputs[index]
        assert value is not None
        if ir.use_count(value) > 1:
            context.record.refuse(node, "its weights are used elsewhere too")
            continue
        known = tuple(names(value))
        if fits(keep, *known):
            continue
        own = next((b for p, b in (bits or {}).items() if fits([p], *known)), scheme.bits)
        if own < 16:
            whole = node.op_type in (*RECURRENT, "Conv", "ConvTranspose")
            block = 0 if whole else scheme.block
            outer = found is not chosen.linear or node.graph is context.model.graph
            taken = found if outer else chosen.inner
            taken.append((node, replace(scheme, bits=own, block=block)))
    return chosen


def _is_table(node: ir.Node, tensor: ir.TensorProtocol) -> bool:
    """Whether a Gather takes whole rows of a matrix."""
    return len(tensor.shape) == 2 and not ir.attribute(node, "axis", 0)


def _weights(node: ir.Node) -> tuple[int, int]:
    """How many weights a linear operator has, and how many a row of them."""
    array = ir.array(node.inputs[1])
    assert array is not None
    return array.size, weight_matrix(node, array).shape[2]


def average_bits(layers: Iterable[tuple[ir.Node, Scheme]]) -> float:
    """Bits a weight of linear operators takes, scales and zero points included."""
    total = weights = 0.0
    for node, scheme in layers:
        size, k = _weights(node)
        total += size * scheme.average(k)
        weights += size
    return total / max(weights, 1)


def spend(
    context: Context,
    layers: Sequence[tuple[ir.Node, Scheme]],
    average: float,
    samples: Iterable[Feeds] | None,
    *,
    wide: int = 8,
    progress: Callable[[str], None] | None = None,
) -> list[tuple[ir.Node, Scheme]]:
    """Give layers `wide` bits where those do most for the outputs, up to an average of bits.

    What they do is the noise in the model's outputs when that layer alone is rounded to the
    narrower scheme, by GPTQ, per bit that it would take more; without samples, small layers go
    first.
    """
    schemes = dict(layers)
    sizes = {node: _weights(node) for node in schemes}
    budget = sum(size for size, _ in sizes.values()) * average
    spent = sum(size * schemes[node].average(k) for node, (size, k) in sizes.items())
    noise = dict.fromkeys(schemes, 1.0)
    if samples is not None:
        noise = _noise(context.model, layers, list(islice(samples, _TRIED)), progress)
    worth = {node: noise[node] / sizes[node][0] for node in schemes}
    for node in sorted(schemes, key=lambda n: -worth[n]):
        wider = replace(schemes[node], bits=wide)
        size, k = sizes[node]
        more = size * (wider.average(k) - schemes[node].average(k))
        if more > 0 and spent + more <= budget:
            schemes[node] = wider
            spent += more
    return list(schemes.items())


def _noise(
    model: ir.Model,
    layers: Sequence[tuple[ir.Node, Scheme]],
    feeds: Sequence[Feeds],
    progress: Callable[[str], None] | None,
) -> dict[ir.Node, float]:
    """The share of noise in the outputs that each layer makes, rounded alone."""
    exact = _outputs(model, feeds)
    noise: dict[ir.Node, float] = {}
    sums = grams(model, [node for node, _ in layers], feeds, rows=_ROWS)
    for node, scheme in layers:
        if progress is not None:
            progress(f"sensitivity of {ir.label(node)}")
        value = node.inputs[1]
        tensor, array = ir.constant(value), ir.array(value)
        assert tensor is not None and array is not None and value is not None
        copy = files.copy(model)
        codes = gptq(weight_matrix(node, array), sums[ir.label(node)].xtx, scheme)
        rough = weight_tensor(node, codes.values, array.shape).astype(np.float32)
        twin = copy.graph.initializers.get(value.name or "")
        if twin is None:  # a Constant node's
            noise[node] = 1.0
            continue
        twin.const_value = ir.tensor(rough, name=twin.name)
        noise[node] = sum(
            _relative(a, b) for a, b in zip(exact, _outputs(copy, feeds), strict=True)
        )
    return noise


def _relative(exact: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    """Noise over signal."""
    change = (other.astype(np.float64) - exact).ravel()
    signal = float(np.sum(exact.astype(np.float64) ** 2)) or 1.0
    share = float(np.sum(change**2)) / signal
    return share if math.isfinite(share) else 1e9


def _outputs(model: ir.Model, feeds: Sequence[Feeds]) -> list[npt.NDArray[Any]]:
    """Every floating-point output on every sample."""
    runner = Runner(model, optimize=True)
    results: list[npt.NDArray[Any]] = []
    for row in feeds:
        found = runner.run({k: v for k, v in row.items() if k in runner.inputs})
        arrays: list[Any] = [v for v in found.values() if isinstance(v, np.ndarray)]
        results += [array for array in arrays if array.dtype.kind == "f"]
    return results
