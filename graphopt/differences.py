"""What differs between two models, node by node, following lineage."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import cast

import numpy as np

from graphopt import ir
from graphopt.files import ModelLike, load


@dataclass(frozen=True)
class NodeRef:
    """A node, as reports name it."""

    label: str
    op: str
    scope: str = ""
    """Path of the subgraph or function that it stands in; empty for the main graph."""

    def __str__(self) -> str:
        return f"{self.op} {self.label}" + (f" in {self.scope}" if self.scope else "")


@dataclass(frozen=True)
class Removed:
    """A node of the first model that the second does not have."""

    node: NodeRef
    into: tuple[str, ...]
    """Labels of the second model's nodes that were made from it; none where it was dead."""


@dataclass(frozen=True)
class Added:
    """A node that only the second model has."""

    node: NodeRef
    sources: tuple[str, ...]
    """Labels of the first model's nodes that it was made from, where that is recorded."""


@dataclass(frozen=True)
class Changed:
    """A node of both models that is not the same in them."""

    node: NodeRef
    changes: tuple[str, ...]
    """One line each: `axis: 1 became 2`, `input 0: a became b`."""


@dataclass(frozen=True)
class Weights:
    """An initializer of one model or both: what became of it."""

    name: str
    change: str
    """`added`, `removed`, `values changed`, or `FLOAT [3, 4] became FLOAT16 [3, 4]`."""
    bytes_before: int
    bytes_after: int


@dataclass
class Diff:
    """All differences between two models."""

    kept: int = 0
    """Nodes that are the same in both: operator, attributes, names of inputs and outputs."""
    removed: list[Removed] = field(default_factory=list[Removed])
    added: list[Added] = field(default_factory=list[Added])
    changed: list[Changed] = field(default_factory=list[Changed])
    weights: list[Weights] = field(default_factory=list[Weights])
    weight_bytes: tuple[int, int] = (0, 0)
    header: list[str] = field(default_factory=list[str])
    """Signature, opsets, IR version, functions and metadata: one line for each difference."""

    @property
    def identical(self) -> bool:
        """Whether no difference was found."""
        lists = (self.removed, self.added, self.changed, self.weights, self.header)
        return not any(lists)

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        return {"identical": self.identical, **asdict(self)}

    def lines(self) -> Iterator[str]:
        """The differences as text: what is outside of the graph, nodes, weights, a summary."""
        yield from self.header
        for gone in self.removed:
            became = f", now {', '.join(gone.into)}" if gone.into else ""
            yield f"- {gone.node}{became}"
        for new in self.added:
            origin = f", from {', '.join(new.sources)}" if new.sources else ""
            yield f"+ {new.node}{origin}"
        for one in self.changed:
            yield f"~ {one.node}: {'; '.join(one.changes)}"
        for weight in self.weights:
            yield f"weight {weight.name}: {weight.change}"
        if self.identical:
            size = f"{self.weight_bytes[0]:,} bytes of weights"
            yield f"no difference in {self.kept} nodes and {size}"
            return
        yield (
            f"nodes: {self.kept} the same, {len(self.changed)} changed, "
            f"{len(self.removed)} removed, {len(self.added)} added; "
            f"weights: {self.weight_bytes[0]:,} bytes became {self.weight_bytes[1]:,}"
        )


def diff(a: ModelLike, b: ModelLike) -> Diff:
    """Compare two models; nodes are matched by name, then by the lineage that `b` records.

    Raises:
        InputError: a file that is no model.
    """
    return _compare(_loaded(a), _loaded(b))


def _loaded(model: ModelLike) -> ir.Model:
    return model if isinstance(model, ir.Model) else load(model)


def _compare(a: ir.Model, b: ir.Model) -> Diff:
    result = Diff(header=list(_header(a, b)))
    before, after = dict(_nodes(a)), dict(_nodes(b))
    matches = _match(before, after)
    origin: dict[str, list[str]] = {}
    for node in after.values():
        for source in lineage(node):
            origin.setdefault(source, []).append(ir.label(node))
    for key, node in after.items():
        old = matches.get(key)
        if old is None:
            result.added.append(Added(_ref(key, node), lineage(node)))
            continue
        changes = tuple(_changes(before[old], node))
        if changes:
            result.changed.append(Changed(_ref(key, node), changes))
        else:
            result.kept += 1
    matched = set(matches.values())
    for key, node in before.items():
        if key not in matched:
            into = tuple(origin.get(ir.label(node), ()))
            result.removed.append(Removed(_ref(key, node), into))
    result.weights, result.weight_bytes = _weights(a, b)
    return result


_Key = tuple[str, str, int]
"""Scope, label, and a count that tells apart nodes of the same label."""


def _nodes(model: ir.Model) -> Iterator[tuple[_Key, ir.Node]]:
    """Every node with its key, in graph order."""
    counts: dict[tuple[str, str], int] = {}
    stack = [("", model.graph)]
    stack += [(f"{f.domain}:{f.name}", f.graph) for f in model.functions.values()]
    stack.reverse()
    while stack:
        scope, graph = stack.pop()
        inner: list[tuple[str, ir.Graph]] = []
        for node in graph:
            label = ir.label(node)
            count = counts[scope, label] = counts.get((scope, label), -1) + 1
            yield (scope, label, count), node
            for attr in node.attributes.values():
                for index, body in enumerate(_bodies(attr)):
                    inner.append((f"{scope}/{label}.{attr.name}{index or ''}".strip("/"), body))
        stack += reversed(inner)


def _bodies(attr: ir.Attr) -> Iterable[ir.Graph]:
    if attr.is_ref():
        return ()
    if attr.type == ir.AttributeType.GRAPH:
        return (attr.as_graph(),)
    return attr.as_graphs() if attr.type == ir.AttributeType.GRAPHS else ()


def _match(before: Mapping[_Key, ir.Node], after: Mapping[_Key, ir.Node]) -> dict[_Key, _Key]:
    """For nodes of the second model, those of the first that they still are."""
    matches = {key: key for key, node in after.items() if _same_kind(before.get(key), node)}
    taken = set(matches)
    by_label: dict[str, list[_Key]] = {}
    for key in before:
        by_label.setdefault(key[1], []).append(key)
    for key, node in after.items():
        sources = lineage(node)
        if key in matches or len(sources) != 1:
            continue
        for old in by_label.get(sources[0], ()):
            if old not in taken and _same_kind(before[old], node):
                matches[key] = old
                taken.add(old)
                break
    return matches


def _same_kind(old: ir.Node | None, new: ir.Node) -> bool:
    return old is not None and (old.domain, old.op_type) == (new.domain, new.op_type)


def lineage(node: ir.Node) -> tuple[str, ...]:
    """Labels of the source's nodes that a node was made from, in memory or in a file."""
    if ir.SOURCES in node.meta:
        return ir.sources(node)
    text = node.metadata_props.get(ir.SOURCES)
    if text is None:
        return ()
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return ()
    return tuple(map(str, cast("list[object]", found))) if isinstance(found, list) else ()


def _ref(key: _Key, node: ir.Node) -> NodeRef:
    op = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    return NodeRef(key[1], op, key[0])


def _changes(old: ir.Node, new: ir.Node) -> Iterator[str]:
    if ir.label(old) != ir.label(new):
        yield f"name: {ir.label(old)} became {ir.label(new)}"
    for name in sorted({*old.attributes, *new.attributes}):
        one, other = old.attributes.get(name), new.attributes.get(name)
        if one is None or other is None or not _same_attribute(one, other):
            yield f"{name}: {_text(one)} became {_text(other)}"
    for kind, before, after in (
        ("input", old.inputs, new.inputs),
        ("output", old.outputs, new.outputs),
    ):
        for index in range(max(len(before), len(after))):
            was = before[index] if index < len(before) else None
            now = after[index] if index < len(after) else None
            names = tuple("nothing" if v is None or not v.name else v.name for v in (was, now))
            if names[0] != names[1]:
                yield f"{kind} {index}: {names[0]} became {names[1]}"


def _same_attribute(a: ir.Attr, b: ir.Attr) -> bool:
    if a.type != b.type or a.is_ref() != b.is_ref():
        return False
    if a.is_ref():
        return a.ref_attr_name == b.ref_attr_name
    match a.type:
        case ir.AttributeType.GRAPH | ir.AttributeType.GRAPHS:
            return True  # their nodes are listed themselves
        case ir.AttributeType.TENSOR:
            return _same_tensor(a.as_tensor(), b.as_tensor())
        case ir.AttributeType.TENSORS:
            one, other = a.as_tensors(), b.as_tensors()
            return len(one) == len(other) and all(map(_same_tensor, one, other))
        case _:
            return repr(a.value) == repr(b.value)


def _same_tensor(a: ir.TensorProtocol, b: ir.TensorProtocol) -> bool:
    if a is b:
        return True
    if a.dtype != b.dtype or tuple(a.shape) != tuple(b.shape):
        return False
    if a.dtype == ir.DataType.STRING:
        return bool(np.array_equal(a.numpy(), b.numpy()))
    one, other = (np.ascontiguousarray(t.numpy()).reshape(-1).view(np.uint8) for t in (a, b))
    return bool(np.array_equal(one, other))  # by bytes: a NaN is equal to itself


def _text(attr: ir.Attr | None) -> str:
    if attr is None:
        return "nothing"
    if attr.is_ref():
        return f"@{attr.ref_attr_name}"
    if attr.type == ir.AttributeType.TENSOR:
        return _kind(attr.as_tensor())
    text = str(attr.value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _kind(tensor: ir.TensorProtocol) -> str:
    return f"{tensor.dtype.name} {list(tensor.shape)}"


def _tensors(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """Initializers by name; those of subgraphs with a count where names come more than once."""
    found: dict[str, ir.TensorProtocol] = {}
    counts: Counter[str] = Counter()
    for graph in ir.graphs(model):
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                counts[name] += 1
                number = f"#{counts[name]}" if counts[name] > 1 else ""
                found[name + number] = value.const_value
    return found


def _weights(a: ir.Model, b: ir.Model) -> tuple[list[Weights], tuple[int, int]]:
    before, after = _tensors(a), _tensors(b)
    changes: list[Weights] = []
    for name in dict.fromkeys((*before, *after)):
        old, new = before.get(name), after.get(name)
        if old is None or new is None:
            change = "added" if old is None else "removed"
        elif _same_tensor(old, new):
            continue
        else:
            kinds = _kind(old), _kind(new)
            change = "values changed" if kinds[0] == kinds[1] else " became ".join(kinds)
        sizes = [0 if tensor is None else tensor.nbytes for tensor in (old, new)]
        changes.append(Weights(name, change, *sizes))
    return changes, (_total(before.values()), _total(after.values()))


def _total(tensors: Iterable[ir.TensorProtocol]) -> int:
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


def _header(a: ir.Model, b: ir.Model) -> Iterator[str]:
    """Differences outside of nodes and weights."""
    facts_a, facts_b = dict(_facts(a)), dict(_facts(b))
    for name in dict.fromkeys((*facts_a, *facts_b)):
        old, new = facts_a.get(name, "nothing"), facts_b.get(name, "nothing")
        if old != new:
            yield f"{name}: {old} became {new}"


def _facts(model: ir.Model) -> Iterator[tuple[str, str]]:
    yield "ir version", str(model.ir_version)
    for domain, version in model.graph.opset_imports.items():
        yield f"opset {domain or 'ai.onnx'}", str(version)
    for kind, values in (("input", model.graph.inputs), ("output", model.graph.outputs)):
        yield f"order of {kind}s", ", ".join(str(value.name) for value in values)
        for value in values:
            yield f"{kind} {value.name}", f"{value.type} {value.shape}"
    for function in model.functions.values():
        yield f"function {function.domain}:{function.name}", f"{len(function)} nodes"
    for key, text in model.metadata_props.items():
        yield f"metadata {key}", text if len(text) <= 60 else f"{text[:57]}..."
