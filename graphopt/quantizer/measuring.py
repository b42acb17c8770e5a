"""The figures of a quantized model beside the floats that it was made of, for the report."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt import files, ir
from graphopt.quantizer.kernels import count_kernels
from graphopt.quantizer.report import Quantization
from graphopt.quantizer.scoring import Metric, interleaved, layers, score
from graphopt.samples import Samples
from graphopt.target import Target

__all__ = ["is_large", "measure", "weight_bytes", "why_slow"]

_LARGE = 1 << 30  # bytes of weights
_ROOM = 1 << 28  # bytes on a disk that are left alone
_FASTER = 0.97  # of the time of floats: what is within the noise is no gain


def measure(
    report: Quantization,
    models: tuple[ir.Model, ir.Model, ir.Model, ir.Model],
    samples: Samples,
    target: Target,
    *,
    blind: bool,
    metric: Metric | None,
    seconds: float,
    tell: Callable[[str], None],
) -> None:
    """Fill in what the result costs and gains.

    `models` are the original, the optimized float model, what was made of it to be quantized, whose
    values have other scales, and the result. Time and kernels are left out where this machine is
    not the target; with `blind`, whatever says more of the samples than of the model is, too.
    """
    original, base, floats, result = models
    report.bytes_before, report.bytes_after = weight_bytes(original), weight_bytes(result)
    if report.refused:
        return
    if not blind:
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
        _time(report, (base, result), next(iter(samples)), seconds)


def _time(
    report: Quantization,
    models: tuple[ir.Model, ir.Model],
    feeds: Mapping[str, npt.NDArray[Any]],
    seconds: float,
) -> None:
    """Latency before and after. Large models are read from files, as their users read them.

    Else their weights would be fed to each run, and no kernel could lay them out beforehand.
    """
    with tempfile.TemporaryDirectory(prefix="graphopt-latency-") as folder:
        room = shutil.disk_usage(folder).free
        loaded: list[ir.Model | Path] = list(models)
        for index, model in enumerate(models):
            if not is_large(model):
                continue
            room -= weight_bytes(model)
            if room < _ROOM:
                report.notes.append(f"latency is not measured: {folder} has no room for the models")
                return
            file = Path(folder) / f"{index}.onnx"
            files.save(model, file)
            loaded[index] = file
        times = interleaved(loaded, feeds, seconds=seconds)
    before, after = map(float, np.median(times, axis=1))
    report.milliseconds_before, report.milliseconds_after = before, after
    report.ratio = after / before


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
