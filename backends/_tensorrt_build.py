"""From a model to an engine: parse, set ranges of sizes, build; and why not, node by node."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

from graphopt import files, ir, profiles
from graphopt.backends import NodeError
from graphopt.backends._tensorrt_library import architectures, library, log, tidy
from graphopt.backends._tensorrt_options import Options
from graphopt.errors import GraphoptError, InputError, MissingError
from graphopt.target import Target

_INTRICATE = frozenset({"GRU", "If", "LSTM", "Loop", "RNN", "Scan"})
_TYPES = frozenset(
    ir.DataType[name]
    for name in (
        *("FLOAT", "FLOAT16", "BFLOAT16", "INT8", "INT32", "INT64", "BOOL", "UINT8"),
        *("FLOAT8E4M3FN", "INT4", "FLOAT4E2M1"),
    )
)
"""What TensorRT computes with."""
_COMPATIBILITY = {"same": "SAME_COMPUTE_CAPABILITY", "ampere": "AMPERE_PLUS"}


def unsupported(model: ir.Model) -> dict[str, str]:
    """The nodes that the parser does not take, by label, with the reason.

    From its lists of the nodes of supported stretches: the flag beside them is not reliable.
    """
    trt = library()
    builder = _builder()  # has to outlive what it makes
    network = _network(builder)
    parser = trt.OnnxParser(network, log().logger)
    parser.supports_model_v2(_serialized(model))
    nodes = list(model.graph)
    taken = {i for k in range(parser.num_subgraphs) for i in parser.get_subgraph_nodes(k)}
    errors = _errors(parser, nodes)
    log().take()
    left = (node for index, node in enumerate(nodes) if index not in taken)
    return {ir.label(node): errors.get(ir.label(node)) or _wordless(node) for node in left}


def _wordless(node: ir.Node) -> str:
    """Why the parser, which does not say so, may not take a node: as a rule it is a type."""
    values = (value for value in (*node.inputs, *node.outputs) if value is not None)
    kinds = {value.name: value.type for value in values if value.type is not None}
    for name, kind in kinds.items():
        if not isinstance(kind, ir.TensorType):
            return f"{node.op_type}: {name} is no tensor, and TensorRT has nothing else"
        if kind.dtype not in _TYPES:
            return f"{node.op_type}: {name} is {kind.dtype.name.lower()}, which TensorRT lacks"
    return f"{node.op_type}: the parser does not take it and does not say why"


def build(model: ir.Model, target: Target, options: Options) -> bytes:
    """The engine.

    Raises:
        NodeError: nodes that the parser or the builder refuses.
        InputError: sizes of inputs that are missing or do not fit.
        MissingError: an architecture or an option that the library has not.
        GraphoptError: the builder failed without naming a node.
    """
    trt = library()
    builder = _builder()
    network = _network(builder)
    parser = trt.OnnxParser(network, log().logger)
    if not parser.parse(_serialized(model)):
        refused = _errors(parser, list(model.graph))
        raise _refusal(refused, [tidy(parser.get_error(i).desc()) for i in _count(parser)])
    _permit_parts(network)
    config = builder.create_builder_config()
    _configure(config, options)
    aim(config, target)
    _add_profile(builder, config, network, profiles.parse(options.shapes))
    log().take()
    engine = builder.build_serialized_network(network, config)
    messages = log().take()
    if engine is None:
        raise _refusal(_named(messages, model) or _suspects(messages, model), messages)
    return bytes(engine)


def _permit_parts(network: Any) -> None:
    """Let attention be computed in parts where there is no kernel for all of it.

    Otherwise the builder fails: such kernels are for some types, sizes and architectures only.
    """
    trt = library()
    start = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    for layer in map(network.get_layer, range(network.num_layers)):
        if start is not None and layer.type == start:
            layer.__class__ = trt.IAttentionInputLayer  # as the bindings' documentation casts
            layer.attention.decomposable = True


def _builder() -> Any:
    return library().Builder(log().logger)


def _network(builder: Any) -> Any:
    kinds = library().NetworkDefinitionCreationFlag
    strong = getattr(kinds, "STRONGLY_TYPED", None)
    return builder.create_network(0 if strong is None else 1 << int(strong))


def _serialized(model: ir.Model) -> bytes:
    proto = files.to_proto(model)
    try:
        return proto.SerializeToString()
    except ValueError:
        raise GraphoptError("tensorrt takes models of up to 2 GB") from None


def _count(parser: Any) -> range:
    return range(parser.num_errors)


def _errors(parser: Any, nodes: list[ir.Node]) -> dict[str, str]:
    """The parser's errors by the label of the node that each is about."""
    found: dict[str, str] = {}
    for index in _count(parser):
        error = parser.get_error(index)
        place: int = error.node()
        if not 0 <= place < len(nodes):
            continue
        operator: str = error.node_operator() or nodes[place].op_type
        why = tidy(error.desc())
        if why == "false" or "Plugin not found" in why:
            why = "TensorRT has no such operator"
        found.setdefault(ir.label(nodes[place]), f"{operator}: {why}")
    return found


def _named(messages: Iterable[str], model: ir.Model) -> dict[str, str]:
    """The builder's errors by the node whose name stands in them, the longest name that does."""
    labels = sorted((ir.label(node) for node in model.graph), key=len, reverse=True)
    found: dict[str, str] = {}
    for message in messages:
        label = next((name for name in labels if name and name in message), None)
        if label is not None:
            found.setdefault(label, message)
    return found


def _suspects(messages: list[str], model: ir.Model) -> dict[str, str]:
    """Where the builder fails without a name: its recurrent layers and branches, if there are any.

    They are what its optimizer stumbles over; the rest is worth another try without them.
    """
    why = f"the builder fails with it in the model: {messages[0] if messages else 'no reason'}"
    return {ir.label(node): why for node in model.graph if node.op_type in _INTRICATE}


def _refusal(refused: Mapping[str, str], messages: list[str]) -> GraphoptError:
    if refused:
        return NodeError("tensorrt", refused)
    return GraphoptError(f"tensorrt cannot build it: {messages[0] if messages else 'no reason'}")


def _configure(config: Any, options: Options) -> None:
    trt = library()
    flags = trt.BuilderFlag.__members__
    config.builder_optimization_level = options.optimization
    if options.workspace_mb:
        pool = trt.MemoryPoolType.WORKSPACE
        config.set_memory_pool_limit(pool, options.workspace_mb << 20)
    wanted = {"SPARSE_WEIGHTS": options.sparse, "STRIP_PLAN": options.strip_weights}
    for name, on in wanted.items():
        if on and name not in flags:
            raise MissingError(f"this TensorRT has no {name.lower().replace('_', ' ')}")
        if on:
            config.set_flag(flags[name])
    if "TF32" in flags and not options.tf32:
        config.clear_flag(flags["TF32"])
    if options.compatibility != "none":
        levels = trt.HardwareCompatibilityLevel.__members__
        config.hardware_compatibility_level = levels[_COMPATIBILITY[options.compatibility]]


def aim(config: Any, target: Target) -> None:
    """Say which GPU the engine is for; without one, it is the library's own choice.

    Full TensorRT knows of none: it builds for the GPU that it is on.
    """
    known = architectures()
    if not target.arch or not known:
        return
    if target.arch not in known:
        raise MissingError(
            f"this TensorRT does not build for {target.arch}, only for {', '.join(known)}"
        )
    config.num_compute_capabilities = 1
    config.set_compute_capability(known[target.arch], 0)


def _add_profile(
    builder: Any, config: Any, network: Any, given: Mapping[str, profiles.Profile]
) -> None:
    """Ranges for the inputs that have free sizes; a single size for one that has none is checked.

    Raises:
        InputError: a range that is missing, does not fit, or is of no input.
    """
    inputs = {tensor.name: tensor for tensor in map(network.get_input, range(network.num_inputs))}
    for name in given:
        if name not in inputs:
            raise InputError(f"shapes: no input is named {name!r}; there are {', '.join(inputs)}")
    profile = builder.create_optimization_profile()
    free = False
    for name, tensor in inputs.items():
        shape = tuple(tensor.shape)
        sizes = given.get(name)
        if sizes is not None and not _fits(sizes, shape):
            raise InputError(f"shapes: {name}={sizes} does not fit its shape {_show(shape)}")
        if -1 not in shape:
            continue
        if sizes is None:
            example = "/".join("x".join(str(k if d < 0 else d) for d in shape) for k in (1, 4, 8))
            raise InputError(
                f"tensorrt needs the sizes of input {name} {_show(shape)}: "
                f"--shapes {name}={example} (smallest/usual/largest)"
            )
        free = True
        profile.set_shape(name, sizes.least, sizes.usual, sizes.most)
    if free:
        with contextlib.suppress(ValueError):
            config.add_optimization_profile(profile)


def _fits(sizes: profiles.Profile, shape: tuple[int, ...]) -> bool:
    return len(sizes.least) == len(shape) and all(
        size < 0 or low == high == size
        for low, high, size in zip(sizes.least, sizes.most, shape, strict=True)
    )


def _show(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join("?" if size < 0 else str(size) for size in shape) + "]"
