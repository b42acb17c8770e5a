"""Converters of ai.onnx.ml: ensembles of decision trees, and what stands around them.

All trees are walked at once, a level at a time, by looking up the nodes that have been reached
(Nakandala et al., "A tensor compiler for unified machine learning prediction serving", 2020);
leaves lead to themselves. All levels are one kernel, which is left as it is: a level that was
computed where it is read would be computed again for each use.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.backends._tvm_call import Call, is_constant
from graphopt.backends._tvm_indices import number
from graphopt.backends._tvm_schedule import DONE

relax: Any = importlib.import_module("tvm.relax")
te: Any = importlib.import_module("tvm.te")
tirx: Any = importlib.import_module("tvm.tirx")
_op: Any = relax.op

_COMPARISONS = {
    "BRANCH_LEQ": tirx.LE,
    "BRANCH_LT": tirx.LT,
    "BRANCH_GTE": tirx.GE,
    "BRANCH_GT": tirx.GT,
}
_TRANSFORMS = {"SOFTMAX": _op.nn.softmax, "LOGISTIC": _op.sigmoid}
_MOST_WEIGHTS = 1 << 24
_OPAQUE = 8
"""TVM's number for operators that are not fused: a walk would be repeated for every score."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Forest:
    """Nodes of all trees, one after the other."""

    roots: Ints
    """Per tree, its first node."""
    features: Ints
    thresholds: Floats
    yes: Ints
    """Where a node leads if its comparison holds; a leaf to itself."""
    no: Ints
    depth: int
    compare: Any
    numbers: dict[tuple[int, int], int]
    """Nodes by tree and number in it."""


def regressor(call: Call) -> Any:
    """TreeEnsembleRegressor: the sums of the leaves' weights.

    Raises:
        NotImplementedError: comparisons of several kinds, lost values, other aggregates.
    """
    forest = _forest(call)
    targets = int(call.attribute("n_targets", 1))
    how = _text(call.attribute("aggregate_function", "SUM"))
    if how not in ("SUM", "AVERAGE"):
        raise NotImplementedError(f"the aggregate {how}")
    scores = _scores(call, forest, "target", targets)
    if how == "AVERAGE":
        scores = _op.multiply(scores, _float(1 / len(forest.roots)))
    return _transformed(call, _based(call, scores, targets))


def classifier(call: Call) -> Any:
    """TreeEnsembleClassifier with whole numbers as labels: the label of each row, and the scores.

    Raises:
        NotImplementedError: as for `regressor`; labels that are text; one score for two classes.
    """
    labels = np.asarray(call.attribute("classlabels_int64s", ()), np.int64)
    if not labels.size:
        raise NotImplementedError("labels that are text")
    seen = {int(index) for index in call.attribute("class_ids", ())}
    if len(labels) < 2 or (len(labels) == 2 and len(seen) < 2):
        raise NotImplementedError("one score for two classes")
    forest = _forest(call)
    scores = call.emit(_based(call, _scores(call, forest, "class", len(labels)), len(labels)))
    best = call.emit(_op.argmax(scores, axis=1))
    return relax.Tuple(
        [call.emit(_op.take(relax.const(labels, "int64"), best)), _transformed(call, scores)]
    )


def scaler(call: Call) -> Any:
    """Scaler: each column moved and stretched."""
    x = _op.astype(call.inputs[0], "float32")
    offset, scale = (
        np.asarray(call.attribute(name, default), np.float32)
        for name, default in (("offset", [0.0]), ("scale", [1.0]))
    )
    return _op.multiply(_op.subtract(x, relax.const(offset)), relax.const(scale))


def extract(call: Call) -> Any:
    """ArrayFeatureExtractor: elements of the last axis."""
    x, indices = call.inputs
    if is_constant(indices):
        indices = relax.const(indices.value.numpy().reshape(-1))
    else:
        indices = call.emit(_op.reshape(indices, (-1,)))
    found = call.emit(_op.take(x, indices, axis=x.ty.ndim - 1, mode="clip"))
    return found if x.ty.ndim > 1 else _op.expand_dims(found, 0)


def _forest(call: Call) -> _Forest:
    def ints(name: str) -> list[int]:
        return [int(number) for number in call.attribute(f"nodes_{name}", ())]

    if any(ints("missing_value_tracks_true")):
        raise NotImplementedError("values that are missing")
    modes = [_text(mode) for mode in call.attribute("nodes_modes", ())]
    kinds = set(modes) - {"LEAF"} or {"BRANCH_LEQ"}
    (kind, *others) = kinds
    if others or kind not in _COMPARISONS:
        raise NotImplementedError(f"comparisons {', '.join(sorted(kinds))}")
    trees, ids = ints("treeids"), ints("nodeids")
    numbers = {key: index for index, key in enumerate(zip(trees, ids, strict=True))}
    targets: dict[str, Ints] = {}
    for branch in ("true", "false"):
        leads = [
            index if mode == "LEAF" else numbers[tree, target]
            for index, (tree, target, mode) in enumerate(
                zip(trees, ints(f"{branch}nodeids"), modes, strict=True)
            )
        ]
        targets[branch] = np.array(leads, np.int64)
    led = {*targets["true"].tolist(), *targets["false"].tolist()}
    leaves = [index for index, mode in enumerate(modes) if mode == "LEAF"]
    alone = set(leaves) - {
        target
        for index, pair in enumerate(zip(targets["true"], targets["false"], strict=True))
        for target in map(int, pair)
        if target != index
    }
    roots = np.array([i for i in range(len(modes)) if i not in led or i in alone], np.int64)
    features = np.where(np.array(modes) == "LEAF", 0, np.array(ints("featureids"), np.int64))
    return _Forest(
        roots,
        features,
        np.array(call.attribute("nodes_values", ()), np.float32),
        targets["true"],
        targets["false"],
        _depth(roots, targets["true"], targets["false"]),
        _COMPARISONS[kind],
        numbers,
    )


def _depth(roots: Ints, yes: Ints, no: Ints) -> int:
    """Comparisons from a root to the farthest leaf."""
    level, depth = roots, 0
    while True:
        below = np.unique(np.concatenate([yes[level], no[level]]))
        if np.array_equal(below, np.unique(level)):
            return depth
        if depth > len(yes):
            raise NotImplementedError("a tree that leads back to itself")
        level, depth = below, depth + 1


def _scores(call: Call, forest: _Forest, kind: str, width: int) -> Any:
    """The sums [rows, width] of the weights of the leaves that rows come to."""
    x = call.inputs[0]
    if str(x.ty.dtype) != "float32" or x.ty.ndim != 2:
        raise NotImplementedError(f"an input of {x.ty.dtype} with {x.ty.ndim} axes")
    if len(forest.yes) * width > _MOST_WEIGHTS:
        raise NotImplementedError("too many weights for a table")
    columns = number(x.ty.shape[1])
    if columns is None or columns <= int(forest.features.max(initial=0)):
        raise NotImplementedError("features that the input may not have")
    leaves = call.emit(_leaves(call, forest))
    weights = np.zeros((len(forest.yes), width), np.float32)
    parts = (call.attribute(f"{kind}_{name}", ()) for name in ("treeids", "nodeids", "ids"))
    for tree, node, index, weight in zip(
        *parts, call.attribute(f"{kind}_weights", ()), strict=True
    ):
        weights[forest.numbers[int(tree), int(node)], int(index)] += weight
    return call.emit(_op.sum(_op.take(relax.const(weights), leaves, axis=0, mode="clip"), axis=1))


def _leaves(call: Call, forest: _Forest) -> Any:
    """The leaves [rows, trees] that rows come to."""

    def compute(x: Any, features: Any, thresholds: Any, yes: Any, no: Any, roots: Any) -> Any:
        shape = (x.shape[0], roots.shape[0])
        at = te.compute(shape, root(roots), name="roots")
        for _ in range(forest.depth):
            at = te.compute(shape, below(at, x, features, thresholds, yes, no), name="level")
        return at

    def root(roots: Any) -> Any:
        def node(_: Any, tree: Any) -> Any:
            return roots(tree)

        return node

    def below(at: Any, x: Any, features: Any, thresholds: Any, yes: Any, no: Any) -> Any:
        def node(row: Any, tree: Any) -> Any:
            here = at(row, tree)
            holds = forest.compare(x(row, features(here)), thresholds(here))
            return tirx.Select(holds, yes(here), no(here))

        return node

    numbers = (forest.features, forest.yes, forest.no, forest.roots)
    features, yes, no, roots = (relax.const(table.astype(np.int32)) for table in numbers)
    tables = (features, relax.const(forest.thresholds), yes, no, roots)
    return call.builder.call_te(
        *(compute, call.inputs[0], *tables),
        primfunc_name_hint="leaves",
        primfunc_attrs={"op_pattern": _OPAQUE, DONE: True},
    )


def _based(call: Call, scores: Any, width: int) -> Any:
    base: Sequence[float] = call.attribute("base_values", ())
    if not len(base):
        return scores
    if len(base) != width:
        raise NotImplementedError(f"{len(base)} base values for {width} scores")
    return _op.add(scores, relax.const(np.asarray(base, np.float32)))


def _transformed(call: Call, scores: Any) -> Any:
    name = _text(call.attribute("post_transform", "NONE"))
    if name == "NONE":
        return scores
    if name not in _TRANSFORMS:
        raise NotImplementedError(f"the transform {name}")
    return call.emit(_TRANSFORMS[name](scores))


def _float(value: float) -> Any:
    return relax.const(np.float32(value))


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
