"""Passes that work on a model by another tool's means and hand back another model."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from graphopt import ir
from graphopt.context import Context
from graphopt.errors import GraphoptError
from graphopt.files import writing
from graphopt.pass_manager import Pass

_Key = tuple[str, str, str]


@dataclass(frozen=True)
class ForeignPass(Pass):
    """A pass whose result takes the place of the model; what changed is found by comparison."""

    title: str

    @property
    def name(self) -> str:
        return self.title

    def __str__(self) -> str:
        return self.title

    @abstractmethod
    def result(self, model: ir.Model) -> ir.Model:
        """The model that the tool makes of this one, which it leaves as it is."""

    def run(self, context: Context) -> None:
        """Run the tool.

        Raises:
            GraphoptError: it failed, left no valid model, or changed inputs or outputs.
        """
        old = context.model
        try:
            new = self.result(old)
        except Exception as error:  # whatever the tool or the user's code raises
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise GraphoptError(f"pass {self.title!r} failed: {why[:400]}") from error
        if _signature(new) != _signature(old):
            raise GraphoptError(f"pass {self.title!r} changed the inputs or outputs of the model")
        if _same(new, old):
            return
        meta: Any = new.graph.meta
        meta.update(old.graph.meta)
        before, after = _nodes(old), _nodes(new)
        for key in after.keys() & before.keys():
            after[key].meta["graphopt.sources"] = ir.sources(before[key])
        gone = [node for key, node in before.items() if key not in after]
        come = [node for key, node in after.items() if key not in before]
        context.changed(self.title, gone, come)
        context.model = new
        context.refresh()


def _signature(model: ir.Model) -> tuple[list[str | None], list[str | None]]:
    return [v.name for v in model.graph.inputs], [v.name for v in model.graph.outputs]


def _same(one: ir.Model, other: ir.Model) -> bool:
    """Whether models have the same nodes and weights, in whatever order these are listed."""
    protos: list[list[bytes]] = []
    tensors: list[dict[str, ir.TensorProtocol | None]] = []
    for model in (one, other):
        proto, weights = writing.skeleton(model)
        nodes = [*proto.graph.node, *(node for f in proto.functions for node in f.node)]
        heads = sorted(head.SerializeToString() for head, _ in weights)
        protos.append([*(node.SerializeToString() for node in nodes), *heads])
        tensors.append({head.name: tensor for head, tensor in weights})
    return protos[0] == protos[1] and all(
        tensor is (twin := tensors[1][name])
        or (tensor is not None and twin is not None and tensor.tobytes() == twin.tobytes())
        for name, tensor in tensors[0].items()
    )


def _nodes(model: ir.Model) -> dict[_Key, ir.Node]:
    """Nodes by what they are and what they produce."""
    return {
        (node.domain, node.op_type, next((v.name for v in node.outputs if v.name), "")): node
        for node in ir.all_nodes(model)
    }
