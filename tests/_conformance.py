"""The ONNX node tests as a conformance suite: optimize each model, in three variants.

A: the inputs stay. B: all inputs but the first become initializers. C: all do, so that everything
is constant. The oracle is ONNX Runtime without optimizations, run twice; what differs from run to
run is left out, and models that it cannot run must be optimized without a failure all the same.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt import files
from graphopt.errors import GraphoptError
from graphopt.optimization import optimize
from graphopt.runner import run_session, session, to_ort

onnx: Any = importlib.import_module("onnx")

VARIANTS = ("A", "B", "C")


@dataclass(frozen=True)
class Outcome:
    """What came of one case."""

    problem: str
    """"" where nothing is wrong."""
    failed: bool
    """The problem is a failure of the optimizer, not a wrong result."""
    ran: bool
    """ONNX Runtime could run the original, twice the same."""
    before: int
    after: int
    """Nodes, Constants apart."""


@functools.cache
def node_tests() -> list[Any]:
    """The cases that the onnx package defines, sorted by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module: Any = importlib.import_module("onnx.backend.test.case.node")
        return sorted(module.collect_testcases(None), key=lambda case: case.name)


def variants(case: Any) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(variant, ModelProto, feeds): those that the case has."""
    values = [array(value) for value in case.data_sets[0][0]]
    names = [value.name for value in case.model.graph.input]
    plain = len(values) == len(names)
    for variant, kept in (("A", len(names)), ("B", 1), ("C", 0)):
        folded = values[kept:]
        tensors = plain and folded and all(isinstance(value, np.ndarray) for value in folded)
        if variant != "A" and not tensors:
            continue
        model = onnx.ModelProto()
        model.CopyFrom(case.model)
        model.ir_version = max(model.ir_version, 8)  # before, initializers had to be inputs
        for name, value in list(zip(names, values, strict=False))[kept:]:
            model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
        del model.graph.input[kept:]
        yield variant, model, dict(zip(names[:kept], values, strict=False))


def array(value: Any) -> Any:
    """A value of a case as an array, where it is a tensor."""
    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value)
    scalar: Any = np.generic
    return np.asarray(value) if isinstance(value, scalar) else value


def nodes(graph: Any) -> int:
    """Nodes of a GraphProto and its subgraphs, Constants apart."""
    total: int = sum(node.op_type != "Constant" for node in graph.node)
    for node in graph.node:
        for attribute in node.attribute:
            total += sum(nodes(sub) for sub in (*attribute.graphs, attribute.g))
    return total


def run(model: Any, feeds: Mapping[str, Any]) -> dict[str, Any]:
    """Outputs of a ModelProto in ONNX Runtime without optimizations; raises what that raises."""
    loaded = session(model.SerializeToString())
    names = [output.name for output in loaded.get_outputs()]
    given = {name: to_ort(value) for name, value in feeds.items()}
    return dict(zip(names, run_session(loaded, names, given), strict=True))


def check(model: Any, feeds: Mapping[str, Any]) -> Outcome:
    """Optimize one model and compare."""
    before = nodes(model.graph)
    try:
        wanted = run(model, feeds)
        ran = not difference(wanted, run(model, feeds), 0.0)
    except Exception:  # noqa: BLE001
        wanted, ran = {}, False
    pristine = model.SerializeToString(deterministic=True)
    try:
        result = files.to_proto(optimize(model, verify="off"))
    except GraphoptError as error:
        return Outcome(f"refused: {error}", True, ran, before, before)
    except Exception as error:  # noqa: BLE001
        return Outcome(f"failed: {type(error).__name__}: {error}", True, ran, before, before)
    after = nodes(result.graph)
    problem = _broken(model, pristine, result)
    if not problem and ran:
        try:
            found = run(result, feeds)
        except Exception as error:  # noqa: BLE001
            problem = f"does not run: {' '.join(str(error).split())[:300]}"
        else:
            problem = difference(wanted, found)
    return Outcome(problem, False, ran, before, after)


def _broken(model: Any, pristine: bytes, result: Any) -> str:
    """What is wrong with a result before it is run."""
    if model.SerializeToString(deterministic=True) != pristine:
        return "the argument was changed"
    for kind in ("input", "output"):
        old, new = (
            [(v.name, v.type.SerializeToString()) for v in getattr(m.graph, kind)]
            for m in (model, result)
        )
        if [name for name, _ in old] != [name for name, _ in new]:
            return f"the {kind}s' names were changed"
        if kind == "input" and old != new:
            return "the inputs' types were changed"
    if _valid(model) and not _valid(result):
        return "the checker rejects the result"
    return ""


def _valid(model: Any) -> bool:
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception:  # noqa: BLE001
        return False
    return True


def difference(wanted: Any, found: Any, scale: float = 1.0, name: str = "") -> str:
    """Where two results differ by more than `scale` times the tolerances; "" where they do not."""
    pairs: list[tuple[str, Any, Any]]
    by_name: Any = dict
    in_order: Any = list
    if isinstance(wanted, by_name):
        keys: list[Any] = list(wanted)
        if keys != list(found):
            return f"{name} has keys {list(found)}, not {keys}"
        pairs = [(f"{name} {key}", wanted[key], found[key]) for key in keys]
    elif isinstance(wanted, in_order):
        if len(wanted) != len(found):
            return f"{name} has {len(found)} items, not {len(wanted)}"
        pairs = [(f"{name}[{i}]", *both) for i, both in enumerate(zip(wanted, found, strict=True))]
    else:
        return _array_difference(wanted, found, scale, name)
    return next((d for n, a, b in pairs if (d := difference(a, b, scale, n))), "")


def _array_difference(wanted: Any, found: Any, scale: float, name: str) -> str:
    if not hasattr(wanted, "dtype"):
        return "" if wanted == found else f"{name} is {found!r}, not {wanted!r}"
    if (wanted.dtype, wanted.shape) != (found.dtype, found.shape):
        return f"{name} is {found.dtype}{found.shape}, not {wanted.dtype}{wanted.shape}"
    if wanted.dtype.kind in "biuO" or wanted.dtype.name in ("int4", "uint4", "int2", "uint2"):
        return "" if np.array_equal(wanted, found) else f"{name} differs"
    wide: Any = np.complex128 if wanted.dtype.kind == "c" else np.float64
    rtol = 1e-2 if wanted.dtype.itemsize < 4 else 1e-3
    with np.errstate(all="ignore"):
        a, b = found.astype(wide), wanted.astype(wide)
        close = np.allclose(a, b, rtol=rtol * scale, atol=1e-5 * scale, equal_nan=True)
        return "" if close else f"{name} differs by {np.nanmax(np.abs(a - b)):.3g}"
