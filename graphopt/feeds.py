"""Inputs for running a model: random ones, and a user's own from .npz files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from graphopt import ir, npz
from graphopt.errors import InputError
from graphopt.ir import Array
from graphopt.random_inputs import random_feeds, required_inputs, single_feeds, workable_feeds

__all__ = [
    "check_feeds",
    "load_feeds",
    "load_samples",
    "random_feeds",
    "required_inputs",
    "single_feeds",
    "workable_feeds",
]


def load_feeds(path: Path, model: ir.Model, notes: list[str] | None = None) -> dict[str, Array]:
    """A user's inputs: the arrays of a .npz file, checked against what the model declares.

    An array of another dtype is converted where that changes none of its values; a line about it
    goes to `notes`. Inputs with a default, and optional ones, may be left out.

    Raises InputError, naming file, input and cause: a file that cannot be read, missing or unknown
    names, dtypes and shapes that do not fit, a symbolic dimension with two sizes.
    """
    return check_feeds(npz.read(path), model, where=str(path), notes=notes)


def check_feeds(
    arrays: Mapping[str, Array],
    model: ir.Model,
    *,
    where: str = "inputs",
    notes: list[str] | None = None,
) -> dict[str, Array]:
    """Arrays by input name, checked and converted as `load_feeds` does; `where` names them."""
    _check_names(where, arrays, model)
    sizes: dict[str, tuple[int, str]] = {}
    feeds: dict[str, Array] = {}
    for value in model.graph.inputs:
        name = value.name or ""
        if name in arrays:
            array = _converted(where, value, arrays[name], notes)
            _check_shape(where, value, array.shape, sizes)
            feeds[name] = array
    return feeds


def load_samples(path: Path, model: ir.Model) -> tuple[dict[str, Array], Array | None]:
    """Samples stacked on the first axis, and their `labels` (None without such an array).

    Arrays may also have an axis more than the model's input: then each sample is a whole input of
    batch 1, as calibration data often is. Raises InputError like `load_feeds`, and where the
    numbers of samples differ.
    """
    where = str(path)
    arrays = npz.read(Path(path))
    declared = {v.name for v in model.graph.inputs}
    labels = arrays.pop("labels", None) if "labels" not in declared else None
    _check_names(where, arrays, model)
    feeds: dict[str, Array] = {}
    for value in model.graph.inputs:
        name = value.name or ""
        if name not in arrays:
            continue
        array = _converted(where, value, arrays[name], None)
        if value.shape is not None and array.ndim == len(value.shape) + 1 and array.shape[1] == 1:
            array = array.reshape(array.shape[0], *array.shape[2:])
        _check_shape(where, value, array.shape, {}, skip=1)
        feeds[name] = array
    counts = {name: array.shape[0] for name, array in feeds.items() if array.ndim}
    if labels is not None:
        counts["labels"] = len(labels)
    if len(set(counts.values())) > 1:
        raise InputError(f"{where}: numbers of samples differ: {counts}")
    return feeds, labels


def _check_names(where: str, arrays: Mapping[str, Array], model: ir.Model) -> None:
    names = [v.name or "" for v in model.graph.inputs]
    unknown = sorted(set(arrays) - set(names))
    if unknown:
        raise InputError(f"{where}: {unknown[0]!r} is no input of the model, which takes {names}")
    for value in required_inputs(model):
        if isinstance(value.type, ir.SequenceType) or value.type is None:
            raise InputError(f"{where}: input {value.name!r} is no tensor; .npz holds arrays only")
        if value.name not in arrays and not isinstance(value.type, ir.OptionalType):
            raise InputError(f"{where}: no array for input {value.name!r}, it has {sorted(arrays)}")


def _converted(where: str, value: ir.Value, array: Array, notes: list[str] | None) -> Array:
    """The array in the dtype that an input declares, if no value changes."""
    kind = value.type
    if isinstance(kind, ir.OptionalType):
        kind = kind.elem_type
    if not isinstance(kind, ir.TensorType):
        return array
    wanted = kind.dtype.numpy()
    given = array.dtype
    if given == wanted:
        return array
    if given.kind == "V" and given.itemsize == wanted.itemsize and given.names is None:
        return array.view(wanted)  # numpy's files do not know bf16 and fp8 by name
    if given.kind in "biuf" and kind.dtype not in (ir.DataType.STRING, ir.DataType.BOOL):
        with np.errstate(all="ignore"):
            result = array.astype(wanted)
            back = result.astype(given)
        if np.array_equal(back, array, equal_nan=given.kind == "f"):
            if notes is not None:
                notes.append(f"{where}: {value.name!r} converted from {given} to {wanted}")
            return result
    wanted_name = "text" if kind.dtype == ir.DataType.STRING else str(wanted)
    given_name = "text" if given.kind == "O" else str(given)
    raise InputError(
        f"{where}: input {value.name!r} is {given_name}, the model takes {wanted_name}"
    )


def _check_shape(
    where: str,
    value: ir.Value,
    shape: tuple[int, ...],
    sizes: dict[str, tuple[int, str]],
    skip: int = 0,
) -> None:
    """Fixed dimensions must agree, named ones across inputs too; `skip` first axes are free."""
    if value.shape is None:
        return
    declared = "[" + ", ".join(_dim_text(d) for d in value.shape) + "]"
    wrong = InputError(
        f"{where}: input {value.name!r} has shape {list(shape)}, the model takes {declared}"
    )
    if len(shape) != len(value.shape):
        raise wrong
    for size, dim in _pairs(shape[skip:], list(value.shape)[skip:]):
        if isinstance(dim, int):
            if dim != size:
                raise wrong
        elif sizes.setdefault(dim, (size, value.name or ""))[0] != size:
            before, other = sizes[dim]
            raise InputError(
                f"{where}: dimension {dim!r} is {before} in input {other!r} "
                f"and {size} in input {value.name!r}"
            )


def _pairs(
    shape: Sequence[int], dims: Sequence[int | ir.SymbolicDim]
) -> Iterator[tuple[int, int | str]]:
    """Sizes with the numbers or names that they must match; unnamed dimensions are left out."""
    for size, dim in zip(shape, dims, strict=True):
        if isinstance(dim, int):
            yield size, dim
        elif dim.value is not None:
            yield size, str(dim.value)


def _dim_text(dim: int | ir.SymbolicDim) -> str:
    return str(dim) if isinstance(dim, int) else str(dim.value or "?")
