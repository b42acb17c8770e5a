"""Sketches of a model's tensors over samples: in one pass, in bounded memory, resumable, cached."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from graphopt import ir
from graphopt.errors import InputError
from graphopt.quantizer.sketch import Sketches, add_all, merged
from graphopt.samples import Samples
from graphopt.taps import MEMORY_LIMIT, groups, tap

__all__ = ["calibrate", "fingerprint"]

_SAVE_SECONDS = 10.0
_FORMAT = b"graphopt sketches 1"


def calibrate(
    model: ir.Model,
    names: Sequence[str],
    samples: Samples,
    *,
    axes: Mapping[str, int] | None = None,
    memory_limit: int = MEMORY_LIMIT,
    threads: int = 1,
    cache: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Sketches:
    """Sketches of float tensors of the main graph, by name.

    Args:
        axes: tensors that are also looked at per channel, with the channel axis.
        memory_limit: bytes of tensors held at a time; where that is less than a sample has, the
            samples are gone through several times, each time for a part of the tensors.
        cache: a folder for results, by a hash of model, data and tensors. A run that was cut off
            goes on where it last saved, at most 10 seconds before.

    Raises:
        InputError: no samples, or values that are not finite, naming the tensor.
        GraphoptError: the model does not run.
    """
    first = next(iter(samples))
    parts: list[Sketches] = []
    whole = fingerprint(model) + samples.key if cache is not None else ""
    plan = groups(model, names, first, memory_limit=memory_limit)
    for index, group in enumerate(plan):
        own = {name: axis for name, axis in (axes or {}).items() if name in group}
        file = None if cache is None else cache / f"{_key(whole, group, own)}.npz"
        label = f"calibration {index + 1}/{len(plan)}" if len(plan) > 1 else "calibration"
        parts.append(_one_group(model, group, samples, own, threads, file, (label, progress)))
    result = merged(parts)
    result.samples = parts[0].samples if parts else 0
    return result


def _one_group(
    model: ir.Model,
    names: Sequence[str],
    samples: Samples,
    axes: Mapping[str, int],
    threads: int,
    file: Path | None,
    show: tuple[str, Callable[[str], None] | None],
) -> Sketches:
    label, progress = show
    sketches = Sketches()
    if file is not None and file.is_file():
        try:
            sketches = Sketches.load(file)
        except InputError:
            file.unlink()
        if sketches.samples >= len(samples):
            return sketches
    rest = itertools.islice(samples, sketches.samples, None)
    saved = time.monotonic()
    for values in tap(model, names, rest, threads=threads):
        add_all(sketches, values, axes)
        sketches.samples += 1
        if progress is not None:
            progress(f"{label}: {sketches.samples} samples")
        if file is not None and time.monotonic() - saved > _SAVE_SECONDS:
            _save(sketches, file)
            saved = time.monotonic()
    if file is not None:
        _save(sketches, file)
    return sketches


def _save(sketches: Sketches, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    sketches.save(file)


def fingerprint(model: ir.Model) -> str:
    """A hash of what a model computes: its nodes, their order and names, and all constants."""
    digest = hashlib.blake2b(_FORMAT, digest_size=16)
    for graph in ir.graphs(model):
        digest.update(f"{sorted(graph.opset_imports.items())}".encode())
        for value in graph.inputs:
            digest.update(f"input {value.name} {value.type} {value.shape};".encode())
        for name, value in graph.initializers.items():
            digest.update(f"{name};".encode())
            if value.const_value is not None:
                _add_tensor(digest, value.const_value)
        for node in graph:
            _add_node(digest, node)
    return digest.hexdigest()


def _add_node(digest: hashlib.blake2b, node: ir.Node) -> None:
    inputs = [None if v is None else v.name for v in node.inputs]
    outputs = [v.name for v in node.outputs]
    digest.update(f"{node.domain}.{node.op_type} {inputs} {outputs};".encode())
    for name, attr in sorted(node.attributes.items()):
        digest.update(f"{name}=".encode())
        if attr.type == ir.AttributeType.TENSOR and not attr.is_ref():
            _add_tensor(digest, attr.as_tensor())
        elif attr.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            digest.update(str(attr.value).encode())


def _add_tensor(digest: hashlib.blake2b, tensor: ir.TensorProtocol) -> None:
    digest.update(f"{tensor.dtype} {tensor.shape};".encode())
    if tensor.dtype == ir.DataType.STRING:
        digest.update(str(tensor.numpy().tolist()).encode())
    else:
        digest.update(np.ascontiguousarray(tensor.numpy()).view(np.uint8).data)


def _key(whole: str, names: Sequence[str], axes: Mapping[str, int]) -> str:
    text = f"{whole} {list(names)} {sorted(axes.items())}"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
