"""Where a node of an optimized model came from, and what became of one of the original."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field

from graphopt import ir
from graphopt.differences import lineage
from graphopt.errors import InputError
from graphopt.files import ModelLike, load
from graphopt.pass_manager import headings, load_pass
from graphopt.report import PassRecord, Report, Rewrite


@dataclass(frozen=True)
class Step:
    """One rewrite on the way to a node, or from it."""

    pass_name: str
    rule: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    why: str
    """What the pass is for; empty where graphopt has no such pass now."""
    numerics: str


@dataclass
class Explanation:
    """Everything that is known of a node."""

    node: str
    found: bool
    """Whether the model has it."""
    op: str = ""
    outputs: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    """Nodes of the original that it was made from; itself where it was not changed."""
    became: tuple[str, ...] = ()
    """Nodes of the model that an original node went into; none where it was superfluous."""
    steps: list[Step] = field(default_factory=list[Step])
    refusals: dict[str, str] = field(default_factory=dict[str, str])
    """Reasons for which passes left it as it is: pass by reason."""
    notes: list[str] = field(default_factory=list[str])

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """The explanation as text."""
        if self.found:
            yield f"{self.op} {self.node} makes {', '.join(self.outputs)}"
            changed = self.sources != (self.node,)
            yield f"made from {', '.join(self.sources)}" if changed else "as in the original"
        else:
            became = ", ".join(self.became)
            yield f"{self.node} is gone: {f'it went into {became}' if became else 'superfluous'}"
        told = ""
        for step in self.steps:
            after = ", ".join(step.after) or "nothing"
            yield f"{step.pass_name}, {step.rule}: {', '.join(step.before)} -> {after}"
            if step.why and step.pass_name != told:
                yield f"    why: {step.why}"
                yield f"    numerics: {step.numerics}"
            told = step.pass_name
        for reason, name in self.refusals.items():
            yield f"{name} declined: {reason}"
        yield from self.notes


def explain(model: ModelLike, node: str, report: Report | None = None) -> Explanation:
    """Tell what is known of a node, by its name or that of a tensor that it makes.

    Args:
        model: the optimized model; what it was made from is told by the metadata that
            `optimize(lineage=True)` writes, or by the report.
        node: a node of it, or one of the original.
        report: that of the run; without it the rewrites are not known.

    Raises:
        InputError: neither the model nor the report knows the node.
    """
    loaded = load(model)
    nodes = {ir.label(one): one for one in reversed(list(ir.all_nodes(loaded)))}
    makers = {v.name: one for one in nodes.values() for v in one.outputs if v.name}
    known = {source for one in nodes.values() for source in lineage(one)}
    records = [] if report is None else report.passes
    for record in records:
        for rewrite in record.rewrites:
            known.update((*rewrite.before, *rewrite.after))
    here = nodes.get(node)
    if here is None and node not in known:
        here = makers.get(node)
    if here is None and node not in known:
        near = difflib.get_close_matches(node, {**nodes, **dict.fromkeys(known)}, 4, 0.5)
        hint = f"; there are {', '.join(near)}" if near else ""
        raise InputError(f"neither the model nor the report has a node {node!r}{hint}")
    label = node if here is None else ir.label(here)
    steps = list(_steps(label, records))
    result = Explanation(label, here is not None, steps=steps)
    if here is not None:
        result.op = f"{here.domain}.{here.op_type}" if here.domain else here.op_type
        result.outputs = tuple(v.name for v in here.outputs if v.name)
        result.sources = lineage(here) or _origins(label, steps)
    else:
        result.became = tuple(_heirs(label, nodes, steps))
    for record in records:
        reasons = [reason for reason, where in record.refusals.items() if label in where]
        result.refusals.update((reason, record.name) for reason in reasons)
    if report is None:
        result.notes.append("the rewrites are in the report: optimize with --report, then give it")
        if not any(map(lineage, nodes.values())):
            result.notes.append("the model has no lineage: optimize with --lineage notes it")
    return result


def _steps(label: str, records: Iterable[PassRecord]) -> Iterator[Step]:
    """The rewrites that lead to a node, and those that lead away from it, in the report's order.

    A new node may bear the name of one that went: then both are followed.
    """
    rewrites = [(record, rewrite) for record in records for rewrite in record.rewrites]
    ahead, behind = {label}, {label}
    found: set[int] = set()
    grown = True
    while grown:
        size = len(found)
        for index, (_, rewrite) in enumerate(rewrites):
            if ahead.intersection(rewrite.before):
                ahead.update(rewrite.after)
                found.add(index)
        for index, (_, rewrite) in reversed(list(enumerate(rewrites))):
            if behind.intersection(rewrite.after):
                behind.update(rewrite.before)
                found.add(index)
        grown = len(found) > size
    for index in sorted(found):
        record, rewrite = rewrites[index]
        yield _step(record, rewrite)


def _step(record: PassRecord, rewrite: Rewrite) -> Step:
    try:
        why, numerics = headings(type(load_pass(record.name)))
    except InputError:  # the report is of another version, or the pass is not graphopt's
        why, numerics = record.why, ""
    return Step(record.name, rewrite.rule, rewrite.before, rewrite.after, why, numerics)


def _origins(label: str, steps: Iterable[Step]) -> tuple[str, ...]:
    """Nodes on the way to one that no rewrite made."""
    steps = list(steps)
    made = {one for step in steps for one in step.after}
    gone = (one for step in steps for one in step.before)
    return tuple(dict.fromkeys(one for one in gone if one not in made)) or (label,)


def _heirs(label: str, nodes: dict[str, ir.Node], steps: Iterable[Step]) -> Iterator[str]:
    """Nodes of the model that name another one as their source, or that rewrites lead to."""
    told = [name for name, node in nodes.items() if label in lineage(node)]
    later = (one for step in steps for one in step.after if one in nodes)
    yield from told or dict.fromkeys(later)
