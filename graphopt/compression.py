"""`compress`: smaller files by fewer bits for each weight, and what each way to do so costs."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt import files, ir, taps
from graphopt.accuracy import sampled_top1
from graphopt.errors import GraphoptError, InputError, MissingError
from graphopt.files import container
from graphopt.optimization import optimize
from graphopt.report import Loss, Report
from graphopt.runner import Runner, session
from graphopt.samples import open_samples

if TYPE_CHECKING:
    from graphopt.samples import SamplesLike

SCHEMES = {
    "lossless": "",
    "float16": "store-float16",
    "int8": "quantize-weights{bits=8}",
    "int4": "quantize-weights{bits=4,block=32}",
    "palette-8": "palettize-weights{bits=8}",
    "palette-6": "palettize-weights{bits=6}",
    "palette-4": "palettize-weights{bits=4}",
    "palette-4-grouped": "palettize-weights{bits=4,group=16}",
    "piecewise-4": "quantize-piecewise{bits=4}",
    "palette-3": "palettize-weights{bits=3}",
    "vector-2": "palettize-weights{bits=8,vector=4}",
}
"""Ways to store weights, by name, as pipeline text; the number is of bits per weight.

int4 has a scale for 32 weights of a product (for a channel of a convolution) and makes up for its
errors where there are samples; piecewise-4 two scales for a channel, palette-4 none."""
_LOADS = 3
_OPSET = 11
"""The oldest in which palettes have their operators."""


@dataclass(frozen=True)
class Scheme:
    """What one way to store the weights of a model comes to."""

    name: str
    pipeline: str
    bytes: int = 0
    """Of the model, weights included."""
    packed_bytes: int | None = None
    """Of the compressed container; None where its extra is not installed."""
    weight_snr_db: float | None = None
    """Over all weights that the model computes from what is stored; None where none lost anything
    or, as rows of embeddings do, none is computed whole."""
    loss: Loss | None = None
    """Results beside those of the model as it was."""
    accuracy: float | None = None
    """Share of samples whose label is the best-scored class; None without labels of classes."""
    load_ms: float = 0.0
    """Median time that ONNX Runtime takes to open the model, milliseconds."""
    reason: str = ""
    """Why the scheme cannot be had for this model."""


def compress(
    model: files.ModelLike,
    scheme: str,
    *,
    data: SamplesLike | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    report: Report | None = None,
) -> ir.Model:
    """Store a model's weights smaller; the argument is left as it is.

    Args:
        scheme: a name of `SCHEMES`, or pipeline text of passes.
        data: samples to measure with, see `graphopt.samples.open_samples`; random where None.

    Raises:
        InputError: no such scheme, or one that the model's opset does not allow.
    """
    text = SCHEMES.get(scheme, scheme)
    if scheme not in SCHEMES and not text.partition("{")[0].endswith(("-weights", "-float16")):
        raise InputError(f"no scheme is named {scheme!r}; there are {', '.join(SCHEMES)}")
    source = files.load(model)
    if text.startswith(
        ("palettize-weights", "quantize-piecewise")
    ):  # the others see to that themselves
        text = f"convert-opset{{version={_OPSET},at_least=true}},{text}"
    return optimize(
        source,
        passes=text or [],
        verify="end" if text else "off",
        data=data if text else None,
        seed=seed,
        progress=progress,
        report=report,
    )


def survey(
    model: files.ModelLike,
    names: Sequence[str] = tuple(SCHEMES),
    *,
    data: SamplesLike | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> list[Scheme]:
    """What each scheme comes to for a model.

    Raises:
        InputError: a model or data that cannot be used.
    """
    source = files.load(model)
    samples = None if data is None else open_samples(data, source)
    found: list[Scheme] = []
    for name in names:
        if progress is not None:
            progress(name)
        found.append(try_scheme(source, name, data=samples, seed=seed)[0])
    return found


def try_scheme(
    model: files.ModelLike, name: str, *, data: SamplesLike | None = None, seed: int = 0
) -> tuple[Scheme, ir.Model | None]:
    """What one scheme comes to for a model, and that model; None where the scheme gives its reason.

    Raises:
        InputError: a model or data that cannot be used.
    """
    source = files.load(model)
    samples = None if data is None else open_samples(data, source)
    report = Report()
    try:
        made = compress(source, name, data=samples, seed=seed, report=report)
    except GraphoptError as error:
        return Scheme(name, SCHEMES.get(name, name), reason=str(error)), None
    rolled_back = [r.rolled_back for r in report.passes if r.rolled_back]
    stored = any(r.rewrites for r in report.passes if r.name != "convert-opset")
    unchanged = bool(SCHEMES.get(name, name)) and not stored
    if rolled_back or unchanged:
        why = rolled_back[0] if rolled_back else "no weight here is worth it"
        return Scheme(name, report.pipeline, reason=why), None
    accuracy: float | None = None
    if samples is not None and samples.labels is not None:
        with contextlib.suppress(InputError):  # labels of another kind
            accuracy = sampled_top1(made, samples)
    return dataclasses.replace(_measured(name, source, made, report), accuracy=accuracy), made


def smallest(found: Sequence[Scheme], sqnr_db: float) -> Scheme:
    """The scheme of the smallest file whose results keep a signal-to-noise ratio.

    Raises:
        InputError: none keeps it.
    """
    fit = [s for s in found if not s.reason and (_sqnr(s) is None or (_sqnr(s) or 0.0) >= sqnr_db)]
    if not fit:
        raise InputError(f"no scheme keeps {sqnr_db:g} dB")
    return min(fit, key=lambda s: s.packed_bytes or s.bytes)


def _sqnr(scheme: Scheme) -> float | None:
    return None if scheme.loss is None else scheme.loss.sqnr_db


def _measured(name: str, source: ir.Model, made: ir.Model, report: Report) -> Scheme:
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        path = Path(folder) / container.MODEL
        files.save(made, path)
        size = sum(file.stat().st_size for file in path.parent.iterdir())
        load_ms = _load_ms(path)
        packed = Path(folder) / f"packed{container.SUFFIX}"
        packed_bytes: int | None = None
        try:
            files.save(made, packed)
            packed_bytes = packed.stat().st_size
        except MissingError:
            pass  # the table says so
    return Scheme(
        name=name,
        pipeline=report.pipeline,
        bytes=size,
        packed_bytes=packed_bytes,
        weight_snr_db=_weight_snr(source, made),
        loss=next((loss for loss in report.losses if loss.name == "all"), None),
        load_ms=load_ms,
    )


def _load_ms(path: Path) -> float:
    times: list[float] = []
    for _ in range(_LOADS):
        start = time.perf_counter()
        session(path, optimize=True)
        times.append(1000 * (time.perf_counter() - start))
    return sorted(times)[_LOADS // 2]


def _weight_snr(source: ir.Model, made: ir.Model) -> float | None:
    """How far the weights that are computed now lie from what they were, in decibels."""
    before = source.graph.initializers
    names = [v.name or "" for node in made.graph for v in node.outputs if v.name in before]
    if not names:
        return None
    probe = taps.tapped(made, names)
    probe.graph.inputs.clear()
    signal = noise = 0.0
    found: dict[str, Any] = Runner(probe).run({})
    for name in names:
        tensor = before[name].const_value
        assert tensor is not None
        weights = tensor.numpy().astype(np.float64)
        signal += float(np.sum(weights**2))
        noise += float(np.sum((weights - np.asarray(found[name]).astype(np.float64)) ** 2))
    return float(10 * np.log10(signal / noise)) if noise else None
