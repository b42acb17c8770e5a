"""The ways from a float model to a quantized one, each with a choice for every operator.

A way can be gone again and again: with all operators quantized, with one of them, or with those on
a finer rung that would cost too much. `Ladder` is what remains to be chosen; `climb` chooses.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path

from graphopt import files, ir
from graphopt.context import Context
from graphopt.errors import InputError
from graphopt.pass_manager import Pass, load_pass
from graphopt.passes.convert_bfloat16 import ConvertBfloat16
from graphopt.passes.convert_float16 import ConvertFloat16
from graphopt.passes.correct_biases import CorrectBiases
from graphopt.passes.quantize_dynamic import Integers, QuantizeDynamic
from graphopt.passes.quantize_static import QuantizeStatic, raise_opset
from graphopt.passes.quantize_weights import QuantizeWeights
from graphopt.passes.rotate_residual import RotateResidual
from graphopt.passes.smooth_activations import SmoothActivations
from graphopt.quantizer.bias_correction import correct_biases
from graphopt.quantizer.budget import Budget, rank, search
from graphopt.quantizer.calibration import fingerprint
from graphopt.quantizer.histograms import histograms
from graphopt.quantizer.measuring import is_large
from graphopt.quantizer.placement import plan
from graphopt.quantizer.ranges import Ranges
from graphopt.quantizer.recurrent import integer_lstms, lstms
from graphopt.quantizer.report import Quantization
from graphopt.quantizer.scoring import Metric, score
from graphopt.quantizer.sensitivity import sensitivity
from graphopt.quantizer.sketch import Sketch, Sketches
from graphopt.quantizer.static import Static
from graphopt.runner import Runner
from graphopt.samples import Samples
from graphopt.shapes import Shapes
from graphopt.wildcards import named

Options = QuantizeStatic | QuantizeDynamic | QuantizeWeights
Rungs = Mapping[str, str]
"""Operators by label that are not on the lowest rung, and the one that they are on."""

_POOR_DB = 20.0  # below it equalization is tried
_CORRECTED = 32  # samples that biases are corrected on
_LESS = 0.95  # of the noise: what correction must leave at most
_SCORED = 64  # samples that alternatives are compared on
_RANGES = (Ranges("minmax"), Ranges("lp", power=3.0), Ranges("mse"))
"""What is tried where nothing is asked for: what suits depends on how activations are spread."""
_SPARED = 4  # one sample in so many judges a rotation, and calibrates nothing
_QUIETER = 0.8  # of the noise: what a rotation must leave at most
_RANKED = 8  # samples that the sensitivity of operators is measured on


@dataclass
class Ladder:
    """A way whose choices are left open."""

    floats: ir.Model
    """What is quantized."""
    nodes: list[str]
    """Labels of the operators that can be quantized."""
    make: Callable[[Rungs], ir.Model]
    rungs: tuple[str, ...] = ("float",)
    """What an operator can be instead, from the least to the most exact; the last is `float`."""
    sketches: Mapping[str, Sketch] = field(default_factory=dict[str, Sketch])
    """What calibration saw, by tensor."""
    correct: bool = False
    """Whether biases of what is made are corrected."""


@dataclass
class Work:
    """One call of `quantize`."""

    context: Context
    """Of the float model."""
    samples: Samples
    report: Quantization
    tell: Callable[[str], None]
    metric: Metric | None
    options: Options
    fallback: str
    """The rung that operators go to first; empty for the target's."""
    cache: Path | None
    blind: bool = False
    """Whether the samples are nobody's: nothing is learnt from them, and nothing compared."""
    seen: Sketches | None = None
    """What calibration saw of the float model, where that was done before."""

    @functools.cached_property
    def large(self) -> bool:
        """Whether the model is: then one way is gone, and no other is compared with it."""
        return is_large(self.context.model)

    @property
    def ways(self) -> dict[str, Callable[[], tuple[Ladder, ir.Model] | None]]:
        """By the method's name."""
        return {"static": self.static, "dynamic": self.dynamic, "weights": self.weights}

    def rotate(self, wanted: bool | None) -> list[str]:
        """Turn residual streams where that is wanted; what was done, as pipeline text.

        With None, where channels stand out and there is less noise, also on samples that calibrate
        nothing.
        """
        if wanted and self.seen is not None:
            raise InputError("a calibration is of the model as it is, not of one that is rotated")
        single = RotateResidual(always=bool(wanted))
        context = self._copy(self.context.model)
        if wanted or (wanted is None and not (self.large or self.blind or self.seen)):
            single.run(context)
        if not context.record.rewrites:
            if wanted:
                reasons = ", ".join(sorted(context.record.refusals)) or "it has no such stream"
                self.report.notes.append(f"nothing was rotated: {reasons}")
            return []
        if wanted is None and not self._is_quieter(context.model):
            return []
        self.context = context
        return [str(single)]

    def _is_quieter(self, model: ir.Model) -> bool:
        """Whether another model of the same function loses less when it is quantized."""
        if len(self.samples) < 2 * _SPARED:
            return False
        rest = self.samples.without(0, _SPARED).take(_SCORED)
        spared = self.samples.part(0, _SPARED).take(_SCORED)
        floats = Runner(self.context.model, optimize=True)
        noises: list[tuple[float, float]] = []
        for each in (self.context.model, model):
            report = Quantization(method=self.report.method)
            context = self._copy(each, rest)
            trial = dataclasses.replace(self, context=context, samples=rest, report=report)
            if report.method != "weights":
                trial.smooth()
            found = trial.ways[report.method]()
            if found is None:
                return False
            seen, unseen = (score(floats, found[1], part).noise for part in (rest, spared))
            noises.append((seen, unseen))
        (seen, unseen), (less_seen, less_unseen) = noises
        return less_seen < _QUIETER * seen and less_unseen < _QUIETER * unseen

    def smooth(self) -> list[str]:
        """Move outliers of activations into weights; what was done, as pipeline text.

        It changes nothing that the model computes and costs no time where a normalization or a
        linear operator takes the scales, so that it is always done. Products whose ranges are
        found at run time also get a Mul where that halves their noise: it is small beside them.
        Between integer kernels a Mul would cost more than they gain.
        """
        context = self.context
        keep = named(context.model, self.options.keep)
        static = self.options if isinstance(self.options, QuantizeStatic) else QuantizeStatic()
        table = static.table(context)
        single = SmoothActivations(self.report.method == "dynamic")
        products = QuantizeDynamic(keep=keep).products(context)
        nodes = [node for node in products if node.graph is context.model.graph]
        if not single.dynamic:
            nodes = list(plan(context.model, context.shapes, table, keep).linear)
        single = dataclasses.replace(single, multiply=single.dynamic or not table.outputs)
        return [str(single)] if single.smooth(context, nodes, self.samples, self.tell) else []

    def static(self) -> tuple[Ladder, ir.Model] | None:
        """The best of the plain result and, where that is poor, of the equalized one.

        None where there is nothing to quantize.
        """
        options = self.options if isinstance(self.options, QuantizeStatic) else QuantizeStatic()
        keep, wide = (named(self.context.model, p) for p in (options.keep, options.wide))
        options = dataclasses.replace(options, keep=keep, wide=wide)
        rungs = self._rungs()
        if "int16" in rungs:
            raise_opset(self.context, options.wider(self.context))
        table = options.table(self.context)
        self.report.placement = table.name
        raise_opset(self.context, table)
        chosen = Way("", self.context.model, options)
        result, noise = self._ranged(chosen)
        if result is None:
            return None
        poor = self.seen is None and noise > 10 ** (-_POOR_DB / 10)
        equalized = self._equalized(options) if poor else None
        if equalized is not None:
            other, less = self._ranged(equalized)
            if other is not None and less < noise:
                chosen, result = equalized, other
        self.report.steps = [*filter(None, [chosen.step]), str(chosen.settled())]
        static = chosen.static(self)
        nodes = [ir.label(n) for n in static.plan(chosen.model, Shapes(chosen.model)).linear]
        nodes += map(ir.label, lstms(self._copy(chosen.model)))

        def make(rungs: Rungs) -> ir.Model:
            context = self._copy(chosen.model)
            wide = {name for name, rung in rungs.items() if rung == "int16"}
            kept = {*options.keep, *rungs} - wide
            static.insert(context, kept, {*options.wide, *wide})
            integer_lstms(context, {*options.keep, *rungs})
            for rung in _HALVES:
                _halve(context, {name for name, own in rungs.items() if own == rung}, rung)
            return context.model

        left = [name for name in nodes if name not in {*options.keep, *options.wide}]
        return Ladder(chosen.model, left, make, rungs, static.sketches), result

    def dynamic(self) -> tuple[Ladder, ir.Model] | None:
        """Products in integers with ranges of run time."""
        given = self.options
        single = given if isinstance(given, QuantizeDynamic) else QuantizeDynamic(keep=given.keep)
        single = dataclasses.replace(single, keep=named(self.context.model, single.keep))
        self.report.steps = [str(single)]
        floats = self._copy(self.context.model)
        nodes = [ir.label(node) for node in (*single.products(floats), *lstms(floats, single.keep))]
        if not nodes:
            return None
        self.tell("sums of inputs")
        sums = single.sums(floats)
        known: dict[str, Integers] = {}

        def make(rungs: Rungs) -> ir.Model:
            names = tuple(sorted({*single.keep, *rungs}))
            context = self._copy(self.context.model)
            dataclasses.replace(single, keep=names).insert(context, sums, known)
            return context.model

        result = make({})
        sums.clear()  # all weights are rounded
        return Ladder(self.context.model, nodes, make), result

    def weights(self) -> tuple[Ladder, ir.Model] | None:
        """Weights of few bits; what operators compute stays in floats."""
        given = self.options
        single = given if isinstance(given, QuantizeWeights) else QuantizeWeights(keep=given.keep)
        self.report.steps = [str(single)]
        nodes = [ir.label(node) for node in single.nodes(self._copy(self.context.model))]
        bits = {"int8": 8, "float": 32}

        def make(rungs: Rungs) -> ir.Model:
            own = (f"{escape(name)}={bits[rung]}" for name, rung in rungs.items())
            context = self._copy(self.context.model)
            dataclasses.replace(single, layers=(*own, *single.layers)).run(context)
            return context.model

        rungs = ("int8", "float") if single.bits < 8 else ("float",)
        return (Ladder(self.context.model, nodes, make, rungs), make({})) if nodes else None

    def climb(self, ladder: Ladder, budget: Budget, result: ir.Model) -> ir.Model | None:
        """Move the operators that the budget asks for to finer rungs, worst first.

        The first rung on which there is an answer is taken; None where the last one has none.
        """
        floats = Runner(self.context.model, optimize=True)

        def holds(some: Iterable[str], rung: str) -> bool:
            moved = dict.fromkeys(some, rung)
            if not moved and self.report.tried:
                return False  # or there would be no search
            self.tell(f"search: {len(moved)} of {len(ladder.nodes)} operators in {rung}")
            candidate = self._moved(ladder, moved) if moved else result
            found = score(floats, candidate, self.samples, metric=self.metric)
            self.report.tried.append((rung, len(moved), budget.drop(found)))
            return budget.holds(found)

        self.report.limit = budget.max_drop
        if holds((), ladder.rungs[0]):
            return result
        ranked = self.rank(ladder)
        for rung in ladder.rungs:
            kept = search(ranked, functools.partial(holds, rung=rung))
            if kept is not None:
                self.report.kept, self.report.rung = kept, rung
                return self._moved(ladder, dict.fromkeys(kept, rung))
        return None

    def corrected(self, ladder: Ladder, result: ir.Model) -> ir.Model:
        """The result with corrected biases where they lower the noise; then others get them too.

        Networks with depthwise convolutions gain a decibel and more. Where channels add up many
        products, means hardly move, and what a few samples say of them is no better. Nor is it
        where fewer answers agree: then what is gained lies where nobody looks.
        """
        if self.large or self.blind:
            return result
        model = self._correct(ladder, result)
        runner, part = Runner(ladder.floats, optimize=True), self.samples.take(_SCORED)
        before, after = (score(runner, each, part) for each in (result, model))
        if after.noise > _LESS * before.noise or (after.agreement or 0) < (before.agreement or 0):
            return result
        ladder.correct = True
        self.report.steps.append(str(CorrectBiases(_CORRECTED)))
        return model

    def _correct(self, ladder: Ladder, model: ir.Model) -> ir.Model:
        context = self._copy(model)
        correct_biases(context, ladder.floats, self.samples.take(_CORRECTED), progress=self.tell)
        return context.model

    def _moved(self, ladder: Ladder, rungs: Rungs) -> ir.Model:
        """What becomes of the float model with some operators on finer rungs."""
        model = ladder.make(rungs)
        return self._correct(ladder, model) if ladder.correct else model

    def rank(self, ladder: Ladder) -> list[str]:
        """The operators, the one first that does the most harm when it alone is quantized."""
        if not self.report.sensitivity:
            text = f"{fingerprint(ladder.floats)}{self.samples.key}{self.report.steps}"
            key = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
            others = set(ladder.nodes)

            def effects(names: Sequence[str]) -> Iterable[tuple[str, float]]:
                few = self.samples.take(_RANKED)
                return sensitivity(
                    ladder.floats,
                    names,
                    lambda name: ladder.make(dict.fromkeys(others - {name}, "float")),
                    few,
                )

            self.report.sensitivity = rank(
                ladder.nodes,
                effects,
                saved=None if self.cache is None else self.cache / f"{key}.json",
                progress=self.tell,
            )
        return list(self.report.sensitivity)

    def figures(self, ladder: Ladder, result: ir.Model) -> None:
        """What the report draws: sensitivity and histograms."""
        self.rank(ladder)
        self.report.histograms = histograms(ladder.floats, result, ladder.sketches)

    def _rungs(self) -> tuple[str, ...]:
        first = self.fallback or ("float16" if self.context.target.device == "cuda" else "float")
        target = self.context.target
        if first == "bfloat16" and (first not in target.dtypes or target.device == "cpu"):
            raise InputError(f"the runtime of target {target.name!r} has no bfloat16 kernels")
        return ("float",) if first == "float" else (first, "float")

    def _ranged(self, way: Way) -> tuple[ir.Model | None, float]:
        """The result with the least noise on some of the samples, of several ways to set ranges.

        None where there is nothing to quantize. Of a large model, and without samples, there is
        one way, whose noise is not measured.
        """
        static, options = way.static(self), way.options
        part = self.samples.take(_SCORED)
        single = self.large or self.blind
        floats = None if single else Runner(way.model, optimize=True)
        best: ir.Model | None = None
        least = math.inf
        for ranges in [static.ranges] if options.ranges or single else _RANGES:
            static.ranges = ranges
            self.tell(f"quantization: {ranges.method}")
            context = self._copy(way.model)
            done = static.insert(context, options.keep, options.wide)
            if not integer_lstms(context, options.keep) and not done:
                return None, math.inf
            if floats is None:
                static.settle()
                return context.model, math.nan
            self.tell(f"comparison: {ranges.method}")
            noise = score(floats, context.model, part).noise
            if best is None or noise < least:
                best, least, way.ranges = context.model, noise, ranges
        static.ranges = way.ranges or static.ranges
        return best, least

    def _equalized(self, options: QuantizeStatic) -> Way | None:
        single = load_pass("equalize-channels", {"clips": True})
        before = self._copy(self.context.model)
        single.run(before)
        if not before.record.rewrites:
            return None
        return Way(str(single), before.model, options)

    def _copy(self, model: ir.Model, samples: Samples | None = None) -> Context:
        return Context(
            files.copy(model),
            target=self.context.target,
            samples=None if self.blind else samples or self.samples,
            progress=self.tell,
        )


@dataclass
class Way:
    """A float model on its way to be quantized."""

    step: str
    """What was done to it, as pipeline text."""
    model: ir.Model
    options: QuantizeStatic
    ranges: Ranges | None = None
    """Those that were chosen."""
    _made: Static | None = None

    def settled(self) -> QuantizeStatic:
        """The pass that does the same as was done."""
        if self.ranges is None:
            return self.options
        return dataclasses.replace(self.options, ranges=self.ranges.method, power=self.ranges.power)

    def static(self, work: Work) -> Static:
        """Its static quantization, made once."""
        if self._made is None:
            options = self.options
            self._made = Static(
                self.model,
                options.table(work.context),
                work.samples,
                options.how(),
                "nearest" if work.blind else options.rounding,
                work.cache,
                work.tell,
                options.wider(work.context),
                work.seen,
            )
        return self._made


def _halve(context: Context, names: set[str], rung: str) -> None:
    """Let some operators compute in a float type of 16 bits."""
    if names:
        others = (label for node in context.model.graph if (label := ir.label(node)) not in names)
        _HALVES[rung](tuple(map(escape, others))).run(context)


_HALVES: dict[str, Callable[[tuple[str, ...]], Pass]] = {
    "float16": lambda keep: ConvertFloat16(keep, check_range=False),
    "bfloat16": ConvertBfloat16,
}
"""By rung, what leaves all but some operators as they are."""
