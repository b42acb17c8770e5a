"""Groups of coupled indices that can be pruned, and what each of them holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.pruner.adjusting import Kept
from graphopt.pruner.atoms import Axis
from graphopt.pruner.rules_control import RULES
from graphopt.pruner.tracing import Trace
from graphopt.shapes import Shapes
from graphopt.wildcards import check, fits

__all__ = ["Family", "Groups", "Slot", "find_groups"]

_RETRACES = 6


@dataclass(frozen=True)
class Slot:
    """An axis of a constant: a place where atoms stand."""

    value: ir.Value
    axis: int
    reader: ir.Node | None = None
    """The product that sums over this axis of its weights; None where it is another axis."""


@dataclass
class Family:
    """Groups that stand in the same places, so that one measure fits them all."""

    name: str
    """The weight that makes these channels, or the first that has them."""
    slots: tuple[Slot, ...]
    roots: Axis
    """One atom per group."""
    exact: bool
    """Without a group the others are computed as before: no statistic runs over it."""
    width: int = 1
    """Channels per group, where it stands fewest: the size of a head, pixels of a position."""


@dataclass
class Groups:
    """Everything that can be pruned in a model, and why the rest cannot."""

    trace: Trace
    families: list[Family]
    frozen: dict[str, str] = field(default_factory=dict[str, str])
    """Weight and axis, such as `conv1.weight[0]` → why it stays as it is."""
    unknown: Counter[str] = field(default_factory=Counter[str])

    @property
    def model(self) -> ir.Model:
        """The model that was traced."""
        return self.trace.model

    def kept(self, pruned: Axis) -> Kept:
        """What is left of each axis without the groups of these atoms."""
        atoms = self.trace.atoms
        gone = np.zeros(len(atoms), np.bool_)
        gone[pruned] = True
        return Kept(self.trace, gone[atoms.roots(np.arange(len(atoms)))])


def find_groups(
    model: ir.Model, *, ignore: Sequence[str] = (), only: Sequence[str] = (), exact: bool = False
) -> Groups:
    """Trace a model that `prepare` has seen.

    `ignore` are patterns (`*` any text) of nodes and weights that stay as they are, `only` of those
    beside which everything stays; with `exact` statistics such as LayerNormalization's keep all
    that they run over.

    Raises:
        InputError: a pattern that matches nothing, or nothing that can be pruned.
    """
    shapes = Shapes(model)
    choices: dict[ir.Node, int] = {}
    best: Trace | None = None
    for _ in range(_RETRACES):
        trace = Trace(model, shapes, RULES, choices)
        trace.run()
        _freeze_constants(trace, ignore, only)
        best = trace
        retry = False
        for node, (index, candidates, axis) in trace.chosen.items():
            position = candidates.index(index)
            if not trace.atoms.live(axis) and position + 1 < len(candidates):
                choices[node] = candidates[position + 1]
                retry = True
        if not retry:
            break
    assert best is not None
    return _collect(best, exact)


def _freeze_constants(trace: Trace, ignore: Sequence[str], only: Sequence[str]) -> None:
    """Freeze what the caller names, and what is not told by weights."""
    check(trace.model, [*ignore, *only])
    for node in ir.all_nodes(trace.model):
        for value in node.inputs:
            if value is None or ir.constant(value) is None or value not in trace.axes:
                continue
            names = (value.name, ir.label(node))
            for pattern in ignore:
                if fits([pattern], *names):
                    trace.freeze(value, f"ignored by {pattern!r}")
            if only and not fits(only, *names) and len(trace.of(value)) > 1:
                trace.freeze(value, "not among those named")


def _collect(trace: Trace, exact: bool) -> Groups:
    """Families of groups that touch an activation and a weight of two axes or more."""
    atoms = trace.atoms
    everything = np.arange(len(atoms))
    roots = atoms.roots(everything)
    live = atoms.frozen(everything) == 0
    used = np.zeros(len(atoms), np.bool_)
    weighty = np.zeros(len(atoms), np.bool_)
    slots: list[Slot] = []
    for value, axes in trace.axes.items():
        tensor = ir.constant(value)
        for index, axis in enumerate(axes):
            if tensor is None:
                used[roots[axis]] = True
            elif len(axis) > 1:
                slots.append(Slot(value, index, _reader(value, index)))
                if len(axes) > 1 and tensor.dtype != ir.DataType.BOOL:
                    weighty[roots[axis]] = True
    doubted = atoms.inexact(everything)
    eligible = live & used & weighty
    if exact:
        eligible &= ~doubted
    found = _families(trace, slots, eligible, roots, doubted)
    return Groups(trace, found, _reasons(trace, slots, eligible, used, exact), trace.unknown)


def _families(
    trace: Trace,
    slots: list[Slot],
    eligible: npt.NDArray[np.bool_],
    roots: Axis,
    doubted: npt.NDArray[np.bool_],
) -> list[Family]:
    """Groups with the same places: told apart by a sum of random numbers, one per place."""
    rng = np.random.default_rng(0)
    marks = rng.integers(1, 1 << 62, len(slots), dtype=np.int64)
    keys = np.zeros(len(roots), np.int64)
    members: list[Axis] = []
    for slot, mark in zip(slots, marks, strict=True):
        own = np.unique(roots[trace.axes[slot.value][slot.axis]])
        own = own[eligible[own]]
        members.append(own)
        with np.errstate(over="ignore"):
            keys[own] += mark
    groups = np.flatnonzero(eligible & (roots == np.arange(len(roots))))
    _, first, inverse = np.unique(keys[groups], return_index=True, return_inverse=True)
    places = [list[Slot]() for _ in first.tolist()]
    lookup = np.full(len(roots), -1)
    lookup[groups] = inverse
    for slot, own in zip(slots, members, strict=True):
        numbers: list[int] = np.unique(lookup[own]).tolist()
        for index in numbers:
            places[index].append(slot)
    found: list[Family] = []
    for index, slots_of in enumerate(places):
        mine = groups[inverse == index]
        if len(mine) < 2:
            continue
        widths = [
            np.isin(roots[trace.axes[s.value][s.axis]], mine).sum() // len(mine) for s in slots_of
        ]
        found.append(
            Family(
                _title(slots_of),
                tuple(slots_of),
                mine,
                not bool(doubted[mine].any()),
                max(int(min(widths)), 1),
            )
        )
    return found


def _reader(value: ir.Value, axis: int) -> ir.Node | None:
    """The node that sums over an axis of its weights: an input channel."""
    sizes = value.const_value.shape.numpy() if value.const_value is not None else ()
    for use in value.uses():
        if use.idx != 1 or len(sizes) < 2:
            continue
        node = use.node
        depthwise = _group(node) > 1 and sizes[1] == 1
        summed = {
            "Conv": -1 if depthwise else 1,
            "ConvTranspose": 0,
            "Gemm": 1 if ir.attribute(node, "transB", 0) else 0,
            "MatMul": len(sizes) - 2,
        }
        if summed.get(node.op_type) == axis:
            return node
    return None


def _group(node: ir.Node) -> int:
    return int(str(ir.attribute(node, "group", 1)))


def _title(slots: Sequence[Slot]) -> str:
    wide = [s for s in slots if len(s.value.shape or ()) > 1] or list(slots)
    makers = [s for s in wide if s.reader is None] or wide
    return str(makers[0].value.name)


def _reasons(
    trace: Trace,
    slots: list[Slot],
    eligible: npt.NDArray[np.bool_],
    used: npt.NDArray[np.bool_],
    exact: bool,
) -> dict[str, str]:
    found: dict[str, str] = {}
    for slot in slots:
        axis = trace.axes[slot.value][slot.axis]
        roots = trace.atoms.roots(axis)
        if len(slot.value.shape or ()) < 2 or eligible[roots].any():
            continue
        numbers = trace.atoms.frozen(axis)
        reason = trace.atoms.reasons[int(numbers.max())] if numbers.any() else ""
        if not reason and exact and trace.atoms.inexact(axis).any():
            reason = "a statistic runs over it"
        if reason and used[roots].any():
            found[f"{slot.value.name}[{slot.axis}]"] = reason
    return found
