"""Outliers of activations moved into weights, as far as that makes the noise of a layer smaller.

Source: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
Language Models", 2022. An activation has one scale, so that a channel a hundred times larger than
the others leaves them no bits; weights have a scale for each output and bear such a channel well.
A channel is divided by s and the weights that read it are multiplied by s. Here s is r**a / w**b,
of the channel's largest activation r and the largest weight w that reads it; the exponents are
those, out of a grid, that make the noise at the layer's output smallest. That noise is known from
ranges and second moments alone: rounding to steps of d adds d**2 / 12 to each value.

The division goes into what makes the channels: a normalization's factors, or a linear operator
behind which the scale passes through everything (`graphopt.quantizer.channels`). Elsewhere it is a
multiplication of its own, which costs time and is put in only where it halves the noise; it has to
lower it further where few results follow, since there the time is a larger share of the product's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.context import Context
from graphopt.quantizer.reads import Read, Region, rescale
from graphopt.samples import Samples

__all__ = ["smooth"]

Floats = npt.NDArray[np.float64]

_ACTIVATIONS = np.linspace(0.1, 1.0, 10)  # exponents of the activations' ranges
_WEIGHTS = (0.2, 0.4)  # and of the weights', tried where the first one is best
_BOUND = math.log(1e4)  # of a scale, against its region's middle


def smooth(
    context: Context,
    nodes: Iterable[ir.Node],
    samples: Samples,
    *,
    dynamic: bool,
    multiply: bool,
    progress: Callable[[str], None] | None = None,
) -> int:
    """Scale the channels of what linear operators read so that 8 bits hold them better.

    Args:
        context: its main graph is changed, and computes the same up to rounding.
        nodes: the operators that will be quantized (Conv, Gemm, MatMul with constant weights).
        samples: what the ranges are taken from.
        dynamic: ranges are those of each run; else one range holds for all samples.
        multiply: put a Mul where nothing else can take the scale and it is worth its time.
        progress: called with what is being done.

    Returns how many tensors were scaled.

    Raises:
        InputError: activations that are not finite, or samples that do not fit.
    """
    return rescale(
        context,
        list(nodes),
        samples,
        _search,
        rule="smooth",
        dynamic=dynamic,
        multiply=multiply,
        progress=progress,
    )


def _noise(read: Read, scales: Floats) -> float:
    """Noise over signal at the readers' outputs, if the channels are divided by scales [in].

    Activations and weights are rounded to 8 bits, without a correlation between channels.
    """
    power = read.power
    widest = (np.array(read.high) / scales).max(axis=1)
    lowest = (np.array(read.low) / scales).min(axis=1)
    steps: Floats = (widest - lowest) / 255
    rounding = float((steps**2).mean()) / 12
    noise = signal = 0.0
    for each in read.layers:
        split = scales.reshape(each.size.shape[0], 1, -1)
        noise += rounding * float((scales**2 * each.energy).sum())
        steps = (each.size * split).max(axis=2) / 127
        left = (power / scales**2).reshape(each.size.shape[0], -1).sum(axis=1) * each.kernel
        noise += float((steps**2 / 12 * left[:, None]).sum())
        signal += float((each.energy * power).sum())
    return noise / signal if signal > 0 else 0.0


def _search(region: Region) -> tuple[Floats, float]:
    """The best scales of a region, and the share of the noise that they leave."""
    reach = region.largest(lambda read: read.reach)
    weight = region.largest(lambda read: read.weight)
    known = (reach > 0) & (weight > 0)

    def noise(scales: Floats) -> float:
        return sum(_noise(read, scales[ids]) for read, ids in region.members)

    def scales(a: float, b: float) -> Floats:
        logs = np.zeros(len(reach))
        logs[known] = a * np.log(reach[known]) - b * np.log(weight[known])
        logs[known] -= np.median(logs[known])
        return np.exp(np.clip(logs, -_BOUND, _BOUND))

    ones = np.ones(len(reach))
    now = noise(ones) if known.any() else 0.0
    if now <= 0:
        return ones, 1.0
    least, best = min((noise(scales(a, 0.0)), float(a)) for a in _ACTIVATIONS)
    finer = [(noise(scales(best, b)), b) for b in _WEIGHTS]
    least, second = min([(least, 0.0), *finer])
    return scales(best, second), least / now
