"""Whether one model may stand in for another: same signature, same results.

`compare` runs both models on the same inputs with ONNX Runtime's CPU kernels, graph optimizations
off. Three things can come of an output: it agrees, it differs, or it could not be checked. The
last is never reported as the first. `graphopt.closeness` defines the figures, `graphopt.judging`
what is done about models that are unsteady themselves.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import cached_property

from graphopt import ir
from graphopt.cost import ModelCost, model_cost
from graphopt.cutting import Cut
from graphopt.dims import atoms
from graphopt.errors import GraphoptError, TimeLimitError
from graphopt.feeds import random_feeds, workable_feeds
from graphopt.files import ModelLike, load
from graphopt.judging import Feeds, Outputs, Trial, computed_types, judge
from graphopt.regions import BUDGET, Mode, Options, compare_regions, named_sizes
from graphopt.report import Comparison, OutputComparison
from graphopt.runner import Runner, memory_guard
from graphopt.shapes import Shapes

_BASE_BYTES = 256 << 20
_WEIGHT_COPIES = 3  # ours, ONNX Runtime's, and that in the order in which its kernels read
_BYTES_PER_WEIGHT = 200
_MOST_FLOPS = 10**10  # about a second: beyond it runs are few and small
_MOST_SHARE = 0.5  # of a model's nodes, beyond which running it whole is cheaper than by regions


def verify(
    a: ModelLike,
    b: ModelLike,
    *,
    feeds: Feeds | Sequence[Feeds] | None = None,
    seed: int = 0,
    tolerance: float | None = None,
    memory_limit: int | None = None,
    threads: int = 1,
) -> Comparison:
    """`compare` for models given as paths, protos or IR.

    Raises:
        InputError: a file that is no model.
    """
    return compare(
        load(a),
        load(b),
        feeds=feeds,
        seed=seed,
        tolerance=tolerance,
        memory_limit=memory_limit,
        threads=threads,
    )


def compare(
    a: ir.Model,
    b: ir.Model,
    *,
    feeds: Feeds | Sequence[Feeds] | None = None,
    seed: int = 0,
    tolerance: float | None = None,
    memory_limit: int | None = None,
    threads: int = 1,
) -> Comparison:
    """Run `a` (the original) and `b` on the same inputs and compare their outputs by name.

    Args:
        feeds: inputs by name, or several such; random ones from `seed` where None.
        tolerance: replaces the limit that follows from the outputs' types (`closeness.Tolerance`).
        memory_limit: bytes; where a whole run would need more, only changed regions are run. By
            default 256 MiB and 200 times the weights, at most half of what the machine has free:
            a file of 250 bytes may ask for terabytes.
        threads: of ONNX Runtime, within one operator.

    Neither model is changed. Nothing is raised for a model that cannot be run: what could not be
    compared is named in the result.
    """
    start = time.perf_counter()
    pair = _Pair(a, b, seed, tolerance, memory_limit, threads)
    result = pair.guarded(lambda: pair.compare(feeds))
    result.seconds = time.perf_counter() - start
    return result


def verify_changes(
    before: ir.Model,
    after: ir.Model,
    *,
    feeds: Feeds | None = None,
    seed: int = 0,
    tolerance: float | None = None,
    memory_limit: int | None = None,
    threads: int = 1,
) -> Comparison:
    """Compare a model before and after a pass, at a cost that goes with what the pass changed.

    Arguments as for `compare`. Only the changed regions are run, on random values where these
    leave no doubt; the whole models only where regions cannot be compared.
    """
    start = time.perf_counter()
    pair = _Pair(before, after, seed, tolerance, memory_limit, threads)
    result = pair.guarded(lambda: pair.changes(feeds))
    result.seconds = time.perf_counter() - start
    return result


class _Pair:
    """Two models to compare, and how."""

    def __init__(
        self,
        a: ir.Model,
        b: ir.Model,
        seed: int,
        tolerance: float | None,
        memory_limit: int | None,
        threads: int,
    ) -> None:
        self._a, self._b = a, b
        self._seed, self._tolerance, self._threads = seed, tolerance, threads
        self.limit = memory_limit if memory_limit is not None else _default_limit(a)
        self._signature = signature_breaks(a, b)

    @cached_property
    def _cost(self) -> ModelCost:
        """Of the original, at the sizes of random inputs."""
        try:
            sizes = named_sizes(self._a, self._shapes, random_feeds(self._a, self._shapes))
        except GraphoptError:
            sizes = {}
        return model_cost(self._a, self._shapes, sizes)

    @cached_property
    def fits(self) -> bool:
        """Whether the weights and activations of a whole run are within the memory limit."""
        need = _WEIGHT_COPIES * self._cost.weight_bytes + self._cost.peak_bytes
        return need <= self.limit

    @cached_property
    def _quick(self) -> bool:
        """Whether a run is short enough to be done at a second size."""
        return self._cost.flops <= _MOST_FLOPS

    @cached_property
    def cut(self) -> Cut:
        """Where the two differ."""
        return Cut(self._a, self._b)

    @cached_property
    def _shapes(self) -> Shapes:
        return Shapes(self._a)

    def guarded(self, run: Callable[[], Comparison]) -> Comparison:
        """What `run` finds, unless it needs more memory than the limit."""
        try:
            with memory_guard(self.limit):
                return run()
        except MemoryError:
            result = Comparison("not run: it needs more memory than the limit")
            result.signature = self._signature
            result.settle()
            return result

    def compare(self, feeds: Feeds | Sequence[Feeds] | None) -> Comparison:
        """Whole where that is possible, by regions otherwise."""
        one = None if feeds is None else feeds[0] if isinstance(feeds, Sequence) else feeds
        if not self.fits:
            result = self.regions(one, ("random",))
            result.notes.insert(0, "the whole model needs more memory than the limit")
            return result
        try:
            result = self._whole(feeds)
        except (GraphoptError, MemoryError) as error:
            costly = isinstance(error, TimeLimitError | MemoryError) or "alloc" in str(error)
            reason = str(error) or "it needs more memory than the limit"
            result = self.regions(one, ("random",) if costly else ("real", "random"))
            result.notes.insert(0, f"the original was not run whole: {reason}")
            return result
        if result.unchecked and not result.different:
            regional = self.regions(one, ("real",))
            if regional.ok:
                regional.notes += [f"of the whole models: {reason}" for reason in result.unchecked]
                return regional
        dull = [output.name for output in result.outputs if not output.telling]
        if result.ok and dull:
            regional = self.regions(one, ("random", "real"))
            result.notes.append(f"compared by regions, too: {', '.join(dull)} hardly varies")
            return regional if regional.different else result
        return result

    def changes(self, feeds: Feeds | None) -> Comparison:
        """By regions where these are small and leave no doubt, whole otherwise."""
        if self.fits and self.cut.share() > _MOST_SHARE:
            return self.compare(feeds)
        modes: tuple[Mode, ...] = ("random", "real") if self.fits else ("random",)
        result = self.regions(feeds, modes)
        larger = self.larger() if feeds is None and result.ok else None
        if larger is not None:
            other = self.regions(larger, modes)
            result = other if other.different else result
        return self.compare(feeds) if result.unchecked and self.fits else result

    def _whole(self, feeds: Feeds | Sequence[Feeds] | None) -> Comparison:
        """Both models, from inputs to outputs. Raises GraphoptError if the original cannot run."""
        result = Comparison("whole", signature=self._signature)
        runs: Sequence[Feeds]
        expected: Sequence[Outputs]
        if feeds is None:
            runs, expected = self._random()
        else:
            runs = feeds if isinstance(feeds, Sequence) else [feeds]
            expected = Trial(self._a, runs, self._threads).run()
        trial = Trial(self._a, runs, self._threads)
        try:
            got = Trial(self._b, runs, self._threads).run()
        except GraphoptError as error:
            reason = f"the result does not run: {error}"
            names = [output.name or "" for output in self._a.graph.outputs]
            result.outputs = [OutputComparison(name, ok=False, reason=reason) for name in names]
        else:
            computed = computed_types(self._a) | computed_types(self._b)
            verdict = judge(trial, expected, got, computed=computed, tolerance=self._tolerance)
            result.outputs = verdict.outputs
            result.unchecked = [f"{name}: {why}" for name, why in verdict.unchecked.items()]
        result.settle()
        return result

    def regions(self, feeds: Feeds | None, modes: tuple[Mode, ...]) -> Comparison:
        """Only where the models differ."""
        given: Feeds = {}
        notes: list[str] = []
        try:
            given = self._feeds(feeds)
        except GraphoptError as error:
            modes = tuple(mode for mode in modes if mode == "random")
            notes = [f"no inputs could be made: {error}"]
        budget = min(BUDGET, self.limit // 2)
        options = Options(given, self._seed, self._tolerance, self._threads, budget, modes)
        result = compare_regions(self.cut, options, self._shapes)
        result.signature = self._signature
        result.notes += notes
        result.settle()
        return result

    def _feeds(self, feeds: Feeds | None) -> Feeds:
        return self._workable if feeds is None else feeds

    @cached_property
    def _workable(self) -> Feeds:
        make = workable_feeds if self.fits else random_feeds
        return make(self._a, self._shapes, seed=self._seed, bindings=self._small)

    @cached_property
    def _small(self) -> dict[str, int]:
        """Batches of one, for a model that takes long."""
        if self._quick:
            return {}
        leading = (self._shapes.shape(value) for value in self._a.graph.inputs)
        return {atom.name: 1 for shape in leading if shape for atom in atoms(shape[0])}

    def _random(self) -> tuple[Sequence[Feeds], Sequence[Outputs]]:
        """Inputs of one size, and of another where sizes are free and that works; what comes out.

        Raises GraphoptError where the original does not run on any.
        """
        runner = Runner(self._a, threads=self._threads)
        feeds: Feeds = random_feeds(self._a, self._shapes, seed=self._seed, bindings=self._small)
        try:
            outputs = [runner.run(feeds)]
        except TimeLimitError:
            raise
        except GraphoptError:
            feeds = self._workable
            outputs = [runner.run(feeds)]
        larger = self.larger(feeds)
        if larger is None:
            return [feeds], outputs
        try:
            return [feeds, larger], [*outputs, runner.run(larger)]
        except GraphoptError:
            return [feeds], outputs

    def larger(self, feeds: Feeds | None = None) -> Feeds | None:
        """Random inputs with every free size one more than in `feeds`; None without free sizes.

        What a pass took for fixed although it is not shows at the second size.
        """
        if not self._quick:
            return None
        try:
            sizes = named_sizes(self._a, self._shapes, self._feeds(feeds))
            if not sizes:
                return None
            bindings = {name: size + 1 for name, size in sizes.items()}
            return random_feeds(self._a, self._shapes, seed=self._seed + 1, bindings=bindings)
        except GraphoptError:
            return None


def _default_limit(model: ir.Model) -> int:
    tensors = ir.constants(model)
    weights = sum(t.nbytes for t in tensors if t.dtype != ir.DataType.STRING)
    limit = _BASE_BYTES + _BYTES_PER_WEIGHT * weights
    try:
        return min(limit, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    except (ValueError, OSError, AttributeError):
        return limit


def signature_breaks(a: ir.Model, b: ir.Model) -> list[str]:
    """Why `b` cannot stand in for `a`, one line each; empty where it can.

    `b` must have the same inputs and outputs in the same order and of the same types, take every
    shape that `a` takes, and promise of its outputs what `a` promises. So a fixed dimension of an
    input may become free but not the other way round, and a fixed dimension of an output must
    stay; a free one of an output may be known better. An input with a default may not become
    required.
    """
    breaks = _breaks("input", a.graph.inputs, b.graph.inputs)
    breaks += _breaks("output", a.graph.outputs, b.graph.outputs)
    optional = set(a.graph.initializers)
    for value in b.graph.inputs:
        if value.name in optional and value.name not in b.graph.initializers:
            breaks.append(f"input {value.name} had a default and has none now")
    return breaks


def _breaks(kind: str, before: Sequence[ir.Value], after: Sequence[ir.Value]) -> list[str]:
    old, new = [v.name or "" for v in before], [v.name or "" for v in after]
    if sorted(old) != sorted(new):
        lost, added = sorted(set(old) - set(new)), sorted(set(new) - set(old))
        said = [f"lost {', '.join(lost)}"] if lost else []
        said += [f"gained {', '.join(added)}"] if added else []
        return [f"{kind}s {' and '.join(said) or 'differ in number'}"]
    if old != new:
        return [f"{kind}s changed their order: {', '.join(old)} became {', '.join(new)}"]
    breaks: list[str] = []
    for one, other in zip(before, after, strict=True):
        where = f"{kind} {one.name}"
        if one.type is not None and one.type != other.type:
            breaks.append(f"{where} has type {other.type}, was {one.type}")
        elif not _fits(one.shape, other.shape, widen=kind == "input"):
            breaks.append(f"{where} has shape {other.shape}, was {one.shape}")
    return breaks


def _fits(before: ir.Shape | None, after: ir.Shape | None, *, widen: bool) -> bool:
    """Whether a declared shape keeps what another one promised.

    `widen`: fixed sizes may become free (an input's); otherwise free ones may become fixed.
    """
    if before is None or after is None:
        return after is None if widen else before is None
    if len(before) != len(after):
        return False
    for old, new in zip(before, after, strict=True):
        fixed, now = isinstance(old, int), isinstance(new, int)
        if (fixed and now and old != new) or (fixed != now and now == widen):
            return False
    return True
