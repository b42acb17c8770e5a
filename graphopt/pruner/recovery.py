"""Weights refitted after pruning, layer by layer, on data without labels.

Going through the pruned model in order, each convolution or product is solved anew by ridge
regression: from what it now reads to what the unpruned model computes there, on the channels that
are left (Luo et al. 2017, ThiNet; He et al. 2017, Channel pruning for accelerating very deep neural
networks, whose asymmetric form this is: errors made earlier are made up for later). Where a sum
with an earlier value follows, the sum is what is fitted, so that residual streams are mended too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.errors import InputError
from graphopt.gram import LINEAR, column_blocks
from graphopt.pruner.batching import batched
from graphopt.pruner.fitting import Fit, Sums, biased, can_fit, fit
from graphopt.pruner.records import Record
from graphopt.pruner.splitting import split
from graphopt.runner import BATCH_SECONDS
from graphopt.samples import Samples
from graphopt.taps import tap

__all__ = ["Recovery", "divided", "recover"]

Reals = npt.NDArray[np.floating[Any]]
Tell = Callable[[str], None]

_SPARED, _ENOUGH = 8, 64

METHODS = ("reconstruct", "bias", "statistics")


@dataclass(frozen=True)
class Recovery:
    """How to recover; the fields of the pass `recover`."""

    method: str = "reconstruct"
    """`reconstruct` weights and biases, correct each `bias` only, or only the `statistics` that
    BatchNormalizations hold."""
    samples: int = 512
    """At most so many samples are used."""
    ridge: float = 1e-3
    """How strongly weights are held, relative to the mean square of what they multiply."""
    rows: int = 256
    """At most so many positions of a sample enter each fit."""
    batch: int = 16
    """Samples run at once, where the model takes any number."""
    epochs: int = -1
    """Then train all weights on the unpruned model's results, so often through the data; -1: as
    often as a few minutes allow."""
    rate: float = 5e-3
    """Of that training, relative to the weights."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"method is one of {', '.join(METHODS)}, not {self.method!r}")
        if self.samples < 1 or self.rows < 1 or self.batch < 1:
            raise InputError("samples, rows and batch are at least 1")
        if self.epochs < -1 or not self.rate > 0:
            raise InputError("epochs are at least 0 (-1: a default), the rate is greater than 0")
        if not self.ridge > 0:
            raise InputError(f"ridge is greater than 0, not {self.ridge:g}")


def divided(samples: Samples) -> tuple[Samples, Samples | None]:
    """Samples to fit to, and one in eight to judge that by, where there are 64 or more."""
    if len(samples) < _ENOUGH:
        return samples, None
    return samples.without(0, _SPARED), samples.part(0, _SPARED)


def recover(
    model: ir.Model,
    record: Record,
    samples: Samples,
    options: Recovery,
    progress: Tell | None = None,
) -> list[Fit]:
    """Refit a pruned model's weights in place, towards the model of the record.

    Memory: the sums of one layer, and its inputs for one batch.

    Raises:
        InputError: samples that do not fit the model or that give values that are not finite.
        GraphoptError: ONNX Runtime cannot run one of the models.
    """
    known = {v.name or "" for node in record.teacher.graph for v in node.outputs}
    data = samples.take(options.samples)
    affected = _affected(model, record, known)
    order = {node: index for index, node in enumerate(model.graph)}
    nodes = [node for node in model.graph if node in affected and _aim(node, known) in known]
    fits: list[Fit] = []
    for number, node in enumerate(nodes):
        if progress is not None:
            progress(f"refitting {number + 1} of {len(nodes)}: {ir.label(node)}")
        if options.method == "statistics":
            if node.op_type == "BatchNormalization":
                _restate(model, node, data, options)
        elif node.op_type in LINEAR and node.domain in ("", "ai.onnx"):
            done = _refit(model, node, _aim(node, known), record, data, options, order)
            fits += [] if done is None else [done]
    return fits


def _affected(model: ir.Model, record: Record, known: Collection[str]) -> set[ir.Node]:
    """The nodes that read something else than before: what was pruned or split, or made of it."""
    changed: set[ir.Value] = set()
    found: set[ir.Node] = set()
    for node in model.graph:
        inputs = [value for value in node.inputs if value is not None]
        if any(value in changed for value in inputs):
            found.add(node)
        names = {value.name or "" for value in node.outputs}
        if not names.isdisjoint(record.ranks):
            found.add(node)
        pruned = any(record.kept.get(value.name or "") for value in inputs)
        if node in found or pruned or names.isdisjoint(known):
            changed.update(node.outputs)
    return found


def _refit(
    model: ir.Model,
    node: ir.Node,
    aim: str,
    record: Record,
    data: Samples,
    options: Recovery,
    order: dict[ir.Node, int],
) -> Fit | None:
    """Refit a layer, and make two of it where that is planned."""
    if not can_fit(model, node):
        return None
    parts = _collect(model, node, aim, record, data, options, order)
    done = None
    if parts:
        done = fit(model, node, parts, options.ridge, only_bias=options.method == "bias")
    rank = record.ranks.pop(node.outputs[0].name or "", 0)
    if rank:
        whole = sum(parts[1:], parts[0]) if parts else None
        split(model, node, rank, None if whole is None else whole.xtx[0][0] / whole.count)
    return done


def _collect(
    model: ir.Model,
    node: ir.Node,
    aim: str,
    record: Record,
    data: Samples,
    options: Recovery,
    order: dict[ir.Node, int],
) -> list[Sums]:
    """Run both models up to a node and sum up what its fit needs, every other batch apart.

    Empty where nothing can be summed up; one part where there is one batch.
    """
    source, other = node.inputs[0], None
    addition = _addition(node, order)
    if addition is not None:
        aim, other = addition[0].outputs[0].name or "", addition[1]
    kept = record.kept.get(aim, {})
    assert source is not None
    asked = [source] if other is None else [source, other]
    parts = (Sums(), Sums())
    rng = np.random.default_rng(0)
    mine = tap(model, asked, batched(model, data, options.batch), seconds=BATCH_SECONDS)
    theirs = tap(
        record.teacher, [aim], batched(record.teacher, data, options.batch), seconds=BATCH_SECONDS
    )
    for number, (own, given) in enumerate(zip(mine, theirs, strict=True)):
        target = given[aim]
        for axis, positions in kept.items():
            target = np.take(target, positions, axis)
        if other is not None:
            target = target - own[other.name or ""]
        rows = _rows(node, target)
        start = 0
        for block in column_blocks(node, own[source.name or ""]):
            part = rows[:, start : start + block.shape[1]]
            if part.shape[1] != block.shape[1]:
                return []  # the shapes are not what they seemed
            start += block.shape[1]
            share = options.rows * len(next(iter(own.values()))) / max(rows.shape[1], 1)
            if share < 1:
                count = max(1, round(share * block.shape[1]))
                picked = rng.choice(block.shape[1], count, replace=False)
                block, part = block[:, picked], part[:, picked]
            parts[number % 2].add(block, part)
    found = [sums for sums in parts if sums.count]
    if not all(np.isfinite(held[0]).all() for sums in found for held in (sums.xtx, sums.xty)):
        raise InputError(f"{data.where}: values at {ir.label(node)} are not finite")
    return found


def _aim(node: ir.Node, known: Collection[str]) -> str:
    """What a node, with its bias, computes, as it is called among these names.

    A sum with a bias that an earlier refit put there has no name among them: it stands for the
    product.
    """
    sums = biased(node)
    name = "" if sums is None else sums[0].name or ""
    return name if name in known else node.outputs[0].name or ""


def _addition(node: ir.Node, order: dict[ir.Node, int]) -> tuple[ir.Node, ir.Value] | None:
    """The sum with an earlier value that a node's result goes into, and that value.

    Only where nothing else reads the result and the value is made by what has been refitted.
    """
    output = node.outputs[0]
    uses = list(output.uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add" or output.is_graph_output():
        return None
    add = uses[0].node
    other = add.inputs[1 - uses[0].idx]
    if other is None or other is output or ir.constant(other) is not None:
        return None
    mine, theirs = output.shape, other.shape
    if mine is None or theirs is None or list(mine) != list(theirs):
        return None
    seen: set[ir.Node] = set()
    stack = [other.producer()]
    while stack:
        earlier = stack.pop()
        if earlier is None or earlier in seen:
            continue
        seen.add(earlier)
        late = order.get(earlier, 0) > order[node]
        if earlier is node or (late and earlier.op_type in LINEAR):
            return None
        stack += [value.producer() for value in earlier.inputs if value is not None]
    return add, other


def _rows(node: ir.Node, target: Reals) -> Reals:
    """Results of a node as [groups, rows, out], to go with its columns."""
    if node.op_type in ("Conv", "ConvTranspose"):
        group = int(str(ir.attribute(node, "group", 1)))
        batch, channels = target.shape[:2]
        split = target.reshape(batch, group, channels // group, -1)
        return split.transpose(1, 0, 3, 2).reshape(group, -1, channels // group)
    return target.reshape(1, -1, target.shape[-1])


def _restate(model: ir.Model, node: ir.Node, data: Samples, options: Recovery) -> None:
    """Mean and variance of a BatchNormalization from what it now reads."""
    source, mean, variance = node.inputs[0], node.inputs[3], node.inputs[4]
    if source is None or ir.constant(mean) is None or ir.constant(variance) is None:
        return
    assert mean is not None and variance is not None
    if len(mean.uses()) > 1 or len(variance.uses()) > 1:
        return  # of another layer too, since what is equal was merged
    total, squares, count = np.zeros(1), np.zeros(1), 0
    for own in tap(model, [source], batched(model, data, options.batch), seconds=BATCH_SECONDS):
        x = own[source.name or ""].astype(np.float64)
        axes = (0, *range(2, x.ndim))
        total, squares = total + x.sum(axes), squares + np.square(x).sum(axes)
        count += x.size // x.shape[1]
    average = total / max(count, 1)
    spread = np.maximum(squares / max(count, 1) - average**2, 0)
    for value, array in ((mean, average), (variance, spread)):
        kind = ir.array(value)
        assert kind is not None
        value.const_value = ir.tensor(array.astype(kind.dtype), name=value.name)
