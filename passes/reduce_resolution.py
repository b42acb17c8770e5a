"""Run the model on a smaller plane than that of the images it is given.

Why: the work of a convolutional network goes with the area of its images, and a compact one loses
less accuracy by it than by channels (Howard et al. 2017, MobileNets: the resolution multiplier).
Numerics: lossy; the report says how far results moved.
Needs: an input that is a batch of images, of fixed or free size, and a model that runs on a smaller
plane with outputs of the same shapes, which is found by running it. Inputs and outputs stay as
they are: a linear Resize comes first. Opset 13, which older models are converted to.

A pool over the whole plane becomes a global one first, which is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from graphopt import files, ir
from graphopt.context import Context
from graphopt.driver import Driver
from graphopt.errors import GraphoptError, InputError
from graphopt.pass_manager import Pass
from graphopt.passes.convert_opset import ConvertOpset
from graphopt.random_inputs import required_inputs, workable_feeds
from graphopt.rewriting import Op, rewrite
from graphopt.runner import Runner
from graphopt.shapes import Shapes
from graphopt.splicing import declare

_OPSET = 13
_COLOURS = 4
"""An axis of at most so many is that of colours."""
_LEAST = 16
"""A side that is smaller than this is not one of an image."""
_GLOBAL = {"AveragePool": "GlobalAveragePool", "MaxPool": "GlobalMaxPool"}

Axes = tuple[int, int]


@dataclass(frozen=True)
class ReduceResolution(Pass):
    """`share` of each side stays, or `size` pixels of the shorter one."""

    lossy: ClassVar[bool] = True
    share: float = 0.875
    size: int = 0

    def run(self, context: Context) -> None:
        if not 0 < self.share < 1 or self.size < 0:
            raise InputError("reduce-resolution: share is between 0 and 1, size at least 0")
        for change in reduce_resolution(context, self.share, self.size):
            before, after = (f"{change.input}: {sides}" for sides in (change.before, change.after))
            context.changed("resized", [before], [after])


@dataclass(frozen=True)
class Resized:
    """An input of images whose plane became smaller, with its sides before and after."""

    input: str
    before: str
    after: str


def reduce_resolution(context: Context, share: float, size: int = 0) -> list[Resized]:
    """Give the context another model, on smaller images; the record tells why where it cannot."""
    inputs = required_inputs(context.model)
    names = [value.name or "" for value in inputs if planes(value)]
    reason = "" if names else "no input is a batch of images"
    work = Context(files.copy(context.model), deadline=context.deadline)
    work.record = context.record
    if names:
        ConvertOpset(_OPSET, at_least=True).run(work)
        Driver(work, [(globalize_pool, work.record)]).run()
    for place in (0, 1) if names and ir.opset(work.model.graph) >= _OPSET else ():
        made = Context(files.copy(work.model))
        try:
            changes = [_resize(made, name, place, share, size) for name in names]
            _check(context, made.model)
        except GraphoptError as error:
            reason = reason or str(error)
            continue
        context.model = made.model
        context.refresh()
        return changes
    if reason:
        labels = {value.name or "" for value in inputs}
        context.record.refusals.setdefault(reason, set()).update(labels)
    return []


def _resize(context: Context, name: str, place: int, share: float, size: int) -> Resized:
    """Put a Resize behind an input.

    Raises:
        InputError: there is no size to go by, or nothing gets smaller.
    """
    graph = context.model.graph
    (image,) = (value for value in graph.inputs if value.name == name)
    found = planes(image)
    assert found is not None and image.shape is not None
    axes = found[place]
    sides = [image.shape[axis] for axis in axes]
    fixed = [side for side in sides if isinstance(side, int)]
    if size and len(fixed) < len(sides):
        raise InputError("images of a free size are made smaller by a share, not to a size")
    share = size / min(fixed) if size else share
    scales = np.ones(len(image.shape), np.float32)
    for axis, side in zip(axes, sides, strict=True):
        scales[axis] = _scale(side, round(side * share)) if isinstance(side, int) else share
    if not 0 < scales.min() < 1 or scales.max() > 1:
        raise InputError("its images would not get smaller")
    uses = [(use.node, use.idx) for use in image.uses()]
    by = context.initializer(graph, ir.tensor(scales), f"{name}_scales")
    how = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
    attributes = [ir.convenience.convert_attribute(*item) for item in how.items()]
    resize = ir.Node("", "Resize", [image, None, by], attributes)
    resize.name = context.unique_node(f"{name}_Resize")
    small = resize.outputs[0]
    small.name, small.type = context.unique(f"{name}_resized"), image.type
    graph.insert_before(graph[0], resize)
    for node, index in uses:
        node.replace_input_with(index, small)
    _declare(context.model)
    if len(fixed) < len(sides):
        return Resized(name, "any size", f"{share:.1%} of each side")
    assert small.shape is not None
    old, new = ("x".join(str(shape[i]) for i in axes) for shape in (image.shape, small.shape))
    return Resized(name, old, new)


def planes(value: ir.Value) -> tuple[Axes, Axes] | None:
    """Where height and width of images may be, the likelier place first; None of anything else."""
    if value.shape is None or len(value.shape) != 4:
        return None
    _, second, _, last = (dim if isinstance(dim, int) else None for dim in value.shape)
    colours = [size is not None and size <= _COLOURS for size in (second, last)]
    places: tuple[Axes, Axes] = ((1, 2), (2, 3)) if colours == [False, True] else ((2, 3), (1, 2))
    sides = [value.shape[axis] for axis in places[0]]
    small = any(isinstance(side, int) and side < _LEAST for side in sides)
    return None if small else places


@rewrite.on("AveragePool", "MaxPool")
def globalize_pool(op: Op, node: ir.Node) -> ir.Value | None:
    """A pool over the whole plane -> a global one."""
    x = node.inputs[0]
    before, after = None if x is None else op.shape(x), op.shape(node.outputs[0])
    if x is None or before is None or after is None or len(node.outputs) > 1:
        return None
    window, pads = op.attr(node, "kernel_shape"), op.attr(node, "pads", ())
    if tuple(window) != tuple(before[2:]) or any(pads) or any(size != 1 for size in after[2:]):
        return None
    if any(step != 1 for step in op.attr(node, "dilations", ())):
        return None
    return op.build(_GLOBAL[node.op_type], [x])[0]


def _scale(side: int, size: int) -> float:
    """The least float32 factor that makes so many pixels of a side, rounded down."""
    factor = np.float32(size / side)
    return float(factor if factor * float(side) >= size else np.nextafter(factor, np.float32(2)))


def _declare(model: ir.Model) -> None:
    """Write the shapes of all values down anew, but for the model's outputs."""
    for graph in ir.graphs(model):
        for node in graph:
            for value in node.outputs:
                if not (graph is model.graph and value.is_graph_output()):
                    value.shape = None
    shapes = Shapes(model)
    for node in model.graph:
        for value in node.outputs:
            if value.type is not None or shapes.dtype(value) is not None:
                declare(value, shapes)


def _check(context: Context, model: ir.Model) -> None:
    """Run both models on one sample.

    Raises:
        GraphoptError: the smaller one does not run, or an output has another shape.
    """
    if context.samples is not None:
        feeds = next(iter(context.samples))
    else:
        feeds = workable_feeds(context.model, context.shapes)
    expected = Runner(context.model).run(feeds)
    try:
        found = Runner(model).run(feeds)
    except GraphoptError as error:
        raise InputError(f"it does not run on smaller images: {error}") from error
    for name, value in expected.items():
        if np.shape(value) != np.shape(found[name]):
            raise InputError(f"the shape of output {name!r} follows the images")
