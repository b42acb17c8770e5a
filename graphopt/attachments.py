"""Work before a model's inputs and after its outputs, put into the model.

Each function changes the model that it is given, which is the caller's own copy; it takes opsets
from 11 on and uses standard operators only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.context import Context
from graphopt.errors import InputError
from graphopt.splicing import declare, find, values_by_name

Numbers = Sequence[float] | float


class _Builder:
    """Puts nodes at the front or the end of a model."""

    def __init__(self, model: ir.Model, *, front: bool) -> None:
        self.context = Context(model)
        self.graph = model.graph
        self.opset = ir.opset(model.graph)
        self._front = front
        self._before = self.graph[0] if front and len(self.graph) else None
        if self.opset < 11:
            raise InputError(f"the model follows opset {self.opset}; convert it to 11 or newer")

    def node(
        self, op_type: str, inputs: Sequence[ir.Value | None], outputs: int = 1, **attrs: Any
    ) -> list[ir.Value]:
        """A node; its outputs get names of their own."""
        made = ir.Node(
            "",
            op_type,
            inputs,
            [ir.convenience.convert_attribute(k, v) for k, v in attrs.items()],
            num_outputs=outputs,
            name=self.context.unique_node(f"graphopt_{op_type}"),
        )
        for output in made.outputs:
            output.name = self.context.unique(f"graphopt_{op_type.lower()}")
        if self._before is not None:
            self.graph.insert_before(self._before, made)
        else:
            self.graph.append(made)
        self.context.shapes.update(made, self.graph)
        return list(made.outputs)

    def constant(self, array: ir.Array, name: str) -> ir.Value:
        """A constant."""
        return self.context.initializer(self.graph, ir.tensor(array), f"graphopt_{name}")


def _input(model: ir.Model, name: str | None) -> ir.Value:
    inputs = [v for v in model.graph.inputs if not v.is_initializer()]
    if name is None:
        if len(inputs) != 1:
            raise InputError(f"say which input: {', '.join(str(v.name) for v in inputs)}")
        return inputs[0]
    value = next((v for v in inputs if v.name == name), None)
    if value is None:
        raise InputError(f"no input is named {name!r}; there are {[v.name for v in inputs]}")
    return value


def _output(model: ir.Model, name: str | None) -> ir.Value:
    outputs = model.graph.outputs
    if name is None:
        if len(outputs) != 1:
            raise InputError(f"say which output: {', '.join(str(v.name) for v in outputs)}")
        return outputs[0]
    value = next((v for v in outputs if v.name == name), None)
    if value is None:
        raise InputError(f"no output is named {name!r}; there are {[v.name for v in outputs]}")
    return value


def _image(value: ir.Value) -> tuple[list[int | ir.SymbolicDim], ir.DataType]:
    """Shape and type of an input that takes images, [N, C, H, W] of floats."""
    if value.shape is None or len(value.shape) != 4 or not isinstance(value.type, ir.TensorType):
        raise InputError(
            f"input {value.name!r} takes no images: it is no tensor of four dimensions"
        )
    if not value.type.dtype.is_floating_point():
        raise InputError(f"input {value.name!r} is {value.type.dtype.name}, not floating point")
    return list(value.shape), value.type.dtype


def normalize(
    model: ir.Model,
    input: str | None = None,
    mean: Numbers = 0.0,
    std: Numbers = 1.0,
    scale: float = 1.0,
    uint8: bool = False,
    nhwc: bool = False,
) -> None:
    """Let the model take raw images: (x * scale - mean) / std, by channel or for all.

    Args:
        model: what is changed.
        input: its name, where there are several.
        mean: subtracted after scaling, one number or one for each channel.
        std: divided by, likewise.
        scale: multiplied first, such as 1/255.
        uint8: the new input is uint8 instead of the old one's type.
        nhwc: the new input has the channels last.

    Raises:
        InputError: the input takes no images, or the numbers are not as many as its channels.
    """
    value = _input(model, input)
    shape, dtype = _image(value)
    front = _Builder(model, front=True)
    channels = shape[1]
    arrays: list[npt.NDArray[np.float64]] = []
    for name, numbers in (("mean", mean), ("std", std)):
        array = np.atleast_1d(np.asarray(numbers, np.float64))
        fits = array.size == 1 or not isinstance(channels, int) or array.size == channels
        if array.ndim != 1 or not fits or not np.isfinite(array).all():
            raise InputError(f"{name} has {array.size} numbers, the input {channels} channels")
        arrays.append(array.reshape(1, -1, 1, 1))
    if not np.all(arrays[1]):
        raise InputError("std has a 0 in it")
    uses = list(value.uses())
    now = value
    if uint8:
        now = front.node("Cast", [now], to=int(dtype))[0]
        value.type = ir.TensorType(ir.DataType.UINT8)
    if nhwc:
        value.shape = ir.Shape([shape[0], shape[2], shape[3], shape[1]])
        now = front.node("Transpose", [now], perm=[0, 3, 1, 2])[0]
    factor, offset = scale / arrays[1], -arrays[0] / arrays[1]
    kind = dtype.numpy()
    if np.any(factor != 1):
        now = front.node("Mul", [now, front.constant(factor.astype(kind), "scale")])[0]
    if np.any(offset != 0):
        now = front.node("Add", [now, front.constant(offset.astype(kind), "offset")])[0]
    if now is value:
        raise InputError("nothing to do: give a mean, std, scale, uint8 or nhwc")
    for use in uses:
        use.node.replace_input_with(use.idx, now)


def resize(model: ir.Model, input: str | None = None, mode: str = "linear") -> None:
    """Let the model take images of any size, and scale them to the size that it takes.

    Args:
        model: what is changed; its input is [N, C, H, W] of fixed H and W.
        input: its name, where there are several.
        mode: `linear`, `nearest` or `cubic`; pixels' centers are aligned (half_pixel).

    Raises:
        InputError: the input takes no images, or has no fixed size.
    """
    value = _input(model, input)
    shape, _ = _image(value)
    if mode not in ("linear", "nearest", "cubic"):
        raise InputError(f"mode is linear, nearest or cubic, not {mode!r}")
    if not all(isinstance(size, int) for size in shape[2:]):
        raise InputError(f"input {value.name!r} has no fixed height and width to scale to")
    front = _Builder(model, front=True)
    uses = list(value.uses())
    value.shape = ir.Shape([shape[0], shape[1], "height", "width"])
    image = front.constant(np.asarray(shape[2:], np.int64), "size")
    whole = front.node("Shape", [value])[0]
    begin, end = (front.constant(np.asarray([k], np.int64), "bound") for k in (0, 2))
    outer = front.node("Slice", [whole, begin, end])[0]
    sizes = front.node("Concat", [outer, image], axis=0)[0]
    empty = front.constant(np.zeros(0, np.float32), "empty") if front.opset < 13 else None
    made = front.node("Resize", [value, empty, empty, sizes], mode=mode)[0]
    for use in uses:
        use.node.replace_input_with(use.idx, made)


def _rename(graph: ir.Graph, value: ir.Value, new: ir.Value, context: Context) -> None:
    """Let a new value take an output's place and name."""
    graph.outputs[list(graph.outputs).index(value)] = new
    name = value.name
    value.name = context.unique(f"{name}_raw")
    new.name = name
    declare(new, context.shapes)


def softmax(model: ir.Model, output: str | None = None, axis: int = -1) -> None:
    """Turn an output's scores into probabilities."""
    value = _output(model, output)
    end = _Builder(model, front=False)
    if end.opset < 13 and axis != -1:
        raise InputError("before opset 13 softmax is over the last axis only")
    rank = len(value.shape) if value.shape is not None else 0
    new = end.node("Softmax", [value], axis=axis if end.opset >= 13 else rank - 1)[0]
    _rename(model.graph, value, new, end.context)


def argmax(model: ir.Model, output: str | None = None, axis: int = -1) -> None:
    """Put out the index of the largest score in place of the scores; int64."""
    value = _output(model, output)
    end = _Builder(model, front=False)
    new = end.node("ArgMax", [value], axis=axis, keepdims=0)[0]
    _rename(model.graph, value, new, end.context)


def topk(model: ir.Model, output: str | None = None, k: int = 5, axis: int = -1) -> None:
    """Put out the k largest scores in place of all, and their indices as `<output>_indices`."""
    value = _output(model, output)
    size = None if value.shape is None else value.shape[axis]
    if k < 1 or (isinstance(size, int) and k > size):
        raise InputError(f"k is {k}; output {value.name!r} has {size} scores")
    end = _Builder(model, front=False)
    count = end.constant(np.asarray([k], np.int64), "k")
    scores, indices = end.node("TopK", [value, count], outputs=2, axis=axis)
    name = value.name
    _rename(model.graph, value, scores, end.context)
    indices.name = end.context.unique(f"{name}_indices")
    declare(indices, end.context.shapes)
    model.graph.outputs.append(indices)


def nms(
    model: ir.Model,
    boxes: str = "boxes",
    scores: str = "scores",
    iou: float = 0.5,
    score: float = 0.25,
    most: int = 100,
    centers: bool = False,
    classes_last: bool = False,
) -> None:
    """Add non-maximum suppression: output `selected` int64 [M, 3] of (image, class, box).

    Args:
        model: what is changed.
        boxes: a tensor [N, B, 4], corners (y1, x1, y2, x2) or, with `centers`, (x, y, w, h).
        scores: a tensor [N, C, B], or [N, B, C] with `classes_last`.
        iou: boxes that overlap more than this with a better one go.
        score: so do those with lower scores.
        most: boxes kept for each class and image.
        centers: how boxes are given.
        classes_last: how scores are given.

    Raises:
        InputError: no such tensors, or limits out of range.
    """
    if not 0 <= iou <= 1 or most < 1:
        raise InputError("iou is between 0 and 1, most at least 1")
    values = values_by_name(model)
    box, rank = find(values, boxes), find(values, scores)
    end = _Builder(model, front=False)
    for value in (box, rank):
        shape = end.context.shapes.shape(value)
        if shape is not None and len(shape) != 3:
            raise InputError(f"{value.name!r} has {len(shape)} dimensions, not three")
    if classes_last:
        rank = end.node("Transpose", [rank], perm=[0, 2, 1])[0]
    limits = [
        end.constant(np.asarray([most], np.int64), "most"),
        end.constant(np.asarray([iou], np.float32), "iou"),
        end.constant(np.asarray([score], np.float32), "score"),
    ]
    selected = end.node("NonMaxSuppression", [box, rank, *limits], center_point_box=int(centers))[0]
    selected.name = end.context.unique("selected")
    declare(selected, end.context.shapes)
    model.graph.outputs.append(selected)


Attachment = Callable[..., None]
BEFORE: dict[str, Attachment] = {"normalize": normalize, "resize": resize}
AFTER: dict[str, Attachment] = {"softmax": softmax, "argmax": argmax, "topk": topk, "nms": nms}
