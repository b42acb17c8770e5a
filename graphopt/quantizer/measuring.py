"""The figures of a quantized model beside the floats that it was made of, for the report."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from graphopt import ir
from graphopt.quantizer.kernels import count_kernels
from graphopt.quantizer.report import Quantization
from graphopt.quantizer.scoring import Metric, interleaved, layers, score
from graphopt.samples import Samples
from graphopt.target import Target

__all__ = ["is_large", "measure", "weight_bytes", "why_slow"]

_LARGE = 1 << 30  # bytes of weights
_FASTER = 0.97  # of the time of floats: what is within the noise is no gain


def measure(
    report: Quantization,
    models: tuple[ir.Model, ir.Model, ir.Model, ir.Model],
    samples: Samples,
    target: Target,
    *,
    metric: Metric | None,
    seconds: float,
    tell: Callable[[str], None],
) -> None:
    """Fill in what the result costs and gains.

    `models` are the original, the optimized float model, what was made of it to be quantized, whose
    values have other scales, and the result. Time and kernels are left out where this machine is
    not the target.
    """
    original, base, floats, result = models
    report.bytes_before, report.bytes_after = weight_bytes(original), weight_bytes(result)
    if report.refused:
        return
    report.score = score(original, result, samples, metric=metric, progress=tell)
    tell("layers")
    report.layers = layers(floats, result, samples)
    foreign = target.foreign()
    if target.device != "cpu" or foreign is not None:
        reason = foreign or "this machine has no such device for ONNX Runtime"
        report.notes.append(f"latency and kernels are not measured: {reason}")
        return
    tell("kernels")
    report.kernels = count_kernels(result)
    if seconds > 0:
        tell("latency")
        times = interleaved([base, result], next(iter(samples)), seconds=seconds)
        report.milliseconds_before, report.milliseconds_after = map(float, np.median(times, axis=1))
        report.ratio = float(np.median(times[1] / times[0]))


def why_slow(report: Quantization) -> str:
    """Why a result is no gain, with the kernels that stay floats; empty where it is one."""
    if report.ratio is None or report.ratio < _FASTER:
        return ""
    text = (
        f"the result is not faster here: {report.milliseconds_after:.3g} ms, "
        f"floats {report.milliseconds_before:.3g} ms"
    )
    kernels = report.kernels
    if kernels is not None and kernels.floats:
        names = ", ".join(kernels.floats[:5]) + (" …" if len(kernels.floats) > 5 else "")
        text += f"; {len(kernels.floats)} of {kernels.total} kernels stay floats: {names}"
    return text


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all constants."""
    return sum(tensor.nbytes for tensor in ir.constants(model))


def is_large(model: ir.Model) -> bool:
    """Whether a model is too large to copy its weights, and to run it for each of many trials."""
    return weight_bytes(model) > _LARGE
