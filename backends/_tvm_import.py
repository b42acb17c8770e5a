"""From ONNX to TVM's graph language (Relax), by its importer's converters and a few of our own.

The importer itself stops at the first node that it cannot take and prints to the terminal; here
every node that fails is told by its label.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import re
import warnings
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from graphopt import files, ir
from graphopt.backends._tvm_call import Call, is_constant, match
from graphopt.backends._tvm_executable import last_line
from graphopt.backends._tvm_indices import number
from graphopt.backends._tvm_operators import OPERATORS
from graphopt.backends._tvm_shapes import Sizes
from graphopt.context import Context
from graphopt.errors import GraphoptError, InputError
from graphopt.pass_manager import PassManager, parse_pipeline
from graphopt.passes._layout import BROADCASTING

tvm: Any = importlib.import_module("tvm")
relax: Any = importlib.import_module("tvm.relax")
_frontend: Any = importlib.import_module("tvm.relax.frontend.onnx.onnx_frontend")

_OPERATORS = re.compile(r"[-+*/()]+")
"""Of formulas in names of dimensions."""
_AFTER_FIXING = "fold-constants,fold-shapes,inline-if,eliminate-identity,eliminate-dead"
"""Passes that make use of sizes that are numbers now."""


def import_model(model: ir.Model, sizes: Mapping[str, int]) -> Any:
    """A Relax module whose `main` takes the inputs of a model in order.

    Args:
        model: of a standard opset; functions are not called in it.
        sizes: of free dimensions by name; the others stay symbolic.

    Raises:
        InputError: a size of a dimension that no input has.
        GraphoptError: nodes that cannot be taken, with the reason.
    """
    fixed = _fixed(model, sizes)
    if sizes:
        context = Context(fixed)
        fixed = PassManager(parse_pipeline(_AFTER_FIXING)).run(context)
    importer = _run(fixed, stop=True)
    return importer.module


def unsupported(model: ir.Model, sizes: Mapping[str, int]) -> dict[str, str]:
    """The reasons by label of the nodes that cannot be imported, those of branches included.

    Arguments and errors are those of `import_model`.
    """
    return _run(_fixed(model, sizes), stop=False).refused


def _run(model: ir.Model, *, stop: bool) -> _Importer:
    importer = _Importer(model, stop)
    with _silence():
        importer.convert()
    return importer


@contextlib.contextmanager
def _silence() -> Generator[None]:
    """The importer warns of every renamed input and prints what fails."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _fixed(model: ir.Model, sizes: Mapping[str, int]) -> ir.Model:
    """A copy with unnamed dimensions named apart and those with a size set to it."""
    copy, left = files.copy(model), set(sizes)
    for value in copy.graph.inputs:
        if value.shape is None:
            continue
        dims: list[int | str] = []
        for index, dim in enumerate(value.shape):
            name = dim if isinstance(dim, int) else dim.value or f"{value.name}_{index}"
            if isinstance(name, str) and name in sizes:
                left.discard(name)
                dims.append(sizes[name])
            else:
                dims.append(name)
        value.shape = ir.Shape(dims)
    if left:
        raise InputError(f"no input has a free dimension {', '.join(sorted(left))}")
    if sizes:
        for value in copy.graph.outputs:
            value.shape = None
    _rename_formulas(copy.graph.inputs)
    return copy


def _rename_formulas(inputs: Sequence[ir.Value]) -> None:
    """Give dimensions named as formulas plain names, save where the importer can compute them.

    It reads `past + 1` where another dimension is named `past`; but it knows neither precedence nor
    parentheses, and what only formulas name has no value at run time.
    """
    shapes = [value.shape for value in inputs if value.shape is not None]
    named = dict.fromkeys(
        str(dim.value) for shape in shapes for dim in shape if isinstance(dim, ir.SymbolicDim)
    )
    plain = {name for name in named if not _OPERATORS.search(name)}
    fresh: dict[str, str] = {}
    for name in named:
        words = [word.strip() for word in _OPERATORS.split(name)]
        if len(words) > 2 or not all(word in plain or word.isdecimal() for word in words):
            numbered = (f"formula_{number}" for number in itertools.count(len(fresh)))
            fresh[name] = next(new for new in numbered if new not in named)
    for shape in shapes:
        for axis, dim in enumerate(shape):
            if isinstance(dim, ir.SymbolicDim) and dim.value in fresh:
                shape[axis] = fresh[dim.value]


class _Importer:
    """TVM's importer, with a loop over the nodes that knows their labels and their shapes."""

    def __init__(self, model: ir.Model, stop: bool) -> None:
        self._tvm: Any = _frontend.ONNXGraphImporter({}, None)
        self._bb: Any = self._tvm.bb
        self._model = model
        self._stop = stop
        self._sizes = Sizes(model)
        self.refused: dict[str, str] = {}
        self.module: Any = None

    @property
    def _nodes(self) -> dict[str, Any]:
        values: dict[str, Any] = self._tvm._nodes
        return values

    def convert(self) -> None:
        """Build the module; with `stop`, GraphoptError at the first node that fails."""
        proto = files.to_proto(self._model)
        graph = proto.graph
        self._tvm.opset = ir.opset(self._model.graph)
        for tensor in graph.initializer:
            self._declare_constant(tensor)
        params = self._declare_inputs(graph)
        branching = any(node.op_type == "If" for node in graph.node)
        with self._bb.function("main", params=params):
            block = contextlib.nullcontext() if branching else self._bb.dataflow()
            with block:
                self._convert_nodes(graph.node, self._model.graph)
                if self.refused:
                    result: Any = relax.Tuple([])
                else:
                    nodes = [self._nodes[value.name] for value in graph.output]
                    values = [self._loadable(self._as_tensor(value)) for value in nodes]
                    result = relax.Tuple(values)
                result = result if branching else self._bb.emit_output(result)
            self._bb.emit_func_output(result)
        if not self.refused:
            self.module = self._bb.get()

    def _declare_constant(self, tensor: Any) -> None:
        """An initializer, where TVM has its type; integers of few bits become bytes."""
        value = self._model.graph.initializers[tensor.name].const_value
        if value is None or value.dtype == ir.DataType.STRING:
            return
        if value.dtype.name.startswith(("INT4", "UINT4", "INT2", "UINT2")):
            wide = "uint8" if value.dtype.name.startswith("U") else "int8"
            self._nodes[tensor.name] = relax.const(value.numpy().astype(wide))
        else:
            self._nodes[tensor.name] = relax.const(self._tvm._parse_array(tensor))

    def _declare_inputs(self, graph: Any) -> list[Any]:
        """The parameters; without inputs that are no tensors of numbers, whose users are refused.

        Raises:
            GraphoptError: there is such an input, and the model is to be compiled.
        """
        inputs = [value for value in self._model.graph.inputs if not value.is_initializer()]
        odd = {value.name for value in inputs if not _is_numeric(value, value.dtype)}
        if odd and self._stop:
            raise GraphoptError(f"tvm: input {next(iter(odd))!r} is no tensor of numbers")
        kept = [value for value in graph.input if value.name not in odd]
        del graph.input[:]
        graph.input.extend(kept)
        self._tvm._parse_graph_input(graph)
        params: list[Any] = []
        for value in inputs:
            if value.name not in odd:
                params.append(self._nodes[value.name or ""])
                self._sizes.declare(value, params[-1])
        return params

    def _convert_nodes(self, protos: Any, nodes: ir.Graph) -> None:
        for proto, node in zip(protos, nodes, strict=True):
            try:
                self._convert_node(proto, node)
            except GraphoptError:
                raise
            # TVM raises what it likes, from KeyError to its own InternalError
            except Exception as error:  # noqa: BLE001
                reason = _reason(error)
                if self._stop:
                    raise GraphoptError(f"tvm: node {ir.label(node)}: {reason}") from None
                self.refused[ir.label(node)] = reason
                self._stand_in(node)

    def _convert_node(self, proto: Any, node: ir.Node) -> None:
        if node.op_type == "If" and not node.domain:
            self._convert_if(node, proto)
            return
        known = [self._known(value) for value in node.outputs]
        if known and all(value is not None for value in known):
            self._bind(node, list(proto.output), relax.Tuple(known))
            return
        self._require_types(node)
        inputs = _frontend.onnx_input()
        inputs.extend(None if not name else self._nodes[name] for name in proto.input)
        attributes = self._tvm._parse_attr(proto.attribute)
        attributes["tvm_custom"] = {"name": proto.name, "num_outputs": len(proto.output)}
        if node.op_type not in _TAKES_SHAPES:
            inputs[:] = [None if v is None else self._as_tensor(v) for v in inputs]
        if node.op_type != "Resize":  # whose scales may be left out so
            inputs[:] = [None if v is None else self._loadable(v) for v in inputs]
        _require_rank(inputs)
        own = OPERATORS.get((node.domain, node.op_type))
        call = Call(self._bb, list(inputs), node, self._sizes, self._nodes)
        if node.op_type in BROADCASTING and not node.domain:
            wanted = self._sizes.shape(node.outputs[0])
            if wanted is not None:
                given = [None if v is None else call.matched(v, wanted) for v in inputs]
                call.inputs[:] = inputs[:] = given
        result = None if own is None else own(call)
        if result is None:
            if node.domain or node.op_type not in _known():
                name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
                raise NotImplementedError(f"TVM's importer has no {name}")
            opset = self._tvm.opset
            result = self._tvm._convert_operator(node.op_type, inputs, attributes, opset)
        self._bind(node, list(proto.output), result)

    def _empty(self, value: ir.Value) -> Any:
        """The tensor without elements that a value is known to be, else None.

        Kernels for it would divide by its sizes.
        """
        shape, dtype = self._sizes.cast(value), self._sizes.dtype(value)
        sizes = [number(size) for size in shape or ()]
        if dtype is None or 0 not in sizes or None in sizes:
            return None
        return self._without_elements(sizes, dtype.numpy().name)

    def _without_elements(self, sizes: Any, dtype: str) -> Any:
        """Computed: TVM cannot load a constant of that kind."""
        return self._bb.normalize(relax.op.zeros(relax.ShapeExpr(sizes), dtype))

    def _loadable(self, value: Any) -> Any:
        """A constant without elements as one that is computed; integers are parameters."""
        if not is_constant(value) or not str(value.ty.dtype).startswith("float"):
            return value
        shape = value.value.numpy().shape
        return self._without_elements(shape, str(value.ty.dtype)) if 0 in shape else value

    def _known(self, value: ir.Value) -> Any:
        """What graphopt knows a value to be, or one without elements; None for the others."""
        found = self._sizes.elements(value)
        return self._empty(value) if found is None else found

    def _require_types(self, node: ir.Node) -> None:
        """Tensors of numbers; TVM rounds those of few bits in ways of its own."""
        if node.op_type.startswith(_NO_TENSORS):
            raise NotImplementedError(_ODD)
        for value in (*node.inputs, *node.outputs):
            if value is None:
                continue
            if not isinstance(value.type, ir.TensorType | None):
                raise NotImplementedError(_ODD)
            dtype = self._sizes.dtype(value)
            if dtype == ir.DataType.STRING:
                raise NotImplementedError("text")
            if value.const_value is not None and node.op_type == "DequantizeLinear":
                continue
            if dtype is not None and dtype.name.startswith(_FEW_BITS):
                raise NotImplementedError(f"numbers of type {dtype.name.lower()}")

    def _bind(self, node: ir.Node, names: list[str], result: Any) -> None:
        if isinstance(result, relax.Expr) and not isinstance(result, relax.Tuple):
            result = self._bb.normalize(result)
            _require_shape(result)
            if isinstance(result.ty, relax.TupleType):
                fields = range(len(result.ty.fields))
                result = [self._bb.emit(relax.TupleGetItem(result, index)) for index in fields]
            else:
                result = [result]
        values = list(result.fields) if isinstance(result, relax.Tuple) else list(result)
        for name, value, output in zip(names, values, node.outputs, strict=False):
            self._nodes[name] = self._known_shape(value, output)
        if len(values) < len(names) and any(names[len(values) :]):
            raise NotImplementedError(f"only {len(values)} of its outputs are computed")

    def _known_shape(self, value: Any, output: ir.Value) -> Any:
        """The value, with the shape that graphopt knows where TVM lost track of it."""
        kind = value.ty
        if (
            is_constant(value)
            or not isinstance(kind, relax.TensorType)
            or isinstance(kind.shape, relax.ShapeExpr)
        ):
            return value
        shape = self._sizes.cast(output)
        if shape is None:
            return value
        return match(self._bb, value, shape)

    def _convert_if(self, node: ir.Node, proto: Any) -> None:
        condition = self._as_tensor(self._nodes[proto.input[0]])
        _require_rank([condition])
        branches = {attribute.name: attribute.g for attribute in proto.attribute}
        results: list[Any] = []
        for name in ("then_branch", "else_branch"):
            branch, before = branches[name], dict(self._nodes)
            for tensor in branch.initializer:
                self._nodes[tensor.name] = relax.const(self._tvm._parse_array(tensor))
            self._bb._begin_binding_block()
            self._convert_nodes(branch.node, node.attributes[name].as_graph())
            found = [self._as_tensor(self._nodes[value.name]) for value in branch.output]
            result = self._bb.normalize(found[0] if len(found) == 1 else relax.Tuple(found))
            results.append(relax.SeqExpr([self._bb._end_block()], result))
            self._tvm._nodes = before
        if len(condition.ty.shape):
            condition = self._bb.emit(relax.op.reshape(condition, ()))
        self._bind(node, list(proto.output), self._bb.emit(relax.If(condition, *results)))

    def _as_tensor(self, value: Any) -> Any:
        """A shape as the tensor that ONNX has in its place."""
        if isinstance(value, relax.Expr) and isinstance(value.ty, relax.ShapeType):
            return self._bb.normalize(relax.op.shape_to_tensor(value))
        return value

    def _stand_in(self, node: ir.Node) -> None:
        """Fresh values for what a refused node computes, so that the others are looked at."""
        for value in node.outputs:
            dtype = self._sizes.dtype(value)
            if dtype is None or not _is_numeric(value, dtype):
                dtype = ir.DataType.FLOAT
            kind = relax.TensorType(shape=self._sizes.cast(value), dtype=dtype.numpy().name)
            self._nodes[value.name or ""] = relax.Var(value.name, kind)


_ANY_RANK = -1
"""What TVM says of tensors such as those of an If whose branches differ in rank."""
_ODD = "sequences, and what may be absent"
_NO_TENSORS = ("Sequence", "Optional", "SplitToSequence", "ConcatFromSequence")
"""How the names of operators on them start."""
_FEW_BITS = ("FLOAT8", "FLOAT4", "INT4", "UINT4", "INT2", "UINT2")
_TAKES_SHAPES = frozenset(
    {"Reshape", "Resize", "ConstantOfShape", "Gather", "Slice", "Shape", "Expand", "Concat"}
    | {"Where", "Cast", "CastLike", "Squeeze"}
)
"""Operators whose converters compute with symbolic shapes; the others are given tensors."""


def _is_numeric(value: ir.Value, dtype: ir.DataType | None) -> bool:
    """Whether a value, of a type that may be inferred, is a tensor of numbers that TVM has."""
    if not isinstance(value.type, ir.TensorType | None):
        return False
    return dtype != ir.DataType.STRING and not (dtype and dtype.name.startswith(_FEW_BITS))


def _require_rank(values: Sequence[Any]) -> None:
    """Kernels have loops, whose number the compiler has to know."""
    if any(getattr(getattr(value, "ty", None), "ndim", 0) == _ANY_RANK for value in values):
        raise NotImplementedError("the rank of its input is known at run time only")


def _require_shape(result: Any) -> None:
    """Of what is computed, save by the few operators that TVM lowers without."""
    if not (isinstance(result, tvm.ir.Call) and isinstance(result.op, tvm.ir.Op)):
        return
    shaped = not isinstance(result.ty, relax.TensorType) or result.ty.shape is not None
    if not shaped and not any(result.op.get_attr(name) for name in _WITHOUT_SHAPES):
        raise NotImplementedError("the shape of its output is known at run time only")


_WITHOUT_SHAPES = ("FDataDependent", "FCallPacked")
"""What TVM says of these operators."""


def _known() -> Mapping[str, Any]:
    table: Mapping[str, Any] = _frontend._get_convert_map()
    return table


def _reason(error: Exception) -> str:
    """Why a node is not taken: what a converter says, or what happened to it."""
    said = isinstance(error, NotImplementedError) and str(error)
    return last_line(error) if said else f"{type(error).__name__}: {last_line(error)}"
