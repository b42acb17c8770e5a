"""A search over the tiles of products: whole models are timed kernel by kernel, tile by tile.

In each round every kernel gets its next candidate, so that one compilation measures one candidate
of each in its place in the model. The fastest of each are kept if the model is faster with them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from graphopt import atomic
from graphopt.backends import _tvm_compile
from graphopt.backends._tvm_indices import number
from graphopt.backends._tvm_kernels import Kernels
from graphopt.backends._tvm_loops import Machine
from graphopt.backends._tvm_options import Options
from graphopt.backends._tvm_tiles import Tile
from graphopt.errors import InputError
from graphopt.target import Target

tvm: Any = importlib.import_module("tvm")
_vm: Any = importlib.import_module("tvm.runtime.vm")

_CANDIDATES, _RUNS = 12, 8
_MARGIN = 0.97
"""What a candidate's time may at most be of the rules' for it to be believed."""

Times = dict[str, dict[str, float]]
"""Nanoseconds of one run's calls, by kernel and tile."""


def tune(
    module: Any, aim: Any, machine: Machine, options: Options, target: Target
) -> tuple[Kernels, dict[str, Any]]:
    """Kernels with the tiles that were found, and figures of the search.

    Raises:
        InputError: code that does not run here, sizes that are not set, a log of something else.
    """
    if target.device != "cpu" or target.foreign():
        raise InputError(f"tuning runs the code, and that for {target.name} does not run here")
    end = time.monotonic() + 60 * options.tune
    rules = Kernels(machine.registers)
    build = _Builder(module, aim, machine)
    plain = build(rules)
    times = _read(options.log, _identity(target))
    rounds = 0
    for index in range(_CANDIDATES):
        tiles = {key: some[index] for key, some in rules.seen.items() if index < len(some)}
        todo = {k: t for k, t in tiles.items() if _text(t) not in times.get(k, {})}
        if not todo or time.monotonic() > end:
            continue
        for key, spent in build(Kernels(machine.registers, tiles=todo)).kernels().items():
            text = _text(todo.get(key, rules.seen[key][0]))
            known = times.setdefault(key, {})
            known[text] = min(spent, known.get(text, spent))
        rounds += 1
        _write(options.log, _identity(target), times)
    best = {key: _best(some, times.get(key, {})) for key, some in rules.seen.items()}
    tuned = Kernels(machine.registers, tiles=best)
    before, after = _compare(plain, build(tuned))
    found: dict[str, Any] = {"rounds": rounds, "before_ns": before, "after_ns": after, "tiles": {}}
    if after >= before:
        return rules, found
    changed = {key: _text(tile) for key, tile in best.items() if tile != rules.seen[key][0]}
    return tuned, {**found, "tiles": changed}


@dataclasses.dataclass
class _Builder:
    """Builds a module with kernels and loads it."""

    module: Any
    aim: Any
    machine: Machine

    def __call__(self, kernels: Kernels) -> _Loaded:
        lowered, log = _tvm_compile.lower(self.module, self.aim, self.machine, kernels)
        machine = _vm.VirtualMachine(_tvm_compile.generate(lowered, self.aim), tvm.cpu())
        return _Loaded(machine, _inputs(self.module), log.kernels)


@dataclasses.dataclass
class _Loaded:
    """A model that can be run, with inputs."""

    machine: Any
    inputs: list[Any]
    names: dict[str, str]
    """The kernel that each function computes."""

    def once(self) -> int:
        """Nanoseconds of a run."""
        start = time.perf_counter_ns()
        self.machine["main"](*self.inputs)
        return time.perf_counter_ns() - start

    def kernels(self) -> dict[str, float]:
        """The least nanoseconds, over some runs, of the calls of each kernel."""
        watch = _Watch(self.names)
        self.machine.set_instrument(watch)
        best: dict[str, float] = {}
        for _ in range(_RUNS):
            watch.spent.clear()
            self.machine["main"](*self.inputs)
            for key, spent in watch.spent.items():
                best[key] = min(spent, best.get(key, spent))
        return best


class _Watch:
    """An instrument of the virtual machine that adds up the calls of each kernel."""

    def __init__(self, names: dict[str, str]) -> None:
        self.spent: dict[str, float] = {}
        self._names, self._start = names, 0

    def __call__(self, function: Any, name: str, before: bool, result: Any, *rest: Any) -> None:
        if before:
            self._start = time.perf_counter_ns()
        elif name in self._names:
            key, spent = self._names[name], time.perf_counter_ns() - self._start
            self.spent[key] = self.spent.get(key, 0) + spent


def _inputs(module: Any) -> list[Any]:
    random = np.random.default_rng(0)
    made: list[Any] = []
    for parameter in module["main"].params:
        shape = [number(size) for size in parameter.ty.shape.values]
        if None in shape:
            raise InputError("tuning needs numbers for all sizes: set them with dims")
        dtype = np.dtype(str(parameter.ty.dtype))
        sizes = [size or 0 for size in shape]
        floats = dtype.kind == "f"
        array = random.standard_normal(sizes).astype(dtype) if floats else np.zeros(sizes, dtype)
        made.append(tvm.runtime.tensor(array))
    return made


def _best(tiles: list[Tile], times: dict[str, float]) -> Tile:
    """The fastest, or the rules' where none is clearly faster."""
    first = times.get(_text(tiles[0]))
    measured = [tile for tile in tiles[:_CANDIDATES] if _text(tile) in times]
    if first is None or not measured:
        return tiles[0]
    best = min(measured, key=lambda tile: times[_text(tile)])
    return best if times[_text(best)] < _MARGIN * first else tiles[0]


def _compare(plain: _Loaded, tuned: _Loaded) -> tuple[int, int]:
    """The least nanoseconds of both, run in turns."""
    pairs = [(plain.once(), tuned.once()) for _ in range(4 * _RUNS)]
    return min(a for a, _ in pairs), min(b for _, b in pairs)


def _text(tile: Tile) -> str:
    return f"{tile.rows}x{tile.vectors}"


def _identity(target: Target) -> str:
    """What measurements hold for: a kind of CPU."""
    return hashlib.sha256(" ".join(sorted(target.isa)).encode()).hexdigest()[:16]


def _read(log: str, identity: str) -> Times:
    path = Path(log)
    if not log or not path.exists():
        return {}
    try:
        data = json.loads(path.read_bytes())
        kept: Times = {
            str(kernel): {str(tile): float(spent) for tile, spent in tiles.items()}
            for kernel, tiles in data["times"].items()
        }
        same = data["cpu"] == identity
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{log}: not a log of tuning ({error})") from None
    if not same:
        raise InputError(f"{log}: measured on another kind of CPU")
    return kept


def _write(log: str, identity: str, times: Times) -> None:
    if log:
        text = json.dumps({"cpu": identity, "times": times}, indent=1, sort_keys=True)
        atomic.write(Path(log), lambda file: file.write(text.encode()))
