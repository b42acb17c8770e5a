"""Quantize weights and activations: integers inside, floats at the model's ends.

Why: processors multiply bytes several times as fast as floats, and a quarter of them is read.
Numerics: lossy.
Needs: samples of the inputs; float32 operators with constant weights. Opset 13, which the model is
converted to, or more for types other than int8 and uint8.

QuantizeLinear and DequantizeLinear are put where the target's runtime makes integer kernels of
what stands between them (`graphopt.quantizer.placement`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from graphopt import ir
from graphopt.context import Context
from graphopt.errors import InputError
from graphopt.gram import Gram, accumulate
from graphopt.pass_manager import Pass
from graphopt.passes.convert_opset import ConvertOpset
from graphopt.quantizer.calibration import calibrate
from graphopt.quantizer.grids import Grid, opset_for, parse_type
from graphopt.quantizer.insertion import Insertion
from graphopt.quantizer.placement import Plan, Table, plan, table_for
from graphopt.quantizer.ranges import Ranges
from graphopt.quantizer.sketch import Sketch, Sketches
from graphopt.taps import groups, tap

_GRAM_SAMPLES = 64
_GRAM_ROWS = 256  # output positions of a sample: 16,384 in all


@dataclass(frozen=True)
class QuantizeStatic(Pass):
    """Fixed ranges from samples; operators of the target's table."""

    lossy: ClassVar[bool] = True

    placement: str = ""
    """A table by name (ort-x86, ort-arm, tensorrt, tvm …); the target's by default."""
    ranges: str = "mse"
    """minmax, average, percentile, entropy, mse or lp."""
    percentile: float = 99.99
    power: float = 2.4
    activations: str = ""
    """A type: uint8, int8, uint16, int16, e4m3, e5m2; the table's by default."""
    weights: str = ""
    """A type: int8, uint8, int4, e4m3 …; the table's by default."""
    per_channel: bool = True
    rounding: str = "nearest"
    """Of weights: nearest, or gptq, which makes up for errors within a layer."""
    keep: tuple[str, ...] = ()
    """Nodes that stay in floats."""

    def run(self, context: Context) -> None:
        if context.samples is None:
            raise InputError("quantize-static needs data: --data")
        table = self.table(context)
        how = Ranges(self.ranges, self.percentile, self.power)
        wanted = max(opset_for(table.activation.dtype), opset_for(table.weight.dtype))
        ConvertOpset(wanted, at_least=True).run(context)
        if ir.opset(context.model.graph) < wanted:
            raise InputError(f"quantize-static needs opset {wanted}, and the model stays below it")
        made = plan(context.model, context.shapes, table, self.keep)
        if not made.linear:
            return
        names = [value.name or "" for value in made.tensors]
        sketches = calibrate(context.model, names, context.samples)
        grams = self._grams(context, made)
        Insertion(context, made, choose(made, sketches, how), grams).run()

    def _grams(self, context: Context, made: Plan) -> Mapping[str, Gram]:
        if self.rounding == "nearest":
            return {}
        if self.rounding != "gptq":
            raise InputError(f"weights are rounded nearest or by gptq, not {self.rounding!r}")
        assert context.samples is not None
        samples = context.samples.take(_GRAM_SAMPLES)
        nodes = [n for n in made.linear if ir.constant(n.inputs[1]) is not None]
        tensors = {v.name or "": None for n in nodes if (v := n.inputs[0]) is not None}
        found: dict[str, Gram] = {}
        for group in groups(context.model, list(tensors), next(iter(samples))):
            part = [n for n in nodes if n.inputs[0] is not None and n.inputs[0].name in group]
            feeds = tap(context.model, group, samples)
            found |= accumulate(part, feeds, rows=_GRAM_ROWS)
        return found

    def table(self, context: Context) -> Table:
        """The target's table with what the options change of it."""
        table = table_for(context.target, self.placement)
        changed: dict[str, Any] = {
            "activation": _grid(self.activations, table.activation),
            "weight": _grid(self.weights, table.weight),
            "per_channel": table.per_channel and self.per_channel,
        }
        return dataclasses.replace(table, **changed)


def choose(made: Plan, sketches: Sketches, how: Ranges) -> dict[ir.Value, tuple[float, float]]:
    """The range of each group of tensors, by its first one, from what all of them hold."""
    grid = made.table.activation
    found: dict[ir.Value, tuple[float, float]] = {}
    for group in made.groups:
        together = Sketch()
        for value in group:
            together.merge(sketches.tensors[value.name or ""])
        found[group[0]] = how.choose(together, levels=grid.levels, symmetric=grid.symmetric)
    return found


def _grid(name: str, default: Grid) -> Grid:
    if not name:
        return default
    dtype = parse_type(name)
    return dataclasses.replace(
        default, dtype=dtype, reduced=default.reduced and dtype == default.dtype
    )
