"""`auto` and `--tune`: compile in several ways, keep the one that is fastest here.

Every candidate has to compute what the original does. They run in processes of their own and take
turns (`graphopt.timing`). The original in ONNX Runtime is always among them, so that what is kept
is never slower than that by more than the measurement is uncertain.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from graphopt import artifact, backends
from graphopt.backends import Array, Backend
from graphopt.building import verify_artifact
from graphopt.errors import GraphoptError, InputError, MissingError, TimeLimitError
from graphopt.pieces import FALLBACK
from graphopt.target import Target, cores
from graphopt.timing import Latency, Plan, Progress, benchmark, ratio, silent
from graphopt.worker import Worker

if TYPE_CHECKING:
    from graphopt import ir

Way = Literal["asked", "as it is", "standard"]
"""How a model is prepared: as asked, not at all, or without the backend's own operators."""
Compile = Callable[[Path, str, Mapping[str, Any], Way], Path]
"""Compiles into a folder, with a backend, options of it, and in a way."""

_GAIN = 0.99
"""A choice has to be better by so much to be taken over one that is there already."""
_CLEAR = 0.9
"""The share of the time from which on a gain is measured once more."""
_CHOICES: Mapping[str, Sequence[Any]] = {
    "spinning": (True, False),
    "arena": (True, False),
    "graph_level": ("all", "layout", "extended", "basic"),
}
"""Of ONNX Runtime's options, beside threads, what is worth trying."""
_SECONDS, _RUNS = 1.0, 20


@dataclass(frozen=True)
class Candidate:
    """One way to run a model."""

    name: str
    folder: Path


@dataclass
class Search:
    """The candidates for one model, and what became of them."""

    model: ir.Model
    feeds: Mapping[str, Array]
    folder: Path
    """For what is compiled; the caller deletes it."""
    tell: Progress = silent
    found: list[Candidate] = field(default_factory=list[Candidate])
    rejected: dict[str, str] = field(default_factory=dict[str, str])
    """Why others are out of the question, by name."""
    timed: dict[str, float] = field(default_factory=dict[str, float])
    """Median latencies in ms of all that was measured, by name."""
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def add(self, name: str, make: Callable[[Path], Path]) -> Candidate | None:
        """Compile and verify a candidate."""
        self.tell(0.0, f"compiling {name}")
        place = self.folder / str(next(self._numbers))
        try:
            made = Candidate(name, make(place))
            verify_artifact(made.folder, self.model, self.feeds)
        except TimeLimitError:
            raise
        except GraphoptError as error:
            self.rejected[name] = str(error)
            return None
        self.found.append(made)
        return made

    def best(self, seconds: float = _SECONDS) -> Candidate:
        """Measure all candidates together; the fastest, the first one where it is a near thing.

        Raises:
            GraphoptError: there is none.
        """
        if not self.found:
            why = "; ".join(f"{name}: {reason}" for name, reason in self.rejected.items())
            raise GraphoptError(f"no backend runs the model here: {why}")
        if len(self.found) == 1:
            return self.found[0]
        chosen, share = self._faster(self.found, seconds)
        if _CLEAR < share < 1:
            chosen, _ = self._faster([self.found[0], chosen], seconds)
        return chosen

    def _faster(self, candidates: Sequence[Candidate], seconds: float) -> tuple[Candidate, float]:
        """The fastest, and its share of the first one's time."""
        plan = Plan(0.1, 3, seconds, _RUNS)
        with _loaded(candidates) as workers:
            self.tell(0.0, "measuring")
            samples = benchmark(workers, [self.feeds] * len(workers), plan, self.tell)
        for candidate, times in zip(candidates, samples, strict=True):
            self.timed[candidate.name] = Latency.of(times.nanoseconds).p50_ms
        best = 0
        for index, times in enumerate(samples):
            found = ratio(samples[best], times, plan)
            if found.value < _GAIN and found.high < 1:
                best = index
        return candidates[best], ratio(samples[0], samples[best], plan).value

    def notes(self, best: Candidate) -> list[str]:
        """What was tried, a line each."""
        timed = [f"{name}: {median:.4g} ms" for name, median in self.timed.items()]
        out = [f"{name}: {reason}" for name, reason in self.rejected.items()]
        return [f"{best.name} was taken", *timed, *out]


def fastest(
    model: ir.Model,
    target: Target,
    out: Path,
    compile_with: Compile,
    *,
    names: Sequence[str] | None = None,
    options: Mapping[str, Any],
    feeds: Mapping[str, Array] | None = None,
    minutes: float = 0.0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> tuple[Candidate, Search]:
    """Put the fastest of several ways to run a model here into a folder.

    Args:
        model: the original, which results are compared with.
        target: this machine.
        out: the folder to make, see `graphopt.compile`.
        compile_with: how to compile a candidate.
        names: of backends; None takes every one that is installed.
        options: of backends by name; one is an option of all backends that have it.
        feeds: what to measure with; random where not given.
        minutes: also try options, for about so long; 0 takes the given ones.
        overwrite: replace an artifact that is there.
        progress: called with the fraction done and what is being done.

    Raises:
        InputError: options that no backend has, or a target that does not run here.
        GraphoptError: no candidate runs the model and agrees with it.
    """
    chosen = _backends(target, names)
    for name in options:
        if not any(name in backends.describe_options(backend) for backend in chosen):
            raise InputError(f"no backend has an option {name!r}")
    with (
        artifact.publish(out, overwrite=overwrite) as staging,
        tempfile.TemporaryDirectory(prefix="graphopt-auto-") as scratch,
    ):
        inputs = feeds or _feeds(model, _sizes(chosen, options))
        search = Search(model, inputs, Path(scratch), progress or silent)
        for backend in chosen:
            _candidates(search, backend, compile_with, options, minutes)
        best = search.best()
        if minutes and artifact.read(best.folder).backend == FALLBACK:
            best = _tuned(search, best, set(options), minutes)
        for path in best.folder.iterdir():
            copy = shutil.copytree if path.is_dir() else shutil.copyfile
            copy(path, staging / path.name)
        _rewrite(staging, measured=search.timed)
    return best, search


def _backends(target: Target, names: Sequence[str] | None) -> list[Backend]:
    """Those that compile for a target and run it here, ONNX Runtime first."""
    every = [backends.get(name) for name in names or backends.names()]
    every.sort(key=lambda backend: backend.name != FALLBACK)
    reasons = {each.name: each.can_compile(target) or each.can_run(target) for each in every}
    usable = [each for each in every if reasons[each.name] is None]
    if not usable:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise MissingError(f"nothing can be measured for {target.name} here: {why}")
    return usable


def _candidates(
    search: Search,
    backend: Backend,
    compile_with: Compile,
    options: Mapping[str, Any],
    minutes: float,
) -> None:
    """What one backend has to offer."""
    known = backends.describe_options(backend)
    own = {name: value for name, value in options.items() if name in known}
    if backend.name == FALLBACK:
        search.add(
            f"{backend.name}, the model as it is",
            lambda place: compile_with(place, backend.name, own, "as it is"),
        )
        if minutes:
            search.add(
                f"{backend.name}, standard operators only",
                lambda place: compile_with(place, backend.name, own, "standard"),
            )
    elif minutes and "tune" in known:
        own.setdefault("tune", max(1, round(minutes)))
    search.add(backend.name, lambda place: compile_with(place, backend.name, own, "asked"))


def _tuned(search: Search, best: Candidate, fixed: set[str], minutes: float) -> Candidate:
    """The best candidate with other options, one after the other while there is time."""
    most = cores()
    threads = [count for count in (1, 2, 4, 8, 16, 32, 64, 128) if count < most] + [most]
    choices: dict[str, Sequence[Any]] = {"threads": threads, **_CHOICES}
    tried = sum(len(values) for name, values in choices.items() if name not in fixed)
    seconds = max(0.2, 60 * minutes / max(tried, 1) - 0.5)
    for name, values in choices.items():
        now = artifact.read(best.folder)
        if name in fixed or (name == "graph_level" and now.options["format"] == "ort"):
            continue
        search.found = [best]
        for value in values:
            if value != now.options[name]:
                search.add(f"{best.name}, {name}={value}", _with_option(best, name, value))
        best = search.best(seconds)
    return best


def _with_option(best: Candidate, name: str, value: Any) -> Callable[[Path], Path]:
    """Makes a copy of an artifact that differs in an option of how it runs."""

    def make(place: Path) -> Path:
        shutil.copytree(best.folder, place)
        now = artifact.read(place)
        _rewrite(place, options={**now.options, name: value})
        return place

    return make


def _rewrite(folder: Path, **changes: Any) -> None:
    """Change the manifest of an artifact that was made here."""
    from graphopt import trust

    now = artifact.read(folder)
    own = trust.is_own(folder)
    for name in (artifact.MANIFEST, artifact.SIGNATURE):
        (folder / name).unlink(missing_ok=True)
    artifact.write(folder, dataclasses.replace(now, **changes))
    if own:
        trust.sign(folder)


def _sizes(chosen: Sequence[Backend], options: Mapping[str, Any]) -> dict[str, int]:
    """The sizes of free dimensions that options name."""
    sizes: dict[str, int] = {}
    for backend in chosen:
        known = backends.describe_options(backend)
        own = {name: value for name, value in options.items() if name in known}
        sizes |= backends.make_options(backend, own).sizes()
    return sizes


def _feeds(model: ir.Model, sizes: Mapping[str, int]) -> dict[str, Array]:
    """Random feeds, of batch 1 where that is free and runs."""
    from graphopt.feeds import single_feeds
    from graphopt.runner import Runner
    from graphopt.shapes import Shapes

    return single_feeds(model, Shapes(model), Runner(model).run, bindings=sizes)


@contextlib.contextmanager
def _loaded(candidates: Sequence[Candidate]) -> Generator[list[Worker]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Worker(each.folder, trust=True)) for each in candidates]
