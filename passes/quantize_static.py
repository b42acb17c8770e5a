"""Quantize weights and activations: integers inside, floats at the model's ends.

Why: processors multiply bytes several times as fast as floats, and a quarter of them is read.
Numerics: lossy.
Needs: samples of the inputs; float32 operators with constant weights. Opset 13, which the model is
converted to, or more for types other than int8 and uint8.

QuantizeLinear and DequantizeLinear are put where the target's runtime makes integer kernels of
what stands between them (`graphopt.quantizer.placement`). A large LSTM becomes ONNX Runtime's
integer one where that is the target.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from graphopt import files, ir
from graphopt.context import Context
from graphopt.errors import InputError
from graphopt.pass_manager import Pass
from graphopt.passes.convert_opset import ConvertOpset
from graphopt.quantizer.bias_correction import FLOATS
from graphopt.quantizer.grids import Grid, opset_for, parse_type
from graphopt.quantizer.placement import Table, table_for
from graphopt.quantizer.ranges import Ranges
from graphopt.quantizer.recurrent import integer_lstms
from graphopt.quantizer.static import Static
from graphopt.wildcards import named


@dataclass(frozen=True)
class QuantizeStatic(Pass):
    """Fixed ranges from samples, for the operators of the target's table."""

    lossy: ClassVar[bool] = True

    placement: str = ""
    """A table by name (ort-x86, ort-arm, tensorrt, tvm …); the target's by default."""
    ranges: str = ""
    """minmax, average, percentile, entropy, mse or lp (the default)."""
    percentile: float = 99.99
    power: float = 3.0
    """Of the error that lp makes small."""
    activations: str = ""
    """A type: uint8, int8, uint16, int16, e4m3, e5m2; the table's by default."""
    weights: str = ""
    """A type: int8, uint8, int4, e4m3 …; the table's by default."""
    per_channel: bool = True
    power_of_two: bool = False
    """Scales are 2**k, for hardware that shifts: up to one bit is lost."""
    rounding: str = "gptq"
    """Of weights: nearest, or gptq, which makes up for errors within a layer."""
    keep: tuple[str, ...] = ()
    """Nodes that stay in floats, by name; `*` stands for any text."""
    wide: tuple[str, ...] = ()
    """Nodes whose activations have 16 bits, for opset 21."""

    def run(self, context: Context) -> None:
        if context.samples is None:
            raise InputError("quantize-static needs data: --data")
        table = self.table(context)
        wider = self.wider(context) if self.wide else None
        raise_opset(context, wider or table)
        keep, wide = (named(context.model, patterns) for patterns in (self.keep, self.wide))
        base = files.copy(context.model)
        context.model.meta[FLOATS] = base
        static = Static(base, table, context.samples, self.how(), self.rounding, wider=wider)
        static.insert(context, keep, wide)
        integer_lstms(context, keep)

    def how(self) -> Ranges:
        """How ranges are chosen."""
        return Ranges(self.ranges or "lp", self.percentile, self.power)

    def table(self, context: Context) -> Table:
        """The target's table with what the options change of it."""
        table = table_for(context.target, self.placement)
        if "int2" in self.weights:
            raise InputError("no runtime multiplies by 2 bits: store them so by quantize-weights")
        changed: dict[str, Any] = {
            "activation": _grid(self.activations, table.activation),
            "weight": _grid(self.weights, table.weight),
            "per_channel": table.per_channel and self.per_channel,
        }
        if changed["activation"].floating or changed["weight"].floating:
            changed["integer_bias"] = False
        table = dataclasses.replace(table, **changed)
        return table.powers_of_two() if self.power_of_two else table

    def wider(self, context: Context) -> Table:
        """The table of single operators between activations of 16 bits."""
        table = self.table(context)
        signed = table.activation.symmetric
        kind = ir.DataType.INT16 if signed else ir.DataType.UINT16
        nothing: frozenset[str] = frozenset()
        return dataclasses.replace(
            table,
            activation=dataclasses.replace(table.activation, dtype=kind, reduced=False),
            integer_bias=False,
            outputs=False,
            residual=False,
            chained=nothing,
            moving=nothing,
        )


def raise_opset(context: Context, table: Table) -> None:
    """Convert a model to the opset that knows a table's types. InputError where that fails."""
    wanted = max(opset_for(table.activation.dtype), opset_for(table.weight.dtype))
    ConvertOpset(wanted, at_least=True).run(context)
    if ir.opset(context.model.graph) < wanted:
        raise InputError(f"quantization needs opset {wanted}, and the model stays below it")


def _grid(name: str, default: Grid) -> Grid:
    if not name:
        return default
    dtype = parse_type(name)
    return dataclasses.replace(
        default, dtype=dtype, reduced=default.reduced and dtype == default.dtype
    )
