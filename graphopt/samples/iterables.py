"""Iterables, generators, data loaders and calibration readers as rows of a model's inputs.

What can be gone through only once is kept in a temporary file for the next time.
"""

from __future__ import annotations

import inspect
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.errors import GraphoptError, InputError
from graphopt.feeds import required_inputs
from graphopt.samples import reading

__all__ = ["rows_of"]

Array = npt.NDArray[Any]
Row = Mapping[str, Array]


def rows_of(source: Any, model: ir.Model, where: str) -> Callable[[], Iterator[Row]]:
    """The rows of an iterable, of a function that makes one, or of a reader with `get_next`.

    Raises InputError for anything else, and, as they are gone through, for what fails.
    """
    make: Callable[[], Iterable[Any]]
    again: Any = getattr(source, "__iter__", None)
    following: Any = getattr(source, "get_next", None)
    if again is None and following is not None:
        make = _Spool(iter(following, None), model, where)
    elif callable(source) and not inspect.isclass(source):
        make = cast("Callable[[], Iterable[Any]]", source)
    elif again is not None:
        make = _Spool(again(), model, where) if hasattr(source, "__next__") else again
    else:
        raise InputError(f"{where}: is no iterable of feeds")

    def rows() -> Iterator[Row]:
        items = iter(_call(make, where))
        while True:
            try:
                item = next(items)
            except StopIteration:
                return
            except GraphoptError:
                raise
            except Exception as error:
                raise InputError(f"{where}: fails with {type(error).__name__}: {error}") from error
            yield from _fitted(_row(item, model, where), model)

    return rows


def _call(make: Callable[[], Iterable[Any]], where: str) -> Iterable[Any]:
    try:
        made = make()
    except GraphoptError:
        raise
    except Exception as error:
        raise InputError(f"{where}: fails with {type(error).__name__}: {error}") from error
    if not hasattr(made, "__iter__"):
        raise InputError(f"{where}: gives {type(made).__name__}, not feeds one after the other")
    return made


def _row(item: Any, model: ir.Model, where: str) -> dict[str, Array]:
    """One item as arrays by input name; of a tuple what goes beyond the inputs is left out."""
    names = [v.name or "" for v in required_inputs(model)]
    if isinstance(item, Mapping):
        given = cast("Mapping[str, Any]", item)
        return {str(name): reading.array(value, where) for name, value in given.items()}
    values = cast("Sequence[Any]", item if isinstance(item, list | tuple) else [item])
    if not len(names) <= len(values) <= len(names) + 1:
        raise InputError(f"{where}: {len(values)} arrays for the inputs {names}")
    return {name: reading.array(value, where) for name, value in zip(names, values, strict=False)}


def _fitted(row: dict[str, Array], model: ir.Model) -> Iterator[Row]:
    """A row as the model takes it: a batch is added, or cut where it is larger than the model's."""
    shapes = {v.name or "": v.shape for v in model.graph.inputs}
    for name, array in row.items():
        shape = shapes.get(name)
        if shape is not None and 0 < array.ndim == len(shape) - 1:
            row[name] = array[None]
    sizes: set[tuple[int, int]] = set()
    for name, array in row.items():
        shape = shapes.get(name)
        if shape is None or not shape or array.ndim != len(shape):
            continue
        first = shape[0]
        if isinstance(first, int) and first != array.shape[0]:
            sizes.add((first, array.shape[0]))
    if len(sizes) != 1:
        yield row
        return
    batch, size = sizes.pop()
    for start in range(0, size, batch):
        index = np.minimum(np.arange(start, start + batch), size - 1)
        yield {n: a[index] if a.ndim and len(a) == size else a for n, a in row.items()}


class _Spool:
    """What can be gone through only once, kept in a temporary file for the next time."""

    def __init__(self, items: Iterator[Any], model: ir.Model, where: str) -> None:
        self._items, self._model, self._where = items, model, where
        self._file: BinaryIO | None = None
        self._names: list[list[str]] = []

    def __call__(self) -> Iterator[Row]:
        if self._file is None:
            self._fill()
        file = self._file
        assert file is not None
        offset = 0
        for names in self._names:
            file.seek(offset)
            row: dict[str, Array] = {}
            for name in names:
                array: Array = np.lib.format.read_array(cast(Any, file), allow_pickle=False)
                row[name] = array.astype(object) if array.dtype.kind == "U" else array
            offset = file.tell()
            yield row

    def _fill(self) -> None:
        file = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 - lives as long as this
        weakref.finalize(self, file.close)
        for item in self._items:
            row = _row(item, self._model, self._where)
            for array in row.values():
                plain = array.astype(str) if array.dtype.kind in "OSU" else array
                np.lib.format.write_array(cast(Any, file), plain, allow_pickle=False)
            self._names.append(list(row))
        self._file = file
