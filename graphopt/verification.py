"""Whether one model may stand in for another: same signature, same results.

`compare` runs both models on the same inputs with ONNX Runtime's CPU kernels, graph optimizations
off. Three things can come of an output: it agrees, it differs, or it could not be checked. The
last is never reported as the first. `graphopt.closeness` defines the figures, `graphopt.judging`
what is done about models that are unsteady themselves.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from graphopt import ir
from graphopt.errors import GraphoptError
from graphopt.feeds import random_feeds
from graphopt.files import ModelLike, load
from graphopt.judging import Feeds, Trial, computed_types, judge
from graphopt.report import Comparison, OutputComparison
from graphopt.shapes import Shapes


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
        memory_limit: bytes; where a whole run would need more, only changed regions are run.
        threads: of ONNX Runtime, within one operator.

    Neither model is changed. Nothing is raised for a model that cannot be run: what could not be
    compared is named in the result.
    """
    start = time.perf_counter()
    result = Comparison("whole", signature=signature_breaks(a, b))
    runs = _feeds(a, feeds, seed)
    _whole(result, Trial(a, runs, threads), Trial(b, runs, threads), tolerance)
    result.settle()
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
    """Compare a model before and after a pass; arguments as for `compare`."""
    return compare(
        before,
        after,
        feeds=feeds,
        seed=seed,
        tolerance=tolerance,
        memory_limit=memory_limit,
        threads=threads,
    )


def _whole(result: Comparison, a: Trial, b: Trial, tolerance: float | None) -> None:
    """Both models, from their inputs to their outputs."""
    names = [output.name or "" for output in a.model.graph.outputs]
    try:
        expected = a.run()
    except GraphoptError as error:
        result.how = f"not run: {error}"
        result.unchecked += [f"{name}: the original does not run" for name in names]
        return
    try:
        got = b.run()
    except GraphoptError as error:
        reason = f"the result does not run: {error}"
        result.outputs = [OutputComparison(name, ok=False, reason=reason) for name in names]
        return
    computed = computed_types(a.model) | computed_types(b.model)
    verdict = judge(a, expected, got, computed=computed, tolerance=tolerance)
    result.outputs, result.unchecked = verdict.outputs, verdict.unchecked


def _feeds(model: ir.Model, feeds: Feeds | Sequence[Feeds] | None, seed: int) -> Sequence[Feeds]:
    if feeds is None:
        return [random_feeds(model, Shapes(model), seed=seed)]
    return feeds if isinstance(feeds, Sequence) else [feeds]


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
