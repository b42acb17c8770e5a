"""Static quantization of one model, again and again: with all operators, or with some in floats.

Sketches, sums of XᵀX and rounded weights are kept between the times, so that asking what happens
when a layer stays in floats costs the making of a graph and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from graphopt import ir
from graphopt.context import Context
from graphopt.errors import InputError
from graphopt.gram import Gram, affordable, grams
from graphopt.quantizer.calibration import calibrate
from graphopt.quantizer.insertion import Insertion, Rounded
from graphopt.quantizer.placement import Plan, Table, plan
from graphopt.quantizer.ranges import Ranges
from graphopt.quantizer.sketch import Sketch, Sketches
from graphopt.samples import Samples
from graphopt.shapes import Shapes

ROUNDINGS = ("nearest", "gptq")

_GRAM_SAMPLES = 64
_GRAM_ROWS = 64  # output positions of a sample: 4,096 in all


@dataclass
class Static:
    """What is known of a float model, for quantizing it."""

    model: ir.Model
    """Stays as it is; what is quantized are copies of it."""
    table: Table
    samples: Samples
    ranges: Ranges = field(default_factory=Ranges)
    rounding: str = "nearest"
    """Of weights: one of ROUNDINGS."""
    cache: Path | None = None
    progress: Callable[[str], None] | None = None
    wider: Table | None = None
    """The table of operators whose activations are to have 16 bits."""
    seen: Sketches | None = None
    """What calibration saw, where somebody knows it already."""
    _sketches: Sketches | None = None
    _grams: dict[str, Gram] | None = None
    _rounded: dict[Rounded, ir.TensorProtocol] = field(
        default_factory=dict[Rounded, ir.TensorProtocol]
    )

    def __post_init__(self) -> None:
        if self.rounding not in ROUNDINGS:
            raise InputError(f"weights are rounded {' or '.join(ROUNDINGS)}, not {self.rounding!r}")

    def plan(self, model: ir.Model, shapes: Shapes, keep: Collection[str] = ()) -> Plan:
        """What of the model, or of a copy of it, is quantized."""
        return plan(model, shapes, self.table, keep)

    @property
    def sketches(self) -> Mapping[str, Sketch]:
        """What calibration saw of each tensor, by name."""
        return self._calibrated().tensors

    def tensors(self) -> list[str]:
        """Names of all that is quantized where nothing is kept."""
        everything = self.plan(self.model, Shapes(self.model))
        return [value.name or "" for value in everything.tensors]

    def settle(self) -> None:
        """Drop the sums of XᵀX: weights that are rounded stay so, and others will be to nearest."""
        self._grams = {}

    def insert(
        self, context: Context, keep: Collection[str] = (), wide: Collection[str] = ()
    ) -> bool:
        """Quantize the model of a context, a copy; whether there was anything to quantize.

        Nodes labelled in `keep` stay in floats, those in `wide` follow the wider table. Raises
        InputError for samples that do not fit.
        """
        done = self._insert(context, self.plan(context.model, context.shapes, {*keep, *wide}))
        if self.wider is None or not wide:
            return done
        others = {ir.label(n) for n in context.model.graph} - set(wide)
        rest = plan(context.model, context.shapes, self.wider, others)
        return self._insert(context, rest) or done

    def _insert(self, context: Context, made: Plan) -> bool:
        if not made.linear:
            return False
        ranges = choose(made, self._calibrated(), self.ranges)
        sums = self._accumulated()
        Insertion(context, made, ranges, sums, self._rounded, self.progress).run()
        return True

    def _calibrated(self) -> Sketches:
        """Sketches of every tensor that is quantized where none is kept."""
        if self._sketches is None:
            names = self.tensors()
            if self.seen is not None:
                check_seen(self.seen, names)
                self._sketches = self.seen
                return self._sketches
            self._sketches = calibrate(
                self.model, names, self.samples, cache=self.cache, progress=self.progress
            )
        return self._sketches

    def _accumulated(self) -> dict[str, Gram]:
        if self.rounding == "nearest":
            return {}
        if self._grams is None:
            self._grams = self._sums()
        return self._grams

    def _sums(self) -> dict[str, Gram]:
        samples = self.samples.take(_GRAM_SAMPLES)
        everything = self.plan(self.model, Shapes(self.model))
        nodes = [n for n in everything.linear if ir.constant(n.inputs[1]) is not None]
        return grams(
            self.model, affordable(nodes), samples, rows=_GRAM_ROWS, progress=self.progress
        )


def check_seen(seen: Sketches, names: Sequence[str]) -> None:
    """Raise InputError where calibration did not look at a tensor."""
    for name in names:
        if name not in seen.tensors:
            raise InputError(f"calibration did not look at {name!r}: give it the same options")


def choose(made: Plan, sketches: Sketches, how: Ranges) -> dict[ir.Value, tuple[float, float]]:
    """The range of each group of tensors, by its first one, from what all of them hold."""
    grid = made.table.activation
    found: dict[ir.Value, tuple[float, float]] = {}
    for group in made.groups:
        together = Sketch()
        for value in group:
            together.merge(sketches.tensors.get(value.name or "", Sketch()))
        found[group[0]] = how.choose(together, levels=grid.levels, symmetric=grid.symmetric)
    return found
