"""The one record of a run: what each pass did, why others did nothing, what came out."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

from graphopt import ir


@dataclass(frozen=True)
class Stats:
    """Size of a model: nodes apart from Constants (subgraphs and functions included), weights."""

    nodes: int
    parameters: int
    bytes: int
    ops: dict[str, int]

    @classmethod
    def of(cls, model: ir.Model) -> Stats:
        """Count a model; `bytes` are those of its constant tensors."""
        ops = Counter(
            f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            for node in ir.all_nodes(model)
            if node.op_type != "Constant"
        )
        tensors = ir.constants(model)
        return cls(
            nodes=ops.total(),
            parameters=sum(int(t.size) for t in tensors),
            bytes=sum(int(t.nbytes) for t in tensors),
            ops=dict(sorted(ops.items())),
        )


@dataclass(frozen=True)
class Rewrite:
    """One change: the rule, labels of the nodes that went and of those that came."""

    rule: str
    before: tuple[str, ...]
    after: tuple[str, ...]


@dataclass
class PassRecord:
    """What one pass did over all rounds."""

    name: str
    rewrites: list[Rewrite] = field(default_factory=list[Rewrite])
    refusals: dict[str, set[str]] = field(default_factory=dict[str, set[str]])
    """Reason → labels of the nodes where a rule looked right but declined."""
    seconds: float = 0.0
    rolled_back: str = ""
    """Why the pass's work was thrown away, where verification rejected it."""
    why: str = ""
    """The reason for all its rewrites: what the pass is for."""

    def refuse(self, node: ir.Node, reason: str) -> None:
        """Note that a rule declined at a node."""
        self.refusals.setdefault(reason, set()).add(ir.label(node))


@dataclass
class OutputComparison:
    """How one output of two models differs, worst over all inputs that were tried.

    `graphopt.closeness` defines the figures.
    """

    name: str
    ok: bool = True
    reason: str = ""
    """A difference that is no matter of degree: type, shape, length, NaN pattern."""
    dtype: str = ""
    shape: tuple[int, ...] = ()
    elements: int = 0
    """Elements compared over all inputs."""
    max_abs: float = 0.0
    max_rel: float = 0.0
    """Relative to the output's scale; for exact types the share of elements that differ."""
    cosine: float | None = None
    sqnr_db: float | None = None
    """Signal to noise; None where nothing differs or the output is not a number."""
    top1: float | None = None
    """Share of rows whose largest element is the same one (last axis, rank 1 to 3)."""
    tolerance: float = 0.0
    """The limit on `max_rel` that was applied; includes `noise`."""
    noise: float | None = None
    """How far the original lies from itself, where that had to be measured."""
    note: str = ""
    """Why the comparison says less than it seems to: an empty output, one not finite."""
    telling: bool = True
    """False where the output hardly varies, so that much can go wrong before it shows there."""

    def __str__(self) -> str:
        if self.reason:
            return f"output {self.name!r}: {self.reason}"
        word = "agrees" if self.ok else "differs"
        return f"output {self.name!r} {word}: {self.max_rel:.3g}, limit {self.tolerance:.3g}"


@dataclass
class Comparison:
    """The verdict on two models: per output, and how it was reached.

    Three things can come of it: they agree (`ok`), they differ (`different`), or part of them
    could not be compared (neither; `unchecked` names the part).
    """

    how: str
    """`whole`, `regions` (only the parts that differ were run), or `not run: <why>`."""
    ok: bool = False
    """Everything was compared and agrees."""
    different: bool = False
    """Something was found that is not the same."""
    signature: list[str] = field(default_factory=list[str])
    """Ways in which the second model cannot take the first one's place."""
    outputs: list[OutputComparison] = field(default_factory=list[OutputComparison])
    unchecked: list[str] = field(default_factory=list[str])
    """What could not be compared, with the reason."""
    notes: list[str] = field(default_factory=list[str])
    seconds: float = 0.0

    def settle(self) -> None:
        """Set `ok` and `different` from what was found."""
        self.different = bool(self.signature) or not all(o.ok for o in self.outputs)
        self.ok = not self.different and not self.unchecked and not self.how.startswith("not run")

    @property
    def worst(self) -> float:
        """The largest relative difference over all outputs."""
        return max((o.max_rel for o in self.outputs), default=0.0)

    def summary(self) -> str:
        """One line: what is wrong, or what was not checked, or how well all agrees."""
        wrong = [*self.signature, *(str(o) for o in self.outputs if not o.ok)]
        if wrong:
            return wrong[0]
        if self.how.startswith("not run"):
            return self.how
        if self.unchecked:
            return f"not checked: {self.unchecked[0]}"
        count = len(self.outputs)
        agree = "1 output agrees" if count == 1 else f"{count} outputs agree"
        return f"{agree}, worst difference {self.worst:.2g}"


@dataclass
class Loss:
    """What a lossy pass cost: its outputs beside those of the model that it was given."""

    name: str
    """The pass; `all` for the result beside the source."""
    samples: int
    """Runs that were compared."""
    where: str
    """Where their inputs came from."""
    outputs: list[OutputComparison] = field(default_factory=list[OutputComparison])

    @property
    def sqnr_db(self) -> float | None:
        """The lowest signal-to-noise ratio of an output; None where nothing differs."""
        return min((o.sqnr_db for o in self.outputs if o.sqnr_db is not None), default=None)

    @property
    def agreement(self) -> float | None:
        """The lowest share of rows with the same largest element; None without such outputs."""
        return min((o.top1 for o in self.outputs if o.top1 is not None), default=None)


@dataclass
class Report:
    """Everything a run has to say; the command line prints it, `--report` and `--json` store it."""

    source: str = ""
    pipeline: str = ""
    target: str = ""
    requested: list[str] = field(default_factory=list[str])
    """Passes that were asked for by name: one that changed nothing is said aloud."""
    before: Stats | None = None
    after: Stats | None = None
    passes: list[PassRecord] = field(default_factory=list[PassRecord])
    verification: Comparison | None = None
    """Of the passes that are not lossy."""
    losses: list[Loss] = field(default_factory=list[Loss])
    """Of each lossy pass, and of all together where there were any."""
    notes: list[str] = field(default_factory=list[str])
    seconds: float = 0.0

    def record(self, name: str) -> PassRecord:
        """The record of a pass, made on first use."""
        for record in self.passes:
            if record.name == name:
                return record
        self.passes.append(PassRecord(name))
        return self.passes[-1]

    @property
    def rolled_back(self) -> list[str]:
        """Names of the passes whose work was rejected."""
        return [record.name for record in self.passes if record.rolled_back]

    @property
    def refusals(self) -> dict[str, int]:
        """At how many nodes rules declined, by reason, the most frequent first."""
        counts: Counter[str] = Counter()
        for record in self.passes:
            counts.update({reason: len(nodes) for reason, nodes in record.refusals.items()})
        return dict(counts.most_common())

    @classmethod
    def from_json(cls, text: str) -> Report:
        """What `to_json` wrote: the passes with their rewrites and refusals; the rest as far as
        it is text and numbers.

        Raises:
            ValueError: no JSON, or not of a report.
        """
        data: Any = json.loads(text)
        try:
            passes = [
                PassRecord(
                    str(record["name"]),
                    [
                        Rewrite(one["rule"], tuple(one["before"]), tuple(one["after"]))
                        for one in record["rewrites"]
                    ],
                    {reason: set(nodes) for reason, nodes in record["refusals"].items()},
                    float(record["seconds"]),
                    str(record["rolled_back"]),
                    str(record.get("why", "")),
                )
                for record in data["passes"]
            ]
            return cls(
                str(data["source"]), str(data["pipeline"]), str(data["target"]), passes=passes
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no report: {error!r}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain data; infinities become None so that the JSON is standard."""
        plain: dict[str, Any] = dataclasses.asdict(self)
        data: dict[str, Any] = finite(plain)
        return data

    def to_json(self) -> str:
        """Standard JSON, two-space indented."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)


def finite(data: Any) -> Any:
    """Plain data for standard JSON: infinities and NaN become None, sets sorted lists."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in cast(dict[str, Any], data).items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in cast(Iterable[Any], data)]
    if isinstance(data, set):
        return sorted(cast(set[str], data))
    if isinstance(data, float) and (data != data or data in (float("inf"), float("-inf"))):
        return None
    return data
