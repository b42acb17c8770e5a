"""Converters of ai.onnx.ml: support vector machines, linear models, and norms of rows.

A machine is a matrix of kernels between rows and support vectors, times coefficients of each pair
of classes. Probabilities of classes follow from those of pairs as in libsvm (Wu, Lin and Weng,
"Probability estimates for multi-class classification by pairwise coupling", 2004, second method):
an iteration for each row until it hardly moves, one kernel for all rows.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.backends._tvm_call import Call
from graphopt.backends._tvm_indices import number
from graphopt.backends._tvm_schedule import DONE

relax: Any = importlib.import_module("tvm.relax")
_script: Any = importlib.import_module("tvm.script")
_op: Any = relax.op

Floats = npt.NDArray[np.float32]
_TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "NONE": lambda scores: scores,
    "LOGISTIC": _op.sigmoid,
    "SOFTMAX": _op.nn.softmax,
}
_SURE = 1e-7
"""No pair of classes is surer than this."""
_MOST_PAIRS = 1 << 22


def svm_classifier(call: Call) -> Any:
    """SVMClassifier: labels, and probabilities or what decides between each two classes.

    Raises:
        NotImplementedError: labels that are text, transforms of what decides.
    """
    labels = _labels(call)
    if _text(call, "post_transform", "NONE") != "NONE":
        raise NotImplementedError("transforms of a machine's scores")
    counts = [int(count) for count in call.attribute("vectors_per_class", ())]
    if not sum(counts):
        return _linear_machine(call, labels)
    pairs = list(itertools.combinations(range(len(counts)), 2))
    if not pairs or len(pairs) * len(counts) > _MOST_PAIRS:
        raise NotImplementedError(f"{len(counts)} classes")
    starts = np.cumsum([0, *counts])
    given = _floats(call, "coefficients").reshape(len(counts) - 1, -1)
    weights = np.zeros((given.shape[1], len(pairs)), np.float32)
    signs = np.zeros((len(pairs), len(counts)), np.float32)
    for index, (a, b) in enumerate(pairs):
        for own, other, sign in ((a, b - 1, 1), (b, a, 0)):
            rows = slice(starts[own], starts[own + 1])
            weights[rows, index] = given[other, rows]
            signs[index, own] = 2 * sign - 1
    kernel = _kernel(call, _rows(call))
    rho = _floats(call, "rho")[: len(pairs)]
    decisions = call.emit(_op.add(_op.matmul(kernel, relax.const(weights)), relax.const(rho)))
    # a class has a vote for each pair that it wins; those that it loses lower it by none
    won = _op.astype(_op.greater(decisions, _float(0)), "float32")
    votes = _op.add(
        _op.matmul(won, relax.const(signs)), relax.const(np.sum(signs < 0, 0, np.float32))
    )
    label = _chosen(call, labels, _op.argmax(call.emit(votes), axis=1))
    if len(call.attribute("prob_a", ())):
        return relax.Tuple([label, _probabilities(call, decisions, pairs, len(counts))])
    if len(pairs) == 1:
        decisions = call.emit(_op.concat([_op.negative(decisions), decisions], axis=1))
    return relax.Tuple([label, decisions])


def svm_regressor(call: Call) -> Any:
    """SVMRegressor: a value for each row, or for machines of one class 1 and -1.

    Raises:
        NotImplementedError: transforms.
    """
    if _text(call, "post_transform", "NONE") != "NONE":
        raise NotImplementedError("transforms of a machine's scores")
    x, coefficients = _rows(call), _floats(call, "coefficients")
    kernel = _kernel(call, x) if int(call.attribute("n_supports", 0)) else x
    value = _op.matmul(kernel, relax.const(coefficients.reshape(-1, 1)))
    value = call.emit(_op.add(value, relax.const(_floats(call, "rho")[:1])))
    if not int(call.attribute("one_class", 0)):
        return value
    return call.emit(_op.where(_op.greater(value, _float(0)), _float(1), _float(-1)))


def linear_classifier(call: Call) -> Any:
    """LinearClassifier with a score for each class.

    Raises:
        NotImplementedError: labels that are text, one score for two classes, other transforms.
    """
    labels, intercepts = _labels(call), _floats(call, "intercepts")
    if len(labels) < 2 or len(intercepts) != len(labels):
        raise NotImplementedError("one score for two classes")
    transform = _transform(call)
    weights = _floats(call, "coefficients").reshape(len(labels), -1).T
    scores = _op.matmul(_rows(call), relax.const(np.ascontiguousarray(weights)))
    scores = call.emit(_op.add(scores, relax.const(intercepts)))
    label = _chosen(call, labels, _op.argmax(scores, axis=1))
    return relax.Tuple([label, call.emit(transform(scores))])


def linear_regressor(call: Call) -> Any:
    """LinearRegressor.

    Raises:
        NotImplementedError: other transforms.
    """
    targets = int(call.attribute("targets", 1))
    transform = _transform(call)
    weights = _floats(call, "coefficients").reshape(targets, -1).T
    scores = _op.matmul(_rows(call), relax.const(np.ascontiguousarray(weights)))
    intercepts = _floats(call, "intercepts")
    if intercepts.size:
        scores = _op.add(scores, relax.const(intercepts))
    return call.emit(transform(call.emit(scores)))


def normalizer(call: Call) -> Any:
    """Normalizer: rows divided by their largest element, or by their length; not where that is 0.

    Raises:
        NotImplementedError: the largest element, which may be negative.
    """
    x, norm = _rows(call), _text(call, "norm", "MAX")
    if norm == "L1":
        size = _op.sum(_op.abs(x), axis=1, keepdims=True)
    elif norm == "L2":
        size = _op.sqrt(_op.sum(_op.multiply(x, x), axis=1, keepdims=True))
    else:
        raise NotImplementedError(f"the norm {norm}")
    size = call.emit(size)
    return call.emit(_op.divide(x, _op.where(_op.equal(size, _float(0)), _float(1), size)))


def _linear_machine(call: Call, labels: npt.NDArray[np.int64]) -> Any:
    """A machine without support vectors: a score for each class."""
    given = _floats(call, "coefficients")
    weights = given.reshape(len(labels), -1).T
    scores = _op.matmul(_rows(call), relax.const(np.ascontiguousarray(weights)))
    scores = call.emit(_op.add(scores, relax.const(_floats(call, "rho")[:1])))
    best = call.emit(_op.argmax(scores, axis=1))
    if len(labels) == 2 and not len(call.attribute("prob_a", ())):
        highest = _op.max(scores, axis=1)
        sure = (
            _op.greater_equal(highest, _float(0.5))
            if (given >= 0).all()
            else _op.greater(highest, _float(0))
        )
        best = _op.where(sure, relax.const(1, "int64"), best)
    return relax.Tuple([_chosen(call, labels, best), scores])


def _kernel(call: Call, x: Any) -> Any:
    """The kernels [rows, vectors] between rows and support vectors."""
    columns = number(x.ty.shape[1])
    if not columns:
        raise NotImplementedError("features whose number is not known")
    vectors = _floats(call, "support_vectors").reshape(-1, columns)
    gamma, shift, degree = (*_floats(call, "kernel_params").tolist(), 0.0, 0.0, 0.0)[:3]
    kind = _text(call, "kernel_type", "LINEAR")
    if kind == "RBF":
        apart = call.emit(_op.subtract(_op.expand_dims(x, 1), relax.const(vectors[None])))
        squares = _op.sum(_op.multiply(apart, apart), axis=2)
        return call.emit(_op.exp(_op.multiply(squares, _float(-gamma))))
    products = _op.matmul(x, relax.const(np.ascontiguousarray(vectors.T)))
    if kind == "LINEAR":
        return call.emit(products)
    products = call.emit(_op.add(_op.multiply(products, _float(gamma)), _float(shift)))
    if kind == "SIGMOID":
        return call.emit(_op.tanh(products))
    if kind != "POLY":
        raise NotImplementedError(f"the kernel {kind}")
    if degree not in (2.0, 3.0):
        return call.emit(_op.power(products, _float(degree)))
    power = _op.multiply(products, products)
    return call.emit(power if degree == 2 else _op.multiply(power, products))


def _probabilities(call: Call, decisions: Any, pairs: list[tuple[int, int]], classes: int) -> Any:
    """The probabilities [rows, classes] that agree best with those of each two classes."""
    slopes, offsets = _floats(call, "prob_a"), _floats(call, "prob_b")
    linear = _op.add(_op.multiply(decisions, relax.const(slopes)), relax.const(offsets))
    first = _op.clip(_op.sigmoid(_op.negative(linear)), _SURE, 1 - _SURE)
    first = call.emit(first)
    both = _op.concat([first, _op.subtract(_float(1), first)], axis=1)
    places = np.zeros((classes, classes), np.int64)  # what stands on the diagonal is not read
    for index, (a, b) in enumerate(pairs):
        places[a, b], places[b, a] = index, len(pairs) + index
    rows = decisions.ty.shape[0]
    table = call.emit(_op.take(call.emit(both), relax.const(places.ravel()), axis=1, mode="clip"))
    table = call.emit(_op.reshape(table, (rows, classes, classes)))
    text = _COUPLING.format(
        classes=f"T.int64({classes})", start=1 / classes, enough=0.005 / classes, done=DONE
    )
    kernel = call.builder.add_func(_script.from_source(text), "coupled")
    kinds = [
        relax.TensorType(shape, "float32")
        for shape in ((rows, classes), (rows, classes, classes), (rows, classes + 3))
    ]
    results = call.emit(relax.call_tir(kernel, [table], kinds))
    return call.emit(relax.TupleGetItem(results, 0))


_COUPLING = """
@T.prim_func(private=True, s_tir=True)
def coupled(r: T.handle, p: T.handle, q: T.handle, s: T.handle):
    T.func_attr({{"op_pattern": 8, "{done}": True, "tirx.noalias": True}})
    n = T.int64()
    R = T.match_buffer(r, (n, {classes}, {classes}), "float32")
    P = T.match_buffer(p, (n, {classes}), "float32")
    Q = T.match_buffer(q, (n, {classes}, {classes}), "float32")
    S = T.match_buffer(s, (n, {classes} + T.int64(3)), "float32")
    with T.sblock("root"):
        T.reads(R[0:n, 0:{classes}, 0:{classes}])
        T.writes(
            P[0:n, 0:{classes}], Q[0:n, 0:{classes}, 0:{classes}],
            S[0:n, 0:{classes} + T.int64(3)],
        )
        for row in range(n):
            for i in range({classes}):
                P[row, i] = T.float32({start})
                Q[row, i, i] = T.float32(0)
                for j in range({classes}):
                    if i != j:
                        Q[row, i, i] = Q[row, i, i] + R[row, j, i] * R[row, j, i]
                        Q[row, i, j] = T.float32(0) - R[row, j, i] * R[row, i, j]
            S[row, {classes} + T.int64(1)] = T.float32(1)
            for trip in range(T.int64(100)):
                if S[row, {classes} + T.int64(1)] >= T.float32({enough}):
                    S[row, {classes}] = T.float32(0)
                    for i in range({classes}):
                        S[row, i] = T.float32(0)
                        for j in range({classes}):
                            S[row, i] = S[row, i] + Q[row, i, j] * P[row, j]
                        S[row, {classes}] = S[row, {classes}] + P[row, i] * S[row, i]
                    S[row, {classes} + T.int64(1)] = T.float32(0)
                    for i in range({classes}):
                        S[row, {classes} + T.int64(1)] = T.max(
                            S[row, {classes} + T.int64(1)], T.abs(S[row, i] - S[row, {classes}])
                        )
                    if S[row, {classes} + T.int64(1)] >= T.float32({enough}):
                        for i in range({classes}):
                            S[row, {classes} + T.int64(2)] = (
                                S[row, {classes}] - S[row, i]
                            ) / Q[row, i, i]
                            P[row, i] = P[row, i] + S[row, {classes} + T.int64(2)]
                            S[row, {classes}] = (
                                S[row, {classes}]
                                + S[row, {classes} + T.int64(2)] * (
                                    S[row, {classes} + T.int64(2)] * Q[row, i, i]
                                    + T.float32(2) * S[row, i]
                                )
                            ) / (T.float32(1) + S[row, {classes} + T.int64(2)]) / (
                                T.float32(1) + S[row, {classes} + T.int64(2)]
                            )
                            for j in range({classes}):
                                S[row, j] = (
                                    S[row, j] + S[row, {classes} + T.int64(2)] * Q[row, i, j]
                                ) / (T.float32(1) + S[row, {classes} + T.int64(2)])
                                P[row, j] = P[row, j] / (
                                    T.float32(1) + S[row, {classes} + T.int64(2)]
                                )
"""
"""By coordinates, as libsvm does it. S has Qp, and behind it pQp, the error and the step."""


def _rows(call: Call) -> Any:
    x = call.inputs[0]
    if x.ty.ndim != 2:
        raise NotImplementedError(f"an input with {x.ty.ndim} axes")
    return x if str(x.ty.dtype) == "float32" else call.emit(_op.astype(x, "float32"))


def _labels(call: Call) -> npt.NDArray[np.int64]:
    labels = np.asarray(call.attribute("classlabels_ints", ()), np.int64)
    if not labels.size:
        raise NotImplementedError("labels that are text")
    return labels


def _chosen(call: Call, labels: npt.NDArray[np.int64], best: Any) -> Any:
    return call.emit(_op.take(relax.const(labels, "int64"), call.emit(best), mode="clip"))


def _transform(call: Call) -> Callable[[Any], Any]:
    name = _text(call, "post_transform", "NONE")
    if name not in _TRANSFORMS:
        raise NotImplementedError(f"the transform {name}")
    return _TRANSFORMS[name]


def _floats(call: Call, name: str) -> Floats:
    return np.asarray(call.attribute(name, ()), np.float32)


def _float(value: float) -> Any:
    return relax.const(np.float32(value))


def _text(call: Call, name: str, default: str) -> str:
    return str(call.attribute(name, default))
