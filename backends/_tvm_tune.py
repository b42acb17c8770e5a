"""A search over the tiles of products: whole models are timed kernel by kernel, tile by tile.

In each round every kernel gets its next candidate, so that one compilation measures one candidate
of each in its place in the model: first those that the rules rank highest, then what is like the
best so far. The two models take turns, and what counts is a candidate's share of the time that the
rules' tile takes meanwhile. What is fastest is measured once more, for longer, and kept where it
still is faster, kernel by kernel and as a whole.
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

_RANKED = 8
"""Candidates of a kernel before the search turns to what is like the best of them."""
_RUNS, _SECONDS = 8, 0.3
"""What a measurement takes at least."""
_FINAL = 4
"""How many times as much a measurement takes that decides."""
_MARGIN = 0.98
"""The share of the rules' time that is believed to be less."""

Shares = dict[str, dict[str, float]]
"""Of the time that a kernel takes with the rules' tile, by kernel and tile."""


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
    known = _read(options.log, _identity(target))
    rounds = 0
    while time.monotonic() < end:
        tiles = {
            key: tile
            for key, some in rules.seen.items()
            if (tile := _candidate(some, known.get(_name(key, some), {}))) is not None
        }
        if not tiles:
            break
        shares = _shares(plain, build(Kernels(machine.registers, tiles=tiles)))
        for key, tile in tiles.items():
            found = known.setdefault(_name(key, rules.seen[key]), {})
            found[str(tile)] = shares.get(key, 1.0)  # 1: its schedule was refused
        rounds += 1
        _write(options.log, _identity(target), known)
    best: dict[str, Tile] = {}
    for key, some in rules.seen.items():
        tile, share = _best(some, known.get(_name(key, some), {}))
        if share < _MARGIN:
            best[key] = tile
    return _confirmed(plain, build, rules, best, rounds)


def _confirmed(
    plain: _Loaded, build: _Builder, rules: Kernels, best: dict[str, Tile], rounds: int
) -> tuple[Kernels, dict[str, Any]]:
    """The tiles that are faster when measured again, if the whole is faster with them."""
    registers = rules.registers
    if best:
        shares = _shares(plain, build(Kernels(registers, tiles=best)), _FINAL)
        best = {key: tile for key, tile in best.items() if shares.get(key, 1.0) < _MARGIN}
    found: dict[str, Any] = {"rounds": rounds, "before_ns": 0, "after_ns": 0, "tiles": {}}
    if not best:
        return rules, found
    tuned = Kernels(registers, tiles=best)
    before, after = _compare(build(rules), build(tuned))
    found |= {"before_ns": before, "after_ns": after}
    if after >= before:
        return rules, found
    return tuned, {**found, "tiles": {key: str(tile) for key, tile in best.items()}}


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
        """Nanoseconds of the calls of each kernel in a run."""
        watch = _Watch(self.names)
        self.machine.set_instrument(watch)
        self.machine["main"](*self.inputs)
        self.machine.set_instrument(_unwatched)
        return watch.spent


def _unwatched(*_: object) -> None:
    """The instrument of a machine whose kernels are not timed: one cannot be taken out again."""


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
    sizes = [size for parameter in module["main"].params for size in parameter.ty.shape.values]
    free = dict.fromkeys(size.name for size in sizes if hasattr(size, "name"))
    if free:
        raise InputError(
            f"tuning needs numbers for the free sizes {', '.join(free)}: "
            f"give them, as with --option dims={','.join(f'{name}=1' for name in free)}"
        )
    for parameter in module["main"].params:
        shape = [number(size) or 0 for size in parameter.ty.shape.values]
        dtype = np.dtype(str(parameter.ty.dtype))
        floats = dtype.kind == "f"
        array = random.standard_normal(shape).astype(dtype) if floats else np.zeros(shape, dtype)
        made.append(tvm.runtime.tensor(array))
    return made


def _candidate(tiles: list[Tile], known: dict[str, float]) -> Tile | None:
    """What to measure next of a kernel; None where all that is like the best was."""
    for tile in tiles[1:_RANKED]:
        if str(tile) not in known:
            return tile
    legal = {(tile.rows, tile.vectors, tile.squares) for tile in tiles}
    measured = {str(tiles[0]), *known}
    for tile in _best(tiles, known)[0].near():
        if (tile.rows, tile.vectors, tile.squares) in legal and str(tile) not in measured:
            return tile
    return None


def _best(tiles: list[Tile], known: dict[str, float]) -> tuple[Tile, float]:
    """The tile of the least share, which is 1 for the rules'."""
    text, share = min(known.items(), key=lambda item: item[1], default=("", 1.0))
    return (Tile.parse(text), share) if share < 1 else (tiles[0], 1.0)


def _shares(plain: _Loaded, other: _Loaded, times: int = 1) -> dict[str, float]:
    """The least time of each kernel over that in another model, which takes turns with it."""
    least: list[dict[str, float]] = [{}, {}]
    end, runs = time.monotonic() + times * _SECONDS, 0
    while runs < times * _RUNS or time.monotonic() < end:
        for loaded, best in zip((plain, other), least, strict=True):
            for key, spent in loaded.kernels().items():
                best[key] = min(spent, best.get(key, spent))
        runs += 1
    return {key: spent / least[0][key] for key, spent in least[1].items()}


def _compare(plain: _Loaded, tuned: _Loaded) -> tuple[int, int]:
    """The median nanoseconds of both, run in turns."""
    pairs: list[tuple[int, int]] = []
    end = time.monotonic() + 4 * _FINAL * _SECONDS
    while len(pairs) < _FINAL * _RUNS or time.monotonic() < end:
        pairs.append((plain.once(), tuned.once()))
    first, second = (int(np.median(times)) for times in zip(*pairs, strict=True))
    return first, second


def _name(kernel: str, tiles: list[Tile]) -> str:
    """Under which a log knows a kernel: with the tile whose time is 1."""
    return f"{kernel} {tiles[0]}"


def _identity(target: Target) -> str:
    """What measurements hold for: a kind of CPU."""
    return hashlib.sha256(" ".join(sorted(target.isa)).encode()).hexdigest()[:16]


def _read(log: str, identity: str) -> Shares:
    path = Path(log)
    if not log or not path.exists():
        return {}
    try:
        data = json.loads(path.read_bytes())
        kept: Shares = {
            str(kernel): {str(Tile.parse(tile)): float(share) for tile, share in tiles.items()}
            for kernel, tiles in data["shares"].items()
        }
        same = data["cpu"] == identity
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{log}: not a log of tuning ({error})") from None
    if not same:
        raise InputError(f"{log}: measured on another kind of CPU")
    return kept


def _write(log: str, identity: str, shares: Shares) -> None:
    if log:
        text = json.dumps({"cpu": identity, "shares": shares}, indent=1, sort_keys=True)
        atomic.write(Path(log), lambda file: file.write(text.encode()))
