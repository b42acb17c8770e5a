"""`quantize`: a model and data in; a quantized model out, and what that cost and gained.

The way is chosen by what the model mostly computes and by the target. Recovery that costs no
accuracy elsewhere is applied by default, equalization where the plain result is poor. A result
that is not faster is not returned unless it is wanted anyway.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

from graphopt import files, ir, optimization
from graphopt._ways import Options, Work
from graphopt.context import Context
from graphopt.cost import node_cost
from graphopt.errors import InputError
from graphopt.passes.quantize_dynamic import QuantizeDynamic
from graphopt.passes.quantize_static import QuantizeStatic, raise_opset
from graphopt.passes.quantize_weights import QuantizeWeights
from graphopt.quantizer.budget import Budget
from graphopt.quantizer.calibration import calibrate as calibrate_tensors
from graphopt.quantizer.calibration import fingerprint
from graphopt.quantizer.measuring import measure, why_slow
from graphopt.quantizer.recurrent import lstms
from graphopt.quantizer.report import Quantization
from graphopt.quantizer.scoring import Metric
from graphopt.quantizer.shards import Shard, combine
from graphopt.quantizer.static import Static
from graphopt.report import Report
from graphopt.samples import Samples, SamplesLike, bindings, open_samples
from graphopt.samples.images import Images
from graphopt.target import Target

__all__ = ["Quantization", "calibrate", "quantize"]

Method = Literal["auto", "static", "dynamic", "weights"]
Fallback = Literal["", "int16", "float16", "bfloat16", "float"]

_MEASURE_SECONDS = 0.6
_HEAVY = ("Conv", "ConvTranspose", "MatMul", "Gemm", "LSTM", "GRU", "RNN")
_HALF = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
_WITHOUT = {
    "static": "smooth-activations, equalize-channels, correct-biases and the comparison of ranges",
    "dynamic": "smooth-activations",
    "weights": "reconstruction, unless --rounding asks for it",
}
"""What a large model goes without."""
_ASKED: dict[type, Method] = {QuantizeDynamic: "dynamic", QuantizeWeights: "weights"}


def quantize(
    model: files.ModelLike,
    data: SamplesLike | None = None,
    *,
    calibration: Sequence[Path] = (),
    target: str | Target = "cpu",
    method: Method = "auto",
    options: Options | None = None,
    limit: int | None = None,
    images: Images | None = None,
    metric: Metric | None = None,
    max_drop: float | None = None,
    max_latency: float | None = None,
    max_size: int | None = None,
    fallback: Fallback = "",
    rotate: bool | None = None,
    figures: bool = False,
    force: bool = False,
    cache: Path | None = None,
    seconds: float = _MEASURE_SECONDS,
    progress: Callable[[str], None] | None = None,
    report: Quantization | None = None,
) -> ir.Model:
    """Quantize a model; the argument is left as it is.

    Args:
        model: a path, bytes, an `onnx.ModelProto`, an `onnx_ir.Model` or torch's `ONNXProgram`.
        data: see `graphopt.samples.open_samples`; the same samples calibrate and score. Dynamic
            ranges and weights that are rounded each by itself do without.
        calibration: files of `calibrate`, all parts of one; static quantization takes its ranges
            from them, and does without samples too.
        target: what it shall run on, see `Target.names`.
        method: `static` (ranges fixed by the samples), `dynamic` (ranges found at run time),
            `weights` (which are stored with few bits, and computed with in floats), or chosen by
            what the model computes.
        options: the pass with its types, ranges, placement, operators to keep …: QuantizeStatic,
            QuantizeDynamic or QuantizeWeights, which says the method too.
        limit: use only the first so many samples.
        images: how images are read.
        metric: a figure, higher is better, of the outputs (a dict for each sample) and the labels;
            by default top-1 accuracy where there are labels.
        max_drop: how much the metric may fall (or the agreement with the float model, without
            one); operators stay in floats until it holds.
        max_latency: milliseconds that a run on the first sample may take.
        max_size: bytes that the weights may take.
        fallback: what operators become, to stay within the drop, before they become floats:
            `int16` (activations of 16 bits), `float16` or `bfloat16`; weights of less than 8 bits
            get 8. Models whose weights are bfloat16 go back to it where the target has it.
        rotate: turn residual streams so that no channel stands out (`rotate-residual`); by default
            where some do and samples that calibrate nothing have less noise.
        figures: fill in what the report draws too: sensitivity and histograms.
        force: return the quantized model even if it is not faster. Weights of few bits, which
            are asked for to save room, are returned anyway.
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
    if fallback not in get_args(Fallback):
        kinds = ", ".join(kind for kind in get_args(Fallback) if kind)
        raise InputError(f"operators fall back to one of {kinds}, not {fallback!r}")
    start = time.monotonic()
    report = report if report is not None else Quantization()
    tell = progress or _silent
    original = files.load(model)
    blind = data is None
    if blind and (metric is not None or max_drop is not None or figures):
        raise InputError("a metric, a limit of the drop and a report's figures need data: --data")
    given = "random" if data is None else data
    samples = open_samples(given, original, limit=1 if blind else limit, options=images)
    aim = Target.parse(target)
    report.source = str(model) if isinstance(model, str | Path) else original.graph.name or ""
    report.target, report.where = aim.name, "" if blind else samples.where
    report.random = samples.random and not blind
    tell("optimization")
    widened = bool(_types(original) & _HALF)
    base = _optimized(original, report, widened=widened)
    context = Context(files.copy(base), target=aim, samples=None if blind else samples)
    options = options or QuantizeStatic()
    seen = combine(calibration, fingerprint(base)) if calibration else None
    if not fallback and ir.DataType.BFLOAT16 in _types(original) and aim.device == "cuda":
        fallback = "bfloat16" if "bfloat16" in aim.dtypes else fallback
    work = Work(context, samples, report, tell, metric, options, fallback, cache, blind, seen)
    asked = _ASKED.get(type(options), method)
    if seen is not None:
        asked = "static" if asked == "auto" else asked
        if asked != "static":
            raise InputError(f"a calibration is for static quantization, not for {asked}")
    report.method, report.reason = _choose(context, samples, aim, asked)
    if report.method == "static" and blind and seen is None:
        raise InputError("static quantization needs data (--data), or a calibration of it")
    budget = Budget(max_drop, max_latency, max_size)
    turned = work.rotate(rotate)
    floats, result = _made(work, budget, figures=figures)
    report.steps = [*turned, *report.steps]
    bodies = _in_bodies(base, report.method)
    if bodies and not report.refused:
        report.notes.append(bodies)
    report.samples = 0 if blind else len(samples)
    models = (original, base, floats, result or base)
    measure(report, models, samples, aim, blind=blind, metric=metric, seconds=seconds, tell=tell)
    if blind:
        report.notes.append(
            "without samples nothing says how accurate it is; run times are of random inputs"
        )
    slow = why_slow(report)
    if slow and (force or report.method == "weights"):
        report.notes.append(slow)
    else:
        report.refused = report.refused or slow
    milliseconds = report.milliseconds_before if report.refused else report.milliseconds_after
    size = report.bytes_before if report.refused else report.bytes_after
    budget.check(None if report.refused else report.score, milliseconds, size)
    report.seconds = time.monotonic() - start
    if result is None or report.refused:
        return _optimized(original, Quantization()) if widened else base
    return result


def _optimized(model: ir.Model, report: Quantization, *, widened: bool = False) -> ir.Model:
    """The floats; widened, those of 16 bits are float32, which integers stand for."""
    run = Report()
    result = optimization.optimize(
        model,
        level=2,
        enable=["convert-float32"] if widened else [],
        freeze_initializers=True,
        report=run,
    )
    report.notes += [note for note in run.notes if "initializers" in note]
    if widened:
        report.notes.append("its floats of 16 bits are float32 first, which integers stand for")
    return result


def calibrate(
    model: files.ModelLike,
    data: SamplesLike,
    *,
    shard: tuple[int, int] = (0, 1),
    target: str | Target = "cpu",
    options: QuantizeStatic | None = None,
    limit: int | None = None,
    images: Images | None = None,
    cache: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Shard:
    """See what values a model's tensors have on a part of the samples, for `quantize`.

    What all parts saw is added up there, and is what one run over all samples sees. What needs the
    samples themselves is not done then: smoothing and equalization of channels.

    Args:
        data: all samples, or what this machine has of them.
        shard: this part's number, from 0, and how many there are; it takes every so many-th sample.
        options: those that say where the target wants integers.
        cache: a folder from which a run that was cut off goes on.

    See `quantize` for the others. Raises InputError for what cannot be used, as it does.
    """
    original = files.load(model)
    samples = open_samples(data, original, limit=limit, options=images).part(*shard)
    tell = progress or _silent
    tell("optimization")
    base = _optimized(original, Quantization(), widened=bool(_types(original) & _HALF))
    context = Context(files.copy(base), target=Target.parse(target))
    table = (options or QuantizeStatic()).table(context)
    raise_opset(context, table)
    names = Static(context.model, table, samples).tensors()
    if not names:
        raise InputError(_why_nothing(context.model, "static"))
    seen = calibrate_tensors(context.model, names, samples, cache=cache, progress=tell)
    return Shard(fingerprint(base), *shard, seen)


def _made(work: Work, budget: Budget, *, figures: bool) -> tuple[ir.Model, ir.Model | None]:
    """The floats that were quantized, and the result; None, with the reason in the report."""
    report = work.report
    smoothed: list[str] = []
    if work.large:
        report.notes.append(f"more than 1 GB of weights: without {_WITHOUT[report.method]}")
    elif report.method != "weights" and not work.blind and work.seen is None:
        smoothed = work.smooth()
    found = work.ways[report.method]()
    if found is None:
        report.refused = _why_nothing(work.context.model, report.method)
        return work.context.model, None
    report.steps = [*smoothed, *report.steps]
    ladder, result = found
    if report.method == "static":
        result = work.corrected(ladder, result)
    chosen: ir.Model | None = result
    if budget.max_drop is not None:
        chosen = work.climb(ladder, budget, result)
        if chosen is None:
            report.refused = f"no choice of operators keeps the drop at {budget.max_drop:g}"
    if figures:
        work.figures(ladder, chosen or result)
    return ladder.floats, chosen


def _why_nothing(model: ir.Model, method: str) -> str:
    """Why there is nothing to quantize."""
    cells = sorted({n.op_type for n in model.graph if n.op_type in ("LSTM", "GRU", "RNN")})
    if cells:
        names = " and ".join(cells)
        return f"there are no integer kernels for its {names}: --method weights makes them smaller"
    if any("QuantizeLinear" in n.op_type or n.op_type.startswith("QLinear") for n in model.graph):
        return "it is quantized already"
    bodies, types = _in_bodies(model, method), _types(model)
    if bodies or not types:
        return bodies or "it has no convolutions and no products with weights"
    if ir.DataType.FLOAT not in types:
        names = " and ".join(sorted(dtype.name for dtype in types))
        return f"its weights are {names}, and only those of FLOAT are quantized"
    return (
        f"--method {method} takes none of its weights: they are too few, used more than once, or "
        "of operators that it has no kernels for"
    )


def _types(model: ir.Model) -> set[ir.DataType]:
    """Of the weights of convolutions, products and recurrences."""
    heavy = (node for node in ir.nested_nodes(model) if node.op_type in _HEAVY)
    tensors = (ir.constant(value) for node in heavy for value in node.inputs[:2])
    return {tensor.dtype for tensor in tensors if tensor is not None}


def _in_bodies(model: ir.Model, method: str) -> str:
    """What is left alone, or not looked at, since it stands in the body of another operator."""
    main = sum(node.op_type in _HEAVY for node in model.graph)
    inner = sum(node.op_type in _HEAVY for node in ir.all_nodes(model)) - main
    if not inner:
        return ""
    text = f"{inner} of its operators are in bodies of If or Loop"
    if method == "static":
        return f"{text}, which stay as they are: --method dynamic and weights take products there"
    return f"{text}, where weights are rounded to nearest"


def _choose(context: Context, samples: Samples, target: Target, method: Method) -> tuple[str, str]:
    """The method, and why."""
    if method != "auto":
        return method, "asked for"
    if target.device == "cuda":
        return "static", "GPUs have no kernels for ranges of run time"
    sizes = bindings(context.model, next(iter(samples)))
    work = {"conv": 0, "product": 0, "recurrence": 0}
    recurrent = set(lstms(context))
    for node in context.model.graph:
        kind = "conv" if "Conv" in node.op_type else "product"
        if node in recurrent:
            kind = "recurrence"
        weights = any(ir.constant(v) is not None for v in node.inputs[1:2])
        if node.op_type in _HEAVY and weights:
            work[kind] += node_cost(node, context.shapes, sizes).flops
    if not any(work.values()) and _in_bodies(context.model, "dynamic"):
        return "dynamic", "what it computes is in bodies of If or Loop"
    if work["recurrence"] > work["conv"] + work["product"]:
        return "dynamic", "recurrences are most of the work"
    if work["conv"] >= work["product"]:
        return "static", "convolutions are most of the work"
    if _normalized(context.model):
        return "dynamic", "products behind normalizations are most of the work"
    return "static", "products are most of the work, and nothing makes outliers"


def _normalized(model: ir.Model) -> bool:
    """Whether activations are normalized as transformers do it, which leaves outliers."""
    kinds = {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "Softmax"}
    return sum(node.op_type in kinds for node in model.graph) > 1


def _silent(_text: str) -> None:
    """The progress of who does not want to know."""
