"""Samples: data to calibrate, reconstruct and score with, from wherever the user has it.

Whatever the source, samples are the feeds of one run each, checked against the model, and can be
gone through again and again without being held in memory.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.errors import InputError
from graphopt.feeds import check_feeds, required_inputs, workable_feeds
from graphopt.samples import images, reading
from graphopt.samples.images import Images
from graphopt.samples.iterables import rows_of
from graphopt.shapes import Shapes

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
Row = Mapping[str, Array]
Rows = Callable[[], Iterator[Row]]

_RANDOM = 16
"""How many random samples there are unless told otherwise."""


class Samples:
    """Samples of a model: an iterable, as often as wanted, of the feeds of one run each."""

    def __init__(
        self,
        rows: Rows,
        model: ir.Model,
        *,
        where: str,
        labels: Array | None = None,
        count: int | None = None,
        random: bool = False,
    ) -> None:
        self.where = where
        """The source, as errors name it."""
        self.labels = labels
        """What is right for each sample, or None."""
        self.random = random
        """Whether nobody's data are in them."""
        self._rows, self._model, self._count = rows, model, count
        self._key = ""

    def __iter__(self) -> Iterator[dict[str, Array]]:
        """Feeds by input name, in the order of the model's inputs.

        Raises InputError, naming source and input, for what does not fit or where there is none.
        """
        count = 0
        for row in self._rows():
            yield check_feeds(row, self._model, where=f"{self.where}, sample {count}")
            count += 1
        if not count:
            raise InputError(f"{self.where}: there are no samples")
        self._count = count

    def __len__(self) -> int:
        """How many there are, which may take a pass over them."""
        if self._count is None:
            self._count = sum(1 for _ in self._rows())
        return self._count

    @property
    def key(self) -> str:
        """A hash of what is in them."""
        if not self._key:
            digest = hashlib.blake2b(digest_size=16)
            for feeds in self:
                for name, array in feeds.items():
                    digest.update(f"{name} {array.dtype} {array.shape};".encode())
                    plain = array.astype(str) if array.dtype.kind == "O" else array
                    digest.update(np.ascontiguousarray(plain).tobytes())
            self._key = digest.hexdigest()
        return self._key

    def take(self, count: int) -> Samples:
        """The first of them, no more than there are."""
        if count < 1:
            raise InputError(f"the number of samples is at least 1, not {count}")
        return self._some(slice(count), self._count and min(count, self._count), self.where)

    def part(self, index: int, count: int) -> Samples:
        """Every so many-th of them from `index` on: one of `count` parts that make up all.

        What processes or machines see of their parts is added up by `Sketches.merge`.
        """
        if not 0 <= index < count:
            raise InputError(f"there is no part {index} of {count}: they are counted from 0")
        known = None if self._count is None else len(range(index, self._count, count))
        where = f"{self.where}, part {index + 1} of {count}"
        return self._some(slice(index, None, count), known, where)

    def without(self, index: int, count: int) -> Samples:
        """All but what `part` has, in order and without labels."""
        part = self.part(index, count)
        return Samples(
            lambda: (row for place, row in enumerate(self._rows()) if place % count != index),
            self._model,
            where=self.where,
            count=None if self._count is None else self._count - len(part),
            random=self.random,
        )

    def _some(self, rows: slice, count: int | None, where: str) -> Samples:
        return Samples(
            lambda: itertools.islice(self._rows(), rows.start, rows.stop, rows.step),
            self._model,
            where=where,
            labels=None if self.labels is None else self.labels[rows],
            count=count,
            random=self.random,
        )


class Reader(Protocol):
    """ONNX Runtime's CalibrationDataReader."""

    def get_next(self) -> Any:
        """The next feeds by input name, or None."""


SamplesLike = Samples | str | Path | Iterable[Any] | Reader


def open_samples(
    source: SamplesLike,
    model: ir.Model,
    *,
    limit: int | None = None,
    options: Images | None = None,
) -> Samples:
    """Samples of a source, for a model.

    Args:
        source: arrays by input name, or one for a single input; the path of a .npz or .npy file,
            of a folder of these, of images or of ONNX's test_data_set_* folders;
            `file.py:function`, which is executed and yields feeds; any
            iterable of mappings, tuples in the order of inputs, or arrays for a single input; a
            torch DataLoader; ONNX Runtime's CalibrationDataReader; `random`, which has to be
            asked for by this name.
        model: what they are for. An array with an axis more than its input holds a sample in
            each place of the first axis; one of the same rank is cut along the first axis where
            that is free or 1 (or into batches that the model fixes, the last one filled up).
        limit: only the first so many.
        options: how images are read.

    Raises:
        InputError: a source that cannot be read or does not fit the model, naming the cause.
        MissingError: images without pillow.
    """
    if isinstance(source, Samples):
        samples = source
    elif isinstance(source, str | Path):
        samples = _of_text(str(source), model, limit, options or Images())
    elif isinstance(source, Mapping):
        given = cast("Mapping[str, Any]", source)
        where = "the arrays given"
        stacks = {name: reading.Held(reading.array(array, where)) for name, array in given.items()}
        samples = _of_stacks(stacks, model, where)
    elif isinstance(source, np.ndarray):
        stack = reading.Held(cast(Array, source))
        samples = _of_stacks({_single("an array", model): stack}, model, "the array given")
    else:
        where = type(source).__name__
        samples = Samples(rows_of(source, model, where), model, where=where)
    return samples if limit is None or samples.random else samples.take(limit)


def _of_text(text: str, model: ir.Model, limit: int | None, options: Images) -> Samples:
    if text == "random":
        return _random(model, _RANDOM if limit is None else limit)
    if not Path(text).exists() and Path(text.rpartition(":")[0]).suffix == ".py":
        return Samples(rows_of(reading.user_function(text), model, text), model, where=text)
    path = Path(text)
    if path.is_dir():
        return _of_folder(path, model, options)
    if path.suffix.lower() not in (".npz", ".npy") or not path.is_file():
        what = "is no data" if path.exists() else "does not exist"
        raise InputError(f"{path}: {what}; take an .npz, a folder, file.py:function or random")
    return _of_file(path, model)


def _of_file(path: Path, model: ir.Model) -> Samples:
    if path.suffix.lower() == ".npy":
        return _of_stacks({_single(path, model): reading.Stack(path)}, model, str(path))
    return _of_stacks(reading.stacks(path), model, str(path))


def _of_stacks(given: Mapping[str, reading.Rows], model: ir.Model, where: str) -> Samples:
    arrays = dict(given)
    inputs = [v.name or "" for v in model.graph.inputs]
    labels = arrays.pop("labels").whole() if "labels" in arrays and "labels" not in inputs else None
    unknown = sorted(set(arrays) - set(inputs))
    if unknown:
        raise InputError(f"{where}: {unknown[0]!r} is no input of the model, which takes {inputs}")
    if not arrays:
        raise InputError(f"{where}: holds no arrays")
    ranks = {v.name or "": _rank(v) for v in model.graph.inputs}
    counts = {name: _count(a, ranks[name]) for name, a in arrays.items()}
    many = {name: count for name, count in counts.items() if count != 1}
    if len(set(many.values())) > 1:
        raise InputError(f"{where}: numbers of samples differ: {many}")
    count = max(counts.values(), default=0)
    if not count:
        raise InputError(f"{where}: there are no samples")

    def rows() -> Iterator[Row]:
        parts = [_parts(a, ranks[name], counts[name], count) for name, a in arrays.items()]
        for values in zip(*parts, strict=True):
            yield dict(zip(arrays, values, strict=True))

    batch = _batch(model, {name: a.shape for name, a in arrays.items()}, ranks)
    if batch == 1:
        return Samples(rows, model, where=where, labels=labels, count=count)
    batches = -(-count // batch)
    return Samples(
        lambda: _batched(rows(), batch), model, where=where, labels=labels, count=batches
    )


def _count(stack: reading.Rows, rank: int | None) -> int:
    """How many samples an array holds: 1 where it is the value of an input as it stands."""
    rows = rank is not None and stack.shape and len(stack.shape) in (rank, rank + 1)
    return stack.shape[0] if rows else 1


def _parts(stack: reading.Rows, rank: int | None, own: int, count: int) -> Iterator[Array]:
    """The array of each sample; one that belongs to all is repeated.

    One that lacks an axis is a sample without that of the batch.
    """
    if rank is not None and 0 < len(stack.shape) == rank - 1:
        yield from itertools.repeat(stack.whole()[None], count)
    elif own != count or rank is None or not stack.shape:
        yield from itertools.repeat(stack.whole(), count)
    elif len(stack.shape) == rank + 1:
        yield from map(np.asarray, stack.rows())  # of a vector those are no arrays
    else:
        yield from (row[None] for row in stack.rows())


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def _batch(
    model: ir.Model, shapes: Mapping[str, tuple[int, ...]], ranks: Mapping[str, int | None]
) -> int:
    """How many rows of arrays of the inputs' own rank make a run; 1 where the model is free."""
    for value in model.graph.inputs:
        name = value.name or ""
        if name in shapes and value.shape and len(shapes[name]) == ranks[name]:
            first = value.shape[0]
            if isinstance(first, int) and first > 1:
                return first
    return 1


def _batched(rows: Iterator[Row], batch: int) -> Iterator[Row]:
    while group := list(itertools.islice(rows, batch)):
        group += [group[-1]] * (batch - len(group))
        yield {name: np.concatenate([row[name] for row in group]) for name in group[0]}


def _of_folder(path: Path, model: ir.Model, options: Images) -> Samples:
    kind, files = reading.contents(path)
    where = str(path)
    if kind == "sets":
        names = [v.name or "" for v in model.graph.inputs]
        count = len(files)
        return Samples(lambda: reading.data_sets(files, names), model, where=where, count=count)
    if kind == "images":
        name = _single(path, model)
        plan = options.plan(next(v for v in model.graph.inputs if v.name == name))
        labels = images.labels(path, files)
        count = len(files)
        return Samples(
            lambda: images.read(plan, name, files), model, where=where, labels=labels, count=count
        )
    parts = [_of_file(file, model) for file in files]
    known = [part.labels for part in parts if part.labels is not None]
    if known and len(known) != len(parts):
        raise InputError(f"{path}: some files have labels and some have not")
    return Samples(
        lambda: (feeds for part in parts for feeds in part),
        model,
        where=where,
        labels=np.concatenate(known) if known else None,
        count=sum(len(part) for part in parts),
    )


def _single(what: Path | str, model: ir.Model) -> str:
    needed = [v.name or "" for v in required_inputs(model)]
    if len(needed) != 1:
        raise InputError(f"{what}: holds one input, the model takes {needed}; use .npz files")
    return needed[0]


def _random(model: ir.Model, count: int) -> Samples:
    if count < 1:
        raise InputError(f"the number of samples is at least 1, not {count}")
    first = workable_feeds(model, Shapes(model))
    sizes = bindings(model, first)

    def rows() -> Iterator[Row]:
        yield first
        for seed in range(1, count):
            yield workable_feeds(model, Shapes(model), seed=seed, bindings=sizes)

    return Samples(rows, model, where="random", count=count, random=True)


def bindings(model: ir.Model, feeds: Feeds) -> dict[str, int]:
    """Sizes of the named dimensions of inputs."""
    return {
        str(dim.value): size
        for value in model.graph.inputs
        if value.shape is not None and value.name in feeds
        for dim, size in zip(value.shape, np.shape(feeds[value.name or ""]), strict=True)
        if not isinstance(dim, int) and dim.value is not None
    }
