"""Which operators stay in floats so that a limit on the loss holds: ranked once, found by halving.

Each operator is quantized alone and its effect on the outputs measured; in the order of that,
worst first, the shortest list whose operators have to stay in floats is found by bisection.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from graphopt import atomic
from graphopt.errors import GateError
from graphopt.quantizer.scoring import Score

__all__ = ["Budget", "rank", "search"]


@dataclass(frozen=True)
class Budget:
    """Limits on a quantized model; None where there is none."""

    max_drop: float | None = None
    """Of the metric, or of the agreement where there is no metric."""
    max_latency: float | None = None
    """Milliseconds of a run."""
    max_size: int | None = None
    """Bytes of weights."""

    def drop(self, score: Score) -> float:
        """How much worse a result is: by its metric, its agreement, or its noise."""
        if score.before is not None and score.after is not None:
            return score.before - score.after
        if score.agreement is not None:
            return 1.0 - score.agreement
        return score.noise

    def holds(self, score: Score) -> bool:
        """Whether the drop is within its limit."""
        return self.max_drop is None or self.drop(score) <= self.max_drop + 1e-12

    def check(self, score: Score | None, milliseconds: float | None, size: int) -> None:
        """Raise GateError, naming the figure, where a limit is not met or nobody measured it."""
        if score is not None and not self.holds(score):
            raise GateError(f"the drop is {self.drop(score):.4g}, more than {self.max_drop:g}")
        if self.max_latency is not None and milliseconds is None and score is not None:
            raise GateError(f"the latency was not measured, and is to be {self.max_latency:g} ms")
        if self.max_latency is not None and (milliseconds or 0.0) > self.max_latency:
            raise GateError(f"a run takes {milliseconds:.3g} ms, more than {self.max_latency:g}")
        if self.max_size is not None and size > self.max_size:
            raise GateError(f"the weights take {size} bytes, more than {self.max_size}")


def rank(
    names: Sequence[str],
    effects: Callable[[Sequence[str]], Iterable[tuple[str, float]]],
    *,
    saved: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, float]:
    """The noise that each operator brings when it alone is quantized, the largest first.

    `effects` measures it, one operator after the other. With a file `saved`, what was measured is
    kept there, and not measured again.
    """
    known = _read(saved)
    rest = [name for name in names if name not in known]
    for name, noise in effects(rest) if rest else ():
        known[name] = noise
        if progress is not None:
            progress(f"sensitivity: {sum(n in known for n in names)} of {len(names)}")
        if saved is not None:
            _write(saved, known)
    return dict(sorted(((n, known[n]) for n in names), key=lambda item: (-item[1], item[0])))


def search(ranked: Sequence[str], holds: Callable[[Collection[str]], bool]) -> list[str] | None:
    """The shortest beginning of a list that makes `holds` true, by bisection; None if none does.

    Takes it that keeping more never hurts.
    """
    if holds(()):
        return []
    low, high = 0, len(ranked)
    if not holds(frozenset(ranked)):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if holds(frozenset(ranked[:middle])):
            high = middle
        else:
            low = middle
    return list(ranked[:high])


def _read(file: Path | None) -> dict[str, float]:
    if file is None or not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text("utf-8"))
    except ValueError:
        return {}
    if not isinstance(data, Mapping):
        return {}
    return {str(k): float(v) for k, v in cast("Mapping[str, float]", data).items()}


def _write(file: Path, known: Mapping[str, float]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(file, lambda out: out.write(json.dumps(known).encode()))
