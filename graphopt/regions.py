"""Compare two models only where they differ, by parts small enough to run.

`graphopt.cutting` finds the claims; each is checked by running what stands between it and the
values that both models have, in both models, on the same inputs of that part. These are

* real: taken from a run of the original, as far as it leads up to the region, or
* random, of the right types and shapes, where the original is too large or cannot be run.

Random values may be impossible ones: an index beyond its table, two inputs that belong together.
So a part is first made larger until no input of it depends on another one, and a claim that fails
on random values is checked again on real ones, if that can be. A claim about a value inside that
fails is dropped and its region merged with those that follow, since passes may use a name again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np

from graphopt import ir
from graphopt.cutting import Claim, Cut, Part, close, extract, whole
from graphopt.dims import Dim, evaluate
from graphopt.errors import GraphoptError
from graphopt.feeds import random_feeds
from graphopt.judging import Feeds, Outputs, Trial, Verdict, computed_types, judge
from graphopt.report import Comparison, OutputComparison
from graphopt.shapes import Shapes

Mode = Literal["real", "random"]

_SHARE = 0.1  # of the tolerance for whole networks: a region is a few operators deep
_ROUNDS = 4  # of dropping claims
BUDGET = 1 << 30  # bytes that one group of claims may hold at a time
_UNKNOWN_BYTES = 1 << 20  # taken for a value of unknown size
_UNNAMED_SIZE = 3  # taken for a dimension that no input tells
_MOST_NODES = 400  # beyond those of the regions, that make their inputs independent


@dataclass(frozen=True)
class Options:
    """How regions are compared."""

    feeds: Feeds
    """Inputs of the original: for real values, and for the sizes of random ones."""
    seed: int = 0
    tolerance: float | None = None
    threads: int = 1
    budget: int = BUDGET
    """Bytes of weights and values that the regions run at a time may have."""
    modes: tuple[Mode, ...] = ("real", "random")
    """The ways to come by inputs of regions, in the order in which they are tried."""


def compare_regions(cut: Cut, options: Options, shapes: Shapes) -> Comparison:
    """Compare the regions in which two models differ; `shapes` are those of the first one.

    The result lists the outputs that are computed alike in both, and every value inside up to
    which a region was compared. `signature` is left to the caller.
    """
    ends = [value.name or "" for value in cut.b.graph.outputs]
    checks = _Checks(cut, options, shapes)
    checks.run()
    apart = [output for output in checks.outputs if not output.ok and not output.reason]
    for attempt in range(_ROUNDS):
        doubtful = checks.doubtful.difference(ends)
        if not doubtful:
            break
        inside = {claim.name for claim in cut.claims}.difference(ends)
        dropped = doubtful if attempt < _ROUNDS - 2 else inside
        cut = Cut(cut.a, cut.b, cut.dropped | dropped)
        checks = _Checks(cut, options, shapes)
        checks.run()
    claimed = {claim.name for claim in cut.claims}
    alike = [OutputComparison(n, note="computed alike") for n in ends if n not in claimed]
    unchecked = [f"{name}: {reason}" for name, reason in checks.unchecked.items()]
    if all(output.telling for output in checks.outputs if output.name in ends):
        apart = []  # the outputs tell that a name was used again for something else
    result = Comparison("regions", outputs=[*alike, *checks.outputs, *apart], unchecked=unchecked)
    result.notes += checks.notes()
    result.settle()
    return result


class _Checks:
    """The claims of a cut, checked group by group."""

    def __init__(self, cut: Cut, options: Options, shapes: Shapes) -> None:
        self.outputs: list[OutputComparison] = []
        self.unchecked: dict[str, str] = {}
        self._cut, self._options = cut, options
        self._ran: Counter[str] = Counter()
        self._shapes = shapes
        self._sizes = named_sizes(cut.a, shapes, options.feeds)
        self._computed = computed_types(cut.a) | computed_types(cut.b)

    def run(self) -> None:
        """Check every claim; one that cannot be is named in `unchecked`."""
        for claims in self._groups():
            self._check(claims)

    @property
    def doubtful(self) -> set[str]:
        """Claims that do not hold, or that nothing can be said of."""
        return {output.name for output in self.outputs if not output.ok} | set(self.unchecked)

    def notes(self) -> list[str]:
        """What was run, and on which values."""
        return [f"{n} regions were compared on {mode} values" for mode, n in self._ran.items()]

    def _groups(self) -> Iterator[list[Claim]]:
        """Claims in order, as many at a time as the budget allows."""
        group: list[Claim] = []
        held = 0
        for claim in self._cut.claims:
            part = self._cut.after([claim])
            needs = sum(map(self._bytes, (claim.before, *part.inputs, *part.constants)))
            if group and held + needs > self._options.budget:
                yield group
                group, held = [], 0
            group.append(claim)
            held += needs
        if group:
            yield group

    def _check(self, claims: Sequence[Claim]) -> None:
        """Compare a group in the first way that works and leaves no doubt, or claim by claim."""
        reason, doubted = "", None
        for mode in self._options.modes:
            try:
                verdict, independent = self._compare(claims, mode)
            except GraphoptError as error:
                reason = str(error)
                continue
            wrong = next((str(output) for output in verdict.outputs if not output.ok), None)
            if wrong is not None and mode == "random":
                reason = f"{wrong}, but on random values, which may be impossible ones"
                doubted = verdict if independent else None
                continue
            self._accept(verdict, mode, len(claims))
            return
        if doubted is not None:
            self._accept(doubted, "random", len(claims))
            return
        if len(claims) == 1:
            self.unchecked[claims[0].name] = reason
            return
        half = len(claims) // 2
        self._check(claims[:half])
        self._check(claims[half:])

    def _accept(self, verdict: Verdict, mode: Mode, regions: int) -> None:
        self.outputs += verdict.outputs
        self.unchecked |= verdict.unchecked
        self._ran[mode] += regions

    def _compare(self, claims: Sequence[Claim], mode: Mode) -> tuple[Verdict, bool]:
        """The verdict on a group, and whether the values that it was run on are possible ones.

        Raises GraphoptError where the original's part cannot be run.
        """
        after = self._cut.after(claims)
        twins = [self._cut.twin(value) for value in after.inputs]
        twins += [claim.twin for claim in claims]
        wanted = [value for value in twins if value is not None]
        part, possible = self._before(claims, wanted, mode)
        values, trial = self._original(part, [*(claim.before for claim in claims), *wanted], mode)
        expected = {claim.name: values[claim.before] for claim in claims}
        try:
            got = self._changed(claims, after, values)
        except GraphoptError as error:
            reason = f"the result does not run: {error}"
            wrong = [OutputComparison(claim.name, ok=False, reason=reason) for claim in claims]
            return Verdict(wrong), possible
        verdict = judge(
            trial,
            [expected],
            [got],
            computed=self._computed,
            tolerance=self._options.tolerance,
            share=_SHARE,
        )
        return verdict, possible

    def _before(
        self, claims: Sequence[Claim], wanted: Sequence[ir.Value], mode: Mode
    ) -> tuple[Part, bool]:
        if mode == "real":
            return whole([*(claim.before for claim in claims), *wanted]), True
        part = self._cut.before(claims, wanted)
        return part, close(part, self._cut.a.graph, len(part.nodes) + _MOST_NODES)

    def _original(
        self, part: Part, wanted: Sequence[ir.Value], mode: Mode
    ) -> tuple[dict[ir.Value, object], Trial | None]:
        """All wanted values of the original, its inputs among them, and how they were made."""
        outputs = list(dict.fromkeys(value for value in wanted if part.computes(value)))
        outputs = [value for value in outputs if ir.constant(value) is None]
        types = {v: ir.TensorType(t) for v in part.inputs if (t := self._shapes.dtype(v))}
        model = extract(self._cut.a, part, outputs, types if mode == "random" else {})
        inputs = self._random(part, model) if mode == "random" else self._given(part)
        names = [value.name or "" for value in model.graph.inputs]
        trial = Trial(
            model, [dict(zip(names, inputs.values(), strict=True))], self._options.threads
        )
        results: Outputs = trial.run()[0] if outputs else {}
        values: dict[ir.Value, object] = {value: ir.array(value) for value in wanted}
        values.update(inputs)
        values.update((value, results[value.name or ""]) for value in outputs)
        return values, trial if outputs else None

    def _changed(
        self, claims: Sequence[Claim], part: Part, values: Mapping[ir.Value, object]
    ) -> dict[str, object]:
        """What the second model makes of the claims. Raises GraphoptError where it does not run."""
        got: dict[str, object] = {}
        run: list[ir.Value] = []
        for claim in claims:
            if claim.twin is not None:
                got[claim.name] = values[claim.twin]
            elif ir.constant(claim.after) is not None:
                got[claim.name] = ir.array(claim.after)
            else:
                run.append(claim.after)
        if run:
            fed = {v: values[t] for v in part.inputs if (t := self._cut.twin(v)) is not None}
            types = {v: kind for v, array in fed.items() if (kind := _type_of(array)) is not None}
            model = extract(self._cut.b, part, run, types)
            feeds = {
                new.name or "": cast(ir.Array, fed[old])
                for old, new in zip(part.inputs, model.graph.inputs, strict=True)
                if old in fed
            }
            got.update(Trial(model, [feeds], self._options.threads).run()[0])
        return got

    def _given(self, part: Part) -> dict[ir.Value, ir.Array]:
        """The original's own inputs; one that is left out has a default."""
        values: dict[ir.Value, ir.Array] = {}
        for value in part.inputs:
            fed = self._options.feeds.get(value.name or "")
            if fed is None and value.const_value is not None:
                fed = value.const_value.numpy()
            if fed is None:
                raise GraphoptError(f"no values are given for input {value.name!r}")
            values[value] = fed
        return values

    def _random(self, part: Part, model: ir.Model) -> dict[ir.Value, ir.Array]:
        """Values for the inputs of a part of the original; those that are known, as they are."""
        declared = [value.shape for value in model.graph.inputs]
        for value, new in zip(part.inputs, model.graph.inputs, strict=True):
            shape = self._shape(value)
            if shape is None or new.type is None:
                raise GraphoptError(f"the type or rank of {value.name!r} is not known")
            new.shape = ir.Shape(shape)
        feeds = random_feeds(model, Shapes(model), seed=self._options.seed)
        for new, before in zip(model.graph.inputs, declared, strict=True):
            new.shape = before
        values: dict[ir.Value, ir.Array] = {}
        for value, new in zip(part.inputs, model.graph.inputs, strict=True):
            known, dtype = self._shapes.values(value), self._shapes.dtype(value)
            if known is None or dtype is None:
                values[value] = feeds[new.name or ""]
                continue
            flat = [evaluate(item, self._sizes, _UNNAMED_SIZE) for item in known.ravel().tolist()]
            values[value] = np.asarray(flat, dtype.numpy()).reshape(known.shape)
        return values

    def _bytes(self, value: ir.Value) -> int:
        constant = ir.constant(value)
        if constant is not None:
            return constant.nbytes
        dtype, shape = self._shapes.dtype(value), self._shape(value)
        if dtype is None or shape is None:
            return _UNKNOWN_BYTES
        bits = 8 if dtype == ir.DataType.STRING else dtype.bitwidth
        return math.prod(shape) * int(bits) // 8

    def _shape(self, value: ir.Value) -> tuple[int, ...] | None:
        shape = self._shapes.shape(value)
        if shape is None:
            return None
        return tuple(max(0, evaluate(dim, self._sizes, _UNNAMED_SIZE)) for dim in shape)


def named_sizes(model: ir.Model, shapes: Shapes, feeds: Feeds) -> dict[str, int]:
    """Numbers of the symbolic sizes of a model's inputs, by name, as the feeds have them."""
    sizes: dict[str, int] = {}
    for value in model.graph.inputs:
        fed, shape = feeds.get(value.name or ""), shapes.shape(value)
        if isinstance(fed, np.ndarray) and shape is not None:
            for size, number in zip(shape, fed.shape, strict=False):
                atom = size.atom() if isinstance(size, Dim) else None
                if atom is not None:
                    sizes.setdefault(atom.name, number)
    return sizes


def _type_of(value: object) -> ir.TypeProtocol | None:
    if not isinstance(value, np.ndarray):
        return None
    array = cast(ir.Array, value)
    text = array.dtype.kind in "OUS"
    return ir.TensorType(ir.DataType.STRING if text else ir.DataType.from_numpy(array.dtype))
