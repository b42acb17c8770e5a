"""How far a lossy pass moved a model's outputs, over a number of samples."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

from graphopt import ir
from graphopt.closeness import Gauge
from graphopt.emulation import emulated, with_types_of
from graphopt.errors import GraphoptError
from graphopt.feeds import workable_feeds
from graphopt.report import Loss
from graphopt.runner import Runner
from graphopt.shapes import Shapes
from graphopt.verification import signature_breaks

if TYPE_CHECKING:
    from graphopt.judging import Feeds
    from graphopt.samples import Samples

MEASURED = 64
"""Samples that are run at most: enough for a figure in decibels, few enough for each pass."""


def measure_loss(
    name: str,
    before: ir.Model,
    after: ir.Model,
    samples: Samples | None = None,
    *,
    seed: int = 0,
) -> Loss:
    """Run two models on the same samples, random ones where there are none, and compare outputs.

    At most 64 samples are run.
    Inputs and outputs may be of another floating point type in the second one. What is of 16 bits
    is rounded after each operator, as on a device that computes in 16 bits.

    Args:
        name: what was done in between; `Loss.name`.

    Raises:
        GraphoptError: the second model cannot take the first one's place, or does not run.
    """
    after = with_types_of(after, before)
    breaks = signature_breaks(before, after)
    if breaks:
        raise GraphoptError(f"{name}: {breaks[0]}")
    feeds: Iterable[Feeds] = (
        [workable_feeds(before, Shapes(before), seed=seed)] if samples is None else samples
    )
    old, new = Runner(emulated(before)), Runner(emulated(after))
    gauges = {output: Gauge(output) for output in old.outputs}
    count = 0
    for feed in islice(feeds, MEASURED):
        expected, got = old.run(feed), new.run(feed)
        for output, gauge in gauges.items():
            gauge.add(expected[output], got[output])
        count += 1
    where = "random inputs" if samples is None else samples.where
    outputs = [gauge.finish() for gauge in gauges.values()]
    for result in outputs:
        if result.reason:
            raise GraphoptError(f"{name}: {result}")
    return Loss(name, count, where, outputs)
