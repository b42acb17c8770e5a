"""A round of pruning: what goes, the model without it, and the proof that the rest is the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from graphopt import ir
from graphopt.closeness import Gauge
from graphopt.errors import InputError, VerificationError
from graphopt.pruner.adjusting import Kept
from graphopt.pruner.applying import apply, mask
from graphopt.pruner.atoms import Axis
from graphopt.pruner.criteria import DATA_CRITERIA, by_weights
from graphopt.pruner.estimating import Estimator, Size
from graphopt.pruner.groups import Groups, find_groups
from graphopt.pruner.measuring import by_activations, by_reconstruction
from graphopt.pruner.preparing import prepare
from graphopt.pruner.records import RECORD, Record, positions, record_of
from graphopt.pruner.selection import Scores, Selection, by_pattern, check_ratio, meet, select
from graphopt.pruner.sensitivity import Curves, path, scan
from graphopt.pruner.slopes import by_changes, by_gradients
from graphopt.pruner.splitting import layers, rank_of, saving, weight_shape
from graphopt.random_inputs import workable_feeds
from graphopt.runner import Runner
from graphopt.samples import Samples
from graphopt.shapes import Shapes

__all__ = [
    "Options",
    "Pruning",
    "Survey",
    "cut",
    "parse_ratios",
    "prune_once",
    "silent",
    "survey",
]

_CODES = 0.05
"""How far results of quantized models may be apart, beside the largest magnitude."""
_RANKED, _CHANGED = 256, 32
"""Samples that criteria look at, at most."""


@dataclass(frozen=True)
class Options:
    """How to prune; the fields of the pass `prune-channels` and the options of the command."""

    ratio: float = 0.5
    criterion: str = "l2"
    scope: str = "uniform"
    round_to: int = 0
    least: float = 0.1
    ignore: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    ratios: Mapping[str, float] = field(default_factory=dict[str, float])
    params: float = 0.0
    flops: float = 0.0
    size: float = 0.0
    exact: bool = False
    seed: int = 0
    scan: str = ""
    """File that keeps the sensitivity scan."""
    ranks: bool = False
    """With scope sensitivity, layers may also become two thinner ones, which recovery does."""

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        budgets = {"params": self.params, "flops": self.flops, "size": self.size}
        for name, share in budgets.items():
            if not 0 <= share < 1:
                raise InputError(f"{name} is the share to keep, between 0 and 1, not {share:g}")
        if self.scope not in ("uniform", "global", "sensitivity"):
            raise InputError(f"scope is uniform, global or sensitivity, not {self.scope!r}")
        if self.round_to < 0:
            raise InputError(f"round_to is at least 1, or 0 for a default, not {self.round_to}")
        if not 0 <= self.least < 1:
            raise InputError(
                f"least is a share to keep, at least 0 and below 1, not {self.least:g}"
            )

    @property
    def how(self) -> Selection:
        """What of it concerns counts."""
        return Selection(self.scope, self.round_to, self.least)


@dataclass
class Survey:
    """What can be pruned in a model and what it is worth, whatever the ratio or budget."""

    groups: Groups
    scores: Scores
    estimate: Estimator
    notes: list[str]
    layers: dict[str, ir.Node]
    """What can become two thinner layers, by the names that the scan has for them."""
    curves: Curves | None = None
    """Of the sensitivity scan, once it was asked for."""


@dataclass(frozen=True)
class Choice:
    """What goes: groups, by their representatives, and ranks of layers that become two."""

    gone: Axis
    ranks: dict[ir.Node, int] = field(default_factory=dict[ir.Node, int])


@dataclass
class Pruning:
    """A pruned model and what was done to get it."""

    model: ir.Model
    groups: Groups
    kept: Kept
    before: Size
    after: Size
    error: float | None = None
    """Largest difference from the masked original beside the largest magnitude; None where
    statistics run over what was pruned, so that the two are not the same."""
    notes: list[str] = field(default_factory=list[str])
    ranks: dict[ir.Node, int] = field(default_factory=dict[ir.Node, int])
    """Layers of the traced model that are to become two, with their ranks."""

    @property
    def changed(self) -> bool:
        """Whether anything went."""
        return bool(self.kept.gone.any()) or bool(self.ranks)

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """Groups of each family: how many there were, how many are left."""
        return {
            family.name: (len(family.roots), self.kept.count(family.roots))
            for family in self.groups.families
        }


def prune_once(
    model: ir.Model,
    options: Options,
    samples: Samples | None = None,
    *,
    progress: Callable[[str], None] | None = None,
    check: bool = True,
) -> Pruning:
    """Prune a model of the caller's own, which is prepared in place and not used further.

    With `check` the result is compared with the model in which all that is pruned is zero.

    Raises:
        InputError: options that do not fit the model, or nothing in it can be pruned.
        VerificationError: the result does not compute what the masked model computes.
    """
    tell = progress or silent
    return cut(survey(model, options, samples, tell), options, samples, tell, check=check)


def survey(
    model: ir.Model, options: Options, samples: Samples | None, tell: Callable[[str], None]
) -> Survey:
    """Trace and rank a model of the caller's own, which is prepared in place.

    Of the options only the criterion with its seed, and what is left alone, count.

    Raises:
        InputError: options that do not fit the model, or nothing in it can be pruned.
    """
    notes = prepare(model)
    tell("tracing what belongs together")
    groups = find_groups(model, ignore=options.ignore, only=options.only, exact=options.exact)
    if not groups.families:
        raise InputError(f"nothing can be pruned: {_why(groups)}")
    tell(f"ranking by {options.criterion}")
    found: dict[str, ir.Node] = {}
    if options.ranks and options.scope == "sensitivity" and not options.exact:
        found = layers(model, options.ignore, options.only)
    scores, estimate = rank(groups, options, samples, tell), Estimator(groups, samples)
    return Survey(groups, scores, estimate, notes, found)


def cut(
    found: Survey,
    options: Options,
    samples: Samples | None,
    tell: Callable[[str], None],
    *,
    check: bool = True,
) -> Pruning:
    """Prune what was surveyed, which can be done any number of times; see `prune_once`."""
    groups, estimate = found.groups, found.estimate
    choice = choose(found, options, samples, tell)
    kept = groups.kept(choice.gone)
    before, after = estimate(groups.kept(choice.gone[:0])), estimate(kept, choice.ranks)
    result = Pruning(
        apply(groups, kept),
        groups,
        kept,
        before,
        after,
        notes=list(found.notes),
        ranks=choice.ranks,
    )
    if check:
        tell("comparing with the masked original")
        result.error = _verify(result, samples)
    remember(result)
    return result


def silent(text: str) -> None:
    """The progress of who does not want to know."""


def _why(groups: Groups) -> str:
    reasons = sorted(set(groups.frozen.values()))
    if not reasons:
        return "no weight's channels are between inputs and outputs of the model"
    more = f"; {len(reasons) - 3} more reasons" if len(reasons) > 3 else ""
    return f"what keeps its channels is: {'; '.join(reasons[:3])}{more}"


def rank(
    groups: Groups, options: Options, samples: Samples | None, tell: Callable[[str], None]
) -> Scores:
    """Scores by the criterion that the options name."""
    if options.criterion not in DATA_CRITERIA:
        return by_weights(groups, options.criterion, options.seed)
    if samples is None:
        raise InputError(f"criterion {options.criterion!r} needs data: --data")
    if options.criterion == "reconstruction":
        return by_reconstruction(groups, samples.take(_RANKED), tell)
    if options.criterion == "taylor":
        return by_gradients(groups, samples.take(_RANKED), tell)
    if options.criterion == "hessian":
        return by_changes(groups, samples.take(_CHANGED), tell)
    return by_activations(groups, options.criterion, samples.take(_RANKED), tell)


def choose(
    found: Survey, options: Options, samples: Samples | None, tell: Callable[[str], None]
) -> Choice:
    """What goes: by ratio, or as little as a budget of parameters and operations allows."""
    groups, estimate = found.groups, found.estimate
    total = estimate(groups.kept(np.zeros(0, np.int64)))

    steps: list[tuple[str, float]] = []
    if options.scope == "sensitivity":
        steps = _steps(found, options, samples, tell)

    def by_ratio(ratio: float) -> Choice:
        if options.scope == "sensitivity":
            return _by_steps(found, options, steps[: round(ratio * len(steps))])
        ratios: Mapping[str, float] | float = ratio
        if options.ratios:
            ratios = by_pattern(groups, options.ratios, ratio)
        return Choice(select(groups, found.scores, ratios, options.how))

    def left(choice: Choice) -> Size:
        return estimate(groups.kept(choice.gone), choice.ranks)

    asked: list[tuple[float, Callable[[Choice], float]]] = [
        (options.params, lambda choice: left(choice).parameters / max(total.parameters, 1)),
        (options.flops, lambda choice: left(choice).flops / max(total.flops, 1)),
        (options.size, lambda choice: left(choice).bytes / max(total.bytes, 1)),
    ]
    budgets = [(limit, size) for limit, size in asked if limit]
    if not budgets:
        return by_ratio(options.ratio)
    ratio = max(meet(by_ratio, size, limit) for limit, size in budgets)
    taken = steps[: round(ratio * len(steps))]
    for place in range(len(taken) - 1, -1, -1):  # the dearest first: some may not have to go
        fewer = taken[:place] + taken[place + 1 :]
        less = _by_steps(found, options, fewer)
        if all(size(less) <= limit for limit, size in budgets):
            taken = fewer
    return _by_steps(found, options, taken) if steps else by_ratio(ratio)


def _steps(
    found: Survey, options: Options, samples: Samples | None, tell: Callable[[str], None]
) -> list[tuple[str, float]]:
    """Families and shares of them that go, in the order in which the outputs lose least."""
    if samples is None:
        raise InputError("scope sensitivity needs data: --data")
    groups = found.groups
    if found.curves is None:
        found.curves = scan(
            groups, found.scores, samples, options.how, tell, options.scan, found.layers
        )
    by = "parameters" if options.params or options.size else "flops"
    thin = found.layers if options.ranks else {}
    return path(groups, found.curves, found.estimate, options.how, by, thin)


def _by_steps(found: Survey, options: Options, steps: Sequence[tuple[str, float]]) -> Choice:
    """What has gone after some steps, but for families that have ratios given."""
    shares = {family.name: 0.0 for family in found.groups.families}
    for name, share in steps:
        shares[name] = max(shares.get(name, 0.0), share)
    ranks: dict[ir.Node, int] = {}
    for name, node in found.layers.items() if options.ranks else ():
        shape = weight_shape(node)
        share = shares.pop(name, 0.0)
        rank = rank_of(node, shape, share)
        if share and saving(node, shape, rank) is not None:
            ranks[node] = rank
    if options.ratios:
        fixed = by_pattern(found.groups, options.ratios, -1.0)
        shares.update({name: share for name, share in fixed.items() if share >= 0})
    return Choice(select(found.groups, found.scores, shares, options.how), ranks)


def _verify(pruning: Pruning, samples: Samples | None) -> float | None:
    """The largest relative difference between the pruned and the masked model."""
    groups, kept = pruning.groups, pruning.kept
    masked = mask(groups, kept)
    given = None if samples is None else next(iter(samples))
    feeds = workable_feeds(masked, Shapes(masked)) if given is None else given
    got = Runner(pruning.model).run(feeds)
    pruned = [f for f in groups.families if kept.gone[f.roots].any()]
    if not all(family.exact for family in pruned):
        pruning.notes.append(
            "statistics such as LayerNormalization's run over pruned channels, so that the result "
            "is not the masked original; recovery adapts it"
        )
        return None
    expected = Runner(masked).run(feeds)
    worst = 0.0
    quantized = any(node.op_type == "QuantizeLinear" for node in ir.all_nodes(masked))
    for name, value in expected.items():
        if quantized and _relative(value, got[name]) < _CODES:
            continue  # sums in another order round to the neighbouring code here and there
        gauge = Gauge(name)
        gauge.add(value, got[name])
        outcome = gauge.finish()
        if not outcome.ok:
            raise VerificationError(f"the pruned model is not the masked original: {outcome}")
        worst = max(worst, _relative(value, got[name]))
    return worst


def _relative(expected: object, got: object) -> float:
    """The largest difference of two arrays beside the largest magnitude."""
    if not isinstance(expected, np.ndarray) or not isinstance(got, np.ndarray):
        return 0.0  # sequences and maps, which were compared exactly
    one, other = cast("ir.Array", expected), cast("ir.Array", got)
    if one.dtype.kind not in "fiu" or not one.size or one.shape != other.shape:
        return 0.0 if np.array_equal(one, other) else 1.0
    a, b = one.astype(np.float64), other.astype(np.float64)
    finite = np.isfinite(a) & np.isfinite(b)
    gap = np.abs(np.where(finite, a - b, 0)).max()
    return float(gap / max(np.abs(np.where(finite, a, 0)).max(), 1e-30))


def remember(pruning: Pruning) -> None:
    """Note in the pruned model what is left of the first one, through all rounds."""
    earlier = record_of(pruning.groups.model)
    teacher = pruning.groups.model if earlier is None else earlier.teacher
    kept = positions(pruning.groups, pruning.kept, earlier)
    ranks = {node.outputs[0].name or "": rank for node, rank in pruning.ranks.items()}
    pruning.model.meta[RECORD] = Record(teacher, kept, ranks)


def parse_ratios(texts: Sequence[str]) -> dict[str, float]:
    """Ratios by pattern, of texts such as `conv1*=0.3`.

    Raises:
        InputError: a text of another form.
    """
    found: dict[str, float] = {}
    for text in texts:
        pattern, _, number = text.rpartition("=")
        try:
            found[pattern] = float(number)
        except ValueError:
            pattern = ""
        if not pattern:
            raise InputError(f"a ratio for some layers is written PATTERN=0.3, not {text!r}")
    return found
