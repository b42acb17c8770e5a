"""The ONNX node tests through a backend: built whole, cut, refused, crashed, or wrong.

The cases run one after the other in a process forked from one that has the backend's libraries
loaded, and the compiler runs right in it: a child of its own for each would take a hundred times as
long. What ends such a process would be one line of the compiler's child in earnest, and is counted
as a crash here; another process goes on with the next case.
"""

from __future__ import annotations

import dataclasses
import importlib
import multiprocessing
import os
import pkgutil
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from graphopt import artifact, backends, child, compilation
from graphopt.errors import GraphoptError, MissingError
from graphopt.pass_manager import load_pass, pass_names
from graphopt.target import Target
from tests._conformance import array, difference, run, variants

KINDS = ("built", "cut", "refused", "crashed", "failed", "wrong")
"""Whole; with nodes left to the fallback; not at all, with a reason; the process ended; something
else than an error of ours; it runs, and differs from ONNX Runtime without optimizations."""
_SECONDS = 120.0
_AT_ONCE = 200
"""Cases for one process: compilers do not give back all memory."""


@dataclass(frozen=True)
class Lowered:
    """What came of one case."""

    kind: str
    reason: str = ""
    """Of the first node that was not taken; what is wrong."""
    compared: bool = False
    """Its outputs agree with ONNX Runtime's, or with those that the case has."""


def preload(backend: str) -> None:
    """Import what a backend compiles with, for all the processes to come."""
    reason = backends.get(backend).is_available()
    if reason is not None:
        raise MissingError(reason)
    for name in ("onnxruntime", "graphopt.building", "graphopt.optimization"):
        importlib.import_module(name)
    for name in pass_names():
        load_pass(name)
    for module in pkgutil.iter_modules(backends.__path__):
        if module.name.startswith(f"_{backend}_"):
            importlib.import_module(f"{backends.__name__}.{module.name}")


def lower_all(
    cases: Sequence[Any], backend: str, target: str, variant: str = "B"
) -> Iterator[tuple[str, Lowered]]:
    """Compile the models of node tests, and run them where this machine can; by name.

    In variant B all inputs but the first are initializers, where they can be; in A none are.
    """
    left = list(cases)
    while left:
        for case, row in _in_a_process(left[:_AT_ONCE], (backend, target, variant)):
            left.remove(case)
            yield case.name, row


def _in_a_process(cases: Sequence[Any], how: tuple[str, str, str]) -> Iterator[tuple[Any, Lowered]]:
    """What came of the cases up to the one that the process ended with, if one did that."""
    here, there = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_answer, args=(there, cases, how))
    process.start()
    there.close()
    try:
        for case in cases:
            if not here.poll(_SECONDS):
                process.kill()
                yield case, Lowered("crashed", f"took more than {_SECONDS:g} s")
                return
            try:
                row: Lowered = here.recv()
            except EOFError:
                process.join()
                yield case, Lowered("crashed", f"exit code {process.exitcode}")
                return
            yield case, row
    finally:
        process.join()
        here.close()


def _answer(answer: Connection, cases: Sequence[Any], how: tuple[str, str, str]) -> None:
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        child.call = _here  # this process is a child already
        for case in cases:
            answer.send(_outcome(case, *how))
    finally:
        answer.close()
        os._exit(0)


def _outcome(case: Any, backend: str, target: str, variant: str) -> Lowered:
    found = {name: (model, feeds) for name, model, feeds in variants(case)}
    model, feeds = found.get(variant, found["A"])
    with tempfile.TemporaryDirectory() as scratch:
        try:
            folder = compilation.compile(
                *(model, target, Path(scratch) / "a"),
                backend=backend,
                cache=False,
                verify="off",
            )
            found = artifact.read(folder)
            reason = next((f"{node}: {why}" for node, why in found.fallback.items()), "")
            made = Lowered("cut" if found.fallback else "built", reason)
            if backends.get(backend).can_run(Target.parse(target)) is not None:
                return made
            return _compared(made, folder, case, model, feeds)
        except GraphoptError as error:
            return Lowered("refused", str(error))
        except Exception:  # noqa: BLE001
            return Lowered("failed", traceback.format_exc())


def _compared(
    made: Lowered, folder: Path, case: Any, model: Any, feeds: Mapping[str, Any]
) -> Lowered:
    """With ONNX Runtime, or with what the case itself expects where that cannot run or differs."""
    results = compilation.load(folder, trust=True).run(feeds)
    values = [array(value) for value in case.data_sets[0][1]]
    expected = dict(zip([value.name for value in model.graph.output], values, strict=False))
    try:
        wanted = run(model, feeds)
        if difference(wanted, run(model, feeds), 0.0):
            return made  # it is not deterministic
    except Exception:  # noqa: BLE001
        wanted = expected
    problem = difference(wanted, results)
    if problem and difference(expected, results):
        return Lowered("wrong", problem)
    return dataclasses.replace(made, compared=True)


def _here(function: str, arguments: Mapping[str, Any], **_: Any) -> Any:
    module, name = function.split(":")
    return getattr(importlib.import_module(module), name)(**arguments)
