"""What the outputs lose where one family is pruned or one layer made two, and what follows."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from graphopt import atomic, files, ir
from graphopt.errors import InputError
from graphopt.gram import Gram
from graphopt.pruner.applying import apply
from graphopt.pruner.atoms import Axis
from graphopt.pruner.batching import batched
from graphopt.pruner.estimating import Estimator, Size, operations
from graphopt.pruner.fitting import Sums, augmented, can_fit, fit, put
from graphopt.pruner.groups import Groups
from graphopt.pruner.measuring import columns_left, family_grams, layer_grams
from graphopt.pruner.selection import Scores, Selection, least
from graphopt.pruner.slopes import distance, scores_of
from graphopt.pruner.splitting import rank_of, truncation, weight_shape
from graphopt.runner import BATCH_SECONDS, Runner
from graphopt.samples import Samples
from graphopt.taps import tapped

__all__ = ["SHARES", "Curves", "gap", "path", "scan"]

SHARES = (0.25, 0.5, 0.75)
Curves = dict[str, dict[float, float]]
"""Family or layer → share of it that goes → what the outputs lose, relative to their variance."""
Tell = Callable[[str], None]

_FITTED, _JUDGED = 192, 64
"""Samples that layers are refitted on, and others that the outputs are compared on."""
_FEWEST = 8
_EFFORT = 4e12
"""Operations that comparing takes, about; beyond that fewer outputs are compared."""
_RIDGE = 1e-3
_STEP = 1 / 16
_BATCH = 32


def scan(
    groups: Groups,
    scores: Scores,
    samples: Samples,
    how: Selection,
    tell: Tell,
    file: str = "",
    layers: Mapping[str, ir.Node] | None = None,
) -> Curves:
    """Prune each family by itself at several ratios, refit what reads it, and compare outputs.

    Layers, named as `graphopt.pruner.splitting` does, are approximated at as many ranks. Refitted
    on three quarters of the samples, 192 at most, compared on up to 64 of the rest.

    With a file the results are kept there as they come, and what is there already for the same
    model, data and ranking is not done again.

    Raises:
        InputError: a file that is none of this kind.
    """
    each = operations(groups.model, samples)
    names = [*(family.name for family in groups.families), *(layers or {})]
    fair = int(_EFFORT / max(each * len(SHARES) * len(names), 1))
    data = samples.take(_FITTED + _JUDGED)
    fitted = min(_FITTED, max(len(data) * 3 // 4, 1))
    judged = list(itertools.islice(data, fitted if fitted < len(data) else 0, None))
    judged = judged[: max(fair, _FEWEST)]
    key = _key(groups, scores, data, how)
    curves = _read(file, key)
    left = [name for name in names if len(curves.get(name, {})) != len(SHARES)]
    if not left:
        return curves
    before = list(_outputs(groups.model, judged))
    candidates = _candidates(groups, scores, data.take(fitted), how, tell, layers or {}, set(left))
    for name, models in candidates:
        tell(f"sensitivity {names.index(name) + 1} of {len(names)}: {name}")
        found: dict[float, float] = {}
        for share, model in models:
            pairs = zip(before, _outputs(model, judged), strict=True)
            found[share] = float(np.mean([distance(a, b) for a, b in pairs]))
        curves[name] = found
        if file:
            text = json.dumps({"key": key, "curves": curves}, indent=1).encode()
            _write(Path(file), text)
    return curves


def _candidates(
    groups: Groups,
    scores: Scores,
    data: Samples,
    how: Selection,
    tell: Tell,
    layers: Mapping[str, ir.Node],
    left: Collection[str],
) -> Iterator[tuple[str, Iterator[tuple[float, ir.Model]]]]:
    """Families and layers that have not been seen yet, each at several shares."""
    if any(family.name in left for family in groups.families):
        for family, inputs in family_grams(groups, data, tell):
            if family.name in left:
                cut = ((share, least(family, scores, share, how)) for share in SHARES)
                yield family.name, ((s, _refitted(groups, gone, inputs)) for s, gone in cut)
    names = {node: name for name, node in layers.items() if name in left}
    for node, gram in layer_grams(groups.model, list(names), data, tell):
        yield names[node], _thinned(groups.model, node, gram)


def _thinned(model: ir.Model, node: ir.Node, gram: Gram) -> Iterator[tuple[float, ir.Model]]:
    """A model with a layer that does what two of some rank would do, for each share."""
    found = truncation(node, gram.moment[0])
    for share in SHARES:
        twin = files.copy(model)
        (own,) = [n for n in twin.graph if n.outputs and n.outputs[0].name == node.outputs[0].name]
        rank = rank_of(node, weight_shape(node), share)
        put(twin, own, found.product(rank)[None])
        yield share, twin


def gap(model: ir.Model, other: ir.Model, samples: Samples) -> float:
    """What the outputs of another model lose on samples, as in the curves.

    Of probabilities it is what their Softmax is taken of: few samples judge that more steadily.
    """
    names, twins = (
        [scores_of(value).name or "" for value in each.graph.outputs] for each in (model, other)
    )
    if names != twins:
        names = [value.name or "" for value in model.graph.outputs]
    before, after = (_outputs(tapped(each, names), samples) for each in (model, other))
    return float(np.mean([distance(a, b) for a, b in zip(before, after, strict=True)]))


def _outputs(model: ir.Model, data: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The model's outputs, batch by batch."""
    runner = Runner(model, optimize=True, seconds=BATCH_SECONDS)
    for feeds in batched(model, data, _BATCH):
        yield runner.run(feeds)


def _write(file: Path, text: bytes) -> None:
    atomic.write(file, lambda out: out.write(text))


def _refitted(groups: Groups, gone: Axis, inputs: Mapping[ir.Node, Gram]) -> ir.Model:
    """A model without some groups of a family, what read them refitted to the whole inputs."""
    kept = groups.kept(gone)
    model = apply(groups, kept)
    twins = {node.outputs[0].name: node for node in model.graph if node.outputs}
    for node, gram in inputs.items():
        twin = twins[node.outputs[0].name]
        weights, fewer = ir.array(node.inputs[1]), ir.array(twin.inputs[1])
        left = columns_left(groups, kept, node)
        if weights is None or fewer is None or left is None or not can_fit(model, twin):
            continue
        whole = augmented(node, weights)
        if whole.shape[:2] == augmented(twin, fewer).shape[:2]:
            fit(model, twin, [Sums.of_fewer(gram, whole, left)], _RIDGE)
    return model


def _key(groups: Groups, scores: Scores, data: Samples, how: Selection) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{data.key} {how}".encode())
    for family in groups.families:
        digest.update(family.name.encode())
        digest.update(np.argsort(scores[family.roots], kind="stable").astype(np.int64).tobytes())
    return digest.hexdigest()


def _read(file: str, key: str) -> Curves:
    if not file or not Path(file).exists():
        return {}
    try:
        data = json.loads(Path(file).read_text(encoding="utf-8"))
        curves = cast("dict[str, dict[str, float]]", data["curves"])
        if data["key"] != key:
            return {}
        return {n: {float(s): float(d) for s, d in c.items()} for n, c in curves.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{file} holds no sensitivity scan: {error}") from error


def path(
    groups: Groups,
    curves: Curves,
    estimate: Estimator,
    how: Selection,
    by: str,
    layers: Mapping[str, ir.Node],
) -> list[tuple[str, float]]:
    """Steps, each a family or layer and the share of it that goes then, the cheapest first.

    A step costs what the outputs lose by it for what it saves of `by`: `parameters` or `flops`.
    """
    nothing = groups.kept(np.zeros(0, np.int64))
    whole = _measure(estimate(nothing), by)
    halved: dict[str, Size] = {}
    for family in groups.families:
        half = family.roots[: len(family.roots) // 2]
        halved[family.name] = estimate(groups.kept(half))
    for name, node in layers.items():
        rank = rank_of(node, weight_shape(node), 0.5)
        halved[name] = estimate(nothing, {node: rank})
    steps: list[tuple[float, float, str]] = []
    for name, size in halved.items():
        saved = 2 * (whole - _measure(size, by)) / max(whole, 1)
        curve = curves[name]
        shares = np.arange(_STEP, 1 - how.least + 1e-9, _STEP)
        losses = np.interp(shares, [0.0, *SHARES], [0.0, *(curve[s] for s in SHARES)])
        beyond = shares > SHARES[-1]
        slope = max(curve[SHARES[-1]] - curve[SHARES[-2]], 0.0) / (SHARES[-1] - SHARES[-2])
        losses = losses + np.where(beyond, 2 * slope * (shares - SHARES[-1]), 0.0)
        rate = np.diff(np.maximum.accumulate(np.concatenate([[0.0], losses])))
        price = np.maximum.accumulate(rate) / max(saved * _STEP, 1e-12)
        steps += [(float(p), float(s), name) for p, s in zip(price, shares, strict=True)]
    return [(name, share) for _, share, name in sorted(steps)]


def _measure(size: Size, by: str) -> int:
    return size.parameters if by == "parameters" else size.flops
