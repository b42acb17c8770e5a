"""Weights made larger where activations are, before they are rounded to few bits.

Source: Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and
Acceleration", 2023. What rounding a weight costs depends on what it is multiplied with: of a
channel whose activations are large, weights are multiplied by s > 1 and the channel is divided by
s, so that they are rounded s times finer, as long as they do not set the range of their block. Here
s is the root mean square of the channel to a power, the one out of a grid that changes the layer's
output least.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.context import Context
from graphopt.gram import weight_matrix
from graphopt.quantizer.reads import Read, Region, rescale
from graphopt.quantizer.rounding import Scheme, nearest
from graphopt.samples import Samples

__all__ = ["scale_salient"]

Floats = npt.NDArray[np.float64]

_EXPONENTS = np.linspace(0.1, 1.0, 10)
_BOUND = math.log(1e4)  # of a scale, against its region's middle


def scale_salient(
    context: Context,
    nodes: Iterable[ir.Node],
    samples: Samples,
    scheme: Scheme,
    *,
    multiply: bool,
    progress: Callable[[str], None] | None = None,
) -> int:
    """Scale the channels that linear operators read for weights that a scheme will round.

    The model computes the same, up to rounding. `multiply` puts a Mul where nothing else can take
    the scales and they halve the noise. Returns how many tensors were scaled; raises InputError as
    `graphopt.quantizer.smoothing.smooth` does.
    """

    def search(region: Region) -> tuple[Floats, float]:
        return _search(region, scheme)

    return rescale(
        context,
        list(nodes),
        samples,
        search,
        rule="salient",
        dynamic=False,
        multiply=multiply,
        progress=progress,
    )


def _search(region: Region, scheme: Scheme) -> tuple[Floats, float]:
    """The best scales of a region, and the share of the noise that they leave."""
    size = region.largest(lambda read: np.sqrt(read.power))
    known = size > 0

    def scales(exponent: float) -> Floats:
        logs = np.zeros(len(size))
        logs[known] = exponent * np.log(size[known])
        logs[known] -= logs[known].mean() if known.any() else 0.0
        return np.exp(np.clip(logs, -_BOUND, _BOUND))

    def noise(found: Floats) -> float:
        return sum(_noise(read, found[ids], scheme) for read, ids in region.members)

    now = noise(np.ones(len(size)))
    if now <= 0 or not known.any():
        return np.ones(len(size)), 1.0
    least, best = min((noise(scales(a)), float(a)) for a in _EXPONENTS)
    return scales(best), least / now


def _noise(read: Read, scales: Floats, scheme: Scheme) -> float:
    """Noise over signal at the readers' outputs, without a correlation between channels."""
    noise = signal = 0.0
    for each in read.layers:
        weights = ir.array(each.node.inputs[1])
        assert weights is not None
        matrix = weight_matrix(each.node, weights).astype(np.float64)
        groups = matrix.shape[0]
        spread = np.repeat(scales.reshape(groups, 1, -1), each.kernel, axis=2)
        power = np.repeat(read.power.reshape(groups, 1, -1), each.kernel, axis=2)
        change = nearest(matrix * spread, scheme, search=False).values / spread - matrix
        noise += float((change**2 * power).sum())
        signal += float((matrix**2 * power).sum())
    return noise / signal if signal > 0 else 0.0
