"""`quantize`: a model and data in; a quantized model out, and what that cost and gained.

The way is chosen by what the model mostly computes and by the target. Recovery that costs no
accuracy elsewhere is applied by default, equalization where the plain result is poor. A result
that is not faster is not returned unless it is wanted anyway.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np

from graphopt import files, ir, optimization
from graphopt.context import Context
from graphopt.cost import node_cost
from graphopt.errors import InputError
from graphopt.images import Images
from graphopt.pass_manager import load_pass
from graphopt.passes.quantize_dynamic import QuantizeDynamic
from graphopt.passes.quantize_static import QuantizeStatic, raise_opset
from graphopt.passes.smooth_activations import SmoothActivations
from graphopt.quantizer.budget import Budget, rank, search
from graphopt.quantizer.calibration import fingerprint
from graphopt.quantizer.kernels import Kernels, count_kernels
from graphopt.quantizer.placement import plan
from graphopt.quantizer.ranges import Ranges
from graphopt.quantizer.scoring import Layer, Metric, Score, interleaved, layers, score
from graphopt.quantizer.static import Static
from graphopt.runner import Runner
from graphopt.samples import Samples, SamplesLike, bindings, open_samples
from graphopt.shapes import Shapes
from graphopt.target import Target

__all__ = ["Quantization", "quantize"]

Method = Literal["auto", "static", "dynamic"]

_POOR_DB = 20.0  # below it equalization is tried
_SCORED = 64  # samples that alternatives are compared on
_MEASURE_SECONDS = 0.6
_RANGES = (Ranges("minmax"), Ranges("lp", power=3.0), Ranges("mse"))
"""What is tried where nothing is asked for: what suits depends on how activations are spread."""
_RANKED = 8  # samples that the sensitivity of operators is measured on
_FASTER = 0.97  # of the time of floats: what is within the noise is no gain


@dataclass
class Quantization:
    """What was done, what it cost and what it gained."""

    source: str = ""
    target: str = ""
    method: str = ""
    reason: str = ""
    """Why this method."""
    placement: str = ""
    steps: list[str] = field(default_factory=list[str])
    """What was applied, as pipeline text."""
    samples: int = 0
    where: str = ""
    random: bool = False
    """Calibrated on random data."""
    score: Score | None = None
    """Float model and result on the samples given."""
    layers: list[Layer] = field(default_factory=list[Layer])
    kernels: Kernels | None = None
    """None where the runtime is not on this machine."""
    kept: list[str] = field(default_factory=list[str])
    """Operators left in floats to stay within a budget."""
    sensitivity: dict[str, float] = field(default_factory=dict[str, float])
    """Noise over signal at the outputs for each operator quantized alone, where a budget asked."""
    bytes_before: int = 0
    bytes_after: int = 0
    milliseconds_before: float | None = None
    milliseconds_after: float | None = None
    ratio: float | None = None
    """Median of the time after over before, the two having taken turns."""
    refused: str = ""
    """Why the float model was kept; empty where it was not."""
    notes: list[str] = field(default_factory=list[str])
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; infinite figures are null."""
        data: dict[str, Any] = _plain(dataclasses.asdict(self))
        return data


def quantize(
    model: files.ModelLike,
    data: SamplesLike,
    *,
    target: str | Target = "cpu",
    method: Method = "auto",
    options: QuantizeStatic | None = None,
    limit: int | None = None,
    images: Images | None = None,
    metric: Metric | None = None,
    max_drop: float | None = None,
    max_latency: float | None = None,
    max_size: int | None = None,
    force: bool = False,
    cache: Path | None = None,
    seconds: float = _MEASURE_SECONDS,
    progress: Callable[[str], None] | None = None,
    report: Quantization | None = None,
) -> ir.Model:
    """Quantize a model; the argument is left as it is.

    Args:
        model: a path, bytes, an `onnx.ModelProto`, an `onnx_ir.Model` or torch's `ONNXProgram`.
        data: see `graphopt.samples.open_samples`; the same samples calibrate and score.
        target: what it shall run on, see `Target.names`.
        method: `static` (ranges fixed by the samples), `dynamic` (ranges found at run time), or
            chosen by what the model computes.
        options: types, ranges, placement, operators to keep … of static quantization.
        limit: use only the first so many samples.
        images: how images are read.
        metric: a figure, higher is better, of the outputs (a dict for each sample) and the labels;
            by default top-1 accuracy where there are labels.
        max_drop: how much the metric may fall (or the agreement with the float model, without
            one); operators stay in floats until it holds.
        max_latency: milliseconds that a run on the first sample may take.
        max_size: bytes that the weights may take.
        force: return the quantized model even if it is not faster.
        cache: a folder that keeps what calibration saw, for the next time.
        seconds: how long latency is measured; 0 leaves that out.
        progress: called with what is being done.
        report: filled with what was done and what it cost.

    Raises:
        InputError: the model, an option or the samples cannot be used.
        GateError: a limit cannot be met.
        GraphoptError: the model does not run.
    """
    if method not in get_args(Method):
        raise InputError(f"a method is one of {', '.join(get_args(Method))}, not {method!r}")
    start = time.monotonic()
    report = report if report is not None else Quantization()
    tell = progress or _silent
    original = files.load(model)
    samples = open_samples(data, original, limit=limit, options=images)
    aim = Target.parse(target)
    report.source = str(model) if isinstance(model, str | Path) else original.graph.name or ""
    report.target, report.where, report.random = aim.name, samples.where, samples.random
    tell("optimization")
    base = optimization.optimize(original, level=2)
    context = Context(files.copy(base), target=aim, samples=samples)
    work = _Work(context, samples, report, tell, metric, options or QuantizeStatic(), cache)
    report.method, report.reason = _choose(context, samples, aim, method)
    smoothed = work.smooth()
    budget = Budget(max_drop, max_latency, max_size)
    result = work.static(budget) if report.method == "static" else work.dynamic(budget)
    report.steps = [*smoothed, *report.steps]
    report.samples = len(samples)
    _measure(report, work, original, base, result, seconds)
    if report.refused or (not _faster(report) and not force):
        report.refused = report.refused or _why_slow(report)
        result = base
    milliseconds = report.milliseconds_before if report.refused else report.milliseconds_after
    size = report.bytes_before if report.refused else report.bytes_after
    budget.check(None if report.refused else report.score, milliseconds, size)
    report.seconds = time.monotonic() - start
    return result


@dataclass
class _Work:
    """One call of `quantize`."""

    context: Context
    samples: Samples
    report: Quantization
    tell: Callable[[str], None]
    metric: Metric | None
    options: QuantizeStatic
    cache: Path | None

    def smooth(self) -> list[str]:
        """Move outliers of activations into weights; what was done, as pipeline text.

        It changes nothing that the model computes and costs no time where a normalization or a
        linear operator takes the scales, so that it is always done. Products whose ranges are
        found at run time also get a Mul where that halves their noise: it is small beside them.
        Between integer kernels a Mul would cost more than they gain.
        """
        context, keep = self.context, self.options.keep
        table = self.options.table(context)
        single = SmoothActivations(self.report.method == "dynamic")
        nodes = QuantizeDynamic(keep=keep).products(context)
        if not single.dynamic:
            nodes = list(plan(context.model, context.shapes, table, keep).linear)
        single = dataclasses.replace(single, multiply=single.dynamic or not table.outputs)
        return [str(single)] if single.smooth(context, nodes, self.samples, self.tell) else []

    def static(self, budget: Budget) -> ir.Model:
        """The best of the plain result and, where that is poor, of the equalized one."""
        table = self.options.table(self.context)
        self.report.placement = table.name
        raise_opset(self.context, table)
        float_model = self.context.model
        chosen = Way("", float_model)
        result, noise = self._static(chosen)
        if result is None:
            self.report.refused = "nothing in it can be quantized on this target"
            return float_model
        equalized = self._equalized(float_model) if noise > 10 ** (-_POOR_DB / 10) else None
        if equalized is not None:
            other, less = self._static(equalized)
            if other is not None and less < noise:
                chosen, result = equalized, other
        self.report.steps = [*filter(None, [chosen.step]), str(chosen.options(self.options))]
        if budget.max_drop is not None:
            result = self._within(chosen, budget, result)
        return result

    def dynamic(self, budget: Budget) -> ir.Model:
        """Products in integers with ranges of run time."""
        single = QuantizeDynamic(keep=self.options.keep)
        self.report.steps = [str(single)]
        floats = self._copy(self.context.model)
        nodes = [ir.label(node) for node in single.products(floats)]
        sums = single.sums(floats)

        def make(keep: Collection[str]) -> ir.Model:
            names = tuple(sorted({*self.options.keep, *keep}))
            context = self._copy(self.context.model)
            dataclasses.replace(single, keep=names).insert(context, sums)
            return context.model

        result = make(())
        if budget.max_drop is not None:
            result = self._search(make, nodes, budget, result)
        return result

    def _static(self, way: Way) -> tuple[ir.Model | None, float]:
        """The result with the least noise on some of the samples, of several ways to set ranges.

        None where there is nothing to quantize.
        """
        static = way.static(self)
        part = self.samples.take(_SCORED)
        floats = Runner(way.model, optimize=True)
        best: ir.Model | None = None
        least = math.inf
        for ranges in [static.ranges] if self.options.ranges else _RANGES:
            static.ranges = ranges
            context = self._copy(way.model)
            if not static.insert(context, self.options.keep):
                return None, math.inf
            self.tell(f"comparison: {ranges.method}")
            noise = score(floats, context.model, part).noise
            if best is None or noise < least:
                best, least, way.ranges = context.model, noise, ranges
        static.ranges = way.ranges or static.ranges
        return best, least

    def _equalized(self, model: ir.Model) -> Way | None:
        single = load_pass("equalize-channels", {"clips": True})
        before = self._copy(model)
        single.run(before)
        if not before.record.rewrites:
            return None
        return Way(str(single), before.model)

    def _within(self, way: Way, budget: Budget, result: ir.Model) -> ir.Model:
        static = way.static(self)
        nodes = [ir.label(n) for n in static.plan(way.model, Shapes(way.model)).linear]

        def make(keep: Collection[str]) -> ir.Model:
            context = self._copy(way.model)
            static.insert(context, {*self.options.keep, *keep})
            return context.model

        return self._search(make, nodes, budget, result)

    def _search(
        self,
        make: Callable[[Collection[str]], ir.Model],
        nodes: Sequence[str],
        budget: Budget,
        result: ir.Model,
    ) -> ir.Model:
        """Keep the operators in floats that the budget asks for, worst first."""
        base = self.context.model
        floats = Runner(base, optimize=True)
        few = self.samples.take(_RANKED)

        def holds(keep: Collection[str]) -> bool:
            self.tell(f"search: {len(keep)} of {len(nodes)} operators in floats")
            candidate = make(keep) if keep else result
            return budget.holds(score(floats, candidate, self.samples, metric=self.metric))

        def effect(name: str) -> float:
            alone = make([n for n in nodes if n != name])
            return score(floats, alone, few).noise

        if holds(()):
            return result
        file = None
        if self.cache is not None:
            key = hashlib.blake2b(
                f"{fingerprint(base)}{self.samples.key}{self.report.steps}".encode(), digest_size=16
            )
            file = self.cache / f"{key.hexdigest()}.json"
        ranked = rank(nodes, effect, saved=file, progress=self.tell)
        kept = search(list(ranked), holds)
        if kept is None:
            self.report.refused = f"no choice of operators keeps the drop at {budget.max_drop:g}"
            return result
        self.report.kept = kept
        self.report.sensitivity = ranked
        return make(kept)

    def _copy(self, model: ir.Model) -> Context:
        return Context(files.copy(model), target=self.context.target, samples=self.samples)


@dataclass
class Way:
    """A float model on its way to be quantized."""

    step: str
    """What was done to it, as pipeline text."""
    model: ir.Model
    ranges: Ranges | None = None
    """Those that were chosen."""
    _made: Static | None = None

    def options(self, given: QuantizeStatic) -> QuantizeStatic:
        """The pass that does the same as was done."""
        if self.ranges is None:
            return given
        return dataclasses.replace(given, ranges=self.ranges.method, power=self.ranges.power)

    def static(self, work: _Work) -> Static:
        """Its static quantization, made once."""
        if self._made is None:
            options = work.options
            self._made = Static(
                self.model,
                options.table(work.context),
                work.samples,
                options.how(),
                options.rounding,
                work.cache,
                work.tell,
            )
        return self._made


def _choose(context: Context, samples: Samples, target: Target, method: Method) -> tuple[str, str]:
    """The method, and why."""
    if method != "auto":
        return method, "asked for"
    if target.device == "cuda":
        return "static", "GPUs have no kernels for ranges of run time"
    sizes = bindings(context.model, next(iter(samples)))
    work = {"conv": 0, "product": 0}
    for node in context.model.graph:
        kind = "conv" if "Conv" in node.op_type else "product"
        weights = any(ir.constant(v) is not None for v in node.inputs[1:2])
        if node.op_type in ("Conv", "ConvTranspose", "MatMul", "Gemm") and weights:
            work[kind] += node_cost(node, context.shapes, sizes).flops
    if work["conv"] >= work["product"]:
        return "static", "convolutions are most of the work"
    if _normalized(context.model):
        return "dynamic", "products behind normalizations are most of the work"
    return "static", "products are most of the work, and nothing makes outliers"


def _normalized(model: ir.Model) -> bool:
    """Whether activations are normalized as transformers do it, which leaves outliers."""
    kinds = {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "Softmax"}
    return sum(node.op_type in kinds for node in model.graph) > 1


def _measure(
    report: Quantization,
    work: _Work,
    original: ir.Model,
    base: ir.Model,
    result: ir.Model,
    seconds: float,
) -> None:
    report.bytes_before, report.bytes_after = _bytes(original), _bytes(result)
    if report.refused:
        return
    report.score = score(original, result, work.samples, metric=work.metric, progress=work.tell)
    work.tell("layers")
    report.layers = layers(work.context.model, result, work.samples)
    foreign = work.context.target.foreign()
    if work.context.target.device != "cpu" or foreign is not None:
        report.notes.append(
            f"not measured: {foreign or 'this machine has no such device for ONNX Runtime'}"
        )
        return
    work.tell("kernels")
    report.kernels = count_kernels(result)
    if seconds > 0:
        work.tell("latency")
        times = interleaved([base, result], next(iter(work.samples)), seconds=seconds)
        report.milliseconds_before, report.milliseconds_after = map(float, np.median(times, axis=1))
        report.ratio = float(np.median(times[1] / times[0]))


def _faster(report: Quantization) -> bool:
    return report.ratio is None or report.ratio < _FASTER


def _why_slow(report: Quantization) -> str:
    kernels = report.kernels
    assert kernels is not None
    text = (
        f"int8 is not faster here: {report.milliseconds_after:.3g} ms, "
        f"floats {report.milliseconds_before:.3g} ms"
    )
    if kernels.floats:
        names = ", ".join(kernels.floats[:5]) + (" …" if len(kernels.floats) > 5 else "")
        text += f"; {len(kernels.floats)} of {kernels.total} kernels stay floats: {names}"
    return text


def _bytes(model: ir.Model) -> int:
    return sum(tensor.nbytes for tensor in ir.constants(model))


def _plain(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in cast("dict[str, Any]", data).items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in cast("list[Any]", data)]
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return data


def _silent(_text: str) -> None:
    """The progress of who does not want to know."""
